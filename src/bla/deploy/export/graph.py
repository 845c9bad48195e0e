"""The whole computation as one function of tensors, which is traced for export."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bla.data.photo import Transform
from bla.deploy.engine import Card
from bla.model.classifier import ExplainableClassifier
from bla.model.heads import grid_of, read_each

OUTPUTS = ("logits", "classifier_logits", "scores", "soft", "selected", "unbounded", "sizes", "answers")
EXPLAINED = "explained"  # a further output of class-aware explainers: the class (B,) that each explanation is about
MAPS = ("features", "earlier")  # inside of the graph: the trunk's map and, if there is one, the earlier one


class ExplainedGraph(nn.Module):
    r"""Pixels to prediction and explanation, and what the head says of other subsets.

    .. math:: \text{logits} = \mathrm{head}\bigl(\textstyle\sum_n h_n F_n\bigr), \qquad
              \text{answers}_m = \mathrm{head}\bigl(\textstyle\sum_n M_{mn} F_n / |M_m|\bigr)

    A size of 0 and a target of -1 ask for the explainer's own. With the sigmoid gate nothing is normalised.
    """

    def __init__(self, wrapped: ExplainableClassifier) -> None:
        super().__init__()
        self.trunk, self.attention, self.head = wrapped.trunk, wrapped.attention, wrapped.head
        self.answer = wrapped.answer
        with torch.no_grad():
            self.attention.freeze(self.trunk(torch.zeros(2, *wrapped.transform.shape)))

    def forward(
        self, pixels: Tensor, size: Tensor | None = None, masks: Tensor | None = None, target: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs, in the order of :data:`OUTPUTS`, then the maps and, with a target, the class explained."""
        features = self.trunk(pixels)
        last = parted(features, self.attention.earlier)
        selection = self.attention(features, size=size, target=target)
        if target is not None and selection.target is not None:
            last += (selection.target,)
        answer = self.answer(features, selection)
        unbounded, scores, soft, hard, *_ = selection
        outputs: tuple[Tensor, ...] = (
            answer.logits,
            answer.classifier_logits,
            scores,
            soft,
            hard > 0,
            unbounded,
            answer.sizes,
        )
        if masks is not None:
            subsets = masks if self.attention.gate else masks / masks.sum(dim=grid_of(masks), keepdim=True)
            outputs += (read_each(self.head, features, subsets),)
        return *outputs, *last


class NamedGraph(nn.Module):
    """``pixels``, or uint8 ``photos`` (B, h, w, 3), to a dictionary of the outputs: what a torch file holds."""

    def __init__(self, wrapped: ExplainableClassifier, card: Card) -> None:
        super().__init__()
        self.whole = ExplainedGraph(wrapped)
        self.transform: Transform | None = card.transform if card.entry == "photos" else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs by name, without answers."""
        pixels = images if self.transform is None else _prepared(images, self.transform)
        return dict(zip(OUTPUTS[:-1], self.whole(pixels), strict=False))


def parted(features: Tensor, earlier: int) -> tuple[Tensor, ...]:
    """The maps that the trunk has joined: the head's and, if it has channels, the earlier one."""
    return features.tensor_split([features.shape[1] - earlier], dim=1) if earlier else (features,)


def read_apart(model: Any) -> None:
    """Let what reads either of the joined maps, outputs of this graph, read that itself, so that no copy is made."""
    from onnx_ir.convenience import replace_all_uses_with
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    cuts = [value for value in model.graph.outputs if value.name in MAPS]
    if len(cuts) == len(MAPS):
        joined = cuts[0].producer().inputs[0].producer()
        for cut, part in zip(cuts, joined.inputs, strict=True):
            part.name = cut.name
            replace_all_uses_with(cut, part, replace_graph_outputs=True)
        RemoveUnusedNodesPass()(model)


def stable_sort(values: Any, *, stable: bool, dim: int, descending: bool = False) -> Any:
    """ONNX's TopK of all values, which sorts stably: torch's exporter takes no stable sort."""
    from onnxscript import opset20

    length = opset20.Shape(values, start=dim, end=dim + 1)
    return opset20.TopK(values, length, axis=dim, largest=descending)


def _prepared(photos: Tensor, transform: Transform) -> Tensor:
    values = photos.permute(0, 3, 1, 2).float()
    mode = transform.interpolation.replace("nearest", "nearest-exact")
    whole = _whole(values.shape[2], values.shape[3], transform)
    resized = F.interpolate(values, whole, mode=mode, antialias=mode != "nearest-exact")
    for axis, (length, side) in enumerate(zip(whole, transform.size, strict=True), start=2):
        half, odd = (length - side) // 2, (length - side) % 2
        resized = resized.narrow(axis, half + odd * (half % 2), side)  # half to even, as Python rounds
    mean, std = (values.new_tensor(numbers)[:, None, None] for numbers in (transform.mean, transform.std))
    return (resized.round().clamp(0, 255) - 255 * mean) / (255 * std)


def _whole(rows: Any, columns: Any, transform: Transform) -> tuple[Any, Any]:
    """The size (height, width) to which ``Transform`` resizes the whole photo, as integers that torch.export traces."""
    if transform.mode == "squash":
        height, width = transform.size
        return height, width
    down, across = (math.floor(side / transform.crop_fraction) for side in transform.size)
    if transform.mode == "squash-crop":
        return down, across
    if down == across:
        short = torch.sym_min(rows, columns)
        return rows * down // short, columns * down // short
    height, width = (2 * rows * across + columns) // (2 * columns), (2 * columns * down + rows) // (2 * rows)  # rounded
    return torch.sym_max(down, height), torch.sym_max(across, width)
