"""Subsets of a fixed size k: learning-to-explain's Gumbel maximum, straight-through and relaxed top-k."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bla.operators.subset import SubsetOperator, fixed_size, gumbel_like
from bla.operators.weights import best, check_positive, check_size, gumbel_soft, straight_through


@dataclasses.dataclass(frozen=True)
class FixedSize(SubsetOperator):
    """The hard subset is the k largest scores, among equal ones the first; of a row with fewer items all."""

    k: int

    def __post_init__(self) -> None:
        check_positive("k", self.k)

    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor:
        return best(scores, self.k)

    def _expected_size(self, scores: Tensor, mask: Tensor) -> Tensor:
        return fixed_size(scores, mask, self.k)


@dataclasses.dataclass(frozen=True)
class GumbelMaximum(FixedSize):
    r"""Learning to explain (L2X): the maximum over k draws of a Gumbel softmax.

    .. math:: \text{soft}_n = \max_{j \le k} \mathrm{softmax}((a + G^j) / T)_n

    O(kN) in time and memory. Draws may coincide, so that fewer than k items are near 1. Source: Chen et al. 2018
    (arXiv 1802.07814), section 3.2. :func:`bla.operators.gumbel_soft` also has the form that multiplies.
    """

    temperature: float = 0.1

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = gumbel_like(scores.detach().expand(self.k, *scores.shape).contiguous(), generator).movedim(0, -2)
        return gumbel_soft(scores, self.k, temperature=self.temperature, variant="corrected", noise=noise)


@dataclasses.dataclass(frozen=True)
class StraightThroughTopK(FixedSize):
    r"""The k largest as 0 and 1, with a softmax's gradient.

    .. math:: m = \mathrm{top}_k(a + \sigma G) + (s - \mathrm{stop}(s)), \qquad s = \mathrm{softmax}((a + \sigma G) / T)

    O(N log N). Source: Bengio et al. 2013 (arXiv 1308.3432); with noise, Jang et al. 2017 (arXiv 1611.01144).
    """

    temperature: float = 1.0
    noise: float = 1.0

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.noise:
            scores = scores + self.noise * gumbel_like(scores, generator)
        chosen = best(scores.detach(), self.k).to(scores.dtype)
        return straight_through(chosen, torch.softmax(scores / self.temperature, dim=-1))


@dataclasses.dataclass(frozen=True)
class RelaxedTopK(FixedSize):
    r"""Reparameterisable subset sampling: k softmaxes in turn, each on what the earlier ones left over.

    .. math:: \alpha^1 = a + \sigma G, \quad p^j = \mathrm{softmax}(\alpha^j / T), \quad
              \alpha^{j+1} = \alpha^j + \log(1 - p^j), \quad \text{soft} = \textstyle\sum_{j \le k} p^j

    Sums to k, or to the number of items if smaller; at high temperatures an item may exceed 1.
    O(kN) in time and memory. Source: Xie and Ermon 2019 (arXiv 1901.10517), after Ploetz and Roth 2018.
    """

    temperature: float = 0.1
    noise: float = 1.0

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        check_size(self.k, scores.shape[-1])
        alpha = scores + self.noise * gumbel_like(scores, generator) if self.noise else scores
        tiny = torch.finfo(scores.dtype).tiny
        total = torch.zeros_like(scores)
        items = mask.sum(dim=-1, keepdim=True)
        for drawn in range(self.k):
            share = torch.softmax(alpha / self.temperature, dim=-1) * (drawn < items)
            total = total + share
            alpha = alpha + torch.log((1 - share).clamp(min=tiny))
        return total
