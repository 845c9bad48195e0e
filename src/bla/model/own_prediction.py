"""The attention that explains a classifier's own prediction: class-conditional, at once or trained on masked photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from bla.model.attention import Judged, JudgedAttention, Selection
from bla.model.evidence import (
    Answers,
    Slopes,
    Sufficiency,
    ask,
    evidence,
    from_all,
    linear_layer,
    slopes_of,
    sufficiency,
)
from bla.model.heads import grid_of, read, reads_maps

HIDDEN = (64, 64, 24)
UNTRAINED, TRAINED = "c - E, untrained", "BLA-PX"
_DROPOUT = 0.3
"""Of the projected channels of the earlier map, without which few photos are learnt by heart."""
PRIOR = 0.7
"""How much the contrast, averaged over 3x3 cells, counts beside what is learnt, in standard deviations of that."""
_UNTRAINED_BOUND = 0.5
"""Untrained, cells are at the bound that lie this many standard deviations above their map's mean."""
_LEAST = 0.5
"""The least size as a share of the mean size: the pixels of one or two cells alone seldom keep a class."""


class _Score(nn.Module):
    """Clues (B, 4, H, W) and channels of an earlier map to u: what is learnt, and a share of the contrast.

    That is averaged over neighbours; ``shares`` are of the contrast as it was in older weights, and of its average.
    """

    shares: Tensor
    bound: Tensor
    least: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, earlier: int, hidden: Sequence[int]) -> None:
        super().__init__()
        if len(hidden) != 3:
            raise ValueError(
                "expected three hidden sizes, the channels of two convolutions and of the projection, such as "
                f"{HIDDEN}; got {tuple(hidden)}"
            )
        first, second, projected = hidden
        self.register_buffer("shares", torch.tensor([0.0, 1.0]))
        self.register_buffer("bound", torch.tensor(-_UNTRAINED_BOUND))
        self.register_buffer("least", torch.tensor(1))
        self.register_buffer("mean", torch.zeros(earlier, 1, 1))
        self.register_buffer("scale", torch.ones(earlier, 1, 1))
        projection = [nn.Conv2d(earlier, projected, 1), nn.ReLU(), nn.Dropout2d(_DROPOUT)] if earlier else []
        self.projection = nn.Sequential(*projection)
        self.correction = nn.Sequential(
            nn.Conv2d(4 + projected * bool(earlier), first, 3, padding=1), nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=1), nn.ReLU(),
            nn.Conv2d(second, 1, 1),
        )  # fmt: skip

    def forward(self, clues: Tensor, earlier: Tensor) -> Tensor:
        contrast = clues[:, :1]
        averaged = contrast  # over two cells a side it would be the same in all
        if min(contrast.shape[2:]) > 2:
            averaged = functional.avg_pool2d(contrast, 3, stride=1, padding=1, count_include_pad=False)
        return self.learnt(clues, earlier) - self.shares[0] * contrast - self.shares[1] * averaged - self.bound

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.setdefault(f"{prefix}least", torch.tensor(1))  # weights of before there was one
        super()._load_from_state_dict(state_dict, prefix, *others)

    def learnt(self, clues: Tensor, earlier: Tensor) -> Tensor:
        """The part of u (B, 1, H, W) that is trained."""
        inputs = torch.cat([clues, self.projection((earlier - self.mean) / self.scale)], dim=1)
        u: Tensor = self.correction(inputs)
        return u


def _slices(values: Tensor) -> Tensor:
    """Maps (B, C, H, W); of volumes (B, C, D, H, W) the slices (B*D, C, H, W), in which neighbours are looked for."""
    return values if values.ndim == 4 else values.movedim(2, 1).flatten(0, 1)


class OwnPredictionAttention(JudgedAttention):
    r"""Bounded logits that explain the prediction of a classifier that stays as it is.

    .. math:: -u_n = a(x)_n + s \, \overline{\text{contrast}}_n, \quad
              x_n = (\text{contrast}_n, \; l_n, \; l_n - l^{(2)}_n, \; \lVert F_n \rVert, \; \text{earlier}_n)

    Each of the first four is standardised over the map's cells; :mod:`bla.model.evidence` defines three of them. The
    earlier map, if the trunk gives one (:mod:`bla.model.earlier`), is projected to few channels. a is two 3x3
    convolutions; untrained it is constant, and the ranking is by the contrast, "c - E", averaged over 3x3 cells: what a
    cell says, its neighbours have seen, too. Trained on the classifier's answers to masked photos
    (:mod:`bla.training.masked`) a is what a cell's *pixels* contribute, and on held-out photos the two together beat
    either.

    The cells at the bound are the selection, after training at least half as many as on average: the pixels of one or
    two cells alone seldom keep a class. Where the head would not give the classifier's class from them, the bound
    moves to the smallest prefix of the ranking from which it does, as it does from every longer one. So a selection
    for the predicted class agrees with the classifier by construction.

    Parameters
    ----------
    in_channels: C, the channels of the map that the trunk gives, the last ``earlier`` of them of an earlier map.
    judge: the classifier's head; None for that of the classifier that is wrapped.
    earlier: see ``in_channels``; the head does not read these.
    hidden: channels of two 3x3 convolutions, and of the projection.
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
    _arguments = ()

    def __init__(
        self,
        in_channels: int,
        judge: nn.Module | None = None,
        *,
        earlier: int = 0,
        hidden: Sequence[int] = HIDDEN,
        agreeing: bool = True,
    ) -> None:
        self.earlier = earlier  # which the score is built by
        super().__init__(in_channels, hidden=hidden)
        self.agreeing = agreeing
        self.judge: nn.Module | None = None
        self._linear: tuple[nn.Linear | None] = (None,)  # in a tuple: it is the judge's already
        self._traced: Slopes | None = None
        if judge is not None:
            self.judged_by(judge)

    def reset_parameters(self) -> None:
        """Start anew: untrained."""
        for layer in self.score.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        for value in self._last_layer():
            nn.init.zeros_(value)
        self._score.shares.copy_(torch.tensor([0.0, 1.0]))
        self._score.bound.fill_(-_UNTRAINED_BOUND)
        self.least.fill_(1)

    def forward(self, features: Tensor, *, size: int | Tensor | None = None, target: Tensor | None = None) -> Selection:
        """Weights for features (B, C, H, W); with ``size`` exactly so many cells; for classes (B,), by default its own.

        Features of another shape and sizes outside of 1..H*W are a ValueError.
        """
        self._check(features)
        said = self._answers(features, target)
        unbounded = self._ranking(features, said)
        if self.training:
            return self.select(unbounded, size)
        enough = sufficiency(self._judge(), features, unbounded, said)
        if isinstance(size, int) or not self.agreeing:
            return self.select(unbounded, size)._replace(target=said.target, judged=Judged(said.logits, None, enough))
        return self._agreed(features, unbounded, said, enough, size)

    @torch.no_grad()
    def move_bound(self, score: float | Tensor) -> None:
        """Subtract ``score`` from every u, and nothing from what is learnt."""
        self._score.bound.add_(score)

    @property
    def least(self) -> Tensor:  # type: ignore[override]
        """A buffer of the score's, so that it is stored with the weights."""
        return self._score.least

    def least_about(self, size: float) -> int:
        """Half of the mean size, which is kept to from now on."""
        self.least.fill_(max(1, round(_LEAST * size)))
        return int(self.least)

    def predicted(self, features: Tensor) -> Tensor:
        """The classes (B,) that the classifier predicts from features (B, C, H, W)."""
        return from_all(self._judge(), features).argmax(-1)

    def freeze(self, features: Tensor) -> None:
        """Make what depends on the judge's code a constant, so that the module can be traced for such features."""
        judge = self._judge()
        if self._linear[0] is None:
            at = features if reads_maps(judge) else features.mean(dim=grid_of(features))
            slopes, target = slopes_of(judge), features.new_zeros(len(features), dtype=torch.long)
            self._traced = make_fx(slopes, tracing_mode="symbolic", _allow_non_fake_inputs=True)(at, target)

    @property
    def post_hoc_setup(self) -> str:  # type: ignore[override]
        """What explanations are signed with."""
        return UNTRAINED if self._score.shares.sum() == 1 else TRAINED

    def _network(self, channels: int, hidden: Sequence[int]) -> nn.Module:
        return _Score(self.earlier, hidden)

    def ranking(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """-u of every cell, (B, H, W), for classes (B,), by default the predicted ones."""
        return self._ranking(features, self._answers(features, target))

    def learnt(self, features: Tensor, target: Tensor) -> Tensor:
        """The part of -u (B, H, W) that is trained, in nats that a cell's pixels contribute; the contrast follows it.

        In training mode the share of the contrast is kept at :data:`PRIOR` standard deviations of this part.
        """
        found = -self._score.learnt(*self._inputs(features, self._answers(features, target)))[:, 0]
        found = found.reshape(-1, *features.shape[2:])
        if self.training:
            spread = found.detach().flatten(1).std(dim=1).mean()
            self._score.shares.copy_(torch.stack([torch.zeros_like(spread), PRIOR * spread]))
        return found

    def _answers(self, features: Tensor, target: Tensor | None) -> Answers:
        return ask(self._judge(), features, self._linear[0], target)

    def _ranking(self, features: Tensor, said: Answers) -> Tensor:
        unbounded: Tensor = -self.score(*self._inputs(features, said))[:, 0]
        return unbounded.reshape(-1, *features.shape[2:]) if features.ndim > 4 else unbounded

    def _inputs(self, features: Tensor, said: Answers) -> tuple[Tensor, Tensor]:
        """The standardised clues, and the channels of the earlier map."""
        own, earlier = features.detach().tensor_split([self.in_channels - self.earlier], dim=1)
        found = evidence(self._judge(), features, said, self._linear[0], self._traced).detach()
        exact = own.flatten(2).to(torch.promote_types(own.dtype, torch.float32))  # half precision would overflow
        norm = (exact * exact).sum(dim=1, keepdim=True).sqrt()  # which ONNX Runtime computes faster than a norm
        clues = torch.cat([found, norm.reshape_as(found[:, :1]).to(found.dtype)], dim=1)
        cells = grid_of(clues)
        clues = clues - clues.mean(dim=cells, keepdim=True)
        clues = clues / (clues.square().mean(dim=cells, keepdim=True).sqrt() + 1e-6)
        return _slices(clues), _slices(earlier)

    @property
    def _score(self) -> _Score:
        assert isinstance(self.score, _Score)
        return self.score

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Standardise the channels of the earlier map by these features (B, C, H, W)."""
        earlier = features[:, self.in_channels - self.earlier :].transpose(0, 1).flatten(1)
        if self.earlier:
            self._score.mean.copy_(earlier.mean(dim=1)[:, None, None])
            self._score.scale.copy_(earlier.std(dim=1)[:, None, None] + 1e-6)

    def judged_by(self, head: nn.Module) -> None:
        """Explain what this head predicts."""
        self.judge, self._linear = head, (linear_layer(head, self.in_channels),)

    def weigh(self, unbounded: Tensor, size: int | Tensor | None = None) -> Selection:
        """The selection by scores -u (B, H, W): of at least :attr:`least` cells at the bound, or at a size.

        In training the bound stays where it is: moved to the best cell, it would stop the gradient of equal ones.
        """
        if size is None and not self.training:
            return self._reaching(unbounded, self.least.expand(len(unbounded)))
        return super().weigh(unbounded, size)

    def _reaching(self, unbounded: Tensor, least: Tensor) -> Selection:
        """The selection at the bound, which moves where so many cells (B,) of a map do not reach it."""
        flat = unbounded.flatten(1)
        places = least.clamp(max=flat.shape[1])[:, None] - 1
        last = flat.sort(dim=1, descending=True).values.gather(1, places)
        selection = super().weigh((flat - last.clamp(max=0)).reshape_as(unbounded))
        return selection._replace(unbounded=unbounded)

    def _agreed(
        self, features: Tensor, unbounded: Tensor, said: Answers, enough: Sufficiency | None, size: Tensor | None
    ) -> Selection:
        """The selection at the bound; where the class is the classifier's own, of enough cells to give it."""
        cells, own = unbounded[0].numel(), said.logits.argmax(-1)
        free = said.target == own
        least = self.least.expand_as(own)
        if enough is not None:
            least = torch.where(free, torch.maximum(enough.sufficient, least), least)
        selection = self._reaching(unbounded, least)
        if size is not None:
            selection, free = self.sized(selection, size), free & (size == 0)
        selected = read(self._linear[0] or self._judge(), features, selection.hard)
        # a rival beyond those that were held against the class, or a head that was not asked: all cells, then
        lost = ((selected.argmax(-1) != own) & free)[:, None]
        each, every = lost.reshape(-1, *[1] * (unbounded.ndim - 1)), 1 / cells
        return Selection(
            unbounded,
            torch.where(each, 0.0, selection.scores),
            torch.where(each, every, selection.soft),
            torch.where(each, every, selection.hard),
            said.target,
            Judged(said.logits, torch.where(lost, said.logits, selected), enough),
        )
