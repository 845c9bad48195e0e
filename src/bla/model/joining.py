r"""Classifiers whose class token reads patch tokens: cut where it joins them, and let it read those that are kept.

.. math:: \text{token}_i \leftarrow \sum_n \mathrm{softmax}_n\bigl(q_i k_n + \log \text{keep}_n\bigr)\, v_n

in every attention from there on, and likewise in every average over tokens. With all kept these are the classifier's
own logits; a patch with keep 0 is read by no token, in no layer, so that the logits are a function of the selected
patches alone, by construction. Where the class token joins at the start (ViT, DeiT) the cells are the photo's own
patches, and nothing has mixed them before; where it joins late (CaiT, XCiT, VOLO, ConViT), what patch tokens have
become by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bla.model.heads import MapHead
from bla.model.tracing import TracingError, token_grid

_LEAST = 1e-6
"""Below this, what is kept of a cell in training changes its logits no more."""
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_SOFTMAXES = (torch.softmax, Tensor.softmax, functional.softmax)
_MEANS = (torch.mean, Tensor.mean)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class Around(NamedTuple):
    """How many tokens, a class token and registers, stand before the patches and after them."""

    before: int
    after: int


class _Joint(NamedTuple):
    """Tokens that are joined along their rows, of which the longest part, at ``place``, is the patches'."""

    parts: Sequence[Tensor]
    place: int

    @classmethod
    def of(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Joint | None:
        """What an operation joins; None for any other operation."""
        if func not in _CONCATENATIONS:
            return None
        parts = args[0] if args else kwargs["tensors"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if dim not in (1, -2) or len(parts) < 2 or any(part.ndim != 3 for part in parts):
            return None
        place = max(range(len(parts)), key=lambda index: int(parts[index].shape[1]))
        found = cls(parts, place)
        return found if 0 < sum(found.around) < found.patches.shape[1] else None

    @property
    def patches(self) -> Tensor:
        """The patches' tokens (B, N, C)."""
        return self.parts[self.place]

    @property
    def around(self) -> Around:
        """The number of the others."""
        lengths = [part.shape[1] for part in self.parts]
        return Around(sum(lengths[: self.place]), sum(lengths[self.place + 1 :]))

    @property
    def is_first(self) -> bool:
        """Whether the other tokens are the same for every image: they have read none."""
        others = [part for index, part in enumerate(self.parts) if index != self.place]
        return all(torch.equal(part, part[:1].expand_as(part)) for part in others)


class _Watching(TorchFunctionMode):
    """Sees a class token, or registers beside it, join the patch tokens, and the tokens as they are at the end."""

    def __init__(self, fits: Callable[[_Joint], bool], *, last: bool) -> None:
        super().__init__()
        self.fits = fits
        self.of_several_last = last
        self.joint: _Joint | None = None
        self.grids: set[int] = set()  # of so many patches
        self.joined = self.last = torch.empty(0)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        joint = _Joint.of(func, args, kwargs or {}) if self.joint is None or self.of_several_last else None
        if joint is not None and self.fits(joint):
            self.joint, self.joined, self.last = joint, result, result
            self.grids.add(joint.patches.shape[1])
        elif self.joint is not None and isinstance(result, Tensor) and result.shape[1:] == self.joined.shape[1:]:
            self.last = result
        return result


class Keeping(TorchFunctionMode):
    """Lets what reads tokens, by attention or averages, read patches by what is kept of each (B, N), and all others."""

    def __init__(self, keep: Tensor | None, around: Around, dtype: torch.dtype) -> None:
        super().__init__()
        self.around = around
        self.share: Tensor | None = None
        self.bias: Tensor | None = None
        if keep is not None:  # of which log(0) is not to be differentiated
            logs = torch.where(keep > 0, keep.clamp(min=_LEAST).log(), -torch.inf).to(dtype)
            self.share, self.bias = functional.pad(keep.to(dtype), around, value=1), functional.pad(logs, around)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.keeping(func, args, dict(kwargs or {}))

    def keeping(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the operation gives where only the kept patches are there."""
        if func is functional.scaled_dot_product_attention:
            kwargs |= dict(zip(_ATTENTION_ARGUMENTS, args, strict=False))
            args = ()
            bias = self._of(self.bias, kwargs["key"].shape[-2], kwargs["query"].ndim)
            own = kwargs.get("attn_mask")
            if bias is not None and own is not None:
                bias = torch.where(own, bias, -torch.inf) if own.dtype == torch.bool else own + bias
            kwargs["attn_mask"] = own if bias is None else bias
        elif func is functional.multi_head_attention_forward:
            key = args[1]  # (N, B, C)
            bias = self._of(self.bias, key.shape[0], 2)
            if bias is not None:
                mask = bias[:, None, None].expand(-1, args[4], args[0].shape[0], -1).flatten(0, 1)  # heads, queries
                own = kwargs.get("attn_mask")
                kwargs |= {"attn_mask": mask if own is None else mask + own, "is_causal": False}
        elif func in _SOFTMAXES and isinstance(args[0], Tensor) and args[0].ndim >= 3:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            bias = None
            if dim in (-1, args[0].ndim - 1):
                bias = self._of(self.bias, args[0].shape[-1], args[0].ndim)
            elif dim in (-2, args[0].ndim - 2) and args[0].ndim > 3:  # of keys over the tokens, before any query
                bias = self._of(self.bias, args[0].shape[-2], args[0].ndim - 1)
                bias = None if bias is None else bias[..., None]
            if bias is not None:
                args = (args[0] + bias, *args[1:])
        elif func in _MEANS and args and args[0].ndim == 3:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            share = self._of(self.share, args[0].shape[1], 2) if dim in (1, -2, (1,), [1], (-2,), [-2]) else None
            if share is not None:
                found = (share[..., None] * args[0]).sum(dim=1) / share.sum(dim=1, keepdim=True)
                return found[:, None] if kwargs.get("keepdim", len(args) > 2 and args[2]) else found
        return func(*args, **kwargs)

    def _of(self, each: Tensor | None, tokens: int, dimensions: int) -> Tensor | None:
        """What there is for each of so many tokens, of so many dimensions with the images first; None for others."""
        if each is None:
            return None
        before, whole = self.around.before, each.shape[1]
        patches = whole - sum(self.around)
        if tokens not in (whole, patches):
            return None
        own = each if tokens == whole else each[:, before : before + patches]
        return own.reshape(own.shape[0], *(1,) * (dimensions - 2), tokens)


class _Replacing(Keeping):
    """Puts other patch tokens in the place of those that a class token joins, and keeps some of them."""

    def __init__(self, patches: Tensor, keep: Tensor | None, around: Around) -> None:
        super().__init__(keep, around, patches.dtype)
        self.patches = patches
        self.replaced: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        joint = _Joint.of(func, args, kwargs or {})
        if joint is not None and self._is_to_replace(joint):
            self.replaced = joint.patches
            return func([*joint.parts[: joint.place], self.patches, *joint.parts[joint.place + 1 :]], dim=1)
        return func(*args, **(kwargs or {})) if self.replaced is None else self.keeping(func, args, dict(kwargs or {}))

    def _is_to_replace(self, joint: _Joint) -> bool:
        """The first to be joined so, and whenever they are joined again, as by each block of CaiT."""
        if self.replaced is not None:
            return joint.patches is self.replaced
        return joint.patches.shape[1:] == self.patches.shape[1:] and joint.around == self.around


class _Joined(nn.Module):
    """A classifier with tokens ``around`` those of patches of ``cell``, (C, *sides), which join these."""

    def __init__(self, model: nn.Module, around: Around, cell: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.around = around
        self.cell = tuple(cell)


class JoinedTrunk(_Joined):
    """The patch tokens that a class token joins, and what has become of them at the end, as one map.

    (B, 2D, H, W): of the first D channels the head reads the selected cells, the others are for the score alone.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        grid = [side // length for side, length in zip(pixels.shape[2:], self.cell[1:], strict=True)]
        cells = math.prod(grid)

        def fits(joint: _Joint) -> bool:
            return joint.around == self.around and joint.patches.shape[1] == cells

        with _Watching(fits, last=False) as seen:
            self.model(pixels)
        assert seen.joint is not None
        last = seen.last[:, self.around.before :][:, :cells]
        tokens = torch.cat([seen.joint.patches, last], dim=2)
        return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


class JoinedHead(_Joined, MapHead):
    """All of a classifier from where its class token joins the patch tokens, for the kept ones."""

    fill = None
    grids = 1
    """Of patch tokens that class tokens join; one is exchanged."""

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features (B, 2D, H, W) and what is kept of each cell (B, H, W) to logits (B, K)."""
        batch, channels, *grid = features.shape
        patches = features[:, : channels // 2].flatten(2).transpose(1, 2)
        sides = [cells * length for cells, length in zip(grid, self.cell[1:], strict=True)]
        blank = features.new_zeros(batch, self.cell[0], *sides)
        with _Replacing(patches, None if keep is None else keep.flatten(1), self.around):
            logits: Tensor = self.model(blank)
        return logits


def split_at_join(own: nn.Module, pixels: Tensor) -> tuple[nn.Module, nn.Module]:
    """Cut where a class token first joins patch tokens, and registers if there are some."""
    size = tuple(pixels.shape[2:])

    def fits(joint: _Joint) -> bool:
        return token_grid(joint.patches.shape[1], size) is not None and joint.is_first

    with _Watching(fits, last=True) as seen:
        own(pixels)
    grid = None if seen.joint is None else token_grid(seen.joint.patches.shape[1], size)
    if seen.joint is None or grid is None:
        raise TracingError("expected a class token that joins patch tokens, found none")
    around = seen.joint.around
    cell = [pixels.shape[1], *(side // cells for side, cells in zip(size, grid, strict=True))]
    trunk, head = JoinedTrunk(own, around, cell), JoinedHead(own, around, cell)
    head.grids = len(seen.grids)
    return trunk, head
