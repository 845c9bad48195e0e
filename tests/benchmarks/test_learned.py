"""Rivals that learn: their losses by hand, and the command on a tiny network."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.faithfulness import learned
from bla.comparison.methods import Batch, Method
from small import CHANNELS, GRID, photo

ROWS = np.array([0])


def lessons(answers: Any = None, ends: Tensor | None = None) -> Any:
    """One photo of class 0, for which a mask says as much as it has cells."""

    def logits(_: Any, *masks: Tensor) -> list[Tensor]:
        return [functional.pad(each.sum(dim=(1, 2))[:, None], (0, 1)) for each in masks]

    return SimpleNamespace(answers=answers, ends=ends, logits=logits, targets=lambda _: torch.tensor([0]))


def test_masks_cost_what_they_lose_and_cover() -> None:
    assert learned.variation(torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])) == 1, "half of two edges"
    found = learned.l_cam(lessons(), ROWS, torch.zeros(1, 1, 4), area=2.0)
    assert found == pytest.approx(1.5 * math.log(1 + math.exp(-2)) + 2 * 0.5005**0.3)
    areas = [learned.bounded_area(torch.tensor([[[1.0] * ones + [0.0] * (20 - ones)]])) for ones in (0, 1, 6, 8)]
    assert areas == pytest.approx([1 / 20, 0, 0, 2 / 20]), "at least one cell of 20, and at most six"


def test_what_is_left_must_not_tell_the_class() -> None:
    scores = torch.tensor([[[math.log(3), -math.log(3)]]])  # masks of 3/4 and 1/4: 1 kept, 1 left
    told = 1 / (1 + math.exp(-1))
    price = math.log(1 / told) + (3 / 4 + 1 / 4) / 2 + 0.01 * (0.5 + 0.125)  # of two cells none may be kept
    entropy = -(told * math.log(told) + (1 - told) * math.log(1 - told)) / math.log(2)
    by_entropy, by_class = (
        learned.remainder(lessons(), ROWS, scores, left=left, weight=2.0) for left in ("entropy", "class")
    )
    assert by_entropy == pytest.approx(price - 2 * entropy)
    assert by_class == pytest.approx(price - 2 * math.log(1 - told))


def test_values_are_those_of_an_additive_classifier() -> None:
    values, nothing = torch.tensor([0.3, 0.2, -0.4]), -1.0
    masks = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 1]]).bool()
    said = nothing + masks.float() @ values
    bits = np.packbits(masks[None].numpy(), axis=-1)
    answers = SimpleNamespace(masks=bits, grid=(1, 3), batch=lambda _: (masks.reshape(1, 4, 1, 3), said[None]))
    given = lessons(answers, torch.tensor([[nothing, nothing + 0.1]]))
    assert learned.size_weights(given.answers).tolist() == pytest.approx([0, 1, 1, 0])
    shifted = values.reshape(1, 1, 3) + 7
    assert learned.fast_shap(given, ROWS, shifted, probability=False) == pytest.approx(0, abs=1e-6)
    flat = learned.fast_shap(given, ROWS, 0 * shifted, probability=True)
    total = math.exp(-0.9) - math.exp(-1)
    told = math.exp(-1) + masks.sum(dim=1) * total / 3
    assert flat == pytest.approx((said.exp() - told).square().mean().item())


def test_rivals_are_tried_trained_and_judged_and_all_of_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, count in (("training", 6), ("photos", 3)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            photo(index, index % 3).save(tmp_path / folder / f"{index}.png")
    few = [dataclasses.replace(rival, trial=rival.trial and 3, epochs=1) for rival in learned.RIVALS]
    monkeypatch.setattr(learned, "RIVALS", few)
    monkeypatch.setattr(learned, "fastest", lambda pooled, _: pooled)
    compared: list[list[Method]] = []
    monkeypatch.setattr(learned, "compare", lambda *given: compared.append(given[-1]))
    folders = [f"--{name}={tmp_path / name}" for name in ("training", "out", "cache")]
    arguments = ["small:Tiny", str(tmp_path / "photos"), *folders, "--untrained", "--masks", "2"]
    monkeypatch.setattr("sys.argv", ["learned", *arguments])
    learned.main()
    monkeypatch.setattr(learned, "fit_minibatches", lambda *_, **__: 1 / 0)  # nothing is trained again
    learned.main()
    assert "| tried | kept less removed, 1 photos |" in (text := capsys.readouterr().out)
    assert "| FastSHAP, head, probability, 5 photos, 1 times |" in text
    features, rows = torch.rand(2, CHANNELS, *GRID), torch.arange(2)
    for method, again in zip(*compared, strict=True):
        assert torch.equal(*(each.maps(Batch(features, rows, rows)) for each in (method, again)))
    kinds = [f"{rival.name}{kind}" for rival in few for kind in ("-classes", "")]
    assert [method.name for method in compared[0]] == [*learned.CONTROLS, *kinds]
