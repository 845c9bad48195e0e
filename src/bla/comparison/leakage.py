"""What the selections give away: an evaluator, probes and retrained heads, all trained on the run's training images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bla.comparison.catalogue import Setting
from bla.comparison.explanations import Explained
from bla.comparison.methods import RUN, Batch, Method, another_images
from bla.comparison.photos import Photos
from bla.metrics import Evaluator, mask_probe, retrained, top_cells, train_evaluator
from bla.metrics.leakage import EPOCHS, STEPS, mean_of_selected

_BATCH = 64
_OFF = 0.1
"""A cell is off the object if the object covers less of it."""


def evaluator_of(setting: Setting) -> Evaluator:
    """An evaluator trained on random subsets of the cells of the training images."""
    assert setting.training is not None
    setting.report("training the evaluator on random subsets", 0, 0)
    classes, labels = len(setting.run.classifier.classes), setting.training.judged.to(setting.device)
    return train_evaluator(setting.training.features, labels, classes=classes, seed=setting.seed)


def measure_leakage(setting: Setting, explained: Mapping[str, Explained], evaluator: Evaluator) -> dict[str, Any]:
    """Add ``mask_only``, ``retrained`` and ``off_object`` to every method's values; how they were measured.

    Methods that run the whole network have no ``mask_only`` and ``retrained``: they would have to explain the training
    images.
    """
    photos, training, seed = setting.photos, setting.training, setting.seed
    assert training is not None
    classes, labels = len(setting.run.classifier.classes), photos.judged
    cheap = {name: one for name, one in explained.items() if not one.method.needs_pixels}
    masks = _training_masks(setting, training, {name: one.method for name, one in cheap.items()})
    means = mean_of_selected(training.features, torch.stack([*masks.values()], dim=1))
    pooled = mean_of_selected(photos.features, torch.stack([one.selected for one in cheap.values()], dim=1))
    for place, (name, one) in enumerate(cheap.items()):
        probed = mask_probe(masks[name], training.judged, one.selected, labels, classes=classes, seed=seed)
        relearnt = retrained(means[:, place], training.judged, pooled[:, place], labels, classes=classes, seed=seed)
        one.values |= {"mask_only": probed.double(), "retrained": relearnt.double()}
        setting.report("probing and retraining on the selected cells", place + 1, len(cheap))
    if photos.coverage is not None:
        for one in explained.values():
            off = one.selected & (photos.coverage < _OFF)
            known = off.flatten(1).any(1) & (photos.coverage.flatten(1).sum(1) > 0)
            correct = evaluator.correct(photos.features, off, labels).double()
            one.values["off_object"] = torch.where(known, correct, torch.nan)
    whole = torch.ones_like(explained[RUN].selected)
    return {
        "evaluator": {
            "architecture": "dropout 0.2 and one linear layer on the mean of the cells kept",
            "law": "a size uniform in 1..N, then so many cells uniformly; four masks an image",
            "steps": f"{STEPS} batches of 32 images or {EPOCHS} epochs, whichever is more; Adam, 0.001",
            "seed": seed,
            "training_images": len(training),
            "accuracy_from_all_cells": evaluator.accuracy(photos.features, whole, labels),
        },
        "chance": 1 / classes,
        "commonest_class": float(torch.bincount(labels).max() / len(labels)),
        "without_training_masks": [name for name in explained if name not in cheap],
    }


@torch.inference_mode()
def _training_masks(setting: Setting, training: Photos, methods: Mapping[str, Method]) -> dict[str, Tensor]:
    """Each method's masks (N, H, W) of the training images, at the sizes that the run's own method selects."""
    rankings: dict[str, list[Tensor]] = {name: [] for name, method in methods.items() if method.reads_photo}
    every, sizes = torch.arange(len(training)), []
    select = methods[RUN].select
    assert select is not None
    for rows in torch.split(every, _BATCH):
        batch = training.batch(rows.numpy())
        sizes.append(select(batch).selected.sum(dim=(1, 2)).cpu())
        for name, found in rankings.items():
            found.append(methods[name].maps(batch).cpu())
        setting.report("masks of the training images", int(rows[-1]) + 1, len(training))
    maps = {name: torch.cat(rankings[name]) for name in rankings}
    if "shuffled" in methods:
        moved = another_images(methods[RUN].title, maps[RUN])
        maps["shuffled"] = moved.maps(Batch(maps[RUN], every, every))
    return {name: top_cells(maps[name], torch.cat(sizes)) for name in methods}
