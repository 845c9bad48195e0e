"""Sanity checks: an explanation must depend on what the network learnt and on nothing irrelevant.

:func:`rank_correlation` compares maps with those of a network randomised layer by layer (Adebayo et al. 2018, arXiv
1810.03292), where it should fall. :func:`stability` compares the map of a flipped, shifted or noisy photo with the map
moved in the same way (after Alvarez-Melis & Jaakkola 2018, arXiv 1806.08049), where it should stay near 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Explainer = Callable[[Tensor], Tensor]
"""Normalised pixels (B, 3, h, w) to maps (B, H, W)."""


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of each image's two maps, (B, H, W) twice to (B,); ties share their mean rank.

    Where one of the two is constant it is 0.

    >>> rank_correlation(torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[0.1, 0.2, 0.3]]])).tolist()
    [1.0]
    """
    return spearman(first.flatten(1), second.flatten(1)).nan_to_num(0.0)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of rows (B, N), (B,); ties share their mean rank, and a constant row gives NaN."""
    one, other = _centred_ranks(first), _centred_ranks(second)
    return (one * other).sum(1) / (one.square().sum(1) * other.square().sum(1)).sqrt()


def _centred_ranks(values: Tensor) -> Tensor:
    ranks = (values[:, None] < values[:, :, None]).sum(2) + (values[:, None] <= values[:, :, None]).sum(2).double()
    return ranks - ranks.mean(dim=1, keepdim=True)


def stability(explain: Explainer, pixels: Tensor, *, noise: float = 0.1, seed: int = 0) -> dict[str, Tensor]:
    """The map's correlation with the expected map after ``flip``, ``shift`` (one cell to the right) and ``noise``."""
    maps = explain(pixels)
    step = pixels.shape[3] // maps.shape[2]
    shifted = torch.cat([pixels[..., :1].expand(*pixels.shape[:3], step), pixels[..., :-step]], dim=3)
    generator = torch.Generator().manual_seed(seed)
    grain = noise * torch.randn(pixels.shape, generator=generator).to(pixels)
    found = {"flip": rank_correlation(explain(pixels.flip(3)), maps.flip(2))}
    if maps.shape[2] > 1:
        found["shift"] = rank_correlation(explain(shifted)[:, :, 1:], maps[:, :, :-1])
    return found | {"noise": rank_correlation(explain(pixels + grain), maps)}
