"""Faithfulness in pixels, method by method, on a sample of the photos."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bla.comparison.catalogue import Setting
from bla.comparison.explanations import Explained
from bla.comparison.lines import JsonLines
from bla.comparison.methods import Batch
from bla.metrics import pixels as metrics
from bla.metrics.fitting import Rows

COSTLY = 50
"""The most photos, of those drawn, for measures that take seconds a photo: all but kept and removed."""
_BATCH = 8
_Measure = Callable[[Setting, Explained, Batch, Rows], dict[str, Tensor]]


def measure_pixels(setting: Setting, sample: Rows, explained: Mapping[str, Explained], folder: Path) -> None:
    """Add every pixel-level metric to the values of every method; resumes by method and batch from ``folder``.

    All maps are judged through one network, the mean-pooled classifier: kept and removed on the whole sample, the other
    metrics on at most :data:`COSTLY` of it. Max-sensitivity explains each photo several times, and is left out for
    methods that run the whole network anyway.
    """
    few = sample[np.linspace(0, len(sample) - 1, min(len(sample), COSTLY)).round().astype(int)]
    parts: tuple[tuple[str, _Measure, Rows], ...] = (("kept", _kept, sample), ("costly", _costly, few))
    for (part, measure, rows), (place, one) in itertools.product(parts, enumerate(explained.values())):
        lines = JsonLines(folder / part / one.method.name, f"{setting.digest} {one.method.note} {rows.tolist()}")
        for start in range(len(lines.found), len(rows), _BATCH):
            chosen = rows[start : start + _BATCH]
            batch = setting.photos.batch(chosen, setting.photos.pixels(chosen))
            lines.append(_by_photo(measure(setting, one, batch, chosen)))
            setting.report(
                f"changing pixels ({part})", place * len(rows) + len(lines.found), len(explained) * len(rows)
            )
        for metric in lines.found[0]:
            one.values[metric] = torch.full((len(setting.photos),), torch.nan, dtype=torch.float64)
            one.values[metric][rows] = torch.tensor([line[metric] for line in lines.found], dtype=torch.float64)


def _kept(setting: Setting, one: Explained, batch: Batch, rows: Rows) -> dict[str, Tensor]:
    pixels, targets = batch.seen(), batch.targets
    found = metrics.kept_and_removed(setting.pooled, pixels, one.selected[rows].to(pixels.device), targets)
    return found | metrics.over_sizes(setting.pooled, pixels, one.ranking[rows].to(pixels.device), targets)


def _costly(setting: Setting, one: Explained, batch: Batch, rows: Rows) -> dict[str, Tensor]:
    network, seed = setting.pooled, setting.seed
    pixels, targets = batch.seen(), batch.targets
    maps, masks = one.ranking[rows].to(pixels.device), one.selected[rows].to(pixels.device)
    values = metrics.deletion_insertion(network, pixels, maps, targets)
    values |= metrics.masked_confidence(network, pixels, masks, targets)
    values |= metrics.road(network, pixels, maps, targets, seed=seed)
    values["infidelity"] = metrics.infidelity(network, pixels, maps, targets, seed=seed)
    if one.method.reads_photo and not one.method.needs_pixels:
        explain = one.method.on_pixels(batch, setting.run.classifier.trunk)
        values["max_sensitivity"] = metrics.max_sensitivity(explain, pixels, seed=seed)
    return values


def _by_photo(values: Mapping[str, Tensor]) -> list[dict[str, float]]:
    rounded = {metric: [round(float(each), 6) for each in value] for metric, value in values.items()}
    return [dict(zip(rounded, each, strict=True)) for each in zip(*rounded.values(), strict=True)]
