"""Faithfulness in pixels, method by method, on a sample of the photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from bla.comparison.catalogue import Setting
from bla.comparison.explanations import Explained
from bla.comparison.lines import JsonLines
from bla.metrics import pixels as metrics
from bla.metrics.fitting import Rows

_BATCH = 8


def measure_pixels(setting: Setting, sample: Rows, explained: Mapping[str, Explained], folder: Path) -> None:
    """Add every pixel-level metric to the values of every method; resumes by method and batch from ``folder``.

    All maps are judged through one network, the mean-pooled classifier. Max-sensitivity explains each photo several
    times, and is left out for methods that run the whole network anyway.
    """
    for place, (name, one) in enumerate(explained.items()):
        lines = JsonLines(folder / name, f"{setting.digest} {one.method.note} {sample.tolist()}")
        for start in range(len(lines.found), len(sample), _BATCH):
            lines.append(_values(setting, one, sample[start : start + _BATCH]))
            setting.report("changing pixels", place * len(sample) + len(lines.found), len(explained) * len(sample))
        for metric in lines.found[0]:
            one.values[metric] = torch.full((len(setting.photos),), torch.nan, dtype=torch.float64)
            one.values[metric][sample] = torch.tensor([line[metric] for line in lines.found], dtype=torch.float64)


def _values(setting: Setting, one: Explained, rows: Rows) -> list[dict[str, float]]:
    """The values of each photo, by metric."""
    network, seed, classifier = setting.pooled, setting.seed, setting.run.classifier
    batch = setting.photos.batch(rows, setting.photos.pixels(rows))
    pixels, targets = batch.seen(), batch.targets
    maps, masks = one.ranking[rows].to(pixels.device), one.selected[rows].to(pixels.device)
    values = metrics.deletion_insertion(network, pixels, maps, targets)
    values |= metrics.masked_confidence(network, pixels, masks, targets)
    values |= metrics.road(network, pixels, maps, targets, seed=seed)
    values |= metrics.kept_and_removed(network, pixels, masks, targets)
    values |= metrics.over_sizes(network, pixels, maps, targets)
    values["infidelity"] = metrics.infidelity(network, pixels, maps, targets, seed=seed)
    if one.method.reads_photo and not one.method.needs_pixels:
        explain = one.method.on_pixels(batch, classifier.trunk)
        values["max_sensitivity"] = metrics.max_sensitivity(explain, pixels, seed=seed)
    rounded = {metric: [round(float(each), 6) for each in value] for metric, value in values.items()}
    return [dict(zip(rounded, each, strict=True)) for each in zip(*rounded.values(), strict=True)]
