r"""Classifiers whose class token reads patch tokens: cut where it joins them, and let it read those that are kept.

.. math:: \text{token}_i \leftarrow \sum_n \mathrm{softmax}_n\bigl(q_i k_n + \log \text{keep}_n\bigr)\, v_n

in every attention from there on. With all kept these are the classifier's own logits; a patch with keep 0 is read by no
token, in no layer, so that the logits are a function of the selected patches alone, by construction. Where the class
token joins at the start (ViT, DeiT) the cells are the photo's own patches, and nothing has mixed them before; where it
joins late (CaiT, XCiT, VOLO, ConViT), what patch tokens have become by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class _Watching(TorchFunctionMode):
    """Sees the class token join the patch tokens, and the tokens as they are at the end."""

    def __init__(self, fits: Callable[[Sequence[Tensor]], bool]) -> None:
        super().__init__()
        self.fits = fits
        self.patches: Tensor | None = None
        self.joined = self.last = torch.empty(0)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.patches is None:
            parts = _joined(func, args, kwargs or {})
            if parts is not None and self.fits(parts):
                self.patches, self.joined, self.last = parts[-1], result, result
        elif isinstance(result, Tensor) and result.ndim == 3 and result.shape[1:] == self.joined.shape[1:]:
            self.last = result
        return result


class _Replacing(TorchFunctionMode):
    """Puts other patch tokens in the place of those that a class token joins first, and keeps some of them."""

    def __init__(self, patches: Tensor, keep: Tensor | None, prefix: int) -> None:
        super().__init__()
        self.patches = patches
        self.prefix = prefix
        self.bias: Tensor | None = None
        if keep is not None:  # (B, N), of which log(0) is not to be differentiated
            logs = torch.where(keep > 0, keep.clamp(min=_LEAST).log(), -torch.inf).to(patches.dtype)
            self.bias = functional.pad(logs, (prefix, 0))
        self.replaced: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        parts = _joined(func, args, kwargs)
        if parts is not None and self._are_to_replace(parts):
            self.replaced = parts[-1]
            return func([*parts[:-1], self.patches], dim=1)
        if self.replaced is None or self.bias is None:
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            kwargs |= dict(zip(_ATTENTION_ARGUMENTS, args, strict=False))
            args = ()
            bias = self._bias_of(kwargs["key"].shape[-2], kwargs["query"].ndim)
            own = kwargs.get("attn_mask")
            if bias is not None and own is not None:
                bias = torch.where(own, bias, -torch.inf) if own.dtype == torch.bool else own + bias
            kwargs["attn_mask"] = own if bias is None else bias
        elif func is functional.multi_head_attention_forward:
            key = args[1]  # (N, B, C)
            bias = self._bias_of(key.shape[0], 2)
            if bias is not None:
                mask = bias[:, None, None].expand(-1, args[4], args[0].shape[0], -1).flatten(0, 1)  # heads, queries
                own = kwargs.get("attn_mask")
                kwargs |= {"attn_mask": mask if own is None else mask + own, "is_causal": False}
        elif func in _SOFTMAXES and isinstance(args[0], Tensor) and args[0].ndim >= 3:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            bias = self._bias_of(args[0].shape[-1], args[0].ndim) if dim in (-1, args[0].ndim - 1) else None
            if bias is not None:
                args = (args[0] + bias, *args[1:])
        return func(*args, **kwargs)

    def _are_to_replace(self, parts: Sequence[Tensor]) -> bool:
        """The first to be joined, and whenever they are joined again, as by each block of CaiT."""
        if self.replaced is not None:
            return parts[-1] is self.replaced
        return parts[-1].shape[1:] == self.patches.shape[1:] and _length(parts[:-1]) == self.prefix

    def _bias_of(self, keys: int, dimensions: int) -> Tensor | None:
        """The bias for so many keys, of so many dimensions with the images first; None where they are no tokens."""
        assert self.bias is not None
        whole = self.bias.shape[1]
        if keys not in (whole, whole - self.prefix):
            return None
        bias = self.bias[:, whole - keys :]
        return bias.reshape(bias.shape[0], *(1,) * (dimensions - 2), keys)


class _Joined(nn.Module):
    """A classifier with ``prefix`` tokens that patches of ``cell`` pixels, (height, width), join."""

    def __init__(self, model: nn.Module, prefix: int, cell: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix
        self.cell = cell


class JoinedTrunk(_Joined):
    """The patch tokens that a class token joins, and what has become of them at the end, as one map.

    (B, 2D, H, W): of the first D channels the head reads the selected cells, the others are for the score alone.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2] // self.cell[0], pixels.shape[3] // self.cell[1]
        counts = (self.prefix, height * width)
        with _Watching(lambda parts: (_length(parts[:-1]), parts[-1].shape[1]) == counts) as seen:
            self.model(pixels)
        assert seen.patches is not None
        tokens = torch.cat([seen.patches, seen.last[:, -seen.patches.shape[1] :]], dim=2)
        return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


class JoinedHead(_Joined, MapHead):
    """All of a classifier from where its class token joins the patch tokens, for the kept ones."""

    fill = None

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features (B, 2D, H, W) and what is kept of each cell (B, H, W) to logits (B, K)."""
        batch, channels, height, width = features.shape
        patches = features[:, : channels // 2].flatten(2).transpose(1, 2)
        blank = features.new_zeros(batch, 3, height * self.cell[0], width * self.cell[1])
        with _Replacing(patches, None if keep is None else keep.flatten(1), self.prefix):
            logits: Tensor = self.model(blank)
        return logits


def split_at_join(own: nn.Module, pixels: Tensor) -> tuple[nn.Module, nn.Module]:
    """Cut where the first class token joins patch tokens."""
    size = (pixels.shape[2], pixels.shape[3])
    with _Watching(lambda parts: token_grid(parts[-1].shape[1], size) is not None and _constant(parts[:-1])) as seen:
        own(pixels)
    grid = None if seen.patches is None else token_grid(seen.patches.shape[1], size)
    if seen.patches is None or grid is None:
        raise TracingError("expected a class token that joins patch tokens, found none")
    prefix, cell = seen.joined.shape[1] - seen.patches.shape[1], (size[0] // grid[0], size[1] // grid[1])
    return JoinedTrunk(own, prefix, cell), JoinedHead(own, prefix, cell)


def _joined(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Tensor] | None:
    """The parts of a concatenation of tokens along their rows, the patches' last; None for any other operation."""
    if func not in _CONCATENATIONS:
        return None
    parts = args[0] if args else kwargs["tensors"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if dim != 1 or len(parts) < 2 or any(part.ndim != 3 for part in parts):
        return None
    return parts if 0 < _length(parts[:-1]) < parts[-1].shape[1] else None


def _length(parts: Sequence[Tensor]) -> int:
    return sum(part.shape[1] for part in parts)


def _constant(parts: Sequence[Tensor]) -> bool:
    """Whether tokens are the same for every image: they have read none."""
    return all(torch.equal(part, part[:1].expand_as(part)) for part in parts)
