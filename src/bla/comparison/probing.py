"""What runs the whole network again: pixels changed, networks randomised, photos flipped; on a seeded sample."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bla.comparison.making import RUN, Methods
from bla.comparison.methods import Batch, Method, PooledClassifier
from bla.comparison.subjects import Subjects
from bla.files import read_json, write_json
from bla.metrics import pixels as pixel_metrics
from bla.metrics import sanity
from bla.progress import Progress
from bla.runs import run as runs

_BATCH = 8
_UNTRAINED = (RUN, "cam", "grad-cam", "grad-cam++", "layer-cam", "hires-cam", "norm")
"""Methods that can be built on a randomised network without training anything."""


class Sample:
    """Photos drawn from those compared on, read once, with the predictions that they are asked about."""

    def __init__(
        self,
        opened: runs.Run,
        pooled: PooledClassifier,
        subjects: Subjects,
        targets: Tensor,
        *,
        count: int,
        seed: int,
    ) -> None:
        self.opened = opened
        self.pooled = pooled
        self.rows = np.sort(np.random.RandomState([seed, 7]).permutation(len(subjects))[:count])
        transform, classifier = opened.classifier.transform, opened.classifier
        photos = [transform.read(subjects.name(int(row))).pixels for row in self.rows]
        self.pixels = classifier.pixels(np.stack(photos))
        self.targets = targets[self.rows].to(self.pixels.device)
        grey = classifier.pixels(np.full((1, 1, 1, 3), 127, np.uint8))
        self.grey = grey[0, :, 0, 0]

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self) -> list[npt.NDArray[np.int64]]:
        """Places in the sample, a batch at a time."""
        return [np.arange(start, min(start + _BATCH, len(self))) for start in range(0, len(self), _BATCH)]

    def explainer(
        self, method: Method, part: npt.NDArray[np.int64], trunk: nn.Module | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Pixels to the method's maps, each photo asked about the same class as ever; for several copies as well."""
        trunk = self.opened.classifier.trunk if trunk is None else trunk
        targets, rows = self.targets[part], torch.from_numpy(self.rows[part])

        def explain(pixels: Tensor) -> Tensor:
            copies = len(pixels) // len(part)  # captum repeats each photo in its place
            with torch.no_grad():
                features = trunk(pixels)
            asked, places = targets.repeat_interleave(copies), rows.repeat_interleave(copies)
            return method.maps(Batch(features, asked, places, pixels)).float()

        return explain


def measure_pixels(
    sample: Sample,
    made: Mapping[str, Method],
    rankings: Mapping[str, Tensor],
    selected: Mapping[str, Tensor],
    *,
    folder: Path,
    signature: str,
    seed: int,
    report: Progress,
) -> dict[str, dict[str, list[float]]]:
    """Every pixel-level metric of every method for each photo of the sample; goes on by method and batch.

    All maps are judged through one network, the mean-pooled classifier. Max-sensitivity explains each photo anew
    several times and is left out for methods that run the whole network anyway.
    """
    found: dict[str, dict[str, list[float]]] = {}
    network = sample.pooled
    for place, (name, method) in enumerate(made.items()):
        file = folder / f"{name}.json"
        state = _state(file, [signature, method.note, sample.rows.tolist()])
        for part in sample.parts():
            if part[0] < state["done"]:
                continue
            pixels, targets = sample.pixels[part], sample.targets[part]
            maps, masks = rankings[name][sample.rows[part]], selected[name][sample.rows[part]]
            maps, masks = maps.to(pixels.device), masks.to(pixels.device)
            values = pixel_metrics.deletion_insertion(network, pixels, maps, targets)
            values |= pixel_metrics.masked_confidence(network, pixels, masks, targets)
            values |= pixel_metrics.road(network, pixels, maps, targets, seed=seed)
            values |= pixel_metrics.kept_pixels(network, pixels, masks, sample.grey)
            values["infidelity"] = pixel_metrics.infidelity(network, pixels, maps, targets, seed=seed)
            if not method.needs_pixels and name != "shuffled":
                explain = sample.explainer(method, part)
                values["max_sensitivity"] = pixel_metrics.max_sensitivity(explain, pixels, seed=seed)
            for metric, value in values.items():
                state["values"].setdefault(metric, []).extend(round(float(each), 6) for each in value)
            state["done"] = int(part[-1]) + 1
            write_json(file, state)
            report("changing pixels", place * len(sample) + state["done"], len(made) * len(sample))
        found[name] = state["values"]
    return found


def _state(file: Path, signature: list[Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = read_json(file)
        if state["signature"] == signature:
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"signature": signature, "done": 0, "values": {}}


def measure_sanity(
    sample: Sample, made: Mapping[str, Method], *, seed: int, report: Progress
) -> dict[str, dict[str, dict[str, float]]]:
    """By method, ``cascade`` (mean correlation by stage) and ``stability`` (by change); trained rivals have no cascade.

    The cascade randomises the heads, then the run's module, then the trunk's convolutions from the top: a third, two
    thirds, all of them. Normalisation layers stay as they are.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    cheap = {name: method for name, method in made.items() if not method.needs_pixels and name != "shuffled"}
    for name, method in cheap.items():
        parts = [
            sanity.stability(sample.explainer(method, part), sample.pixels[part], seed=seed) for part in sample.parts()
        ]
        found[name] = {"stability": {change: _mean([part[change] for part in parts]) for change in parts[0]}}
        report("flipping, shifting, adding noise", len(found), len(cheap))
    wanted = [name for name in cheap if name in _UNTRAINED]
    original = {name: _maps(sample, made[name]) for name in wanted}
    randomised = copy.deepcopy(sample.opened)
    cascades: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for stage, change in _stages(randomised).items():
            report(f"randomising: {stage}", 0, 0)
            change()
            classifier, networks = randomised.classifier, randomised.networks
            pooled = PooledClassifier(classifier.trunk, networks.baseline).eval()
            making = Methods(randomised, pooled, None, seed=seed, report=report)
            for name in wanted:
                maps = _maps(sample, making.build(name), classifier.trunk)
                cascades[name][stage] = torch.nan_to_num(maps, posinf=0, neginf=0)
    for name in wanted:
        found[name]["cascade"] = {
            stage: float(sanity.rank_correlation(original[name], maps).mean()) for stage, maps in cascades[name].items()
        }
    return found


def _maps(sample: Sample, method: Method, trunk: nn.Module | None = None) -> Tensor:
    return torch.cat([sample.explainer(method, part, trunk)(sample.pixels[part]).cpu() for part in sample.parts()])


def _stages(opened: runs.Run) -> dict[str, Callable[[], None]]:
    classifier, networks = opened.classifier, opened.networks
    convolutions = [module for module in classifier.trunk.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    third = -(-len(convolutions) // 3)

    def heads() -> None:
        for head in {id(head): head for head in (networks.baseline, networks.head)}.values():
            model = getattr(head, "model", None)  # a timm classifier's head shares the trunk's module
            _restart([model.get_classifier()] if model is not None else [*head.modules()])

    return {
        "heads": heads,
        "module": classifier.attention.reset_parameters,
        "trunk, top third": lambda: _restart(convolutions[-third:]),
        "trunk, two thirds": lambda: _restart(convolutions[-2 * third :]),
        "trunk": lambda: _restart(convolutions),
    }


def _restart(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat(values).mean())
