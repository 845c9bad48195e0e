"""Rivals that we train: softmax attention, L2X-F, and a mask learned on the frozen classifier.

Each is trained on features, by default for as long as a run's module, and judged by the same code as all others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.comparison.methods.method import Method, PooledClassifier
from bla.metrics.fitting import Rows, fit_minibatches
from bla.model.attention import L2XAttention
from bla.model.heads import weighted_sum

Features = Callable[[Rows], Tensor]
"""Row numbers to those rows of the training images' features, (B, C, H, W)."""

Loss = Callable[[Tensor, Tensor], Tensor]
_AREA_PRICE, _VARIATION_PRICE = 0.3, 0.01


def softmax_attention(
    classifier: PooledClassifier, features: Features, labels: Tensor, *, epochs: int = 5, seed: int = 0
) -> Method:
    """Softmax attention pooling (as Ilse et al. 2018, one layer): head(sum_n softmax(u)_n F_n), trained together."""
    head = copy.deepcopy(classifier.head)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        score = nn.Conv2d(features(np.arange(1)).shape[1], 1, 1).to(labels.device)

        def loss(maps: Tensor, targets: Tensor) -> Tensor:
            weights = score(maps).flatten(1).softmax(1).reshape(-1, *maps.shape[2:])
            return functional.cross_entropy(head(weighted_sum(maps, weights)), targets)

        _fit([score, head], loss, features, labels, epochs=epochs, seed=seed)
    note = f"trained with its own head, {epochs} epochs, seed {seed}; ranked by weight"
    maps = torch.no_grad()(lambda batch: score(batch.features.float())[:, 0])
    return Method("softmax-attention", "softmax attention", "own", False, maps, note, head=head)


def l2x(
    classifier: PooledClassifier, features: Features, labels: Tensor, *, size: int = 8, epochs: int = 5, seed: int = 0
) -> Method:
    """L2X-F (Chen et al. 2018; arXiv 2105.14824) with the corrected temperature, trained with its own head."""
    head = copy.deepcopy(classifier.head)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        _, channels, height, width = features(np.arange(1)).shape
        size = min(size, height * width)
        attention = L2XAttention(channels, size=size, variant="corrected").to(labels.device)

        def loss(maps: Tensor, targets: Tensor) -> Tensor:
            soft = attention(maps).soft
            weights = soft / soft.sum(dim=(1, 2), keepdim=True)
            return functional.cross_entropy(head(weighted_sum(maps, weights)), targets)

        _fit([attention, head], loss, features, labels, epochs=epochs, seed=seed)
    note = f"trained for {size} cells with its own head, {epochs} epochs, seed {seed}; corrected temperature"
    maps = torch.no_grad()(lambda batch: attention(batch.features.float()).unbounded)
    return Method("l2x", "L2X-F", "own", False, maps, note, head=head)


def learned_mask(
    classifier: PooledClassifier, features: Features, labels: Tensor, *, epochs: int = 5, seed: int = 0
) -> Method:
    r"""A mask for every class on the frozen classifier, by cross entropy, a price on area and one on variation.

    .. math:: A = \sigma(\mathrm{conv}_{1 \times 1}(F)) \in (0, 1)^{K \times H \times W}

    After L-CAM-Fm (Gkartzonika et al. 2022) and TAME (Ntrougkas et al. 2022; T-TAME, arXiv 2403.04523): a mask learned
    on the frozen classifier, which reads the map multiplied by it; written from the papers, for the last map alone.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        first = features(np.arange(1)).to(labels.device)
        classes = classifier.on_features(first).shape[1]
        score = nn.Conv2d(first.shape[1], classes, 1).to(labels.device)

        def loss(maps: Tensor, targets: Tensor) -> Tensor:
            own = score(maps)[torch.arange(len(maps)), targets].sigmoid()
            variation = own.diff(dim=1).square().mean() + own.diff(dim=2).square().mean()
            error = functional.cross_entropy(classifier.on_features(maps * own[:, None]), targets)
            total: Tensor = error + _AREA_PRICE * own.mean() + _VARIATION_PRICE * variation
            return total

        _fit([score], loss, features, labels, epochs=epochs, seed=seed)
    note = f"class masks on the frozen classifier, {epochs} epochs, seed {seed}, after L-CAM and TAME"
    maps = torch.no_grad()(lambda batch: score(batch.features.float())[torch.arange(len(batch.rows)), batch.targets])
    return Method("learned-mask", "learned mask", "baseline", True, maps, note)


def _fit(modules: list[nn.Module], loss: Loss, features: Features, labels: Tensor, *, epochs: int, seed: int) -> None:
    random = np.random.RandomState(seed)
    fit_minibatches(
        *modules,
        loss=lambda rows: loss(features(rows).to(labels.device), labels[rows]),
        orders=(random.permutation(len(labels)) for _ in range(epochs)),
    )
