"""How long the feature-level metrics take: every figure of `judge_methods`, from a cache on disk.

    python -m benchmarks.speed.judging --out OUT

10,000 maps of the shape that tf_efficientnet_lite0 gives, 1280 x 7 x 7, in float16, memory-mapped as from the cache.
The values are drawn at random: they change no cost. Each method is judged by its own head (accuracy, loss, agreement,
sufficiency, comprehensiveness) and by one common judge (its selection, what it leaves, and the curves over sizes).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.results import parser_of
from bla.metrics import Ranked, judge_methods, top_cells
from bla.progress import show
from bla.training.cache import FeatureCache

CHANNELS, GRID, CLASSES = 1280, 7, 100


def synthetic_cache(folder: Path, count: int) -> FeatureCache:
    """Features (N, 7, 7, 1280), written once."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"features-{count}.npy"
    if not file.exists():
        part = file.with_suffix(".part")
        rng = np.random.default_rng(0)
        written = np.lib.format.open_memmap(part, "w+", np.float16, (count, GRID, GRID, CHANNELS))
        for start in range(0, count, 500):
            stop = min(start + 500, count)
            drawn = rng.standard_normal((stop - start, GRID, GRID, CHANNELS), np.float32)
            written[start:stop] = np.maximum(drawn, 0)
        written.flush()
        part.replace(file)
    return FeatureCache(folder, np.load(file, mmap_mode="r"), np.zeros((count, CHANNELS), np.float32), ())


def main() -> None:
    """Write the features, judge, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--methods", type=int, nargs="*", default=[1, 2], help="how many are judged together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    count = arguments.images
    cache = synthetic_cache(arguments.out, count)
    heads = [nn.Linear(CHANNELS, CLASSES) for _ in range(2)]
    labels = torch.randint(CLASSES, (count,), generator=generator)
    sizes = torch.randint(4, 24, (count,), generator=generator)
    seconds = {}
    for number in arguments.methods:
        ranked = {}
        for method in range(number):
            ranking = torch.rand(count, GRID, GRID, generator=generator)
            ranked[str(method)] = Ranked(ranking, top_cells(ranking, sizes), heads[0 if method == 0 else 1])
        started = time.monotonic()
        judge_methods(
            cache.batch, ranked, labels, judge=nn.Linear(CHANNELS, CLASSES), report=lambda *at: show("judging", *at)
        )
        seconds[number] = round(time.monotonic() - started, 2)
    if arguments.json:
        print(json.dumps({"images": count, "threads": arguments.threads, "seconds": seconds}))
        return
    for number, taken in seconds.items():
        print(f"{count} images, {number} methods, {arguments.threads} threads: {taken} s")


if __name__ == "__main__":
    main()
