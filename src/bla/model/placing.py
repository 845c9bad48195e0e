"""Whether the cells of a trunk's map lie where the pixels of the photo do, seen by what changes with other pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

_MANY = 4
"""Cells a side from which it shows."""


class Places(NamedTuple):
    """Whether cells are in the order of the photo's pixels, and in words how they lie elsewhere than shown."""

    in_order: bool
    note: str = ""


def places(trunk: nn.Module, pixels: Tensor, *, guessed: bool, of_tokens: bool = False) -> Places:
    r"""How the cells of a trunk's map lie over some pictures (B, C, \*sides), of which two are mixed.

    Where the second half of a side is exchanged, what changes has its centre further along the map than where the first
    half is, in every channel. Deep layers move it little; ``guessed`` says that a map of which nothing moves is none,
    ``of_tokens`` that tokens of too small a grid to tell are none: they may be queries, or channels.
    """
    features = trunk(pixels)
    grid = features.shape[2:]
    one, other = pixels[1:2], pixels[2:3]
    if of_tokens and min(grid) < _MANY:
        return Places(in_order=False)
    if min(grid) >= _MANY and not _in_order(trunk, one, other, features[1:2], guessed=guessed):
        return Places(in_order=False)
    still = (features == features[:1]).all(dim=1).all(dim=0)
    if still.any():
        return Places(True, f"approximate: {int(still.sum())} cells read nothing of the photo, which is padded inside")
    edges = [-(-side // (2 * cells)) for side, cells in zip(one.shape[2:], grid, strict=True)]
    inner = [slice(edge, side - edge) for edge, side in zip(edges, one.shape[2:], strict=True)]
    framed = other.clone()
    framed[:, :, *inner] = one[:, :, *inner]
    if torch.equal(trunk(framed), trunk(one)):
        return Places(True, "approximate: nothing is read of the photo's edge, so that cells lie further in than shown")
    return Places(in_order=True)


def _in_order(trunk: nn.Module, one: Tensor, other: Tensor, features: Tensor, *, guessed: bool) -> bool:
    """Whether what changes lies where the picture is exchanged for half of another; ``features`` are of the first."""
    moves, contrasts = [], []
    for side in range(2, one.ndim):
        halves = [each.tensor_split(2, dim=side) for each in (one, other)]
        before, after = (
            (trunk(torch.cat([halves[first][0], halves[1 - first][1]], dim=side)) - features)[0].abs().cpu().double()
            for first in (1, 0)
        )
        moves.append(torch.stack([_centres(after, each) - _centres(before, each) for each in range(one.ndim - 2)]))
        contrasts.append((after - before).abs().sum() / (after + before).sum())
    each = torch.stack(moves)  # (sides of the photo, sides of the map, channels)
    own = each.diagonal().mT
    typical = each.nanmedian(dim=-1).values
    mirrored = (typical.diagonal() < -0.1).any() or (own.nanquantile(0.25, dim=-1) < -0.2).any()
    turned = (typical - typical.diagonal()[:, None] > 0.1).any()
    contrast = torch.stack(contrasts)
    lost = typical.diagonal() < torch.where(contrast > 0.7, 0.15, 0.02 if guessed else -1.0)
    return not (mirrored or turned or lost.any())


def _centres(change: Tensor, side: int) -> Tensor:
    """Where along a side of the map (C, *grid) each channel's change has its centre, from 0 to 1; NaN without any."""
    along = change.sum(dim=[dim for dim in range(1, change.ndim) if dim != side + 1])
    return along @ torch.linspace(0, 1, along.shape[1]).to(along) / along.sum(dim=1)
