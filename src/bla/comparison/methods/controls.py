"""Controls: rankings that know nothing of the class, or nothing of the photo."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bla.comparison.methods.method import Batch, Method


def random_cells(seed: int = 0) -> Method:
    """A random order of the cells, a function of the seed and the image's place in the set."""

    def maps(batch: Batch) -> Tensor:
        shape = batch.features.shape[2:]
        drawn = [np.random.RandomState([seed, int(row)]).rand(*shape) for row in batch.rows]
        return torch.from_numpy(np.stack(drawn)).float().to(batch.features.device)

    return Method("random", "random cells", "nothing", False, maps, f"seed {seed}")


def centre_disc() -> Method:
    """The cells nearest to the middle of the photo first."""

    def maps(batch: Batch) -> Tensor:
        height, width = batch.features.shape[2:]
        rows = (torch.arange(height) - (height - 1) / 2) / height
        columns = (torch.arange(width) - (width - 1) / 2) / width
        disc = -(rows[:, None] ** 2 + columns[None] ** 2)
        return disc.expand(len(batch.features), height, width).to(batch.features.device)

    return Method("centre", "centre disc", "nothing", False, maps, "nearest to the middle first")


def feature_norm(earlier: int = 0) -> Method:
    """The cells with the longest feature vectors first, without the channels of an ``earlier`` map behind them."""

    @torch.no_grad()
    def maps(batch: Batch) -> Tensor:
        own = batch.features.shape[1] - earlier
        norm: Tensor = torch.linalg.vector_norm(batch.features[:, :own].float(), dim=1)
        return norm

    return Method("norm", "feature norm", "nothing", False, maps, "the length of a cell's feature vector")


def another_images(title: str, rankings: Tensor) -> Method:
    """Of N maps (N, H, W) by a method of this title, image i gets that of image i + N // 2 (modulo N)."""
    count = len(rankings)

    def maps(batch: Batch) -> Tensor:
        return rankings[(batch.rows + max(1, count // 2)) % count].to(batch.features.device)

    note = f"{title}'s map of the image half the set further on"
    return Method("shuffled", "another image's map", "nothing", False, maps, note, reads_photo=False)
