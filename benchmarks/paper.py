"""The paper's setups on a folder of images, over seeds: top-1 of baseline, soft and hard, and the size.

    python benchmarks/paper.py DATA --out RUNS [--setups bla bla-t bla-ph l2x-f] [--seeds 5] [--epochs 5] [--json]

A run folder each under RUNS; interrupted, run it again: it goes on. Mean and 95% interval (Student's t over seeds).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bla.progress import shown_progress
from bla.run import train
from bla.settings import SETUPS, Settings

COLUMNS = ("baseline", "baseline_continued", "soft", "soft_renormalised", "hard")


def measured(data: str, out: Path, setup: Any, seed: int, epochs: int) -> dict[str, float]:
    """One run's figures, trained where it is not there yet."""
    with shown_progress() as report:
        run = train(data, out / f"{setup}-{seed}", Settings(setup=setup, seed=seed, epochs=epochs), report=report)
    metrics = run.record["metrics"]
    figures = {name: metrics[name]["top1"] for name in COLUMNS}
    figures["hard - baseline"] = metrics["hard"]["top1"] - metrics["baseline"]["top1"]
    return figures | {"agreement": metrics["agreement"], "size": metrics["size"]["mean"]}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval."""
    if len(values) == 1:
        return values[0], float("nan")
    return float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="an image folder with classes, or embedded")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setups", nargs="*", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5, help="of each stage")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for setup in arguments.setups:
        runs = [measured(arguments.data, arguments.out, setup, s, arguments.epochs) for s in range(arguments.seeds)]
        table[SETUPS[setup]] = {key: interval([run[key] for run in runs]) for key in runs[0]}
    if arguments.json:
        print(json.dumps(table, indent=1))
        return
    columns = list(next(iter(table.values())))
    print(f"| setup | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for setup, row in table.items():
        digits = {key: 1 if key == "size" else 4 for key in row}
        cells = [f"{row[key][0]:.{digits[key]}f} ± {row[key][1]:.{digits[key]}f}" for key in columns]
        print(f"| {setup} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
