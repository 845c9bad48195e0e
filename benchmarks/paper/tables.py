"""The paper's experiment: setups x data sets x seeds, each beside the mean-pool head trained for as long.

    python -m benchmarks.paper.tables DATA [DATA ...] --out RUNS [--setups bla bla-t ...] [--seeds 5] [--folds 5]

A data set is a folder or a name, as `bla train` takes it. Each run has a folder under RUNS; if interrupted, rerun the
command: it resumes. With --folds the data are pooled and divided anew into so many folds, fold i with seed i; without,
the data's own division is used with each seed. RUNS/paper.md and RUNS/paper.json hold the tables: mean and 95% interval
(Student's t over seeds or folds), of all metrics, of hard minus continued baseline (paired), of time and memory.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import interval, kept, parser_of
from bla.data.published import read_images
from bla.files import cache_root
from bla.progress import show
from bla.runs.run import train
from bla.training.settings import Settings

PREDICTIONS = ("baseline", "baseline_continued", "soft", "soft_renormalised", "hard")
SIZES = (4, 8, 12, 16)


def _agnostic(size: float, **given: Any) -> Settings:
    return Settings.recommended(class_aware=False, hidden=(), mean_size=size, **given)


SETUPS: dict[str, Callable[..., Settings]] = {
    "bla": lambda **given: Settings("bla", **given),
    "bla-t": lambda **given: Settings("bla-t", **given),
    "bla-ph": lambda **given: Settings("bla-ph", **given),
    **{
        f"l2x-f-{variant}-{size}": lambda variant=variant, size=size, **given: Settings(
            "l2x-f", variant=variant, size=size, **given
        )
        for variant in ("official", "corrected")
        for size in (4, 8, 12)
    },
    "recommended": Settings.recommended,
    "recommended-ph": lambda **given: Settings.recommended(setup="bla-ph", **given),
    **{
        f"recommended-{size}": lambda size=size, **given: Settings.recommended(mean_size=size, **given)
        for size in SIZES
        if size != Settings.recommended().selection.mean_size
    },
    **{f"agnostic-{size}": lambda size=size, **given: _agnostic(size, **given) for size in SIZES},
    "agnostic-ph-12": lambda **given: _agnostic(12, setup="bla-ph", **given),
}
"""The paper's four setups, L2X-F in both variants at three sizes, and the recommended one: as it is, with a frozen
head, at other mean sizes, and with the paper's class-agnostic score in place of the class-aware one."""


def settings_of(name: str, seed: int, epochs: int | None, classes: int) -> Settings:
    """A setup; the paper's are trained for its epochs: 2 a stage for two classes, else 5."""
    given: dict[str, Any] = {"seed": seed}
    if epochs is not None:
        given |= {"epochs": epochs, "head_epochs": epochs}
    elif not name.startswith(("recommended", "agnostic")):
        given |= {"epochs": 2 if classes == 2 else 5}
    return SETUPS[name](**given)


def trained(data: str, out: Path, name: str, seed: int, *, folds: int, epochs: int | None) -> dict[str, Any]:
    """The figures of one run. Peak memory is that of this process, which with --jobs 1 or more does nothing else."""
    splits, _ = read_images(data, cache=cache_root(), report=show)
    if folds:
        splits = splits.folds(folds)[seed]
    settings = settings_of(name, seed, epochs, len(splits.train.classes))
    record = train(splits, out, settings).record
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "metrics": record["metrics"],
        "dead": record["dead"],
        "seconds": record["seconds"],
        "megabytes": peak,
        "mean_size": record.get("mean_size"),
        "settings": record["settings"],
        "epochs": record["epochs"],
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and half-width of everything that is tabulated."""
    metrics = [run["metrics"] for run in runs]
    result: dict[str, Any] = {
        f"{name} {kind}": interval([each[name][kind] for each in metrics])
        for name in PREDICTIONS
        for kind in ("loss", "top1", "top5")
    }
    hard, soft = [each["hard"]["top1"] for each in metrics], [each["soft"]["top1"] for each in metrics]
    continued = [each["baseline_continued"]["top1"] for each in metrics]
    return result | {
        "hard - continued": interval([one - other for one, other in zip(hard, continued, strict=True)]),
        "soft - hard": interval([one - other for one, other in zip(soft, hard, strict=True)]),
        "agreement": interval([each["agreement"] for each in metrics]),
        "size": interval([each["size"]["mean"] for each in metrics]),
        "size std": interval([each["size"]["std"] for each in metrics]),
        "seconds": interval([run["seconds"] for run in runs]),
        "megabytes": interval([run["megabytes"] for run in runs]),
        "dead": sum(run["dead"] for run in runs),
        "runs": len(runs),
    }


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """Two tables: accuracy, and what else."""
    first = {
        "baseline": "baseline top1", "continued": "baseline_continued top1", "soft": "soft top1",
        "soft, renormalised": "soft_renormalised top1", "hard": "hard top1", "hard - continued": "hard - continued",
        "agreement": "agreement", "size": "size",
    }  # fmt: skip
    second = {
        f"{label} {kind}": f"{name} {kind}"
        for kind in ("loss", "top5")
        for label, name in {"continued": "baseline_continued", "soft": "soft", "hard": "hard"}.items()
    } | {"seconds": "seconds", "MB": "megabytes", "dead": "dead", "runs": "runs"}
    return "\n\n".join(_rows(table, columns) for columns in (first, second))


def _rows(table: dict[str, dict[str, Any]], columns: dict[str, str]) -> str:
    lines = [f"| setup | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    for setup, row in table.items():
        lines.append(f"| {setup} | {' | '.join(_cell(key, row[key]) for key in columns.values())} |")
    return "\n".join(lines)


def _cell(key: str, value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    digits = 0 if key in ("seconds", "megabytes") else 2 if key.startswith("size") else 3 if "loss" in key else 4
    mean, half = value
    return f"{mean:.{digits}f}" if np.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def _kept(out: Path, data: str, setup: str, seed: int, arguments: Namespace) -> dict[str, Any]:
    run = partial(trained, data, out, setup, seed, folds=arguments.folds, epochs=arguments.epochs)
    figures: dict[str, Any] = kept(out / "figures.json", run)
    return figures


def _results(runs: Sequence[Callable[[], dict[str, Any]]], jobs: int) -> Iterator[dict[str, Any]]:
    """The runs' figures in order, each run in a process, so many at a time; with no jobs, all in this process."""
    if not jobs:
        yield from (run() for run in runs)
        return
    context = multiprocessing.get_context("spawn")  # a forked process would not count the memory of loaded libraries
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for future in [pool.submit(run) for run in runs]:
            yield future.result()


def main() -> None:
    """Train what is missing, write the tables and print them."""
    parser = parser_of(__doc__)
    parser.add_argument("data", nargs="+", help="folders or names of data sets with classes, or embedded")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setups", nargs="*", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=0, help="divide all images anew into so many folds, a run each")
    parser.add_argument("--epochs", type=int, help="of each stage, in place of the setups' own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each; 0: all in this one")
    parser.add_argument("--json", action="store_true", help="print JSON in place of Markdown")
    arguments = parser.parse_args()
    count = arguments.folds or arguments.seeds
    # seed by seed, so that an interrupted benchmark has whole rows of fewer seeds
    jobs = [(data, setup, seed) for data in arguments.data for seed in range(count) for setup in arguments.setups]
    runs = [
        partial(_kept, arguments.out / Path(data).name / f"{setup}-{seed}", data, setup, seed, arguments)
        for data, setup, seed in jobs
    ]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for done, ((data, setup, seed), figures) in enumerate(zip(jobs, _results(runs, arguments.jobs), strict=True), 1):
        found.setdefault((data, setup), []).append(figures)
        print(f"{done} of {len(jobs)}: {data} {setup} {seed}", file=sys.stderr, flush=True)
    tables = {
        Path(data).name: {setup: summary(found[data, setup]) for setup in arguments.setups} for data in arguments.data
    }
    text = "\n\n".join(f"## {data}\n\n{markdown(table)}" for data, table in tables.items())
    (arguments.out / "paper.md").write_text(text + "\n")
    (arguments.out / "paper.json").write_text(json.dumps(tables, indent=1) + "\n")
    print(json.dumps(tables, indent=1) if arguments.json else text)


if __name__ == "__main__":
    main()
