"""End to end: networks whose trunks are trained too, each stage its own.

The stages are those of :mod:`bla.training.loop`, on pixels in place of cached features. Let T be the trunk that
training
starts from. ``head``: T and the baseline's head, mean-pooled, become T1. ``module``: module, head and trunk together,
from T1, become T2, which explains. ``continued``, the fair control: T1 and the baseline's head go on, mean-pooled, for
as many epochs. With a frozen head (post hoc) the module alone is trained in the second stage, on T1 as it is.

While a trunk is trained it is in training mode: batch normalisation normalises by the batch and follows it with its
running statistics, which it uses everywhere else, as do frozen trunks; dropout and stochastic depth are on; photos are
augmented where asked for. Measured and used it is in evaluation mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bla.model.attention import Attention
from bla.training.networks import Examples, Networks, Stage
from bla.training.photos import CHUNK, Photos
from bla.training.settings import Settings


class TunedNetworks(Networks):
    """What is trained end to end: to a module and two heads come the trunks that each of them reads.

    Attributes
    ----------
    trunk: what the module reads, T2.
    baseline_trunk, continued_trunk: what the heads of the baseline and of the control read, T1 and its continuation.
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
        self.trunk = trunk
        self.baseline_trunk = copy.deepcopy(trunk)
        self.continued_trunk = copy.deepcopy(trunk)
        self.augment = settings.augment
        self.precision = getattr(torch, settings.precision)
        self.frozen_head = settings.frozen_head
        self._pixels = pixels

    @property
    def parts(self) -> tuple[str, ...]:
        """The children that a run or a checkpoint must keep."""
        return (*super().parts, "trunk", "baseline_trunk", "continued_trunk")

    def features(self, examples: Examples, rows: npt.NDArray[np.int64]) -> Tensor:
        """What the module reads, (B, C, H, W): its trunk's features of the photos."""
        return self._features(self.trunk, examples, rows)

    def pooled(self, examples: Examples, rows: npt.NDArray[np.int64], stage: Stage) -> Tensor:
        """What a mean-pooled head reads, (B, C): of the baseline, or of its continuation."""
        trunk = self.continued_trunk if stage == "continued" else self.baseline_trunk
        return self._features(trunk, examples, rows).mean(dim=(2, 3))

    def trunks(self, stage: Stage) -> tuple[nn.Module, ...]:
        """The trunk that a stage trains: none where it trains the module alone, post hoc."""
        if stage == "module":
            return () if self.frozen_head else (self.trunk,)
        return (self.continued_trunk if stage == "continued" else self.baseline_trunk,)

    def begin(self, stage: Stage) -> None:
        """Let a stage's trunk and head start from the first stage's."""
        super().begin(stage)
        if stage != "head":
            trunk = self.trunk if stage == "module" else self.continued_trunk
            trunk.load_state_dict(self.baseline_trunk.state_dict())

    def _features(self, trunk: nn.Module, examples: Examples, rows: npt.NDArray[np.int64]) -> Tensor:
        photos = examples.cache
        assert isinstance(photos, Photos)
        if trunk.training and torch.is_grad_enabled():
            return self._run(trunk, photos.augmented(rows) if self.augment else photos.batch(rows))
        with torch.no_grad():
            parts = range(0, len(rows), CHUNK)
            return torch.cat([self._run(trunk, photos.batch(rows[start : start + CHUNK])) for start in parts])

    def _run(self, trunk: nn.Module, photos: npt.NDArray[np.uint8]) -> Tensor:
        """Features in float32, whatever the precision of the trunk: scores, weights and loss are exact."""
        pixels = self._pixels(photos)
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            features: Tensor = trunk(pixels)
        return features.float()
