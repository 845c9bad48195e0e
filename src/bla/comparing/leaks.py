"""What the selections give away: probes and retrained heads, on the masks of the run's training images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bla.cache import Progress
from bla.comparing.making import RUN
from bla.comparing.subjects import Subjects
from bla.comparison import Batch, Method, another_images
from bla.evaluation import Evaluator, mask_probe, retrained, top_cells
from bla.evaluation.cells import read_cells
from bla.evaluation.leakage import EPOCHS, STEPS, mean_of_selected

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
    masks = _training_masks(cheap, training, training_targets, place, report)
    values: dict[str, dict[str, Tensor]] = {name: {} for name in made}
    targets = training_labels.cpu()
    for place_in_order, name in enumerate(cheap):
        report("retraining on the selected cells", place_in_order + 1, len(cheap))
        values[name]["mask_only"] = mask_probe(
            masks[name], targets, selected[name], labels, classes=classes, seed=seed
        ).double()
        values[name]["retrained"] = retrained(
            mean_of_selected(training.features, masks[name]),
            targets,
            mean_of_selected(subjects.features, selected[name]),
            labels,
            classes=classes,
            seed=seed,
        ).double()
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
def _training_masks(
    methods: Mapping[str, Method], training: Subjects, targets: Tensor, place: torch.device, report: Progress
) -> dict[str, Tensor]:
    rankings: dict[str, list[Tensor]] = {name: [] for name in methods if name != "shuffled"}
    sizes = []
    for start in range(0, len(training), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(training)))
        batch = Batch(training.features(rows).to(place), targets[rows].to(place), torch.from_numpy(rows))
        for name, found in rankings.items():
            maps = methods[name].maps(batch)
            found.append(maps.cpu())
        own = methods[RUN].sizes
        assert own is not None
        sizes.append(own(batch).cpu())
        report("masks of the training images", int(rows[-1]) + 1, len(training))
    joined = {name: torch.cat(found) for name, found in rankings.items()}
    if "shuffled" in methods:
        whole = another_images(methods[RUN], dict(enumerate(joined[RUN])), len(training))
        every = torch.arange(len(training))
        joined["shuffled"] = whole.maps(Batch(joined[RUN][:, None], every, every))
    wanted = torch.cat(sizes)
    return {name: top_cells(ranking, wanted) for name, ranking in joined.items()}


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
