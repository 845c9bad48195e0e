"""The photos that are compared on, and those that trained rivals and judges are trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from torch import Tensor

from bla.comparison.methods import ComparisonError, PooledClassifier
from bla.data.image_sets import ImageSet, Splits, list_images
from bla.data.photo import DataError
from bla.data.published import named, read_images
from bla.files import cache_root
from bla.progress import Progress
from bla.runs import run as runs
from bla.training.cache import FeatureCache, cached_features


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Subjects:
    """The photos that are compared on.

    Attributes
    ----------
    images: with labels into the run's classes, or without.
    rows: the rows of ``cache`` that could be read.
    coverage: (N, H, W), the share of each cell that the object covers; zero for an image without one; None: no objects.
    """

    images: ImageSet
    cache: FeatureCache
    rows: npt.NDArray[np.int64]
    labels: Tensor | None
    coverage: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    def features(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """The features (B, C, H, W) of some of them."""
        return self.cache.batch(self.rows[indices])

    def name(self, index: int) -> str:
        """The path of one."""
        return str(self.images.path(int(self.rows[index])))


def find_subjects(
    opened: runs.Run,
    data: str | Path | Splits | None,
    *,
    limit: int | None,
    seed: int,
    cache: Path | None,
    report: Progress,
) -> tuple[Subjects, tuple[tuple[str, str], ...], str]:
    """The photos: the run's test images, a division's test images, or all that lie in a folder."""
    if limit is not None and limit < 1:
        raise ComparisonError(f"expected a limit of at least 1 photo, got {limit}")
    source: str | Splits = (
        opened.record["data"]["root"] if data is None else data if isinstance(data, Splits) else str(data)
    )
    if not source:
        raise ComparisonError("expected photos to compare on, got none, and the run was trained on splits of a program")
    settings = opened.settings
    try:
        splits, _ = read_images(source, seed=settings.seed, cache=cache or cache_root(), report=report)
        same = splits.test.digest() == opened.record["data"]["test"]
        images = splits.test if same or not splits.seeded else splits.whole()
    except DataError:
        if isinstance(source, Splits) or not (path := Path(source)).exists():
            raise
        paths = list_images([path])  # one class, one image, a file: no division to find
        root = path if path.is_dir() else path.parent
        images = ImageSet(root, tuple(sorted(found.relative_to(root).as_posix() for found in paths)))
    chosen = np.arange(len(images))
    if limit is not None and limit < len(images):
        chosen = np.sort(np.random.RandomState(seed).permutation(len(images))[:limit])
        if images.digest() != opened.record["data"]["test"]:  # those are cached since the training
            images, chosen = images.subset(chosen), np.arange(limit)
    subjects = _cached(images, chosen, opened, cache, report)
    names = {images.names[row] for row in chosen}
    failures = tuple((image, reason) for image, reason in subjects.cache.failures if image in names)
    return subjects, failures, source if isinstance(source, str) else ""


def _cached(
    images: ImageSet, chosen: npt.NDArray[np.int64], opened: runs.Run, cache: Path | None, report: Progress
) -> Subjects:
    images = _labelled(images, opened)
    features = cached_features(opened.classifier, images, root=cache, report=report)
    failed = {image for image, _ in features.failures}
    rows = np.array([row for row in chosen if images.names[row] not in failed], np.int64)
    if not len(rows):
        raise DataError(f"{images.root}: expected photos that can be read, got none of {len(chosen)}")
    labels = None if images.labels is None else torch.from_numpy(images.labels[rows].copy())
    return Subjects(images, features, rows, labels, _coverage(images, rows, opened, features))


def _coverage(images: ImageSet, rows: npt.NDArray[np.int64], opened: runs.Run, features: FeatureCache) -> Tensor | None:
    """Which share of each cell the object covers, zero for an image without one; None where none has one."""
    if images.masks is None and images.boxes is None:
        return None
    height, width = features.features.shape[1:3]
    found = []
    for row in rows:
        region = opened.classifier.transform.region(size_of(images.path(int(row))))
        covered = images.coverage(int(row), region, (height, width))
        found.append(np.zeros((height, width)) if covered is None else covered)
    coverage = torch.from_numpy(np.stack(found))
    return coverage if coverage.any() else None


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an upright photo, read from its header."""
    with Image.open(path) as photo:
        turned = photo.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (photo.height, photo.width) if turned else (photo.width, photo.height)


def _labelled(images: ImageSet, opened: runs.Run) -> ImageSet:
    """Labels into the run's classes: the data's own where the names are the run's; else none."""
    classes = list(opened.classifier.classes)
    names = list(images.classes)
    labels = images.labels
    if labels is None:
        parents = [Path(images.root, name).parent.name for name in images.names]
        if not set(parents) <= set(classes):
            return dataclasses.replace(images, labels=None, classes=())
        names, labels = parents, np.arange(len(parents))
    elif not set(names) <= set(classes):
        return dataclasses.replace(images, labels=None, classes=())
    index = np.array([classes.index(name) for name in names], np.int64)
    return dataclasses.replace(images, labels=index[labels], classes=tuple(classes))


def training_subjects(opened: runs.Run, cache: Path | None, report: Progress) -> Subjects:
    settings = opened.settings
    source = opened.record["data"]["root"]
    if not named(source) and not (source and Path(source).is_dir()):
        raise ComparisonError(
            f"expected the run's training images in {source or 'a folder'}, which trained rivals and the evaluator "
            "need, got no such folder: leave out --leakage, softmax-attention, l2x and learned-mask"
        )
    splits, _ = read_images(source, seed=settings.seed, cache=cache or cache_root(), report=report)
    images = splits.train
    if images.digest() != opened.record["data"]["train"]:
        raise ComparisonError(f"expected the run's training images in {source}, got others: the folder has changed")
    return _cached(images, np.arange(len(images)), opened, cache, report)


@torch.inference_mode()
def predictions_of(pooled: PooledClassifier, subjects: Subjects, place: torch.device) -> dict[str, Tensor]:
    """What the classifier predicts from all cells."""
    found = []
    for start in range(0, len(subjects), 256):
        rows = subjects.rows[start : start + 256]
        found.append(pooled.head(subjects.cache.pooled_batch(rows).to(place)).float().softmax(-1).cpu())
    probabilities = torch.cat(found)
    return {"probabilities": probabilities, "index": probabilities.argmax(dim=1)}


def labels_of(training: Subjects, pooled: PooledClassifier, place: torch.device) -> Tensor:
    labels = training.labels
    if labels is None:
        labels = predictions_of(pooled, training, torch.device(place))["index"]
    return labels.clone().to(place)
