"""Whether an explanation lies on the object: cells against boxes or masks, which are given as coverage of the grid.

``coverage`` (B, H, W) says of every cell which share of its area the object covers. In the grid pointing game (Böhle et
al. 2021, arXiv 2104.00032) the object is one photo of four: :func:`mosaic`, :func:`grid_pointing`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bla.metrics.ranking import top_cells


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


def mosaic(photos: Tensor) -> Tensor:
    """Four photos (4, C, h, w) in reading order as one picture (1, C, 2h, 2w).

    >>> mosaic(torch.arange(4.0).reshape(4, 1, 1, 1))[0, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    if photos.ndim != 4 or len(photos) != 4:
        raise ValueError(f"expected four photos (4, channels, height, width), got {tuple(photos.shape)}")
    first, second, third, fourth = photos
    upper, lower = torch.cat([first, second], dim=2), torch.cat([third, fourth], dim=2)
    return torch.cat([upper, lower], dim=1)[None]


def quarters(height: int, width: int) -> Tensor:
    """The coverage (4, H, W) of a mosaic's grid by each photo, in reading order; a cell on a border is shared."""
    down, across = ((side / 2 - torch.arange(side)).clamp(0, 1) for side in (height, width))
    return torch.stack([torch.outer(one, other) for one in (down, 1 - down) for other in (across, 1 - across)])


def grid_pointing(rankings: Tensor, size: int) -> Tensor:
    """Of a mosaic's four rankings (4, H, W), one for the class of each photo, the share of the best cells on it, (4,).

    A quarter by chance; no more than one where ``size`` is at most a quarter of the cells.

    >>> grid_pointing(quarters(4, 6), 6).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    height, width = rankings.shape[1:]
    return localise(rankings, top_cells(rankings, size), quarters(height, width).to(rankings.device))["on_object"]
