"""The trainable module on a feature map: it scores every cell, and an operator turns the scores into weights."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bla import BlaError, operators
from bla.model.evidence import Sufficiency
from bla.model.heads import grid_of, reads_maps
from bla.operators.weights import check_positive, check_threshold, gumbel_noise


class AttentionError(BlaError):
    """An attention that is called without what it needs, or asked about a class that it cannot know."""


_START_SPREAD = 0.1
"""Standard deviation of u at the start: the best of 0.1, 1 and 2 on validation splits of birds100's training images."""


class Judged(NamedTuple):
    """What a judge says beside a selection: ``logits`` (B, K) from all cells, ``selected`` from those selected if it
    was asked, and the sizes that suffice and decide for the class that it predicts, if they are known.
    """

    logits: Tensor
    selected: Tensor | None
    enough: Sufficiency | None


class Selection(NamedTuple):
    """Scores and weights of a feature map's cells, each of shape (B, H, W)."""

    unbounded: Tensor
    """-u: ranks the cells, larger is more relevant."""
    scores: Tensor
    """z: what the operator works on; for bounded logits z <= 0, and 0 at the bound."""
    soft: Tensor
    """The relaxed weights, used in training."""
    hard: Tensor
    """The weights of the subset, zero outside of it, used at test time."""
    target: Tensor | None = None
    """The classes (B,) that it is for; None where it depends on none."""
    judged: Judged | None = None
    """What the classifier's head was asked on the way, where the selection depends on it."""


class Attention(nn.Module):
    """What all kinds share: a score network, ``forward(features, size=, target=)``, and flags that say what they are.

    Attributes
    ----------
    method: the name that explanations carry.
    bounded: the scores have a bound, at which cells are selected; :meth:`move_bound` moves it.
    needs_training: it explains nothing before it is trained.
    class_conditional: the selection depends on a class: ``target``, or the class that the judge predicts.
    gate: the weights are not normalised.
    earlier: how many of the map's last channels the head does not read: :mod:`bla.model.earlier`.
    least: how many cells the bound selects at least.
    post_hoc_setup: what explanations are signed with where the head is the classifier's own.
    score, context: u of every cell, a 1x1 convolution to one channel; a layer on the pooled map, or None.
    """

    method: ClassVar[str]
    bounded: ClassVar[bool] = False
    needs_training: ClassVar[bool] = True
    class_conditional: ClassVar[bool] = False
    _arguments: ClassVar[tuple[str, ...]]
    gate = False
    earlier = 0
    least: int | Tensor = 1
    temperature: float
    post_hoc_setup: str

    def __init__(self, in_channels: int, hidden: Sequence[int], context: bool) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.hidden = tuple(hidden)
        self.score = self._network(in_channels, hidden)
        self.context = nn.Linear(in_channels, in_channels) if context else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew, with weights from torch's global generator."""
        for layer in [*self.score.modules(), self.context]:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.reset_parameters()
        weight, bias = self._last_layer()
        nn.init.uniform_(weight, -1 / weight.shape[1], 1 / weight.shape[1])
        nn.init.ones_(bias)

    def forward(self, features: Tensor, *, size: int | Tensor | None = None, target: Tensor | None = None) -> Selection:
        """Weights for features of shape (B, C, H, W), any grid; with ``size`` exactly the so many best cells.

        ``size`` may be of each map, (B,), with 0 for those that choose their own. A class-conditional attention takes
        class indices (B,) as ``target``, and has the judge's prediction for those below 0 and without any; for others a
        target is an AttentionError. Features of another shape and sizes outside of 1..H*W are a ValueError.
        """
        return self.select(self.ranking(features, target), size)

    def select(self, unbounded: Tensor, size: int | Tensor | None) -> Selection:
        """The selection by scores -u (B, H, W), at a size as :meth:`forward` takes it."""
        return self.sized(self.weigh(unbounded), size) if isinstance(size, Tensor) else self.weigh(unbounded, size)

    @abstractmethod
    def weigh(self, unbounded: Tensor, size: int | Tensor | None = None) -> Selection:
        """The selection by scores -u (B, H, W), at a size (B, 1) for each map if that is a tensor."""

    def sized(self, selection: Selection, size: Tensor) -> Selection:
        """The selection with the cells of maps whose size (B,) is not 0 dialled to it."""
        cells = selection.unbounded[0].numel()
        dialled = self.weigh(selection.unbounded, size.clamp(1, cells)[:, None])
        given = (size > 0).reshape(-1, *[1] * (selection.unbounded.ndim - 1))
        scores, soft, hard = (torch.where(given, *pair) for pair in zip(dialled[1:4], selection[1:4], strict=True))
        return selection._replace(scores=scores, soft=soft, hard=hard)

    def judged_by(self, head: nn.Module) -> None:
        """Let the classifier's head say what the selection is for; a class-agnostic kind has no use for it."""

    def calibrate(self, features: Tensor) -> None:
        """Start at the scale of these features (B, C, H, W); a kind without a bound starts anywhere."""

    def least_about(self, size: float) -> int:
        """``least`` where the bound is set for this mean size."""
        return int(self.least)

    def freeze(self, features: Tensor) -> None:
        """Prepare the module for being traced on such features (B, C, H, W), in evaluation mode."""

    @torch.no_grad()
    def move_bound(self, score: float | Tensor) -> None:
        """Subtract ``score`` from every u: the cells with u <= score are then at the bound."""
        _, bias = self._last_layer()
        bias.sub_(score)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build an attention like this one, by the names of ``Settings``."""
        own = {name: getattr(self, name) for name in self._arguments}
        return own | {"hidden": self.hidden, "context": self.context is not None}

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._arguments)

    def ranking(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """-u of every cell, (B, H, W), larger for what is more relevant."""
        self._check(features)
        if target is not None:
            raise AttentionError("expected no target for a class-agnostic attention, got one: leave it out")
        if self.context is not None:
            context = self.context(features.mean(dim=grid_of(features)))
            features = features + context.reshape(*context.shape, *[1] * (features.ndim - 2))
        return -self._scored(features)

    def _scored(self, values: Tensor) -> Tensor:
        """U of every cell (B, *grid) from a score network of 1x1 convolutions; a volume's slices lie side by side."""
        u: Tensor = self.score(values.flatten(2, -2))[:, 0]
        return u if values.ndim == 4 else u.reshape(-1, *values.shape[2:])

    def _network(self, channels: int, hidden: Sequence[int]) -> nn.Module:
        """From ``channels`` inputs of every cell to u; its last layer is a convolution to one channel."""
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise([channels, *hidden]):
            layers += [nn.Conv2d(inner, outer, 1), nn.ReLU()]
        last = nn.Conv2d([channels, *hidden][-1], 1, 1)
        return nn.Sequential(*layers, last) if layers else last

    def _check(self, features: Tensor) -> None:
        if features.ndim not in (4, 5) or features.shape[1] != self.in_channels or 0 in features.shape[2:]:
            raise ValueError(
                f"expected features of shape (batch, {self.in_channels}, height, width), got {tuple(features.shape)}"
            )

    def _last_layer(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that gives u."""
        *_, weight, bias = self.score.parameters()
        return weight, bias


class BoundedLogitAttention(Attention):
    r"""Score every cell, bound the scores above by zero, weight the cells; at test time keep those at the bound.

    .. math:: u = \mathrm{score}(F), \quad z = -\mathrm{relu}(u), \quad g = \mathrm{softmax}(\tau z), \quad
              \text{head reads } \textstyle\sum_n g_n F_n

    Source: arXiv 2105.14824. :func:`bla.operators.bounded_soft` and :func:`bla.operators.bounded_hard` give the
    weights in full, :func:`bla.operators.bound_at_size` the bound at a given size.

    A start with every cell clipped is dead: no gradient reaches the score. Small random weights (at most 1/C each) and
    bias 1 make u > 0 on any map of mean magnitude below 1; :meth:`calibrate`, which training calls, does for any.

    Parameters
    ----------
    in_channels: C, the channels of the feature map.
    temperature: tau > 0, multiplies the scores.
    threshold: gamma, subtracted from the weights (BLA-T); a number >= 0, or ``"auto"`` for 0.98 / N.
    hidden: channels of further 1x1 convolutions (each followed by a ReLU) before the score.
    context: add a vector made from the pooled map to every cell before scoring.
    gate: the sigmoid gate in place of the softmax.

    >>> attention = BoundedLogitAttention(1280)
    >>> selection = attention(torch.rand(2, 1280, 7, 5))
    >>> selection.soft.shape, bool((selection.scores <= 0).all())
    (torch.Size([2, 7, 5]), True)
    >>> attention(torch.rand(2, 1280, 7, 5), size=8).hard.count_nonzero(dim=(1, 2))
    tensor([8, 8])
    """

    method = "BLA"
    bounded = True
    _arguments: ClassVar[tuple[str, ...]] = ("temperature", "threshold", "gate")

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
        check_positive("temperature", temperature)
        check_threshold(threshold, gate)
        super().__init__(in_channels, hidden, context)
        self.temperature = temperature
        self.threshold = threshold
        self.gate = gate

    def weigh(self, unbounded: Tensor, size: int | Tensor | None = None) -> Selection:
        """The selection by scores -u (B, H, W): at the bound, or with the bound at the size-th best cell."""
        logits = unbounded.flatten(1)
        if size is None:
            scores = operators.bound(logits)
            hard = operators.bounded_hard(scores, gate=self.gate)
        else:
            scores = operators.bound_at_size(logits, size)
            hard = operators.top_hard(logits, size) * (size if self.gate else 1)
        soft = operators.bounded_soft(scores, temperature=self.temperature, threshold=self.threshold, gate=self.gate)
        scores, soft, hard = (values.reshape_as(unbounded) for values in (scores, soft, hard))
        return Selection(unbounded, scores, soft, hard)

    @property
    def post_hoc_setup(self) -> str:  # type: ignore[override]
        """BLA-PH, with what differs from it."""
        return signed("BLA-PH", self.threshold, "auto", class_aware=self.class_conditional)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Start at the scale of these features (B, C, H, W): u of median 0 and spread 0.1, half the cells at the bound.

        Half of the cells then pass gradients, and the soft weights are nearly those of mean pooling. Where features do
        not differ from cell to cell, every cell starts off the bound. Meant for a first batch, before training.
        """
        weight, bias = self._last_layer()
        u = -self(features).unbounded.flatten(1).double()
        if not torch.isfinite(u).all():
            raise ValueError("expected finite features, got NaN or infinity: check the classifier and its input")
        middle, spread = u.median(), u.std(correction=0)
        if spread > 1e-6 * u.abs().max():
            if u.max() - middle < 1e-3 * spread:  # most cells are alike and none lies above: all would be clipped
                spread = -spread
            weight.mul_(_START_SPREAD / spread)
            bias.copy_((bias - middle) * (_START_SPREAD / spread))
        else:
            bias.add_(_START_SPREAD - middle)


class JudgedAttention(BoundedLogitAttention):
    """What class-conditional kinds share: a head, the ``judge``, that is asked about a class and never trained here."""

    class_conditional = True
    judge: nn.Module | None

    def train(self, mode: bool = True) -> JudgedAttention:
        """Set the mode; the judge stays in evaluation."""
        super().train(mode)
        if self.judge is not None:
            self.judge.eval()
        return self

    def _judge(self) -> nn.Module:
        if self.judge is None:
            raise AttentionError("expected a judge to ask about each cell, got none: pass one, or wrap a classifier")
        return self.judge


class ClassAwareAttention(JudgedAttention):
    r"""Class-conditional bounded logit attention: its score reads what a head says at each cell about one class.

    .. math:: l = \mathrm{judge}(F_n), \quad
              x_n = (l_c, \; \log \mathrm{softmax}(l)_c, \; \lVert F_n \rVert), \quad
              u = \mathrm{score}\Bigl(\frac{x - \bar x}{s}\Bigr)

    c is the class to be explained, by default the one that the judge predicts from all cells. The judge is a head that
    reads pooled vectors, called for each cell alone; it is never trained here, and passes no gradient. Each input is
    standardised over the cells of its map, as the judge is surer of its training images. A selection that agrees with
    the judge proves nothing, as the judge helped to make it.

    Parameters
    ----------
    in_channels: C, the channels of the feature map.
    judge: pooled features (B, C) to logits (B, K); None for the classifier's head, or that of training's first stage.
    temperature, threshold, hidden, gate: as of :class:`BoundedLogitAttention`.

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
        super().__init__(3, temperature=temperature, threshold=threshold, hidden=hidden, gate=gate)
        self.in_channels = in_channels
        self.judge = judge

    def judged_by(self, head: nn.Module) -> None:
        """Ask this head, which must read pooled vectors, about each cell; an AttentionError for one that reads maps."""
        if reads_maps(head):
            raise AttentionError(
                "expected a head that reads pooled vectors, to be asked about a cell, got one that reads maps: "
                "train without class_aware"
            )
        self.judge = head

    def forward(self, features: Tensor, *, size: int | Tensor | None = None, target: Tensor | None = None) -> Selection:
        """As of any attention, with the classes that it is for."""
        if target is None:
            target = self.predicted(features)
        elif not self.training:
            target = torch.where(target < 0, self.predicted(features), target)
        return super().forward(features, size=size, target=target)._replace(target=target)

    def predicted(self, features: Tensor) -> Tensor:
        """The classes (B,) that the judge predicts from all cells of features (B, C, H, W)."""
        self._check(features)
        return self._judged(features.mean(dim=grid_of(features))).argmax(-1)

    def ranking(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """-u of every cell, (B, H, W), for classes (B,), by default the predicted ones."""
        self._check(features)
        features = features.detach()
        logits = self._judged(features.flatten(2).mT.flatten(0, 1)).detach()
        logits = logits.reshape(features.shape[0], -1, logits.shape[-1])  # (B, N, K)
        target = self.predicted(features) if target is None else target
        own = logits.gather(-1, target[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(-1)
        clues = torch.stack([own, own - logits.logsumexp(-1), features.flatten(2).norm(dim=1)], dim=1)
        clues = clues - clues.mean(dim=-1, keepdim=True)
        clues = clues / (clues.square().mean(dim=-1, keepdim=True).sqrt() + 1e-6)
        return -self._scored(clues.reshape(*clues.shape[:2], *features.shape[2:]))

    def _judged(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self._judge()(pooled)
        return logits


class L2XAttention(Attention):
    r"""The fixed-size rival, L2X-F: learning-to-explain's relaxed subset of ``size`` cells on the feature map.

    .. math:: z = -u, \quad g = \max_{j \le k} \mathrm{softmax}(\tau (z + G^j)), \quad
              \text{hard: } 1/k \text{ on the } k \text{ largest } z

    Source: Chen et al. 2018 (arXiv 1802.07814); arXiv 2105.14824 for its use on features.
    :func:`bla.operators.gumbel_soft` says what ``variant`` means. In evaluation mode the draws are the same at
    every call, for every map.

    >>> selection = L2XAttention(16, size=3)(torch.rand(2, 16, 4, 4))
    >>> selection.hard.count_nonzero(dim=(1, 2))
    tensor([3, 3])
    """

    method = "L2X"
    post_hoc_setup = "L2X-F"
    _arguments = ("size", "temperature", "variant")
    draws: Tensor | None

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
        check_positive("temperature", temperature)
        check_positive("size", size)
        if variant not in ("official", "corrected"):
            raise ValueError(f"expected variant 'official' or 'corrected', got {variant!r}")
        super().__init__(in_channels, hidden, context)
        self.size = size
        self.temperature = temperature
        self.variant: operators.GumbelVariant = variant
        self.register_buffer("draws", None, persistent=False)

    def weigh(self, unbounded: Tensor, size: int | Tensor | None = None) -> Selection:
        """The selection by scores -u (B, H, W): the ``size`` best cells, by default the module's own size."""
        logits = unbounded.flatten(1)
        size = min(self.size, logits.shape[-1]) if size is None else int(size)
        soft = operators.gumbel_soft(
            logits,
            size,
            temperature=self.temperature,
            variant=self.variant,
            generator=None if self.training else torch.Generator(logits.device).manual_seed(0),
            shared_noise=not self.training,
            noise=self.draws,
        )
        hard = operators.top_hard(logits, size)
        return Selection(unbounded, unbounded, soft.reshape_as(unbounded), hard.reshape_as(unbounded))

    def freeze(self, features: Tensor) -> None:
        """Make the draws of evaluation mode a constant for such maps."""
        cells = features[0, 0].numel()
        shape = (1, min(self.size, cells), cells)
        self.draws = gumbel_noise(shape, torch.empty(0), torch.Generator().manual_seed(0))


def signed(
    setup: str, threshold: float | Literal["auto"], own: float | Literal["auto"], *, class_aware: bool = False
) -> str:
    """What explanations are signed with: a setup, what the score reads, and a threshold other than the setup's.

    >>> signed("BLA-PH", "auto", "auto"), signed("BLA-PH", 0, "auto"), signed("BLA", 0.01, 0)
    ('BLA-PH', 'BLA-PH, no threshold', 'BLA, threshold 0.01')
    """
    parts = [setup, *(["class-aware"] if class_aware else [])]
    if threshold != own:
        parts.append("no threshold" if threshold == 0 else f"threshold {threshold}")
    return ", ".join(parts)
