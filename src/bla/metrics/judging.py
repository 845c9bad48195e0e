"""Many methods before the same judges at once: every figure that the feature map alone can give, in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bla.metrics.cells import SIZES, Head, is_affine, judged, probability, read_cells
from bla.metrics.leakage import Features
from bla.metrics.ranking import places

Values = dict[str, Tensor]
"""A value for every image by the name of a metric, (N,) each."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """A method's maps for the images that are judged.

    Attributes
    ----------
    ranking: (N, H, W), larger is more relevant.
    selected: booleans (N, H, W), what counts as its explanation.
    head: of the classifier that it explains, pooled features (B, C) to logits (B, K).
    """

    ranking: Tensor
    selected: Tensor
    head: Head


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Whether the judge names each image's class from its m best cells, and from all others: (N, S) each."""

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
    """Every method's faithfulness by its own head, and its curve of accuracy against size by one common judge.

    Parameters
    ----------
    features: of the N images that the methods ranked.
    labels: (N,); without them there is no accuracy, loss or curve.
    judge: an evaluator, say (:func:`bla.metrics.train_evaluator`); also names the class from the selected cells
        (``evaluator``) and from those left out (``evaluator_left``). None: no curves.

    Returns
    -------
    Values and curves by method.
    """
    count, grid = next((len(method.ranking), method.ranking.shape[1:]) for method in methods.values())
    sizes = tuple(size for size in SIZES if size <= grid[0] * grid[1])
    values: dict[str, dict[str, list[Tensor]]] = {name: {} for name in methods}
    curves: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in methods}
    groups: dict[int, list[str]] = {}
    for name, method in methods.items():
        groups.setdefault(id(method.head), []).append(name)
    affine: dict[int, bool] = {}
    for start in range(0, count, batch_size):
        rows = np.arange(start, min(start + batch_size, count))
        maps = (features[rows] if isinstance(features, Tensor) else features(rows)).float()
        own = None if labels is None else labels[rows].to(maps.device)

        def linear(head: Head, like: Tensor = maps) -> bool:
            if id(head) not in affine:
                affine[id(head)] = is_affine(head, like.shape[1], like)
            return affine[id(head)]

        chosen = {name: method.selected[rows].to(maps.device) for name, method in methods.items()}
        for names in groups.values():
            head = methods[names[0]].head
            everything = torch.ones_like(chosen[names[0]])
            sets = [everything, *(mask for name in names for mask in (chosen[name], ~chosen[name]))]
            logits = read_cells(head, maps, torch.stack(sets, dim=1), affine=linear(head))
            predicted = logits[:, 0].argmax(dim=1)
            p, named = probability(logits, predicted), logits.argmax(dim=2)
            correct, loss = (None, None) if own is None else judged(logits, own)
            for place, name in enumerate(names):
                kept = 1 + 2 * place
                found = {
                    "agreement": (named[:, kept] == predicted).double(),
                    "sufficiency": p[:, 0] - p[:, kept],
                    "comprehensiveness": p[:, 0] - p[:, kept + 1],
                }
                if correct is not None and loss is not None:
                    found |= {"accuracy": correct[:, kept].double(), "loss": loss[:, kept]}
                _add(values[name], found)
        if judge is not None and own is not None:
            sets = []
            for name, method in methods.items():
                place_of = places(method.ranking[rows].to(maps.device))
                by_size = [place_of < size for size in sizes]
                sets += [chosen[name], *by_size, ~chosen[name], *(~mask for mask in by_size)]
            right, _ = judged(read_cells(judge, maps, torch.stack(sets, dim=1), affine=linear(judge)), own)
            each = right.reshape(len(rows), len(methods), 2, 1 + len(sizes)).cpu()
            for place, name in enumerate(methods):
                kept_right, left_right = each[:, place, 0], each[:, place, 1]
                _add(
                    values[name],
                    {
                        "evaluator": kept_right[:, 0].double(),
                        "evaluator_left": left_right[:, 0].double(),
                        "area": kept_right[:, 1:].double().mean(dim=1),
                        "area_left": left_right[:, 1:].double().mean(dim=1),
                    },
                )
                curves[name].append((kept_right[:, 1:], left_right[:, 1:]))
        report(int(rows[-1]) + 1, count)
    joined = {name: {key: torch.cat(parts) for key, parts in found.items()} for name, found in values.items()}
    return joined, {
        name: Curve(sizes, torch.cat([kept for kept, _ in parts]), torch.cat([left for _, left in parts]))
        for name, parts in curves.items()
        if parts
    }


def _add(values: dict[str, list[Tensor]], found: Values) -> None:
    for name, value in found.items():
        values.setdefault(name, []).append(value.cpu())
