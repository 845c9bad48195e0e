"""Fine-tuning, end to end: networks with trunks that are trained too, one for each stage.

The stages are those of :mod:`bla.training.stages`, on pixels in place of cached features. Let T be the trunk at the
start. ``head``: T and the baseline's head, mean-pooled, become T1. ``module``: module, head and trunk together, from
T1, become T2, which explains. ``continued``, the fair control: T1 and the baseline's head are trained further,
mean-pooled, for as many epochs. With a frozen head (post hoc) the second stage trains the module alone, on T1.

A trunk is in training mode only while it is trained: batch normalisation then normalises by the batch and updates its
running statistics, dropout and stochastic depth are on, and photos are augmented if the settings say so.
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
from bla.training.photos import CHUNK, Photos
from bla.training.settings import Settings


class TunedNetworks(Networks):
    """Networks of which each reads a trunk that is trained with it.

    Attributes
    ----------
    trunk: the module's, T2.
    baseline_trunk, continued_trunk: the baseline's, T1, and the control's, its continuation.
    """

    def __init__(
        self,
        attention: Attention,
        baseline: nn.Module,
        trunk: nn.Module,
        *,
        settings: Settings,
        pixels: Callable[[npt.NDArray[np.uint8]], Tensor],
    ) -> None:
        super().__init__(attention, baseline, own_head=False)
        assert settings.trunk is not None
        self.trunk = trunk
        self.baseline_trunk = copy.deepcopy(trunk)
        self.continued_trunk = copy.deepcopy(trunk)
        self.augment, self.frozen_head = settings.trunk.augment, settings.frozen_head
        self.precision: torch.dtype = getattr(torch, settings.trunk.precision)
        self._pixels = pixels

    @property
    def parts(self) -> tuple[str, ...]:
        """The children that runs and checkpoints hold."""
        return (*super().parts, "trunk", "baseline_trunk", "continued_trunk")

    def features(self, examples: Examples) -> Tensor:
        """The input of the module, (B, C, H, W): its trunk's features of the photos."""
        return self._features(self.trunk, examples)

    def pooled(self, examples: Examples, stage: StageName) -> Tensor:
        """The input of the baseline, or of its continuation, (B, C)."""
        trunk = self.continued_trunk if stage == "continued" else self.baseline_trunk
        return self._features(trunk, examples).mean(dim=(2, 3))

    def trunks(self, stage: StageName) -> tuple[nn.Module, ...]:
        """The trunk that a stage trains: none if it trains the module alone, post hoc."""
        if stage == "module":
            return () if self.frozen_head else (self.trunk,)
        return (self.continued_trunk if stage == "continued" else self.baseline_trunk,)

    def begin(self, stage: StageName) -> None:
        """Start a stage's trunk and head from the first stage's."""
        super().begin(stage)
        if stage != "head":
            trunk = self.trunk if stage == "module" else self.continued_trunk
            trunk.load_state_dict(self.baseline_trunk.state_dict())

    def _features(self, trunk: nn.Module, examples: Examples) -> Tensor:
        photos, rows = cast("Photos", examples.cache), examples.rows
        if trunk.training and torch.is_grad_enabled():
            return self._run(trunk, photos.augmented(rows) if self.augment else photos.batch(rows))
        with torch.no_grad():
            parts = range(0, len(rows), CHUNK)
            return torch.cat([self._run(trunk, photos.batch(rows[start : start + CHUNK])) for start in parts])

    def _run(self, trunk: nn.Module, photos: npt.NDArray[np.uint8]) -> Tensor:
        """Features in float32, whatever the trunk's precision: scores, weights and loss are exact."""
        pixels = self._pixels(photos)
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            features: Tensor = trunk(pixels)
        return features.float()
