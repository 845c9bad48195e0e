"""The tables of docs/background/evidence.md: BLA and other methods, at equal area, over trainings of several seeds.

    python -m benchmarks.faithfulness.evidence birds100 catdog CUB_200_2011 --out OUT

For each folder of images (with classes; boxes where there are some) and each seed, every recipe is trained, and the
methods rank the cells of the test images, are cut to the sizes that BLA chose, and are judged. If interrupted, rerun
the command: it resumes. Intervals are 95%, from resampling trainings and images together; differences are paired, on
the same images and trainings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import bla.runs.run
from benchmarks.results import kept, parser_of
from bla.comparison import RUN, compare
from bla.metrics.statistics import correlation, over_seeds
from bla.progress import show
from bla.training.settings import Settings

METHODS = (
    "random", "centre", "norm", "cam", RUN, "grad-cam", "grad-cam++", "layer-cam", "softmax-attention", "l2x",
    "learned-mask", "shuffled",
)  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "BLA": {"setup": "bla"},
    "dial": {"setup": "bla", "mean_size": 8, "dial": 0.5},
    "dial-16": {"setup": "bla", "mean_size": 16, "dial": 0.5},
    "dial-16-hidden": {"setup": "bla", "mean_size": 16, "dial": 0.5, "hidden": (128,)},
    "every-size": {"setup": "bla", "dial": 0.5},
    "class-aware": {"setup": "bla-ph", "threshold": 0.0, "class_aware": True, "hidden": (64,), "dial": 0.5},
    "recommended-12": {"setup": "bla", "threshold": 0.0, "class_aware": True, "hidden": (64,), "straight_through": 0.5,
                       "mean_size": 12},
}  # fmt: skip
"""The paper's BLA; trained to serve every size, with 8 cells on average, a third of the grid (without and with hidden
channels), or as many as it likes; scores asked about a class, head frozen; and as recommended, with 12 cells."""
EPOCHS = {"birds100": (15, 10), "CUB_200_2011": (20, 20)}
"""Of the head and of the module; elsewhere 5 and 5."""
COLUMNS = {
    "accuracy": "own accuracy",
    "evaluator": "evaluator",
    "evaluator_left": "left out",
    "area": "area kept",
    "area_left": "area left",
    "mask_only": "mask only",
    "retrained": "retrained",
    "on_object": "on object",
    "pointing": "pointing",
}


def measured(data: Path, out: Path, recipe: str, seed: int, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """Values of every method for every test image, by one training."""
    head_epochs, epochs = EPOCHS.get(data.name, (5, 5))
    settings = Settings(seed=seed, epochs=epochs, head_epochs=head_epochs, **RECIPES[recipe])
    folder = out / data.name / f"run-{recipe}-{seed}"
    opened = bla.runs.run.train(data, folder, settings)
    found = compare(folder, out=folder / "comparison", methods=methods, leakage=True, seed=seed, report=show)
    shares = [image["object_share"] for image in found["images"]]
    return {
        "size": [image["size"] for image in found["images"]],
        "metrics": opened.record["metrics"],
        "methods": {name: method["each"] for name, method in found["methods"].items()},
        "curves": {name: method["curve"] for name, method in found["methods"].items()},
        "area": None if None in shares else [share * found["size"]["cells"] for share in shares],
    }


def summary(trainings: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and intervals over trainings and images, and the run's paired differences from each method."""

    def stacked(method: str, metric: str) -> np.ndarray:
        return np.array([training["methods"][method][metric] for training in trainings], np.float64)

    found: dict[str, Any] = {"methods": {}, "differences": {}}
    for name, metrics in trainings[0]["methods"].items():
        if any(name not in training["methods"] for training in trainings):
            continue  # measured with other methods before
        rows, differences = {}, {}
        for metric in (metric for metric in metrics if metric in COLUMNS):
            own, others = stacked(RUN, metric), stacked(name, metric)
            known = np.isfinite(own).all(0) & np.isfinite(others).all(0)
            rows[metric] = over_seeds(others[:, known]).to_dict()
            if name != RUN:
                differences[metric] = over_seeds((own - others)[:, known]).to_dict()
        found["methods"][name], found["differences"][name] = rows, differences
    sizes = np.array([training["size"] for training in trainings], np.float64)
    found["size"] = {"mean": float(sizes.mean()), "by_seed": sizes.mean(1).tolist()}
    found["accuracy"] = {
        key: float(np.mean([training["metrics"][key]["top1"] for training in trainings]))
        for key in ("baseline", "baseline_continued", "soft", "hard")
    }
    if trainings[0]["area"] is not None:
        area = np.array(trainings[0]["area"])
        found["size"]["object_correlation"] = correlation(sizes.mean(0), area).to_dict()
        found["size"]["object_correlation_by_seed"] = [correlation(each, area).mean for each in sizes]
    return found


def printed(name: str, recipe: str, found: dict[str, Any]) -> None:
    """Two Markdown tables: values, and differences from the run."""
    columns = [metric for metric in COLUMNS if metric in found["methods"][RUN]]
    print(f"\n### {name}, {recipe}, mean size {found['size']['mean']:.1f}\n")
    print(f"Accuracy: {', '.join(f'{key} {value:.3f}' for key, value in found['accuracy'].items())}.", end="")
    if "object_correlation" in found["size"]:
        each = found["size"]["object_correlation"]
        print(f" Size and object area: r = {each['mean']:.2f} [{each['low']:.2f}, {each['high']:.2f}].", end="")
    print(f"\n\n| method | {' | '.join(COLUMNS[metric] for metric in columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for method, rows in found["methods"].items():
        title = recipe if method == RUN else method
        means = [f"{rows[metric]['mean']:.3f}" for metric in columns]
        print(f"| {title} | {' | '.join(means)} |")
    print(f"\n{recipe} minus:\n\n| method | {' | '.join(COLUMNS[metric] for metric in columns)} |")
    print(f"|{' --- |' * (len(columns) + 1)}")
    for method, rows in found["differences"].items():
        if rows:
            cells = [f"{rows[m]['mean']:+.3f} [{rows[m]['low']:+.3f}, {rows[m]['high']:+.3f}]" for m in columns]
            print(f"| {method} | {' | '.join(cells)} |")


def main() -> None:
    """Train and measure what is missing, print the tables."""
    parser = parser_of(__doc__)
    parser.add_argument("data", nargs="+", type=Path, help="image folders with classes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("HEAD", "MODULE"), help="other ones: into another OUT")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    everything: dict[str, Any] = {}
    if arguments.epochs:
        EPOCHS.update({data.name: tuple(arguments.epochs) for data in arguments.data})
    for data in arguments.data:
        for recipe in arguments.recipes:
            trainings = [
                kept(
                    arguments.out / data.name / f"{recipe}-{seed}.json",
                    partial(measured, data, arguments.out, recipe, seed, arguments.methods),
                )
                for seed in range(arguments.seeds)
            ]
            everything.setdefault(data.name, {})[recipe] = summary(trainings)
            if not arguments.json:
                printed(data.name, recipe, everything[data.name][recipe])
    if arguments.json:
        print(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
