"""Sanity: an explanation must depend on what was learnt, and must not depend on what does not matter.

``cascade`` compares maps with those of ever more randomised networks (Adebayo et al. 2018, arXiv 1810.03292): the
correlation should fall. ``stability`` compares the map of a flipped, shifted or noisy photo with the map moved alike:
the correlation should stay near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bla.metrics.metric import Metric

Explainer = Callable[[Tensor], Tensor]
"""Normalised pixels (B, 3, h, w) to maps (B, H, W)."""

METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "cascade",
            "likeness after randomisation",
            "Spearman's correlation of the map with that of the network whose layers from the top are randomised",
            "Adebayo et al. 2018 (arXiv 1810.03292)",
            "lower",
        ),
        Metric(
            "stability",
            "likeness under flip, shift and noise",
            "Spearman's correlation of the map of the changed photo with the map changed alike",
            "Alvarez-Melis & Jaakkola 2018 (arXiv 1806.08049), by rank",
            "higher",
        ),
    )
}


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of each image's two maps, (B, H, W) twice to (B,); ties share their mean rank.

    Where one of the two does not vary it is 0.

    >>> rank_correlation(torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[0.1, 0.2, 0.3]]])).tolist()
    [1.0]
    """
    one, other = (_ranks(maps.flatten(1).double()) for maps in (first, second))
    one, other = (ranks - ranks.mean(dim=1, keepdim=True) for ranks in (one, other))
    scale = (one.square().sum(1) * other.square().sum(1)).sqrt()
    return torch.where(scale > 0, (one * other).sum(1) / scale.clamp(min=1e-30), 0.0)


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None, :] < values[:, :, None]).sum(2)
    same = (values[:, None, :] == values[:, :, None]).sum(2)
    return below + (same - 1) / 2


def cascade(maps: Tensor, randomised: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The correlation of maps (B, H, W) with each stage's, in order; (B,) each."""
    return {stage: rank_correlation(maps, others) for stage, others in randomised.items()}


def stability(explain: Explainer, pixels: Tensor, *, noise: float = 0.1, seed: int = 0) -> dict[str, Tensor]:
    """``flip``, ``shift`` (by one cell to the right) and ``noise``: the map's correlation with what it should be."""
    maps = explain(pixels)
    step = pixels.shape[3] // maps.shape[2]
    shifted = torch.cat([pixels[..., :1].expand(*pixels.shape[:3], step), pixels[..., :-step]], dim=3)
    generator = torch.Generator().manual_seed(seed)
    grain = noise * torch.randn(pixels.shape, generator=generator).to(pixels)
    found = {"flip": rank_correlation(explain(pixels.flip(3)), maps.flip(2))}
    if maps.shape[2] > 1:
        found["shift"] = rank_correlation(explain(shifted)[:, :, 1:], maps[:, :, :-1])
    return found | {"noise": rank_correlation(explain(pixels + grain), maps)}
