"""Figures: cross entropy and top-k by hand and against torch and NumPy, sizes against NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional

from bla.metrics import Accuracy, size_summary

# Accuracy.


def test_by_hand_over_uneven_batches() -> None:
    accuracy = Accuracy()
    # of seven classes; the class's own logit is the best, the third, the sixth, and the fifth
    accuracy.update(torch.tensor([[3.0, 0, 0, 0, 0, 0, 0]]), torch.tensor([0]))
    accuracy.update(
        torch.tensor([[5.0, 4, 3, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0]]), torch.tensor([2, 5, 4])
    )
    result = accuracy.result()
    assert accuracy.images == 4
    assert (result["top1"], result["top5"]) == (1 / 4, 3 / 4)
    falling = math.log(sum(math.exp(-step) for step in range(7)))
    losses = [
        math.log(math.exp(3) + 6) - 3,
        math.log(math.exp(5) + math.exp(4) + math.exp(3) + 4) - 3,
        falling + 5,
        falling + 4,
    ]
    assert result["loss"] == pytest.approx(sum(losses) / 4, rel=1e-12)


def test_fewer_than_five_classes_count_wholly_for_top5() -> None:
    accuracy = Accuracy()
    accuracy.update(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), torch.tensor([0, 0]))
    assert accuracy.result()["top1"] == 0.5
    assert accuracy.result()["top5"] == 1.0


def test_ties_go_to_the_class_that_comes_first() -> None:
    for classes in (2, 6, 10, 1000):
        for target in {0, 1, min(4, classes - 1), min(5, classes - 1), classes - 1}:
            accuracy = Accuracy()
            accuracy.update(torch.ones(1, classes), torch.tensor([target]))
            assert accuracy.result()["top1"] == (target == 0)
            assert accuracy.result()["top5"] == (target < 5)
            assert accuracy.result()["loss"] == pytest.approx(math.log(classes))


def test_a_nan_is_no_success() -> None:
    accuracy = Accuracy()
    own = torch.zeros(1, 9)
    own[0, 3] = math.nan
    accuracy.update(torch.full((1, 9), math.nan), torch.tensor([0]))
    accuracy.update(own, torch.tensor([3]))
    assert (accuracy.result()["top1"], accuracy.result()["top5"]) == (0, 0)
    assert math.isnan(accuracy.result()["loss"])


def test_infinite_logits_of_masked_classes() -> None:
    accuracy = Accuracy()
    accuracy.update(torch.tensor([[1.0, -math.inf, 0.0]]), torch.tensor([0]))
    assert accuracy.result() == {"loss": pytest.approx(math.log(1 + math.exp(-1))), "top1": 1.0, "top5": 1.0}


@given(st.integers(1, 40), st.integers(2, 12), st.integers(0, 99), st.lists(st.integers(0, 40), max_size=4))
def test_equals_torch_whatever_the_batches(images: int, classes: int, seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(images, classes, generator=generator)
    targets = torch.randint(classes, (images,), generator=generator)
    accuracy = Accuracy()
    edges = sorted({0, images, *(cut for cut in cuts if cut < images)})
    for start, stop in itertools.pairwise(edges):
        accuracy.update(logits[start:stop], targets[start:stop])
    result = accuracy.result()
    assert accuracy.images == images
    assert result["loss"] == pytest.approx(functional.cross_entropy(logits.double(), targets).item(), rel=1e-12)
    ranking = logits.sort(dim=-1, descending=True).indices
    assert result["top1"] == (ranking[:, 0] == targets).double().mean().item()
    assert result["top5"] == (ranking[:, :5] == targets[:, None]).any(1).double().mean().item()


def test_half_precision_logits_are_summed_in_double() -> None:
    accuracy = Accuracy()
    for _ in range(3000):
        accuracy.update(torch.tensor([[0.0, 0.0]], dtype=torch.float16), torch.tensor([1]))
    assert accuracy.result()["loss"] == pytest.approx(math.log(2), rel=1e-12)


def test_an_empty_batch_counts_nothing_and_no_image_is_refused() -> None:
    accuracy = Accuracy()
    with pytest.raises(ValueError, match="at least one image, got none"):
        accuracy.result()
    accuracy.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one image, got none"):
        accuracy.result()


# Size.


def test_sizes_by_hand() -> None:
    # sizes 1, 3, 3, 4 of 4 cells: mean 11 / 4, squared deviations 49/16 + 1/16 + 1/16 + 25/16
    assert size_summary(np.array([0, 1, 0, 2, 1])) == {
        "mean": 2.75,
        "std": pytest.approx(math.sqrt(76 / 16 / 4)),
        "min": 1,
        "median": 3.0,
        "max": 4,
        "cells": 4,
    }
    assert size_summary(np.array([0, 1, 1]))["median"] == 1.5
    assert size_summary(np.array([0, 5]))["std"] == 0


@given(hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 9)).filter(lambda counts: counts.sum() > 0))
def test_sizes_equal_numpys(counts: npt.NDArray[np.int64]) -> None:
    sizes = np.repeat(np.arange(len(counts)), counts)
    summary = size_summary(counts)
    assert summary == {
        "mean": pytest.approx(sizes.mean()),
        "std": pytest.approx(sizes.std(), abs=1e-9),
        "min": sizes.min(),
        "median": np.median(sizes),
        "max": sizes.max(),
        "cells": len(counts) - 1,
    }
    assert {type(value) for value in summary.values()} == {int, float}


def test_sizes_of_millions() -> None:
    summary = size_summary(np.array([0, 10**9, 0, 3 * 10**9]))
    assert (summary["mean"], summary["median"]) == (2.5, 3.0)
    assert summary["std"] == pytest.approx(math.sqrt(0.75))


def test_no_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one explanation, got none"):
        size_summary(np.zeros(50, np.int64))
