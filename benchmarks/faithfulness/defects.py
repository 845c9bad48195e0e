"""Defects of half a percent of the photo: does the explanation of a classifier of tiles lie on them?

    python -m benchmarks.faithfulness.defects magnetic_tiles --out OUT [--sides 224 448] [--picture FILE]

The folder has `images/KIND`, and `masks/KIND` for the kinds with a defect. By stratified folds tf_efficientnet_lite0 is
fine-tuned as a practitioner would on few photos: its last stage and a new head, with mirrored copies. The defects held
out are explained, for the class that the classifier predicts, whether or not it is right: by `bla.explainable`
untrained, and by `bla.fit` on the training photos of the fold. All rankings are cut to the same shares of the tile, and
to the size that the default chooses. By tile, of a selection: does it touch the defect (hit), which share of it is on
the defect (on), which share of the defect is in it (found); and does the best cell touch it (best). Random cells come
first: what chance reaches. If interrupted, rerun the command: it resumes.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

import bla
from benchmarks.faithfulness import own_prediction
from benchmarks.faithfulness.own_prediction import Values, batches, coverage, difference, row, span
from benchmarks.results import kept, parser_of
from bla.comparison.methods import (
    Batch,
    Method,
)
from bla.data.image_sets import ImageSet, Splits, list_images
from bla.data.photo import Transform
from bla.metrics import localise, top_cells
from bla.metrics.statistics import bootstrap
from bla.model.backbones import LITE0, load_backbone
from bla.model.classifier import ExplainableClassifier
from bla.model.compiled import compiled
from bla.progress import show

AREAS = (0.02, 0.04, 0.08)
"""Shares of the tile: 1, 2 and 4 of 7 x 7 cells; 4, 8 and 16 of 14 x 14."""
LEFT_OUT = ("layer-cam", "refine-cam", "c-e-3x3")
"""Of the usual rivals; the last is the default, untrained."""
FROZEN, BATCH, RATE = 6, 32, 1e-3
UNTRAINED, FITTED = "untrained", "fitted"
MEASURES = {"hit": "defects hit", "on": "of the selection on the defect", "found": "of the defect selected"}


def read_tiles(folder: Path) -> ImageSet:
    """The photos with their kinds; the mask of a photo without one is the photo itself, which is never asked for."""
    root = folder / "images"
    paths = sorted(path.relative_to(root) for path in list_images([root]))
    kinds = tuple(sorted({path.parts[0] for path in paths}))
    masks = [Path("..", "masks", path).with_suffix(".png") for path in paths]
    return ImageSet(
        root,
        tuple(path.as_posix() for path in paths),
        np.array([kinds.index(path.parts[0]) for path in paths]),
        kinds,
        masks=tuple(str(mask if (root / mask).exists() else path) for mask, path in zip(masks, paths, strict=True)),
    )


def defective(tiles: ImageSet) -> np.ndarray:
    """Which tiles (N,) have a mask."""
    assert tiles.masks is not None
    return np.array([mask != name for mask, name in zip(tiles.masks, tiles.names, strict=True)])


def halves(model: Any) -> tuple[nn.Module, nn.Module]:
    """The part of an EfficientNet that stays frozen, and the part of its trunk that is trained."""
    first = nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:FROZEN])
    return first, nn.Sequential(*model.blocks[FROZEN:], model.conv_head, model.bn2)


def transform_of(side: int) -> Transform:
    """The whole tile, squashed, for the EfficientNet-Lite."""
    return Transform((side, side), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@torch.no_grad()
def frozen_features(tiles: ImageSet, side: int) -> Tensor:
    """What the frozen part gives for each tile: (N, C, H, W)."""
    model, transform, found = load_backbone(LITE0).eval(), transform_of(side), []
    first: Callable[[Tensor], Tensor] = halves(model)[0]
    first = compiled(halves(model)[0], torch.zeros(2, 3, side, side)) or first
    for start in range(0, len(tiles), BATCH):
        rows = range(start, min(start + BATCH, len(tiles)))
        photos = np.stack([transform.read(tiles.path(each)).pixels for each in rows])
        found.append(first(torch.from_numpy(photos / np.float32(127.5) - 1).movedim(-1, 1)))
        show(f"frozen features, {side} pixels", rows.stop, len(tiles))
    return torch.cat(found)


def fine_tuned(features: Tensor, labels: np.ndarray, kinds: int, epochs: int, seed: int) -> nn.Module:
    """The classifier, its last stage and head trained on the features (N, C, H, W) of the training photos."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: Any = load_backbone(LITE0)
        model.reset_classifier(kinds)
        model.eval()  # batch norms keep their statistics
        tail = halves(model)[1].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW([*tail.parameters(), *model.get_classifier().parameters()], weight_decay=1e-2)
        steps, targets = -(-len(labels) // BATCH), torch.tensor(labels)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
        for epoch in range(epochs):
            for rows in torch.randperm(len(labels)).tensor_split(steps):
                found = features[rows].contiguous(memory_format=torch.channels_last)
                logits = model.forward_head(tail(found.flip(-1) if torch.rand(()) < 0.5 else found))
                loss = functional.cross_entropy(logits, targets[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            show(f"fine-tuning, loss {float(loss.detach()):.3f}", epoch + 1, epochs)
    return model  # type: ignore[no-any-return]


def rivals(classifier: ExplainableClassifier, seed: int) -> list[Method]:
    """Trivial rankings first; all of one pass."""
    return [each for each in own_prediction.rivals(classifier, seed) if each.name not in LEFT_OUT]


def judged(ranking: Tensor, covered: Tensor, sizes: dict[str, Tensor | int]) -> Values:
    """Of rankings and coverage (B, H, W), the measures of each tile at each size, such as "hit 4%", and "best".

    >>> found = judged(torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[[0.0, 0.2, 0.6]]]), {"two": 2})
    >>> {key: round(value, 3) for key, (value,) in found.items()}
    {'best': 0.0, 'hit two': 1.0, 'on two': 0.1, 'found two': 0.25}
    """
    best = top_cells(ranking, 1)
    found = {"best": (best & (covered > 0)).any(dim=(1, 2)).double()}
    for name, size in sizes.items():
        selected = top_cells(ranking, size)
        shares = localise(ranking, selected, covered)
        found[f"hit {name}"] = (selected & (covered > 0)).any(dim=(1, 2)).double()
        found |= {f"on {name}": shares["on_object"], f"found {name}": shares["recall"]}
    return {key: values.tolist() for key, values in found.items()}


def measured(
    splits: Splits, features: Callable[[], Tensor], trained_on: list[int], side: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train on a fold's training photos, explain the defects of the others."""
    train, test, seed, masks = splits.train, splits.test, arguments.seed, arguments.masks[arguments.sides.index(side)]
    assert train.labels is not None
    assert test.labels is not None
    frozen, held_out = features(), np.ones(len(train) + len(test), np.bool_)
    held_out[trained_on] = False
    model: Any = fine_tuned(frozen[trained_on], train.labels, len(train.classes), arguments.epochs, seed)
    tail = halves(model)[1]
    with torch.no_grad():
        said = torch.cat([model.forward_head(tail(each)).argmax(dim=1) for each in frozen[held_out].split(BATCH)])
    right, on = said.numpy() == test.labels, defective(test)
    rows, tiles = np.flatnonzero(on), test.subset(on)
    classifier = bla.explainable(model, transform=transform_of(side), classes=train.classes, name=f"tiles-{side}")
    photos = np.stack([classifier.transform.read(tiles.path(each)).pixels for each in range(len(tiles))])
    last = FITTED if masks else UNTRAINED
    rankings = {method.name: [] for method in rivals(classifier, seed)} | {UNTRAINED: [], last: []}
    own: list[Tensor] = []

    def rank(names: dict[str, Any]) -> None:
        for places, pixels in batches(classifier, photos):
            with torch.no_grad():
                maps = classifier.trunk(pixels)
            targets, where = said[rows[places]], torch.from_numpy(rows[places])
            batch = Batch(maps, targets, where, pixels)
            for name, method in names.items():
                if method is not None:
                    rankings[name].append(method.maps(batch).float().cpu())
                    continue
                with torch.no_grad():
                    selection = classifier.attention(maps)
                rankings[name].append(selection.unbounded.float())
                if name == last:
                    own.append((selection.hard > 0).sum(dim=(1, 2)))

    rank({method.name: method for method in rivals(classifier, seed)} | {UNTRAINED: None})
    if masks:
        bla.fit(classifier, train, masks=masks, seed=seed, cache=arguments.out / "cache")
        rank({FITTED: None})
    whole = {name: torch.cat(parts) for name, parts in rankings.items()}
    covered = coverage(classifier, tiles, tuple(whole[last].shape[1:]))
    assert covered is not None
    cells = covered[0].numel()
    sizes: dict[str, Tensor | int] = {f"{area:.0%}": max(1, round(area * cells)) for area in AREAS}
    sizes["own"] = torch.cat(own)
    if arguments.picture and not arguments.picture.with_suffix(f".{side}.png").exists():
        draw(tiles, whole, sizes["4%"], arguments.picture.with_suffix(f".{side}.png"))
    return {
        "tiles": list(tiles.names),
        "right": right.tolist(),
        "named": right[on].tolist(),
        "cells": cells,
        "own": torch.cat(own).tolist(),
        "titles": {method.name: method.title for method in rivals(classifier, seed)},
        "values": {name: judged(ranking, covered, sizes) for name, ranking in whole.items()},
    }


def draw(tiles: ImageSet, rankings: dict[str, Tensor], size: Any, file: Path) -> None:
    """Twelve tiles, kinds in turn: the defect's outline in red, the cells of CAM and of the default explanation."""
    assert tiles.labels is not None
    assert tiles.masks is not None
    by_kind = [np.flatnonzero(tiles.labels == label) for label in np.unique(tiles.labels)]
    shown = [kind[place] for place in range(12) for kind in by_kind if place < len(kind)][:12]
    side, methods = 200, ("cam", UNTRAINED)
    page = Image.new("RGB", (6 * (side + 8), 4 * (side + 26)), "white")
    for place, index in enumerate(shown):
        with Image.open(tiles.path(index)) as photo, Image.open(tiles.root / tiles.masks[index]) as mask:
            grey = photo.convert("RGB").resize((side, side))
            on = np.asarray(mask.convert("L").resize((side, side), Image.Resampling.NEAREST)) > 0
        inner = on.copy()
        inner[1:-1, 1:-1] &= on[:-2, 1:-1] & on[2:, 1:-1] & on[1:-1, :-2] & on[1:-1, 2:]
        for column, name in enumerate(methods):
            pixels = np.array(grey)
            pixels[on & ~inner | (on & (np.indices(on.shape).min(axis=0) == 0))] = (255, 0, 0)
            tile = Image.fromarray(pixels)
            pen, grid = ImageDraw.Draw(tile), top_cells(rankings[name][index][None], size)[0]
            height, width = side / grid.shape[0], side / grid.shape[1]
            for down, across in grid.nonzero().tolist():
                box = (across * width, down * height, (across + 1) * width - 1, (down + 1) * height - 1)
                pen.rectangle(box, outline=(255, 220, 0), width=2)
            left, top = (2 * (place % 3) + column) * (side + 8), place // 3 * (side + 26)
            page.paste(tile, (left, top + 18))
            title = f"{tiles.classes[tiles.labels[index]]}, {'CAM' if name == 'cam' else 'default'}"
            ImageDraw.Draw(page).text((left + 2, top + 3), title, fill="black")
    page.save(file)


def joined(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """The folds' tiles one after another, by name so that inputs of two sizes pair; without those of empty masks."""
    order = np.argsort(np.concatenate([fold["tiles"] for fold in folds]), kind="stable")
    shares = np.concatenate([fold["values"][UNTRAINED]["on own"] for fold in folds])
    order = order[np.isfinite(shares[order])]
    values = {
        name: {
            key: np.concatenate([fold["values"][name][key] for fold in folds])[order].tolist()
            for key in folds[0]["values"][name]
        }
        for name in folds[0]["values"]
    }
    right = np.concatenate([fold["right"] for fold in folds])
    own = np.concatenate([fold["own"] for fold in folds]) / folds[0]["cells"]
    return {
        "accuracy": bootstrap(right.astype(np.float64)).to_dict(),
        "named": np.concatenate([fold["named"] for fold in folds])[order].tolist(),
        "own": float(own.mean()),
        "titles": folds[0]["titles"] | {UNTRAINED: "default, untrained", FITTED: "default, fitted"},
        "values": values,
    }


def table(by_side: dict[int, dict[str, Any]]) -> str:
    """Markdown: a table for each input and measure, the difference of each default from each rival, and by input."""
    areas, lines = [f"{area:.0%}" for area in AREAS] + ["own"], []
    for side, found in by_side.items():
        low, high = (found["accuracy"][end] for end in ("low", "high"))
        named = np.array(found["named"])
        lines += [f"Input {side}: accuracy {found['accuracy']['mean']:.3f} ({low:.3f} to {high:.3f}), of the"
                  f" {len(named)} defects {named.mean():.3f} named right; own size"
                  f" {found['own']:.1%} of the tile.", ""]  # fmt: skip
        for measure, title in MEASURES.items():
            defaults = [ours for ours in (UNTRAINED, FITTED) if ours in found["values"]]
            apart = [f"{ours} minus it, {area}" for ours in defaults for area in areas]
            lines += row(f"{title}, {side}", *areas, *["best"] * (measure == "hit"), *apart, ruled=True)
            for name, values in found["values"].items():
                keys = [f"{measure} {area}" for area in areas]
                means = [f"{np.mean(values[key]):.3f}" for key in keys + ["best"] * (measure == "hit")]
                apart = [
                    "" if name == ours else span(difference(found["values"][ours][key], values[key]))
                    for ours in defaults
                    for key in keys
                ]
                lines += row(found["titles"][name], *means, *apart)
            lines.append("")
    if len(by_side) > 1:
        (small, first), (large, second) = by_side.items()
        shared = [each for each in second["values"] if each in first["values"]]
        both = np.logical_and(first["named"], second["named"])
        for who, rows in (("all", np.ones_like(both)), (f"the {both.sum()} named right at both", both)):
            for measure, title in MEASURES.items():
                lines += row(f"{title}, {large} less {small}, {who}", *areas[:-1], ruled=True)
                for name in shared:
                    pairs = [
                        [
                            np.array(found["values"][name][f"{measure} {area}"])[rows].tolist()
                            for found in (second, first)
                        ]
                        for area in areas[:-1]
                    ]
                    lines += row(second["titles"][name], *(span(difference(*pair)) for pair in pairs))
                lines.append("")
    return "\n".join([*lines, "95% intervals, paired by tile."])


def main() -> None:
    """Fold by fold; print the tables."""
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, help="a folder with images/KIND and masks/KIND")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 448], help="of the input, in pixels")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--masks", type=int, nargs="+", default=[8, 0], help="masked copies of each photo to fit the"
                        " default on, for each input; 0: untrained alone")  # fmt: skip
    parser.add_argument("--picture", type=Path, help="where to draw twelve tiles, for each input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    tiles = read_tiles(arguments.data)
    by_side = {}
    for side in arguments.sides:
        features = functools.cache(partial(frozen_features, tiles, side))
        places = {name: place for place, name in enumerate(tiles.names)}
        folds = []
        for number, splits in enumerate(tiles.folds(arguments.folds, arguments.seed)):
            rows = [places[name] for name in splits.train.names]
            setting = (side, arguments.epochs, arguments.masks[arguments.sides.index(side)], arguments.seed, number)
            file = arguments.out / f"{'-'.join(map(str, setting))}.json"
            folds.append(kept(file, partial(measured, splits, features, rows, side, arguments)))
        by_side[side] = joined(folds)
    print(json.dumps(by_side) if arguments.json else table(by_side))


if __name__ == "__main__":
    main()
