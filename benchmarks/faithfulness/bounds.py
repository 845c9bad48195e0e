"""Does the head agree with the classifier by the bare bound, where the bound is set on other photos for a mean size?

    python -m benchmarks.faithfulness.bounds EXPLAINER PHOTOS --training TRAINING [--draw 300]

The bound of the explainer is moved so that it selects a share of the grid on average over photos drawn from the folder
TRAINING; PHOTOS are judged by it, all together and by how sure the classifier is of each. Nothing is widened until the
head agrees, as the default explanation is: that agrees always.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.faithfulness.own_prediction import batches, opened, parser_of_explainers, read_photos, read_set, row
from bla.comparison.methods import PooledClassifier
from bla.data.image_sets import ImageSet
from bla.metrics.statistics import bootstrap
from bla.model.classifier import ExplainableClassifier
from bla.training.mean_size import bound_of_mean_size

SHARES = (1 / 4, 1 / 3, 2 / 5)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Photos as the explainer reads them: features (N, C, H, W), classes and probabilities (N,), scores (N, H, W)."""

    features: Tensor
    predicted: Tensor
    sure: Tensor
    unbounded: Tensor


@torch.no_grad()
def read(classifier: ExplainableClassifier, images: ImageSet, rows: np.ndarray) -> Read:
    pooled = PooledClassifier(classifier.trunk, classifier.head).eval()
    photos = read_photos(classifier, images.subset(rows))
    parts = []
    for _, pixels in batches(classifier, photos):
        features = classifier.trunk(pixels)
        sure, predicted = pooled.on_features(features).softmax(dim=1).max(dim=1)
        parts.append((features, predicted, sure, classifier.select(pixels).unbounded.float()))
    return Read(*(torch.cat(values) for values in zip(*parts, strict=True)))


def at_bound(unbounded: Tensor, score: float, least: int) -> Tensor:
    """The cells (N, H, W) at a bound that was moved by ``score``, and never fewer than the ``least`` best."""
    flat = unbounded.flatten(1)
    last = flat.topk(least, dim=1).values[:, -1:]
    return (flat >= last.clamp(max=-score)).reshape(unbounded.shape)


@torch.no_grad()
def agreement(classifier: ExplainableClassifier, photos: Read, selected: Tensor) -> Tensor:
    """Whether the head names the classifier's class from the selected cells, (N,)."""
    weights = selected.float() / selected.sum(dim=(1, 2), keepdim=True)
    return (classifier.classify(photos.features, weights).argmax(dim=1) == photos.predicted).double()


def table(classifier: ExplainableClassifier, training: Read, photos: Read) -> str:
    """Markdown: by the share that the bound was set for, sizes and agreement."""
    count = training.unbounded[0].numel()
    groups = {"all": photos.sure >= 0, "p < .5": photos.sure < 0.5, "p >= .5": photos.sure >= 0.5}
    names = (f"agreement, {name} ({int(those.sum())})" for name, those in groups.items())
    lines = row("set for", "cells, training", "cells", *names, ruled=True)
    for share in SHARES:
        least = classifier.attention.least_about(share * count)
        score, mean = bound_of_mean_size(-training.unbounded.flatten(1), share * count, least)
        selected = at_bound(photos.unbounded, score, least)
        agreed = agreement(classifier, photos, selected)
        parts = [share_of(agreed[those]) for those in groups.values()]
        lines += row(f"{share:.0%}", f"{mean:.1f}", f"{selected.sum() / len(selected):.1f} of {count}", *parts)
    return "\n".join([*lines, "", f"Set on {len(training.sure)} photos; 95% intervals."])


def share_of(agreed: Tensor) -> str:
    """The mean of such photos and its interval; nothing of no photos."""
    if not len(agreed):
        return ""
    found = bootstrap(agreed.numpy())
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def main() -> None:
    """Set the bound, judge, print the table."""
    parser = parser_of_explainers(__doc__)
    parser.add_argument("--training", type=Path, required=True, help="photos that the bound is set on")
    parser.add_argument("--draw", type=int, default=300, help="so many of them at most")
    arguments = parser.parse_args()
    classifier = opened(arguments)
    own, others = read_set(arguments.photos, arguments.limit), read_set(arguments.training, None)
    drawn = np.random.default_rng(arguments.seed).permutation(len(others))[: arguments.draw]
    training, photos = (read(classifier, *each) for each in ((others, drawn), (own, np.arange(len(own)))))
    text = table(classifier, training, photos)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bounds.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
