"""Trunk and head that the user names: two submodules, or two callables, for what no rule finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from bla.model.heads import grid_of
from bla.model.tracing import TokenTrunk, TracingError, said

Part = str | Callable[[nn.Module, Tensor], Any]
"""A submodule's name, or a callable of the classifier and a tensor."""


class NamedPart(nn.Module):
    """A part of a classifier: a submodule by name, or what a callable of the classifier and a tensor gives."""

    def __init__(self, model: nn.Module, part: Part) -> None:
        super().__init__()
        self.model = model
        self.part = part

    def forward(self, values: Tensor) -> Any:
        """Whatever the part gives, or the tensor in it: ``last_hidden_state``, ``logits``, or the first of several."""
        if isinstance(self.part, str):
            return tensor_in(self.model.get_submodule(self.part)(values))
        return tensor_in(self.part(self.model, values))


def tensor_in(returned: Any) -> Any:
    """The tensor meant by what a module returns: itself, ``logits``, ``last_hidden_state``, or the first of a tuple."""
    for name in () if isinstance(returned, Tensor) else ("logits", "last_hidden_state"):
        found = returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(returned, (tuple, list)) and returned and isinstance(returned[0], Tensor):
        return returned[0]
    return returned


def named_parts(own: nn.Module, parts: tuple[Part, Part], pixels: Tensor) -> tuple[nn.Module, nn.Module]:
    """Trunk and head by name, each checked to be called as such; an error says which of the two fails, and why."""
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        raise TracingError(f"expected parts=(trunk, head), two names or callables, got {parts!r}")
    for role, part in zip(("trunk", "head"), parts, strict=True):
        if isinstance(part, str) and part not in dict(own.named_modules()):
            children = ", ".join(name for name, _ in own.named_children())
            raise TracingError(f"{role}: expected the name of a submodule, got {part!r}; there are {children}, ...")
        if not isinstance(part, str) and not callable(part):
            raise TracingError(f"{role}: expected a submodule's name or a callable, got {type(part).__name__}")
    trunk: nn.Module = NamedPart(own, parts[0])
    head = NamedPart(own, parts[1])
    features = _called(trunk, pixels, "trunk", f"pixels {tuple(pixels.shape)}")
    if features.ndim == 3:
        trunk = TokenTrunk(trunk, 0)
        features = _called(trunk, pixels, "trunk", f"pixels {tuple(pixels.shape)}")
    if features.ndim not in (4, 5):
        raise TracingError(
            "trunk: expected a feature map (batch, channels, height, width) or patch tokens (batch, cells, channels), "
            f"got shape {tuple(features.shape)}"
        )
    pooled = features.mean(dim=grid_of(features))
    logits = _called(head, pooled, "head", f"pooled features {tuple(pooled.shape)}, the mean over the trunk's cells,")
    if logits.ndim != 2:
        raise TracingError(f"head: expected logits (batch, classes), got shape {tuple(logits.shape)}")
    return trunk, head


def _called(part: nn.Module, values: Tensor, role: str, what: str) -> Tensor:
    try:
        returned = part(values)
    except Exception as error:  # whatever code of the user's raises
        raise TracingError(f"{role}: expected a part that takes {what} got {said(error)}") from error
    if not isinstance(returned, Tensor):
        raise TracingError(f"{role}: expected a part that gives a tensor, got {type(returned).__name__}")
    return returned
