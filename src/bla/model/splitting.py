"""A classifier cut in two before its head reads the map, and the check that the cut is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bla import BlaError
from bla.data.photo import Transform
from bla.model.heads import TimmHead, TimmMapHead, kept, read, reads_maps
from bla.model.joining import split_at_join
from bla.model.parts import NamedPart, Part, named_parts, tensor_in
from bla.model.tracing import TokenTrunk, TracingError, exported, said, split_at_average, split_at_map, traced, trunk_of

SELF_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far uniform weights may miss the classifier's logits at wrap time, of the largest logit; half precision: 2e-2."""

Parts = tuple[nn.Module, nn.Module]
Cut = Callable[[nn.Module, Tensor], Parts]


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


class TimmTrunk(nn.Module):
    """A timm classifier's unpooled features: a map as (B, C, H, W), or a row of tokens as it comes."""

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(pixels)  # type: ignore[operator]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def split(own: nn.Module, transform: Transform, name: str, parts: tuple[Part, Part] | None = None) -> Split:
    """Cut our copy before its own head, which is then checked to be what the classifier does.

    Ways to cut are tried in turn, the plainest first, until one passes; where none does, the first's reason is given.
    With ``parts`` theirs is the only one.
    """
    pixels, returned = _probed(own, transform, name)
    with torch.inference_mode():
        logits = tensor_in(returned)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ClassifierError(f"{name}: expected logits of shape (batch, classes), got {came}")
        if not torch.isfinite(logits).all():
            raise ClassifierError(f"{name}: expected finite logits, got NaN or infinity: check its weights")
        model = own if returned is logits else NamedPart(own, nn.Module.__call__)
        ways: tuple[Cut, ...] = _TIMM_WAYS if speaks_timm(model) else _OTHER_WAYS
        if parts is not None:
            ways = (lambda _, pixels: named_parts(own, parts, pixels),)
        reasons: list[Exception] = []
        for cut in ways:
            try:
                trunk, head = cut(model, pixels)
                features = trunk(pixels)
                _check_several_cells(features, pixels)
                _self_check(head, features, logits)
                return Split(trunk, head, features.shape[1], logits.shape[1])
            except _UncuttableError as error:
                reasons.append(error)
                break
            except (_UncutError, TracingError, ClassifierError) as error:
                reasons.append(error)
            except Exception as error:  # whatever a classifier's own code raises at what it was not made for
                reasons.append(_UncutError(f"expected {_AVERAGE}, got one that fails on it ({said(error)})"))
    checked = [error for error in reasons if not isinstance(error, TracingError)]  # what was cut at all says more
    reason = str((checked or reasons)[0])
    raise ClassifierError(f"{name}: {reason}{'' if parts or 'nothing to select' in reason else _REMEDY}")


def split_for(head: nn.Module | int, own: nn.Module, transform: Transform, name: str) -> Split:
    """Cut our copy for a head of another make: a module for pooled features, or so many classes for a new linear one.

    It serves any classifier with a last map of several cells: what follows that map in the classifier does not matter,
    be it a class token or a flattening (VGG, AlexNet).
    """
    if isinstance(head, int) and head < 1:
        raise ClassifierError(f"{name}: expected a head of at least one class, got {head}")
    pixels, returned = _probed(own, transform, name)
    with torch.inference_mode():
        model = own if isinstance(returned, Tensor) else NamedPart(own, nn.Module.__call__)
        try:
            trunk = _cut_timm(model, pixels)[0] if speaks_timm(model) else _traced_trunk(model, pixels)
            features = trunk(pixels)
            _check_several_cells(features, pixels)
        except Exception as error:
            raise ClassifierError(f"{name}: {error}") from error
        if not torch.isfinite(features).all():
            raise ClassifierError(f"{name}: expected finite features, got NaN or infinity: check its weights")
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
    return Split(trunk, head, channels, logits.shape[1])


_AVERAGE = "a head that reads the average of the last feature map"
_REMEDY = "; it needs a new head (head=), or name trunk and head yourself (parts=)"


def _self_check(head: nn.Module, features: Tensor, logits: Tensor) -> None:
    """Uniform weights give the classifier's logits, other weights others, and of a cell left out nothing is read."""
    cells = features.shape[2] * features.shape[3]
    uniform = features.new_full((len(features), *features.shape[2:]), 1 / cells)
    same = read(head, features, uniform)
    tolerance = SELF_CHECK_TOLERANCE.get(logits.dtype, 2e-2)
    scale = logits.abs().max().clamp(min=1e-12)
    miss = (same - logits).abs().max() / scale
    if not miss <= tolerance:
        if getattr(head, "prefix_tokens", 0):
            raise _UncutError(
                "expected a head that reads the average of the patch tokens, got one that reads a class token, which "
                "has read every patch by then"
            )
        raise _UncutError(
            f"expected {_AVERAGE}, got one whose logits differ by {miss.item():.1e} of the largest when the average is "
            "put in its place"
        )
    first, last = torch.zeros_like(uniform), torch.zeros_like(uniform)
    first[:, 0, 0] = last[:, -1, -1] = 1
    alone = read(head, features, first)
    if not (alone - read(head, features, last)).abs().max() > 0:
        raise _UncuttableError(
            "expected logits that depend on the cells of the feature map, got the same from any cell (a head that is "
            "all zero, or features alike everywhere): it needs a trained head"
        )
    if reads_maps(head):
        noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features)
        others = features + (1 - kept(first))[:, None] * noise
        leaked = (read(head, others, first) - alone).abs().max() / scale
        if not leaked <= tolerance:
            raise _UncutError(
                "expected a head that reads nothing of the cells left out, got logits that change by "
                f"{leaked.item():.1e} of the largest with them"
            )


@torch.inference_mode()
def _probed(own: nn.Module, transform: Transform, name: str) -> tuple[Tensor, Any]:
    """Noise of two pictures' size, the same at every call, and whatever the classifier returns for it."""
    like = next(own.parameters(), torch.empty(0))
    pixels = torch.randn(2, 3, *transform.size, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        return pixels, own(pixels)
    except Exception as error:
        raise ClassifierError(
            f"{name}: expected a classifier of pixels {tuple(pixels.shape)}, got {type(error).__name__}: {error}; pass "
            "the transform= that it was trained with"
        ) from error


def _check_several_cells(features: Tensor, pixels: Tensor) -> None:
    if features.ndim != 4:
        raise _UncutError(f"expected a feature map (batch, channels, height, width), got {tuple(features.shape)}")
    if features.shape[2] * features.shape[3] == 1:
        raise _UncuttableError(
            "expected a feature map of several cells, got one of 1x1 at input size "
            f"{tuple(pixels.shape[2:])}: there is nothing to select; use a larger input"
        )


def speaks_timm(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features", "pretrained_cfg"))


def _cut_timm(own: nn.Module, pixels: Tensor) -> Parts:
    """By timm's seam, where the map, or the row of tokens, is averaged."""
    features = own.forward_features(pixels)  # type: ignore[operator]
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


_cut_traced: Cut = lambda own, pixels: split_at_average(traced(own, pixels))  # noqa: E731
_cut_traced_map: Cut = lambda own, pixels: split_at_map(traced(own, pixels))  # noqa: E731
_cut_exported: Cut = lambda own, pixels: split_at_average(exported(own, pixels))  # noqa: E731
_TIMM_WAYS = (_cut_timm, split_at_join, _cut_exported, _cut_timm_map)
_OTHER_WAYS = (_cut_traced, split_at_join, _cut_traced_map, _cut_exported)


def _traced_trunk(own: nn.Module, pixels: Tensor) -> nn.Module:
    try:
        return trunk_of(traced(own, pixels))
    except TracingError as first:
        try:
            return trunk_of(exported(own, pixels))
        except TracingError:
            raise first from None
