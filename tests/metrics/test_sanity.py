"""Rank correlation as scipy has it; maps moved as their photos."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from bla.metrics.sanity import rank_correlation, stability


def test_rank_correlation_is_spearmans_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(5, (6, 3, 4), generator=generator).float()
    second = first + torch.randint(4, (6, 3, 4), generator=generator)
    found = rank_correlation(first, second)
    for row in range(6):
        expected = stats.spearmanr(first[row].flatten(), second[row].flatten()).statistic
        assert found[row].item() == pytest.approx(expected)
    assert rank_correlation(first, torch.ones_like(first)).tolist() == [0] * 6
    assert rank_correlation(first, first).tolist() == pytest.approx([1] * 6)
    assert rank_correlation(first, -first).tolist() == pytest.approx([-1] * 6)


def test_a_map_that_moves_with_its_photo_is_stable() -> None:
    pixels = torch.randn(4, 3, 24, 40, generator=torch.Generator().manual_seed(1))

    def local(given: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(given.mean(dim=1, keepdim=True), 8)[:, 0]

    def fixed(given: Tensor) -> Tensor:
        return torch.arange(15.0).reshape(1, 3, 5).expand(len(given), 3, 5)

    moved = stability(local, pixels, noise=0.01)
    assert {name: value.mean().item() for name, value in moved.items()} == pytest.approx(
        {"flip": 1, "shift": 1, "noise": 1}, abs=0.02
    )
    stuck = stability(fixed, pixels)
    assert stuck["flip"].mean() < 0.9
    assert stuck["noise"].tolist() == [1] * 4
