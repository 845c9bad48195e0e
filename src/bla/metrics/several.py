"""Labels of which an image may have several or none: cross entropy, and how well each is told from its absence."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bla.metrics.accuracy import Accuracy


@dataclasses.dataclass
class SeveralLabels:
    r"""Mean binary cross entropy, and by label average precision and area under the ROC curve.

    .. math:: \mathrm{loss} = -\tfrac1{nK} \sum_{ik} y_{ik} \log \sigma(l_{ik}) + (1 - y_{ik}) \log(1 - \sigma(l_{ik}))

    As :class:`bla.metrics.Accuracy`, batch by batch. What is asked about each label by itself has no answer where
    every image has it or none; the mean over the others is the macro average.

    Examples
    --------
    >>> counted = SeveralLabels()
    >>> counted.update(torch.tensor([[2.0, -1.0], [1.0, 3.0], [-1.0, 2.0]]), torch.tensor([[1, 0], [0, 0], [0, 1]]))
    >>> found = counted.result()
    >>> found["by_label"]["auc"], found["auc"], found["exact"]
    ([1.0, 0.5], 0.75, 0.6666666666666666)
    """

    logits: list[npt.NDArray[np.float64]] = dataclasses.field(default_factory=list)
    labels: list[npt.NDArray[np.int64]] = dataclasses.field(default_factory=list)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (B, K), and 0 or 1 of the same shape."""
        self.logits.append(logits.double().cpu().numpy())
        self.labels.append(targets.long().cpu().numpy())

    def __add__(self, other: SeveralLabels) -> SeveralLabels:
        """What both have counted."""
        return SeveralLabels(self.logits + other.logits, self.labels + other.labels)

    def result(self) -> dict[str, Any]:
        """``loss``; ``average_precision`` and ``auc``, macro; ``exact``, ``by_label``.

        ``exact`` is the share of images whose labels above one half are all of theirs and no other. A macro average is
        None where no label has an answer.

        Raises
        ------
        ValueError
            If nothing was counted.
        """
        if not self.logits:
            raise ValueError("expected at least one image, got none")
        logits, labels = np.concatenate(self.logits), np.concatenate(self.labels)
        loss = functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels).double())
        columns = list(zip(logits.T, labels.T, strict=True))
        by_label = {
            "average_precision": [average_precision(*column) for column in columns],
            "auc": [area_under_curve(*column) for column in columns],
        }
        means: dict[str, float | None] = {}
        for name, values in by_label.items():
            answers = [value for value in values if value is not None]
            means[name] = float(np.mean(answers)) if answers else None
        exact = float(((logits > 0) == (labels > 0)).all(axis=1).mean())
        return {"loss": loss.item(), **means, "exact": exact, "by_label": by_label}


def average_precision(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float | None:
    r"""The mean over the positives of the precision where each is reached; scores that tie are reached together.

    >>> average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.8333333333333333
    """
    positives = int(labels.sum())
    if not 0 < positives < len(labels):
        return None
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(labels[order])
    last = np.append(np.diff(scores[order]) != 0, True)  # of each group of ties
    found, reached = found[last], np.arange(1, len(labels) + 1)[last]
    return float((np.diff(found, prepend=0) * found / reached).sum() / positives)


def area_under_curve(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float | None:
    """The share of pairs, a positive and a negative, of which the positive scores higher; ties count half.

    >>> area_under_curve(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.75
    """
    positives = int(labels.sum())
    if not 0 < positives < len(labels):
        return None
    negatives = np.sort(scores[labels == 0])
    below = np.searchsorted(negatives, scores[labels == 1], "left")
    upto = np.searchsorted(negatives, scores[labels == 1], "right")
    return float((below + upto).sum() / (2 * positives * len(negatives)))


def decided(logits: Tensor, *, several: bool) -> Tensor:
    """What logits (B, K) say: the best class (B,); of several labels those above one half, 0 or 1, (B, K)."""
    return (logits > 0).long() if several else logits.argmax(-1)


def scorer(*, several: bool) -> Accuracy | SeveralLabels:
    """What counts how good predictions are."""
    return SeveralLabels() if several else Accuracy()


def together(parts: Sequence[Accuracy | SeveralLabels]) -> Accuracy | SeveralLabels:
    """What all of one kind have counted."""
    return functools.reduce(operator.add, parts)
