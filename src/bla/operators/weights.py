"""Scores to weights: every formula of bounded logits, and of the fixed-size rival, as a function of tensors.

Every function works on the last dimension, the N items of a row (the cells of one map), and takes logits ``a`` of shape
(..., N), larger being more relevant. In the paper's signs ``a = -u`` for the score ``u`` that the network gives.
Weights have the logits' dtype; half precision is computed in float32 inside. A row that holds a NaN gives NaN weights
throughout, so that nothing computed from it can pass for a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

GumbelVariant = Literal["official", "corrected"]

AUTO_THRESHOLD_MASS = 0.98
"""The paper's threshold for N items is 0.98 / N: just under the weight of an item among N equal ones."""


def bound(logits: Tensor) -> Tensor:
    r"""Bound the logits above by zero: :math:`z_n = -\mathrm{relu}(-a_n) = \min(a_n, 0)`.

    Items with :math:`a_n \ge 0` are at the bound: they tie at 0 and pass no gradient.
    Source: arXiv 2105.14824, the beta activation.

    >>> bound(torch.tensor([2.0, 0.0, -3.0]))
    tensor([ 0.,  0., -3.])
    """
    return 0.0 - torch.relu(-logits)  # 0 - x, not -x: the bound is +0.0


def bound_at_size(logits: Tensor, size: int | Tensor) -> Tensor:
    r"""Move the bound to the ``size`` largest logits: :math:`z_n = \min(a_n - t, 0)`, t the size-th largest.

    The size dial: exactly the items with :math:`a_n \ge t` are at the bound, ``size`` of them unless logits tie. A
    number outside 1..N is a ValueError; a tensor (..., 1), a size for each row, is not checked.

    >>> bound_at_size(torch.tensor([2.0, 0.0, -3.0]), 2)
    tensor([ 0.,  0., -3.])
    >>> bound_at_size(torch.tensor([2.0, 0.0, -3.0]), 1)
    tensor([ 0., -2., -5.])
    """
    least = _kth_largest(logits, size)
    return torch.where(logits >= least, 0.0, logits - least)  # not bound(logits - least): inf - inf is no number


def best(logits: Tensor, size: int | Tensor) -> Tensor:
    """True at exactly ``size`` items of each row: the largest logits; among equal ones the first.

    >>> best(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2)
    tensor([False,  True,  True, False])
    """
    least = _kth_largest(logits, size)
    above, tied = logits > least, logits == least
    return above | (tied & (tied.cumsum(dim=-1) <= size - above.sum(dim=-1, keepdim=True)))


def bounded_soft(
    scores: Tensor,
    *,
    temperature: float = 0.1,
    threshold: float | Literal["auto"] = 0.0,
    gate: bool = False,
    items: int | Tensor | None = None,
) -> Tensor:
    r"""The relaxed selection that training uses.

    .. math:: g = \mathrm{relu}(\mathrm{softmax}(\tau z) - \gamma), \qquad
              \text{or, gated, } g = \sigma(\tau z)

    Parameters
    ----------
    scores: bounded scores z <= 0, (..., N).
    temperature: tau, which multiplies. The smaller, the flatter.
    threshold: gamma, subtracted from every weight; the weights are not normalised again. ``"auto"`` is 0.98 / N.
    gate: the sigmoid gate, which weights each item independently: 1/2 at the bound, not normalised. Takes no threshold.
    items: the N of the automatic threshold where some places hold padding: a number, or (..., 1), one for each row.

    Source: arXiv 2105.14824, BLA and BLA-T; the gate is an option of the authors' code.

    >>> bounded_soft(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    >>> bounded_soft(torch.zeros(4), threshold="auto")
    tensor([0.0050, 0.0050, 0.0050, 0.0050])
    """
    check_threshold(threshold, gate)
    wide = at_least_float32(scores)
    if gate:
        broken = wide.isnan().any(dim=-1, keepdim=True)  # a softmax spreads a NaN over its row, a sigmoid does not
        return torch.sigmoid(temperature * wide).masked_fill(broken, torch.nan).to(scores.dtype)
    weights = torch.softmax(temperature * wide, dim=-1)
    if threshold == "auto":
        weights = torch.relu(weights - AUTO_THRESHOLD_MASS / (scores.shape[-1] if items is None else items))
    elif threshold:
        weights = torch.relu(weights - threshold)
    return weights.to(scores.dtype)


def bounded_hard(scores: Tensor, *, gate: bool = False) -> Tensor:
    r"""The subset that is used at test time: :math:`1/m` on the m items where z equals its maximum, else 0.

    Those are the items at the bound; where none reaches it, the largest one (with its ties). With the gate each
    selected item has weight 1, as nothing is normalised there. Source: arXiv 2105.14824.

    >>> bounded_hard(torch.tensor([[0.0, -1.0, 0.0, -9.0], [-2.0, -1.0, -3.0, -9.0]]))
    tensor([[0.5000, 0.0000, 0.5000, 0.0000],
            [0.0000, 1.0000, 0.0000, 0.0000]])
    """
    chosen = (scores == scores.amax(dim=-1, keepdim=True)).to(at_least_float32(scores).dtype)
    count = chosen.sum(dim=-1, keepdim=True)
    # 0 / 0 where a NaN left nothing equal to the maximum: NaN, for the gate as well
    return (chosen * (count / count) if gate else chosen / count).to(scores.dtype)


def top_hard(logits: Tensor, size: int | Tensor) -> Tensor:
    """Exactly ``size`` items: 1/size on the largest logits, else 0. Ties go to the item that comes first.

    >>> top_hard(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2)
    tensor([0.0000, 0.5000, 0.5000, 0.0000])
    """
    weights = best(logits, size).to(logits.dtype) / size
    return weights.masked_fill(logits.isnan().any(dim=-1, keepdim=True), torch.nan).to(logits.dtype)


def gumbel_soft(
    logits: Tensor,
    size: int,
    *,
    temperature: float = 0.1,
    variant: GumbelVariant = "official",
    generator: torch.Generator | None = None,
    shared_noise: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    r"""L2X's relaxed subset of fixed size: the maximum over ``size`` draws of a Gumbel softmax.

    .. math:: g_n = \max_{j \le k} \mathrm{softmax}(\tau (a + G^j))_n \;(\text{official}), \qquad
              \max_{j \le k} \mathrm{softmax}((a + G^j) / \tau)_n \;(\text{corrected})

    The ``official`` form multiplies by the temperature, as the bounded-logit authors' code does, which makes the
    draws nearly uniform; the ``corrected`` form divides, as learning-to-explain does, which makes them nearly
    one-hot. The weights are not normalised: their sum lies between 1 and ``size``.

    Parameters
    ----------
    size: k, the number of draws; outside 1..N it is a ValueError.
    generator: draws the noise; by default torch's global one.
    shared_noise: all rows of a batch get the same draws, so that a row's weights do not depend on its place in it.
    noise: Gumbel noise G (..., size, N), used in place of fresh draws.

    Source: Chen et al. 2018 (arXiv 1802.07814), section 3.2.
    """
    check_size(size, logits.shape[-1])
    if variant not in ("official", "corrected"):
        raise ValueError(f"expected variant 'official' or 'corrected', got {variant!r}")
    wide = at_least_float32(logits)
    if noise is None:
        batch = (1,) * (wide.ndim - 1) if shared_noise else wide.shape[:-1]
        noise = gumbel_noise((*batch, size, wide.shape[-1]), wide, generator)
    scale = temperature if variant == "official" else 1 / temperature
    return torch.softmax(scale * (wide.unsqueeze(-2) + noise), dim=-1).amax(dim=-2).to(logits.dtype)


def gumbel_noise(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise: -log of exponential noise."""
    return like.new_empty(shape).exponential_(generator=generator).log_().neg_()


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    r"""The hard weights' values with the soft weights' gradient: :math:`g = h + (s - \mathrm{stop}(s))`.

    What is trained is then what is used. Source: Bengio et al. 2013 (arXiv 1308.3432).

    >>> logits = torch.tensor([1.0, 0.0], requires_grad=True)
    >>> weights = straight_through(top_hard(logits, 1), logits.softmax(-1))
    >>> weights.tolist(), bool(torch.autograd.grad(weights[0], logits)[0].any())
    ([1.0, 0.0], True)
    """
    return hard.detach() + (soft - soft.detach())


def normalised(memberships: Tensor) -> Tensor:
    """Memberships (..., N) as weights of sum 1; a row of zeros stays.

    >>> normalised(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    tensor([[0.5000, 0.0000, 0.5000],
            [0.0000, 0.0000, 0.0000]])
    """
    return _over(memberships, memberships.sum(dim=-1, keepdim=True))


def memberships(weights: Tensor) -> Tensor:
    """Weights (..., N) as memberships in [0, 1], relative to the row's largest; a row of zeros stays.

    >>> memberships(torch.tensor([0.25, 0.25, 0.0, 0.125]))
    tensor([1.0000, 1.0000, 0.0000, 0.5000])
    """
    return _over(weights, weights.amax(dim=-1, keepdim=True))


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError unless value > 0."""
    if not value > 0:
        raise ValueError(f"expected {name} > 0, got {value}")


def check_threshold(threshold: float | Literal["auto"], gate: bool) -> None:
    """Raise a ValueError unless the threshold is "auto" or a number in [0, 1), and 0 beside the sigmoid gate."""
    if threshold != "auto" and not (isinstance(threshold, (int, float)) and 0 <= threshold < 1):
        raise ValueError(f"expected threshold 'auto' or a number in [0, 1), got {threshold!r}")
    if gate and threshold:
        raise ValueError(f"expected no threshold with the sigmoid gate, got {threshold}: leave one of them out")


def check_size(size: int, items: int) -> None:
    """Raise a ValueError unless there are at least so many items."""
    if not 1 <= size <= items:
        raise ValueError(f"expected a size from 1 to {items}, the number of items, got {size}")


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened to float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _kth_largest(logits: Tensor, size: int | Tensor) -> Tensor:
    """The size-th largest of each row, (..., 1)."""
    descending = logits.sort(dim=-1, descending=True).values
    if isinstance(size, Tensor):
        return descending.gather(-1, size - 1)
    check_size(size, logits.shape[-1])
    return descending[..., size - 1 : size]


def _over(values: Tensor, whole: Tensor) -> Tensor:
    return values / torch.where(whole == 0, 1, whole)
