"""What speed and memory are claimed, measured as ratios in one run. Prints a Markdown table, or JSON.

    python -m benchmarks.speed.performance DATA [--only speedup caching explained memory] [--json]

DATA is an image folder with classes; by default the embedded data set is made and used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import ROOT, parser_of
from bla.data import embedded
from bla.data.image_sets import ImageSet, image_folder
from bla.data.prefetching import prefetch
from bla.model.attention import BoundedLogitAttention
from bla.model.backbones import LITE0, load_backbone
from bla.model.classifier import ExplainableClassifier, explainable
from bla.training.cache import FeatureCache, cached_features
from bla.training.loop import train_networks
from bla.training.measuring import measure
from bla.training.networks import Examples, Networks, new_head
from bla.training.photos import Photos, StreamedFeatures
from bla.training.settings import PAPER, Settings


def speedup(classifier: ExplainableClassifier, train: ImageSet, test: ImageSet, images: int, epochs: int) -> Any:
    """All four setups trained and evaluated from the cache, against the same with the trunk run each time."""
    chosen = np.linspace(0, len(train) - 1, min(images, len(train))).astype(int)
    held_out = np.linspace(0, len(test) - 1, min(images, len(test))).astype(int)
    train, test = train.subset(chosen), test.subset(held_out)
    seconds: dict[str, list[float]] = {"cache": [], "trunk": []}
    with tempfile.TemporaryDirectory() as root:
        cached = [cached_features(classifier, split, root=Path(root)) for split in (train, test)]
        live = [StreamedFeatures(classifier, Photos(split, classifier.transform)) for split in (train, test)]
        for setup in PAPER:
            for name, sources in (("cache", cached), ("trunk", live)):
                settings = Settings(setup=setup, epochs=epochs)
                attention = settings.attention(classifier.attention.in_channels)
                head = new_head(classifier.attention.in_channels, len(train.classes), settings.head.dropout)
                networks = Networks(attention, head, own_head=False)
                examples = [
                    Examples(source, np.arange(len(split)), split.labels)
                    for source, split in zip(sources, (train, test), strict=True)
                ]
                start = time.perf_counter()
                train_networks(networks, settings, examples[0])
                measure(networks, examples[1])
                seconds[name].append(time.perf_counter() - start)
    ratio = sum(seconds["trunk"]) / sum(seconds["cache"])
    return {
        "claim": "training and evaluating all four setups: from the cache, times faster than with the trunk each time",
        "target": 20,
        "value": ratio,
        "by_setup": {s: t / c for s, t, c in zip(PAPER, seconds["trunk"], seconds["cache"], strict=True)},
        "images": len(train) + len(test),
        "epochs": epochs,
    }


def caching(classifier: ExplainableClassifier, images: ImageSet, count: int, rounds: int) -> Any:
    """Images a second into the cache, against decoding, then the trunk, each as fast as it goes on its own."""
    images = images.subset(np.arange(min(count, len(images))))
    shares = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            read = prefetch(pool, classifier.transform.read, map(images.path, range(len(images))), ahead=64)
            photos = [photo.pixels for photo in read]
            with torch.inference_mode():
                for first in range(0, len(photos), 16):
                    classifier.trunk(classifier.pixels(np.stack(photos[first : first + 16])))
            apart = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as root:
                start = time.perf_counter()
                cached_features(classifier, images, root=Path(root))
                shares.append(apart / (time.perf_counter() - start))
    return {
        "claim": "throughput of caching, of that of decoding and trunk back to back (channels last)",
        "target": 0.9,
        "value": statistics.median(shares),
        "rounds": [round(share, 3) for share in shares],
        "images": len(images),
    }


def explained(classifier: ExplainableClassifier, model: torch.nn.Module, batch: int, rounds: int) -> Any:
    """An explained prediction against the plain one: channels last, in turn; ratio of medians."""
    pixels = torch.randn(batch, 3, *classifier.transform.size).contiguous(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {"plain": [], "explained": []}
    calls: dict[str, Callable[[Tensor], Tensor]] = {"plain": model, "explained": classifier}
    with torch.inference_mode():
        for turn in range(rounds + 3):
            for name, call in calls.items() if turn % 2 else reversed(calls.items()):
                start = time.perf_counter()
                call(pixels)
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
    plain, ours = statistics.median(seconds["plain"]), statistics.median(seconds["explained"])
    return {
        "claim": f"time of an explained prediction over the plain one (batch {batch})",
        "target": 1.03,
        "value": ours / plain,
        "milliseconds_an_image": {"plain": plain / batch * 1e3, "explained": ours / batch * 1e3},
        "rounds": rounds,
    }


def memory(images: int) -> Any:
    """Peak anonymous memory of training on four times the data, over that on the data; a process each."""
    peaks = []
    for count in (images, 4 * images):
        command = [sys.executable, "-m", "benchmarks.speed.performance", "--train-on-random-features", str(count)]
        peaks.append(int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout))
    return {
        "claim": "growth of training's anonymous memory when the data grow fourfold",
        "target": 0.10,
        "value": peaks[1] / peaks[0] - 1,
        "megabytes": [round(peak / 1e3, 1) for peak in peaks],
        "images": [images, 4 * images],
    }


def train_on_random_features(count: int) -> int:
    """Train and measure on this many random feature maps on disk; the peak of anonymous memory in kB."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            peak = max(peak, int(anonymous.split()[1]))

    shape = (count, 7, 7, 1280)
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.RandomState(0)
        with Path(folder, "features").open("wb") as file:
            for _ in range(count):
                file.write(random.rand(*shape[1:]).astype(np.float16).data)
        np.memmap(Path(folder, "pooled"), np.float32, "w+", shape=(count, 1280))[:] = 0.5
        features = np.memmap(Path(folder, "features"), np.float16, "r", shape=shape)
        pooled = np.memmap(Path(folder, "pooled"), np.float32, "r", shape=(count, 1280))
        cache = FeatureCache(Path(folder), features, pooled, ())
        examples = Examples(cache, np.arange(count), np.arange(count) % 100)
        settings = Settings(epochs=1)
        networks = Networks(settings.attention(1280), new_head(1280, 100, 0.2), own_head=False)
        watcher = threading.Thread(target=watch)
        watcher.start()
        train_networks(networks, settings, examples)
        measure(networks, examples)
        done.set()
        watcher.join()
    return peak


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("data", nargs="?", help="an image folder with classes")
    parser.add_argument("--only", nargs="*", default=["speedup", "caching", "explained", "memory"])
    parser.add_argument("--images", type=int, default=320, help="images of each split for speedup, and for caching")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="photos of an explained prediction")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--train-on-random-features", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train_on_random_features:
        print(train_on_random_features(arguments.train_on_random_features))
        return
    model = load_backbone(LITE0)
    classifier = explainable(model, attention=BoundedLogitAttention)
    with tempfile.TemporaryDirectory() as folder:
        splits = image_folder(arguments.data or embedded.write(Path(folder, "embedded")))
        benchmarks: dict[str, Callable[[], Any]] = {
            "speedup": lambda: speedup(classifier, splits.train, splits.test, arguments.images, arguments.epochs),
            "caching": lambda: caching(classifier, splits.train, arguments.images, arguments.rounds),
            "explained": lambda: explained(classifier, model, arguments.batch, 5 * arguments.rounds),
            "memory": lambda: memory(1000),
        }
        results = {}
        for name in arguments.only:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            results[name] = benchmarks[name]()
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print("| claim | wanted | measured |\n| --- | --- | --- |")
    for result in results.values():
        print(f"| {result['claim']} | {result['target']} | {result['value']:.3f} |")


if __name__ == "__main__":
    main()
