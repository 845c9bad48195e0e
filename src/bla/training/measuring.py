"""The metrics object: what trained networks score on examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bla.metrics import decided, scorer, size_summary, together
from bla.model.heads import read
from bla.progress import Progress, silent
from bla.training import processes
from bla.training.loop import chunks
from bla.training.networks import Examples, Networks
from bla.training.settings import TrainingError


@torch.no_grad()
def measure(
    networks: Networks, examples: Examples, report: Progress = silent, *, several: bool = False
) -> dict[str, Any]:
    """The metrics object: baseline, its continuation, soft and hard, agreement and size, over all examples.

    ``soft_renormalised`` is soft with each image's weights divided by their sum, which tells the gap between soft
    and hard from a difference of scale. Without labels the classifier's own predictions count as true. The processes of
    :mod:`bla.training.processes` measure a share each; every image counts once.

    With ``several`` labels an image each is by :class:`bla.metrics.SeveralLabels`; images agree where hard and
    baseline have the same labels above one half, and ``label_agreement`` is the share of all decisions that are alike.

    Raises
    ------
    TrainingError
        If there is no example.
    """
    if not len(examples):
        raise TrainingError("expected at least one image to measure on, got none")
    device = networks.device
    modes = {module: module.training for module in networks.modules()}
    networks.eval()
    names = ["baseline", "baseline_continued", "soft", "soft_renormalised", "hard"]
    accuracies = {name: scorer(several=several) for name in names}
    sizes = np.zeros(0, np.int64)
    agreed, labels_agreed = 0, 0.0
    try:
        for chosen in chunks(len(examples)):
            rows = examples.rows[chosen]
            features = networks.features(examples, rows)
            selection = networks.attention(features)
            renormalised = selection.soft / selection.soft.sum(dim=(1, 2), keepdim=True).clamp(min=1e-12)
            logits = {
                "baseline": networks.baseline(networks.pooled(examples, rows, "head")),
                "baseline_continued": networks.continued(networks.pooled(examples, rows, "continued")),
                "soft": read(networks.head, features, selection.soft),
                "soft_renormalised": read(networks.head, features, renormalised),
                "hard": read(networks.head, features, selection.hard),
            }
            predicted = decided(logits["baseline"], several=several)
            labels = predicted if examples.labels is None else torch.from_numpy(examples.labels[chosen]).to(device)
            for name, accuracy in accuracies.items():
                accuracy.update(logits[name], labels)
            alike = (decided(logits["hard"], several=several) == predicted).reshape(len(chosen), -1)
            agreed += int(alike.all(dim=1).sum())
            labels_agreed += float(alike.double().mean(dim=1).sum())
            counts = (selection.hard > 0).sum(dim=(1, 2)).cpu().numpy()
            found = np.bincount(counts, minlength=selection.hard[0].numel() + 1)
            sizes = found + sizes if len(sizes) else found
            report("evaluating", int(chosen[-1]) + 1, processes.share(len(examples)).stop)
    finally:
        for module, mode in modes.items():
            module.training = mode
    everyones = processes.everyones((accuracies, np.array([agreed, labels_agreed]), sizes))
    metrics: dict[str, Any] = {
        name: together([counted[name] for counted, _, _ in everyones]).result() for name in names
    }
    images, shares = np.sum([counts for _, counts, _ in everyones], axis=0).tolist()
    per_label = {"label_agreement": shares / len(examples)} if several else {}
    return metrics | {
        "agreement": images / len(examples),
        **per_label,
        "size": size_summary(np.sum([sizes for _, _, sizes in everyones if len(sizes)], axis=0)),
        "images": len(examples),
    }
