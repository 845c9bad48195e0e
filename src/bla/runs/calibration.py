r"""Certificates: from how many of the best cells a classifier keeps its class, counted on held-out photos.

For a size k let X of n photos pass, and let :math:`\theta_k` be the share that passes among all photos like them.
Fixed-sequence testing goes from the largest size down,

.. math:: H_k: \theta_k < \text{share}, \quad
          \text{rejected where } P(\mathrm{Bin}(n, \text{share}) \ge X) \le 1 - \text{confidence},

and stops at the first size that is not rejected. The sizes before it all reach the share with that confidence,
simultaneously, so that the smallest of them may be chosen without a correction: Bauer 1991, "Multiple testing in
clinical trials"; Angelopoulos et al. 2021, "Learn then Test" (arXiv 2110.01052). It assumes photos drawn independently
of each other and of the training. What is certified is the share; ``bound`` is the lower confidence bound of Clopper
and Pearson at the chosen size alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bla.data.image_sets import ImageSet, Splits
from bla.data.masking import FILLS, masked
from bla.data.prefetching import cores, prefetch
from bla.data.published import read_images
from bla.files import timestamp, write_json
from bla.metrics.statistics import lower_bound
from bla.model.classifier import ExplainableClassifier
from bla.model.evidence import from_all
from bla.progress import Progress, silent
from bla.runs.certificates import SAYS, Certificate, Quantity, digests
from bla.runs.examples import Failures
from bla.runs.record import CERTIFICATE, SHIPPED, RunError, run_folder, versions
from bla.runs.run import open_run
from bla.training.photos import try_read

_BATCH = 16
_SIZES = 25
"""At most so many sizes, evenly spaced, are tried by running the whole classifier."""


def calibrate(
    run: str | Path,
    photos: str | Path | Splits,
    *,
    quantity: Quantity = "kept",
    share: float = 0.9,
    confidence: float = 0.95,
    fill: str = FILLS[0],
    out: Path | None = None,
    model: nn.Module | str | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    cache: Path | None = None,
    report: Progress = silent,
) -> tuple[Certificate, Failures]:
    """Find the smallest size that reaches a share of held-out photos, and store its certificate with the run.

    Each photo is read once. For ``kept`` and ``removed`` the whole classifier runs once a photo and size, for at most
    25 sizes; those that have failed are tried no further. ``photos`` is as ``data`` in :func:`bla.runs.run.evaluate`.

    Parameters
    ----------
    out: the file to write, by default ``certificate.json`` in the run folder.

    Returns the certificate, and (image, reason) for each photo that could not be read. A RunError, and nothing written,
    if no size reaches the share, there are too few photos for it, or the run was trained on them.
    """
    for name, value in (("share", share), ("confidence", confidence)):
        if not 0 < value < 1:
            raise RunError(f"expected a {name} between 0 and 1, got {value:g}")
    if quantity not in SAYS:
        raise RunError(f"expected a quantity among {', '.join(SAYS)}, got {quantity!r}")
    folder = run_folder(run)
    if out is None and folder.parent == SHIPPED:
        raise RunError(f"expected a file to write to (--out), got none with {run}, which comes with the package")
    opened = open_run(folder, model=model, device=device)
    if opened.classifier.several_labels:
        raise RunError(f"expected a run of one class an image, got {run}, whose images have several labels")
    seed, known = opened.settings.seed, opened.record["data"]
    splits, source = read_images(photos, seed=seed, data_root=data_root, cache=cache, report=report)
    images, held_out = splits.test, splits.test.digest() == known["test"]
    if splits.seeded and not held_out and not isinstance(photos, Splits):
        images = splits.whole()
        report(f"{source} has no division: all its images count, assuming that none was trained on", 0, 0)
    if images.digest() == known["train"] or (source == known["root"] != "" and not held_out):
        raise RunError(f"expected held-out photos, got some that {run} may have been trained on: pass others")
    limit = _too_many(len(images), share, confidence)
    misses, counted, failures = _misses(opened.classifier, images, quantity, fill, too_many=limit, report=report)
    limit = _too_many(counted, share, confidence)
    size = smallest_size(misses, limit)
    if size is None:
        raise RunError(
            f"expected a size at which {quantity} reaches {share:g} with confidence {confidence:g}, got none: all "
            f"{max(misses)} cells fail for more than {limit - 1} of {counted} photos: lower the share, or pass more"
        )
    passed = counted - misses[size]
    trunk, weights = digests(folder, opened.record)
    certificate = Certificate(
        quantity=quantity,
        share=share,
        confidence=confidence,
        size=size,
        cells=max(misses),
        rate=passed / counted,
        bound=lower_bound(passed, counted, confidence),
        photos=counted,
        images=images.digest(),
        fill=None if quantity == "agreement" else fill,
        transform=opened.record["transform"],
        model=trunk,
        weights=weights,
        seed=seed,
        versions=versions(),
        created=timestamp(),
    )
    write_json(out or folder / CERTIFICATE, dataclasses.asdict(certificate), indent=1)
    return certificate, failures


def smallest_size(misses: Mapping[int, int], too_many: int) -> int | None:
    """The last size, from the largest down, before the first with too many misses; sizes in this order.

    >>> smallest_size({5: 0, 4: 2, 3: 5, 2: 1}, too_many=3), smallest_size({2: 3, 1: 0}, too_many=3)
    (4, None)
    """
    passing = list(itertools.takewhile(lambda size: misses[size] < too_many, misses))
    return passing[-1] if passing else None


def _too_many(photos: int, share: float, confidence: float) -> int:
    """The fewest misses of so many photos with which a share is not shown; RunError if that is none."""
    found = next(misses for misses in range(photos + 1) if lower_bound(photos - misses, photos, confidence) < share)
    if not found:
        least = next(n for n in itertools.count(photos) if share**n <= 1 - confidence)
        raise RunError(
            f"expected at least {least} photos for a share of {share:g} with confidence {confidence:g}, got {photos}"
        )
    return found


@torch.inference_mode()
def _misses(
    classifier: ExplainableClassifier, images: ImageSet, quantity: str, fill: str, *, too_many: int, report: Progress
) -> tuple[dict[int, int], int, Failures]:
    """How many photos fail at each size, the largest first; how many were counted; and which could not be read.

    Once a size has too many misses, smaller ones are counted no further.
    """
    head, attention, transform = classifier.head, classifier.attention, classifier.transform
    misses: dict[int, int] = {}
    failures: list[tuple[str, str]] = []
    with ThreadPoolExecutor(cores()) as pool:
        loaded = prefetch(pool, lambda row: try_read(images, row, transform), range(len(images)), ahead=2 * _BATCH)
        for start in range(0, len(images), _BATCH):
            batch = list(itertools.islice(loaded, _BATCH))
            failures += [(images.names[row], each) for row, each in enumerate(batch, start) if isinstance(each, str)]
            readable = [photo.pixels for photo in batch if not isinstance(photo, str)]
            if not readable:
                continue
            pixels = classifier.pixels(np.stack(readable))
            features = classifier.trunk(pixels)
            own = from_all(head, features)
            ranking = attention.ranking(features)
            cells = ranking[0].numel()
            step = 1 if quantity == "agreement" else math.ceil(cells / _SIZES)
            misses = misses or dict.fromkeys(range(cells, 0, -step), 0)
            for size in misses:
                best = attention.weigh(ranking, size).hard
                if quantity == "agreement":
                    said = classifier.classify(features, best)
                else:
                    mask = (best > 0) == (quantity == "kept")
                    said = from_all(head, classifier.trunk(masked(pixels, mask, fill)))
                passed = (said.argmax(1) == own.argmax(1)) == (quantity != "removed")
                misses[size] += int((~(passed & own.isfinite().all(1))).sum())
                if misses[size] >= too_many:
                    break
            report(f"counting {quantity}", min(start + _BATCH, len(images)), len(images))
    return misses, len(images) - len(failures), tuple(failures)
