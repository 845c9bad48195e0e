"""Trunk and head by name: what no rule finds, and errors that say which of the two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bla.data.photo import Transform
from bla.model.classifier import ClassifierError, explainable

HALF = (0.5, 0.5, 0.5)
SMALL = Transform((32, 32), HALF, HALF)


class Odd(nn.Module):
    """Neither torch.fx nor torch.export can trace it: its way depends on the content."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 5)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.body(pixels)
        if features.mean() > 1e6:
            features = features * 0
        return {"logits": self.fc(features.mean(dim=(2, 3))), "features": features}


def tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    found: Tensor = model.body(pixels).flatten(2).transpose(1, 2)  # type: ignore[operator]
    return found


@pytest.mark.parametrize(
    "parts",
    [
        ("body", "fc"),
        (tokens, "fc"),
        (lambda model, pixels: (model.body(pixels), 3), lambda model, pooled: {"logits": model.fc(pooled)}),
    ],
    ids=["submodules", "tokens", "callables"],
)
def test_named_parts_make_the_classifier(parts: Any) -> None:
    torch.manual_seed(0)
    model = Odd()
    wrapped = explainable(model, parts=parts, transform=SMALL)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = wrapped.classify(wrapped.trunk(pixels), torch.full((3, 4, 4), 1 / 16))
        torch.testing.assert_close(logits, model(pixels)["logits"])
        nn.init.zeros_(model.fc.weight)  # the copy is not moved by the original
        torch.testing.assert_close(wrapped.classify(wrapped.trunk(pixels), torch.full((3, 4, 4), 1 / 16)), logits)


def silent(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError  # with nothing to say


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("head", "fc"), "trunk: expected the name of a submodule, got 'head'; there are body, fc"),
        (("body", "neck"), "head: expected the name of a submodule, got 'neck'"),
        (("body", 3), "head: expected a submodule's name or a callable, got int"),
        (("body",), r"expected parts=\(trunk, head\)"),
        (("fc", "fc"), r"trunk: expected a part that takes pixels \(2, 3, 32, 32\) got RuntimeError"),
        (
            ("body", "body"),
            r"head: expected a part that takes pooled features \(2, 4\), the mean over the trunk's cells",
        ),
        ((silent, "fc"), "trunk: expected a part that takes pixels .* got NotImplementedError"),
        ((lambda *_: 3, "fc"), "trunk: expected a part that gives a tensor, got int"),
        ((lambda model, pixels: pixels.mean(), "fc"), "trunk: expected a feature map"),
        (("body", lambda model, pooled: pooled.sum()), r"head: expected logits \(batch, classes\), got shape \(\)"),
        (("body", lambda model, pooled: 2 * model.fc(pooled)), "expected a head that reads the average .*differ by"),
    ],
)
def test_an_error_says_which_part_and_why(parts: Any, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ClassifierError, match=f"^Odd: {message}"):
        explainable(Odd(), parts=parts, transform=SMALL)


def test_parts_and_another_head_are_one_too_many() -> None:
    with pytest.raises(ClassifierError, match="expected parts=, which name a head, or head=, got both"):
        explainable(Odd(), parts=("body", "fc"), head=3, transform=SMALL)
