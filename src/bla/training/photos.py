"""Photos that are read again for every batch: as pixels, or as the features of a frozen trunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bla.data.arrays import Levels
from bla.data.image_sets import ImageSet
from bla.data.photo import DataError, Interpolation, Photo, Transform
from bla.data.prefetching import cores, prefetch
from bla.model.classifier import ExplainableClassifier
from bla.model.finite import unfinite
from bla.progress import Progress, silent
from bla.training import distributed

CHUNK = 32
"""Photos that a trunk processes at once without gradients."""

MARGIN = 8 / 7
"""Augmentation crops from a photo larger than the input by this factor: 256 for 224."""


@dataclasses.dataclass(frozen=True, eq=False)
class Photos:
    """An image set as a classifier sees it. Row i is image i of the set; memory holds one batch."""

    images: ImageSet
    transform: Transform
    failures: tuple[tuple[str, str], ...] = ()
    """(image, reason) for each that cannot be read."""
    at_hand: ClassVar[bool] = False

    def batch(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Pixels (B, h, w, 3) of these rows; a DataError if a photo can no longer be read."""
        return np.stack(_read(self.images, rows, self.transform))

    def through(self, run: Callable[[npt.NDArray[np.uint8]], Tensor], rows: npt.NDArray[np.int64]) -> Tensor:
        """What a trunk makes of these rows, a chunk at a time."""
        return torch.cat([run(self.batch(rows[start : start + CHUNK])) for start in range(0, len(rows), CHUNK)])

    def augmented(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """As :meth:`batch`, each photo augmented (:func:`augmentation`) by torch's global generator."""
        height, width = self.transform.size
        larger = dataclasses.replace(self.transform.plain(), size=(round(height * MARGIN), round(width * MARGIN)))
        change = augmentation(self.transform.size, self.transform.interpolation)
        photos = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in _read(self.images, rows, larger)]
        return np.stack([change(photo).permute(1, 2, 0).numpy() for photo in photos])


class StreamedFeatures:
    """Features of a frozen trunk, computed again for every batch: for sets whose features do not fit the disk."""

    at_hand = False

    def __init__(self, classifier: ExplainableClassifier, photos: Photos) -> None:
        self.photos, self.failures = photos, photos.failures
        self._classifier = classifier
        self._last: tuple[bytes, Tensor] | None = None

    @torch.no_grad()
    def batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Features (B, C, H, W) of these rows; a DataError if a photo can no longer be read or they are not finite."""
        key = rows.tobytes()
        if self._last is None or self._last[0] != key:  # a step reads a batch's maps and their average
            classifier = self._classifier
            features = self.photos.through(lambda photos: classifier.trunk(classifier.pixels(photos)).float(), rows)
            finite = torch.isfinite(features).flatten(1).all(dim=1)
            if not finite.all():
                row = rows[[int(finite.int().argmin())]]
                reason = unfinite(classifier, classifier.pixels(self.photos.batch(row)))
                raise DataError(f"{self.photos.images.names[row[0]]}: expected finite features, got {reason}")
            self._last = key, features
        return self._last[1]

    def pooled_batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Average-pooled features (B, C) of these rows."""
        return self.batch(rows).flatten(2).mean(dim=2)


def readable_photos(images: ImageSet, transform: Transform, report: Progress = silent) -> Photos:
    """The photos of a set, with ``failures`` found by reading every one; a DataError if none can be read."""
    failures: list[tuple[str, str]] = []
    mine = distributed.share(len(images))
    with ThreadPoolExecutor(cores()) as pool:
        photos = prefetch(pool, lambda row: try_read(images, row, transform), mine, ahead=64)
        for row, photo in zip(mine, photos, strict=True):
            if isinstance(photo, str):
                failures.append((images.names[row], photo))
            if (row + 1) % 64 == 0 or row + 1 == mine.stop:
                report(f"reading {len(images)} images", row + 1, mine.stop)
    failures = [failure for found in distributed.gathered(failures) for failure in found]
    if len(failures) == len(images):
        reason = failures[0][1] if failures else "no image"
        raise DataError(f"{images.root}: expected images that can be read, got none of {len(images)}: {reason}")
    return Photos(images, transform, tuple(failures))


def try_read(images: ImageSet, row: int, transform: Transform) -> Photo | str:
    """The photo of a row, or the reason why it cannot be read."""
    try:
        return transform.read(images.path(row))
    except DataError as error:
        return str(error)


def augmentation(size: Sequence[int], interpolation: Interpolation) -> nn.Module:
    """Augmentation of a photo (3, h, w): a random crop of 40 to 100%, flip, brightness, contrast and saturation."""
    from torchvision.transforms import InterpolationMode, v2

    # torchvision resizes tensors so, and not by Lanczos's
    mode = InterpolationMode.BILINEAR if interpolation == "lanczos" else InterpolationMode(interpolation)
    crop = v2.RandomResizedCrop(tuple(size), scale=(0.4, 1.0), interpolation=mode, antialias=True)
    colour = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
    return nn.Sequential(crop, v2.RandomHorizontalFlip(), colour)


def _read(images: ImageSet, rows: npt.NDArray[np.int64], transform: Transform) -> Sequence[Levels]:
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(lambda row: transform.read(images.path(row)).pixels, rows.tolist()))
