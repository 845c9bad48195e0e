"""One sheet: models down, photos across, each explained by an attention that was fitted in about a minute.

    python -m benchmarks.models.contact birds100 --classes 10 --out runs/contact [--models resnet18 ...] [--seconds 60]

makes OUT/contact.png and OUT/contact.json. Each model gets a new linear head and an attention for the photos' classes,
trained on the features of its frozen trunk. Where a model's ImageNet weights cannot be had, its trunk stays random and
the sheet says so: its row shows what the method does on features that mean little, not what a good classifier sees.
"A minute" bounds what is trained on: as many photos as the trunk reads in three quarters of it, by a measured batch.
If interrupted, rerun the command: finished rows are kept.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import bla.runs.run
from benchmarks import results
from benchmarks.results import parser_of
from bla.data.image_sets import ImageSet, Splits
from bla.data.photo import open_photo
from bla.data.published import read_images
from bla.explanations.explanation import Explanation
from bla.explanations.render import overlay
from bla.model.backbones import load_backbone
from bla.model.classifier import ClassifierError, explainable
from bla.progress import show
from bla.training.settings import Settings

MODELS = (
    "tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2", "resnet18", "convnext_atto",
    "mobilenetv3_small_100", "regnety_002", "densenet121", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
)  # fmt: skip
SIDE, LABEL, GAP, LINE = 168, 250, 8, 18
"""Pixels of the sheet: a picture, the column of row labels, between pictures, a line of text."""
INK, QUIET, WRONG = (24, 24, 24), (100, 100, 100), (178, 34, 34)


def some(photos: ImageSet, limit: int, classes: int | None = None) -> ImageSet:
    """The photos of the first classes, at most so many, equally of each."""
    assert photos.labels is not None
    kept = photos.classes[:classes]
    each = max(1, limit // len(kept))
    rows = np.concatenate([np.flatnonzero(photos.labels == label)[:each] for label in range(len(kept))])
    return dataclasses.replace(photos.subset(rows), classes=kept)


def loaded(name: str) -> tuple[nn.Module, str | None]:
    """The classifier, and None or "random" where its weights cannot be had."""
    try:
        return load_backbone(name), None
    except ClassifierError as error:
        reason = str(error).partition("\n")[0][:160]
        show(f"{name}: a random trunk, as {reason}", 0, 0)
        return load_backbone(name, "random"), "random"


def seconds_a_photo(model: nn.Module) -> float:
    """Of its trunk, by the second of two batches."""
    wrapped = explainable(model, head=2)
    pixels = torch.rand(8, 3, *wrapped.transform.size)
    with torch.inference_mode():
        wrapped.trunk(pixels)
        start = time.perf_counter()
        wrapped.trunk(pixels)
    return (time.perf_counter() - start) / len(pixels)


def row(name: str, data: Splits, shown: ImageSet, out: Path, seconds: float) -> dict[str, Any]:
    """Fit the model and explain the photos shown; what the sheet needs to know."""
    model, weights = loaded(name)
    count = int(0.75 * seconds / seconds_a_photo(model))
    split = Splits(some(data.train, 3 * count // 4), some(data.test, count // 4), seeded=data.seeded)
    start = time.perf_counter()
    run = bla.runs.run.train(split, out / f"{name}-{count}", Settings(epochs=10), model=name, weights=weights)
    metrics = run.record["metrics"]
    explanations = run.classifier.explain([shown.path(index) for index in range(len(shown))])
    return {
        "model": name,
        "trunk": "random trunk" if weights else "ImageNet weights",
        "seconds": time.perf_counter() - start,
        "train": len(split.train),
        "test": metrics["images"],
        "baseline": metrics["baseline"]["top1"],
        "hard": metrics["hard"]["top1"],
        "agreement": metrics["agreement"],
        "size": metrics["size"]["mean"],
        "dead": run.record["dead"],
        "cells": metrics["size"]["cells"],
        "explanations": [explanation.to_dict() for explanation in explanations],
    }


def label(found: dict[str, Any]) -> list[tuple[str, tuple[int, int, int]]]:
    """Lines of text for a row, with their colours."""
    name = [(line, INK) for line in textwrap.wrap(found["model"], 30, break_long_words=True)]
    return [
        *name,
        (found["trunk"], WRONG if found["trunk"].startswith("random") else QUIET),
        (f"from all cells {found['baseline']:.2f}", QUIET),
        (f"from the selected {found['hard']:.2f}", QUIET),
        (f"they agree on {found['agreement']:.2f}", QUIET),
        (f"{found['size']:.1f} of {found['cells']} cells", QUIET),
        *([("died: no cell told apart", WRONG)] if found["dead"] else []),
        (f"{found['train']} photos, {found['seconds']:.0f} s", QUIET),
    ]


def sheet(rows: list[dict[str, Any]], shown: ImageSet) -> Image.Image:
    """The photos above, then a row a model: its label, and each photo with the selected cells and what they say."""
    assert shown.labels is not None
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    step, high = SIDE + GAP, SIDE + 2 * LINE + GAP
    canvas = Image.new("RGB", (LABEL + len(shown) * step, (1 + len(rows)) * high), "white")
    draw = ImageDraw.Draw(canvas)
    truths = [shown.classes[index] for index in shown.labels]

    def put(picture: Image.Image, column: int, line: int, text: str, ink: tuple[int, int, int]) -> None:
        left, top = LABEL + column * step, line * high
        canvas.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        for number, part in enumerate(textwrap.wrap(text, 23, max_lines=2, placeholder=" ...")):
            draw.text((left, top + SIDE + 2 + number * (LINE - 3)), part, ink, small)

    photos = [open_photo(shown.path(index)) for index in range(len(shown))]
    draw.text((GAP, GAP), "photo, and its class", INK, font)
    for column, (photo, truth) in enumerate(zip(photos, truths, strict=True)):
        put(photo, column, 0, truth, INK)
    for line, found in enumerate(rows, 1):
        for number, (text, ink) in enumerate(label(found)):
            draw.text((GAP, line * high + GAP + number * LINE), text, ink, font if ink == INK else small)
        for column, record in enumerate(found["explanations"]):
            explanation = Explanation.from_dict(record)
            best = explanation.prediction
            ink = QUIET if best.label == truths[column] else WRONG
            put(overlay(photos[column], explanation), column, line, f"{best.label} {best.probability:.0%}", ink)
    return canvas


def main() -> None:
    """Fit, explain, draw."""
    parser = parser_of(__doc__)
    parser.add_argument("data", help="an image folder with classes, or a data set's name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--classes", type=int, help="the first ones; by default all")
    parser.add_argument("--photos", type=int, default=6, help="shown, of the test photos")
    parser.add_argument("--seconds", type=float, default=60, help="for each model")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    whole, _ = read_images(arguments.data, seed=0)
    train, test = (some(part, len(part), arguments.classes) for part in (whole.train, whole.test))
    data = Splits(train, test, seeded=whole.seeded)
    across = np.linspace(0, len(test) - 1, arguments.photos).astype(np.int64)
    shown = test.subset(across)
    rows = [
        results.kept(arguments.out / f"{name}.json", partial(row, name, data, shown, arguments.out, arguments.seconds))
        for name in arguments.models
    ]
    (arguments.out / "contact.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    sheet(rows, shown).save(arguments.out / "contact.png")
    for found in rows:
        print(", ".join(text for text, _ in label(found)))
    print(arguments.out / "contact.png")


if __name__ == "__main__":
    main()
