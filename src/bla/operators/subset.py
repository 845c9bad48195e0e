"""One interface for every differentiable subset selection."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class SubsetOperator(ABC):
    r"""Choose a subset of N items by their scores, so that what chooses can be trained by what the subset is for.

    The problem: find scores :math:`a(x)` that make :math:`\mathbb{E}\,L(x, m)` small, where
    :math:`m \in \{0, 1\}^N` is the subset that the scores stand for. ``hard`` is that subset, which has no useful
    gradient; ``soft`` is what is put in its place in training.

    Scores are (..., N), larger is more relevant. A ``mask`` (..., N) is True where there is an item and False where
    there is padding: padding is never selected, has weight exactly 0 and gets no gradient. Results have the scores'
    dtype; half precision is computed in float32 inside. Scores that hold a NaN where there is an item give NaN for
    the whole row. Noise comes from ``generator``, or from torch's global one.

    Memberships are relative to 1, "in the subset", and do not sum to 1: :func:`normalised` makes weights for a mean
    over the subset, which for bounded logits are the paper's.
    """

    def soft(self, scores: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Relaxed memberships >= 0 for training, (..., N): of a straight-through operator, 0 or 1 with a gradient.

        Raises
        ------
        ValueError
            If there is no item, the mask is not boolean, or the mask leaves a row without an item.
        """
        wide, mask = _prepared(scores, mask)
        return _finished(self._soft(wide, mask, generator), wide, mask, scores.dtype)

    def hard(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Memberships 0 or 1, (..., N), without noise: the subset to use at test time. Never empty.

        Raises
        ------
        ValueError
            As :meth:`soft`.
        """
        wide, mask = _prepared(scores.detach(), mask)
        return _finished(self._hard(wide, mask).to(wide.dtype), wide, mask, scores.dtype)

    def size(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """How many items :meth:`hard` selects, (...)."""
        return self.hard(scores, mask).sum(dim=-1)

    def expected_size(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """A differentiable stand-in for the size, (...): what a price on size is put on.

        Raises
        ------
        ValueError
            As :meth:`soft`.
        """
        wide, mask = _prepared(scores, mask)
        return self._expected_size(wide, mask).to(scores.dtype)

    # scores: float32 or float64, padding filled with the dtype's least number; mask of the scores' shape

    @abstractmethod
    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor: ...

    @abstractmethod
    def _expected_size(self, scores: Tensor, mask: Tensor) -> Tensor: ...


def normalised(memberships: Tensor) -> Tensor:
    """Memberships (..., N) as weights of sum 1; a row without any stays 0.

    >>> normalised(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    tensor([[0.5000, 0.0000, 0.5000],
            [0.0000, 0.0000, 0.0000]])
    """
    total = memberships.sum(dim=-1, keepdim=True)
    return memberships / torch.where(total == 0, 1, total)


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError unless value > 0."""
    if not value > 0:
        raise ValueError(f"expected {name} > 0, got {value}")


def gumbel_like(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the scores' shape and type: -log(-log U), several times as fast as by exponentials."""
    uniform = torch.empty_like(scores).uniform_(generator=generator).clamp_(min=torch.finfo(scores.dtype).tiny)
    return uniform.log_().neg_().log_().neg_()


def logistic_like(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard logistic noise of the scores' shape and type: log(U / (1 - U)), U at least 1e-7 from 0 and 1."""
    return torch.empty_like(scores).uniform_(generator=generator).logit_(eps=1e-7)


def best(scores: Tensor, mask: Tensor, size: int) -> Tensor:
    """True at the ``size`` largest scores of each row, or at all items where there are fewer. First come first."""
    if size > scores.shape[-1]:
        raise ValueError(f"expected a size from 1 to {scores.shape[-1]}, the number of items, got {size}")
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :size]
    return torch.zeros_like(mask).scatter(-1, order, True) & mask


def at_least_one(chosen: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """The subset, or the largest item where it is empty."""
    return torch.where(chosen.any(dim=-1, keepdim=True), chosen, best(scores, mask, 1))


def _prepared(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if not scores.ndim or not scores.shape[-1]:
        raise ValueError(f"expected scores of shape (..., N) with at least one item, got {tuple(scores.shape)}")
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
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
