"""One interface, ``SubsetOperator``, for every differentiable subset selection; the noise that several share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bla.operators.weights import at_least_float32


@dataclasses.dataclass(frozen=True)
class SubsetOperator(ABC):
    r"""Choose a subset of N items by their scores, so that the scores can be trained by the loss on the subset.

    The problem: find scores :math:`a(x)` that make :math:`\mathbb{E}\,L(x, m)` small, where
    :math:`m \in \{0, 1\}^N` is the subset that the scores stand for. ``hard`` is that subset, which has no useful
    gradient; ``soft`` replaces it in training.

    Scores are (..., N), larger is more relevant. A ``mask`` (..., N) is True where there is an item and False where
    there is padding: padding is never selected, has weight exactly 0 and gets no gradient. Results have the scores'
    dtype; half precision is computed in float32 inside. Scores that hold a NaN where there is an item give NaN for
    the whole row. Noise comes from ``generator``, or from torch's global one.

    Memberships are relative to 1, "in the subset", and do not sum to 1: :func:`bla.operators.normalised` turns them
    into weights for a mean over the subset, which for bounded logits are the paper's. Every method raises a ValueError
    if there is no item, the mask is not boolean, or the mask leaves a row without an item.
    """

    def soft(self, scores: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Relaxed memberships >= 0 for training, (..., N): of a straight-through operator, 0 or 1 with a gradient."""
        wide, mask = _prepared(scores, mask)
        return _finished(self._soft(wide, mask, generator), wide, mask, scores.dtype)

    def hard(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Memberships 0 or 1, (..., N), without noise: the subset to use at test time. Never empty."""
        wide, mask = _prepared(scores.detach(), mask)
        return _finished(self._hard(wide, mask).to(wide.dtype), wide, mask, scores.dtype)

    def size(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """How many items :meth:`hard` selects, (...)."""
        return self.hard(scores, mask).sum(dim=-1)

    def expected_size(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """A differentiable stand-in for the size, (...), on which a price can be put."""
        wide, mask = _prepared(scores, mask)
        return self._expected_size(wide, mask).to(scores.dtype)

    # scores: float32 or float64, padding filled with a very low number; mask of the scores' shape. What these methods
    # return at padding does not matter.

    @abstractmethod
    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor: ...

    @abstractmethod
    def _expected_size(self, scores: Tensor, mask: Tensor) -> Tensor: ...


def gumbel_like(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the scores' shape and type: -log(-log U), several times as fast as by exponentials."""
    uniform = torch.empty_like(scores).uniform_(generator=generator).clamp_(min=torch.finfo(scores.dtype).tiny)
    return uniform.log_().neg_().log_().neg_()


def logistic_like(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard logistic noise of the scores' shape and type: log(U / (1 - U)), U at least 1e-7 from 0 and 1."""
    return torch.empty_like(scores).uniform_(generator=generator).logit_(eps=1e-7)


def fixed_size(scores: Tensor, mask: Tensor, k: int) -> Tensor:
    """The expected size (...) of a subset of k items, or of all where there are fewer: a constant with gradient 0."""
    return mask.sum(dim=-1).clamp(max=k) + 0 * torch.where(mask, scores, 0).sum(dim=-1)


def _prepared(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if not scores.ndim or not scores.shape[-1]:
        raise ValueError(f"expected scores of shape (..., N) with at least one item, got {tuple(scores.shape)}")
    wide = at_least_float32(scores)
    if mask is None:
        return wide, torch.ones_like(scores, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a boolean mask, True where there is an item, got {mask.dtype}: mask.bool()")
    mask = mask.expand(scores.shape)
    if not mask.any(dim=-1).all():
        raise ValueError("expected an item in every row, got one that is all padding: leave such rows out")
    # far below any score, and yet finite: differences and products with it stay numbers
    return wide.masked_fill(~mask, torch.finfo(wide.dtype).min / 4), mask


def _finished(memberships: Tensor, scores: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    memberships = memberships.masked_fill(~mask, 0.0)
    return memberships.masked_fill(scores.isnan().any(dim=-1, keepdim=True), torch.nan).to(dtype)
