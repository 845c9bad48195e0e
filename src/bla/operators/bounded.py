"""Bounded logits as a general-purpose subset selection."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from bla.operators.subset import SubsetOperator, best, check_positive, logistic_like
from bla.operators.weights import AUTO_THRESHOLD_MASS, bound, straight_through


@dataclasses.dataclass(frozen=True)
class BoundedLogits(SubsetOperator):
    r"""The items whose score reaches a bound, as many as there are; those below it by how far below.

    .. math:: z_n = \min(a_n + \sigma \epsilon_n, 0), \qquad
              \text{soft}_n = e^{\tau (z_n - \max z)}, \qquad \text{hard}_n = 1[a_n \ge 0]

    ``normalised(soft)`` is the paper's :math:`\mathrm{softmax}(\tau z)`, ``normalised(hard)`` its hard weights. Where
    no score reaches 0 the largest one is the subset, with its ties.
    O(N) in time and memory; one topk more with the dial. Source: arXiv 2105.14824.

    An item at the bound passes no gradient. That is what makes its weight equal to its neighbours', and it is also
    why a plain bound cannot be left again: a price on size (:meth:`expected_size`), which does reach clipped items,
    and ``noise``, which lets each item be off the bound now and then, are there for that.

    Parameters
    ----------
    temperature: tau > 0, multiplies. The paper has 0.1, for scores that grow to tens; for networks trained from
        scratch on a few features 1 is better.
    k: the size dial. The bound moves to the k-th largest score, so that k items are selected.
    noise: scale of the logistic noise on the scores in training, 0 for none. An item is then at the bound with
        probability sigmoid(a / noise).
    straight_through: ``soft`` has the values 0 and 1 of the noisy subset, and the relaxed memberships' gradient.
    threshold: gamma of BLA-T: relu(softmax(tau z) - gamma), relative to the largest. ``"auto"`` is 0.98 / (items).
    gate: 2 sigmoid(tau z) in place of the exponential: each item by itself. Takes no threshold.

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
        """Refuse settings that mean nothing."""
        check_positive("temperature", self.temperature)
        if self.k is not None:
            check_positive("k", self.k)
        if self.noise < 0:
            raise ValueError(f"expected noise >= 0, got {self.noise}")
        if self.threshold != "auto" and not (isinstance(self.threshold, (int, float)) and 0 <= self.threshold < 1):
            raise ValueError(f"expected threshold 'auto' or a number in [0, 1), got {self.threshold!r}")
        if self.gate and self.threshold:
            raise ValueError(f"expected no threshold with the gate, got {self.threshold}: leave one of them out")

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.noise:
            scores = torch.where(mask, scores + self.noise * logistic_like(scores, generator), scores)
        z = self._bounded(scores, mask)
        if self.gate:
            relaxed = 2 * torch.sigmoid(self.temperature * z)
        else:
            relaxed = torch.exp(self.temperature * (z - z.amax(dim=-1, keepdim=True)))
        if self.threshold:
            items = mask.sum(dim=-1, keepdim=True).to(relaxed.dtype)  # an integer would make gamma a float32
            gamma = AUTO_THRESHOLD_MASS / items if self.threshold == "auto" else self.threshold
            relaxed = torch.where(mask, relaxed, 0.0)
            # softmax - gamma, over the largest weight 1 / total: the largest may itself be under a large gamma
            relaxed = torch.relu(relaxed - gamma * relaxed.sum(dim=-1, keepdim=True))
            largest = relaxed.amax(dim=-1, keepdim=True)
            relaxed = relaxed / torch.where(largest == 0, 1, largest)
        return (
            straight_through(self._hard(scores, mask).to(scores.dtype), relaxed) if self.straight_through else relaxed
        )

    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor:
        if self.k is not None:
            return best(scores, mask, self.k)
        return mask & (scores >= scores.amax(dim=-1, keepdim=True).clamp(max=0))

    def _bounded(self, scores: Tensor, mask: Tensor) -> Tensor:
        if self.k is None:
            return bound(scores)
        if self.k > scores.shape[-1]:
            raise ValueError(f"expected k from 1 to {scores.shape[-1]}, the number of items, got {self.k}")
        # of a row with fewer than k items the last one takes the place of the k-th
        least = scores.topk(self.k, dim=-1).values
        last = torch.minimum(mask.sum(dim=-1, keepdim=True), torch.tensor(self.k, device=scores.device)) - 1
        return bound(scores - least.gather(-1, last))

    def _expected_size(self, scores: Tensor, mask: Tensor) -> Tensor:
        r"""Sum of sigmoid(a / noise), the expected number at the bound; without noise, at noise 1."""
        if self.k is not None:
            return mask.sum(dim=-1).clamp(max=self.k) + 0 * torch.where(mask, scores, 0).sum(dim=-1)
        return torch.where(mask, torch.sigmoid(scores / (self.noise or 1.0)), 0.0).sum(dim=-1)
