"""What the selections give away: probes and retrained heads, on the masks of the run's training images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bla.comparison.making import RUN
from bla.comparison.methods import Batch, Method, another_images
from bla.comparison.subjects import Subjects
from bla.metrics import Evaluator, mask_probe, retrained, top_cells
from bla.metrics.cells import read_cells
from bla.metrics.leakage import EPOCHS, STEPS, mean_of_selected
from bla.progress import Progress

_BATCH = 64
_OFF = 0.1
"""A cell is off the object where the object covers less of it."""


def measure_leakage(
    made: Mapping[str, Method],
    selected: Mapping[str, Tensor],
    subjects: Subjects,
    training: Subjects,
    *,
    training_labels: Tensor,
    training_targets: Tensor,
    labels: Tensor,
    evaluator: Evaluator,
    classes: int,
    seed: int,
    place: torch.device,
    report: Progress,
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """``mask_only``, ``retrained`` and ``off_object`` for each image and method, and what they were measured with.

    Methods that run the whole network are left out of the first two: they would have to explain the training images.
    """
    cheap = {name: method for name, method in made.items() if not method.needs_pixels}
    learnt = _of_training(cheap, training, training_targets, place, report)
    values: dict[str, dict[str, Tensor]] = {name: {} for name in made}
    targets = training_labels.cpu()
    pooled = mean_of_selected(subjects.features, torch.stack([selected[name] for name in cheap], dim=1))
    for order, name in enumerate(cheap):
        masks, means = learnt[name]
        values[name]["mask_only"] = mask_probe(
            masks, targets, selected[name], labels, classes=classes, seed=seed
        ).double()
        values[name]["retrained"] = retrained(
            means, targets, pooled[:, order], labels, classes=classes, seed=seed
        ).double()
        report("probing and retraining on the selected cells", order + 1, len(cheap))
    if subjects.coverage is not None:
        for name in made:
            values[name]["off_object"] = _off_object(evaluator, subjects, selected[name], labels, place)
    counts = torch.bincount(labels, minlength=classes)
    everything = torch.ones_like(selected[RUN])
    return {
        "evaluator": {
            "architecture": "dropout 0.2 and one linear layer on the mean of the cells kept",
            "law": "a size uniform in 1..N, then so many cells uniformly; four masks an image",
            "steps": f"{STEPS} batches of 32 images or {EPOCHS} epochs, whichever is more; Adam, 0.001",
            "seed": seed,
            "training_images": len(training),
            "accuracy_from_all_cells": evaluator.accuracy(
                lambda rows: subjects.features(rows).to(place), everything, labels
            ),
        },
        "chance": 1 / classes,
        "commonest_class": float(counts.max() / counts.sum()),
        "without_training_masks": [name for name in made if name not in cheap],
    }, values


@torch.inference_mode()
def _of_training(
    methods: Mapping[str, Method], training: Subjects, targets: Tensor, place: torch.device, report: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of the training images and each method, the masks (N, H, W) at the run's sizes and the mean (N, C) over them."""
    choose = methods[RUN].sizes
    assert choose is not None
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in methods if name != "shuffled"}
    rankings, sizes = [], []
    for start in range(0, len(training), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(training)))
        features = training.features(rows).to(place)
        batch = Batch(features, targets[rows].to(place), torch.from_numpy(rows))
        wanted = choose(batch)
        maps = {name: methods[name].maps(batch) for name in found}
        masks = {name: top_cells(ranking, wanted) for name, ranking in maps.items()}
        means = read_cells(lambda pooled: pooled, features, torch.stack([*masks.values()], dim=1))
        for order, (name, mask) in enumerate(masks.items()):
            found[name].append((mask.cpu(), means[:, order].cpu()))
        rankings.append(maps[RUN].cpu())
        sizes.append(wanted.cpu())
        report("masks of the training images", int(rows[-1]) + 1, len(training))
    joined = {
        name: (torch.cat([mask for mask, _ in parts]), torch.cat([mean for _, mean in parts]))
        for name, parts in found.items()
    }
    if "shuffled" in methods:
        ranking = torch.cat(rankings)
        every = torch.arange(len(training))
        moved = another_images(methods[RUN], dict(enumerate(ranking)), len(training))
        masks_moved = top_cells(moved.maps(Batch(ranking[:, None], every, every)), torch.cat(sizes))
        joined["shuffled"] = masks_moved, mean_of_selected(training.features, masks_moved)
    return joined


@torch.no_grad()
def _off_object(
    evaluator: Evaluator, subjects: Subjects, selected: Tensor, labels: Tensor, place: torch.device
) -> Tensor:
    """Whether the evaluator names the class from selected cells that the object does not cover; NaN where none is."""
    assert subjects.coverage is not None
    off = selected & (subjects.coverage < _OFF)
    some = off.flatten(1).any(1) & (subjects.coverage.flatten(1).sum(1) > 0)
    correct = torch.full((len(labels),), torch.nan, dtype=torch.float64)
    for start in range(0, len(labels), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(labels)))
        logits = read_cells(evaluator, subjects.features(rows).to(place), off[rows, None].to(place), affine=True)
        correct[rows] = (logits[:, 0].argmax(dim=1).cpu() == labels[rows]).double()
    return torch.where(some, correct, torch.nan)
