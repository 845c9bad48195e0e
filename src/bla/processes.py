"""Several processes that build a cache as one: who is here, what they agree on, which part is whose.

A program of yours, started by ``torchrun`` or whatever else sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
``MASTER_PORT``, calls :func:`bla.cache.cached_features` within :func:`joined`. In a process by itself nothing here does
anything.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed

Value = TypeVar("Value")
PATIENCE = datetime.timedelta(days=7)
"""How long the others wait for one that works alone; whoever started them ends them when one fails."""


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that the environment tells of, until the end of the block."""
    if distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
        distributed.barrier()  # the first one to leave takes the meeting place along
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process; the first, 0, is the one that writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def agreed(value: Value) -> Value:
    """What the first process says; nobody goes on before it has said so."""
    if world() == 1:
        return value
    said: list[Any] = [value]
    distributed.broadcast_object_list(said)
    return said[0]  # type: ignore[no-any-return]


def together() -> None:
    """Wait until all are here."""
    if world() > 1:
        distributed.barrier()


def share(count: int, index: int | None = None) -> range:
    """The part of ``range(count)`` that falls to a process: contiguous, none padded, none left out.

    >>> share(5)
    range(0, 5)
    """
    index = rank() if index is None else index
    return range(count * index // world(), count * (index + 1) // world())
