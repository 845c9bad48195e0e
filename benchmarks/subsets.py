"""Differentiable subset selections against each other, on sets whose answer is known. Markdown, or JSON.

    python benchmarks/subsets.py invase --out FOLDER [--sets syn4 syn5 syn6] [--features 11] [--seeds 10]
    python benchmarks/subsets.py l2x --out FOLDER [--sets orange xor additive switch]
    python benchmarks/subsets.py bags --out FOLDER [--length 10] [--data IDX_FOLDER]
    python benchmarks/subsets.py frontier --out FOLDER --data IMAGE_FOLDER
    python benchmarks/subsets.py gradients --out FOLDER
    python benchmarks/subsets.py cost --out FOLDER

Every result is a JSON file under --out; interrupted, run it again: it goes on. --scale shrinks everything for a
trial. Mean and 95% interval (Student's t over seeds). Settings are chosen on validation data, by one rule for
all operators: among an operator's candidates, the smallest mean size whose validation loss (cross entropy of the
hard subset) is within .01 of that operator's least.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from bla.operators import (
    BoundedLogits,
    Entmax15,
    GumbelMaximum,
    HardConcrete,
    RelaxedTopK,
    Sparsemax,
    StraightThroughTopK,
    SubsetOperator,
)
from bla.progress import shown_progress

sys.path.insert(0, str(Path(__file__).parent))
from rivals import LapSum, PerturbedTopK, Simple

WITHIN = 0.01
"""Nats of validation loss that a smaller subset is worth."""

CHOSEN_ON = 3
"""Seeds that settings are chosen on."""

PRICES = (0.006, 0.012, 0.02, 0.03)
SIZES = (2, 3, 4, 5)
Candidate = tuple[SubsetOperator, float]
"""An operator, and the price of an item."""

OWN_SIZE: dict[str, Callable[[], SubsetOperator]] = {
    "bounded": lambda: BoundedLogits(noise=1.0),
    "bounded-plain": BoundedLogits,
    "hard-concrete": HardConcrete,
    "sparsemax": Sparsemax,
    "entmax15": Entmax15,
}
"""Operators that choose how many."""

FIXED_SIZE: dict[str, Callable[[int], SubsetOperator]] = {
    "bounded-dial": lambda k: BoundedLogits(k=k, noise=1.0),
    "gumbel-maximum": GumbelMaximum,
    "straight-through": StraightThroughTopK,
    "relaxed-top-k": lambda k: RelaxedTopK(k, temperature=0.5),
    "simple": Simple,
    "perturbed": lambda k: PerturbedTopK(k, draws=20),
    "lapsum": LapSum,
}
"""Operators that are told how many."""

OURS = ("bounded", "bounded-plain", "bounded-dial")


def candidates(name: str, sizes: tuple[int, ...] = SIZES) -> list[Candidate]:
    """Four settings of an operator: prices of those that choose their size, sizes of the others."""
    if name in OWN_SIZE:
        return [(OWN_SIZE[name](), price) for price in PRICES]
    return [(FIXED_SIZE[name](k), 0.0) for k in sizes]


def chosen(measured: list[dict[str, float]]) -> int:
    """Which candidate: the smallest within .01 of the least loss.

    >>> tried = [{"cross_entropy": 0.5, "size": 4}, {"cross_entropy": 0.505, "size": 3}]
    >>> chosen([*tried, {"cross_entropy": 0.6, "size": 1}])
    1
    """
    least = min(one["cross_entropy"] for one in measured)
    near = [index for index, one in enumerate(measured) if one["cross_entropy"] <= least + WITHIN]
    return min(near, key=lambda index: measured[index]["size"])


def mean(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of every figure over the seeds."""
    return {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval."""
    if len(values) == 1:
        return values[0], float("nan")
    return float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """A result from its file, or measured and then kept: all or nothing."""
    if not path.exists():
        result = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
        partial.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def synthetic(arguments: argparse.Namespace, report: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """INVASE's or L2X's sets: a row for each set and operator."""
    from synthetic import L2X, bayes
    from tabular import draw, invase_plan, l2x_plan, trained

    invase = arguments.task == "invase"
    names = arguments.sets or ([f"syn{n}" for n in range(1, 7)] if invase else list(L2X))
    operators = arguments.operators or ([*OWN_SIZE, *FIXED_SIZE] if invase else list(FIXED_SIZE))
    table = []
    for name in names:
        plan = invase_plan(arguments.scale) if invase else l2x_plan(name, arguments.scale)
        width = arguments.features if invase else 10
        best = bayes(draw(name, plan.test, 99, width))
        table.append({"set": name, "operator": "Bayes", **best, "seeds": 0})
        for operator in operators:
            # L2X is told the true size of each set, and so is every operator there: nothing is left to choose
            tried = candidates(operator) if invase else candidates(operator, (L2X[name][1],))[:1]
            root = arguments.out / f"{arguments.task}-{width}-{arguments.scale:g}" / name / operator

            def run(index: int, seeds: list[int], on_test: bool, *, tried: Any = tried, name: str = name) -> Any:
                one, price = tried[index]
                return trained(
                    name, one, price, seeds, plan, features=width, on_test=on_test, report=report  # noqa: B023
                )  # fmt: skip

            pick = 0
            if len(tried) > 1:
                few = list(range(min(CHOSEN_ON, arguments.seeds)))
                tuning = [
                    mean(kept(root / f"validation-{i}.json", lambda i=i, few=few, run=run: run(i, few, False)))
                    for i in range(len(tried))
                ]
                pick = chosen(tuning)
            if arguments.at is not None and operator in FIXED_SIZE:
                pick = SIZES.index(arguments.at)
            seeds = list(range(arguments.seeds))
            result = kept(root / f"test-{pick}-{len(seeds)}.json", lambda: run(pick, seeds, True))  # noqa: B023
            setting = str(tried[pick][0]) + (f", price {tried[pick][1]}" if tried[pick][1] else "")
            figures = {key: interval([run[key] for run in result]) for key in result[0]}
            table.append({"set": name, "operator": operator, "setting": setting, **figures, "seeds": len(seeds)})
    return table


def bagged(arguments: argparse.Namespace, report: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Bags: a row for each way to pool."""
    from bags import POOLS, digits, fashion_or_mnist, trained_bags

    images, labels = digits() if arguments.data is None else fashion_or_mnist(arguments.data)
    table = []
    for count in arguments.bags:
        for pool in arguments.operators or POOLS:
            source = "digits" if arguments.data is None else Path(arguments.data).name
            folder = f"bags-{source}-{arguments.length}-{count}-{arguments.scale:g}"
            path = arguments.out / folder / f"{pool}-{arguments.seeds}.json"

            def measure(pool: str = pool, count: int = count) -> Any:
                sizes = {"count": count, "length": arguments.length, "scale": arguments.scale}
                return trained_bags(pool, images, labels, list(range(arguments.seeds)), **sizes, report=report)

            result = kept(path, measure)
            figures = {key: interval([run[key] for run in result]) for key in result[0]}
            table.append({"set": f"{source}, {count} bags", "operator": pool, **figures, "seeds": arguments.seeds})
    return table


def frontier(arguments: argparse.Namespace, report: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Accuracy at equal size on cached features."""
    from cells import features, trained_cells

    if arguments.data is None:
        raise SystemExit("expected --data IMAGE_FOLDER for the frontier, with train and test")
    sources: list[Any] = []
    table = []
    for size in arguments.sizes:
        for operator in arguments.operators or FIXED_SIZE:
            path = arguments.out / f"frontier-{arguments.scale:g}" / f"{operator}-{size}-{arguments.seeds}.json"

            def measure(operator: str = operator, size: int = size) -> Any:
                if not sources:
                    sources.extend(features(arguments.data, report))
                seeds = range(arguments.seeds)
                make = FIXED_SIZE[operator]
                return [
                    trained_cells(make(size), *sources, seed, scale=arguments.scale, report=report) for seed in seeds
                ]

            result = kept(path, measure)
            figures = {key: interval([run[key] for run in result]) for key in result[0]}
            table.append({"set": f"{size} cells", "operator": operator, **figures, "seeds": arguments.seeds})
    return table


def gradients(arguments: argparse.Namespace, report: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Bias and variance of each operator's gradient against exact enumeration."""
    from gradient_quality import bias_and_variance

    draws = max(int(2000 * arguments.scale), 20)
    operators = {name: make(3) for name, make in FIXED_SIZE.items()} | {name: make() for name, make in OWN_SIZE.items()}
    return [
        {"set": "N = 8", "operator": name, "setting": str(one)}
        | kept(arguments.out / "gradients" / f"{name}-{draws}.json", lambda one=one: bias_and_variance(one, draws))
        for name, one in operators.items()
    ]


def cost(arguments: argparse.Namespace, report: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Time and memory, forward and backward."""
    from gradient_quality import cost_of

    operators = {name: make() for name, make in OWN_SIZE.items()} | {name: make(8) for name, make in FIXED_SIZE.items()}
    operators = {name: one for name, one in operators.items() if name in (arguments.operators or operators)}
    return [
        {"set": f"N = {n}", "operator": name}
        | kept(arguments.out / "cost" / f"{name}-{n}.json", lambda one=one, n=n: cost_of(one, n))
        for n in arguments.items
        for name, one in operators.items()
        if n <= 10_000 or name != "simple"  # N steps, one after the other: minutes
    ]


TASKS = {
    "invase": synthetic, "l2x": synthetic, "bags": bagged, "frontier": frontier, "gradients": gradients, "cost": cost,
}  # fmt: skip
HIDDEN = ("set", "operator", "setting", "seeds")


def markdown(table: list[dict[str, Any]], setting: bool) -> str:
    """A table with a column a figure."""
    columns = list(dict.fromkeys(key for row in table for key in row if key not in HIDDEN))
    names = ["set", "operator", *columns, *(["seeds"] if any("seeds" in row for row in table) else [])]
    names += ["setting"] if setting else []
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]

    def cell(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"{value[0]:.3f}" + ("" if np.isnan(value[1]) else f" ± {value[1]:.3f}")
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines += [f"| {' | '.join(cell(row.get(name, '')) for name in names)} |" for row in table]
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--sets", nargs="*", help="of invase and l2x; all by default")
    parser.add_argument("--operators", nargs="*", help="by name; all by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0, help="of data and steps; 1 is the published size")
    parser.add_argument("--features", type=int, default=11, help="of Syn1 to Syn6: 11 or 100")
    parser.add_argument("--at", type=int, choices=SIZES, help="invase: this size for every fixed-size operator")
    parser.add_argument("--length", type=int, default=10, help="of a bag")
    parser.add_argument("--bags", type=int, nargs="*", default=[50, 100, 200, 500], help="to train on")
    parser.add_argument("--data", help="bags: a folder of idx files; frontier: an image folder with train and test")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2, 4, 8, 12], help="frontier: cells")
    parser.add_argument("--items", type=int, nargs="*", default=[10, 100, 1000, 10_000, 100_000], help="cost: N")
    parser.add_argument("--settings", action="store_true", help="a column with each operator's settings")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"expected at least one seed, got {arguments.seeds}")
    torch.set_num_threads(1)
    with shown_progress() as report:
        table = TASKS[arguments.task](arguments, report)
    print(json.dumps(table, indent=1) if arguments.json else markdown(table, arguments.settings))


if __name__ == "__main__":
    main()
