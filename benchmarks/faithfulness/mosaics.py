"""The grid pointing game: of four photos in one picture, do the cells selected for a class lie on the photo of it?

    python -m benchmarks.faithfulness.mosaics EXPLAINER PHOTOS --out OUT [--mosaics 300] [--untrained]

Böhle et al. 2021 (arXiv 2104.00032). Every picture is made of four photos, of different classes by the classifier's
own prediction, which it makes with a probability of at least one half; each has its full size, so the grid is of twice
the sides. Each of the four classes is asked about; every ranking is cut to the same sizes, shares of the grid, and
judged by the share of its cells in the photo's quarter: a quarter by chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.faithfulness.own_prediction import (
    batches,
    difference,
    opened,
    parser_of_explainers,
    read_photos,
    read_set,
    rivals,
    row,
    span,
)
from benchmarks.results import kept
from bla.comparison.methods import RUN, Batch, PooledClassifier
from bla.metrics import grid_pointing, mosaic
from bla.metrics.pixels import SHARES
from bla.model.classifier import ExplainableClassifier
from bla.progress import show

SURE = 0.5
QUARTERS = 4


def predictions(classifier: ExplainableClassifier, photos: np.ndarray) -> tuple[Tensor, Tensor]:
    """The classifier's classes (N,), and their probabilities."""
    pooled = PooledClassifier(classifier.trunk, classifier.head).eval()
    said = [pooled(pixels).softmax(dim=1).max(dim=1) for _, pixels in batches(classifier, photos)]
    return torch.cat([each.indices for each in said]), torch.cat([each.values for each in said])


def draw(classes: Tensor, sure: Tensor, count: int, seed: int) -> Iterator[list[int]]:
    """The photos of each mosaic: four of different classes, drawn anew each time."""
    random, able = np.random.default_rng(seed), np.flatnonzero(sure.numpy() >= SURE)
    if len(np.unique(classes.numpy()[able])) < QUARTERS:
        raise SystemExit(f"expected photos of at least {QUARTERS} classes of which the classifier is sure, got fewer")
    while count:
        chosen = random.choice(able, QUARTERS, replace=False)
        if len(set(classes[chosen].tolist())) == QUARTERS:
            count -= 1
            yield chosen.tolist()


@torch.no_grad()
def measure(classifier: ExplainableClassifier, photos: np.ndarray, count: int, seed: int) -> dict[str, Any]:
    """By method and size, for each mosaic the mean share over its four classes."""
    classes, sure = predictions(classifier, photos)
    methods, found = [each for each in rivals(classifier, seed) if not each.needs_pixels], {}
    for place, chosen in enumerate(draw(classes, sure, count, seed)):
        picture = mosaic(classifier.pixels(photos[chosen])).contiguous(memory_format=torch.channels_last)
        features, targets = classifier.trunk(picture).expand(QUARTERS, -1, -1, -1), classes[chosen]
        batch = Batch(
            features, targets, QUARTERS * place + torch.arange(QUARTERS), picture.expand(QUARTERS, -1, -1, -1)
        )
        maps = {method.name: method.maps(batch).float() for method in methods}
        maps[RUN] = classifier.attention(features, target=targets).unbounded.float()
        for share in SHARES:
            size = max(1, round(share * maps[RUN][0].numel()))
            for name, rankings in maps.items():
                on = grid_pointing(rankings, size).mean()
                found.setdefault(name, {}).setdefault(f"{share:.0%}", []).append(float(on))
        show("mosaics", place + 1, count)
    return {"titles": {method.name: method.title for method in methods}, "shares": found}


def table(found: dict[str, Any], title: str) -> str:
    """Markdown: the share in the right quarter by size, and the explainer's difference from each rival."""
    titles, shares = found["titles"] | {RUN: title}, found["shares"]
    lines = row("ranked by", *(f"in the quarter, {size} of the cells" for size in shares[RUN]),
                *(f"ours minus it, {size}" for size in shares[RUN]), ruled=True)  # fmt: skip
    for name, by_size in shares.items():
        means = [f"{np.mean(values):.3f}" for values in by_size.values()]
        apart = ["" if name == RUN else span(difference(shares[RUN][size], by_size[size])) for size in by_size]
        lines += row(titles[name], *means, *apart)
    return "\n".join([*lines, "", f"{len(shares[RUN]['12%'])} mosaics; 95% intervals, paired."])


def main() -> None:
    """Make the mosaics, ask about each class, print the table."""
    parser = parser_of_explainers(__doc__)
    parser.add_argument("--mosaics", type=int, default=300)
    arguments = parser.parse_args()
    classifier = opened(arguments)
    images = read_set(arguments.photos, arguments.limit)
    photos = read_photos(classifier, images)

    def measured() -> dict[str, Any]:
        return measure(classifier, photos, arguments.mosaics, arguments.seed)

    found = kept(arguments.out / f"mosaics-{classifier.setup.split()[0]}-{arguments.mosaics}.json", measured)
    print(json.dumps(found) if arguments.json else table(found, classifier.setup))


if __name__ == "__main__":
    main()
