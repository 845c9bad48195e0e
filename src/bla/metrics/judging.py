"""All methods judged at once: every figure that the feature map alone can give, in one pass over the features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bla.metrics.cells import SIZES, Features, Head, batches, is_affine, judged, probability, read_cells, rows_of
from bla.metrics.ranking import places

Values = dict[str, Tensor]
"""A value for every image by the name of a metric, (N,) each."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """A method's ranking and selection (N, H, W) of the images judged, and the head of the classifier it explains."""

    ranking: Tensor
    selected: Tensor
    head: Head


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Whether the judge predicts each image's class from its m best cells, and from all others: (N, S) each."""

    sizes: tuple[int, ...]
    kept: Tensor
    left: Tensor


@torch.inference_mode()
def judge_methods(
    features: Features,
    methods: Mapping[str, Ranked],
    labels: Tensor | None,
    *,
    judge: Head | None = None,
    batch_size: int = 64,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Values], dict[str, Curve]]:
    """By method, its faithfulness by its own head, and its curve of accuracy against size by one common judge.

    Parameters
    ----------
    features: of the N images that the methods ranked.
    labels: (N,); without them there is no accuracy, loss or curve.
    judge: for example an evaluator (:func:`bla.metrics.train_evaluator`); it also predicts the class from the selected
        cells (``evaluator``) and from those left out (``evaluator_left``). None: no curves.
    """
    count, height, width = next(iter(methods.values())).ranking.shape
    sizes = tuple(size for size in SIZES if size <= height * width)
    like = rows_of(features, np.arange(1)).float()
    heads = dict.fromkeys(method.head for method in methods.values())
    affine = {head: is_affine(head, like.shape[1], like) for head in (*heads, *([judge] if judge else []))}
    own: dict[str, list[Values]] = {name: [] for name in methods}
    right = []
    for rows, stored in batches(features, count, batch_size):
        maps = stored.float()
        classes = None if labels is None else labels[rows].to(maps.device)
        chosen = {name: method.selected[rows].to(maps.device) for name, method in methods.items()}
        for head in heads:
            names = [name for name, method in methods.items() if method.head is head]
            pairs = [mask for name in names for mask in (chosen[name], ~chosen[name])]
            sets = torch.stack([torch.ones_like(pairs[0]), *pairs], dim=1)
            logits = read_cells(head, maps, sets, affine=affine[head])
            for name, pair in zip(names, torch.split(logits[:, 1:], 2, dim=1), strict=True):
                own[name].append(_faithfulness(logits[:, :1], pair, classes))
        if judge is not None and classes is not None:
            kept = []
            for name, method in methods.items():
                ranks = places(method.ranking[rows].to(maps.device))
                kept.append(torch.stack([chosen[name], *(ranks < size for size in sizes)], dim=1))
            sets = torch.stack([mask for each in kept for mask in (each, ~each)], dim=1).flatten(1, 2)
            named = judged(read_cells(judge, maps, sets, affine=affine[judge]), classes)[0]
            right.append(named.reshape(len(rows), len(methods), 2, 1 + len(sizes)).cpu())
        report(int(rows[-1]) + 1, count)
    values = {
        name: {metric: torch.cat([part[metric] for part in parts]) for metric in parts[0]}
        for name, parts in own.items()
    }
    curves: dict[str, Curve] = {}
    for name, each in zip(methods, torch.cat(right).unbind(1) if right else (), strict=bool(right)):
        curves[name] = Curve(sizes, each[:, 0, 1:], each[:, 1, 1:])
        for suffix, correct in (("", each[:, 0].double()), ("_left", each[:, 1].double())):
            values[name] |= {f"evaluator{suffix}": correct[:, 0], f"area{suffix}": correct[:, 1:].mean(dim=1)}
    return values, curves


def _faithfulness(whole: Tensor, pair: Tensor, labels: Tensor | None) -> Values:
    """Of the logits from all cells (B, 1, K), and from the selected cells and the others (B, 2, K)."""
    predicted = whole[:, 0].argmax(dim=1)
    p, kept, left = probability(torch.cat([whole, pair], dim=1), predicted).unbind(1)
    found = {
        "agreement": (pair[:, 0].argmax(dim=1) == predicted).double(),
        "sufficiency": p - kept,
        "comprehensiveness": p - left,
    }
    if labels is not None:
        correct, loss = judged(pair[:, :1], labels)
        found |= {"accuracy": correct[:, 0].double(), "loss": loss[:, 0]}
    return {metric: value.cpu() for metric, value in found.items()}
