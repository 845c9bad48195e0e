"""The evaluator sees through codes: selections that hide the class in the mask's shape, and honest ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bla.metrics import encoding, mask_probe, retrained, train_evaluator, train_pixel_evaluator
from bla.metrics.leakage import mean_of_selected, random_masks
from bla.metrics.pixels import kept_and_removed

CLASSES, CHANNELS, GRID = 3, 12, (3, 4)


def planted(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features whose class is told by one cell alone, at a random place: features, labels, masks of that cell."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, CHANNELS, *GRID, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    where = torch.randint(12, (count,), generator=generator)
    masks = torch.nn.functional.one_hot(where, 12).bool().reshape(count, *GRID)
    rows = torch.arange(count)
    features[rows, labels, where // 4, where % 4] += 8
    return features, labels, masks


@pytest.fixture(scope="module")
def sets() -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    return planted(1200, 0), planted(400, 1)


def code(labels: Tensor) -> Tensor:
    """Masks that spell the class: class c selects cell c, whatever is there."""
    return torch.nn.functional.one_hot(labels, 12).bool().reshape(-1, *GRID)


def test_an_honest_selection_is_believed_and_a_code_is_not(sets, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("bla.metrics.leakage.STEPS", 400)
    (features, labels, masks), (test_features, test_labels, test_masks) = sets
    judge = train_evaluator(features, labels)
    assert judge.accuracy(test_features, test_masks, test_labels) > 0.9
    assert judge.accuracy(test_features, code(test_labels), test_labels) < 0.6, "the cells themselves tell nothing"
    assert judge.accuracy(test_features, ~test_masks, test_labels) < 0.5, "what the honest one leaves out is noise"

    def probed(train: Tensor, test: Tensor) -> float:
        return mask_probe(train, labels, test, test_labels, classes=CLASSES).double().mean().item()

    assert probed(code(labels), code(test_labels)) == 1
    assert probed(masks, test_masks) < 0.45

    def relearnt(train: Tensor, test: Tensor) -> float:
        pooled, test_pooled = mean_of_selected(features, train), mean_of_selected(test_features, test)
        return retrained(pooled, labels, test_pooled, test_labels, classes=CLASSES).double().mean().item()

    assert relearnt(masks, test_masks) > 0.9
    assert relearnt(~masks, ~test_masks) < 0.5


def test_it_is_a_function_of_the_seed_and_takes_rows_or_tensors(sets) -> None:  # type: ignore[no-untyped-def]
    (features, labels, _), (test_features, test_labels, test_masks) = sets
    torch.manual_seed(5)
    one = train_evaluator(features, labels, steps=60, seed=3)
    torch.manual_seed(6)
    asked = []

    def rows(indices: np.ndarray) -> Tensor:
        asked.append(len(indices))
        return features[indices]

    before = torch.get_rng_state()
    with torch.inference_mode():
        other = train_evaluator(rows, labels, classes=CLASSES, steps=60, seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is not drawn from"
    assert torch.equal(one.linear.weight, other.linear.weight)
    assert not torch.equal(one.linear.weight, train_evaluator(features, labels, steps=60, seed=4).linear.weight)
    assert max(asked) <= 32
    several = torch.stack([test_masks, ~test_masks], dim=1)
    correct = one.correct(test_features, several, test_labels)
    assert correct.shape == (400, 2)
    assert correct[:, 0].double().mean().item() == one.accuracy(test_features, test_masks, test_labels)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 50))
def test_the_law_of_masks(rows: int, columns: int, seed: int) -> None:
    masks = random_masks(40, (rows, columns), torch.Generator().manual_seed(seed))
    assert masks.shape == (40, rows, columns)
    assert masks.flatten(1).any(1).all(), "no mask is empty"


def test_every_size_and_every_cell_is_as_likely() -> None:
    masks = random_masks(24_000, GRID, torch.Generator().manual_seed(0))
    sizes = torch.bincount(masks.sum(dim=(1, 2)), minlength=13)[1:]
    assert (sizes - 2000).abs().max() < 250
    assert (masks.double().mean(0) - 6.5 / 12).abs().max() < 0.02


def test_labels_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="class indices"):
        train_evaluator(torch.rand(2, 3, 2, 2), torch.tensor([0.0, 1.0]))


TEN_LINES = """
import torch
from bla.metrics import mask_probe, train_evaluator
labels = torch.arange(600) % 3
features = torch.randn(600, 8, 5, 7) + 2 * torch.nn.functional.one_hot(labels, 8)[:, :, None, None]
train, test = slice(0, 400), slice(400, 600)
judge = train_evaluator(features[train], labels[train], steps=200)
masks = features.norm(dim=1) > features.norm(dim=1).flatten(1).median(1).values[:, None, None]  # your selector
print(judge.accuracy(features[test], masks[test], labels[test]))
print(mask_probe(masks[train], labels[train], masks[test], labels[test], classes=3).double().mean())
"""


def test_anyones_selector_in_ten_lines(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    assert len(TEN_LINES.strip().splitlines()) <= 9
    monkeypatch.setattr("bla.metrics.leakage.STEPS", 100)
    exec(TEN_LINES, {})
    assert float(capsys.readouterr().out.splitlines()[0]) > 0.8


def test_a_code_is_measured_in_nats_and_a_mask_that_repeats_its_values_is_none(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("bla.metrics.leakage.STEPS", 200)
    labels = torch.arange(300) % CLASSES
    ignorant, sure = torch.zeros(300, CLASSES), 20.0 * torch.nn.functional.one_hot(labels, CLASSES)
    told = encoding(ignorant, code(labels), labels, logits=ignorant[:60], masks=code(labels[:60]), labels=labels[:60])
    assert told.mean().item() == pytest.approx(math.log(CLASSES), abs=0.05), "all of the class, by the mask alone"
    assert mask_probe(code(labels), labels, code(labels), labels, classes=CLASSES).all()
    repeated = encoding(sure, code(labels), labels, logits=sure, masks=code(labels), labels=labels)
    assert repeated.abs().max() < 1e-3, "the values tell it already"
    random = random_masks(300, GRID, torch.Generator().manual_seed(0))
    assert encoding(ignorant, random, labels, logits=ignorant, masks=random.flip(0), labels=labels).mean() < 0.02


def test_an_evaluator_of_pixels_names_the_class_from_the_quarter_that_tells_it(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("bla.metrics.leakage.STEPS", 300)
    labels = torch.arange(96) % 2
    photos = 0.1 * torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    photos[:, 0, :4, :4] += 2 * labels[:, None, None] - 1.0
    evaluator = train_pixel_evaluator(lambda pixels: 20 * pixels.mean(dim=(2, 3)), photos, labels, (2, 2), fill="grey")
    telling = torch.zeros(96, 2, 2)
    telling[:, 0, 0] = 1
    assert kept_and_removed(evaluator, photos, telling, labels, fill="grey")["kept"].mean() > 0.95
    assert kept_and_removed(evaluator, photos, telling, labels, fill="grey")["removed"].mean() < 0.9
    assert evaluator(photos[:1]).shape == (1, 2)
