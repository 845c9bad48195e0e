"""Cells of an image's cached feature map: accuracy from k of them, by operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from bla.backbones import LITE0, load_backbone
from bla.cache import FeatureCache, cached_features
from bla.classifier import explainable
from bla.data import image_folder
from bla.operators import SubsetOperator, normalised

Progress = Callable[[str, int, int], None]
Split = tuple[FeatureCache, npt.NDArray[np.int64]]


def features(folder: str, report: Progress) -> list[Split]:
    """Train and test features with labels, from the user's cache, built there where they are missing."""
    classifier = explainable(load_backbone(LITE0))
    splits = [image_folder(Path(folder) / part) for part in ("train", "test")]
    return [(cached_features(classifier, one, report=report), one.labels) for one in splits]  # type: ignore[misc]


def trained_cells(
    operator: SubsetOperator, train: Split, test: Split, seed: int, *, scale: float, report: Progress
) -> dict[str, Any]:
    """A head on mean-pooled features, then one score a cell and the head together; as bla trains, 5 epochs each."""
    torch.manual_seed(seed)
    cache, labels = train
    channels = cache.features.shape[-1]
    score, head = nn.Linear(channels, 1), nn.Linear(channels, int(labels.max()) + 1)
    nn.init.uniform_(score.weight, -1 / channels, 1 / channels)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    epochs = max(round(5 * scale), 1)
    for stage in (0, 1):
        optimiser = torch.optim.Adam([*head.parameters(), *(score.parameters() if stage else [])], 1e-3)
        for epoch in range(epochs):
            order = rng.permutation(len(labels))[: max(int(len(labels) * min(1, scale)), 32)]
            for start in range(0, len(order), 32):
                rows = np.sort(order[start : start + 32])
                if stage:
                    cells = cache.batch(rows).flatten(2).mT  # (B, N, C)
                    weights = normalised(operator.soft(score(cells)[..., 0], None, generator))
                    pooled = (weights[:, None] @ cells)[:, 0]
                else:
                    pooled = cache.pooled_batch(rows)
                loss = functional.cross_entropy(
                    head(functional.dropout(pooled, 0.2)), torch.from_numpy(labels[rows]).long()
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            report(f"{type(operator).__name__}, seed {seed}", stage * epochs + epoch + 1, 2 * epochs)
    cache, labels = test
    right, size = 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(labels), 64):
            rows = np.arange(start, min(start + 64, len(labels)))
            cells = cache.batch(rows).flatten(2).mT
            hard = operator.hard(score(cells)[..., 0])
            logits = head((normalised(hard)[:, None] @ cells)[:, 0])
            right += float((logits.argmax(-1) == torch.from_numpy(labels[rows])).sum())
            size += float(hard.sum())
    return {"top1": right / len(labels), "size": size / len(labels)}
