"""Rival operators with a variable subset size: sparsemax, entmax-1.5 and hard concrete gates."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from bla import needs_extra
from bla.operators.subset import SubsetOperator, logistic_like
from bla.operators.weights import best, check_positive, memberships


@dataclasses.dataclass(frozen=True)
class Sparsemax(SubsetOperator):
    r"""The support of the projection of the scores onto the simplex.

    .. math:: p = \arg\min_{p \in \Delta} \lVert p - \tau a \rVert^2, \qquad
              \text{soft} = p / \max p, \qquad \text{hard} = 1[p > 0]

    ``normalised(soft)`` is p. The larger tau, the smaller the subset. Items outside the support pass no gradient.
    O(N log N), from the ``entmax`` package. Source: Martins and Astudillo 2016 (arXiv 1602.02068).
    """

    temperature: float = 1.0
    _mapping: ClassVar = "sparsemax"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def _weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        with needs_extra("operators"):
            import entmax

        # padding just out of reach of the support, which ends at most 2 / tau under the largest score
        lowered = torch.where(mask, scores, scores.detach().amax(dim=-1, keepdim=True) - 4 / self.temperature)
        lowered = lowered.masked_fill(lowered.isnan().any(dim=-1, keepdim=True), 0.0)  # entmax fails on NaN
        weights: Tensor = getattr(entmax, self._mapping)(self.temperature * lowered, dim=-1)
        return weights

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        return memberships(self._weights(scores, mask))

    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor:
        return self._weights(scores, mask) > 0

    def _expected_size(self, scores: Tensor, mask: Tensor) -> Tensor:
        return self._soft(scores, mask, None).masked_fill(~mask, 0.0).sum(dim=-1)


@dataclasses.dataclass(frozen=True)
class Entmax15(Sparsemax):
    r"""Between softmax and sparsemax: the support of the 1.5-entmax, with smoother edges.

    .. math:: p = \arg\max_{p \in \Delta}\; p^\top \tau a + \tfrac{4}{3} \textstyle\sum_n (p_n - p_n^{1.5})

    Otherwise as :class:`Sparsemax`. Source: Peters, Niculae and Martins 2019 (arXiv 1905.05702).
    """

    _mapping = "entmax15"


@dataclasses.dataclass(frozen=True)
class HardConcrete(SubsetOperator):
    r"""An independent random gate for each item, stretched and clipped.

    .. math:: s = \sigma\bigl((a + L) / \beta\bigr), \quad \text{soft} = \min(1, \max(0, s (\zeta - \gamma) + \gamma)),
              \quad \text{hard} = 1[a \ge 0]

    L is logistic noise, gamma = -0.1, zeta = 1.1. The expected size, the probability of not being 0, is exact:
    sum of sigmoid(a - beta log(-gamma / zeta)). Where hard would be empty, the largest item. O(N).
    Source: Louizos, Welling and Kingma 2018 (arXiv 1712.01312); beta is 2/3 there.
    """

    beta: float = 2 / 3

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        gates = torch.sigmoid((scores + logistic_like(scores, generator)) / self.beta)
        return (1.2 * gates - 0.1).clamp(0, 1)

    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor:
        chosen = scores >= 0
        return torch.where(chosen.any(dim=-1, keepdim=True), chosen, best(scores, 1))

    def _expected_size(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, torch.sigmoid(scores - self.beta * math.log(0.1 / 1.1)), 0.0).sum(dim=-1)
