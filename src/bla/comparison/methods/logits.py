"""Methods that need no library: what the head says at each cell about the class, and such maps smoothed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.comparison.methods.method import Batch, ComparisonError, Method, PooledClassifier
from bla.metrics import is_affine
from bla.model.evidence import ask, evidence, linear_layer
from bla.model.untouched import untouched


def cam(classifier: PooledClassifier) -> Method:
    r"""Class activation maps (Zhou et al. 2016): :math:`M_n = W_c \cdot F_n`, the head's logit at each cell.

    A ComparisonError if the head is not affine: then there is no such W.
    """
    head = classifier.head
    channels = next((module.in_features for module in head.modules() if isinstance(module, nn.Linear)), None)
    with untouched(head):
        linear = channels is not None and is_affine(head, channels, next(head.parameters()))
    if not linear:
        raise ComparisonError("expected a linear head for cam, got another: compare grad-cam, which takes any")

    def maps(batch: Batch) -> Tensor:
        cells = batch.features.flatten(2).transpose(1, 2).float()
        with untouched(head), torch.no_grad():
            logits = head(cells.flatten(0, 1)) - head(cells[:1, 0] * 0)
        own = batch.targets[:, None, None].expand(-1, cells.shape[1], 1)
        found: Tensor = logits.reshape(*cells.shape[:2], -1).gather(2, own).squeeze(2)
        return found.reshape(-1, *batch.features.shape[2:])

    return Method("cam", "CAM", "baseline", True, maps, "the linear head's logit at each cell")


def c_minus_e(classifier: PooledClassifier) -> Method:
    r"""C - E: :math:`M_n = F_n \cdot N \partial \log \frac{p_c}{1 - p_c} / \partial F_n` for class c and N cells.

    With a linear head CAM of the class less the CAMs of the other classes, weighted by the probabilities predicted from
    all cells: :math:`\propto W_c \cdot F_n - \sum_k p_k W_k \cdot F_n`.
    """
    head = classifier.head

    def maps(batch: Batch) -> Tensor:
        with untouched(head):
            features, targets = batch.features.float().clone(), batch.targets.clone()
            layer = linear_layer(head, features.shape[1])
            return evidence(head, features, ask(head, features, layer, targets), layer)[:, 0].detach()

    note = "the gradient of the log odds at each cell; with a linear head the class's logit less the expected one"
    return Method("c-e", "c - E", "baseline", True, maps, note)


def smoothed(method: Method) -> Method:
    """A method's maps, each cell the mean of its 3 x 3 neighbours; at the border of those that exist."""

    def maps(batch: Batch) -> Tensor:
        found = method.maps(batch)[:, None].float()
        return functional.avg_pool2d(found, 3, stride=1, padding=1, count_include_pad=False)[:, 0]

    name, title = f"{method.name}-3x3", f"{method.title}, 3x3"
    return dataclasses.replace(method, name=name, title=title, maps=maps, note=f"{method.note}, smoothed")
