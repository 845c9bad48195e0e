"""How close masked answers come to the bare passes: the same batches of ready tensors through the same network.

    python -m benchmarks.speed.masked_answers

Bare are the passes alone: of each photo once, and of its masked copies in the same batches. Masked answers also read
the photos, draw the masks, mask, and write. Both take turns; the ratio is the median over the rounds, by the clock and
by processor time, which other work on the machine disturbs less. Weights and photos are random: they change no cost.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from benchmarks.results import parser_of
from bla.data.image_sets import ImageSet
from bla.model.classifier import ExplainableClassifier, explainable
from bla.model.evidence import from_all
from bla.training.masked import Masking, masked_answers


def write_photos(folder: Path, count: int) -> ImageSet:
    """JPEG files of 500 x 375."""
    rng = np.random.default_rng(0)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{index:04}.jpg")
    return ImageSet(folder, tuple(f"{index:04}.jpg" for index in range(count)))


def bare(classifier: ExplainableClassifier, photos: int, count: int) -> Callable[[], tuple[float, float]]:
    """A loop over the passes, which returns its seconds by the clock and of the processor."""
    masking = Masking(classifier, count, "coarse", 0)
    height, width = classifier.transform.size
    ready = classifier.pixels(np.random.default_rng(0).integers(0, 256, (masking.at_once, height, width, 3), np.uint8))
    sizes = [min(masking.photos, photos - start) for start in range(0, photos, masking.photos)]

    @torch.inference_mode()
    def loop() -> tuple[float, float]:
        started = time.perf_counter(), time.process_time()
        for size in sizes:
            parts = [size, *(min(len(ready), size * count - at) for at in range(0, size * count, len(ready)))]
            logits = [from_all(classifier.head, classifier.trunk(ready[:part])) for part in parts]
            torch.cat(logits).cpu()
        return time.perf_counter() - started[0], time.process_time() - started[1]

    return loop


def answered(classifier: ExplainableClassifier, images: ImageSet, count: int) -> tuple[float, float]:
    """Seconds by the clock and of the processor, from the first photo to the last."""
    moments: list[tuple[float, float]] = []

    def report(title: str, done: int, total: int) -> None:
        if total and done in (0, total):
            moments.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        masked_answers(classifier, images, count=count, root=Path(folder), report=report)
    (clock, processor), (clock_after, processor_after) = moments
    return clock_after - clock, processor_after - processor


def main() -> None:
    """Let both take turns, and print their rates and ratio."""
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="*", default=["tf_efficientnet_lite0", "resnet50"])
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = {}
    for name in arguments.models:
        classifier = explainable(timm.create_model(name), name=name).to(arguments.device)
        with tempfile.TemporaryDirectory() as folder:
            images = write_photos(Path(folder), arguments.photos)
            loop = bare(classifier, arguments.photos, arguments.count)
            loop()
            rounds = [(loop(), answered(classifier, images, arguments.count)) for _ in range(arguments.rounds)]
        passes = arguments.photos * (arguments.count + 1)
        clock, processor = (
            statistics.median(passes_alone[kind] / all_of_it[kind] for passes_alone, all_of_it in rounds)
            for kind in (0, 1)
        )
        fastest = [min(taken[which][0] for taken in rounds) for which in (0, 1)]
        figures[name] = {
            "bare": round(passes / fastest[0], 1), "answers": round(passes / fastest[1], 1),
            "ratio": round(clock, 3), "processor_ratio": round(processor, 3),
        }  # fmt: skip
        if not arguments.json:
            print(
                f"{name}: {figures[name]['answers']} masked answers a second, {figures[name]['bare']} bare passes; "
                f"{clock:.0%} by the clock, {processor:.0%} by processor time",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
