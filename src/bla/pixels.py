"""Photos as batches of pixels, read anew every time: what a trunk is trained on, with augmentation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bla import processes
from bla.cache import Progress, silent
from bla.classifier import prefetch
from bla.data import ImageSet
from bla.photo import DataError, Interpolation, Transform

MARGIN = 8 / 7
"""How much larger than the input a photo is read to be augmented, which crops from it: 256 for 224."""


@dataclasses.dataclass(frozen=True, eq=False)
class Photos:
    """An image set as a classifier sees it. Row i is image i of the set; memory holds one batch.

    Attributes
    ----------
    failures: (image, reason) for each that cannot be read.
    """

    images: ImageSet
    transform: Transform
    failures: tuple[tuple[str, str], ...] = ()

    def batch(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Pixels (B, h, w, 3) of these rows.

        Raises
        ------
        DataError
            If a photo cannot be read any more.
        """
        return np.stack(_read(self.images, rows, self.transform))

    def augmented(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """As :meth:`batch`, each photo changed at random (:func:`augmentation`) by torch's global generator."""
        height, width = self.transform.size
        larger = dataclasses.replace(self.transform, size=(round(height * MARGIN), round(width * MARGIN)))
        change = augmentation(self.transform.size, self.transform.interpolation)
        changed = []
        seeds = torch.empty(len(rows), dtype=torch.int64).random_(2**31)  # each photo's own: it is changed the same
        with torch.random.fork_rng([]):  # whichever process reads it, and on any number of threads
            for seed, pixels in zip(seeds.tolist(), _read(self.images, rows, larger), strict=True):
                torch.manual_seed(seed)
                changed.append(change(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy())
        return np.stack(changed)


def readable_photos(images: ImageSet, transform: Transform, report: Progress = silent) -> Photos:
    """Photos of a set with those in ``failures`` that cannot be read, found by reading every one.

    Raises
    ------
    DataError
        If none can be read.
    """
    failures: list[tuple[str, str]] = []

    def read(row: int) -> str | None:
        try:
            transform.read(images.path(row))
        except DataError as error:
            return str(error)
        return None

    title = f"reading {len(images)} images"
    mine = processes.share(len(images))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, error in zip(mine, prefetch(pool, read, mine, ahead=64), strict=True):
            if error is not None:
                failures.append((images.names[row], error))
            if (row + 1) % 64 == 0 or row + 1 == mine.stop:
                report(title, row + 1, mine.stop)
    failures = [failure for found in processes.everyones(failures) for failure in found]
    if len(failures) == len(images):
        reason = failures[0][1] if failures else "no image"
        raise DataError(f"{images.root}: expected images that can be read, got none of {len(images)}: {reason}")
    return Photos(images, transform, tuple(failures))


def augmentation(size: tuple[int, int], interpolation: Interpolation) -> nn.Module:
    """Of a photo (3, h, w): a part of 40 to 100% of it, mirrored or not, brighter or darker, all at random.

    torchvision's: RandomResizedCrop, RandomHorizontalFlip, ColorJitter; all draw from torch's global generator.
    """
    from torchvision.transforms import InterpolationMode, v2

    # torchvision resizes tensors so, and not by Lanczos's
    mode = InterpolationMode.BILINEAR if interpolation == "lanczos" else InterpolationMode(interpolation)
    changes: nn.Module = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.4, 1.0), interpolation=mode, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ]
    )
    return changes


def _read(images: ImageSet, rows: npt.NDArray[np.int64], transform: Transform) -> Sequence[npt.NDArray[np.uint8]]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda row: transform.read(images.path(row)).pixels, rows.tolist()))
