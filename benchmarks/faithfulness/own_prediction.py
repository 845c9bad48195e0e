"""Does the whole classifier still name its class from the pixels of the best cells alone, and without them?

    python -m benchmarks.faithfulness.own_prediction EXPLAINER PHOTOS --out OUT [--untrained] [--limit 40]
        [--costly 500 [--which rise]] [--protocols 20] [--road 20]

EXPLAINER is a run folder, a shipped explainer, or with --untrained a classifier to wrap as it is. PHOTOS is a folder of
images, with an optional boxes.csv (image, class, left, top, right, bottom), or with folders `images` and `masks`. Every
ranking is cut to the same sizes. The class is the classifier's own, so that no labels are needed. Results are kept by
method and ranking in OUT: those of the rivals serve every explainer of the same classifier, and an interrupted run
resumes. --costly adds the methods that run the network many times. --protocols adds the figures of other papers, on so
many of the photos: average drop, increase and gain, deletion and insertion, single deletion on a 4 x 4 grid; --road
adds ROAD, which takes two seconds for a photo and method. The passes run in ONNX Runtime where it is installed, else
in torch.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.faithfulness.passes import Network, fastest
from benchmarks.results import digest, kept, parser_of
from bla.comparison.methods import (
    RUN,
    Batch,
    ComparisonError,
    Method,
    PooledClassifier,
    c_minus_e,
    cam,
    centre_disc,
    feature_norm,
    grad_cam_family,
    integrated_gradients,
    kernel_shap,
    occlusion,
    random_cells,
    refine_cam,
    rise,
    score_cam,
    smoothed,
)
from bla.comparison.photos import size_of
from bla.data.image_sets import ImageSet, list_images
from bla.data.masking import FILLS, enlarged, filled
from bla.files import write_json
from bla.metrics import localise, places, top_cells
from bla.metrics.pixels import SHARES, confidence_over_shares, deletion_insertion, road, single_deletion
from bla.metrics.statistics import bootstrap, images_to_decide
from bla.model.backbones import load_backbone, weights_digest
from bla.model.classifier import ExplainableClassifier, explainable
from bla.progress import show
from bla.runs.run import load

BATCH = 32
RESULTS = "results.json"
REACHED = {True: "yes", False: "no"}
Values = dict[str, list[float]]
"""By metric and size, such as "kept 12", a value for every photo."""


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """Photos as one classifier sees them, and how it is run.

    Attributes
    ----------
    photos: uint8 (N, h, w, 3).
    coverage: (N, H, W), the share of each cell on the object; None: no objects are known.
    rankings: by method (N, H, W).
    predicted: (N,), the classifier's own class.
    agreement: by "default" and "bound", whether the head names that class from the explainer's own cells, and their
        number; by method and size, whether it does from the best cells: (N,) each.
    cost: by method, milliseconds of processor time for a photo, beyond one pass of the trunk.
    """

    classifier: ExplainableClassifier
    network: Network
    photos: np.ndarray
    coverage: Tensor | None
    rankings: dict[str, Tensor]
    predicted: Tensor
    agreement: dict[str, Tensor]
    cost: dict[str, float]
    sizes: tuple[int, ...]
    fill: str

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """Which photos, and their normalised pixels (B, 3, h, w)."""
        return batches(self.classifier, self.photos)


def batches(classifier: ExplainableClassifier, photos: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(photos), BATCH):
        rows = slice(start, min(start + BATCH, len(photos)))
        yield rows, classifier.pixels(photos[rows]).contiguous(memory_format=torch.channels_last)


def read_set(folder: Path, limit: int | None) -> ImageSet:
    """The first photos of a folder, with their boxes or masks if there are any."""
    root = folder / "images" if (folder / "images").is_dir() else folder
    names = sorted(path.relative_to(root).as_posix() for path in list_images([root]))[:limit]
    masks = None
    if (folder / "masks").is_dir():
        masks = tuple(str(Path("..", "masks", name).with_suffix(".png")) for name in names)
    boxes: tuple[np.ndarray, ...] | None = None
    if (folder / "boxes.csv").is_file():
        by_image: dict[str, list[list[float]]] = {name: [] for name in names}
        with (folder / "boxes.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                sides = [float(row[side]) for side in ("left", "top", "right", "bottom")]
                by_image.setdefault(row["image"], []).append(sides)
        boxes = tuple(np.array(by_image[name]).reshape(-1, 4) for name in names)
    return ImageSet(root, tuple(names), boxes=boxes, masks=masks)


def read_photos(classifier: ExplainableClassifier, images: ImageSet) -> np.ndarray:
    """All photos of a set as the classifier sees them, uint8 (N, h, w, 3)."""
    return np.stack([classifier.transform.read(images.path(row)).pixels for row in range(len(images))])


def rivals(classifier: ExplainableClassifier, seed: int) -> list[Method]:
    """What is compared, in the order of the table: trivial rankings first. CAM is Grad-CAM where no head is linear."""
    pooled = PooledClassifier(classifier.trunk, classifier.head).eval()
    try:
        first = cam(pooled)
    except ComparisonError:
        first = dataclasses.replace(grad_cam_family(pooled, "grad-cam"), name="cam")
    contrast = c_minus_e(pooled)
    return [random_cells(seed), centre_disc(), feature_norm(classifier.attention.earlier), first, smoothed(first),
            *(grad_cam_family(pooled, name) for name in ("grad-cam++", "layer-cam", "finer-cam")), refine_cam(pooled),
            contrast, smoothed(contrast)]  # fmt: skip


def costly_rivals(setting: Setting, passes: int, seed: int) -> list[Method]:
    """Those that run the whole network many times for a photo; the sampled ones fill pixels as the judgement does."""
    pooled = PooledClassifier(setting.classifier.trunk, setting.classifier.head).eval()
    return [score_cam(pooled), integrated_gradients(pooled), occlusion(pooled)] + [
        sampled(setting.network, passes, fill=setting.fill, seed=seed) for sampled in (rise, kernel_shap)
    ]


@torch.no_grad()
def prepare(classifier: ExplainableClassifier, images: ImageSet, methods: list[Method], fill: str) -> Setting:
    """Every method's ranking of every photo, and what the head says from the explainer's own cells."""
    pooled = PooledClassifier(classifier.trunk, classifier.head).eval()
    photos = read_photos(classifier, images)
    parts: dict[str, list[Tensor]] = {method.name: [] for method in methods} | {RUN: [], "predicted": []}
    agreed: dict[str, list[Tensor]] = {}
    sizes: tuple[int, ...] = ()
    cost: dict[str, float] = {}
    for rows, pixels in batches(classifier, photos):
        features = classifier.trunk(pixels)
        cells = features.shape[2] * features.shape[3]
        sizes = tuple(max(1, round(share * cells)) for share in SHARES)
        predicted = pooled.on_features(features).argmax(dim=1)
        batch = Batch(features, predicted, torch.arange(rows.start, rows.stop), pixels)
        found = {method.name: timed(cost, method, batch) for method in methods}
        started = time.process_time()
        classifier.attention(features)
        cost[RUN] = cost.get(RUN, 0.0) + 1000 * (time.process_time() - started)
        chosen = classifier.select(pixels)
        found[RUN] = chosen.unbounded.float()
        at_bound = chosen.unbounded.amax(dim=(1, 2), keepdim=True).clamp(max=0)  # before any widening
        bound = (chosen.unbounded >= at_bound).float()
        own = {"default": chosen.hard, "bound": bound / bound.sum(dim=(1, 2), keepdim=True)}
        own |= {f"{name} {k}": top_cells(maps, k).float() / k for name, maps in found.items() for k in sizes}
        for name, weights in own.items():
            named = classifier.classify(features, weights.to(features)).argmax(dim=1) == predicted
            agreed.setdefault(name, []).append(named.double().cpu())
        for name in ("default", "bound"):
            agreed.setdefault(f"size {name}", []).append((own[name] > 0).sum(dim=(1, 2)).double().cpu())
        for name, values in (*found.items(), ("predicted", predicted)):
            parts[name].append(values.cpu())
        show("ranking cells", rows.stop, len(photos))
    whole = {name: torch.cat(values) for name, values in parts.items()}
    predicted, grid = whole.pop("predicted"), tuple(whole[RUN].shape[1:])
    agreement = {name: torch.cat(values) for name, values in agreed.items()}
    network = fastest(pooled, classifier.pixels(photos[:2]))
    covered = coverage(classifier, images, grid)
    cost = {name: spent / len(photos) for name, spent in cost.items()}
    return Setting(classifier, network, photos, covered, whole, predicted, agreement, cost, sizes, fill)


def timed(cost: dict[str, float], method: Method, batch: Batch) -> Tensor:
    """A method's maps, the milliseconds of processor time added to its cost."""
    started = time.process_time()
    maps = method.maps(batch).float()
    cost[method.name] = cost.get(method.name, 0.0) + 1000 * (time.process_time() - started)
    return maps


def coverage(classifier: ExplainableClassifier, images: ImageSet, grid: tuple[int, ...]) -> Tensor | None:
    """The share of each cell on the object, (N, H, W), 0 for a photo without one."""
    if images.boxes is None and images.masks is None:
        return None
    regions = [classifier.transform.region(size_of(images.path(row))) for row in range(len(images))]
    found = [images.coverage(row, region, (grid[0], grid[1])) for row, region in enumerate(regions)]
    return torch.from_numpy(np.stack([np.zeros(grid) if each is None else each for each in found]))


@torch.no_grad()
def measure(setting: Setting, ranking: Tensor, title: str) -> Values:
    """Kept and removed at every size, and the share of the cells on the object; a value for each photo."""
    found: dict[str, list[float]] = {}
    for rows, pixels in setting.batches():
        fills, wanted = filled(pixels, setting.fill), setting.predicted[rows].to(pixels.device)
        for size in setting.sizes:
            shown = enlarged(top_cells(ranking[rows], size), pixels)[:, None]
            only = fills + shown * (pixels - fills)
            for name, changed in (("kept", only), ("removed", pixels + fills - only)):
                named = setting.network(changed).argmax(dim=1) == wanted
                found.setdefault(f"{name} {size}", []).extend(named.double().tolist())
        show(f"masking by {title}", rows.stop, len(setting.photos))
    if setting.coverage is not None:
        for size in setting.sizes:
            share = localise(ranking, top_cells(ranking, size), setting.coverage)["on_object"]
            found[f"on {size}"] = share.tolist()
    return found


def other_papers(*given: Any) -> dict[str, Tensor]:
    """Average drop, increase and gain, deletion and insertion, single deletion."""
    return {**confidence_over_shares(*given), **deletion_insertion(*given), "idsds": single_deletion(*given)}


PROTOCOLS = {"protocols": other_papers, "road": road}


def other_figures(setting: Setting, ranking: Tensor, name: str, count: int, title: str) -> Values:
    """The figures of other papers, of the first photos; the logits are the classifier's, the mean colour fills."""
    found: dict[str, list[float]] = {}
    for rows, pixels in setting.batches():
        few = slice(rows.start, min(rows.stop, count))
        if few.start >= count:
            break
        given = (setting.network, pixels[: few.stop - few.start], ranking[few], setting.predicted[few])
        for metric, values in PROTOCOLS[name](*given).items():
            found.setdefault(metric, []).extend(values.double().tolist())
        show(f"{name}, {title}", few.stop, count)
    return found


def ranked(setting: Setting, method: Method) -> dict[str, Any]:
    """The maps of all photos by a method that runs the network, and its cost."""
    cost: dict[str, float] = {}
    maps = []
    for rows, pixels in setting.batches():
        for row in range(rows.start, rows.stop):
            one = pixels[row - rows.start : row - rows.start + 1]
            with torch.no_grad():
                features = setting.classifier.trunk(one)
            batch = Batch(features, setting.predicted[row : row + 1], torch.tensor([row]), one)
            maps.append(timed(cost, method, batch)[0].tolist())
            show(method.title, row + 1, len(setting.photos))
    return {"maps": maps, "cost": cost[method.name] / len(setting.photos)}


def difference(one: list[float], other: list[float]) -> dict[str, Any]:
    """The mean paired difference over the photos that have both values, its interval, and the photos to decide it."""
    each = np.array(one, np.float64) - np.array(other, np.float64)
    each = each[np.isfinite(each)]
    return bootstrap(each).to_dict() | {"to_decide": images_to_decide(each)}


def results(setting: Setting, values: dict[str, Values]) -> dict[str, Any]:
    """Means by method, and the explainer's paired differences to each rival, by measure and size."""
    means = {name: {key: float(np.nanmean(each)) for key, each in found.items()} for name, found in values.items()}
    for name, found in means.items():
        keys = {size: f"{name} {size}" for size in setting.sizes if f"{name} {size}" in setting.agreement}
        found |= {f"agree {size}": float(setting.agreement[key].mean()) for size, key in keys.items()}
    differences = {
        key: {name: difference(values[RUN][key], found[key]) for name, found in values.items() if name != RUN}
        for key in values[RUN]
    }
    own = {name: float(setting.agreement[name].mean()) for name in ("default", "bound", "size default", "size bound")}
    return {"photos": len(setting.photos), "sizes": setting.sizes, "fill": setting.fill,
            "cells": setting.rankings[RUN][0].numel(), "own": own, "methods": means, "cost": setting.cost,
            "differences": differences}  # fmt: skip


def aims(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], float | None]]:
    """What the explainer has to reach: a measure, a rival, the paired difference to it, and the least that it must be.

    For what is removed, less is better, and the difference is at most the number given. None: it must be above 0.
    """
    small, middle, large = found["sizes"]
    against_cam: dict[str, float] = {f"kept {small}": 0.08, f"kept {middle}": 0.03, f"kept {large}": 0.0,
                   f"removed {small}": -0.03, f"removed {middle}": -0.02, f"on {middle}": -0.01}  # fmt: skip
    wanted: list[tuple[str, str, float | None]] = [(key, "cam", least) for key, least in against_cam.items()]
    wanted.append((f"on {middle}", "centre", 0.0))
    others = [name for name in found["methods"] if name not in ("cam", RUN)]
    wanted += [(f"kept {size}", name, None) for name in others for size in (small, middle)]
    for key, name, least in wanted:
        if key in found["differences"]:
            yield key, name, found["differences"][key][name], least


def table(found: dict[str, Any], titles: dict[str, str]) -> str:
    """Markdown: kept, removed, the share on the object and the head's agreement; the paired differences; the aims."""
    sizes, middle, differences = found["sizes"], found["sizes"][1], found["differences"]
    shown = [f"{name} {size}" for name in ("kept", "removed") for size in sizes] + [f"on {middle}"]
    shown = [key for key in shown if key in differences]
    lines = row("ranked by", *shown, f"head agrees at {', '.join(map(str, sizes))}", "ms", ruled=True)
    for name, means in found["methods"].items():
        agree = ", ".join(f"{means[key]:.3f}" for key in (f"agree {size}" for size in sizes) if key in means)
        lines += row(titles[name], *(f"{means[key]:.3f}" for key in shown), agree, f"{found['cost'][name]:.1f}")
    lines += ["", *row("its difference from", *shown, ruled=True)]
    for name in found["methods"]:
        if name != RUN:
            lines += row(titles[name], *(span(differences[key][name]) for key in shown))
    lines += ["", *row("aim", "reached", "difference", "photos to decide", ruled=True)]
    own, cells = found["own"], found["cells"]
    lines += row("the head agrees by default", REACHED[own["default"] == 1], f"{own['default']:.3f}", "")
    enough = own["bound"] >= 0.97 and own["size bound"] <= cells / 3
    size = f"{own['bound']:.3f} by {own['size bound']:.1f} of {cells} cells"
    lines += row("by the bound on .97, a third of the grid", REACHED[enough], size, "")
    for key, name, apart, least in aims(found):
        if least is None:
            reached, bound = apart["mean"] > 0, "above 0"
        elif key.startswith("removed"):
            reached, bound = apart["mean"] <= least, f"at most {least:+.2f}"
        else:
            reached, bound = apart["mean"] >= least, f"at least {least:+.2f}"
        aim = f"{key}, against {titles[name]}: {bound}"
        lines += row(aim, REACHED[reached], span(apart), apart["to_decide"] or "")
    return "\n".join([*lines, "", f"{found['photos']} photos, fill {found['fill']}; 95% intervals, paired."])


def row(*cells: object, ruled: bool = False) -> list[str]:
    return [f"| {' | '.join(map(str, cells))} |"] + ["|" + " --- |" * len(cells)] * ruled


def span(row: dict[str, Any]) -> str:
    return f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def parser_of_explainers(documentation: str | None) -> argparse.ArgumentParser:
    """The arguments that name an explainer and photos, which several commands share."""
    parser = parser_of(documentation)
    parser.add_argument("explainer", help="a run folder, a shipped explainer, or with --untrained a classifier")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--untrained", action="store_true", help="wrap the classifier of this name, untrained")
    parser.add_argument("--trust-code", help="package.module:callable, the classifier that a run was trained on")
    parser.add_argument("--limit", type=int, help="so many photos, the first by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser


def opened(arguments: argparse.Namespace) -> ExplainableClassifier:
    """The explainer that the arguments name."""
    with torch.random.fork_rng([]):
        torch.manual_seed(arguments.seed)
        if arguments.untrained:
            classifier = explainable(load_backbone(arguments.explainer))
        else:
            classifier = load(arguments.explainer, model=arguments.trust_code)
    return classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def main() -> None:
    """Rank, mask, judge; print the table."""
    parser = parser_of_explainers(__doc__)
    parser.add_argument("--costly", type=int, default=0, metavar="PASSES", help="the methods of many passes, too")
    parser.add_argument("--which", nargs="+", metavar="METHOD", help="of those of many passes, these only: rise")
    parser.add_argument("--protocols", type=int, default=0, metavar="PHOTOS", help="the figures of other papers")
    parser.add_argument("--road", type=int, default=0, metavar="PHOTOS", help="most and least relevant pixels imputed")
    parser.add_argument("--fill", choices=FILLS, default=FILLS[0])
    arguments = parser.parse_args()
    compare(arguments, (classifier := opened(arguments)), rivals(classifier, arguments.seed))


def compare(arguments: argparse.Namespace, classifier: ExplainableClassifier, methods: list[Method]) -> None:
    """Hold the explainer against these methods, as the arguments say, and print the table."""
    images, seed = read_set(arguments.photos, arguments.limit), arguments.seed
    setting = prepare(classifier, images, methods, arguments.fill)
    weights = weights_digest(PooledClassifier(classifier.trunk, classifier.head))
    seen = [images.digest(), classifier.transform.to_dict(), weights, setting.fill]
    titles = {method.name: method.title for method in methods}
    costly = costly_rivals(setting, arguments.costly, seed) if arguments.costly else []
    for method in [each for each in costly if each.name in (arguments.which or [each.name])]:
        key = digest(seen, seed, method.note, len(images))
        made = kept(arguments.out / f"maps-{method.name}-{key}.json", functools.partial(ranked, setting, method))
        setting.rankings[method.name], setting.cost[method.name] = torch.tensor(made["maps"]), made["cost"]
        titles[method.name] = method.title
    titles[RUN] = f"{classifier.setup}, {'untrained' if arguments.untrained else 'trained'}"
    values = {}
    for name, title in titles.items():
        ranking = setting.rankings[name]
        key = digest(seen, places(ranking).tolist())
        measured = functools.partial(measure, setting, ranking, title)
        values[name] = kept(arguments.out / f"{name}-{key}.json", measured)
        for protocol in PROTOCOLS:
            if count := getattr(arguments, protocol):
                measured = functools.partial(other_figures, setting, ranking, protocol, count, title)
                values[name] |= kept(arguments.out / f"{protocol}-{count}-{name}-{key}.json", measured)
    found = results(setting, values) | {"classifier": classifier.name, "titles": titles, "images": images.digest()}
    write_json(arguments.out / RESULTS, found)
    print(json.dumps(found) if arguments.json else table(found, titles))


if __name__ == "__main__":
    main()
