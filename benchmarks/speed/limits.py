"""How far each path is from its limit: the bare loop of the same decoding and passes, and the machine's roofline.

    python -m benchmarks.speed.limits [PHOTOS] [--only caching serving ...] [--csv FILE]

All in processor time on one thread, bare loop and path in turns; the ratio is the median of bare over path, with the
least and the most. The roofline is max(FLOPs / peak, bytes / bandwidth) of the passes alone, where peak is that of a
float32 product of matrices, bandwidth that of a copy, and bytes are those of weights (a batch) and features. Start-up,
opening files and graphs and a graph's first run, is left out of batch and serving. The profile names where Python
spends most of the path.
"""

from __future__ import annotations

import asyncio
import cProfile
import csv
import dataclasses
import os
import pstats
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import parser_of
from benchmarks.speed.masked_answers import answered, bare, write_photos
from benchmarks.speed.serving import cpu, send, served
from bla.data.image_sets import ImageSet, list_images
from bla.deploy.batch import explain_all
from bla.deploy.batch.cluster import Worker
from bla.deploy.batch.location import Location
from bla.deploy.batch.plan import BATCH_FOLDER, Task, make_plan
from bla.deploy.engine import Engine, open_engine
from bla.model.backbones import LITE0, load_backbone
from bla.model.classifier import ExplainableClassifier, explainable
from bla.model.compiled import session
from bla.training.cache import FeatureCache, cached_features
from bla.training.loop import train_networks
from bla.training.networks import Examples, Networks, new_head
from bla.training.settings import Settings

BATCH = 16
MASKS = 16
CALLS = 3
Loop = Callable[[], float]
"""Does the work once, and returns its processor seconds."""


class Case(NamedTuple):
    """A path beside its bare loop, and what its passes need at least."""

    name: str
    bare: Loop
    ours: Loop
    photos: int
    flops: float
    """Of a photo."""
    moved: float
    """Bytes of a photo that come from memory."""
    seen: Callable[[], object] | None = None
    """What the profile is taken of, where the work is done in threads."""


def machine() -> tuple[float, float]:
    """FLOPs a second of a product of matrices, and bytes a second of a copy, read and written: the best of five."""
    square = torch.rand(1024, 1024)
    source = np.ones(1 << 25)  # 256 MB, beyond any cache
    target = np.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        return min(timed(work)() for _ in range(5))

    return 2 * 1024**3 / best(lambda: square @ square), 2 * source.nbytes / best(lambda: np.copyto(target, source))


def timed(work: Callable[[], object]) -> Loop:
    """The processor seconds of a call."""

    def loop() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return loop


def between(work: Callable[[Callable[[str, int, int], None]], object], after: int = 0) -> Loop:
    """The processor seconds from the report that so many photos are done to the end: start-up is left out."""

    def loop() -> float:
        begun: list[float] = []

        def report(title: str, done: int, total: int) -> None:
            if total and done >= after and not begun:
                begun.append(time.process_time())

        work(report)
        return time.process_time() - begun[0]

    return loop


def paths(only: list[str], classifier: ExplainableClassifier, images: ImageSet, run: str) -> Iterator[Case]:
    """The paths that are asked for, each made when it is its turn."""
    files, transform = [images.path(index) for index in range(len(images))], classifier.transform
    pixels = torch.randn(BATCH, *transform.shape).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        features = classifier.trunk(pixels)
    flops = counter.get_total_flops() / BATCH
    weights = sum(value.numel() for value in classifier.parameters()) * 4 / BATCH
    moved = weights + features[0].numel() * 4
    groups = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]

    def passes(call: Callable[[Any], object], after: int = 0) -> Loop:
        left = groups[after // BATCH :]
        return timed(lambda: [call(np.stack([transform.read(path).pixels for path in group])) for group in left])

    @torch.inference_mode()
    def trunk(photos: Any) -> object:
        return classifier.trunk(classifier.pixels(photos)).numpy()

    if "explained" in only:
        plain = load_backbone(LITE0).eval().to(memory_format=torch.channels_last)
        calls = [timed(lambda call=each: [call(pixels) for _ in range(CALLS)]) for each in (plain, classifier)]
        with torch.inference_mode():
            yield Case("explained prediction, torch", calls[0], calls[1], CALLS * BATCH, flops, moved)
    engine = open_engine(run, threads=1) if {"exported", "batch", "serving"} & {*only} else None
    if engine is not None and "exported" in only:
        part = onnx.utils.Extractor(onnx.load(engine.path)).extract_model(["pixels"], ["classifier_logits"])
        alone, whole = session(part.SerializeToString(), threads=1), session(engine.path, threads=1)
        feeds = {"pixels": pixels.contiguous().numpy()}
        calls = [timed(lambda s=each: [s.run(None, feeds) for _ in range(CALLS)]) for each in (alone, whole)]
        yield Case("explained prediction, exported", calls[0], calls[1], CALLS * BATCH, flops, moved)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if "caching" in only:

            def cache(report: Any) -> None:
                with tempfile.TemporaryDirectory() as root:
                    cached_features(classifier, images, root=Path(root), report=report)

            yield Case("caching", passes(trunk), between(cache), len(files), flops, moved)
        if "training" in only:
            yield _training(folder, classifier)
        if "masked" in only:
            some = images.subset(np.arange(min(8, len(files))))
            passed = bare(classifier, len(some), MASKS)
            ours = lambda: answered(classifier, some, MASKS)[1]  # noqa: E731
            yield Case("masked answers", lambda: passed()[1], ours, len(some) * (MASKS + 1), flops, moved)
        if engine is not None and "batch" in only:
            listed = folder / "list.txt"
            listed.write_text("\n".join(map(str, files)))

            def batch(report: Any) -> None:
                with tempfile.TemporaryDirectory() as out:
                    explain_all(listed, out, engine, workers=1, report=report)

            task, out = Task(source=place, graph=""), Location.of(folder / "out")
            worker = Worker(make_plan(listed, task, out / BATCH_FOLDER), Location.of(engine.path), out)
            shard = dataclasses.asdict(next(worker.reader.plan.shards()))
            begun = len(files) - BATCH  # all but a new graph's first run, which takes longer
            loops = passes(engine.run, BATCH), between(batch, BATCH)
            yield Case("batch", *loops, begun, flops, moved, lambda: worker(shard))
        if engine is not None and "serving" in only:
            yield from _serving(passes(engine.run), engine, files, flops, moved)


def _training(folder: Path, classifier: ExplainableClassifier) -> Case:
    """An epoch of each stage, against the same products, gradients and Adam without checks, log and checkpoint."""
    count, channels, classes = 1024, classifier.attention.in_channels - classifier.attention.earlier, 100
    shape = (count, 7, 7, channels)
    maps = np.memmap(folder / "features", np.float16, "w+", shape=shape)
    maps[:] = np.random.default_rng(0).random(shape[1:], np.float32)
    pooled = np.memmap(folder / "pooled", np.float32, "w+", shape=(count, channels))
    pooled[:] = 0.5
    source, labels = FeatureCache(folder, maps, pooled, ()), np.arange(count) % classes
    settings = Settings(epochs=1)

    def loop() -> None:
        attention, head = settings.attention(channels).train(), new_head(channels, classes, 0.2).train()
        for stage in ("head", "module", "head again"):
            trained = [*head.parameters(), *(attention.parameters() if stage == "module" else ())]
            adam = torch.optim.Adam(trained, 1e-3)
            for rows in np.array_split(np.random.default_rng(0).permutation(count), count // 32):
                if stage != "module":
                    read = source.pooled_batch(rows)
                else:
                    batch = source.batch(rows)
                    read = torch.einsum("bchw,bhw->bc", batch, attention(batch).soft)
                loss = functional.cross_entropy(head(read), torch.from_numpy(labels[rows]))
                adam.zero_grad()
                torch.autograd.backward(loss)
                adam.step()

    def ours() -> None:
        networks = Networks(settings.attention(channels), new_head(channels, classes, 0.2), own_head=False)
        train_networks(networks, settings, Examples(source, np.arange(count), labels))

    # each map is read once, turned to float32, and read by the score, the sum and both gradients
    return Case("training from the cache", timed(loop), timed(ours), count, 8 * 49 * channels, 49 * channels * 22)


def _serving(loop: Loop, engine: Engine, files: list[Path], flops: float, moved: float) -> Iterator[Case]:
    photos = [path.read_bytes() for path in files]
    with served(engine.path, "--workers", "1") as (address, process):
        asyncio.run(send(address, photos, rate=None, room=32))

        def server() -> float:
            start = cpu(process)
            assert asyncio.run(send(address, photos, rate=None, room=32)).statuses == {200: len(photos)}
            return cpu(process) - start

        yield Case("serving", loop, server, len(photos), flops, moved)


def profile(ours: Callable[[], object]) -> str:
    """The functions in which most time is spent, without those that they call, with their shares."""
    profiler = cProfile.Profile()
    profiler.runcall(ours)
    found = pstats.Stats(profiler)
    spent: dict[Any, Any] = vars(found)["stats"]
    each, total = sorted(spent.items(), key=lambda item: -item[1][2])[:4], sum(item[2] for item in spent.values())
    named = [(re.sub(r"<[a-z-]*\s?method '?([\w.]+).*", r"\1", name), item[2] / total) for (_, _, name), item in each]
    return "; ".join(f"{name.rpartition('.')[2]} {share:.0%}" for name, share in named if share >= 0.01)


def main() -> None:
    """Measure in turns, and print a row for each path."""
    parser = parser_of(__doc__)
    parser.add_argument("photos", nargs="?", type=Path)
    names = ["explained", "exported", "caching", "training", "masked", "batch", "serving"]
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--run", default=LITE0)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    peak, bandwidth = machine()
    print(f"{peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s of one thread", flush=True)
    classifier = explainable(load_backbone(LITE0))
    rows = [["path", "bare, ms a photo", "path, ms", "bare over path", "rounds", "roofline, ms", "where its time goes"]]
    with tempfile.TemporaryDirectory() as folder:
        if options.photos is None:
            images = write_photos(Path(folder), options.images)
        else:
            chosen = list_images([options.photos])[: options.images]
            images = ImageSet(Path("/"), tuple(sorted(os.fspath(path.resolve())[1:] for path in chosen)))
        for path in paths(options.only, classifier, images, options.run):
            path.bare()
            turns = [
                (path.bare(), path.ours()) if turn % 2 else (path.ours(), path.bare())[::-1]
                for turn in range(options.rounds)
            ]
            shares = sorted(one / other for one, other in turns)
            taken = [1e3 * statistics.median(times) / path.photos for times in zip(*turns, strict=True)]
            bound = 1e3 * max(path.flops / peak, path.moved / bandwidth)
            spread = f"{shares[0]:.3f} to {shares[-1]:.3f}"
            where = "another process" if path.name == "serving" else profile(path.seen or path.ours)
            figures = [f"{taken[0]:.3g}", f"{taken[1]:.3g}", f"{statistics.median(shares):.3f}", spread, f"{bound:.3g}"]
            rows.append([path.name, *figures, where])
            print(" | ".join(rows[-1]), flush=True)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
