"""Published synthetic sets whose relevant features are known: L2X's four and INVASE's Syn1 to Syn6."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Samples (n, d), the probability of class 1 (n,), and which features it depends on (n, d)."""

    features: Tensor
    probability: Tensor
    relevant: Tensor


def _additive(x: Tensor, scale: float) -> Tensor:
    return -scale * torch.sin(0.2 * x[:, 0]) + x[:, 1].abs() + x[:, 2] + torch.exp(-x[:, 3]) - 2.4


def _sphere(x: Tensor) -> Tensor:
    return x[:, :4].square().sum(dim=1) - 4


def _product(x: Tensor) -> Tensor:
    return x[:, 0] * x[:, 1]


def _marked(x: Tensor, *features: int) -> Tensor:
    marks = torch.zeros_like(x, dtype=torch.bool)
    marks[:, list(features)] = True
    return marks


def _normal(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator)


def _from_logit(x: Tensor, logit: Tensor, relevant: Tensor) -> Drawn:
    """Class 0 has the logit, as in both papers' code."""
    return Drawn(x, torch.sigmoid(-logit), relevant)


def orange(n: int, generator: torch.Generator) -> Drawn:
    """L2X's orange skin: exp(sum of the squares of features 0 to 3, less 4)."""
    x = _normal(n, 10, generator)
    return _from_logit(x, _sphere(x), _marked(x, 0, 1, 2, 3))


def xor(n: int, generator: torch.Generator) -> Drawn:
    """L2X's XOR: exp(x0 x1)."""
    x = _normal(n, 10, generator)
    return _from_logit(x, _product(x), _marked(x, 0, 1))


def additive(n: int, generator: torch.Generator) -> Drawn:
    """L2X's nonlinear additive: exp(-100 sin(.2 x0) + |x1| + x2 + exp(-x3) - 2.4)."""
    x = _normal(n, 10, generator)
    return _from_logit(x, _additive(x, 100), _marked(x, 0, 1, 2, 3))


def switch(n: int, generator: torch.Generator) -> Drawn:
    """L2X's switch: feature 9 is about 3 or -3, and says whether 0 to 3 (orange) or 4 to 7 (additive) count."""
    x = _normal(n, 10, generator)
    first = torch.arange(n) < n // 2
    x[:, 9] += torch.where(first, 3.0, -3.0)
    logit = torch.where(first, _sphere(x), _additive(x[:, 4:], 100))
    relevant = torch.where(first[:, None], _marked(x, 0, 1, 2, 3, 9), _marked(x, 4, 5, 6, 7, 9))
    return _from_logit(x, logit, relevant)


def syn(number: int, d: int) -> Callable[[int, torch.Generator], Drawn]:
    """INVASE's Syn1 to Syn6 with d features; from Syn4 on, feature 10 says which rule holds."""

    def draw(n: int, generator: torch.Generator) -> Drawn:
        x = _normal(n, d, generator)
        rules = {
            1: (_product(x), (0, 1)),
            2: (_sphere(x[:, 2:]), (2, 3, 4, 5)),
            3: (_additive(x[:, 6:], 10), (6, 7, 8, 9)),
        }
        if number <= 3:
            logit, features = rules[number]
            return _from_logit(x, logit, _marked(x, *features))
        (low, below), (high, above) = {4: (rules[1], rules[2]), 5: (rules[1], rules[3]), 6: (rules[2], rules[3])}[
            number
        ]
        negative = x[:, 10] < 0
        relevant = torch.where(negative[:, None], _marked(x, *below, 10), _marked(x, *above, 10))
        return _from_logit(x, torch.where(negative, low, high), relevant)

    return draw


L2X: dict[str, tuple[Callable[[int, torch.Generator], Drawn], int]] = {
    "orange": (orange, 4),
    "xor": (xor, 2),
    "additive": (additive, 4),
    "switch": (switch, 5),
}
"""L2X's sets with the number of features that L2X is told to choose."""


def bayes(drawn: Drawn) -> dict[str, float]:
    """Accuracy and cross entropy of the true probabilities against labels drawn from them, in expectation."""
    p = drawn.probability.double()
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    return {"accuracy": torch.maximum(p, 1 - p).mean().item(), "cross_entropy": entropy.mean().item()}
