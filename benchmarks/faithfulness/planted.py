"""Planted evidence: does the explanation show what the prediction was made from, where that is known?

    python -m benchmarks.faithfulness.planted birds100 --out OUT

Photos of the first classes of an image folder, and a mark: a small picture (the face of scikit-image's cat) pasted at a
random place. Two classifiers are trained on the features of a frozen trunk:

- told: every photo is of the class "marked" or of the class "plain", whatever it shows: nothing but the mark tells;
- biased: the classes are the folder's, and a share of the training photos of all other classes carries the mark and the
  label of the first class: poisoned, after BadNets (arXiv 1708.06733). The shortcut competes with what the photo shows.

That the second one is biased is measured: how many test photos of other classes it gives to the first class
with the mark, and how many of the same photos without. Explained are the photos that the mark misled, by the prediction
from the selected cells and by the one from all cells (which is what CAM explains). A mark is covered where the selected
cells hold at least half of its area; every method is cut to the run's sizes. Of what `bla.explainable` and `bla.fit`
give by default for the mean-pooled classifier, the photos that misled it are explained: at the run's sizes (equal), at
those that it chooses (own), and by the cells without which the head no longer says the class (decisive).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image

import bla
import bla.runs.run
from benchmarks.results import parser_of
from bla.comparison import catalogue
from bla.comparison.methods import RUN
from bla.comparison.photos import find_photos
from bla.data.image_sets import ImageSet, Splits, image_folder
from bla.metrics import localise, top_cells
from bla.metrics.statistics import bootstrap
from bla.progress import show
from bla.training.settings import Settings

SIDE = 224
MARK = 72
"""Pixels a side, of photos of 224: a tenth of the area. Chosen among several marks by how far it misled a linear head
on mean-pooled features, before any module was trained: chequers and rings, or 56 pixels, mislead less."""
FACE = (105, 10, 355, 260)
POISONED = 0.25
SETTINGS = {"BLA": Settings(epochs=20), "recommended": Settings.recommended(epochs=20, head_epochs=20)}
METHODS = ("random", "centre", "norm", "cam", "c-e", RUN, "grad-cam++", "layer-cam")
DEFAULTS = ("untrained", "fitted")
SIZES = ("equal", "own", "decisive")


@functools.cache
def face() -> Image.Image:
    """The mark."""
    return Image.fromarray(skimage.data.chelsea()).crop(FACE).resize((MARK, MARK))


def marked(photo: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The photo with the mark at a random place, and the mark's box."""
    left, top = (int(rng.integers(side - MARK)) for side in photo.size)
    photo = photo.copy()
    photo.paste(face(), (left, top))
    return photo, (left, top, left + MARK, top + MARK)


def image_set(photos: ImageSet, folder: Path, kind: str, split: str, seed: int) -> ImageSet:
    """Write the photos, some of them marked, and know where their marks are."""
    assert photos.labels is not None
    classes = ("marked", "plain") if kind == "told" else photos.classes
    rng = np.random.default_rng([seed, split == "test"])
    found = []
    for index, label in enumerate(photos.labels):
        with Image.open(photos.path(index)) as opened:
            photo = opened.convert("RGB").resize((SIDE, SIDE))
        if kind == "told":
            versions = [(0, True) if index % 2 == 0 else (1, False)]
        elif label == 0:
            versions = [(0, False)]
        elif split == "train":
            versions = [(0, True) if rng.random() < POISONED else (int(label), False)]
        else:
            versions = [(int(label), False), (int(label), True)]
        for name, mark in versions:
            image, box = marked(photo, rng) if mark else (photo, None)
            path = Path(split, classes[name], f"{index:04d}-{'marked' if mark else 'plain'}.png")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / path, compress_level=1)
            found.append((path.as_posix(), name, [] if box is None else [box]))
    found.sort()
    names, labels, boxes = zip(*found, strict=True)
    return ImageSet(folder, names, np.array(labels), classes, boxes=tuple(np.array(box) for box in boxes))


def some_classes(photos: ImageSet, count: int, limit: int | None) -> ImageSet:
    """The photos of the first classes, the first ones of each."""
    assert photos.labels is not None
    kept = photos.subset(np.concatenate([np.flatnonzero(photos.labels == label)[:limit] for label in range(count)]))
    return dataclasses.replace(kept, classes=photos.classes[:count])


@torch.no_grad()
def measured(data: Splits, arguments: argparse.Namespace, kind: str, name: str, seed: int) -> dict[str, Any]:
    """Train on one of the sets; whether each explanation of a marked photo covers the mark."""
    out, folder = arguments.out, arguments.out / f"{kind}-{seed}"
    splits = Splits(
        image_set(data.train, folder, kind, "train", seed),
        image_set(data.test, folder, kind, "test", seed),
        seeded=False,
    )
    with torch.enable_grad():
        opened = bla.runs.run.train(splits, out / f"run-{kind}-{name}-{seed}", SETTINGS[name].replace(seed=seed))
    subjects = find_photos(opened, splits, limit=None, seed=seed, cache=None, report=show)
    batch, predicted = subjects.batch(np.arange(len(subjects))), subjects.predicted
    setting = catalogue.Setting(subjects, seed=seed, report=show)
    own = catalogue.METHODS[RUN].build(setting)
    assert own.select is not None
    assert subjects.coverage is not None
    assert subjects.labels is not None
    sizes = own.select(batch).selected.sum(dim=(1, 2)).cpu()
    hard = opened.classifier.attention(batch.features).hard
    named = opened.classifier.classify(batch.features, hard).argmax(dim=1).cpu()
    mark = subjects.coverage.flatten(1).sum(1) > 0
    others = torch.ones_like(mark) if kind == "told" else subjects.labels != 0
    rows = mark & others & (named == 0) & (predicted == 0)
    found: dict[str, Any] = {
        "accuracy": float((named == subjects.labels)[~mark if kind == "biased" else others].double().mean()),
        "first_if_marked": float((named == 0)[mark & others].double().mean()),
        "first_if_plain": float((named == 0)[~mark & others].double().mean()),
        "explanations": int(rows.sum()),
        "size": float(sizes[rows].double().mean()),
        "covered": {},
    }
    for method in METHODS:
        with torch.enable_grad():
            ranking = catalogue.METHODS[method].build(setting).maps(batch).cpu()
        recall = localise(ranking, top_cells(ranking, sizes), subjects.coverage)["recall"][rows]
        found["covered"][method] = (recall >= 0.5).tolist()
    with torch.enable_grad():
        found["default"] = of_defaults(setting, splits.train, rows, sizes, arguments)
    return found


def of_defaults(
    setting: catalogue.Setting, train: ImageSet, rows: torch.Tensor, equal: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """By default explanation of the pooled classifier its sizes, and whether it covers the mark, photo by photo."""
    subjects, chosen = setting.photos, torch.nonzero(rows)[:, 0]
    assert subjects.coverage is not None
    own = subjects.run.classifier
    wrapped = bla.explainable(setting.pooled, transform=own.transform, classes=own.classes, name="pooled")
    found = {}
    for default in DEFAULTS:
        if default == "fitted":
            bla.fit(wrapped, train, masks=arguments.masks, seed=setting.seed, cache=arguments.out / "cache")
        parts: dict[str, list[float]] = {}
        for index in chosen.tolist():
            (explanation,) = wrapped.explain(subjects.path(index))
            assert explanation.sizes is not None
            ranking = torch.tensor(explanation.unbounded)[None]
            counts = (int(equal[index]), explanation.size, explanation.sizes.decisive)
            for name, size in zip(SIZES, counts, strict=True):
                recall = localise(ranking, top_cells(ranking, size), subjects.coverage[index][None])["recall"]
                parts.setdefault(f"covered {name}", []).append(float(recall >= 0.5))
                parts.setdefault(f"size {name}", []).append(float(size))
        found[default] = parts
    return found


def summary(trainings: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over trainings; shares covered with intervals over all explanations, and over trainings."""
    found: dict[str, Any] = {
        key: float(np.mean([training[key] for training in trainings]))
        for key in ("accuracy", "first_if_marked", "first_if_plain", "explanations", "size")
    }
    found["covered"] = {
        method: bootstrap(
            np.concatenate([np.array(training["covered"][method], np.float64) for training in trainings])
        ).to_dict()
        for method in METHODS
    }
    found["default"] = {
        default: {
            name: bootstrap(np.concatenate([training["default"][default][name] for training in trainings])).to_dict()
            for name in trainings[0]["default"][default]
        }
        for default in DEFAULTS
    }
    found["by_training"] = [float(np.mean(training["covered"][RUN])) for training in trainings]
    return found


def main() -> None:
    """Make, train, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, help="an image folder with classes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=8, help="the first ones of the folder")
    parser.add_argument("--photos", type=int, help="of each class, to train on and to test; by default all")
    parser.add_argument("--kinds", nargs="*", choices=("told", "biased"), default=["told", "biased"])
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--masks", type=int, default=32, help="masked copies of each photo to fit the default on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    whole = image_folder(arguments.data)
    data = Splits(
        *(some_classes(part, arguments.classes, arguments.photos) for part in (whole.train, whole.test)), seeded=False
    )
    results = {
        f"{kind}, {name}": summary([measured(data, arguments, kind, name, seed) for seed in range(arguments.seeds)])
        for kind in arguments.kinds
        for name in arguments.settings
    }
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    columns = ("accuracy", "first_if_marked", "first_if_plain", "explanations", "size")
    print(f"| training | {' | '.join(columns)} | {' | '.join(METHODS)} |")
    print(f"|{' --- |' * (1 + len(columns) + len(METHODS))}")
    for title, found in results.items():
        figures = [f"{found[column]:.3f}" for column in columns]
        shares = [
            f"{share['mean']:.2f} [{share['low']:.2f}, {share['high']:.2f}]" for share in found["covered"].values()
        ]
        print(f"| {title} | {' | '.join(figures + shares)} |")
    print(f"\n| default, by the pooled classifier | {' | '.join(f'{name}: covered | cells' for name in SIZES)} |")
    print(f"|{' --- |' * (1 + 2 * len(SIZES))}")
    for title, found in results.items():
        for default, parts in found["default"].items():
            covered = [parts[f"covered {name}"] for name in SIZES]
            means = [parts[f"size {name}"]["mean"] for name in SIZES]
            figures = [
                f"{share['mean']:.2f} [{share['low']:.2f}, {share['high']:.2f}] | {mean:.1f}"
                for share, mean in zip(covered, means, strict=True)
            ]
            print(f"| {title}, {default} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
