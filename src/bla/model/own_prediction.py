"""The attention that explains a classifier's own prediction: class-conditional, at once or trained on masked photos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bla.model.attention import AttentionError, BoundedLogitAttention, Selection
from bla.model.evidence import Slopes, evidence, from_all, linear_layer, slopes_of, sufficiency
from bla.model.heads import read, reads_maps

UNTRAINED, TRAINED = "c - E, untrained", "BLA-PX"
_UNTRAINED_BOUND = 0.5
"""Untrained, cells are at the bound that lie this many standard deviations above their map's mean."""


class _Score(nn.Module):
    """Four clues (B, 4, H, W) to u: a share of the first one, the contrast, and what two convolutions correct."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.ones(1))
        self.correction = nn.Sequential(
            nn.Conv2d(4, first, 3, padding=1), nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=1), nn.ReLU(),
            nn.Conv2d(second, 1, 1),
        )  # fmt: skip

    def forward(self, clues: Tensor) -> Tensor:
        u: Tensor = self.correction(clues) - self.share * clues[:, :1]
        return u


class OwnPredictionAttention(BoundedLogitAttention):
    r"""Bounded logits that explain the prediction of a classifier that stays as it is.

    .. math:: -u_n = s \, \text{contrast}_n - f(x)_n, \quad
              x_n = (\text{contrast}_n, \; l_n, \; l_n - l^{(2)}_n, \; \lVert F_n \rVert)

    Each input is standardised over the map's cells; :mod:`bla.model.evidence` defines the first three. f is two 3x3
    convolutions; untrained it is constant, and the ranking is by the contrast, "c - E". Training on the classifier's
    answers to masked photos (:mod:`bla.training.masked`) makes it a ranking by what a cell's *pixels* contribute.

    The cells at the bound are the selection; where the head would not give the classifier's class from them, the bound
    moves to the smallest prefix of the ranking from which it does, as it does from every longer one. So a selection
    for the predicted class agrees with the classifier by construction.

    Parameters
    ----------
    in_channels: C, the channels of the feature map.
    judge: the classifier's head; None for that of the classifier that is wrapped.
    hidden: channels of two 3x3 convolutions.
    agreeing: whether the bound moves where the selection would not agree.

    Examples
    --------
    >>> attention = OwnPredictionAttention(16, nn.Linear(16, 5)).eval()
    >>> features = torch.rand(2, 16, 7, 5)
    >>> agreed = attention.judge(attention(features).hard.flatten(1)[:, None] @ features.flatten(2).mT)
    >>> bool((agreed[:, 0].argmax(-1) == attention.predicted(features)).all())
    True
    """

    needs_training = False
    class_conditional = True
    _arguments = ("agreeing",)

    def __init__(
        self,
        in_channels: int,
        judge: nn.Module | None = None,
        *,
        hidden: Sequence[int] = (64, 64),
        agreeing: bool = True,
    ) -> None:
        super().__init__(in_channels, hidden=hidden)
        self.agreeing = agreeing
        self.judge = judge
        self._layer_of: tuple[nn.Module | None, nn.Linear | None] = (None, None)
        self._traced: Slopes | None = None

    def train(self, mode: bool = True) -> OwnPredictionAttention:
        """Set the mode; the judge stays in evaluation."""
        super().train(mode)
        if self.judge is not None:
            self.judge.eval()
        return self

    def reset_parameters(self) -> None:
        """Start anew: untrained."""
        for layer in self.score.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        share, *_, weight, bias = self.score.parameters()
        nn.init.ones_(share)
        nn.init.zeros_(weight)
        nn.init.constant_(bias, _UNTRAINED_BOUND)

    def forward(self, features: Tensor, *, size: int | None = None, target: Tensor | None = None) -> Selection:
        """Weights for features (B, C, H, W); with ``size`` exactly so many cells; for classes (B,), by default its own.

        Features of another shape and sizes outside of 1..H*W are a ValueError.
        """
        self._check(features)
        own = self.predicted(features)
        target = own if target is None else target
        unbounded = self._unbounded(features, target)
        if size is not None or self.training or not self.agreeing:
            return self.weigh(unbounded, size)
        return self._agreed(features, unbounded, target, own)

    def predicted(self, features: Tensor) -> Tensor:
        """The classes (B,) that the classifier predicts from features (B, C, H, W)."""
        return from_all(self._judge(), features.detach()).argmax(-1)

    def freeze(self, features: Tensor) -> None:
        """Make what depends on the judge's code a constant, so that the module can be traced for such features."""
        judge, layer = self._judge(), self._layer()
        if layer is None:
            at = features if reads_maps(judge) else features.mean(dim=(2, 3))
            slopes, target = slopes_of(judge), features.new_zeros(len(features), dtype=torch.long)
            self._traced = make_fx(slopes, tracing_mode="symbolic", _allow_non_fake_inputs=True)(at, target)

    @property
    def post_hoc_setup(self) -> str:  # type: ignore[override]
        """What explanations are signed with."""
        return TRAINED if self._last_layer()[0].any() else UNTRAINED

    def _network(self, channels: int, hidden: Sequence[int]) -> nn.Module:
        return _Score(*hidden)

    def _unbounded(self, features: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        found = evidence(self._judge(), features.detach(), target, self._layer(), self._traced)
        clues = torch.cat([found, torch.linalg.vector_norm(features.detach(), dim=1, keepdim=True)], dim=1)
        clues = clues - clues.mean(dim=(2, 3), keepdim=True)
        clues = clues / (clues.square().mean(dim=(2, 3), keepdim=True).sqrt() + 1e-6)
        unbounded: Tensor = -self.score(clues)[:, 0]
        return unbounded

    def calibrate(self, features: Tensor) -> None:
        """Nothing: its inputs are standardised."""

    def judged_by(self, head: nn.Module) -> None:
        """Explain what this head predicts."""
        self.judge = head

    def _agreed(self, features: Tensor, unbounded: Tensor, target: Tensor, own: Tensor) -> Selection:
        """The selection at the bound; where the class is the classifier's own, of enough cells to give it."""
        flat = unbounded.flatten(1)
        enough = sufficiency(self._judge(), features, unbounded, target, self._layer())
        size = torch.ones_like(target) if enough is None else torch.where(target == own, enough.sufficient, 1)
        least = flat.sort(dim=1, descending=True).values.gather(1, size[:, None] - 1)
        selection = self.weigh((flat - least.clamp(max=0)).reshape_as(unbounded))
        # a rival beyond those that were held against the class, or a head that was not asked: all cells, then
        lost = (read(self._judge(), features, selection.hard).argmax(-1) != own) & (target == own)
        scores, hard = selection.scores, selection.hard
        cells = flat.shape[1]
        return Selection(
            unbounded,
            torch.where(lost[:, None, None], 0.0, scores),
            torch.where(lost[:, None, None], 1 / cells, selection.soft),
            torch.where(lost[:, None, None], 1 / cells, hard),
        )

    def _judge(self) -> nn.Module:
        if self.judge is None:
            raise AttentionError("expected a judge to ask about each cell, got none: pass one, or wrap a classifier")
        return self.judge

    def _layer(self) -> nn.Linear | None:
        """The judge's one linear layer, found when the judge is new."""
        if self._layer_of[0] is not self.judge:
            object.__setattr__(self, "_layer_of", (self.judge, linear_layer(self._judge(), self.in_channels)))
        return self._layer_of[1]
