"""Cross entropy and top-k accuracy, batch by batch, counted exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass
class Accuracy:
    r"""Mean cross entropy, and the share of images whose class is among the one or five best logits.

    .. math:: \mathrm{loss} = -\tfrac1n \sum_i \log \mathrm{softmax}(l_i)_{y_i}

    Every image counts once, whatever the batches. With fewer than five classes top-5 counts all of them. A logit
    that ties with the class's own and comes first counts as better.

    >>> accuracy = Accuracy()
    >>> accuracy.update(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
    >>> accuracy.result()["top1"], round(accuracy.result()["loss"], 4)
    (0.5, 1.1269)
    """

    images: int = 0
    _loss: float = 0.0
    _top1: int = 0
    _top5: int = 0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (B, K), class indices (B,)."""
        wide = logits.double()
        own = wide.gather(1, targets[:, None])
        earlier = torch.arange(wide.shape[1], device=wide.device) < targets[:, None]
        # not (<=), rather than >: a NaN beats everything, and is beaten by everything. topk has no order for ties.
        better = (~(wide <= own) | ((wide == own) & earlier)).sum(dim=1)
        self._loss += functional.cross_entropy(wide, targets, reduction="sum").item()
        self._top1 += int((better < 1).sum())
        self._top5 += int((better < 5).sum())
        self.images += len(targets)

    def result(self) -> dict[str, Any]:
        """``loss`` (nats an image), ``top1`` and ``top5`` (shares); a ValueError if nothing was counted."""
        if not self.images:
            raise ValueError("expected at least one image, got none")
        return {"loss": self._loss / self.images, "top1": self._top1 / self.images, "top5": self._top5 / self.images}


@dataclasses.dataclass
class Values:
    r"""Mean squared error of values, and the share of the targets' variance that they explain.

    .. math:: R^2 = 1 - \sum_i (v_i - t_i)^2 / \sum_i (t_i - \bar t)^2

    >>> counted = Values()
    >>> counted.update(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[1.0], [2.0], [3.0]]))
    >>> counted.result()
    {'loss': 1.3333333333333333, 'r2': -1.0}
    """

    values: list[Tensor] = dataclasses.field(default_factory=list)
    targets: list[Tensor] = dataclasses.field(default_factory=list)

    def update(self, values: Tensor, targets: Tensor) -> None:
        """Count a batch: values and targets, (B, 1) each."""
        self.values.append(values.double().cpu())
        self.targets.append(targets.double().cpu())

    def result(self) -> dict[str, Any]:
        """``loss``, the squared error, and ``r2``, 0 where all targets are alike."""
        if not self.values:
            raise ValueError("expected at least one image, got none")
        targets = torch.cat(self.targets)
        squares, spread = (torch.cat(self.values) - targets).square(), (targets - targets.mean()).square().sum()
        return {"loss": float(squares.mean()), "r2": float(1 - squares.sum() / spread) if spread else 0.0}
