"""Heads: what reads the selected cells of a feature map and gives logits.

A head is called by :func:`read`, with features (B, C, H, W) and weights (B, H, W). Most read one pooled vector, the
weighted sum of the cells: any module that takes (B, C), or one of the classes below, which call the rest of a
classifier. A :class:`MapHead` reads the map itself and is given what is kept of each cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from bla.operators import memberships

Fill = Literal["zero", "mean", "attention"]
"""What takes the place of a cell left out, for a head that reads maps; nothing, where attention passes it by."""


class MapHead(nn.Module):
    """The part of a classifier after a map that is not averaged, so that no pooled vector holds what it needs.

    ``forward(features, keep=None)``: features (B, C, H, W) and ``keep`` (B, H, W) in [0, 1] to logits (B, K). Of a
    cell with 0 nothing is read; None keeps all. ``fill`` says what such cells hold instead: zero, which is what a map
    after a ReLU holds where nothing is; or the mean of the kept ones, which leaves averages, maxima and minima as they
    are without it.
    """

    shares_trunk = True
    reads_maps = True
    fill: Fill | None = "zero"
    attends = False
    """Whether the fill may be attention."""

    def emptied(self, features: Tensor, keep: Tensor | None) -> Tensor:
        """Features (B, C, H, W) with the ``fill`` in the place of what is not kept."""
        if keep is None or self.fill == "attention":
            return features
        share = keep[:, None].to(features.dtype)
        kept = features * share
        if self.fill == "zero":
            return kept
        total = share.sum(dim=grid_of(share), keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        return kept + (1 - share) * (kept.sum(dim=grid_of(kept), keepdim=True) / total)


def grid_of(maps: Tensor, first: int = 2) -> tuple[int, ...]:
    """The dimensions of maps, from the ``first`` on, in which their cells lie: (2, 3), or of volumes (2, 3, 4)."""
    return tuple(range(first, maps.ndim))


def reads_maps(head: nn.Module) -> bool:
    """Whether a head reads whole maps, and not pooled vectors."""
    return getattr(head, "reads_maps", False) is True


def read(head: nn.Module, features: Tensor, weights: Tensor) -> Tensor:
    """Logits (B, K) that a head gives for features (B, C, H, W) under weights (B, H, W)."""
    if reads_maps(head):
        logits: Tensor = head(features, kept(weights))
    else:
        logits = head(weighted_sum(_read_by(head, features), weights))
    return logits


def read_each(head: nn.Module, features: Tensor, weights: Tensor) -> Tensor:
    """Logits (B, M, K) under each of M weightings (B, M, H, W) of the same features."""
    if reads_maps(head):
        one = (slice(None), slice(None), None, *[slice(1)] * (weights.ndim - 2))
        each = features[:, None] + torch.zeros_like(weights[one]).to(features.dtype)
        logits: Tensor = head(each.flatten(0, 1), kept(weights.flatten(0, 1)))
    else:
        features = _read_by(head, features)
        logits = head(torch.bmm(weights.flatten(2).to(features.dtype), features.flatten(2).mT).flatten(0, 1))
    return logits.reshape(weights.shape[0], weights.shape[1], logits.shape[-1])


def _read_by(head: nn.Module, features: Tensor) -> Tensor:
    """The channels that a head reads: the first ones, if it says how many."""
    return features[:, : getattr(head, "in_features", None)]


def weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """What a pooled head reads: sum_n g_n F_n; features (B, C, H, W) and weights (B, H, W) to (B, C)."""
    return torch.bmm(weights.flatten(1)[:, None].to(features.dtype), features.flatten(2).mT)[:, 0]


def kept(weights: Tensor) -> Tensor:
    """What is kept of each cell, in [0, 1]: weights (B, H, W) as memberships, so that uniform weights keep all."""
    return memberships(weights.flatten(1)).reshape_as(weights)


class TimmHead(nn.Module):
    """What follows a timm classifier's pooling, whatever it is, for one pooled vector (B, C).

    The vector is passed as a map of one cell, or as the one patch token behind ``prefix_tokens`` zeros: ``shape`` is
    (-1, 1, 1), (1, 1, -1) or (1, -1). On these the pooling is the identity.
    """

    shares_trunk = True

    def __init__(self, model: nn.Module, shape: tuple[int, ...], prefix_tokens: int = 0) -> None:
        super().__init__()
        self.model = model
        self.shape = shape
        self.prefix_tokens = prefix_tokens

    def forward(self, pooled: Tensor) -> Tensor:
        values = pooled.reshape(pooled.shape[0], *self.shape)
        if self.prefix_tokens:
            values = nn.functional.pad(values, (0, 0, self.prefix_tokens, 0))
        logits: Tensor = self.model.forward_head(values)  # type: ignore[operator]
        return logits


class TimmMapHead(MapHead):
    """What follows a timm classifier's last map, where that is not an average: VGG's 7x7 convolution, a maximum."""

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        features = self.emptied(features, keep)
        logits: Tensor = self.model.forward_head(features.permute(0, 2, 3, 1) if self.channels_last else features)  # type: ignore[operator]
        return logits


class TracedHead(nn.Module):
    """The part of a traced classifier after its averages, for one pooled vector (B, C) of all of them.

    In the classifier they are of these ``shapes``, and so many times the average.
    """

    def __init__(self, graph: fx.GraphModule, shapes: Sequence[Sequence[int]], scales: Sequence[float]) -> None:
        super().__init__()
        self.graph = graph
        self.shapes = [tuple(shape) for shape in shapes]
        self.scales = tuple(scales)

    def forward(self, pooled: Tensor) -> Tensor:
        parts = torch.split(pooled, [math.prod(shape) for shape in self.shapes], dim=1)
        averages = [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        logits: Tensor = self.graph(*(
            average if scale == 1 else scale * average for average, scale in zip(averages, self.scales, strict=True)
        ))  # fmt: skip
        return logits


class TracedMapHead(MapHead):
    """The part of a traced classifier after its last maps, of so many ``channels`` each, which it flattens or pools."""

    def __init__(self, graph: fx.GraphModule, channels: Sequence[int]) -> None:
        super().__init__()
        self.graph = graph
        self.channels = list(channels)

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        maps = torch.split(self.emptied(features, keep), self.channels, dim=1)
        logits: Tensor = self.graph(*(each.contiguous() for each in maps))  # its code may take a view
        return logits
