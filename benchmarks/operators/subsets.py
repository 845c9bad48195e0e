"""Differentiable subset selections against each other, on sets whose answer is known. Markdown, or JSON.

    python -m benchmarks.operators.subsets invase --out FOLDER [--sets syn4 syn5 syn6] [--features 11] [--seeds 10]
    python -m benchmarks.operators.subsets l2x --out FOLDER [--sets orange xor additive switch]
    python -m benchmarks.operators.subsets bags --out FOLDER [--length 10] [--data IDX_FOLDER]
    python -m benchmarks.operators.subsets frontier --out FOLDER --data IMAGE_FOLDER
    python -m benchmarks.operators.subsets images --out FOLDER [--data IMAGE_FOLDER [--mark] | --data IDX_FOLDER]
    python -m benchmarks.operators.subsets gradients --out FOLDER
    python -m benchmarks.operators.subsets cost --out FOLDER

Every result is a JSON file under --out; if interrupted, rerun the command: it resumes. --scale shrinks everything for a
trial. Mean and 95% interval (Student's t over seeds). Settings are chosen on validation data, by one rule for
all operators: among an operator's candidates, the smallest mean size whose validation loss (cross entropy of the
hard subset) is within .01 of that operator's least. So is invase's threshold on all scores of a network, unless
--rule says own (each operator's own rule) or either (as validation chooses).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.operators.rivals import First, LapSum, PerturbedTopK, Simple
from benchmarks.operators.tabular import Candidate
from benchmarks.results import interval, kept, parser_of
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
from bla.progress import Progress, shown_progress

CHOSEN_ON = 2
"""Seeds that settings are chosen on."""

PRICES = (0.006, 0.012, 0.025, 0.05)
SIZES = (2, 3, 4, 5)
SIDES = (8, 16, 32, 64, 112, 224)

OWN_SIZE: dict[str, tuple[SubsetOperator, ...]] = {
    "bounded": (BoundedLogits(noise=1.0), BoundedLogits(3.0, noise=1.0)),
    "bounded-plain": (BoundedLogits(), BoundedLogits(3.0)),
    "hard-concrete": (HardConcrete(), HardConcrete(1 / 3)),
    "sparsemax": (Sparsemax(), Sparsemax(3.0)),
    "entmax15": (Entmax15(), Entmax15(3.0)),
}
"""Operators that choose how many, at two temperatures."""

FIXED_SIZE: dict[str, tuple[Callable[..., SubsetOperator], ...]] = {
    "bounded-dial": (
        partial(BoundedLogits, noise=1.0),
        partial(BoundedLogits, temperature=3.0, noise=1.0),
        partial(BoundedLogits, temperature=3.0, noise=0.3),
        partial(BoundedLogits, temperature=10.0, noise=1.0),
    ),
    "gumbel-maximum": tuple(partial(GumbelMaximum, temperature=t) for t in (0.1, 0.5, 1.0, 0.2)),
    "straight-through": tuple(partial(StraightThroughTopK, temperature=t) for t in (1.0, 0.5, 2.0, 4.0)),
    "relaxed-top-k": tuple(partial(RelaxedTopK, temperature=t) for t in (0.1, 0.5, 1.0, 0.2)),
    "simple": tuple(partial(Simple, temperature=t) for t in (1.0, 0.5, 2.0, 4.0)),
    "perturbed": tuple(partial(PerturbedTopK, draws=20, sigma=s) for s in (0.5, 1.0, 0.25, 0.1)),
    "lapsum": tuple(partial(LapSum, temperature=t) for t in (0.5, 1.0, 0.25, 0.1)),
}
"""Operators that are told how many, at four temperatures or scales of noise: all on the frontier, the first three on
L2X's sets, the first two on INVASE's."""


def candidates(name: str) -> list[Candidate]:
    """Eight settings of an operator on tables: two temperatures by four prices, or by four sizes."""
    if name in OWN_SIZE:
        return [(one, price) for one in OWN_SIZE[name] for price in PRICES]
    return [(make(k=k), 0.0) for make in FIXED_SIZE[name][:2] for k in SIZES]


def temperatures(name: str, k: int) -> tuple[SubsetOperator, ...]:
    """An operator at each of its temperatures; ``first`` has none, and knows what is relevant in L2X's first three."""
    if name == "first":
        return (First(k),)
    return OWN_SIZE[name] if name in OWN_SIZE else tuple(make(k=k) for make in FIXED_SIZE[name])


def short(operator: SubsetOperator) -> str:
    """An operator's settings, those that are not the class's own."""
    fields = [f for f in dataclasses.fields(operator) if getattr(operator, f.name) != f.default]  # type: ignore[arg-type]
    return f"{type(operator).__name__}({', '.join(f'{f.name}={getattr(operator, f.name):.3g}' for f in fields)})"


def mean(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of every figure over the seeds."""
    return {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}


def summary(runs: list[dict[str, float]], without: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Mean and interval of every figure but some."""
    return {key: interval([run[key] for run in runs]) for key in runs[0] if key not in without}


def synthetic(arguments: argparse.Namespace, report: Progress) -> list[dict[str, Any]]:
    """INVASE's sets: a row for each set and operator, its settings chosen on validation data."""
    from benchmarks.operators.synthetic import bayes
    from benchmarks.operators.tabular import chosen, draw, invase_plan, trained

    table = []
    plan = invase_plan(arguments.scale)
    tune_on, seeds = list(range(min(CHOSEN_ON, arguments.seeds))), list(range(arguments.seeds))
    names = arguments.operators or [*OWN_SIZE, *FIXED_SIZE]
    for name in arguments.sets or [f"syn{n}" for n in range(1, 7)]:
        root = arguments.out / f"invase-{arguments.features}-{arguments.scale:g}" / name

        def run(some: list[Candidate], seeds: list[int], *, name: str = name) -> Any:
            return trained(name, some, seeds, plan, features=arguments.features, report=report)

        best = bayes(draw(name, plan.test, 99, arguments.features))
        table.append({"set": name, "operator": "Bayes", **best, "seeds": 0})
        picks, equal = {}, 0.0
        for operator in names:
            tried = candidates(operator)
            tuning = kept(
                root / operator / f"tuning-{len(tune_on)}.json", lambda run=run, tried=tried: run(tried, tune_on)
            )
            rules = [(index, rule) for rule in RULES[arguments.rule] for index in range(len(tried))]
            measured = [mean([seed[f"{rule} validation"] for seed in tuning[index]]) for index, rule in rules]
            pick, rule = picks[operator] = rules[chosen(measured)]
            path = root / operator / f"test-{pick}-{len(seeds)}.json"
            (result,) = kept(path, lambda run=run, one=tried[pick]: run([one], seeds))
            figures = summary([seed[f"{rule} test"] for seed in result], UNPUBLISHED)
            price = f", price {tried[pick][1]}" if tried[pick][1] else ""
            setting = f"{short(tried[pick][0])}{price}, {rule}"
            table.append({"set": name, "operator": operator, "setting": setting, **figures, "seeds": len(seeds)})
            equal = figures["size"][0] if operator == arguments.at_size_of else equal
        for operator in [one for one in names if one in FIXED_SIZE and equal]:
            make = FIXED_SIZE[operator][picks[operator][0] // len(SIZES)]
            low = int(equal)
            both = [
                kept(
                    root / operator / f"at-{picks[operator][0] // len(SIZES)}-{k}-{len(seeds)}.json",
                    lambda run=run, make=make, k=k: run([(make(k=k), 0.0)], seeds),
                )[0]
                for k in (low, low + 1)
            ]
            runs = [between(*pair, equal % 1) for pair in zip(*both, strict=True)]
            row = {"set": f"{name}, size {equal:.2f}", "operator": operator, "setting": f"k = {low} and {low + 1}"}
            table.append(row | summary(runs, UNPUBLISHED) | {"seeds": len(seeds)})
    return table


def between(low: dict[str, Any], high: dict[str, Any], share: float) -> dict[str, float]:
    """Figures of a size between two, as if the larger were used for a share of the samples."""
    return {key: (1 - share) * value + share * high["own test"][key] for key, value in low["own test"].items()}


def known_size(arguments: argparse.Namespace, report: Progress) -> list[dict[str, Any]]:
    """L2X's sets, every operator told the true size, as published; of three settings the best on the first seed."""
    from benchmarks.operators.synthetic import L2X, bayes
    from benchmarks.operators.tabular import draw, l2x_plan, trained

    table = []
    for name in arguments.sets or list(L2X):
        plan = l2x_plan(name, arguments.scale)
        table.append({"set": name, "operator": "Bayes", **bayes(draw(name, plan.test, 99)), "seeds": 0})
        for operator in arguments.operators or list(FIXED_SIZE):
            root = arguments.out / f"l2x-settled-{arguments.scale:g}" / name / operator
            tried = [(one, 0.0) for one in temperatures(operator, L2X[name][1])[:3]]

            def run(some: list[Candidate], seeds: list[int], *, name: str = name, plan: Any = plan) -> Any:
                return trained(name, some, seeds, plan, report=report)

            first = kept(root / "tuning.json", lambda run=run, tried=tried: run(tried, [0]))
            pick = min(range(len(tried)), key=lambda index: first[index][0]["own validation"]["cross_entropy"])
            result = first[pick]
            for start in range(1, arguments.seeds, 3):
                seeds = list(range(start, min(start + 3, arguments.seeds)))
                path = root / f"test-{pick}-{'-'.join(map(str, seeds))}.json"
                result += kept(path, lambda run=run, one=tried[pick], seeds=seeds: run([one], seeds))[0]
            figures = summary([seed["own test"] for seed in result], ("tpr", "fdr", "f1", "size"))
            figures["moving_accuracy"] = interval([seed["moving test"]["accuracy"] for seed in result])
            setting = short(tried[pick][0])
            table.append({"set": name, "operator": operator, "setting": setting, **figures, "seeds": len(result)})
    return table


def bagged(arguments: argparse.Namespace, report: Progress) -> list[dict[str, Any]]:
    """Bags: a row for each way to pool."""
    from benchmarks.operators.bags import POOLS, digits, fashion_or_mnist, trained_bags

    images, labels = digits() if arguments.data is None else fashion_or_mnist(arguments.data)
    seeds = list(range(arguments.first_seed, arguments.first_seed + arguments.seeds))
    table = []
    for count in arguments.bags:
        for pool in arguments.operators or POOLS:
            source = "digits" if arguments.data is None else Path(arguments.data).name
            folder = f"bags-{source}-{arguments.length}-{count}-{arguments.scale:g}"
            path = arguments.out / folder / f"{pool}-{seeds[0]}-{seeds[-1]}.json"

            def measure(pool: str = pool, count: int = count) -> Any:
                sizes = {"count": count, "length": arguments.length, "scale": arguments.scale}
                return trained_bags(pool, images, labels, seeds, **sizes, report=report)

            result = kept(path, measure)
            figures = {key: interval([run[key] for run in result]) for key in result[0]}
            table.append({"set": f"{source}, {count} bags", "operator": pool, **figures, "seeds": arguments.seeds})
    return table


def frontier(arguments: argparse.Namespace, report: Progress) -> list[dict[str, Any]]:
    """Accuracy at equal size on cached features; the best of four temperatures on photos put aside."""
    from benchmarks.operators.cells import features, trained_cells

    if arguments.data is None:
        raise SystemExit("expected --data IMAGE_FOLDER for the frontier, with train and test")
    names = arguments.operators or list(FIXED_SIZE)
    sizes = arguments.sizes or (1, 2, 4, 8, 12)
    tried = [(name, size, one) for name in names for size in sizes for one in temperatures(name, size)]
    sources: list[Any] = []
    runs = []
    for seed in range(arguments.seeds):
        label = "-".join([*names, *map(str, sizes), str(seed)])

        def measure(seed: int = seed) -> Any:
            if not sources:
                sources.extend(features(arguments.data, report))
            operators = [one for _, _, one in tried]
            return trained_cells(operators, *sources, seed, scale=arguments.scale, report=report)

        runs.append(kept(arguments.out / f"frontier-{arguments.scale:g}" / f"{label}.json", measure))
    table = []
    for size in sizes:
        for name in names:
            places = [place for place, (one, at, _) in enumerate(tried) if (one, at) == (name, size)]
            place = max(places, key=lambda place: mean([run[place] for run in runs])["validation"])
            figures = summary([run[place] for run in runs], ("validation",))
            row = {"set": f"{size} cells", "operator": name, "setting": short(tried[place][2])}
            table.append(row | figures | {"seeds": arguments.seeds})
    return table


def images(arguments: argparse.Namespace, report: Progress) -> list[dict[str, Any]]:
    """L2X on patches of images, in its original form and on the cells of a trunk, against the images' size."""
    from benchmarks.operators.image_size import FORMS, NAMES, kept_megabytes, task_of, trained_on

    folder = "digits" if arguments.data is None else Path(arguments.data).name + ("-mark" if arguments.mark else "")
    root = arguments.out / f"images-{folder}-{arguments.scale:g}"
    steps = max(int((1000 if arguments.data is None else 300) * arguments.scale), 5)
    table = []
    for size in arguments.sizes or (SIDES if arguments.data else (8,)):
        for form in FORMS:
            for name in arguments.operators or NAMES:
                runs = []
                for seed in range(arguments.seeds):

                    def measure(size: int = size, form: str = form, name: str = name, seed: int = seed) -> Any:
                        task = task_of(arguments.data, size, seed, marked=arguments.mark)
                        figures = trained_on(form, name, task, seed, steps=steps, report=report)
                        return {**figures, "items": task.items, "kept MB": kept_megabytes(name, task.items, task.k)}

                    runs.append(kept(root / f"{size}-{form}-{name}-{seed}.json", measure))
                figures = summary(runs, ("items", "kept MB"))
                row = {"set": f"{size}x{size}, {runs[0]['items']} patches, {form}", "operator": name}
                table.append(row | figures | {"kept MB": runs[0]["kept MB"], "seeds": len(runs)})
    return table


def gradients(arguments: argparse.Namespace, report: Progress) -> list[dict[str, Any]]:
    """Bias and variance of each operator's gradient against exact enumeration."""
    from benchmarks.operators.gradient_quality import bias_and_variance

    draws = max(int(2000 * arguments.scale), 20)
    return [
        {"set": "N = 8", "operator": name, "setting": short(one)}
        | kept(
            arguments.out / "gradients" / f"{name}-{place}-{draws}.json", lambda one=one: bias_and_variance(one, draws)
        )
        for name in arguments.operators or [*OWN_SIZE, *FIXED_SIZE]
        for place, one in enumerate(temperatures(name, 3))
    ]


def cost(arguments: argparse.Namespace, report: Progress) -> list[dict[str, Any]]:
    """Time and memory, forward and backward."""
    from benchmarks.operators.gradient_quality import cost_of

    return [
        {"set": f"N = {n}", "operator": name}
        | kept(arguments.out / "cost" / f"{name}-{n}.json", lambda name=name, n=n: cost_of(temperatures(name, 8)[0], n))
        for name in arguments.operators or [*OWN_SIZE, *FIXED_SIZE]
        for n in arguments.items
        if n <= 10_000 or name != "simple"  # N steps, one after the other: minutes
    ]


TASKS = {
    "invase": synthetic, "l2x": known_size, "bags": bagged, "frontier": frontier, "images": images,
    "gradients": gradients, "cost": cost,
}  # fmt: skip
RULES = {"threshold": ("threshold",), "own": ("own",), "either": ("own", "threshold")}
"""What is selected at test: over one threshold that validation data chose, by the operator's own rule, or either."""
UNPUBLISHED = ("exact", "median_rank")
"""Figures of L2X's sets that INVASE's are not judged by."""
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
    parser = parser_of(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--sets", nargs="*", help="of invase and l2x; all by default")
    parser.add_argument("--operators", nargs="*", help="by name; all by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0, help="bags: 100 for trials, judged on validation bags")
    parser.add_argument("--scale", type=float, default=1.0, help="of data and steps; 1 is the published size")
    parser.add_argument("--features", type=int, default=11, help="of Syn1 to Syn6: 11 or 100")
    parser.add_argument("--rule", choices=RULES, default="threshold", help="invase: what is selected at test")
    parser.add_argument("--at-size-of", metavar="OPERATOR", help="invase: fixed sizes too at this one's mean size")
    parser.add_argument("--length", type=int, default=10, help="of a bag")
    parser.add_argument("--bags", type=int, nargs="*", default=[50, 100, 200, 500], help="to train on")
    parser.add_argument("--data", help="bags, images: a folder of idx files; frontier, images: of images")
    parser.add_argument("--sizes", type=int, nargs="*", help="frontier: cells, 1 to 12; images: sides, 8 to 224")
    parser.add_argument("--mark", action="store_true", help="images: the class is a mark of 4x4 pixels, anywhere")
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
