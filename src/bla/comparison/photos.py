"""The photos that methods are compared on, and the training images for trained rivals and judges."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from bla.comparison.methods import Batch, ComparisonError
from bla.data.image_sets import ImageSet, Splits, list_images
from bla.data.photo import DataError
from bla.data.published import named, read_images
from bla.files import cache_root
from bla.metrics.fitting import Rows
from bla.progress import Progress
from bla.runs import run as runs
from bla.training.cache import FeatureCache, cached_features


@dataclasses.dataclass(frozen=True, eq=False)
class Photos:
    """Photos with what a run's classifier makes of them.

    Attributes
    ----------
    images: with labels into the run's classes, or without.
    rows: the rows of ``cache`` that could be read.
    labels: (N,), or None.
    coverage: (N, H, W), the share of each cell that the object covers; 0 for an image without one; None: no objects.
    source: where they lie; "" for splits in memory.
    failures: the photos that could not be read, and why.
    """

    run: runs.Run
    images: ImageSet
    cache: FeatureCache
    rows: Rows
    labels: Tensor | None
    coverage: Tensor | None
    source: str = ""
    failures: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, index: int) -> Path:
        return self.images.path(int(self.rows[index]))

    def features(self, indices: Rows) -> Tensor:
        """The features (B, C, H, W) of some photos, on the run's device."""
        return self.cache.batch(self.rows[indices]).to(self.run.networks.device)

    def pixels(self, indices: Rows) -> Tensor:
        """The normalised pixels (B, 3, h, w) of some photos, read from their files."""
        classifier = self.run.classifier
        read = [classifier.transform.read(self.path(index)).pixels for index in indices.tolist()]
        return classifier.pixels(np.stack(read)).contiguous(memory_format=torch.channels_last)

    def batch(self, indices: Rows, pixels: Tensor | None = None) -> Batch:
        """What a method sees of some photos; the target is the class predicted from all cells."""
        features = self.features(indices)
        return Batch(features, self.predicted[indices].to(features.device), torch.from_numpy(indices), pixels)

    @functools.cached_property
    @torch.inference_mode()
    def probabilities(self) -> Tensor:
        """What the classifier predicts from all cells, (N, K)."""
        networks, found = self.run.networks, []
        for start in range(0, len(self), 256):
            pooled = self.cache.pooled_batch(self.rows[start : start + 256]).to(networks.device)
            found.append(networks.baseline(pooled).float().softmax(-1).cpu())
        return torch.cat(found)

    @functools.cached_property
    def predicted(self) -> Tensor:
        """The class predicted from all cells, (N,)."""
        return self.probabilities.argmax(dim=1)

    @property
    def judged(self) -> Tensor:
        """The classes that predictions are judged by, (N,): the labels, or without them those predicted."""
        return self.predicted if self.labels is None else self.labels


def find_photos(
    run: runs.Run,
    data: str | Path | Splits | None,
    *,
    limit: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    report: Progress,
) -> Photos:
    """The run's test images, the test images of a division, or all photos in a folder; ``limit`` draws some of them."""
    if limit is not None and limit < 1:
        raise ComparisonError(f"expected a limit of at least 1 photo, got {limit}")
    trained = run.record["data"]
    source = trained["root"] if data is None else data if isinstance(data, Splits) else str(data)
    if not source:
        raise ComparisonError("expected photos to compare on, got none, and the run was trained on splits in memory")
    try:
        splits, _ = read_images(source, seed=run.settings.seed, cache=cache or cache_root(), report=report)
        same = splits.test.digest() == trained["test"]
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
        if images.digest() != trained["test"]:  # those are cached since the training
            images, chosen = images.subset(chosen), np.arange(limit)
    found = _read(images, chosen, run, cache, report)
    return dataclasses.replace(found, source=source if isinstance(source, str) else "")


def training_source(run: runs.Run) -> str:
    """The run's training images, a folder or a name; "" if they are not there."""
    source: str = run.record["data"]["root"]
    return source if named(source) or (source and Path(source).is_dir()) else ""


def training_photos(run: runs.Run, cache: Path | None, report: Progress) -> Photos:
    """The run's training images, if they are still there."""
    if not (source := training_source(run)):
        where = run.record["data"]["root"] or "a folder"
        raise ComparisonError(
            f"expected the run's training images in {where}, which trained rivals and the evaluator "
            "need, got no such folder: leave out --leakage, softmax-attention, l2x and learned-mask"
        )
    splits, _ = read_images(source, seed=run.settings.seed, cache=cache or cache_root(), report=report)
    if splits.train.digest() != run.record["data"]["train"]:
        raise ComparisonError(f"expected the run's training images in {source}, got others: the folder has changed")
    return _read(splits.train, np.arange(len(splits.train)), run, cache, report)


def _read(images: ImageSet, chosen: Rows, run: runs.Run, cache: Path | None, report: Progress) -> Photos:
    run.networks.eval()
    images = _labelled(images, run.classifier.classes)
    features = cached_features(run.classifier, images, root=cache, report=report)
    names = {images.names[row] for row in chosen}
    failures = tuple(failure for failure in features.failures if failure[0] in names)
    rows = np.array([row for row in chosen if images.names[row] not in dict(failures)], np.int64)
    if not len(rows):
        raise DataError(f"{images.root}: expected photos that can be read, got none of {len(chosen)}")
    labels = None if images.labels is None else torch.from_numpy(images.labels[rows].copy())
    coverage = _coverage(images, rows, run, features.features.shape[1:3])
    return Photos(run, images, features, rows, labels, coverage, failures=failures)


def _coverage(images: ImageSet, rows: Rows, run: runs.Run, grid: tuple[int, int]) -> Tensor | None:
    if images.masks is None and images.boxes is None:
        return None
    coverage = torch.zeros(len(rows), *grid, dtype=torch.float64)
    for index, row in enumerate(rows.tolist()):
        covered = images.coverage(row, run.classifier.transform.region(size_of(images.path(row))), grid)
        if covered is not None:
            coverage[index] = torch.from_numpy(covered)
    return coverage if coverage.any() else None


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an upright photo, read from its header."""
    with Image.open(path) as photo:
        turned = photo.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (photo.height, photo.width) if turned else (photo.width, photo.height)


def _labelled(images: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    """Labels into the run's classes, from the labels or else the folders of the images; none if one is unknown."""
    if images.labels is None:
        names = [Path(images.root, name).parent.name for name in images.names]
    else:
        names = [images.classes[label] for label in images.labels]
    if not set(names) <= set(classes):
        return dataclasses.replace(images, labels=None, classes=())
    index = {name: place for place, name in enumerate(classes)}
    return dataclasses.replace(images, labels=np.array([index[name] for name in names], np.int64), classes=classes)
