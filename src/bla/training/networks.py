"""Networks and their examples: the module, its head, the baseline and the fair control."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bla.data.image_sets import Task
from bla.model.attention import Attention
from bla.model.heads import reads_maps
from bla.training.cache import FeatureCache
from bla.training.masked import MaskedAnswers
from bla.training.photos import Photos, StreamedFeatures
from bla.training.settings import TrainingError

StageName = Literal["head", "module", "continued"]
"""The stages of a training, in their order."""

EVALUATION_BATCH = 64


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Rows of a source with their classes; without, if the classifier's own predictions are the targets.

    ``answers`` are the classifier's to the same images masked, for a module that learns from them.
    """

    cache: FeatureCache | StreamedFeatures | Photos
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    answers: MaskedAnswers | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: npt.NDArray[np.int64]) -> Examples:
        labels = None if self.labels is None else self.labels[indices]
        return Examples(self.cache, self.rows[indices], labels, self.answers)

    def batches(self) -> Iterator[Examples]:
        """All of them in order, a batch of evaluation at a time."""
        for start in range(0, len(self), EVALUATION_BATCH):
            yield self.subset(np.arange(start, min(start + EVALUATION_BATCH, len(self))))


class Networks(nn.Module):
    """The module, and the heads that are trained with it and beside it.

    ``baseline`` reads mean-pooled features: the head of the first stage, or the classifier's own. ``head``, which reads
    the module's selection, starts from it, as does ``continued``, the fair control: mean-pooled, but trained for the
    epochs of both stages. The judge of a class-conditional module is the baseline. ``task`` is what they predict.
    """

    def __init__(self, attention: Attention, baseline: nn.Module, *, own_head: bool, task: Task = "class") -> None:
        super().__init__()
        self.task: Task = task
        self.attention = attention
        self.baseline = baseline
        # A classifier's own head is the same in all three places, and never saved.
        self.head = baseline if own_head else copy.deepcopy(baseline)
        self.continued = baseline if own_head else copy.deepcopy(baseline)
        self.own_head = own_head
        self.parts = ["attention"] if own_head else ["attention", "baseline", "head", "continued"]
        attention.judged_by(baseline)

    def saved(self) -> dict[str, Tensor]:
        """The tensors that runs and checkpoints hold; the judge is the baseline, so it is not repeated."""
        return {
            key: value
            for key, value in self.state_dict().items()
            if key.split(".", maxsplit=1)[0] in self.parts and not key.startswith("attention.judge.")
        }

    @property
    def device(self) -> torch.device:
        return next(self.attention.parameters()).device

    def features(self, examples: Examples) -> Tensor:
        """The input of the module, (B, C, H, W)."""
        return cast("FeatureCache | StreamedFeatures", examples.cache).batch(examples.rows).to(self.device)

    def pooled(self, examples: Examples, stage: StageName) -> Tensor:
        """The input of a stage's mean-pooled head, (B, C); the whole map if the head reads maps."""
        if reads_maps(self.baseline):
            return self.features(examples)
        return cast("FeatureCache | StreamedFeatures", examples.cache).pooled_batch(examples.rows).to(self.device)

    def of_stage(self, stage: StageName) -> tuple[nn.Module, ...]:
        """The head of a stage, and its trunk if that is fine-tuned."""
        return ({"head": self.baseline, "module": self.head, "continued": self.continued}[stage],)

    def begin(self, stage: StageName) -> None:
        """Start a stage's head and trunk from the first stage's."""
        for first, module in zip(self.of_stage("head"), self.of_stage(stage), strict=True):
            if module is not first:
                module.load_state_dict(first.state_dict())

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the tensors of :meth:`saved`; a TrainingError if they belong to other networks."""
        own = self.saved()
        least = "attention.score.least"  # which weights of before there was one lack
        saved = {**{key: value for key, value in own.items() if key == least}, **saved}
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in saved.items()}:
            odd = sorted(set(own) ^ set(saved)) or "other shapes"
            raise TrainingError(f"expected the tensors of these networks, got others: {odd}")
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(saved[key])


def new_head(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """The head of transfer learning: dropout and one linear layer."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, classes))
