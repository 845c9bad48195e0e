"""A sample of the photos, with their pixels, for measures that run the whole network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bla.comparison.catalogue import Setting
from bla.comparison.methods import Batch, Method
from bla.comparison.photos import Rows

_BATCH = 8


class Sample:
    """Photos drawn from those compared on, read once, with the classes to explain in them."""

    def __init__(self, setting: Setting, count: int) -> None:
        self.setting = setting
        photos, classifier = setting.photos, setting.run.classifier
        self.rows = np.sort(np.random.RandomState([setting.seed, 7]).permutation(len(photos))[:count])
        self.pixels = photos.pixels(self.rows)
        self.targets = photos.predicted[self.rows].to(self.pixels.device)
        self.grey = classifier.pixels(np.full((1, 1, 1, 3), 127, np.uint8))[0, :, 0, 0]

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, start: int = 0) -> list[Rows]:
        """Places in the sample from ``start`` on, a batch at a time."""
        return [np.arange(first, min(first + _BATCH, len(self))) for first in range(start, len(self), _BATCH)]

    def explainer(self, method: Method, part: Rows, trunk: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
        """Pixels to the method's maps of the photos' own targets, also for several copies of each photo."""
        trunk = trunk or self.setting.run.classifier.trunk
        targets, rows = self.targets[part], torch.from_numpy(self.rows[part])

        def explain(pixels: Tensor) -> Tensor:
            copies = len(pixels) // len(part)  # captum repeats each photo in place
            with torch.no_grad():
                features = trunk(pixels)
            batch = Batch(features, targets.repeat_interleave(copies), rows.repeat_interleave(copies), pixels)
            return method.maps(batch).float()

        return explain
