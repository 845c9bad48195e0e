"""Equal area: any ranking of the cells is cut, image by image, to a given number of cells."""

from __future__ import annotations

import torch
from torch import Tensor

from bla.operators import best


def top_cells(ranking: Tensor, sizes: Tensor | int) -> Tensor:
    """The ``sizes[i]`` best cells of map i, booleans (B, H, W); a tie goes to the cell that comes first.

    Parameters
    ----------
    ranking: (B, H, W), finite, larger is more relevant.
    sizes: (B,) or one for all, each in 1..H*W.

    >>> top_cells(torch.tensor([[[3.0, 1.0, 3.0]], [[0.0, 5.0, 1.0]]]), torch.tensor([1, 2])).int().tolist()
    [[[1, 0, 0]], [[0, 1, 1]]]
    """
    cells = ranking.shape[-2] * ranking.shape[-1]
    wanted = torch.as_tensor(sizes, device=ranking.device).expand(len(ranking))
    if len(wanted) and not (int(wanted.min()) >= 1 and int(wanted.max()) <= cells):
        raise ValueError(f"expected sizes from 1 to {cells}, the number of cells, got {wanted.tolist()[:8]}")
    _check_finite(ranking)
    return best(ranking.flatten(1), wanted[:, None]).reshape(ranking.shape)


def places(ranking: Tensor) -> Tensor:
    """The rank of every cell in its map, 0 for the best; (B, H, W) to (B, H, W).

    >>> places(torch.tensor([[[3.0, 1.0, 3.0]]])).tolist()
    [[[0, 2, 1]]]
    """
    _check_finite(ranking)
    order = ranking.flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).reshape(ranking.shape)


def _check_finite(ranking: Tensor) -> None:
    if not torch.isfinite(ranking).all():
        raise ValueError("expected finite rankings, got NaN or infinity: check the method that made them")
