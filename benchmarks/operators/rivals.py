"""Rivals that are measured but not shipped, on the interface of ``bla.operators``: SIMPLE, perturbed top-k, LapSum."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from bla.operators import straight_through
from bla.operators.fixed import FixedSize
from bla.operators.weights import best, check_size


def log_symmetric(scores: Tensor, k: int) -> Tensor:
    """Logs of the elementary symmetric polynomials of exp(scores): e_j of the first n items, (N + 1, ..., k + 1)."""
    row = torch.zeros_like(scores[..., :1])  # e_0 .. e_j of the items so far, those that are not 0
    rows = [row]
    for n in range(scores.shape[-1]):
        item = row + scores[..., n, None]
        both = row[..., 1:] + functional.softplus(item[..., :-1] - row[..., 1:], threshold=40)
        row = torch.cat([row[..., :1], both, item[..., -1:]], dim=-1)[..., : k + 1]
        rows.append(row)
    return torch.stack([functional.pad(row, (0, k + 1 - row.shape[-1]), value=-1e30) for row in rows])


def marginals(scores: Tensor, k: int) -> Tensor:
    """P(n in S) where P(S) is proportional to exp(sum of S's scores) over subsets of exactly k, differentiable."""
    differentiable = torch.is_grad_enabled() and scores.requires_grad
    with torch.enable_grad():
        leaf = scores if scores.requires_grad else scores.detach().requires_grad_()
        log_partition = log_symmetric(leaf, k)[-1, ..., k]
        (inside,) = torch.autograd.grad(log_partition.sum(), leaf, create_graph=differentiable)
    return inside


@torch.no_grad()
def sampled(scores: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Exact samples of subsets of k, as 0 and 1."""
    table = log_symmetric(scores, k)
    left = torch.full(scores.shape[:-1], k)
    taken = torch.zeros_like(scores)
    for n in reversed(range(scores.shape[-1])):
        without = table[n].gather(-1, (left - 1).clamp(min=0)[..., None])[..., 0]
        whole = table[n + 1].gather(-1, left[..., None])[..., 0]
        probability = torch.exp(scores[..., n] + without - whole)
        take = (torch.rand(probability.shape, generator=generator, dtype=scores.dtype) < probability) & (left > 0)
        taken[..., n] = take.to(scores.dtype)
        left = left - take.long()
    return taken


@dataclasses.dataclass(frozen=True)
class Simple(FixedSize):
    """SIMPLE: an exact sample of k items forward, the exact marginals' gradient backward.

    P(S) is proportional to exp(sum of scores / T) over |S| = k. O(kN), N steps one after the other.
    Source: Ahmed, Zeng, Niepert and Van den Broeck 2023 (arXiv 2210.01941). Without padding here.
    """

    temperature: float = 1.0

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        if not mask.all():
            raise ValueError("expected no padding: this rival is for benchmarks without")
        check_size(self.k, scores.shape[-1])
        scaled = scores / self.temperature
        inside = marginals(scaled, self.k)
        return straight_through(sampled(scaled.detach(), self.k, generator), inside)


@dataclasses.dataclass(frozen=True)
class PerturbedTopK(FixedSize):
    """Perturbed top-k: the mean of top-k over noisy scores; its gradient from the same draws.

    soft = E top_k(a + sigma Z), gradient E[top_k(a + sigma Z) Z^T] / sigma, Z normal. O(draws N log N).
    Source: Cordonnier et al. 2021 (arXiv 2104.03059), after Berthet et al. 2020.
    """

    sigma: float = 0.5
    draws: int = 50

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (self.draws, *scores.shape)
        noise = torch.randn(shape, generator=generator, dtype=scores.dtype).masked_fill(~mask, 0.0)
        chosen = best(scores.detach() + self.sigma * noise, self.k).to(scores.dtype)
        along = (noise * torch.where(mask, scores, 0.0)).sum(dim=-1, keepdim=True)
        # the mean taken off the draws changes no expectation and takes most of the variance away
        centred = chosen - chosen.mean(dim=0)
        gradient = (centred * (along - along.detach())).mean(dim=0) / self.sigma
        return chosen.mean(dim=0) + gradient


@dataclasses.dataclass(frozen=True)
class LapSum(FixedSize):
    """LapSum: soft top-k by Laplace distribution functions that are moved together until they sum to k.

    soft_n = F((a_n - b) / T), b such that they sum to k. The paper solves for b in closed form after a sort; here it
    is bisected, which gives the same b, and the gradient is the implicit one. O(N) a step of 60.
    Source: Struski et al. 2025 (arXiv 2503.06242).
    """

    temperature: float = 0.5

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        check_size(self.k, scores.shape[-1])
        k = (mask.sum(dim=-1, keepdim=True) - 1e-4).clamp(max=self.k).to(scores.dtype)
        fixed = scores.detach()
        real = torch.where(mask, fixed, fixed.amax(dim=-1, keepdim=True))
        low = real.amin(dim=-1, keepdim=True) - 40 * self.temperature
        high = real.amax(dim=-1, keepdim=True) + 40 * self.temperature
        for _ in range(60):
            middle = (low + high) / 2
            above = self._distribution(fixed - middle, mask).sum(dim=-1, keepdim=True) > k
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        level = (low + high) / 2
        apart = torch.where(mask, (fixed - level).abs(), 0)
        density = torch.where(mask, torch.exp(-apart / self.temperature), 0)
        share = density / density.sum(dim=-1, keepdim=True)
        # the level's value, with its gradient: d level / d a_n = density_n / sum of densities
        moved = level + (share * torch.where(mask, scores - fixed, 0)).sum(dim=-1, keepdim=True)
        return self._distribution(scores - moved, mask)

    def _distribution(self, apart: Tensor, mask: Tensor) -> Tensor:
        tail = torch.exp(-torch.where(mask, apart, 0).abs() / self.temperature) / 2
        return torch.where(mask, torch.where(apart > 0, 1 - tail, tail), 0.0)


@dataclasses.dataclass(frozen=True)
class First(FixedSize):
    """No selection: the first k items, always; where these are the relevant ones, what a perfect choice brings."""

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        return self._hard(scores, mask).to(scores.dtype) + 0 * scores

    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor:
        return mask & (mask.cumsum(dim=-1) <= self.k)
