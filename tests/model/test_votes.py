"""What each selected cell says for a class: sums that must be met, slow references, and the way to the JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bla.data.photo import Transform
from bla.explanations.explanation import Explanation, ExplanationError
from bla.model.attention import BoundedLogitAttention
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.model.heads import MapHead, kept, weighted_sum
from bla.model.votes import votes

B, C, H, W, K = 3, 5, 2, 4, 6


@pytest.fixture
def selection() -> tuple[Tensor, Tensor]:
    """Features, and weights of which every third is zero."""
    torch.manual_seed(0)
    weights = torch.rand(B, H * W)
    weights[:, ::3] = 0
    return torch.randn(B, C, H, W), (weights / weights.sum(1, keepdim=True)).reshape(B, H, W)


TARGET, AGAINST = torch.tensor([0, 5, 2]), torch.tensor([1, 0, 3])


@pytest.mark.parametrize("against", [None, AGAINST], ids=["for", "rather than"])
def test_votes_of_a_linear_head_are_its_weights_on_each_cell(
    selection: tuple[Tensor, Tensor], against: Tensor | None
) -> None:
    features, weights = selection
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(C, K)).eval()
    found = votes(head, features, weights, TARGET, against)
    assert found.method == "exact"
    matrix, bias = head[1].weight.detach(), head[1].bias.detach()  # type: ignore[union-attr]
    for image in range(B):
        row, offset = matrix[TARGET[image]], bias[TARGET[image]]
        if against is not None:
            row, offset = row - matrix[against[image]], offset - bias[against[image]]
        for cell in np.ndindex(H, W):
            expected = weights[image][cell] * (row @ features[image, :, cell[0], cell[1]])
            torch.testing.assert_close(found.cells[image][cell], expected)
        torch.testing.assert_close(found.offset[image], offset)
    torch.testing.assert_close(found.cells.sum((1, 2)) + found.offset, found.logit)
    logits = head(weighted_sum(features, weights))
    own = logits.gather(1, TARGET[:, None])[:, 0]
    torch.testing.assert_close(found.logit, own if against is None else own - logits.gather(1, against[:, None])[:, 0])


class Cosine(nn.Linear):
    """Angles to the classes, which do not change on the way to no cell at all."""

    def forward(self, pooled: Tensor) -> Tensor:
        normal = nn.functional.normalize
        return 20 * nn.functional.linear(normal(pooled), normal(self.weight))


BENT = {
    "deep": lambda: nn.Sequential(nn.Linear(C, 32), nn.GELU(), nn.Linear(32, K)),
    "normalised": lambda: nn.Sequential(nn.LayerNorm(C), nn.Linear(C, K)),
    "cosine": lambda: Cosine(C, K),
    "capped": lambda: nn.Sequential(nn.Linear(C, K), nn.Hardtanh(-0.5, 0.5)),
}


@pytest.mark.parametrize("name", BENT)
def test_votes_of_another_head_are_labelled_and_add_up(name: str, selection: tuple[Tensor, Tensor]) -> None:
    features, weights = selection
    torch.manual_seed(1)
    head = BENT[name]().eval()
    found = votes(head, 3 * features, weights, TARGET, AGAINST)
    assert found.method == "integrated gradients"
    torch.testing.assert_close(found.cells.sum((1, 2)) + found.offset, found.logit, rtol=1e-5, atol=1e-5)
    assert not found.cells[weights == 0].any()
    assert all(parameter.grad is None for parameter in head.parameters())


class Flattened(MapHead):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C * H * W, K)

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        logits: Tensor = self.fc((features if keep is None else features * keep[:, None]).flatten(1))
        return logits


def test_votes_of_a_head_that_reads_maps_are_what_is_lost_without_each_cell(selection: tuple[Tensor, Tensor]) -> None:
    features, weights = selection
    weights[2] = 0
    weights[2, 1, 1] = 1
    head = Flattened()
    found = votes(head, features, weights, TARGET)
    assert found.method == "left out one by one"
    assert not found.cells[weights == 0].any()
    for image in (0, 1):
        for cell in weights[image].nonzero().tolist():
            fewer = weights[image : image + 1].clone()
            fewer[0][tuple(cell)] = 0
            logit = head(features[image : image + 1], kept(fewer))[0, TARGET[image]]
            torch.testing.assert_close(found.cells[image][tuple(cell)], found.logit[image] - logit)
    torch.testing.assert_close(found.cells[2, 1, 1], found.logit[2])  # of a single cell nothing would be left


# On photos.


@pytest.fixture
def wrapped() -> ExplainableClassifier:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())
    net = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    half = (0.5, 0.5, 0.5)
    made = explainable(net, classes=["ant", "bee", "cicada"], transform=Transform((32, 32), half, half))
    assert isinstance(made.attention, BoundedLogitAttention)
    made.attention.calibrate(made.trunk(torch.randn(8, 3, 32, 32)))
    made.fitted = True
    return made


def photo() -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)


def test_an_explanation_carries_the_votes_to_its_json_and_back(wrapped: ExplainableClassifier) -> None:
    [plain], [asked] = wrapped.explain(photo()), wrapped.explain(photo(), target="bee", against=2)
    assert plain.votes is None
    assert "votes" not in plain.to_dict()
    assert asked.votes is not None
    assert (asked.votes.target, asked.votes.against, asked.votes.labels) == (1, 2, ("bee", "cicada"))
    assert asked.selected.tolist() == plain.selected.tolist()  # class-agnostic: the selection is the same
    assert not asked.votes.cells[~asked.selected].any()
    assert asked.votes.cells.sum() + asked.votes.offset == pytest.approx(asked.votes.logit, abs=1e-5)
    assert Explanation.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    assert Explanation.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain


def test_what_cannot_be_asked_is_refused(wrapped: ExplainableClassifier) -> None:
    with pytest.raises(ClassifierError, match="expected a target, to be held against another class, got none"):
        wrapped.explain(photo(), against=1)
    with pytest.raises(ClassifierError, match="expected two classes, got 'bee' against itself"):
        wrapped.explain(photo(), target="bee", against=1)
    with pytest.raises(ClassifierError, match=r"expected a class of .* by name, or by index from 0 to 2, got 'wasp'"):
        wrapped.explain(photo(), target="bee", against="wasp")


def test_votes_that_contradict_themselves_are_refused(wrapped: ExplainableClassifier) -> None:
    [asked] = wrapped.explain(photo(), target="bee")
    record = asked.to_dict()
    for change, message in (
        ({"method": "guessed"}, "got a malformed one: Invalid enum value 'guessed' - at .*votes.method"),
        ({"labels": ["bee", "ant"]}, "expected a label for each class of the votes"),
        ({"cells": [[1.0]]}, r"expected votes on the grid \(4, 4\), got \(1, 1\)"),
    ):
        with pytest.raises(ExplanationError, match=message):
            Explanation.from_dict(record | {"votes": record["votes"] | change})
