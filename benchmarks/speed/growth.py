"""How processor time and memory grow with photos, classes, cells and channels: training from the cache, and measuring.

    python -m benchmarks.speed.growth [--only photos classes cells channels] [--json]

Features are random, on disk, and drawn anew for each point; every point is a process. Seconds are of the processor, an
epoch of each stage in batches of 512, and memory is the peak that is not of files. The exponent is the slope of log
seconds over the log of what grows, over the last decade, where what does not grow no longer counts.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.results import ROOT, parser_of
from bla.training.cache import FeatureCache
from bla.training.loop import train_networks
from bla.training.measuring import measure
from bla.training.networks import Examples, Networks, new_head
from bla.training.settings import Settings

USUAL = {"photos": 4096, "classes": 10, "cells": 49, "channels": 8}
GROWS = {
    "photos": (1_000, 10_000, 100_000, 1_000_000),
    "classes": (10, 100, 1_000, 21_000),
    "cells": (49, 256, 1_024, 4_096),
    "channels": (8, 64, 512, 2_048),
}
_BATCH = 512


def point(photos: int, classes: int, cells: int, channels: int) -> tuple[float, int]:
    """Seconds of the processor, and the peak of memory in kB."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak = max(peak, int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]))

    side = math.isqrt(cells)
    shape = (photos, side, side, channels)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        draws = np.random.default_rng(0)
        with Path(folder, "features").open("wb") as file:
            for start in range(0, photos, _BATCH):
                file.write(draws.random((min(_BATCH, photos - start), *shape[1:]), np.float32).astype(np.float16).data)
        features = np.memmap(Path(folder, "features"), np.float16, "r", shape=shape)
        np.memmap(Path(folder, "pooled"), np.float32, "w+", shape=(photos, channels))[:] = 0.5
        pooled = np.memmap(Path(folder, "pooled"), np.float32, "r", shape=(photos, channels))
        examples = Examples(
            FeatureCache(Path(folder), features, pooled, ()), np.arange(photos), np.arange(photos) % classes
        )
        settings = Settings(epochs=1, batch_size=_BATCH)
        networks = Networks(settings.attention(channels), new_head(channels, classes, 0.2), own_head=False)
        threading.Thread(target=watch, daemon=True).start()
        began = time.process_time()
        train_networks(networks, settings, examples)
        measure(networks, examples)
        seconds = time.process_time() - began
        done.set()
    return seconds, peak


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="*", default=list(GROWS), choices=list(GROWS))
    parser.add_argument("--most", type=int, default=10**9, help="leave out points beyond this; two are needed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--point", type=json.loads)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(point(**arguments.point)))
        return
    found = {}
    for name in arguments.only:
        found[name] = []
        for value in (value for value in GROWS[name] if value <= arguments.most):
            asked = json.dumps(USUAL | {name: value})
            command = [sys.executable, "-m", "benchmarks.speed.growth", "--point", asked]
            said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            seconds, memory = json.loads(said.splitlines()[-1])
            found[name].append({name: value, "seconds": round(seconds, 2), "megabytes": round(memory / 1e3, 1)})
            print(found[name][-1], file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(found))
        return
    print("| | points | processor seconds | memory, MB | exponent |\n| --- | --- | --- | --- | --- |")
    for name, rows in found.items():
        before, last = rows[-2:]
        exponent = math.log(last["seconds"] / before["seconds"]) / math.log(last[name] / before[name])
        columns = (", ".join(f"{row[key]:,}" for row in rows) for key in (name, "seconds", "megabytes"))
        print(f"| {name} | {' | '.join(columns)} | {exponent:.2f} |")


if __name__ == "__main__":
    main()
