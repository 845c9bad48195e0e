r"""Several processes that work as one: who is here, what they agree on, which part is whose.

``torchrun -m bla train``, or whatever else sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, starts
them. :func:`bla.runs.run.train`, :func:`bla.runs.run.evaluate` and what a program does within :func:`joined` is then
done
together, by gloo, on a file system that all of them see. In a process by itself nothing here does anything.

Training by P processes is that of one, but for the order in which gradients are summed. Each takes a share B_p of the
rows of every batch B; its loss is divided by the size of the whole batch, and gradients are added up:

.. math:: \nabla L = \sum_{p \le P} \nabla \Bigl( \frac{1}{|B|} \sum_{b \in B_p} \ell_b \Bigr)

:func:`part_of` lets layers draw, and normalise, as they would on all rows.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bla import BlaError

Value = TypeVar("Value")
WORKING = datetime.timedelta(minutes=30)
"""How long they wait for one another where all are at work."""
PATIENCE = datetime.timedelta(days=7)
"""How long the others wait for one that works alone, or waits for another run's cache."""

_groups: tuple[Any, Any] | None = None
"""Of the processes that joined, one with either time."""


class ProcessError(BlaError):
    """Another process that has ended, or does not answer."""


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that the environment tells of, until the end of the block.

    Raises
    ------
    ProcessError
        There and in all that is done together, if another process ends or does not answer.
    """
    global _groups  # noqa: PLW0603 - as torch's own group is of the process
    if _groups is not None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    ours = not distributed.is_initialized()
    try:
        with _heard():
            if ours:
                distributed.init_process_group("gloo", timeout=WORKING)
            working, patient = (distributed.new_group(timeout=limit, backend="gloo") for limit in (WORKING, PATIENCE))
        _groups = working, patient
        yield
        together()  # the first one to end takes the meeting place along; it stays for those who join again
    except BaseException:
        if ours and distributed.is_initialized():
            distributed.destroy_process_group()  # so that the others hear of it
        raise
    finally:
        _groups = None


def rank() -> int:
    """The number of this process; the first, 0, is the one that writes."""
    return distributed.get_rank() if _groups else 0


def world() -> int:
    """How many there are."""
    return distributed.get_world_size() if _groups else 1


def agreed(value: Value) -> Value:
    """What the first process says; nobody goes on before it has said so."""
    if _groups is None:
        return value
    said: list[Any] = [value]
    with _heard():
        distributed.broadcast_object_list(said, group=_groups[1])
    return said[0]  # type: ignore[no-any-return]


def together() -> None:
    """Wait until all are here."""
    if _groups:
        with _heard():
            distributed.barrier(_groups[1])


def share(count: int, index: int | None = None) -> range:
    """The part of ``range(count)`` that falls to a process: contiguous, none padded, none left out.

    >>> share(5)
    range(0, 5)
    """
    index = rank() if index is None else index
    return range(count * index // world(), count * (index + 1) // world())


def everyones(value: Value) -> list[Value]:
    """What each process says, in their order.

    >>> everyones(3)
    [3]
    """
    if _groups is None:
        return [value]
    said: list[Any] = [None] * world()
    with _heard():
        distributed.all_gather_object(said, value, group=_groups[0])
    return said


def add_up(tensors: Sequence[Tensor]) -> None:
    """Put in place of each tensor its sum over all processes; one message for all of them."""
    if _groups is None:
        return
    total = _summed(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor in tensors:
        tensor.copy_(total[: tensor.numel()].view_as(tensor))
        total = total[tensor.numel() :]


def take_the_firsts(tensors: Iterable[Tensor]) -> None:
    """Put in place of each tensor that of the first process."""
    if _groups is None:
        return
    with _heard(), torch.no_grad():
        for tensor in tensors:
            said = tensor.detach().cpu().contiguous()
            distributed.broadcast(said, 0, group=_groups[0])
            tensor.copy_(said)


@contextmanager
def part_of(count: int) -> Iterator[range]:
    """Which of a batch's ``count`` rows are this process's; the others have the rest, or each has all of too few.

    Within it, dropout, and random numbers drawn in place into tensors with a row for each row of the batch, are those
    that the whole batch would get in one process, from generators that stand alike in all processes; batch
    normalisation in training is by the whole batch.
    """
    if count < world() or world() == 1:
        yield range(count)
    else:
        with _Part(count) as part:
            yield part.rows


_DRAWS: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch.Tensor, f"{name}_") for name in ("bernoulli", "exponential", "normal", "random", "uniform")
)
_DROPOUTS: frozenset[Callable[..., Any]] = frozenset(
    {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d}
)


class _Part(TorchFunctionMode):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.rows = count, share(count)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm and kwargs.get("training"):
            return _normalised(*args, **kwargs)
        if func in _DRAWS and len(args[0].shape) and len(args[0]) == len(self.rows):
            whole = self._whole(args[0])
            func(whole, *args[1:], **kwargs)
            return args[0].copy_(self._mine(whole))
        if func in _DROPOUTS and kwargs.get("training") and len(args[0]) == len(self.rows):
            return args[0] * self._mine(func(self._whole(args[0]).fill_(1), **{**kwargs, "inplace": False}))
        return func(*args, **kwargs)

    def _whole(self, part: Tensor) -> Tensor:
        """Room for the whole batch, laid out as its part is."""
        size = (self.count, *part.shape[1:])
        return torch.empty_strided(size, part.stride(), dtype=part.dtype, device=part.device)

    def _mine(self, whole: Tensor) -> Tensor:
        return whole[self.rows.start : self.rows.stop]


def _normalised(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation in training, its mean and variance those of all processes' rows."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    rows, channels = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    sums = _Sum.apply(torch.cat([wide.sum(rows), wide.new_tensor([x.numel() / x.shape[1]])]))
    mean, count = sums[:-1] / sums[-1], sums[-1].item()
    if count <= 1:
        raise ValueError(f"expected more than one value a channel to normalise by, got a batch of {count:g}")
    centred = wide - mean.view(channels)
    variance = _Sum.apply(centred.square().sum(rows)) / count
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    scale = torch.rsqrt(variance + eps) * (1 if weight is None else weight)
    normal: Tensor = centred * scale.view(channels) + (0 if bias is None else bias.view(channels))
    return normal.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; each one's gradient then counts in all of them."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    assert _groups is not None
    total = tensor.detach().cpu().contiguous().clone()
    with _heard():
        distributed.all_reduce(total, group=_groups[0])
    on_device: Tensor = total.to(tensor.device)
    return on_device


@contextmanager
def _heard() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ProcessError(
            f"expected all {os.environ.get('WORLD_SIZE')} processes at work, but one has ended or does not answer; its "
            f"own message says why. Start all of them again to go on ({reason})"
        ) from error
