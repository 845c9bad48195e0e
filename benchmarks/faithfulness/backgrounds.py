"""A classifier that learnt the background: does the explanation of a prediction that it misled show the background?

    python -m benchmarks.faithfulness.backgrounds CUB_200_2011 PHOTOS --out OUT [--seeds 3]

After Waterbirds (Sagawa et al. 2020): birds of two groups, by species, are pasted, as the ellipse in their box, onto
photos of two kinds, without labels: the bluest and the greenest by their mean colour. In training 95% of the sea birds
lie on blue photos, and of the land birds on green ones; a linear head on the mean-pooled features of a frozen trunk
learns the groups. Every test bird is made twice, at the same place: on a photo of its own group's kind, the twin, and
on one of the other kind. The classifier is misled where it is right about the twin and wrong about the other: nothing
but the background differs. The misled photos are explained, for the group predicted; every ranking is cut to the same
sizes. Exposed by area: of the selected area, a larger share lies off the bird than of the photo. Exposed by cause: with
the pixels of the selected cells replaced by those of the twin, the answer is right again. Random cells come first: what
chance exposes. If interrupted, rerun the command: it resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

import bla
from benchmarks.faithfulness.defects import FITTED, UNTRAINED, rivals
from benchmarks.faithfulness.own_prediction import Network, Values, batches, difference, fastest, row, span
from benchmarks.results import kept, parser_of
from bla.comparison.methods import Batch, PooledClassifier
from bla.data.image_sets import ImageSet, list_images, mask_coverage
from bla.data.masking import enlarged
from bla.data.photo import Transform
from bla.data.published import read_images
from bla.metrics import localise, top_cells
from bla.metrics.statistics import bootstrap
from bla.model.backbones import LITE0, load_backbone
from bla.model.classifier import ExplainableClassifier

SIDE = 224
BIRD = 0.25
"""Of the photo, the ellipse's area."""
AGREEING = 0.95
LAND = ("Ani", "Blackbird", "Bunting", "Sparrow")
"""Of species of the second group, a part of the name; the others of the data set's first ones live at sea."""
SHARES = (0.12, 0.25, 0.4)
MEASURES = {"area": "exposed by area", "cause": "exposed by cause", "off": "of the selection off the bird"}


class Composite(NamedTuple):
    """A bird on a background: levels (SIDE, SIDE, 3), and where the bird is."""

    pixels: np.ndarray
    bird: np.ndarray


def groups_of(birds: ImageSet) -> np.ndarray:
    """0 at sea, 1 on land: (N,), by species."""
    assert birds.labels is not None
    return np.array([int(any(part in birds.classes[label] for part in LAND)) for label in birds.labels])


def kinds_of(paths: Sequence[Path], count: int) -> list[list[Path]]:
    """The ``count`` bluest photos, and the ``count`` greenest, by a colour's mean less the mean of the two others."""
    colours = []
    for path in paths:
        with Image.open(path) as photo:
            colours.append(np.asarray(photo.convert("RGB").resize((16, 16))).mean(axis=(0, 1)))
    mean = np.array(colours)
    excess = 1.5 * (mean - mean.mean(axis=1, keepdims=True))
    return [[paths[each] for each in np.argsort(-excess[:, colour], kind="stable")[:count]] for colour in (2, 1)]


def composed(bird: Image.Image, box: np.ndarray, background: Image.Image, where: tuple[float, float]) -> Composite:
    """The ellipse in the box, enlarged to a share of the photo, at a place: from 0 to 1 across and down."""
    crop = bird.convert("RGB").crop(tuple(box))  # type: ignore[arg-type]
    scale = (BIRD * 4 / np.pi / (crop.width * crop.height)) ** 0.5 * SIDE
    width, height = (max(1, min(SIDE, round(side * scale))) for side in crop.size)
    left, top = (round(place * (SIDE - side)) for place, side in zip(where, (width, height), strict=True))
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((left, top, left + width - 1, top + height - 1), fill=255)
    photo, layer = background.convert("RGB").resize((SIDE, SIDE)), Image.new("RGB", (SIDE, SIDE))
    layer.paste(crop.resize((width, height)), (left, top))
    return Composite(np.asarray(Image.composite(layer, photo, mask)), np.asarray(mask) > 0)


def on_backgrounds(birds: ImageSet, kinds: np.ndarray, photos: list[list[Path]], seed: int) -> list[Composite]:
    """Each bird on a random photo of its kind (N,), at a place that depends on bird and seed alone."""
    found = []
    assert birds.boxes is not None
    for index, kind in enumerate(kinds):
        rng = np.random.default_rng([seed, index])
        where = (rng.random(), rng.random())
        path = photos[kind][int(rng.integers(len(photos[kind])))]
        with Image.open(birds.path(index)) as bird, Image.open(path) as background:
            found.append(composed(bird, birds.boxes[index][0], background, where))
    return found


def fitted_head(features: Tensor, labels: Tensor, seed: int, steps: int = 300) -> nn.Linear:
    """A linear layer on pooled features (N, C), by logistic regression."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        head = nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        loss = functional.cross_entropy(head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(requires_grad=False)


@torch.no_grad()
def exposed(
    network: Network, pair: tuple[Tensor, Tensor], selected: Tensor, birds: Tensor, groups: Tensor
) -> dict[str, Tensor]:
    """The measures of misled photos, (B,) each: by area, by cause, and the share of the selection off the bird.

    Of pixels (B, 3, h, w) and those of their twins, selections and the birds' coverage (B, H, W), and the right groups.
    """
    off = 1 - localise(selected, selected, birds)["on_object"]
    pixels, twins = pair
    shown = enlarged(selected.float(), pixels)[:, None]
    healed = network(pixels + shown * (twins - pixels)).argmax(dim=1) == groups
    return {"area": (off > 1 - birds.mean(dim=(1, 2))).double(), "cause": healed.double(), "off": off}


def measured(data: ImageSet, test: ImageSet, kinds: list[list[Path]], seed: int, arguments: Any) -> dict[str, Any]:
    """Make the photos, train the head, find the misled photos, explain them."""
    rng = np.random.default_rng(seed)
    halves = [[[paths[each] for each in part] for part in np.array_split(rng.permutation(len(paths)), 2)]
              for paths in kinds]  # fmt: skip
    to_train, to_test = ([half[part] for half in halves] for part in (0, 1))
    groups, wanted = groups_of(data), groups_of(test)
    odd = rng.random(len(groups)) >= AGREEING
    train = on_backgrounds(data, np.where(odd, 1 - groups, groups), to_train, seed)
    twins, photos = (on_backgrounds(test, each, to_test, seed + 1000) for each in (wanted, 1 - wanted))

    transform = Transform((SIDE, SIDE), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    backbone: Any = load_backbone(LITE0)
    channels = int(backbone.num_features)
    wrapped = bla.explainable(backbone, head=nn.Linear(channels, 2), transform=transform, classes=["sea", "land"])

    @torch.no_grad()
    def pooled(some: list[Composite]) -> Tensor:
        levels = np.stack([each.pixels for each in some])
        return torch.cat(
            [wrapped.trunk(pixels)[:, :channels].mean(dim=(2, 3)) for _, pixels in batches(wrapped, levels)]
        )

    head = fitted_head(pooled(train), torch.from_numpy(groups), seed)
    classifier = bla.explainable(backbone, head=head, transform=transform, classes=["sea", "land"], name="backgrounds")
    right, wrong = (head(pooled(each)).argmax(dim=1).numpy() for each in (twins, photos))
    misled = np.flatnonzero((right == wanted) & (wrong != wanted))
    if not len(misled):
        raise SystemExit("expected photos that the background misleads, got none: give more birds or other backgrounds")
    found: dict[str, Any] = {"agreeing": float((right == wanted).mean()), "other": float((wrong == wanted).mean()),
                             "misled": len(misled)}  # fmt: skip
    pairs = [(photos[each], twins[each]) for each in misled]
    options = {"seed": seed, "masks": arguments.masks, "cache": arguments.out / "cache"}
    return found | explained(classifier, train, pairs, torch.from_numpy(wanted[misled]), **options)


def explained(
    classifier: ExplainableClassifier,
    train: list[Composite],
    pairs: list[tuple[Composite, Composite]],
    groups: Tensor,
    **options: Any,
) -> dict[str, Any]:
    """By method and size, the measures of each misled photo, which come with their twins; options are those of fit."""
    photos, twins = (np.stack([pair[place].pixels for pair in pairs]) for place in (0, 1))
    pooled = PooledClassifier(classifier.trunk, classifier.head).eval()
    methods = {method.name: method for method in rivals(classifier, options["seed"])}
    rankings: dict[str, list[Tensor]] = {name: [] for name in (*methods, UNTRAINED, FITTED)}
    own: list[Tensor] = []

    def rank() -> None:
        for rows, pixels in batches(classifier, photos):
            with torch.no_grad():
                features = classifier.trunk(pixels)
                selection = classifier.attention(features)
            rankings[FITTED if classifier.fitted else UNTRAINED].append(selection.unbounded)
            if classifier.fitted:
                own.append((selection.hard > 0).sum(dim=(1, 2)))
                continue
            batch = Batch(features, 1 - groups[rows], torch.arange(rows.start, rows.stop), pixels)
            for name, method in methods.items():
                rankings[name].append(method.maps(batch).float())

    rank()
    bla.fit(classifier, [each.pixels for each in train], **options)
    rank()
    maps = {name: torch.cat(parts) for name, parts in rankings.items()}
    grid = (maps[FITTED].shape[1], maps[FITTED].shape[2])
    birds = torch.from_numpy(np.stack([mask_coverage(each.bird, (0, 0, SIDE, SIDE), grid) for each, _ in pairs]))
    sizes: dict[str, int | Tensor] = {f"{share:.0%}": round(share * birds[0].numel()) for share in SHARES}
    sizes["own"] = torch.cat(own)
    network = fastest(pooled, classifier.pixels(photos[:2]))
    values: dict[str, Values] = {name: {} for name in maps}
    for rows, pixels in batches(classifier, photos):
        others = classifier.pixels(twins[rows])
        for name, ranking in maps.items():
            for size, count in sizes.items():
                some = count[rows] if isinstance(count, Tensor) else count
                shown = exposed(network, (pixels, others), top_cells(ranking[rows], some), birds[rows], groups[rows])
                for measure, each in shown.items():
                    values[name].setdefault(f"{measure} {size}", []).extend(each.tolist())
    titles = {name: method.title for name, method in methods.items()}
    titles |= {UNTRAINED: "default, untrained", FITTED: "default, fitted"}
    return {"values": values, "titles": titles, "own": float(torch.cat(own).double().mean()),
            "bird": float(birds.mean())}  # fmt: skip


def table(trainings: list[dict[str, Any]]) -> str:
    """Markdown: all trainings' misled photos together; each default's difference from each method."""
    first = trainings[0]
    values = {
        name: {key: [value for each in trainings for value in each["values"][name][key]] for key in found}
        for name, found in first["values"].items()
    }
    sizes = [f"{share:.0%}" for share in SHARES] + ["own"]
    means = {key: np.mean([each[key] for each in trainings]) for key in ("agreeing", "other", "own", "bird")}
    lines = [f"{len(trainings)} trainings; right on a twin {means['agreeing']:.3f}, on the other {means['other']:.3f};"
             f" misled {[each['misled'] for each in trainings]}; the bird {means['bird']:.2f} of the photo; own size"
             f" {means['own']:.1f} cells.", ""]  # fmt: skip
    for measure, title in MEASURES.items():
        keys = [f"{measure} {size}" for size in sizes]
        lines += row(title, *sizes, *(f"fitted minus it, {size}" for size in sizes),
                     *(f"untrained minus it, {size}" for size in sizes), ruled=True)  # fmt: skip
        for name, found in values.items():
            shares = [bootstrap(found[key]) for key in keys]
            apart = [
                "" if name == ours else span(difference(values[ours][key], found[key]))
                for ours in (FITTED, UNTRAINED)
                for key in keys
            ]
            lines += row(first["titles"][name], *(f"{each.mean:.3f}" for each in shares), *apart)
        lines.append("")
    return "\n".join([*lines, "95% intervals, paired by photo."])


def main() -> None:
    """Seed by seed; print the tables."""
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, help="birds with boxes: CUB_200_2011 in its own layout")
    parser.add_argument("photos", type=Path, help="a folder of photos, for backgrounds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backgrounds", type=int, default=150, help="photos of each kind, half of them for the test")
    parser.add_argument("--masks", type=int, default=8, help="masked copies of each photo to fit the default on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    splits = read_images(arguments.data)[0]
    kinds = kinds_of(list_images([arguments.photos]), arguments.backgrounds)
    trainings = [
        kept(
            arguments.out / f"{arguments.backgrounds}-{arguments.masks}-{seed}.json",
            partial(measured, splits.train, splits.test, kinds, seed, arguments),
        )
        for seed in range(arguments.seeds)
    ]
    print(json.dumps(trainings) if arguments.json else table(trainings))


if __name__ == "__main__":
    main()
