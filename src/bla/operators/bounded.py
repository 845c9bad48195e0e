"""Bounded logits as a general-purpose subset selection."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from bla.operators import weights
from bla.operators.subset import SubsetOperator, fixed_size, logistic_like


@dataclasses.dataclass(frozen=True)
class BoundedLogits(SubsetOperator):
    r"""The items whose score reaches a bound, however many; the others are weighted by how far below it they lie.

    .. math:: z_n = \min(a_n + \sigma \epsilon_n, 0), \qquad
              \text{soft}_n = e^{\tau (z_n - \max z)}, \qquad \text{hard}_n = 1[a_n \ge 0]

    ``normalised(soft)`` is the paper's :math:`\mathrm{softmax}(\tau z)`, ``normalised(hard)`` its hard weights. Where
    no score reaches 0 the largest one is the subset, with its ties.
    O(N) in time and memory; O(N log N) with the dial. Source: arXiv 2105.14824.

    An item at the bound passes no gradient, so it cannot leave a plain bound again. Two remedies: a price on size
    (:meth:`expected_size`), which does reach clipped items, and ``noise``, which moves items off the bound at times.

    Parameters
    ----------
    temperature: tau > 0, multiplies: the paper's 0.1 suits scores that grow to tens, 1 small networks from scratch.
    k: the size dial. The bound moves to the k-th largest score, so that k items are selected.
    noise: scale of the logistic noise in training: an item is at the bound with probability sigmoid(a / noise).
    straight_through: ``soft`` has the values 0 and 1 of the noisy subset, and the relaxed memberships' gradient.
    threshold: gamma of BLA-T: relu(softmax(tau z) - gamma), relative to the largest. ``"auto"`` is 0.98 / (items).
    gate: 2 sigmoid(tau z) in place of the exponential: each item independently. Takes no threshold.

    >>> BoundedLogits().hard(torch.tensor([[2.0, -1.0, 0.5], [-3.0, -1.0, -2.0]]))
    tensor([[1., 0., 1.],
            [0., 1., 0.]])
    >>> BoundedLogits(k=2).soft(torch.tensor([2.0, 1.0, 0.0]))
    tensor([1.0000, 1.0000, 0.3679])
    """

    temperature: float = 1.0
    k: int | None = None
    noise: float = 0.0
    straight_through: bool = False
    threshold: float | Literal["auto"] = 0.0
    gate: bool = False

    def __post_init__(self) -> None:
        weights.check_positive("temperature", self.temperature)
        if self.k is not None:
            weights.check_positive("k", self.k)
        if self.noise < 0:
            raise ValueError(f"expected noise >= 0, got {self.noise}")
        weights.check_threshold(self.threshold, self.gate)

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.noise:
            scores = torch.where(mask, scores + self.noise * logistic_like(scores, generator), scores)
        items = mask.sum(dim=-1, keepdim=True)
        if self.k is None:
            z = weights.bound(scores)
        else:
            weights.check_size(self.k, scores.shape[-1])
            z = weights.bound_at_size(scores, items.clamp(max=self.k))
        soft = weights.bounded_soft(
            z, temperature=self.temperature, threshold=self.threshold, gate=self.gate, items=items.to(z.dtype)
        )
        relaxed = 2 * soft if self.gate else weights.memberships(soft)
        if not self.straight_through:
            return relaxed
        return weights.straight_through(self._hard(scores, mask).to(scores.dtype), relaxed)

    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor:
        return weights.best(scores, self.k) if self.k else weights.bounded_hard(weights.bound(scores), gate=True)

    def _expected_size(self, scores: Tensor, mask: Tensor) -> Tensor:
        r"""Sum of sigmoid(a / noise), the expected number at the bound; without noise, at noise 1."""
        if self.k is not None:
            return fixed_size(scores, mask, self.k)
        return torch.where(mask, torch.sigmoid(scores / (self.noise or 1.0)), 0.0).sum(dim=-1)
