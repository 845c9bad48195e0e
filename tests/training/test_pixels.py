"""Training on masked photos: the loss by hand, and a classifier whose answer lies in known pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bla
from bla.model.own_prediction import TRAINED, UNTRAINED
from bla.training.settings import Settings, TrainingError
from bla.training.stages import ALIKE, REMOVED, masked_loss


def slow_loss(ranking: Tensor, masks: Tensor, answers: Tensor) -> float:
    total = 0.0
    for order, subsets, said in zip(ranking, masks, answers, strict=True):
        sums = torch.stack([order[subset].sum() for subset in subsets])
        few = torch.tensor([2 * int(subset.sum()) <= subset.numel() for subset in subsets])
        for group, weight in ((few, 1.0), (~few, REMOVED)):
            if group.any():
                error = sums[group] - said[group]
                variance = said[group].var(correction=0)
                total += weight * float((error - error.mean()).square().mean() / (variance + ALIKE))
    return total


def test_the_loss_is_the_error_of_sums_over_kept_cells() -> None:
    torch.manual_seed(0)
    ranking, masks, answers = torch.randn(3, 2, 3), torch.rand(3, 6, 2, 3) < 0.5, torch.randn(3, 6)
    masks[1] = True  # all in one group
    assert float(masked_loss(ranking, masks, answers)) == pytest.approx(slow_loss(ranking, masks, answers), rel=1e-5)
    a = ranking.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: masked_loss(a, masks, answers.double()), (a,))


class Sees(nn.Module):
    """Class 1 if the photo has red in its left half; its map is wide, so that every cell has seen far around it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.AvgPool2d(16), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.trunk[1].weight[0, 0] = 1.0  # type: ignore[index, union-attr]
            self.trunk[1].weight[1, 1] = 1.0  # type: ignore[index, union-attr]
            self.head.weight[:] = torch.tensor([[0.0, 1.0, 0, 0], [8.0, 0.0, 0, 0]])
            self.head.bias[:] = torch.tensor([3.0, 0.0])

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.flatten(self.pool(self.trunk(pixels))))
        return logits


def photos(count: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    found = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        photo = random.integers(100, 156, (96, 128, 3), dtype=np.uint8)
        top, left = 16 * random.integers(0, 5), 16 * random.integers(0, 7)
        photo[top : top + 32, left : left + 32, 0] = 255
        found.append(photo)
    return found


def test_fitting_on_masked_photos_is_repeatable_said_and_leaves_the_classifier_as_it_is(tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    model = Sees().eval()
    wrapped = bla.explainable(model, transform=bla.Transform((96, 128), half, half), classes=["none", "red"])
    assert wrapped.setup == UNTRAINED
    said: list[str] = []
    report = lambda title, done, total: said.append(title)  # noqa: E731
    metrics = bla.fit(wrapped, photos(12), epochs=2, masks=8, mean_size=5, cache=tmp_path, report=report)
    assert any("masked answers of" in line for line in said)
    assert wrapped.setup == TRAINED
    assert metrics["agreement"] == 1.0
    first = wrapped.explain(photos(3))
    bla.fit(wrapped, photos(12), epochs=2, masks=8, mean_size=5, cache=tmp_path)
    assert wrapped.explain(photos(3)) == first
    pixels = torch.randn(2, 3, 96, 128)
    features = wrapped.trunk(pixels)
    assert torch.equal(wrapped.head(features.mean(dim=(2, 3))), model(pixels))


def test_a_regression_is_fitted_to_its_values(tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    transform = bla.Transform((96, 128), half, half)
    wrapped = bla.explainable(Sees().eval(), transform=transform, output=lambda said: said[:, 1:], meaning="value")
    metrics = bla.fit(wrapped, photos(30), epochs=8, masks=16, mean_size=5, cache=tmp_path)
    assert metrics["baseline"] == {"loss": 0.0, "r2": 1.0}
    assert metrics["agreement"] == metrics["hard"]["r2"] < 1
    for why, photo in zip(wrapped.explain(photos(3), size=4), photos(3), strict=True):
        red = (photo[..., 0] == 255).reshape(6, 16, 8, 16).mean(axis=(1, 3)) == 1
        assert (why.selected & red).sum() >= 3
    agnostic = bla.explainable(Sees(), transform=transform, meaning="value", output=lambda said: said[:, 1:],
                               attention=bla.model.attention.BoundedLogitAttention)  # fmt: skip
    with pytest.raises(bla.BlaError, match="expected the default attention, which learns from a regression's values"):
        bla.fit(agnostic, photos(9), cache=tmp_path)


def test_masked_photos_are_of_a_classifier_that_exists() -> None:
    assert Settings.recommended(head="own").setup == "bla-px"
    settings = Settings("bla-px", mean_size=5)
    assert Settings.from_record(settings.record()) == settings
    assert (settings.head.head, settings.head.targets, settings.stages.epochs) == ("own", "predictions", 10)
    with pytest.raises(TrainingError, match="bla-px, which explains the classifier as it is"):
        Settings("bla-px", head="new", targets="labels")
    with pytest.raises(TrainingError, match="expected masks an even number of at least 8, got 7"):
        Settings("bla-px", masks=7)
    with pytest.raises(TrainingError, match="expected no masks without setup bla-px"):
        Settings("bla", masks=10)
