"""Sanity checks on a sample of the photos: randomised networks, and flipped, shifted and noisy photos."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bla.comparison.catalogue import METHODS, Setting
from bla.comparison.explanations import Explained
from bla.comparison.methods import Batch, Method
from bla.metrics.fitting import Rows
from bla.metrics.sanity import rank_correlation, stability
from bla.runs.run import Run

_BATCH = 8


def measure_sanity(
    setting: Setting, sample: Rows, explained: Mapping[str, Explained]
) -> dict[str, dict[str, dict[str, float]]]:
    """By method ``stability`` (by change of the photo) and ``cascade`` (by stage), mean rank correlations.

    The cascade randomises the heads, then the run's module, then the trunk's convolutions from the top: a third, two
    thirds, all of them. Normalisation layers stay as they are; methods trained for the comparison have no cascade.
    """
    photos, seed, trunk = setting.photos, setting.seed, setting.run.classifier.trunk
    parts = [sample[start : start + _BATCH] for start in range(0, len(sample), _BATCH)]
    batches = [photos.batch(part, photos.pixels(part)) for part in parts]
    methods = {name: one.method for name, one in explained.items()}
    cheap = {name: method for name, method in methods.items() if method.reads_photo and not method.needs_pixels}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, method in cheap.items():
        stable = [stability(method.on_pixels(batch, trunk), batch.seen(), seed=seed) for batch in batches]
        means = {change: float(torch.cat([each[change] for each in stable]).mean()) for change in stable[0]}
        found[name] = {"stability": means}
        setting.report("flipping, shifting, adding noise", len(found), len(cheap))
    original = {name: _maps(method, batches, trunk) for name, method in cheap.items() if METHODS[name].rebuilds}
    found |= {name: {**found[name], "cascade": {}} for name in original}
    randomised = copy.deepcopy(setting.run)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for stage, change in _stages(randomised).items():
            setting.report(f"randomising: {stage}", 0, 0)
            change()
            other = dataclasses.replace(setting, photos=dataclasses.replace(photos, run=randomised))
            for name, maps in original.items():
                others = _maps(METHODS[name].build(other), batches, randomised.classifier.trunk)
                likeness = rank_correlation(maps, torch.nan_to_num(others, posinf=0, neginf=0))
                found[name]["cascade"][stage] = float(likeness.mean())
    return found


def _maps(method: Method, batches: Sequence[Batch], trunk: nn.Module) -> Tensor:
    return torch.cat([method.on_pixels(batch, trunk)(batch.seen()).cpu() for batch in batches])


def _stages(run: Run) -> dict[str, Callable[[], None]]:
    classifier, networks = run.classifier, run.networks
    convolutions = [module for module in classifier.trunk.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    third = -(-len(convolutions) // 3)

    def heads() -> None:
        for head in {networks.baseline: None, networks.head: None}:
            model = getattr(head, "model", None)  # a timm classifier's head shares the trunk's module
            _restart(head.modules() if model is None else [model.get_classifier()])

    return {
        "heads": heads,
        "module": classifier.attention.reset_parameters,
        "trunk, top third": lambda: _restart(convolutions[-third:]),
        "trunk, two thirds": lambda: _restart(convolutions[-2 * third :]),
        "trunk": lambda: _restart(convolutions),
    }


def _restart(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
