"""Does a size chosen for each photo keep more predictions than one size for all photos?

    python -m benchmarks.faithfulness.sizes EXPLAINER PHOTOS --out OUT [--limit 300]

All rules take the explainer's best cells and differ in how many. *bound*: those at the bound, moved to a share of the
grid on average. *head*: the fewest from which the head gives the classifier's class a probability of at least the
level; it costs no further pass. *classifier*: the fewest whose pixels alone do so, as P2P (Vandenhirtz and Vogt 2025)
selects superpixels up to a certainty; it takes a pass for every size tried, and asks what is then judged. Each is
compared with one size for all photos, mixed of two neighbouring sizes so that the mean is the same. Kept and removed
are as in `own_prediction`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.faithfulness.own_prediction import batches, opened, parser_of_explainers, read_photos, read_set, row
from benchmarks.faithfulness.passes import fastest
from benchmarks.results import digest, kept
from bla.comparison.methods import PooledClassifier
from bla.data.image_sets import ImageSet
from bla.data.masking import enlarged, filled
from bla.metrics import top_cells
from bla.metrics.pixels import SHARES
from bla.metrics.statistics import bootstrap
from bla.model.backbones import weights_digest
from bla.model.classifier import ExplainableClassifier
from bla.progress import show
from bla.training.mean_size import bound_of_mean_size

LEVELS = (0.8, 0.9, 0.95, 0.99)
"""P2P's levels of certainty."""
Curves = dict[str, Tensor]
"""By number of best cells, from 1 to all, (N, cells): whether their pixels alone keep the class (kept) and with which
probability (classifier), whether the others' pixels do (removed), the head's probability from these cells (head). Also
the scores of all cells (unbounded), in any order."""


@torch.no_grad()
def measure(classifier: ExplainableClassifier, images: ImageSet) -> dict[str, list[list[float]]]:
    """The :data:`Curves` of all photos."""
    pooled = PooledClassifier(classifier.trunk, classifier.head).eval()
    photos = read_photos(classifier, images)
    network = fastest(pooled, classifier.pixels(photos[:2]))
    found: dict[str, list[list[float]]] = {}
    for rows, pixels in batches(classifier, photos):
        features, fills = classifier.trunk(pixels), filled(pixels)
        own = pooled.on_features(features).argmax(dim=1, keepdim=True)
        ranking = classifier.select(pixels).unbounded.float()
        by_size: dict[str, list[Tensor]] = {name: [] for name in ("kept", "classifier", "removed", "head")}
        for size in range(1, 1 + ranking[0].numel()):
            best = top_cells(ranking, size)
            only = fills + enlarged(best, pixels)[:, None] * (pixels - fills)
            shown, hidden = network(only), network(pixels + fills - only)
            by_size["kept"].append(shown.argmax(dim=1) == own[:, 0])
            by_size["removed"].append(hidden.argmax(dim=1) == own[:, 0])
            by_size["classifier"].append(shown.softmax(dim=1).gather(1, own)[:, 0])
            read = classifier.classify(features, best.to(features) / size)
            by_size["head"].append(read.softmax(dim=1).gather(1, own)[:, 0])
        for name, values in by_size.items():
            found.setdefault(name, []).extend(torch.stack(values, dim=1).double().tolist())
        found.setdefault("unbounded", []).extend(ranking.flatten(1).tolist())
        show("photos by every number of cells", rows.stop, len(photos))
    return found


def chosen(curves: Curves, least: int) -> Iterator[tuple[str, str, Tensor]]:
    """By rule and level, the size of each photo (N,)."""
    unbounded = curves["unbounded"]
    cells = unbounded.shape[1]
    for share in SHARES:
        score, _ = bound_of_mean_size(-unbounded, share * cells, least)
        yield "bound", f"{share:.0%}", (unbounded >= -score).sum(dim=1).clamp(min=least)
    for rule in ("head", "classifier"):
        for level in LEVELS:
            reached = curves[rule] >= level
            yield rule, f"{level:g}", torch.where(reached.any(dim=1), 1 + reached.int().argmax(dim=1), cells)


def at(curve: Tensor, sizes: Tensor) -> Tensor:
    """A curve (N, cells) at whole or fractional sizes (N,), the latter between their neighbours.

    >>> at(torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([2.5])).tolist()
    [0.75]
    """
    below = sizes.floor().long()
    lower, upper = (curve.gather(1, place[:, None] - 1)[:, 0] for place in (below, sizes.ceil().long()))
    return lower + (sizes - below) * (upper - lower)


def table(curves: Curves, least: int) -> str:
    """Markdown: each rule's sizes, kept and removed, and its paired differences from one size for all."""
    columns = (
        "size by",
        "at",
        "cells",
        "from, to",
        "kept",
        "kept, minus one size's",
        "removed",
        "removed, minus one size's",
    )
    lines = row(*columns, ruled=True)
    for rule, level, sizes in chosen(curves, least):
        one = sizes.double().mean().expand(len(sizes))
        parts = [f"{one[0]:.1f}", f"{int(sizes.min())}, {int(sizes.max())}"]
        for name in ("kept", "removed"):
            own = at(curves[name], sizes.double())
            apart = bootstrap((own - at(curves[name], one)).numpy())
            parts += [f"{own.mean():.3f}", f"{apart.mean:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"]
        lines += row(rule, level, *parts)
    return "\n".join([*lines, "", f"{len(curves['kept'])} photos; 95% intervals, paired."])


def main() -> None:
    """Measure every size once, apply the rules, print the table."""
    arguments = parser_of_explainers(__doc__).parse_args()
    classifier, images = opened(arguments), read_set(arguments.photos, arguments.limit)
    seen = [images.digest(), weights_digest(classifier), classifier.transform.to_dict()]
    found = kept(arguments.out / f"curves-{digest(*seen)}.json", functools.partial(measure, classifier, images))
    curves = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
    cells = curves["unbounded"].shape[1]
    print(table(curves, classifier.attention.least_about(SHARES[1] * cells)))


if __name__ == "__main__":
    main()
