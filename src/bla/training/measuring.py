"""The metrics object: what trained networks score on examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bla.metrics import decided, scorer, size_summary
from bla.model.heads import grid_of, read
from bla.model.untouched import untouched
from bla.progress import Progress, silent
from bla.training.networks import Examples, Networks
from bla.training.settings import Settings, TrainingError


def measure(networks: Networks, examples: Examples, report: Progress = silent) -> dict[str, Any]:
    """The metrics object: baseline, its continuation, soft and hard, agreement and size, over all examples.

    ``soft_renormalised`` is soft with each image's weights divided by their sum, which tells the gap between soft
    and hard from a difference of scale. Without labels the classifier's own predictions count as true.

    Of several labels an image each is by :class:`bla.metrics.SeveralLabels`; images agree where hard and baseline have
    the same labels above one half, and ``label_agreement`` is the share of all decisions that are alike. Of values each
    is by :class:`bla.metrics.Values`, and agreement is the R^2 of hard for the baseline's.
    """
    if not len(examples):
        raise TrainingError("expected at least one image to measure on, got none")
    names = ("baseline", "baseline_continued", "soft", "soft_renormalised", "hard")
    task = networks.task
    accuracies = {name: scorer(task) for name in names}
    counts: list[int] = []
    cells = agreed = 0
    decisions = 0.0
    with untouched(networks), torch.no_grad():
        for batch in examples.batches():
            features = networks.features(batch)
            selection = networks.attention(features)
            total = selection.soft.sum(dim=grid_of(selection.soft, 1), keepdim=True).clamp(min=1e-12)
            logits = {
                "baseline": networks.baseline(networks.pooled(batch, "head")),
                "baseline_continued": networks.continued(networks.pooled(batch, "continued")),
                "soft": read(networks.head, features, selection.soft),
                "soft_renormalised": read(networks.head, features, selection.soft / total),
                "hard": read(networks.head, features, selection.hard),
            }
            predicted = decided(logits["baseline"], task)
            labels = predicted if batch.labels is None else torch.from_numpy(batch.labels).to(networks.device)
            for name, accuracy in accuracies.items():
                accuracy.update(logits[name], labels)
            alike = (decided(logits["hard"], task) == predicted).reshape(len(batch), -1)
            agreed += int(alike.all(dim=1).sum())
            decisions += float(alike.double().mean(dim=1).sum())
            cells = selection.hard[0].numel()
            counts += (selection.hard > 0).flatten(1).sum(dim=1).tolist()
            report("evaluating", len(counts), len(examples))
    found = {name: accuracy.result() for name, accuracy in accuracies.items()}
    return {
        **found,
        "agreement": found["hard"]["r2"] if task == "value" else agreed / len(examples),
        **({"label_agreement": decisions / len(examples)} if task == "labels" else {}),
        "size": size_summary(np.bincount(counts, minlength=cells + 1)),
        "images": len(examples),
    }


def diagnosed(
    networks: Networks, settings: Settings, examples: Examples, metrics: Mapping[str, Any], *, dead: bool
) -> str | None:
    """Why a trained module explains nothing, and what to change; None where it does not look so.

    ``dead``: in some epoch no cell passed a gradient. ``metrics`` are :func:`measure`'s of these examples.
    """
    size, rate = metrics["size"], settings.stages.learning_rate
    change = f"lower the learning rate ({rate:g}), or take another seed or more images"
    if settings.setup == "bla-px" and size["min"] == size["cells"]:
        return f"every image needs all {size['cells']} cells to keep its class: explain with a size of your own"
    if settings.setup != "l2x-f" and (dead or size["min"] == size["cells"]):
        return (
            f"the module has died: all {size['cells']} cells of every image are selected, being at the bound, where no "
            f"gradient passes: {change}"
        )
    if settings.setup != "l2x-f" and size["max"] == 1 < size["cells"] and settings.selection.mean_size != 1:
        return f"no cell of any image reaches the bound, so that each shows its best cell alone: {change}"
    with untouched(networks), torch.no_grad():
        few = next(examples.batches())
        features = networks.features(few)
        logits = read(networks.head, features, networks.attention(features).hard)
    if len(logits) > 1 and (logits - logits[0]).abs().max() <= 1e-6 * logits.abs().max():
        return "the logits are the same for every image: check the classifier's weights, and the transform"
    return None
