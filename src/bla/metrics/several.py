"""Several labels per image, or none: cross entropy, and how well the scores separate each label from its absence."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bla.data.image_sets import Task
from bla.metrics.accuracy import Accuracy, Values

Scores = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclasses.dataclass
class SeveralLabels:
    r"""Mean binary cross entropy, and by label average precision and area under the ROC curve.

    .. math:: \mathrm{loss} = -\tfrac1{nK} \sum_{ik} y_{ik} \log \sigma(l_{ik}) + (1 - y_{ik}) \log(1 - \sigma(l_{ik}))

    Counts batch by batch, as :class:`bla.metrics.Accuracy` does. A label that all images have, or none, has neither
    average precision nor area; the mean over the other labels is the macro average.

    >>> counted = SeveralLabels()
    >>> counted.update(torch.tensor([[2.0, -1.0], [1.0, 3.0], [-1.0, 2.0]]), torch.tensor([[1, 0], [0, 0], [0, 1]]))
    >>> found = counted.result()
    >>> found["by_label"]["auc"], found["auc"], found["exact"]
    ([1.0, 0.5], 0.75, 0.6666666666666666)
    """

    logits: list[Scores] = dataclasses.field(default_factory=list)
    labels: list[Labels] = dataclasses.field(default_factory=list)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (B, K), and 0 or 1 of the same shape."""
        self.logits.append(logits.double().cpu().numpy())
        self.labels.append(targets.long().cpu().numpy())

    def result(self) -> dict[str, Any]:
        """``loss``; ``average_precision`` and ``auc``, macro, None if no label has a value; ``exact``; ``by_label``.

        ``exact`` is the share of images whose predicted labels, those above one half, are exactly their own.
        """
        if not self.logits:
            raise ValueError("expected at least one image, got none")
        logits, labels = np.concatenate(self.logits), np.concatenate(self.labels)
        loss = functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels).double())
        separations = [separation(*column) for column in zip(logits.T, labels.T, strict=True)]
        by_label = dict(zip(("average_precision", "auc"), map(list, zip(*separations, strict=True)), strict=True))
        means: dict[str, float | None] = {}
        for name, values in by_label.items():
            known = [value for value in values if value is not None]
            means[name] = float(np.mean(known)) if known else None
        exact = float(((logits > 0) == (labels > 0)).all(axis=1).mean())
        return {"loss": loss.item(), **means, "exact": exact, "by_label": by_label}


def separation(scores: Scores, labels: Labels) -> tuple[float, float] | tuple[None, None]:
    """Average precision, and the area under the ROC curve; None if all images have the label, or none.

    The first is the mean over the positives of the precision where each is reached, tied scores together; the second
    the share of pairs of a positive and a negative in which the positive scores higher, ties counting half.

    >>> separation(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    (0.8333333333333333, 0.75)
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each group of ties
    found = np.append(0, np.cumsum(labels[order])[last])  # positives, and negatives, that score at least as high
    missed = np.append(0, last + 1) - found
    if not found[-1] or not missed[-1]:
        return None, None
    precision = (np.diff(found) * found[1:] / (found + missed)[1:]).sum() / found[-1]
    area = (np.diff(missed) * (found[1:] + found[:-1])).sum() / (2 * found[-1] * missed[-1])
    return float(precision), float(area)


def decided(logits: Tensor, task: Task) -> Tensor:
    """The predictions of logits (B, K): the best class (B,), 0 or 1 for each label (B, K), or the values (B, 1)."""
    return logits if task == "value" else (logits > 0).long() if task == "labels" else logits.argmax(-1)


def scorer(task: Task) -> Accuracy | SeveralLabels | Values:
    """An empty count of how good predictions are."""
    kinds: dict[Task, type[Accuracy | SeveralLabels | Values]]
    kinds = {"class": Accuracy, "labels": SeveralLabels, "value": Values}
    return kinds[task]()
