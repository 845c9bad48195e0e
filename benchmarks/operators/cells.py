"""Cells of an image's cached feature map: accuracy from k of them, by operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.data.image_sets import ImageSet, image_folder
from bla.model.attention import BoundedLogitAttention
from bla.model.backbones import LITE0, load_backbone
from bla.model.classifier import explainable
from bla.model.preprocessing import transform_of
from bla.operators import SubsetOperator, normalised
from bla.progress import Progress
from bla.training.cache import FeatureCache, cached_features

Split = tuple[FeatureCache, npt.NDArray[np.int64]]


def features(folder: str, report: Progress) -> list[Split]:
    """Train and test features with labels, from the user's cache, built there where they are missing."""
    model = load_backbone(LITE0)
    classifier = explainable(
        model, transform=transform_of(model, "squash"), attention=BoundedLogitAttention
    )  # as in the paper
    found = image_folder(folder)
    return [(cached_features(classifier, one, report=report), labels_of(one)) for one in (found.train, found.test)]


def labels_of(images: ImageSet) -> npt.NDArray[np.int64]:
    """Of a labelled folder."""
    if images.labels is None:
        raise SystemExit(f"expected class folders in {images.root}, got unlabelled images")
    return images.labels


def trained_cells(
    operators: list[SubsetOperator], train: Split, test: Split, seed: int, *, scale: float, report: Progress
) -> list[dict[str, Any]]:
    """A head on mean-pooled features, then one score a cell and the head together; as bla trains, 5 epochs each.

    The first head is the same for all operators; then every operator has its own, and all see the same batches.
    15% of the training photos are put aside to choose a temperature on.
    """
    cache, labels = train
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))[: max(int(len(labels) * min(1, scale)), 32)]
    held_out, rows_of = np.split(shuffled, [int(0.15 * len(shuffled))])
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    stack = _Stack(operators, cache.features.shape[-1], int(labels.max()) + 1, generator)
    epochs = max(round(5 * scale), 1)
    for stage in (0, 1):
        parameters = stack.begin(stage)
        optimiser = torch.optim.Adam(parameters, 1e-3, fused=True)
        for epoch in range(epochs):
            order = rng.permutation(rows_of)
            for start in range(0, len(order), 32):
                rows = np.sort(order[start : start + 32])
                target = torch.from_numpy(labels[rows]).long()
                logits = stack.soft(cache.batch(rows).flatten(2).mT) if stage else stack.mean(cache.pooled_batch(rows))
                loss = functional.cross_entropy(logits.flatten(0, 1), target.repeat(len(logits)), reduction="none")
                optimiser.zero_grad()
                (loss.sum() / len(target)).backward()
                optimiser.step()
            report(f"{len(operators)} operators, seed {seed}", stage * epochs + epoch + 1, 2 * epochs)
    validation, on_test = stack.right(cache, labels, np.sort(held_out)), stack.right(*test, np.arange(len(test[1])))
    return [
        {"validation": float(v), "top1": float(top1), "size": float(size)}
        for (v, top1), size in zip(np.stack([validation[0], on_test[0]], axis=1), on_test[1], strict=True)
    ]


class _Stack:
    """Scores and heads of all operators: weights (B, S, N) of cells (B, N, C) give logits (S, B, K)."""

    def __init__(self, operators: list[SubsetOperator], channels: int, classes: int, generator: torch.Generator):
        self.operators, self.generator = operators, generator
        self.score = torch.empty(channels, 1).uniform_(-1 / channels, 1 / channels, generator=generator)
        head = nn.Linear(channels, classes)
        self.head, self.bias = head.weight.detach().mT[None].clone(), head.bias.detach()[None, None].clone()

    def begin(self, stage: int) -> list[Tensor]:
        """What is trained: one head, then a score and a head an operator."""
        if stage:
            count = len(self.operators)
            self.score = self.score.repeat(1, count).requires_grad_()
            self.head = self.head.detach().repeat(count, 1, 1).requires_grad_()
            self.bias = self.bias.detach().repeat(count, 1, 1).requires_grad_()
            return [self.score, self.head, self.bias]
        return [self.head.requires_grad_(), self.bias.requires_grad_()]

    def mean(self, pooled: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, functional.dropout(pooled, 0.2)[None], self.head)

    def soft(self, cells: Tensor) -> Tensor:
        """Logits in training."""
        scores = (cells @ self.score).mT
        weights = [one.soft(scores[:, index], None, self.generator) for index, one in enumerate(self.operators)]
        return self._read(cells, weights, 0.2)

    def _read(self, cells: Tensor, memberships: list[Tensor], dropout: float) -> Tensor:
        pooled = normalised(torch.stack(memberships, dim=1)) @ cells
        return torch.baddbmm(self.bias, functional.dropout(pooled, dropout).transpose(0, 1), self.head)

    @torch.no_grad()
    def right(self, cache: FeatureCache, labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Any:
        """Top-1 accuracy and mean size of each operator's hard subset, (S,) each."""
        total, size = torch.zeros(len(self.operators)), torch.zeros(len(self.operators))
        for start in range(0, len(rows), 64):
            some = rows[start : start + 64]
            cells = cache.batch(some).flatten(2).mT
            scores = (cells @ self.score).mT
            hard = [one.hard(scores[:, index]) for index, one in enumerate(self.operators)]
            best = self._read(cells, hard, 0.0).argmax(dim=-1)
            total += (best == torch.from_numpy(labels[some])).sum(dim=1)
            size += torch.stack([one.sum() for one in hard])
        return total.numpy() / len(rows), size.numpy() / len(rows)
