"""Fine-tuning, end to end: networks with trunks that are trained too, one for each stage.

The stages are those of :mod:`bla.training.stages`, on pixels in place of cached features. Let T be the trunk at the
start. ``head``: T and the baseline's head, mean-pooled, become T1. ``module``: module, head and trunk together, from
T1, become T2, which explains. ``continued``, the fair control: T1 and the baseline's head are trained further,
mean-pooled, for as many epochs. With a frozen head (post hoc) the second stage trains the module alone, on T1.
A trunk is in training mode, and its photos are augmented, only while it is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bla.model.attention import Attention
from bla.training.networks import Examples, Networks, StageName
from bla.training.photos import Photos
from bla.training.settings import Settings


class TunedNetworks(Networks):
    """Networks of which each reads a trunk that is trained with it: ``trunk``, the module's, is T2."""

    def __init__(
        self,
        attention: Attention,
        baseline: nn.Module,
        trunk: nn.Module,
        *,
        settings: Settings,
        pixels: Callable[[npt.NDArray[np.uint8]], Tensor],
    ) -> None:
        super().__init__(attention, baseline, own_head=False, task=settings.task)
        assert settings.trunk is not None
        self.trunk = trunk
        self.baseline_trunk = copy.deepcopy(trunk)
        self.continued_trunk = copy.deepcopy(trunk)
        self.parts += ["trunk", "baseline_trunk", "continued_trunk"]
        self.augment = settings.trunk.augment
        self.precision: torch.dtype = getattr(torch, settings.trunk.precision)
        self._pixels = pixels

    def features(self, examples: Examples) -> Tensor:
        """The input of the module, (B, C, H, W): its trunk's features of the photos."""
        return self._features(self.trunk, examples)

    def pooled(self, examples: Examples, stage: StageName) -> Tensor:
        """The input of the baseline, or of its continuation, (B, C)."""
        return self._features(self.of_stage(stage)[1], examples).mean(dim=(2, 3))

    def of_stage(self, stage: StageName) -> tuple[nn.Module, ...]:
        """The head of a stage, and its trunk."""
        trunks = {"head": self.baseline_trunk, "module": self.trunk, "continued": self.continued_trunk}
        return (*super().of_stage(stage), trunks[stage])

    def _features(self, trunk: nn.Module, examples: Examples) -> Tensor:
        photos, rows = cast("Photos", examples.cache), examples.rows
        if trunk.training and torch.is_grad_enabled():
            return self._run(trunk, photos.augmented(rows) if self.augment else photos.batch(rows))
        with torch.no_grad():
            return photos.through(lambda pixels: self._run(trunk, pixels), rows)

    def _run(self, trunk: nn.Module, photos: npt.NDArray[np.uint8]) -> Tensor:
        """Features in float32, whatever the trunk's precision: scores, weights and loss are exact."""
        pixels = self._pixels(photos)
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            features: Tensor = trunk(pixels)
        return features.float()
