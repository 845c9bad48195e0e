"""The stages of a training: what each one trains, for how many epochs, and the logits that it learns from."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla import operators
from bla.metrics import decided
from bla.model.heads import read
from bla.model.own_prediction import OwnPredictionAttention
from bla.training.checkpoint import Position
from bla.training.mean_size import SizeControl
from bla.training.networks import Examples, Networks, StageName
from bla.training.settings import Settings

Outputs = tuple[Tensor, Tensor, Tensor | None]
"""The loss, summed over the images; the number of images with a cell off the bound, which passes gradients, or all if
nothing is bounded; and the module's scores (B, H, W)."""

REMOVED = 0.5
"""The weight of masks that remove few cells beside those that keep few; on held-out photos .3 and .5 beat 1."""
ALIKE = 0.05
"""The variance of answers, in squared nats, below which a photo has little to teach."""


class Stage(nn.Module):
    """A stage that trains a head on mean-pooled features: the baseline, or its continuation, the fair control."""

    size_control: SizeControl | None = None

    def __init__(self, name: StageName, networks: Networks, settings: Settings, epochs: int) -> None:
        super().__init__()
        self.name, self.networks, self.settings, self.epochs = name, networks, settings, epochs

    @property
    def trained(self) -> tuple[nn.Module, ...]:
        """The modules that this stage trains: the head, and its trunk if that is fine-tuned."""
        return self.networks.of_stage(self.name)

    def begin(self, train: Examples) -> None:
        """Set the weights that training starts from."""
        self.networks.begin(self.name)

    def to_train(self) -> None:
        """Turn on dropout and gradients in what is trained, and nowhere else."""
        self.networks.eval().requires_grad_(False)
        for module in self.trained:
            module.train().requires_grad_(True)

    @torch.no_grad()
    def targets(self, examples: Examples) -> Tensor:
        """Class indices (B,), or several labels (B, K): the data's, or the classifier's own predictions.

        The predicted class and not its probabilities: those are matched best by selecting every cell.
        """
        if self.settings.head.targets == "labels":
            assert examples.labels is not None
            return torch.from_numpy(examples.labels).to(self.networks.device)
        logits: Tensor = self.networks.baseline(self.networks.pooled(examples, "head"))
        return decided(logits, self.networks.task)

    def done(self, position: Position, steps: int) -> float:
        """The share of the stage that lies behind a position in an epoch of so many steps."""
        return (position.epoch * steps + position.step) / (self.epochs * steps)

    def pace(self, done: float) -> float:
        """The share of the learning rate after a share of the stage."""
        return 1.0

    def used(self, examples: Examples) -> Tensor:
        """Logits (B, K), as they will be used."""
        logits: Tensor = self.trained[0](self.networks.pooled(examples, self.name))
        return logits

    def forward(self, examples: Examples, position: Position, steps: int) -> Outputs:
        """The loss of a batch, at a position in an epoch of so many steps."""
        loss = summed_loss(self.used(examples), self.targets(examples))
        return loss, loss.new_tensor(len(examples)), None


class ModuleStage(Stage):
    """The stage that trains the module, and the head that reads its selection unless that is frozen."""

    @property
    def trained(self) -> tuple[nn.Module, ...]:
        """The module without its judge, the head unless it is frozen, and the trunk if that is fine-tuned."""
        nets = self.networks
        learning = (child for name, child in nets.attention.named_children() if name != "judge")
        return (*learning, *(() if self.settings.frozen_head else nets.of_stage("module")))

    def begin(self, train: Examples) -> None:
        """Start the head from the baseline, and the bound where some cells of some images are off it."""
        super().begin(train)
        if self.networks.attention.bounded:
            some = train.subset(np.sort(np.random.RandomState([self.settings.seed, 1]).permutation(len(train))[:256]))
            self.networks.attention.calibrate(self.networks.features(some))
            if self.size_control is not None:
                self.size_control.set_bound(self.size_control.scores(some))

    def to_train(self) -> None:
        """Turn on draws in the module, too."""
        super().to_train()
        self.networks.attention.train()

    def used(self, examples: Examples) -> Tensor:
        """Logits (B, K) from the hard selection."""
        features = self.networks.features(examples)
        return read(self.networks.head, features, self.networks.attention(features).hard)

    def forward(self, examples: Examples, position: Position, steps: int) -> Outputs:
        """The loss of a batch: from the soft selection, and a share of it from the hard one, straight through."""
        nets, share = self.networks, self.settings.selection.straight_through
        done = self.done(position, steps)
        features, final = nets.features(examples), nets.attention.temperature
        nets.attention.temperature = self.settings.temperature_at(done)
        selection = nets.attention(features, size=self._dialled(features[0, 0].numel(), position))
        nets.attention.temperature = final
        through = operators.straight_through(selection.hard, selection.soft)
        targets = self.targets(examples)
        losses = [
            part * summed_loss(read(nets.head, features, weights), targets)
            for part, weights in ((1 - share, selection.soft), (share, through))
            if part
        ]
        loss = torch.stack(losses).sum()
        off = (selection.unbounded < 0).flatten(1).any(1).sum().to(loss)
        return loss, off if nets.attention.bounded else loss.new_tensor(len(examples)), selection.unbounded

    def _dialled(self, cells: int, position: Position) -> int | None:
        """The size to train this batch at, or None for the module's own bound."""
        dial = self.settings.selection.dial
        if not dial:
            return None
        draws = np.random.RandomState([self.settings.seed, 4, position.stage, position.epoch, position.step])
        return 1 + draws.randint(max(cells // 2, 1)) if draws.random_sample() < dial else None


class PixelStage(ModuleStage):
    r"""The stage that trains a score on the classifier's answers to masked photos: its ranking becomes one by pixels.

    .. math:: \log p_c(\text{photo under } M) \approx b + s_{|M|} + \sum_{n \in M} a_n,

    where a is what the module learns of each cell and s what the number of kept cells alone explains; b is fitted for
    each photo, apart for masks that keep at most half of the cells and for the others. :func:`masked_loss` gives the
    error. The learning rate falls to 0 along a cosine.
    """

    @property
    def trained(self) -> tuple[nn.Module, ...]:
        """The module's score."""
        return (self.networks.attention.score,)

    def pace(self, done: float) -> float:
        """A cosine's."""
        return (1 + math.cos(math.pi * done)) / 2

    def forward(self, examples: Examples, position: Position, steps: int) -> Outputs:
        """The loss of a batch, at a position in an epoch of so many steps; at random all photos are mirrored."""
        nets, features, answers = self.networks, self.networks.features(examples), examples.answers
        assert answers is not None
        masks, said = (values.to(nets.device) for values in answers.batch(examples.rows))
        targets = torch.from_numpy(answers.targets[examples.rows]).to(nets.device)
        if torch.rand(()) < 0.5:
            features, masks = features.flip(-1), masks.flip(-1)
        assert isinstance(nets.attention, OwnPredictionAttention)
        contributions = nets.attention.learnt(features, targets)
        expected = answers.by_size.to(said)[masks.flatten(2).sum(dim=2)]
        loss = masked_loss(contributions, masks, answers.told(said) - expected)
        with torch.no_grad():
            unbounded = nets.attention.ranking(features, targets)
        return loss, torch.full_like(loss, len(unbounded)), unbounded  # no bound stands before what is learnt


def masked_loss(ranking: Tensor, masks: Tensor, answers: Tensor) -> Tensor:
    r"""The squared error of sums over kept cells, :math:`\sum_{n \in M} a_n`, summed over the photos of a batch.

    Rankings a (B, H, W), masks (B, M, H, W), answers (B, M). Masks that keep at most half of the cells count in full,
    the others by :data:`REMOVED`. In each of the two groups a photo's errors are taken from their mean and divided by
    the variance of its answers, so that a photo that every mask answers alike counts less.

    >>> masks = torch.tensor([[[[1, 0, 0, 0]], [[0, 1, 0, 0]]]]).bool()
    >>> float(masked_loss(torch.tensor([[[2.0, 1.0, 0.0, 0.0]]]), masks, torch.tensor([[-1.0, -2.0]])))
    0.0
    """
    kept = masks.flatten(2).to(ranking.dtype)
    few = 2 * kept.sum(dim=2) <= kept.shape[2]
    predicted = torch.bmm(kept, ranking.flatten(1)[..., None])[..., 0]
    loss = predicted.new_zeros(())
    for group, weight in ((few, 1.0), (~few, REMOVED)):
        count = group.sum(dim=1, keepdim=True).clamp(min=1)
        told, error = (
            torch.where(group, values - torch.where(group, values, 0).sum(dim=1, keepdim=True) / count, 0)
            for values in (answers, predicted - answers)
        )
        variance = told.square().sum(dim=1, keepdim=True) / count
        loss = loss + weight * (error.square() / count / (variance + ALIKE)).sum()
    return loss


def stages_of(networks: Networks, settings: Settings, size_control: SizeControl | None) -> list[Stage]:
    """The stages in their order; an own head is not trained, so there the module's is the only one."""
    epochs = settings.stages.epochs
    kind = PixelStage if settings.setup == "bla-px" else ModuleStage
    module = kind("module", networks, settings, epochs)
    module.size_control = size_control
    if networks.own_head:
        return [module]
    head = Stage("head", networks, settings, settings.stages.head_epochs or epochs)
    return [head, module, Stage("continued", networks, settings, epochs)]


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, summed over the images; of several labels binary, and their mean."""
    if targets.ndim == 1:
        return functional.cross_entropy(logits, targets, reduction="sum")
    each = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    return each.mean(dim=1).sum()
