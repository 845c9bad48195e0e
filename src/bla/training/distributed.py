r"""Several processes: caching in shards, training from the cache in the first one, fine-tuning by all of them.

``torchrun -m bla train`` starts them, as does any launcher that sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
``MASTER_PORT``. They need a file system that all of them see. In a single process nothing here does anything.

To fine-tune, each process takes a share B_p of the rows of every batch B, and its loss,
:math:`\frac{P}{|B|} \sum_{b \in B_p} \ell_b`, is scaled so that the average of the P gradients is that of the batch.

On GPUs batch normalisation is synchronised. On the CPU each process normalises by its own rows, and running statistics
are the first process's; dropout and augmentation are drawn in each process. So the result of several processes equals
that of one up to rounding only for a trunk without batch normalisation, dropout and augmentation.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from bla import BlaError

Value = TypeVar("Value")
_TIMEOUT = datetime.timedelta(days=7)
"""The others wait for the first process, which may wait for another run. A process that ends is noticed at once."""
_MEETING = datetime.timedelta(minutes=10)
"""For all processes to have started, at the address that the environment names."""

_joined, _meetings = False, 0


class ProcessError(BlaError):
    """Another process has ended or does not answer."""


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that the environment names; a ProcessError if another one ends or does not answer."""
    global _joined, _meetings  # noqa: PLW0603 - as torch's own group is global
    if _joined or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    ours = not distributed.is_initialized()
    try:
        if ours:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            store, number, count = next(rendezvous("env://", timeout=_MEETING))
            _meetings += 1  # torchrun keeps one store for all groups, and the keys of those that have ended
            store = PrefixStore(f"meeting {_meetings}", store)
            distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_TIMEOUT)
        _joined = True
        yield
        together()  # the first process hosts the meeting place: it must not end before the others
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise ProcessError(
            f"expected all {os.environ['WORLD_SIZE']} processes at work, but one has ended or does not answer; its own "
            f"message says why. Restart all of them to resume ({reason})"
        ) from error
    finally:
        _joined = False
        if ours and distributed.is_initialized():
            distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Work as a single process, until the end of the block."""
    global _joined  # noqa: PLW0603
    before, _joined = _joined, False
    try:
        yield
    finally:
        _joined = before


def rank() -> int:
    """The number of this process; the first, 0, is the one that writes."""
    return distributed.get_rank() if _joined else 0


def world() -> int:
    """The number of processes."""
    return distributed.get_world_size() if _joined else 1


def agreed(value: Value) -> Value:
    """The first process's value, in all processes."""
    values: list[Any] = [value]
    if world() > 1:
        distributed.broadcast_object_list(values)
    return values[0]  # type: ignore[no-any-return]


def gathered(value: Value) -> list[Value]:
    """Each process's value, in their order."""
    values: list[Any] = [value] * world()
    if world() > 1:
        distributed.all_gather_object(values, value)
    return values


def together() -> None:
    """Wait for all processes."""
    gathered(None)


def share(count: int) -> range:
    """The contiguous part of ``range(count)`` that falls to this process."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def parallel(module: nn.Module) -> nn.Module:
    """The module, with the first process's weights, and with gradients that are averaged over all processes."""
    if world() == 1:
        return module
    from timm.layers import convert_sync_batchnorm

    on_gpu = next(module.parameters()).is_cuda
    return DistributedDataParallel(convert_sync_batchnorm(module) if on_gpu else module)


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    if world() > 1:
        distributed.all_reduce(tensor)
    return tensor
