r"""What a classifier returns, as logits: which tensor is meant, and whether it holds logits, probabilities or a value.

.. math:: (l) \mapsto (-\tfrac l2, \tfrac l2), \qquad p \mapsto \log p, \qquad
          p \mapsto \log \tfrac{p}{1 - p} \text{ where each label stands alone}

A softmax of these, or the sigmoid of each, gives the classifier's own probabilities.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bla import BlaError
from bla.model.heads import reads_maps

Output = int | str | Callable[[Any], Any]
"""Which part of what a classifier returns is meant: by index, by key or attribute, or what a callable makes of it."""

Meaning = Literal["logits", "probabilities", "value"]
Path = tuple[int | str, ...]

_AFFINE = ("addmm", "mm", "bmm", "baddbmm", "matmul", "linear", "convolution", "conv1d", "conv2d", "conv3d")
_LOUD = 1e4
_LAST = 12
"""Of how many of the last layers is tried which outputs they make."""


class OutputError(BlaError):
    """An output that is no row of numbers for each image, or that may be meant in several ways."""


class Reading(NamedTuple):
    """How a classifier is called and understood: the arguments of these names of :func:`bla.explainable`."""

    output: Output | None = None
    inputs: Sequence[Any] | Mapping[str, Any] = ()
    meaning: Meaning | None = None
    several_labels: bool | None = None


class Outputs(NamedTuple):
    """What a classifier says to some pixels (B, 3, h, w)."""

    pixels: Tensor
    values: Tensor
    """(B, K)."""
    alone: Tensor
    """(3, K): what it says to the first image alone, and to the next two."""
    half: bool
    """Whether its layers compute in half precision."""
    regular: bool
    """Whether it returns such rows itself, also for one image."""


class Calling(nn.Module):
    """A classifier called with pixels alone, for one tensor of what it returns.

    ``inputs``, in their order or by name, are passed beside the pixels at every call; of a tensor with one row each
    image gets that.
    """

    def __init__(self, model: nn.Module, pixels: Tensor, inputs: Sequence[Any] | Mapping[str, Any] = ()) -> None:
        super().__init__()
        self.model = model
        self.inputs, self.named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        self.chosen: Path | Callable[[Any], Any] = ()
        self._probe: tuple[Tensor, Affine] | None = (pixels, Affine())

    @property
    def is_plain(self) -> bool:
        """Whether the classifier itself does as well."""
        return self.chosen == () and not self.inputs and not self.named

    def forward(self, pixels: Tensor) -> Any:
        """Pixels to the chosen part."""
        return _at(self._returned(pixels), self.chosen)

    def probed(self) -> Any:
        """All that the classifier returns for the pixels that it was made with."""
        assert self._probe is not None
        pixels, affine = self._probe
        with affine:
            return self._returned(pixels)

    def chosen_in(self, returned: Any, output: Output | None) -> Outputs:
        """Choose the part that ``output`` names, by default the one that may be meant."""
        assert self._probe is not None
        (pixels, affine), self._probe = self._probe, None
        if output is None:
            self.chosen = self._plain_choice(returned, pixels, affine.count)
        else:
            self.chosen = (output,) if isinstance(output, (int, str)) else output
        try:
            values = _at(returned, self.chosen)
        except Exception as error:
            raise OutputError(
                f"expected an output named by output={output!r}, got {type(error).__name__}: {error}; "
                f"{_listed(_tensors(returned))}"
            ) from error
        rows = rows_of(values, len(pixels))
        one = self(pixels[:1])
        alone = torch.cat([rows_of(one, 1), rows_of(self(pixels[1:3]), 2)])
        return Outputs(pixels, rows, alone, affine.half, rows is values and one.ndim == 2)

    def choose_any(self, returned: Any) -> None:
        """Choose the first tensor, for a classifier of which only the beginning is used."""
        self.chosen, self._probe = next((path for path, _ in _tensors(returned)), ()), None

    def _plain_choice(self, returned: Any, pixels: Tensor, layers: int) -> Path:
        """The one tensor that may be meant; called ``logits``, or made last of what the others are made of, too."""
        batch = len(pixels)
        found = {path: rows for path, value in _tensors(returned) if (rows := as_rows(value, batch)) is not None}
        new = dict(found)
        for path, rows in found.items():  # what is only said again in other words
            others = [other for name, other in new.items() if name != path and other.shape == rows.shape]
            made = [part for other in others for part in (other.softmax(1), other.log_softmax(1), other.logit())]
            if any(torch.allclose(rows, part, rtol=1e-3, atol=1e-5) for part in made):
                del new[path]
        for alike in (list(found), [path for path in found if path and path[-1] == "logits"], list(new)):
            if len(alike) == 1:
                return alike[0]
        if not found:
            came = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
            raise OutputError(
                f"expected logits of shape (batch, classes), got {came}: pass head=K for a new head of K classes, or a "
                "callable output= that makes logits of what it returns"
            )
        last: set[Path] = set()
        for number in range(layers, max(layers - _LAST, 0), -1):
            with Affine(number, 2.0):
                again = dict(_tensors(self._returned(pixels)))
            moved = {path for path, rows in found.items() if not torch.equal(again[path].reshape_as(rows), rows)}
            last = last or moved
            if moved and moved != last:  # a layer that moves none is not used, or its scale is divided out
                last = last if last < moved else set()
                break
        if len(last) != 1:
            raise OutputError(f"expected one output that may be the logits, got several: {_listed(_tensors(returned))}")
        return last.pop()

    def _returned(self, pixels: Tensor) -> Any:
        rows = [_for_each(value, pixels) for value in self.inputs]
        return self.model(pixels, *rows, **{name: _for_each(value, pixels) for name, value in self.named.items()})


class Meant(NamedTuple):
    """The meaning of an output of one row an image, and whether each label stands alone."""

    meaning: Meaning
    several_labels: bool

    def changes(self, answers: Outputs) -> bool:
        """Whether anything is to be done to make logits of such answers."""
        binary = self.is_binary(answers.values.shape[1])
        return binary or self.meaning == "probabilities" or not answers.regular

    def outputs(self, columns: int) -> int:
        """How many logits are made of so many columns."""
        return 2 if self.is_binary(columns) else columns

    def is_binary(self, columns: int) -> bool:
        """Whether one number tells two classes apart."""
        return columns == 1 and self.meaning != "value" and not self.several_labels

    def logits(self, values: Tensor) -> Tensor:
        """Logits (B, K) of the output (B, K), or (B, 2) of (B, 1).

        >>> Meant("logits", False).logits(torch.tensor([[0.0], [4.0]])).softmax(-1)[1, 1].item()
        0.9820137619972229
        """
        info = torch.finfo(values.dtype)
        if self.meaning == "probabilities":
            if self.several_labels or values.shape[1] == 1:
                values = values.clamp(info.eps, 1 - info.eps)
                values = values.log() - (1 - values).log()
            else:
                values = values.clamp(min=info.tiny).log()
        if self.is_binary(values.shape[1]):
            values = torch.cat([-values / 2, values / 2], dim=1)
        return values


class MeantHead(nn.Module):
    """A head whose output is turned into logits."""

    shares_trunk = True

    def __init__(self, head: nn.Module, meant: Meant) -> None:
        super().__init__()
        self.head = head
        self.meant = meant
        self.reads_maps = reads_maps(head)

    def forward(self, values: Tensor, *keep: Tensor | None) -> Tensor:
        return self.meant.logits(rows_of(self.head(values, *keep), values.shape[0]))


def rows_of(values: Any, batch: int) -> Tensor:
    """An output as (B, K); an OutputError if it is no row of numbers for each image."""
    found = as_rows(values, batch) if isinstance(values, Tensor) else None
    if found is None:
        came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise OutputError(f"expected logits of shape (batch, classes), got {came}")
    return found


def as_rows(values: Tensor, batch: int) -> Tensor | None:
    """An output as (B, K): also what ``squeeze`` left of it, and (B, K, 1, 1); None if it is no row an image.

    >>> as_rows(torch.zeros(4), 4).shape, as_rows(torch.zeros(4, 5, 1, 1), 4).shape, as_rows(torch.zeros(4, 5, 2), 4)
    (torch.Size([4, 1]), torch.Size([4, 5]), None)
    """
    if not values.is_floating_point():
        return None
    if values.ndim == 2 and values.shape[0] == batch:
        return values
    own = values.shape[1:] if values.ndim and values.shape[0] == batch else values.shape if batch == 1 else None
    if own is None or sum(length != 1 for length in own) > 1:
        return None
    return values.reshape(batch, -1)


@torch.no_grad()
def meaning_of(model: nn.Module, answers: Outputs, reading: Reading) -> Meant:
    """What the answers mean: as the reading says, as the classifier's configuration does, or as they behave.

    Probabilities are within 0 and 1, and stay there whatever the last linear layer says; that is tried where the rows
    do not sum to the same, in which case each label stands alone.
    """
    problem = getattr(getattr(getattr(model, "model", None), "config", None), "problem_type", None)
    meaning, columns = reading.meaning, answers.values.shape[1]
    if meaning is None and problem == "regression":
        meaning = "value"
    sums, positive = answers.values.sum(dim=1), bool((answers.values >= 0).all())
    alike = (sums / sums[0] - 1).abs() <= (1e-2 if answers.half else 1e-4)
    exclusive = columns > 1 and positive and bool(alike.all())  # also where they are percentages
    if meaning is None:
        most = 1.0 if exclusive else _bound(model, answers) if positive else math.inf
        if not positive and _are_logarithms(model, answers):
            raise OutputError(
                "expected logits or probabilities, got numbers that are never above 0 and reach it, as logarithms of "
                "labels' probabilities do: pass output=lambda found: found.exp()"
            )
        if 1 + 1e-4 < most < math.inf:
            raise OutputError(
                f"expected logits, or probabilities from 0 to 1, got numbers that stay from 0 to {most:.3g}: pass "
                f"meaning='value' or 'logits', or output=lambda found: found / {most:.3g} for probabilities"
            )
        meaning = "logits" if most == math.inf else "probabilities"
    if meaning == "value" and columns != 1:
        raise OutputError(f"expected one value an image, got {columns}: choose by output=lambda found: found[:, :1]")
    several = reading.several_labels
    if several is None:
        alone = meaning == "probabilities" and not exclusive and columns > 1
        several = alone or problem == "multi_label_classification"
    apart, moved = ((rows - rows[:1]).abs().max() for rows in (answers.values - answers.values[:, :1], answers.values))
    if columns > 1 and meaning == "logits" and not several and apart < 1e-4 * moved:
        raise OutputError(
            "expected logits that tell classes apart, got outputs that rise and fall together, whatever the photo, as "
            "cumulative ones of ordered classes do: pass an output= that makes each class's probability of them, or "
            "several_labels=True for each alone"
        )
    return Meant(meaning, several)


def _are_logarithms(model: nn.Module, answers: Outputs) -> bool:
    """Whether answers stay below 0, and reach it, when their last linear layer says far more; not log softmax's."""
    rows = answers.values
    if (rows > 0).any() or rows.logsumexp(dim=1).abs().max() < 1e-3:
        return False
    loud = torch.cat(_loud(model, answers))
    return bool(len(loud) and (loud <= 0).all() and loud.max() > -1e-3)


def _bound(model: nn.Module, answers: Outputs) -> float:
    """What no answer exceeds, and none falls below 0, when their last linear layer says far more, and the contrary."""
    loud, most = _loud(model, answers), float(answers.values.max())
    for some, more in zip(loud[::2], loud[1::2], strict=True):
        if min(some.min(), more.min()) < 0 or more.max() > 2 * some.max():
            return math.inf
        most = max(most, float(some.max()), float(more.max()))
    return most if loud else math.inf


def _loud(model: nn.Module, answers: Outputs) -> list[Tensor]:
    """The answers when their last linear layer says far more, and ten times that; then the contrary."""
    counted = Affine()
    with counted:
        plain = model(answers.pixels)

    def said(number: int, factor: float) -> Tensor:
        with Affine(number, factor):
            found: Tensor = model(answers.pixels)
        return found

    last = next((each for each in range(counted.count, 0, -1) if not torch.equal(said(each, 2.0), plain)), 0)
    return [said(last, sign * factor) for sign in (1, -1) for factor in (_LOUD, 10 * _LOUD)] if last else []


class Affine(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts linear layers and convolutions; multiplies what the one of this number gives."""

    def __init__(self, number: int | None = None, factor: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number, self.factor = number, factor
        self.count = 0
        self.half = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _AFFINE:
            self.count += 1
            self.half |= result.dtype in (torch.float16, torch.bfloat16)
            if self.count == self.number:
                result = result * self.factor
        return result


def _at(returned: Any, chosen: Path | Callable[[Any], Any]) -> Any:
    if callable(chosen):
        return chosen(returned)
    for key in chosen:
        returned = getattr(returned, key) if isinstance(key, str) and hasattr(returned, key) else returned[key]
    return returned


def _for_each(value: Any, pixels: Tensor) -> Any:
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1:
        return value.expand(pixels.shape[0], *value.shape[1:])
    return value


def _tensors(returned: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Each tensor in what a classifier returns, and the way to it."""
    if isinstance(returned, Tensor):
        yield path, returned
    elif isinstance(returned, Mapping):
        for key, value in returned.items():
            yield from _tensors(value, (*path, key))
    elif isinstance(returned, (tuple, list)):
        names: Sequence[int | str] = getattr(returned, "_fields", range(len(returned)))
        for name, value in zip(names, returned, strict=True):
            yield from _tensors(value, (*path, name))
    elif dataclasses.is_dataclass(returned):
        for field in dataclasses.fields(returned):
            yield from _tensors(getattr(returned, field.name), (*path, field.name))


def _listed(found: Iterator[tuple[Path, Tensor]]) -> str:
    """The choices in words."""
    each = [
        f"output={path[0]!r} {tuple(value.shape)}"
        if len(path) == 1
        else f"output=lambda found: found{''.join(f'[{key!r}]' for key in path)} {tuple(value.shape)}"
        for path, value in found
    ]
    return f"choose one of {', '.join(each)}" if each else "it returned no tensor"
