"""Cells against objects, by hand: boxes that cover cells in part, images without an object."""

from __future__ import annotations

import math

import pytest
import torch

from bla.metrics import grid_pointing, localise, mosaic
from bla.metrics.localisation import quarters


def test_by_hand() -> None:
    ranking = torch.tensor([[[4.0, 3.0, 2.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 5.0]]])
    selected = ranking > 1.5
    coverage = torch.zeros(2, 2, 3)
    coverage[0, 0] = torch.tensor([0.25, 1.0, 0.0])
    coverage[0, 1, 0] = 0.75
    found = localise(ranking, selected, coverage)
    assert found["on_object"][0].item() == pytest.approx(1.25 / 3)
    assert found["recall"][0].item() == pytest.approx(1.25 / 2)
    assert found["iou"][0].item() == pytest.approx(1.25 / (3 + 2 - 1.25))
    assert found["pointing"][0] == 0, "a quarter of the best cell is on the object"
    assert found["energy"][0].item() == pytest.approx((0.25 * 1 + 1.0 * 0.75 + 0.75 * 0.25) / (1 + 0.75 + 0.5 + 0.25))
    assert all(math.isnan(value[1]) for value in found.values()), "no object, no figure"


def test_the_whole_object_and_nothing_else_is_best() -> None:
    coverage = torch.zeros(1, 3, 4)
    coverage[0, 1, 1:3] = 1
    found = localise(coverage, coverage > 0, coverage)
    assert all(value.item() == 1 for value in found.values())


def test_a_map_that_does_not_vary_has_the_objects_share_as_energy() -> None:
    coverage = torch.zeros(1, 2, 2)
    coverage[0, 0, 0] = 1
    found = localise(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), coverage)
    assert found["energy"].item() == 0.25


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="of one shape"):
        localise(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 3))


def test_grid_pointing_by_hand_on_a_grid_whose_middle_column_is_shared() -> None:
    columns, rows = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = [torch.outer(one, other) for one in (columns, 1 - columns) for other in (rows, 1 - rows)]
    assert torch.equal(quarters(3, 4), torch.stack(expected))
    rankings = torch.zeros(4, 3, 4)
    rankings[0, 0, 0] = rankings[0, 1, 0] = 1  # wholly, and half
    rankings[1, 0, 2] = rankings[1, 0, 1] = 1  # wholly, and not at all
    rankings[2, 2, 0] = rankings[2, 2, 1] = 1
    rankings[3, 0, 0] = rankings[3, 0, 1] = 1
    assert grid_pointing(rankings, 2).tolist() == [0.75, 0.5, 1, 0]
    four = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 2, 1)
    assert mosaic(four)[0, 2].tolist() == 2 * [[0, 1]] + 2 * [[2, 3]]
    with pytest.raises(ValueError, match="expected four photos"):
        mosaic(torch.zeros(3, 3, 2, 2))
