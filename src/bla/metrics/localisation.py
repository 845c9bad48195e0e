"""Whether an explanation lies on the object: cells against boxes or masks, which are given as coverage of the grid.

``coverage`` (B, H, W) says of every cell which share of its area the object covers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def localise(ranking: Tensor, selected: Tensor, coverage: Tensor) -> dict[str, Tensor]:
    """The metrics of each image, (B,) each, from rankings, selections and coverage (B, H, W); NaN without an object.

    >>> ranking = torch.tensor([[[3.0, 2.0, 1.0]]])
    >>> values = localise(ranking, ranking > 1, torch.tensor([[[1.0, 0.5, 0.0]]]))
    >>> values["on_object"].item(), values["recall"].item(), values["pointing"].item()
    (0.75, 1.0, 1.0)
    """
    if not ranking.shape == selected.shape == coverage.shape:
        raise ValueError(
            "expected ranking, selected and coverage of one shape (batch, height, width), got "
            f"{tuple(ranking.shape)}, {tuple(selected.shape)} and {tuple(coverage.shape)}"
        )
    covered = coverage.double().flatten(1)
    chosen = selected.double().flatten(1)
    maps = ranking.double().flatten(1)
    size, area, both = chosen.sum(1), covered.sum(1), (chosen * covered).sum(1)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    energy = torch.where(high > low, (maps - low) / (high - low), 1.0)
    best = maps.argmax(1, keepdim=True)
    values = {
        "on_object": both / size,
        "recall": both / area,
        "iou": both / (size + area - both),
        "pointing": (covered.gather(1, best).squeeze(1) >= 0.5).double(),
        "energy": (energy * covered).sum(1) / energy.sum(1),
    }
    return {name: torch.where(area > 0, value, torch.nan) for name, value in values.items()}
