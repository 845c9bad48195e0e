"""What ONNX Runtime's threads and batches cost: milliseconds a photo, by the clock and of the processor.

    python -m benchmarks.speed.threads [EXPLAINER ...] [--csv FILE]

An explainer is a run, a shipped explainer's name or an exported graph. Every setting runs in every round, in an order
that turns; medians over the rounds. Spinning threads wait for work by running, which ONNX Runtime does by default.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.results import parser_of
from bla.data.prefetching import cores
from bla.deploy.engine import open_engine

Setting = tuple[str, int, int, str]
"""Model, batch, threads, spinning."""


def session(graph: Path, threads: int, spinning: str) -> onnxruntime.InferenceSession:
    """A graph with the threads of its own."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning == "yes")))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def measured(runs: dict[Setting, Callable[[], object]], photos: int, rounds: int) -> dict[Setting, list[float]]:
    """Milliseconds a photo of each setting, by the clock and of the processor."""
    taken: dict[Setting, list[tuple[float, float]]] = {setting: [] for setting in runs}
    order = list(runs)
    for turn in range(rounds):
        for setting in order[turn % len(order) :] + order[: turn % len(order)]:
            calls = max(1, photos // setting[1])
            begun, cost = time.perf_counter(), time.process_time()
            for _ in range(calls):
                runs[setting]()
            each = 1e3 / (calls * setting[1])
            taken[setting].append((each * (time.perf_counter() - begun), each * (time.process_time() - cost)))
    return {setting: [*map(statistics.median, zip(*times, strict=True))] for setting, times in taken.items()}


def main() -> None:
    """Measure, print, and write a row for each setting."""
    parser = parser_of(__doc__)
    parser.add_argument("explainers", nargs="*", default=["tf_efficientnet_lite0"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--photos", type=int, default=32, help="in a round of a setting")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    runs: dict[Setting, Callable[[], object]] = {}
    for explainer in options.explainers:
        engine = open_engine(explainer)
        shape = engine.transform.shape
        for threads, spinning in sorted({(1, "no"), (cores(), "no"), (cores(), "yes")}):
            graph = session(engine.path, threads, spinning)
            for batch in options.batches:
                feeds = {"pixels": np.random.default_rng(0).standard_normal((batch, *shape), np.float32)}
                runs[engine.card.model, batch, threads, spinning] = lambda g=graph, f=feeds: g.run(None, f)
    for run in runs.values():
        run()
    rows = measured(runs, options.photos, options.rounds)
    head = ["classifier", "batch", "threads", "spinning", "ms a photo", "processor ms a photo"]
    lines = [head, *([*map(str, setting), *(f"{value:.1f}" for value in times)] for setting, times in rows.items())]
    for line in lines:
        print(" | ".join(line))
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    main()
