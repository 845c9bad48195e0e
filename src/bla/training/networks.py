"""What is trained, and on what: examples, the module, its head, the baseline and the fair control."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bla.model.attention import Attention
from bla.model.heads import reads_maps
from bla.training.cache import FeatureCache
from bla.training.photos import Photos, StreamedFeatures
from bla.training.settings import TrainingError

Stage = Literal["head", "module", "continued"]
"""The stages of a training, in their order."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Rows of a feature cache with their classes; no classes where the classifier's own predictions are learnt.

    Where a set's features fit no disk, they are computed anew; where the trunk is trained too, they change with it,
    and the rows are of photos.
    """

    cache: FeatureCache | StreamedFeatures | Photos
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: npt.NDArray[np.int64]) -> Examples:
        """Some of them."""
        labels = None if self.labels is None else self.labels[indices]
        return Examples(self.cache, self.rows[indices], labels)


class Networks(nn.Module):
    """What is trained: the baseline's head, the module, the head that reads it, and the control.

    ``baseline`` reads mean-pooled features: the head of the first stage, or the classifier's own. ``head`` starts
    from it, as does ``continued``, the fair control: mean-pooled, but trained for the epochs of both stages. The judge
    of a class-aware module is the baseline.
    """

    def __init__(self, attention: Attention, baseline: nn.Module, *, own_head: bool) -> None:
        super().__init__()
        self.attention = attention
        self.baseline = baseline
        # A classifier's own head is one and the same in all three places, and not ours to save.
        self.head = baseline if own_head else copy.deepcopy(baseline)
        self.continued = baseline if own_head else copy.deepcopy(baseline)
        self.own_head = own_head
        if attention.class_conditional:
            if reads_maps(baseline):
                raise TrainingError(
                    "expected a head that reads pooled vectors, to be asked about a cell, got one that reads maps: "
                    "train without class_aware"
                )
            attention.judge = baseline

    @property
    def parts(self) -> tuple[str, ...]:
        """The children that a run or a checkpoint must keep."""
        return ("attention",) if self.own_head else ("attention", "baseline", "head", "continued")

    def saved(self) -> dict[str, Tensor]:
        """The tensors that a run or a checkpoint must keep."""
        state = self.state_dict()
        return {
            key: value
            for key, value in state.items()
            if key.split(".", maxsplit=1)[0] in self.parts
            and not key.startswith("attention.judge.")  # the baseline's own
        }

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.attention.parameters()).device

    def features(self, examples: Examples, rows: npt.NDArray[np.int64]) -> Tensor:
        """What the module reads, (B, C, H, W)."""
        return cast("FeatureCache | StreamedFeatures", examples.cache).batch(rows).to(self.device)

    def pooled(self, examples: Examples, rows: npt.NDArray[np.int64], stage: Stage) -> Tensor:
        """What the mean-pooled head of a stage reads, (B, C): of ``head`` or of ``continued``.

        A classifier's own head that reads maps takes them whole.
        """
        if reads_maps(self.baseline):
            return self.features(examples, rows)
        return cast("FeatureCache | StreamedFeatures", examples.cache).pooled_batch(rows).to(self.device)

    def trunks(self, stage: Stage) -> tuple[nn.Module, ...]:
        """The trunk that a stage trains beside its head or module; here none."""
        return ()

    def begin(self, stage: Stage) -> None:
        """Let a stage's head start from the first stage's."""
        if stage != "head" and not self.own_head:
            head = self.head if stage == "module" else self.continued
            head.load_state_dict(self.baseline.state_dict())

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`saved` gave.

        Raises
        ------
        TrainingError
            If the tensors are not those of these networks.
        """
        own = self.saved()
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in saved.items()}:
            odd = sorted(set(own) ^ set(saved)) or "other shapes"
            raise TrainingError(f"expected the tensors of these networks, got others: {odd}")
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(saved[key])


def new_head(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """The head of transfer learning: dropout and one linear layer."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, classes))
