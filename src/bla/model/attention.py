"""The trainable module on a feature map: a score for every cell, and an operator that turns scores into weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bla import BlaError, operators


class AttentionError(BlaError):
    """A module that is used without what it needs."""


_START_SPREAD = 0.1
"""Of u at the start: chosen on validation splits of birds100's training images among 0.1, 1 and 2."""

_CLUES = 3
"""Inputs a cell of the class-aware score."""


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
        return self._selection(features, _logits(self.score, self.context, features, self.in_channels), size)

    def _selection(self, features: Tensor, unbounded: Tensor, size: int | None) -> Selection:
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
        last = _last(self.score)
        assert last.bias is not None
        u = -self(features).unbounded.flatten(1).double()
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

    @torch.no_grad()
    def move_bound(self, score: float | Tensor) -> None:
        """Take ``score`` off every u: the cells with u <= score are then at the bound."""
        bias = _last(self.score).bias
        assert bias is not None
        bias.sub_(score)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"temperature={self.temperature}, threshold={self.threshold!r}, gate={self.gate}"


class ClassAwareAttention(BoundedLogitAttention):
    r"""Bounded logit attention whose score reads what a head says at each cell about one class.

    .. math:: l = \mathrm{judge}(F_n), \quad
              x_n = (l_c, \; \log \mathrm{softmax}(l)_c, \; \lVert F_n \rVert), \quad
              u = \mathrm{score}\Bigl(\frac{x - \bar x}{s}\Bigr)

    c is the class to be explained; where none is given, the one that the judge predicts from all cells. The judge is
    a head that reads pooled vectors, called for each cell by itself; it is never trained here, and passes no
    gradient. Each input is standardised over the cells of its map, so that what counts is how cells differ, not how
    sure the judge is: it is surer of images that it was trained on, which would then get other sizes.

    That a selection made with the judge's help agrees with the judge proves nothing: it knew the answer. The cells
    are still all that the head reads. What counts is an evaluator of its own, what is left out, and the object.

    Parameters
    ----------
    in_channels: C, the channels of the feature map.
    judge: pooled features (B, C) to logits (B, K). :func:`bla.explainable` puts the classifier's head here, and
        training the head of its first stage, where it is None.
    hidden: channels of 1x1 convolutions (each followed by a ReLU) before the score.
    temperature, threshold, gate: as of :class:`BoundedLogitAttention`.

    Examples
    --------
    >>> attention = ClassAwareAttention(16, nn.Linear(16, 5))
    >>> features = torch.rand(2, 16, 7, 7)
    >>> attention(features, size=3).hard.count_nonzero(dim=(1, 2))
    tensor([3, 3])
    >>> other = attention(features, target=torch.tensor([4, 0]))
    """

    def __init__(
        self,
        in_channels: int,
        judge: nn.Module | None = None,
        *,
        temperature: float = 0.1,
        threshold: float | Literal["auto"] = 0.0,
        hidden: Sequence[int] = (64,),
        gate: bool = False,
    ) -> None:
        super().__init__(_CLUES, temperature=temperature, threshold=threshold, hidden=hidden, gate=gate)
        self.in_channels = in_channels
        self.judge = judge

    def train(self, mode: bool = True) -> ClassAwareAttention:
        """Set the mode; the judge stays in evaluation."""
        super().train(mode)
        if self.judge is not None:
            self.judge.eval()
        return self

    def forward(self, features: Tensor, *, size: int | None = None, target: Tensor | None = None) -> Selection:
        """Weights for features (B, C, H, W) and class indices (B,), as of :class:`BoundedLogitAttention`.

        Raises
        ------
        ValueError
            If the features are not (B, C, H, W), ``size`` is not in 1..H*W, or there is no judge.
        """
        return self._selection(features, -self.score(self._clues(features, target)).flatten(1), size)

    def predicted(self, features: Tensor) -> Tensor:
        """The classes (B,) that the judge predicts from all cells of features (B, C, H, W)."""
        _check_features(features, self.in_channels)
        classes: Tensor = self._judged()(features.mean(dim=(2, 3))).argmax(-1)
        return classes

    def _judged(self) -> nn.Module:
        if self.judge is None:
            raise AttentionError("expected a judge to ask about each cell, got none: pass one, or wrap a classifier")
        return self.judge

    def _clues(self, features: Tensor, target: Tensor | None) -> Tensor:
        """The three inputs, standardised, (B, 3, H, W)."""
        _check_features(features, self.in_channels)
        features = features.detach()
        cells = features.permute(0, 2, 3, 1).flatten(0, 2)
        logits = self._judged()(cells).detach()
        logits = logits.reshape(features.shape[0], -1, logits.shape[-1])  # (B, N, K)
        target = self.predicted(features) if target is None else target
        own = logits.gather(-1, target[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(-1)
        clues = torch.stack([own, own - logits.logsumexp(-1), features.flatten(2).norm(dim=1)], dim=1)
        clues = clues - clues.mean(dim=-1, keepdim=True)
        clues = clues / (clues.square().mean(dim=-1, keepdim=True).sqrt() + 1e-6)
        return clues.reshape(features.shape[0], _CLUES, *features.shape[2:])


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


def signed(
    setup: str, threshold: float | Literal["auto"], own: float | Literal["auto"], *, class_aware: bool = False
) -> str:
    """What explanations are signed with: a setup, what the score reads, and a threshold that is not the setup's own.

    >>> signed("BLA-PH", "auto", "auto"), signed("BLA-PH", 0, "auto"), signed("BLA", 0.01, 0)
    ('BLA-PH', 'BLA-PH, no threshold', 'BLA, threshold 0.01')
    >>> signed("BLA", 0, 0, class_aware=True)
    'BLA, class-aware'
    """
    parts = [setup, *(["class-aware"] if class_aware else [])]
    if threshold != own:
        parts.append("no threshold" if threshold == 0 else f"threshold {threshold}")
    return ", ".join(parts)


def weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """What the head reads: sum_n g_n F_n; features (B, C, H, W) and weights (B, H, W) to (B, C).

    >>> weighted_sum(torch.ones(1, 3, 2, 2), torch.full((1, 2, 2), 0.25))
    tensor([[1., 1., 1.]])
    """
    return torch.bmm(features.flatten(2), weights.flatten(1).unsqueeze(-1).to(features.dtype)).squeeze(-1)


def kept(weights: Tensor) -> Tensor:
    """What is kept of each cell, in [0, 1]: the weights (B, H, W) over the largest of each map.

    Uniform weights keep all, a hard selection keeps the selected and nothing else.

    >>> kept(torch.tensor([[[0.25, 0.25, 0.0, 0.125]]]))
    tensor([[[1.0000, 1.0000, 0.0000, 0.5000]]])
    """
    return weights / weights.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


class MapHead(nn.Module):
    """A head that reads a map of which cells are kept or left out, where no pooled vector holds what it needs.

    ``forward(features, keep=None)``: features (B, C, H, W) and ``keep`` (B, H, W) in [0, 1] to logits (B, K). Of a
    cell with 0 nothing is read; None keeps all.
    """


def zeroed(features: Tensor, keep: Tensor | None) -> Tensor:
    """Each cell of features (B, C, H, W) times what is kept of it (B, H, W)."""
    return features if keep is None else features * keep[:, None].to(features.dtype)


def read(head: nn.Module, features: Tensor, weights: Tensor) -> Tensor:
    """Logits (B, K) that a head gives for features (B, C, H, W) under weights (B, H, W).

    >>> read(nn.Identity(), torch.ones(1, 3, 2, 2), torch.full((1, 2, 2), 0.25))
    tensor([[1., 1., 1.]])
    """
    logits: Tensor = (
        head(features, kept(weights)) if isinstance(head, MapHead) else head(weighted_sum(features, weights))
    )
    return logits


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
    last = _last(score)
    assert last.bias is not None
    nn.init.uniform_(last.weight, -1 / last.in_channels, 1 / last.in_channels)
    nn.init.ones_(last.bias)


def _last(score: nn.Module) -> nn.Conv2d:
    last = score[-1] if isinstance(score, nn.Sequential) else score
    assert isinstance(last, nn.Conv2d)
    return last


def _logits(score: nn.Module, context: nn.Linear | None, features: Tensor, in_channels: int) -> Tensor:
    """-u of every cell, flat: (B, H*W)."""
    _check_features(features, in_channels)
    if context is not None:
        features = features + context(features.mean(dim=(2, 3)))[:, :, None, None]
    logits: Tensor = -score(features).flatten(1)
    return logits


def _check_features(features: Tensor, in_channels: int) -> None:
    if features.ndim != 4 or features.shape[1] != in_channels or 0 in features.shape[2:]:
        raise ValueError(
            f"expected features of shape (batch, {in_channels}, height, width), got {tuple(features.shape)}"
        )


def _on_grid(features: Tensor, *flat: Tensor) -> Selection:
    return Selection(*(values.reshape(-1, *features.shape[2:]) for values in flat))


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected {name} > 0, got {value}")
