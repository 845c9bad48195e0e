"""The shipped explainers on ImageNet photos that they never saw, and what was tried to make them agree more often.

    python -m benchmarks.faithfulness.shipped DATA [--only figures attempts times] [--models NAME ...] [--json]

DATA is a folder of ImageNet photos without class folders, whose names begin with the class's index: 0000_.jpg. A fifth
is held out, as `bla train DATA` holds it out. `attempts` looks at the other four fifths alone, by 5-fold
cross-validation: what is chosen there may then be trained, and measured once on the photos held out.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps

from benchmarks.results import parser_of
from bla.data.image_sets import ImageSet, image_folder
from bla.data.photo import open_photo
from bla.metrics import Accuracy
from bla.model.attention import BoundedLogitAttention
from bla.model.backbones import PACKAGED, load_backbone
from bla.model.classifier import ExplainableClassifier, explainable
from bla.progress import show
from bla.runs.record import run_folder
from bla.runs.run import load
from bla.training.cache import FeatureCache, cached_features
from bla.training.loop import train_networks
from bla.training.measuring import measure
from bla.training.networks import Examples, Networks
from bla.training.settings import Settings

FOLDS = 5
SHIPPED = {"setup": "bla-ph", "threshold": 0.0, "head": "own", "targets": "predictions", "learning_rate": 3e-4}
"""As the cards say."""

ATTEMPTS: dict[str, tuple[dict[str, Any], bool]] = {
    "as shipped": ({}, False),
    "four views of each photo": ({}, True),
    "straight-through .5, a third of the grid": ({"straight_through": 0.5, "mean_size": 1 / 3, "epochs": 10}, False),
    "the same, four views": ({"straight_through": 0.5, "mean_size": 1 / 3, "epochs": 10}, True),
    "class-aware, a third of the grid": (
        {"class_aware": True, "hidden": (64,), "straight_through": 0.5, "mean_size": 1 / 3, "epochs": 10},
        False,
    ),
}
"""Settings beside the shipped ones, and whether mirrored and cropped views are trained on too."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", default=["figures", "times"], choices=["figures", "attempts", "times"])
    parser.add_argument("--models", nargs="+", default=list(PACKAGED), choices=PACKAGED)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for model in options.models:
        if "figures" in tables:
            tables["figures"].append({"model": model, **figures(model, options.data)})
        if "times" in tables:
            tables["times"].append({"model": model, **times(model, options.data, options.rounds)})
        if "attempts" in tables:
            tables["attempts"] += [{"model": model, **row} for row in attempts(model, options.data)]
    print(json.dumps(tables) if options.json else "\n\n".join(map(_markdown, tables.values())))


def figures(model: str, data: Path) -> dict[str, Any]:
    """On the photos held out: the shipped explainer, and the classifier, by the photos' own classes; and folds."""
    splits = image_folder(data)
    classifier = load(model)
    test = _examples(classifier, splits.test)
    networks = Networks(classifier.attention, classifier.head, own_head=True)
    metrics = measure(networks, test)
    plain, hard = Accuracy(), Accuracy()
    labels = torch.tensor([int(name[:4]) for name in splits.test.names])
    with torch.inference_mode():
        features = test.cache.batch(test.rows)
        plain.update(classifier.head(networks.pooled(test, "head")), labels)
        hard.update(classifier.classify(features, networks.attention(features).hard), labels)
    across: dict[str, float] = {}
    for images in (splits.train, splits.whole()):
        crossed = _crossed(model, images, {}, views=False)
        across |= {f"{key}, {FOLDS} folds of {len(images)}": crossed[key] for key in ("agreement", "size")}
    return {
        "agreement": metrics["agreement"],
        "size": metrics["size"]["mean"],
        "cells": metrics["size"]["cells"],
        "share of the grid": metrics["size"]["mean"] / metrics["size"]["cells"],
        **across,
        "top-1 plain": plain.result()["top1"],
        "top-1 hard": hard.result()["top1"],
        "KB shipped": sum(file.stat().st_size for file in run_folder(model).iterdir()) / 1000,
    }


def attempts(model: str, data: Path) -> list[dict[str, Any]]:
    """What each attempt comes to on the photos that are not held out, by cross-validation."""
    train = image_folder(data).train
    return [
        {"attempt": name, **_crossed(model, train, changes, views=views)} for name, (changes, views) in ATTEMPTS.items()
    ]


@torch.inference_mode()
def times(model: str, data: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds a photo of the plain classifier and of the explaining one, on the same batch of 16, in turn."""
    classifier, plain = load(model), load_backbone(model).to(memory_format=torch.channels_last)
    photos = np.stack([classifier.transform.read(path).pixels for path in sorted(data.glob("*.jpg"))[:16]])
    pixels = classifier.pixels(photos).contiguous(memory_format=torch.channels_last)
    classifier = classifier.to(memory_format=torch.channels_last)
    taken: dict[str, list[float]] = {"ms plain": [], "ms explained": []}
    for each in range(rounds + 2):
        for name, network in zip(taken, (plain, classifier), strict=True):
            began = time.perf_counter()
            network(pixels)
            if each >= 2:
                taken[name].append(1000 * (time.perf_counter() - began) / len(pixels))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return medians | {"ratio": medians["ms explained"] / medians["ms plain"]}


def _crossed(model: str, images: ImageSet, changes: dict[str, Any], *, views: bool) -> dict[str, Any]:
    """Agreement and size, each photo's by the fold that did not train on it."""
    classifier = explainable(
        load_backbone(model), name=model, transform=load(model).transform, attention=BoundedLogitAttention
    )
    settings = Settings(**(SHIPPED | changes))
    examples = _examples(classifier, images)
    seen = _views(classifier, images) if views else examples
    count = len(images)
    place = {name: index for index, name in enumerate(images.names)}
    agreed, size, cells = 0.0, 0.0, 0
    for fold in images.folds(FOLDS):
        kept = np.array([place[name] for name in fold.train.names], np.int64)
        held_out = np.array([place[name] for name in fold.test.names], np.int64)
        trained = np.concatenate([kept + start for start in range(0, len(seen), count)])
        with torch.random.fork_rng([]):
            torch.manual_seed(settings.seed)
            networks = Networks(settings.attention(classifier.attention.in_channels), classifier.head, own_head=True)
        train_networks(networks, settings, seen.subset(trained))
        metrics = measure(networks, examples.subset(held_out))
        agreed += metrics["agreement"] * len(held_out) / count
        size += metrics["size"]["mean"] * len(held_out) / count
        cells = metrics["size"]["cells"]
    return {"agreement": agreed, "size": size, "share of the grid": size / cells}


def _examples(classifier: ExplainableClassifier, images: ImageSet) -> Examples:
    return Examples(cached_features(classifier, images, report=show), np.arange(len(images)), None)


def _views(classifier: ExplainableClassifier, images: ImageSet) -> Examples:
    """The photos, their mirror images, their middle (four fifths a side) and its mirror image, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        caches = [_examples(classifier, images).cache]
        for view in ("mirrored", "middle", "middle mirrored"):
            root = Path(folder, view)
            root.mkdir()
            for name in images.names:
                photo = open_photo(images.root / name)
                if "middle" in view:
                    width, height = photo.size
                    photo = photo.crop((width // 10, height // 10, width - width // 10, height - height // 10))
                photo = ImageOps.mirror(photo) if "mirrored" in view else photo
                photo.save(root / name, "JPEG", quality=95)
            caches.append(_examples(classifier, dataclasses.replace(images, root=root)).cache)
    features, pooled = (np.concatenate([getattr(cache, name) for cache in caches]) for name in ("features", "pooled"))
    return Examples(FeatureCache(Path(), features, pooled, ()), np.arange(len(features)), None)


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [
        " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()) for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    main()
