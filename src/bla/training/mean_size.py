"""A mean size that is asked for: where the bound has to be, and who judges the images that it is set on."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.metrics.fitting import Rows, fit_minibatches
from bla.training.networks import Examples, Networks
from bla.training.settings import Settings

JUDGES = 5
"""Heads that judge images which they were not trained on, each a share of them."""


def bound_of_mean_size(scores: Tensor, size: float) -> tuple[float, float]:
    r"""The score t that the bound has to be at for a mean size, and the mean size that it gives.

    .. math:: \tfrac1B \sum_b \max(1, |\{n : u_{bn} \le t\}|)

    comes nearest to ``size``; a map with no cell at the bound has its best one selected. Scores u: (B, N). t lies
    between two scores, so that no rounding moves a cell over it.

    >>> bound_of_mean_size(torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 4.0]]), 2)
    (3.5, 2.0)
    """
    flat = scores.flatten().sort().values
    low, high = 0, len(flat) - 1

    def reached(place: int) -> float:
        return float((scores <= flat[place]).sum(dim=1).clamp(min=1).double().mean())

    while low < high:  # the first place whose mean size is enough
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= size else (middle + 1, high)
    if low and size - reached(low - 1) < reached(low) - size:
        low -= 1
    above = flat[flat > flat[low]]
    score = (flat[low] + above[0]) / 2 if len(above) else flat[low] + 1
    return float(score), reached(low)


def trained_judge(networks: Networks, settings: Settings, examples: Examples, fold: int) -> nn.Module:
    """A head trained on some of the images as the first stage trains the baseline, from fresh weights.

    Its randomness is a function of the seed and the fold alone.
    """
    assert examples.labels is not None
    labels = examples.labels
    judge = copy.deepcopy(networks.baseline)
    torch.manual_seed(int(np.random.RandomState([settings.seed, 7, fold]).randint(2**31)))
    for module in judge.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def loss(rows: Rows) -> Tensor:
        logits = judge(networks.pooled(examples, examples.rows[rows], "head"))
        return functional.cross_entropy(logits, torch.from_numpy(labels[rows]).to(networks.device))

    fit_minibatches(
        judge,
        loss=loss,
        orders=(
            np.random.RandomState([settings.seed, 8, fold, epoch]).permutation(len(examples))
            for epoch in range(settings.head_epochs or settings.epochs)
        ),
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
    )
    return judge
