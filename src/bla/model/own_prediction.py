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


class OwnPredictionAttention(BoundedLogitAttention):
    r"""Bounded logits that explain the prediction of a classifier that stays as it is.

    .. math:: u = \mathrm{score}(x) - \bar{x}_0, \quad
              x_n = (\text{contrast}_n, l_n, l_n - l^{(2)}_n, \lVert F_n \rVert, \text{earlier}_n)

    The first four inputs are standardised over the map's cells (:mod:`bla.model.evidence`); ``earlier`` are channels of
    a map nearer to the pixels, where the trunk gives one. Untrained the score is constant: the ranking is by the
    contrast, "c - E". Training on the classifier's answers to masked photos (:mod:`bla.training.masked`) makes it a
    ranking by what a cell's *pixels* contribute.

    The cells at the bound are the selection; where the head would not give the classifier's class from them, the bound
    moves to the smallest prefix of the ranking from which it does, and does from every longer one. So a selection
    for the predicted class agrees with the classifier by construction.

    Parameters
    ----------
    in_channels: C, of the map that the trunk gives, the last ``earlier`` of which are the earlier map's.
    judge: the classifier's head; None for that of the classifier that is wrapped.
    earlier: channels that the score alone reads.
    hidden: channels of two 3x3 convolutions, and of the projection of the earlier map.
    agreeing: whether the bound moves where the selection would not agree.

    Examples
    --------
    >>> attention = OwnPredictionAttention(16, nn.Linear(16, 5))
    >>> features = torch.rand(2, 16, 7, 5)
    >>> selection = attention(features)
    >>> attention(features, target=torch.tensor([4, 0])).unbounded.shape
    torch.Size([2, 7, 5])
    """

    needs_training = False
    class_conditional = True
    earlier_mean: Tensor
    earlier_scale: Tensor
    _arguments = ("earlier", "agreeing")

    def __init__(
        self,
        in_channels: int,
        judge: nn.Module | None = None,
        *,
        earlier: int = 0,
        hidden: Sequence[int] = (64, 64, 24),
        agreeing: bool = True,
    ) -> None:
        first, second, projected = hidden
        nn.Module.__init__(self)
        self.in_channels, self.earlier, self.hidden, self.agreeing = in_channels, earlier, tuple(hidden), agreeing
        self.temperature, self.threshold = 0.1, 0.0
        self.context = None
        self.register_buffer("earlier_mean", torch.zeros(earlier))
        self.register_buffer("earlier_scale", torch.ones(earlier))
        self.projection = nn.Conv2d(earlier, projected, 1) if earlier else None
        self.score = nn.Sequential(
            nn.Conv2d(4 + (projected if earlier else 0), first, 3, padding=1), nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=1), nn.ReLU(),
            nn.Conv2d(second, 1, 1),
        )  # fmt: skip
        self.judge = judge
        self._layer_of: tuple[nn.Module | None, nn.Linear | None] = (None, None)
        self._traced: Slopes | None = None
        self.reset_parameters()

    def train(self, mode: bool = True) -> OwnPredictionAttention:
        """Set the mode; the judge stays in evaluation."""
        super().train(mode)
        if self.judge is not None:
            self.judge.eval()
        return self

    def reset_parameters(self) -> None:
        """Start anew: untrained."""
        for layer in [*self.score.children(), self.projection]:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        weight, bias = self._last_layer()
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

    def _unbounded(self, features: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        found = evidence(self._judge(), features.detach(), target, self._layer(), self._traced)
        own, earlier = features.tensor_split([self.in_channels - self.earlier], dim=1)
        clues = _standardised(torch.cat([found, torch.linalg.vector_norm(own, dim=1, keepdim=True)], dim=1))
        inputs = [clues]
        if self.projection is not None:
            scaled = (earlier - self.earlier_mean[:, None, None]) / self.earlier_scale[:, None, None]
            inputs.append(torch.relu(self.projection(scaled)))
        unbounded: Tensor = clues[:, 0] - self.score(torch.cat(inputs, dim=1))[:, 0]
        return unbounded

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


def _standardised(maps: Tensor) -> Tensor:
    """Maps (B, R, H, W), each of mean 0 and standard deviation 1 over its cells."""
    maps = maps - maps.mean(dim=(2, 3), keepdim=True)
    return maps / (maps.square().mean(dim=(2, 3), keepdim=True).sqrt() + 1e-6)
