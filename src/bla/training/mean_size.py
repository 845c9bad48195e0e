"""The control of the mean size: where the bound must lie, and on which images, judged by whom, it is set."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.metrics.fitting import Rows, fit_minibatches
from bla.training.networks import Examples, Networks
from bla.training.settings import Settings, TrainingError

JUDGES = 5
"""Heads that judge images which they were not trained on, each a fifth of them."""

FOLLOWING = 0.2
"""How far the bound moves, at every step, towards where the batch has the mean size."""

SIZED_ON = 10_000
"""The bound is set on at most this many images at the end of an epoch."""


def bound_of_mean_size(scores: Tensor, size: float, least: int = 1) -> tuple[float, float]:
    r"""The score t at which the bound gives a mean size, and the mean size that it gives.

    .. math:: \tfrac1B \sum_b \max(\text{least}, |\{n : u_{bn} \le t\}|)

    comes nearest to ``size``, where the ``least`` best cells of a map are selected whatever their scores. Scores u:
    (B, N). t lies between two scores, so that no rounding moves a cell over it.
    """
    flat = scores.flatten().sort().values
    others = scores.sort(dim=1).values[:, least:].flatten().sort().values
    reached = (least * len(scores) + torch.searchsorted(others, flat, right=True)).double() / len(scores)
    place = min(int(torch.searchsorted(reached, size)), len(flat) - 1)  # the first one of enough cells
    if place and size - reached[place - 1] < reached[place] - size:
        place -= 1
    above = flat[flat > flat[place]]
    score = (flat[place] + above[0]) / 2 if len(above) else flat[place] + 1
    return float(score), float(reached[place])


def trained_judge(networks: Networks, settings: Settings, examples: Examples, fold: int) -> nn.Module:
    """A head trained on some of the images as the baseline is, from fresh weights; random by seed and fold alone."""
    assert examples.labels is not None
    labels, stages = examples.labels, settings.stages
    judge = copy.deepcopy(networks.baseline)
    torch.manual_seed(int(np.random.RandomState([settings.seed, 7, fold]).randint(2**31)))
    for module in judge.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def loss(rows: Rows) -> Tensor:
        logits = judge(networks.pooled(examples.subset(rows), "head"))
        return functional.cross_entropy(logits, torch.from_numpy(labels[rows]).to(networks.device))

    epochs = range(stages.head_epochs or stages.epochs)
    orders = (np.random.RandomState([settings.seed, 8, fold, epoch]).permutation(len(examples)) for epoch in epochs)
    fit_minibatches(judge, loss=loss, orders=orders, batch_size=stages.batch_size, learning_rate=stages.learning_rate)
    return judge


class SizeControl:
    """Keeps a module's mean size during training, and meets it exactly at the end of every epoch.

    It is met on the validation images, else on the training images. The baseline is surer of the latter than of other
    images, and a class-conditional score reads how its logits vary over a map: so in the last epoch each fifth of the
    training images is judged by a head trained as the baseline was, on the other four.
    """

    def __init__(self, networks: Networks, settings: Settings, train: Examples, validation: Examples | None) -> None:
        self.networks, self.attention, self.settings = networks, networks.attention, settings
        self.train, self.validation = train, validation
        # a trunk that is trained too, or streamed features, would have to run again for every judge
        self.judged_unseen = (
            settings.selection.class_aware and train.cache.at_hand and not networks.own_head and validation is None
        )
        # the images on which the size is met
        self.met_on = "validation" if validation else "training, judged unseen" if self.judged_unseen else "training"

    def follow(self, unbounded: Tensor) -> None:
        """Move the bound a little towards where this batch would have the mean size."""
        self.attention.move_bound(FOLLOWING * self._bound(-unbounded.flatten(1))[0])

    def meet(self, *, last: bool) -> float:
        """Set the bound at the end of an epoch; returns the mean size that it gives."""
        unseen = last and self.judged_unseen
        return self.set_bound(self._scores_judged_unseen() if unseen else self.scores(self.validation or self.train))

    def set_bound(self, scores: Tensor) -> float:
        """Set the bound by the scores of some images; returns the mean size that it gives."""
        score, reached = self._bound(scores)
        self.attention.move_bound(score)
        return reached

    def _bound(self, scores: Tensor) -> tuple[float, float]:
        size, cells = self.settings.selection.mean_size, scores.shape[1]
        assert size is not None
        if size > cells:
            raise TrainingError(f"expected a mean_size of at most {cells}, the cells of a map, got {size}")
        size = size if size >= 1 else max(1.0, size * cells)
        return bound_of_mean_size(scores, size, self.attention.least_about(size))

    @torch.no_grad()
    def scores(self, examples: Examples) -> Tensor:
        """U of these images' cells, (B, N); of a random part of the images if there are too many."""
        order = np.random.RandomState([self.settings.seed, 5]).permutation(len(examples))
        parts = examples.subset(np.sort(order[:SIZED_ON])).batches()
        return torch.cat([-self.attention.ranking(self.networks.features(part)).flatten(1) for part in parts])

    def _scores_judged_unseen(self) -> Tensor:
        fold_of = np.random.RandomState([self.settings.seed, 6]).permutation(len(self.train)) % JUDGES
        scores = []
        try:
            for fold in range(min(JUDGES, len(self.train))):
                others = self.train.subset(np.flatnonzero(fold_of != fold))
                self.attention.judge = trained_judge(self.networks, self.settings, others, fold)
                scores.append(self.scores(self.train.subset(np.flatnonzero(fold_of == fold))))
        finally:
            self.attention.judge = self.networks.baseline
        return torch.cat(scores)
