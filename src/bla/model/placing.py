"""Whether the cells of a trunk's map lie where the pixels of the photo do, seen by what changes with other pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_MANY = 4
"""Cells a side from which it shows."""
_ASIDE = 0.55
"""Of how far the changes of two halves are apart, by how much their middle misses the map's."""
_EDGES = {-3: ("front", "back"), -2: ("upper", "lower"), -1: ("left", "right")}
_ELSEWHERE = "elsewhere than shown"


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
    aside = False
    if min(grid) >= _MANY:
        in_order, aside = _order(trunk, one, other, features[1:2], guessed=guessed)
        if not in_order:
            return Places(in_order=False)
    still = (features == features[:1]).all(dim=1).all(dim=0)
    if still.any():
        return Places(True, f"approximate: {int(still.sum())} cells read nothing of the photo, which is padded inside")
    if unread := _unread(trunk, one, other, grid):
        where = "" if len(unread) == 2 * len(grid) else f"{' and '.join(unread)} "
        return Places(True, f"approximate: nothing is read of the photo's {where}edge, so that cells lie {_ELSEWHERE}")
    if aside:
        return Places(
            True, f"approximate: the photo takes one side of the map, as if padded, so that cells lie {_ELSEWHERE}"
        )
    with _Warps(one) as warps:
        trunk(one)
    if warps.found:
        return Places(True, f"approximate: the classifier warps the photo itself, so that cells may lie {_ELSEWHERE}")
    return Places(in_order=True)


def _unread(trunk: nn.Module, one: Tensor, other: Tensor, grid: Sequence[int]) -> list[str]:
    """At which edges a picture may be another's for three quarters of a cell, and nothing changes."""
    plain, found = trunk(one), []
    for dim, (side, cells) in enumerate(zip(one.shape[2:], grid, strict=True), start=2):
        width = -(-3 * side // (4 * cells))
        for name, start in zip(_EDGES[dim - one.ndim], (0, side - width), strict=True):
            framed = one.clone()
            framed.narrow(dim, start, width).copy_(other.narrow(dim, start, width))
            if torch.equal(trunk(framed), plain):
                found.append(name)
    return found


class _Warps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether a picture like this one is sampled at other places, as a spatial transformer does."""

    def __init__(self, picture: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.found = picture.shape, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.found |= "grid_sampler" in func.overloadpacket.__name__ and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def _order(trunk: nn.Module, one: Tensor, other: Tensor, features: Tensor, *, guessed: bool) -> tuple[bool, bool]:
    """Whether what changes lies where the picture is exchanged for half of another, and whether to one side of that.

    ``features`` are of the first picture.
    """
    moves, contrasts, middles = [], [], []
    for side in range(2, one.ndim):
        halves = [each.tensor_split(2, dim=side) for each in (one, other)]
        before, after = (
            (trunk(torch.cat([halves[first][0], halves[1 - first][1]], dim=side)) - features)[0].abs().cpu().double()
            for first in (1, 0)
        )
        moves.append(torch.stack([_centres(after, each) - _centres(before, each) for each in range(one.ndim - 2)]))
        middles.append((_centres(after, side - 2) + _centres(before, side - 2)).nanmedian() - 1)
        contrasts.append((after - before).abs().sum() / (after + before).sum())
    each = torch.stack(moves)  # (sides of the photo, sides of the map, channels)
    own = each.diagonal().mT
    typical = each.nanmedian(dim=-1).values
    mirrored = (typical.diagonal() < -0.1).any() or (own.nanquantile(0.25, dim=-1) < -0.2).any()
    turned = (typical - typical.diagonal()[:, None] > 0.1).any()
    contrast = torch.stack(contrasts)
    lost = typical.diagonal() < torch.where(contrast > 0.7, 0.15, 0.02 if guessed else -1.0)
    apart = typical.diagonal()
    aside = (apart > 0.12) & (torch.stack(middles).abs() > _ASIDE * apart)
    return not bool(mirrored or turned or lost.any()), bool(aside.any())


def _centres(change: Tensor, side: int) -> Tensor:
    """Where along a side of the map (C, *grid) each channel's change has its centre, from 0 to 1; NaN without any."""
    along = change.sum(dim=[dim for dim in range(1, change.ndim) if dim != side + 1])
    return along @ torch.linspace(0, 1, along.shape[1]).to(along) / along.sum(dim=1)
