"""Finer explanations: localisation and accuracy against the size of the input, and so of the grid.

    python -m benchmarks.faithfulness.grids CUB_200_2011 --out FOLDER [--sizes 224 320 448] [--seeds 0 1 2 3 4]
    python -m benchmarks.faithfulness.grids CUB_200_2011 --out FOLDER --setups BLA dial --sizes 224 448 --validation

Caltech-UCSD Birds in its own layout, the official split, whole photos, tf_efficientnet_lite0 frozen, a linear head.
At each size an explainer is trained on the training photos alone, every setting that counts cells scaled with their
number: the mean size is a share of the grid, the threshold is 0.98 / N. The share of the selected area that lies on the
bird is given at each explainer's own sizes, and at the same area for every grid: of the cells ranked by the score as
many as cover 4, 8 or 12 forty-ninths of the photo; so is accuracy. With `--validation` a fifth of the training photos
takes the place of the test photos. If interrupted, rerun the command: it resumes.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import interval, kept, parser_of
from bla.comparison.photos import find_photos, size_of
from bla.data.image_sets import Splits, stratified_split
from bla.data.published import read_images
from bla.operators import top_hard
from bla.progress import silent
from bla.runs.run import Run, train
from bla.training.settings import Settings

AREAS = (4, 8, 12)
"""Forty-ninths of the photo."""
_OURS = {"mean_size": 8 / 49, "straight_through": 0.5, "head_epochs": 20, "epochs": 10}
SETUPS: dict[str, dict[str, Any]] = {
    "BLA": _OURS,
    "class-aware": {**_OURS, "class_aware": True, "hidden": (64,)},
    "dial": {**_OURS, "dial": 0.5},
    "hidden": {**_OURS, "hidden": (64,)},
}


@torch.inference_mode()
def measured(run: Run, splits: Splits, cache: Path) -> dict[str, float]:
    """Accuracy of the run's metrics, and where on the test photos its cells lie."""
    photos = find_photos(run, splits, limit=None, seed=0, cache=cache, report=silent)
    classifier, metrics = run.classifier, run.record["metrics"]
    found: dict[str, list[float]] = {}
    for rows in np.array_split(np.arange(len(photos)), -(-len(photos) // 64)):
        features = photos.features(rows)
        selection = classifier.attention(features)
        height, width = selection.hard.shape[1:]
        rankings = selection.unbounded.flatten(1)
        weights = {"own": selection.hard.flatten(1)} | {
            f"{area}/49": top_hard(rankings, max(1, round(area / 49 * height * width))) for area in AREAS
        }
        sets = {name: (each > 0).numpy() for name, each in weights.items()}
        for name, each in weights.items():
            right = classifier.classify(features, each.reshape(selection.hard.shape)).argmax(-1) == photos.labels[rows]
            found.setdefault(f"hard, {name}", []).extend(right.double().tolist())
        for row, ranking in zip(rows, rankings, strict=True):
            place = int(photos.rows[row])
            region = classifier.transform.region(size_of(photos.path(row)))
            bird = photos.images.coverage(place, region, (height, width)).ravel()
            for name, cells in sets.items():
                shown = cells[row - rows[0]]
                found.setdefault(f"on the bird, {name}", []).append(float(bird[shown].mean()))
                if name == "own":
                    found.setdefault("share", []).append(float(shown.mean()))
            found.setdefault("pointing", []).append(float(bird[int(ranking.argmax())] >= 0.5))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {
        "baseline": metrics["baseline"]["top1"],
        "hard": means.pop("hard, own"),
        "hard, 8/49": means["hard, 8/49"],
        "share": means["share"],
        "cells": metrics["size"]["mean"],
        "on the bird": means["on the bird, own"],
        "pointing": means["pointing"],
        **{f"on the bird, {area}/49": means[f"on the bird, {area}/49"] for area in AREAS},
    }


Row = tuple[str, int]
"""Setup, pixels a side."""


def table(rows: dict[Row, list[dict[str, float]]]) -> str:
    """Markdown: mean and 95% interval over seeds (Student's t)."""
    names = list(next(iter(rows.values()))[0])
    lines = [f"| explainer | input | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    for (setup, size), found in rows.items():
        cells = []
        for name in names:
            mean, half = interval([one[name] for one in found])
            cells.append(f"{mean:.1f} ± {half:.1f}" if name == "cells" else f"{mean:.3f} ± {half:.3f}")
        lines.append(f"| {setup} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trained(splits: Splits, folder: Path, settings: Settings, image_size: int, cache: Path) -> dict[str, float]:
    """Train one explainer and measure it."""
    run = train(splits, folder, settings, image_size=image_size, cache=cache, report=silent)
    return measured(run, splits, cache)


def main() -> None:
    """Train what is not trained, measure, print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, help="CUB_200_2011 in its own layout")
    parser.add_argument("--out", type=Path, required=True, help="a folder for runs and features")
    parser.add_argument("--sizes", type=int, nargs="*", default=[224, 320, 448])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--setups", nargs="*", default=["BLA", "class-aware"], choices=list(SETUPS))
    parser.add_argument("--validation", action="store_true", help="measure on a fifth of the training photos")
    arguments = parser.parse_args()
    splits, _ = read_images(arguments.data)
    if arguments.validation:
        chosen, held_out = stratified_split(splits.train.labels, len(splits.train), 0.2, 0)
        splits = dataclasses.replace(splits, train=splits.train.subset(chosen), test=splits.train.subset(held_out))
    rows: dict[Row, list[dict[str, float]]] = {}
    for setup in arguments.setups:
        for size in arguments.sizes:
            for seed in arguments.seeds:
                folder = arguments.out / f"{setup}-{size}-{seed}{'-validation' * arguments.validation}"
                file = folder.with_suffix(".json")
                print(f"{setup}, {size} pixels, seed {seed}", file=sys.stderr, flush=True)
                settings = Settings(seed=seed, **SETUPS[setup])
                row = kept(file, partial(trained, splits, folder, settings, size, arguments.out / "features"))
                rows.setdefault((setup, size), []).append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
