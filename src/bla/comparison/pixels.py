"""Faithfulness in pixels, method by method, on a sample of the photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from bla.comparison.explanations import Explained
from bla.comparison.lines import JsonLines
from bla.comparison.photos import Rows
from bla.comparison.sample import Sample
from bla.metrics import pixels as metrics


def measure_pixels(sample: Sample, explained: Mapping[str, Explained], folder: Path) -> None:
    """Add every pixel-level metric to the values of every method; resumes by method and batch from ``folder``.

    All maps are judged through one network, the mean-pooled classifier. Max-sensitivity explains each photo several
    times, and is left out for methods that run the whole network anyway.
    """
    setting = sample.setting
    for place, (name, one) in enumerate(explained.items()):
        lines = JsonLines(folder / name, f"{setting.digest} {one.method.note} {sample.rows.tolist()}")
        for part in sample.parts(len(lines.found)):
            lines.append(_values(sample, one, part))
            setting.report("changing pixels", place * len(sample) + len(lines.found), len(explained) * len(sample))
        for metric in lines.found[0]:
            one.values[metric] = torch.full((len(setting.photos),), torch.nan, dtype=torch.float64)
            one.values[metric][sample.rows] = torch.tensor([line[metric] for line in lines.found], dtype=torch.float64)


def _values(sample: Sample, one: Explained, part: Rows) -> list[dict[str, float]]:
    """The values of each photo, by metric."""
    network, seed = sample.setting.pooled, sample.setting.seed
    pixels, targets, rows = sample.pixels[part], sample.targets[part], sample.rows[part]
    maps, masks = one.ranking[rows].to(pixels.device), one.selected[rows].to(pixels.device)
    values = metrics.deletion_insertion(network, pixels, maps, targets)
    values |= metrics.masked_confidence(network, pixels, masks, targets)
    values |= metrics.road(network, pixels, maps, targets, seed=seed)
    values |= metrics.kept_pixels(network, pixels, masks, sample.grey)
    values["infidelity"] = metrics.infidelity(network, pixels, maps, targets, seed=seed)
    if one.method.reads_photo and not one.method.needs_pixels:
        explain = sample.explainer(one.method, part)
        values["max_sensitivity"] = metrics.max_sensitivity(explain, pixels, seed=seed)
    rounded = {metric: [round(float(each), 6) for each in value] for metric, value in values.items()}
    return [dict(zip(rounded, each, strict=True)) for each in zip(*rounded.values(), strict=True)]
