"""The trainable module on a feature map: a score for every cell, and an operator that turns scores into weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bla import operators

_START_SPREAD = 0.1
"""Of u at the start: chosen on validation splits of birds100's training images among 0.1, 1 and 2."""


class Selection(NamedTuple):
    """What a module says of a feature map; each of shape (B, H, W)."""

    unbounded: Tensor
    """-u: ranks the cells, larger is more relevant."""
    scores: Tensor
    """z: what the operator works on; for bounded logits z <= 0, and 0 at the bound."""
    soft: Tensor
    """The relaxed weights, used in training."""
    hard: Tensor
    """The weights of the subset, zero outside of it, used at test time."""


class BoundedLogitAttention(nn.Module):
    r"""Score every cell, bound the scores above by zero, weight the cells; at test time keep those at the bound.

    .. math:: u = \mathrm{score}(F), \quad z = -\mathrm{relu}(u), \quad g = \mathrm{softmax}(\tau z), \quad
              \text{head reads } \textstyle\sum_n g_n F_n

    Source: arXiv 2105.14824. :func:`bla.operators.bounded_soft` and :func:`bla.operators.bounded_hard` give the
    weights in full.

    Parameters
    ----------
    in_channels: C, the channels of the feature map.
    temperature: tau > 0, multiplies the scores.
    threshold: gamma, taken off the weights (BLA-T); a number >= 0, or ``"auto"`` for 0.98 / N.
    hidden: channels of further 1x1 convolutions (each followed by a ReLU) before the score.
    context: add a vector made from the pooled map to every cell before scoring.
    gate: the sigmoid gate in place of the softmax.

    Notes
    -----
    A start with every cell clipped is dead: no gradient reaches the score. The module starts with small random
    weights (at most 1/C each) and bias 1, so that u > 0, alive, on any map whose mean magnitude is below 1;
    :meth:`calibrate`, which training calls, makes a live start for any features.

    Examples
    --------
    >>> attention = BoundedLogitAttention(1280)
    >>> selection = attention(torch.rand(2, 1280, 7, 5))
    >>> selection.soft.shape, bool((selection.scores <= 0).all())
    (torch.Size([2, 7, 5]), True)
    >>> attention(torch.rand(2, 1280, 7, 5), size=8).hard.count_nonzero(dim=(1, 2))
    tensor([8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        temperature: float = 0.1,
        threshold: float | Literal["auto"] = 0.0,
        hidden: Sequence[int] = (),
        context: bool = False,
        gate: bool = False,
    ) -> None:
        super().__init__()
        _check_positive("temperature", temperature)
        if threshold != "auto" and not (isinstance(threshold, (int, float)) and 0 <= threshold < 1):
            raise ValueError(f"expected threshold 'auto' or a number in [0, 1), got {threshold!r}")
        if gate and threshold:
            raise ValueError(f"expected no threshold with the sigmoid gate, got {threshold}: leave one of them out")
        self.in_channels = in_channels
        self.temperature = temperature
        self.threshold = threshold
        self.gate = gate
        self.score = _score_network(in_channels, hidden)
        self.context = nn.Linear(in_channels, in_channels) if context else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew, with weights from torch's global generator."""
        _restart(self.score, self.context)

    def forward(self, features: Tensor, *, size: int | None = None) -> Selection:
        """Weights for features of shape (B, C, H, W), any grid.

        With ``size`` the bound moves to each map's size-th best cell, and exactly that many are selected.

        Raises
        ------
        ValueError
            If the features are not (B, C, H, W), or ``size`` is not in 1..H*W.
        """
        unbounded = _logits(self.score, self.context, features, self.in_channels)
        if size is None:
            scores = operators.bound(unbounded)
            hard = operators.bounded_hard(scores, gate=self.gate)
        else:
            scores = operators.bound_at_size(unbounded, size)
            hard = operators.top_hard(unbounded, size) * (size if self.gate else 1)
        soft = operators.bounded_soft(scores, temperature=self.temperature, threshold=self.threshold, gate=self.gate)
        return _on_grid(features, unbounded, scores, soft, hard)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Start at these features' own scale (B, C, H, W): u of median 0 and spread 0.1, half the cells at the bound.

        Half of the cells then pass gradients, and the soft weights are nearly those of mean pooling. Meant for a
        first batch, before training. Where features do not differ from cell to cell, every cell starts off the
        bound.

        Raises
        ------
        ValueError
            If the features are not finite.
        """
        last = self.score[-1] if isinstance(self.score, nn.Sequential) else self.score
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        u = -_logits(self.score, self.context, features, self.in_channels).double()
        if not torch.isfinite(u).all():
            raise ValueError("expected finite features, got NaN or infinity: check the classifier and its input")
        middle, spread = u.median(), u.std(correction=0)
        if spread > 1e-6 * u.abs().max():
            if u.max() - middle < 1e-3 * spread:  # most cells alike and no other above: as it is, all would be clipped
                spread = -spread
            last.weight.mul_(_START_SPREAD / spread)
            last.bias.copy_((last.bias - middle) * (_START_SPREAD / spread))
        else:
            last.bias.add_(_START_SPREAD - middle)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"temperature={self.temperature}, threshold={self.threshold!r}, gate={self.gate}"


class L2XAttention(nn.Module):
    r"""The fixed-size rival, L2X-F: learning-to-explain's relaxed subset of ``size`` cells on the feature map.

    .. math:: z = -u, \quad g = \max_{j \le k} \mathrm{softmax}(\tau (z + G^j)), \quad
              \text{hard: } 1/k \text{ on the } k \text{ largest } z

    Source: Chen et al. 2018 (arXiv 1802.07814); arXiv 2105.14824 for its use on features.
    :func:`bla.operators.gumbel_soft` says what ``variant`` means. In evaluation mode the draws are the same at
    every call, for every map.

    Examples
    --------
    >>> selection = L2XAttention(16, size=3)(torch.rand(2, 16, 4, 4))
    >>> selection.hard.count_nonzero(dim=(1, 2))
    tensor([3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        size: int = 8,
        temperature: float = 0.1,
        variant: operators.GumbelVariant = "official",
        hidden: Sequence[int] = (),
        context: bool = False,
    ) -> None:
        super().__init__()
        _check_positive("temperature", temperature)
        _check_positive("size", size)
        if variant not in ("official", "corrected"):
            raise ValueError(f"expected variant 'official' or 'corrected', got {variant!r}")
        self.in_channels = in_channels
        self.size = size
        self.temperature = temperature
        self.variant: operators.GumbelVariant = variant
        self.score = _score_network(in_channels, hidden)
        self.context = nn.Linear(in_channels, in_channels) if context else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew, with weights from torch's global generator."""
        _restart(self.score, self.context)

    def forward(self, features: Tensor, *, size: int | None = None) -> Selection:
        """Weights for features of shape (B, C, H, W); ``size`` replaces the module's own."""
        logits = _logits(self.score, self.context, features, self.in_channels)
        size = min(self.size, logits.shape[-1]) if size is None else size
        generator = None if self.training else torch.Generator(logits.device).manual_seed(0)
        soft = operators.gumbel_soft(
            logits,
            size,
            temperature=self.temperature,
            variant=self.variant,
            generator=generator,
            shared_noise=not self.training,
        )
        return _on_grid(features, logits, logits, soft, operators.top_hard(logits, size))

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"size={self.size}, temperature={self.temperature}, variant={self.variant!r}"


Attention = BoundedLogitAttention | L2XAttention


def signed(setup: str, threshold: float | Literal["auto"], own: float | Literal["auto"]) -> str:
    """What explanations are signed with: a setup, and the threshold where it is not the setup's own.

    >>> signed("BLA-PH", "auto", "auto"), signed("BLA-PH", 0, "auto"), signed("BLA", 0.01, 0)
    ('BLA-PH', 'BLA-PH, no threshold', 'BLA, threshold 0.01')
    """
    if threshold == own:
        return setup
    return f"{setup}, no threshold" if threshold == 0 else f"{setup}, threshold {threshold}"


def weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """What the head reads: sum_n g_n F_n; features (B, C, H, W) and weights (B, H, W) to (B, C).

    >>> weighted_sum(torch.ones(1, 3, 2, 2), torch.full((1, 2, 2), 0.25))
    tensor([[1., 1., 1.]])
    """
    return torch.bmm(features.flatten(2), weights.flatten(1).unsqueeze(-1).to(features.dtype)).squeeze(-1)


def _score_network(in_channels: int, hidden: Sequence[int]) -> nn.Conv2d | nn.Sequential:
    widths = [in_channels, *hidden]
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths):
        layers += [nn.Conv2d(inner, outer, 1), nn.ReLU()]
    score = nn.Conv2d(widths[-1], 1, 1)
    return nn.Sequential(*layers, score) if layers else score


def _restart(score: nn.Conv2d | nn.Sequential, context: nn.Linear | None) -> None:
    layers = [*score] if isinstance(score, nn.Sequential) else [score]
    for layer in [*layers, context]:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.reset_parameters()
    last = layers[-1]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    nn.init.uniform_(last.weight, -1 / last.in_channels, 1 / last.in_channels)
    nn.init.ones_(last.bias)


def _logits(score: nn.Module, context: nn.Linear | None, features: Tensor, in_channels: int) -> Tensor:
    """-u of every cell, flat: (B, H*W)."""
    if features.ndim != 4 or features.shape[1] != in_channels or 0 in features.shape[2:]:
        raise ValueError(
            f"expected features of shape (batch, {in_channels}, height, width), got {tuple(features.shape)}"
        )
    if context is not None:
        features = features + context(features.mean(dim=(2, 3)))[:, :, None, None]
    logits: Tensor = -score(features).flatten(1)
    return logits


def _on_grid(features: Tensor, *flat: Tensor) -> Selection:
    return Selection(*(values.reshape(-1, *features.shape[2:]) for values in flat))


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected {name} > 0, got {value}")
