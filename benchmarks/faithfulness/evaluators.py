"""Do networks that never saw the explainer find the class in its cells, in their pixels, in the shape of its masks?

    python -m benchmarks.faithfulness.evaluators EXPLAINER DATA --out OUT [--limit 600]

On the classifier's frozen trunk two evaluators learn the classes of DATA's training photos from random cells (EVAL-X,
Jethani et al. 2021): one from the cells' features, one from photos of which only the cells' pixels are shown. Both name
the class of test photos from every method's best cells (kept) and from the others (removed); the evaluator of pixels
does so for --limit of them. On half of the test photos a *probe* learns the class from the mask alone, and *encoding*
what the mask tells of it beyond the selected features (in nats, after STRIPE-X, Puli et al. 2024); the other half is
reported. Explained are the classifier's own predictions, whatever its classes are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.faithfulness.own_prediction import batches, opened, parser_of_explainers, read_photos, rivals, row, span
from benchmarks.results import digest, kept
from bla.comparison.methods import RUN, Batch, Method, PooledClassifier
from bla.data.image_sets import ImageSet
from bla.data.published import read_images
from bla.metrics import encoding, mask_probe, top_cells, train_evaluator, train_pixel_evaluator
from bla.metrics.fitting import Rows
from bla.metrics.leakage import mean_of_selected
from bla.metrics.pixels import SHARES, kept_and_removed
from bla.metrics.statistics import bootstrap
from bla.model.backbones import weights_digest
from bla.model.classifier import ExplainableClassifier
from bla.model.compiled import compiled
from bla.progress import show

TITLES = {"random": "random cells", "centre": "centre disc", "norm": "feature norm", "cam": "CAM",
          "c-e-3x3": "c - E, 3x3", RUN: "ours"}  # fmt: skip
"""What is compared; the trivial first."""
MEASURES = ("cells kept", "cells removed", "pixels kept", "pixels removed", "probe", "encoding")
Values = dict[str, dict[str, list[float]]]
"""By method and size, by measure, a value for each photo."""


class Photos:
    """Photos (N, h, w, 3), their classes (N,) and features (N, C, H, W) in half precision, and rankings by method."""

    @torch.no_grad()
    def __init__(self, classifier: ExplainableClassifier, images: ImageSet, methods: list[Method]) -> None:
        self.classifier, self.labels = classifier, torch.tensor(images.labels)
        self.photos = read_photos(classifier, images)
        pooled = PooledClassifier(classifier.trunk, classifier.head).eval()
        features, rankings = [], dict[str, list[Tensor]]()
        for rows, pixels in batches(classifier, self.photos):
            maps = classifier.trunk(pixels)
            if methods:
                predicted = pooled.on_features(maps).argmax(dim=1)
                batch = Batch(maps, predicted, torch.arange(rows.start, rows.stop), pixels)
                found = {method.name: method.maps(batch) for method in methods}
                for name, values in (found | {RUN: classifier.select(pixels).unbounded}).items():
                    rankings.setdefault(name, []).append(values.float())
            features.append(maps[:, : maps.shape[1] - classifier.attention.earlier].half())
            show("features of photos", rows.stop, len(self.photos))
        self.features = torch.cat(features)
        self.rankings = {name: torch.cat(values) for name, values in rankings.items()}

    def pixels(self, rows: Rows) -> Tensor:
        """Normalised (B, 3, h, w)."""
        return self.classifier.pixels(self.photos[rows])

    def maps(self, rows: Rows) -> Tensor:
        """Features (B, C, H, W) in single precision."""
        return self.features[rows].float()


@torch.no_grad()
def judge(training: Photos, test: Photos, embed: Callable[[Tensor], Tensor], limit: int, seed: int) -> Values:
    """Train both evaluators and let them judge every method at the two smaller sizes."""
    labels, (height, width) = test.labels, training.features.shape[2:]
    classes = int(training.labels.max()) + 1
    with torch.enable_grad():
        of_cells = train_evaluator(training.maps, training.labels, seed=seed).eval()
        show("the evaluator of pixels", 0, 0)
        of_pixels = train_pixel_evaluator(embed, training.pixels, training.labels, (height, width), seed=seed)
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    (first, second), some = drawn.chunk(2), drawn[:limit].sort().values
    found: Values = {}
    for name, ranking in test.rankings.items():
        for share in SHARES[:2]:
            masks = top_cells(ranking, size := round(share * height * width))
            logits, others = (of_cells(mean_of_selected(test.maps, each)) for each in (masks, ~masks))
            parts = [logits.argmax(dim=1) == labels, others.argmax(dim=1) == labels]
            shown: dict[str, list[Tensor]] = {"kept": [], "removed": []}
            for rows in some.split(32):
                pixels = test.pixels(rows.numpy())
                for kind, values in kept_and_removed(of_pixels, pixels, masks[rows], labels[rows]).items():
                    shown[kind].append(values)
            show(f"pixels of the best cells: {name}, {size}", 0, 0)
            parts += [torch.cat(values) for values in shown.values()]
            half = masks[first], labels[first]
            parts.append(mask_probe(*half, masks[second], labels[second], classes=classes, seed=seed))
            known = {"logits": logits[second], "masks": masks[second], "labels": labels[second]}
            parts.append(encoding(logits[first], *half, **known, seed=seed))
            values = [part.double().tolist() for part in parts]
            found[f"{name} {size}"] = dict(zip(MEASURES, values, strict=True))
    return found


def table(found: Values) -> str:
    """Markdown: every measure by method and size, and the explainer's paired differences."""
    heading = (part for name in MEASURES for part in (name, f"{name}, ours minus it"))
    lines = row("ranked by", "cells", *heading, ruled=True)
    for key, values in found.items():
        method, size = key.rsplit(" ", 1)
        own = found[f"{RUN} {size}"]
        parts = []
        for name in MEASURES:
            apart = bootstrap(np.array(own[name]) - np.array(values[name])).to_dict()
            parts += [f"{np.mean(values[name]):.3f}", "" if values is own else span(apart)]
        lines += row(TITLES[method], size, *parts)
    cells, pixels, masks = (len(next(iter(found.values()))[name]) for name in MEASURES[::2])
    told = f"Photos: {cells}, for pixels {pixels}, for probe and encoding {masks}; 95% intervals, paired."
    return "\n".join([*lines, "", told])


def main() -> None:
    """Train, judge, print the table."""
    parser = parser_of_explainers(__doc__)
    parser.set_defaults(limit=600)
    arguments = parser.parse_args()
    classifier, splits = opened(arguments), read_images(arguments.photos)[0]
    methods = [each for each in rivals(classifier, arguments.seed) if each.name in TITLES]

    def measure() -> Values:
        training, test = Photos(classifier, splits.train, []), Photos(classifier, splits.test, methods)
        channels = training.features.shape[1]
        pooled = nn.Sequential(classifier.trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        quick = compiled(pooled, training.pixels(np.arange(2)).contiguous()) or pooled
        return judge(training, test, lambda pixels: quick(pixels)[:, :channels], arguments.limit, arguments.seed)

    seen = [splits.train.digest(), splits.test.digest(), weights_digest(classifier), arguments.limit, arguments.seed]
    print(table(kept(arguments.out / f"evaluators-{digest(*seen)}.json", measure)))


if __name__ == "__main__":
    main()
