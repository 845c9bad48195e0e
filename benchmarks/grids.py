"""Finer explanations: localisation and accuracy against the size of the input, and so of the grid.

    python benchmarks/grids.py CUB_200_2011 --out FOLDER [--sizes 224 320 448] [--seeds 0 1 2 3 4]

Caltech-UCSD Birds in its own layout, the official split, whole photos, tf_efficientnet_lite0 frozen, a linear head.
At each size an explainer is trained on the training photos alone, every setting that counts cells scaled with their
number: the mean size is a share of the grid, the threshold is 0.98 / N. The share of the selected cells that lies on
the bird is told at each explainer's own sizes, and at the same area for every grid: of the cells ranked by the score
the best 4, 8 or 12 forty-ninths of the photo. Interrupted, run it again: it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bla import cache as caches
from bla.comparing.subjects import find_subjects
from bla.data import Splits
from bla.datasets import read_images
from bla.evaluation import localise, top_cells
from bla.run import Run, train
from bla.settings import Settings
from paper import interval

AREAS = (4, 8, 12)
"""Forty-ninths of the photo."""
SETUPS: dict[str, dict[str, Any]] = {
    "BLA": {"mean_size": 8 / 49, "straight_through": 0.5, "head_epochs": 20, "epochs": 10},
    "class-aware": {"mean_size": 8 / 49, "straight_through": 0.5, "head_epochs": 20, "epochs": 10, "class_aware": True,
                    "hidden": (64,)},
}  # fmt: skip


@torch.inference_mode()
def measured(run: Run, splits: Splits, cache: Path) -> dict[str, float]:
    """Accuracy of the run's metrics, and where on the test photos its cells lie."""
    photos, _, _ = find_subjects(run, splits, limit=None, seed=0, cache=cache, report=caches.silent)
    covered = photos.coverage
    assert covered is not None
    parts = np.array_split(np.arange(len(photos)), -(-len(photos) // 64))
    selections = [run.classifier.attention(photos.features(rows)) for rows in parts]
    unbounded, hard = (torch.cat([part[index] for part in selections]) for index in (0, 3))
    cells = hard[0].numel()
    own = localise(unbounded, hard > 0, covered)
    metrics = run.record["metrics"]
    found = {
        "baseline": metrics["baseline"]["top1"],
        "hard": metrics["hard"]["top1"],
        "share": metrics["size"]["mean"] / cells,
        "on the bird": float(own["on_object"].mean()),
        "pointing": float(own["pointing"].mean()),
    }
    for area in AREAS:
        best = top_cells(unbounded, round(area / 49 * cells))
        found[f"on the bird, {area}/49"] = float(localise(unbounded, best, covered)["on_object"].mean())
    return found


def table(rows: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    """Markdown: mean and 95% interval over seeds (Student's t)."""
    names = list(next(iter(rows.values()))[0])
    lines = [
        f"| explainer | input | grid | {' | '.join(names)} |",
        f"| --- | --- | --- |{' --- |' * len(names)}",
    ]
    for (setup, size), found in rows.items():
        cells = []
        for name in names:
            mean, half = interval([one[name] for one in found])
            cells.append(f"{mean:.3f} ± {half:.3f}")
        lines.append(f"| {setup} | {size} | {size // 32}x{size // 32} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is not trained, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CUB_200_2011 in its own layout")
    parser.add_argument("--out", type=Path, required=True, help="a folder for runs and features")
    parser.add_argument("--sizes", type=int, nargs="*", default=[224, 320, 448])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--setups", nargs="*", default=list(SETUPS), choices=list(SETUPS))
    arguments = parser.parse_args()
    splits, _ = read_images(arguments.data)
    rows: dict[tuple[str, int], list[dict[str, float]]] = {}
    for setup in arguments.setups:
        for size in arguments.sizes:
            for seed in arguments.seeds:
                file = arguments.out / f"{setup}-{size}-{seed}.json"
                if not file.exists():
                    print(f"{setup}, {size} pixels, seed {seed}", file=sys.stderr, flush=True)
                    run = train(
                        splits,
                        arguments.out / f"{setup}-{size}-{seed}",
                        Settings(seed=seed, **SETUPS[setup]),
                        image_size=size,
                        cache=arguments.out / "features",
                        report=caches.silent,
                    )
                    file.write_text(json.dumps(measured(run, splits, arguments.out / "features")))
                rows.setdefault((setup, size), []).append(json.loads(file.read_text()))
    print(table(rows))


if __name__ == "__main__":
    main()
