"""A classifier cut in two before its head reads the map, and the check that the cut is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bla import BlaError
from bla.data.photo import Transform
from bla.model.finite import unfinite
from bla.model.heads import MapHead, TimmHead, TimmMapHead, read, reads_maps
from bla.model.hooking import hooked
from bla.model.joining import split_at_join
from bla.model.outputs import Affine, Calling, Meant, MeantHead, OutputError, Outputs, Reading, meaning_of, rows_of
from bla.model.parts import Part, named_parts
from bla.model.placing import places
from bla.model.tracing import Graph, ReadsMoreError, TokenTrunk, TracingError, exported, said, traced

SELF_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""How far uniform weights may miss the classifier's logits at wrap time, of the largest logit; half precision: 2e-2."""
_FEW = 3
"""Layers of a head for which zero is as good as nothing."""

Parts = tuple[nn.Module, nn.Module]
Way = Callable[[], Iterator[Parts]]


class ClassifierError(BlaError):
    """A classifier that cannot be split, or is used before it can explain."""


class _UncutError(ValueError):
    """Why one way to cut does not serve."""


class _UncuttableError(_UncutError):
    """Why no way to cut would serve."""


class Split(NamedTuple):
    """A classifier in two: ``head`` gives ``outputs`` logits from the ``channels`` of ``trunk``'s map."""

    trunk: nn.Module
    head: nn.Module
    channels: int
    outputs: int
    meant: Meant = Meant("logits", several_labels=False)
    note: str = ""
    """How its explanations are approximate, if they are."""
    dtype: torch.dtype = torch.float32
    """Of pixels and features."""


class TimmTrunk(nn.Module):
    """A timm classifier's unpooled features: a map as (B, C, H, W), or a row of tokens as it comes."""

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(pixels)  # type: ignore[operator]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


class Cast(nn.Module):
    """A part of a classifier that computes in another type than what it is given and gives."""

    def __init__(self, part: nn.Module, inner: torch.dtype | None, outer: torch.dtype) -> None:
        super().__init__()
        self.part, self.inner, self.outer = part, inner, outer
        self.reads_maps = reads_maps(part)

    def forward(self, values: Tensor, *keep: Tensor | None) -> Tensor:
        found: Tensor = self.part(values if self.inner is None else values.to(self.inner), *keep)
        return found.to(self.outer)


class ColoursLast(nn.Module):
    """A classifier of pixels (B, h, w, C), as Keras has them, called with (B, C, h, w)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, *inputs: Any, **named: Any) -> Any:
        return self.model(pixels.movedim(1, -1), *inputs, **named)


class ContiguousTrunk(nn.Module):
    """A trunk that views its input's memory, which therefore must not be channels last."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.trunk(pixels.contiguous())
        return features


def split(
    own: nn.Module, transform: Transform, name: str, reading: Reading, parts: tuple[Part, Part] | None = None
) -> Split:
    """Cut our copy before its own head, which is then checked to be what the classifier does.

    Ways to cut are tried in turn, the plainest first, until one passes; where none does, the first's reason is given.
    With ``parts`` theirs is the only one.
    """
    pixels, returned, called = _probed(own, transform, name, reading)
    reasons: list[Exception] = []
    with torch.no_grad():  # a constant that tracing keeps is read by gradients later
        try:
            answers = called.chosen_in(returned, reading.output)
            meant = meaning_of(called, answers, reading)
        except OutputError as error:
            raise ClassifierError(f"{name}: {error}") from error
        if not torch.isfinite(answers.values).all():
            raise ClassifierError(f"{name}: expected finite logits, got {_unfinite(own, answers, called)}")
        model = called.model if called.is_plain else called
        apart = _apart(answers)
        if apart > (1e-1 if answers.half else 1e-3):
            alone, again = rows_of(called(pixels[:1]), 1), rows_of(called(pixels[:1]), 1)
            if torch.equal(alone, again):
                raise ClassifierError(
                    f"{name}: expected the same answer to a photo alone and beside others, got one that differs by "
                    f"{apart:.1e} of the largest: it reads the whole batch"
                )
            raise ClassifierError(
                f"{name}: expected the same answer each time, got one that differs by {apart:.1e} of the largest: turn "
                "off what is random in evaluation mode, such as dropout with training=True"
            )
        inside = answers.half and pixels.dtype == torch.float32  # a cast that tracing may not see
        elsewhere = [_answered(called, shape, pixels, name) for shape in transform.shapes[1:]]
        ways = _ways(model, pixels, hooks_first=inside) if parts is None else [_named(own, parts, pixels)]
        for cut, head in _each(ways, reasons):
            try:
                trunk, note = _checked(cut, head, answers, elsewhere)
                features, outputs = trunk(pixels[:2]), meant.outputs(answers.values.shape[1])
                channels, given = features.shape[1], answers.values.dtype
                dtype = torch.float32 if given == torch.float32 else pixels.dtype
                if {features.dtype, given} != {dtype}:  # it casts inside
                    trunk, head = Cast(trunk, None, dtype), Cast(head, features.dtype, dtype)  # noqa: PLW2901
                read_as = MeantHead(head, meant) if meant.changes(answers) else head
                return Split(trunk, read_as, channels, outputs, meant, note, dtype)
            except _UncuttableError as error:
                reasons.insert(0, error)
                break
            except (_UncutError, TracingError, ClassifierError) as error:
                reasons.append(error)
            except Exception as error:  # whatever a classifier's own code raises at what it was not made for
                reasons.append(_UncutError(f"expected {_AVERAGE}, got one that fails on it ({said(error)})"))
    # of what was cut at all the reason says more, and more yet where it is known what else is read
    reasons.sort(key=lambda error: 0 if isinstance(error, ReadsMoreError) else 1 + isinstance(error, TracingError))
    reason = str(reasons[0])
    raise ClassifierError(f"{name}: {reason}{'' if parts or 'nothing to select' in reason else _REMEDY}")


def split_for(head: nn.Module | int, own: nn.Module, transform: Transform, name: str, reading: Reading) -> Split:
    """Cut our copy for a head of another make: a module for pooled features, or so many classes for a new linear one.

    It serves any classifier with a last map of several cells: what follows that map in the classifier does not matter,
    be it a class token or a flattening (VGG, AlexNet).
    """
    if isinstance(head, int) and head < 1:
        raise ClassifierError(f"{name}: expected a head of at least one class, got {head}")
    pixels, returned, called = _probed(own, transform, name, reading)
    with torch.no_grad():
        called.choose_any(returned)
        model = called.model if called.is_plain else called
        if not torch.isfinite(model(pixels[:2])).all():
            raise ClassifierError(f"{name}: expected finite features, got {unfinite(own, pixels, called)}")
        try:
            trunk = _any_trunk(model, pixels)
            features = trunk(pixels)
            _check_several_cells(features, pixels)
        except Exception as error:
            raise ClassifierError(f"{name}: {error}") from error
        channels = features.shape[1]
    head = (nn.Linear(channels, head) if isinstance(head, int) else head).to(pixels.device, pixels.dtype)
    try:
        with torch.inference_mode():
            logits = head(torch.zeros(2, channels).to(pixels))
    except Exception as error:
        raise ClassifierError(f"{name}: expected a head for {channels} pooled features, got {error}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ClassifierError(
            f"{name}: expected a head that gives logits (batch, classes), got {type(logits).__name__}"
        )
    meant = Meant("logits", bool(reading.several_labels))
    return Split(trunk, head, channels, logits.shape[1], meant, dtype=pixels.dtype)


_AVERAGE = "a head that reads the average of the last feature map"
_REMEDY = "; it needs a new head (head=), or name trunk and head yourself (parts=)"


def _each(ways: Iterable[Way], reasons: list[Exception]) -> Iterator[Parts]:
    """What each way gives, one or several; why one gives nothing is added to the reasons."""
    for way in ways:
        try:
            yield from way()
        except Exception as error:  # as above
            reasons.append(error if isinstance(error, TracingError) else TracingError(said(error)))


def _checked(
    trunk: nn.Module, head: nn.Module, answers: Outputs, elsewhere: Iterable[tuple[Tensor, Tensor]]
) -> tuple[nn.Module, str]:
    """Check a split, whatever the number of images, their memory format and size; how it is approximate, if it is.

    Uniform weights give the classifier's answers, other weights others, and of a cell left out nothing is read.
    """
    strict = 2e-2 if answers.half else SELF_CHECK_TOLERANCE.get(answers.values.dtype, 2e-2)  # to miss by it is unmarked
    apart = _apart(answers)
    tolerance = max(strict, 3 * apart)  # its own sums may differ as much with the batch
    scale = answers.values.abs().max().clamp(min=1e-12)

    def missed(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max() / scale)

    def answer(values: Tensor, weights: Tensor) -> Tensor:
        return rows_of(read(head, values, weights), len(values))

    pixels = answers.pixels[1:3]
    features = trunk(pixels)
    _check_several_cells(features, pixels)
    uniform = torch.full_like(features[:, 0], 1 / features[0, 0].numel())
    miss = missed(answer(features, uniform), answers.values[1:3])
    if not miss <= tolerance:
        if getattr(head, "prefix_tokens", 0):
            raise _UncutError(
                "expected a head that reads the average of the patch tokens, got one that reads a class token, which "
                "has read every patch by then"
            )
        if (grids := getattr(head, "grids", 1)) > 1:
            raise _UncutError(
                f"expected class tokens that read the patch tokens of one grid, got {grids} grids, read together"
            )
        raise _UncutError(
            f"expected {_AVERAGE}, got one whose logits differ by {miss:.1e} of the largest when the average is "
            "put in its place"
        )
    note = _prepared(head, features, answer, missed, strict) if isinstance(head, MapHead) else ""
    first, last = torch.zeros_like(uniform), torch.zeros_like(uniform)
    flat = features.flatten(2)
    unlike = int((flat - flat[..., :1]).abs().sum(dim=(0, 1)).argmax())
    first.flatten(1)[:, 0] = last.flatten(1)[:, unlike] = 1
    if not missed(answer(features, first), answer(features, last)) > 0:
        alike = torch.equal(features, features[..., :1, :1].expand_as(features))
        never = alike or torch.equal(answers.values, answers.values[:1].expand_as(answers.values))
        raise (_UncuttableError if never else _UncutError)(
            "expected logits that depend on the cells of the feature map, got the same from any cell (a head that is "
            "all zero, or features alike everywhere): it needs a trained head"
        )
    worst = max(miss, 2**-9 * answers.half)  # half a unit of bfloat16's last place
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features)
    for weights in (first, last, (first + last) / 2):
        others = features + (1 - (weights > 0).to(features.dtype))[:, None] * noise
        leaked = missed(answer(others, weights), answer(features, weights))
        if not leaked <= tolerance:
            raise _UncutError(
                "expected a head that reads nothing of the cells left out, got logits that change by "
                f"{leaked:.1e} of the largest with them"
            )
        worst = max(worst, leaked)
    five = answers.pixels.contiguous(memory_format=CHANNELS_LAST[pixels.ndim])
    for pixels, expected in ((answers.pixels[:1], answers.values[:1]), (five, answers.values), *elsewhere):
        try:
            features = trunk(pixels)
        except RuntimeError:  # its code views the memory
            trunk = ContiguousTrunk(trunk)
            features = trunk(pixels)
        miss = missed(answer(features, torch.full_like(features[:, 0], 1 / features[0, 0].numel())), expected)
        if not miss <= tolerance:
            raise _UncutError(f"expected {_AVERAGE}, got one that differs by {miss:.1e} for {tuple(pixels.shape)}")
        worst = max(worst, miss)
    placed = _placed(trunk, head, answers.pixels)  # refuses whatever was said before
    note = note or placed
    if not note and answers.half:
        note = f"approximate: the classifier computes in half precision, where the same differs by up to {worst:.0e}"
    elif not note and worst > strict:
        note = (
            f"approximate: its answers are met to {worst:.0e}, and differ themselves by {apart:.0e} with the number of "
            "photos"
        )
    return trunk, note


def _placed(trunk: nn.Module, head: nn.Module, pixels: Tensor) -> str:
    """In words, how the cells lie elsewhere than shown; an error if they are in another order than the pixels."""
    of_tokens = getattr(head, "of_tokens", None)  # of a hooked head, whose maps were guessed
    found = places(trunk, pixels, guessed=of_tokens is not None, of_tokens=bool(of_tokens))
    if not found.in_order:
        raise _UncutError(
            "expected a feature map whose cells lie where the photo's pixels do, got one turned, mirrored or in "
            "another order"
        )
    return found.note


def _answered(called: Calling, shape: Sequence[int], like: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Noise of two pictures of another shape than the first, and the answers."""
    pixels = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)).to(like)
    try:
        return pixels, rows_of(called(pixels), 2)
    except Exception as error:
        raise ClassifierError(
            f"{name}: expected a classifier of photos of any size, as transform= makes them, got one that takes "
            f"{tuple(like.shape[1:])} and not {tuple(shape)} ({said(error)}): add a resize or a crop to one size"
        ) from error


def _apart(answers: Outputs) -> float:
    """How far the answers to one image and to two are from those to five, of the largest."""
    largest = answers.values.abs().max().clamp(min=1e-12)
    return float((answers.alone - answers.values[:3]).abs().max() / largest)


def _prepared(
    head: MapHead,
    features: Tensor,
    answer: Callable[[Tensor, Tensor], Tensor],
    missed: Callable[..., float],
    strict: float,
) -> str:
    """Choose what a head that reads maps reads in place of a cell left out; in words, how far that is not nothing.

    Where the order of the cells does not matter, it is the average of the selected ones, compared with a map of
    nothing but these, repeated; else zero, which says nothing if the map has no other sign.
    """
    if head.fill is None:
        return ""
    if head.attends:
        head.fill = "attention"
        one = torch.zeros_like(features[:, 0])
        one.flatten(1)[:, 0] = 1
        others = torch.where(one[:, None] > 0, features, features.roll(1, dims=0))
        if (
            missed(answer(others, one), answer(features, one))
            == 0
            < missed(answer(features, one), answer(features, one.flip(1)))
        ):
            return ""
        head.fill = "zero"
    flat = features.flatten(2)
    cells, uniform = flat.shape[2], torch.ones_like(features[:, 0]) / flat.shape[2]
    order = torch.randperm(cells, generator=torch.Generator().manual_seed(2)).to(features.device)
    layers = Affine()
    with layers:
        own = answer(features, uniform)
    if missed(answer(flat[:, :, order].reshape_as(features), uniform), own) > 1e-4:
        if layers.count > _FEW:
            return f"approximate: the head reads zero for a cell left out, and {layers.count} layers follow the map"
        return "" if (features >= 0).all() else "approximate: the head reads zero for a cell left out, in a signed map"
    head.fill = "mean"
    parts = next((number for number in range(2, cells) if cells % number == 0), 1)
    repeated = flat[:, :, : cells // parts].repeat(1, 1, parts).reshape_as(features)
    weights = (torch.arange(cells, device=features.device) < cells // parts).to(features.dtype).expand(len(flat), -1)
    some = answer(features, (weights * parts / cells).reshape_as(uniform))
    miss = missed(some, answer(repeated, uniform)) if parts > 1 else 0.0
    if miss <= strict:
        return ""
    return (
        f"approximate: the head reads the average of the selected cells for one left out, which moves it by {miss:.0e}"
    )


def _probed(own: nn.Module, transform: Transform, name: str, reading: Reading) -> tuple[Tensor, Any, Calling]:
    """Noise of five pictures' size, the same at every call, and whatever the classifier returns for it."""
    like = next(own.parameters(), torch.empty(0))
    if like.is_meta:
        raise ClassifierError(
            f"{name}: expected a classifier with weights, got one on the meta device: load them first"
        )
    pixels = torch.randn(5, *transform.shape, generator=torch.Generator().manual_seed(0)).to(like)
    failed: list[Exception] = []
    for model in (own, ColoursLast(own)):
        called = Calling(model, pixels, reading.inputs)
        try:
            with torch.inference_mode():
                return pixels, called.probed(), called
        except Exception as why:
            failed.append(why)
    error = failed[0]
    raise ClassifierError(
        f"{name}: expected a classifier of pixels {tuple(pixels.shape)}, got {type(error).__name__}: {error}; pass "
        f"the transform= that it was trained with{_of_channels(own, transform)}, and inputs= for what it takes "
        "beside them"
    ) from error


def _unfinite(own: nn.Module, answers: Outputs, called: Calling) -> str:
    """Where the NaN or infinity of logits comes from, or which classes are ruled out by it."""
    out = (answers.values == -torch.inf).all(dim=0)
    if out.any() and answers.values[:, ~out].isfinite().all():
        return (
            f"-inf for {int(out.sum())} of {len(out)} classes, whatever the photo: leave these out, by "
            "output=lambda logits: logits[:, others], and classes= for the names of the others"
        )
    return unfinite(own, answers.pixels, called)


def first_convolution(model: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    return next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))), None)


def _of_channels(own: nn.Module, transform: Transform) -> str:
    """How a transform has the sides and channels that the first convolution takes, if that is what is wrong."""
    first = first_convolution(own)
    wanted = []
    if isinstance(first, nn.Conv3d) and len(transform.size) == 2:
        wanted.append("whose size has 3 numbers, depth first,")
    if first is not None and first.in_channels != transform.channels:
        wanted.append(f"whose mean and std have {first.in_channels} numbers, one for each channel")
    return f", {' and '.join(wanted)}" if wanted else ""


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format by the number of dimensions."""


def _check_several_cells(features: Tensor, pixels: Tensor) -> None:
    if features.ndim not in (4, 5):
        raise _UncutError(f"expected a feature map (batch, channels, height, width), got {tuple(features.shape)}")
    if features[0, 0].numel() == 1:
        raise _UncutError(
            "expected a feature map of several cells, got one of 1x1 at input size "
            f"{tuple(pixels.shape[2:])}: there is nothing to select; use a larger input"
        )


def speaks_timm(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features", "pretrained_cfg"))


def _named(own: nn.Module, parts: tuple[Part, Part], pixels: Tensor) -> Way:
    return lambda: iter([named_parts(own, parts, pixels[:2])])


def _ways(model: nn.Module, pixels: Tensor, *, hooks_first: bool = False) -> Iterator[Way]:
    """The ways to cut, the plainest first."""
    if hooks_first:
        yield lambda: hooked(model, pixels)
    graph, program = (_once(functools.partial(make, model, pixels)) for make in (traced, exported))
    timms = speaks_timm(model)
    yield lambda: iter([_cut_timm(model, pixels) if timms else graph().split_at_averages()])
    yield lambda: iter([split_at_join(model, pixels)])
    if not timms:
        yield lambda: iter([graph().split_at_maps()])
    yield lambda: iter([program().split_at_averages()])
    yield lambda: iter([_cut_timm_map(model, pixels) if timms else program().split_at_maps()])
    yield lambda: hooked(model, pixels)


def _once(make: Callable[[], Graph]) -> Callable[[], Graph]:
    """What is made at the first call, or the error of that."""

    @functools.cache
    def made() -> Graph | TracingError:
        try:
            return make()
        except TracingError as error:
            return error

    def again() -> Graph:
        if isinstance(found := made(), TracingError):
            raise found
        return found

    return again


def _cut_timm(own: nn.Module, pixels: Tensor) -> Parts:
    """By timm's seam, where the map, or the row of tokens, is averaged."""
    features = own.forward_features(pixels[:2])  # type: ignore[operator]
    if isinstance(features, Tensor) and features.ndim == 3:
        prefix = int(getattr(own, "num_prefix_tokens", 0))
        return TokenTrunk(TimmTrunk(own, channels_last=False), prefix), TimmHead(own, (1, -1), prefix)
    if not isinstance(features, Tensor):
        raise _UncutError(f"expected a feature map (batch, channels, height, width), got {type(features).__name__}")
    channels_last = getattr(own, "output_fmt", "NCHW") == "NHWC"
    return TimmTrunk(own, channels_last), TimmHead(own, (1, 1, -1) if channels_last else (-1, 1, 1))


def _cut_timm_map(own: nn.Module, pixels: Tensor) -> Parts:
    """By timm's seam, where the head reads the map in another way."""
    trunk, _ = _cut_timm(own, pixels)
    if not isinstance(trunk, TimmTrunk):
        raise TracingError("expected a feature map, got tokens")
    return trunk, TimmMapHead(own, trunk.channels_last)


def _any_trunk(own: nn.Module, pixels: Tensor) -> nn.Module:
    """What gives the last map, whatever follows it."""
    reasons: list[Exception] = []
    ways: tuple[Callable[[], nn.Module], ...] = (
        *((lambda: _cut_timm(own, pixels)[0],) if speaks_timm(own) else ()),
        lambda: traced(own, pixels).trunk(),
        lambda: exported(own, pixels).trunk(),
        lambda: next(hooked(own, pixels))[0],
    )
    for way in ways:
        try:
            trunk = way()
            if len(trunk(pixels)) == len(pixels):
                return trunk
            reasons.append(TracingError("expected a feature map for each photo, got another number"))
        except (TracingError, _UncutError, StopIteration) as error:
            reasons.append(error)
    raise reasons[0]
