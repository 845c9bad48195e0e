"""The ablations that the paper owes, and the one that the recommended settings were chosen by; never on test images.

    python -m benchmarks.paper.ablation DATA --out RESULTS [--groups temperature start ...] [--seeds 3]

Each seed holds another fifth of the training images out, trains on the rest, and measures on the fifth. Results are
written one by one to RESULTS; if interrupted, rerun the command: it resumes. ablation.md and ablation.json hold the
tables. The group `start` also counts dead starts: modules of which no cell of 256 images passes a gradient before the
first step.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.results import interval, kept, parser_of
from bla.data.image_sets import stratified_split
from bla.data.published import read_images
from bla.files import cache_root
from bla.model.attention import BoundedLogitAttention
from bla.model.backbones import LITE0, load_backbone
from bla.model.classifier import explainable
from bla.model.preprocessing import transform_of
from bla.progress import show
from bla.training.cache import cached_features
from bla.training.loop import train_networks
from bla.training.measuring import measure
from bla.training.networks import Examples, Networks, new_head
from bla.training.settings import Settings

STARTS: dict[str, Callable[[nn.Conv2d], object] | None] = {
    "calibrated to the features": None,
    "weights of at most 1/C, bias 1": lambda _: None,
    "torch's default": lambda score: score.reset_parameters(),
    "torch's default, bias -1": lambda score: (score.reset_parameters(), nn.init.constant_(score.bias, -1)),
    "normal, spread 1": lambda score: (nn.init.normal_(score.weight), nn.init.zeros_(score.bias)),
    "zero": lambda score: (nn.init.zeros_(score.weight), nn.init.zeros_(score.bias)),
}
"""How the score's one convolution starts; None: as training does it, by calibrating on a first batch."""

DEAD_STARTS_OF = 100

PAPER: dict[str, dict[str, dict[str, Any]]] = {
    "temperature": {f"temperature {value}": {"temperature": value} for value in (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)},
    "threshold": {f"threshold {value}": {"threshold": value} for value in (0, 0.005, 0.01, 0.015, "auto")},
    "context": {"no context": {}, "context vector": {"context": True}},
    "depth": {f"hidden {list(widths)}": {"hidden": widths} for widths in ((), (64,), (256,), (64, 64))},
}
RECOMMENDED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "class-agnostic": {"class_aware": False, "hidden": ()},
    "class-agnostic, size 12": {"class_aware": False, "hidden": (), "mean_size": 12},
    "straight-through 0": {"straight_through": 0.0},
    "straight-through 1": {"straight_through": 1.0},
    "no hidden layer": {"hidden": ()},
    "hidden 16": {"hidden": (16,)},
    "temperature 0.1 to 1": {"final_temperature": 1.0},
    "threshold": {"threshold": "auto"},
    "dial 0.5": {"dial": 0.5},
    "no mean size": {"mean_size": None},
    "frozen head": {"setup": "bla-ph"},
}
GROUPS = [*PAPER, "start", "recommended"]


def variants(group: str) -> dict[str, Callable[..., Settings]]:
    """The settings that a group compares, but for the seed."""
    if group == "start":
        return dict.fromkeys(STARTS, Settings)
    if group == "recommended":
        return {name: _with(Settings.recommended, changes) for name, changes in RECOMMENDED.items()}
    return {name: _with(Settings, changes) for name, changes in PAPER[group].items()}


def _with(make: Callable[..., Settings], changes: dict[str, Any]) -> Callable[..., Settings]:
    return lambda **given: make(**changes, **given)


def in_memory(examples: Examples) -> Examples:
    """The same examples with their features read once."""
    cache = dataclasses.replace(
        examples.cache, features=np.array(examples.cache.features), pooled=np.array(examples.cache.pooled)
    )
    return Examples(cache, examples.rows, examples.labels)


def measured(examples: Examples, classes: int, settings: Settings, start: str | None) -> dict[str, Any]:
    """Train on four fifths, measure on the other."""
    kept, held_out = stratified_split(examples.labels, len(examples), 0.2, settings.seed)
    networks = made(examples, classes, settings)
    attention = networks.attention
    if start is not None and STARTS[start] is not None:
        assert isinstance(attention, BoundedLogitAttention)
        STARTS[start](attention.score)  # type: ignore[misc, arg-type]
        attention.calibrate = lambda features: None  # type: ignore[method-assign]
    outcome = train_networks(networks, settings, examples.subset(kept))
    return {"metrics": measure(networks, examples.subset(held_out)), "dead": outcome["dead"]}


def made(examples: Examples, classes: int, settings: Settings) -> Networks:
    """Fresh networks, of the seed's weights."""
    channels = examples.cache.features.shape[-1]
    torch.manual_seed(settings.seed)
    return Networks(
        settings.attention(channels), new_head(channels, classes, settings.head.dropout), own_head=settings.own_head
    )


@torch.no_grad()
def dead_starts(examples: Examples, start: str) -> int:
    """Of a hundred modules, how many start with every cell of 256 images at the bound."""
    features = examples.cache.batch(examples.rows[np.random.RandomState(0).permutation(len(examples))[:256]])
    dead = 0
    for seed in range(DEAD_STARTS_OF):
        torch.manual_seed(seed)
        attention = BoundedLogitAttention(features.shape[1])
        begin = STARTS[start]
        if begin is None:
            attention.calibrate(features)
        else:
            begin(attention.score)  # type: ignore[arg-type]
        dead += not bool((attention(features).unbounded < 0).any())
    return dead


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """A row a variant: top-1, each but the first less the continued baseline's of the same run."""
    lines = ["| variant | continued | soft - continued | hard - continued | agreement | size | dead | runs |"]
    lines.append("|" + " --- |" * 8)
    for name, row in table.items():
        cells = [f"{row[key][0]:.4f} ± {row[key][1]:.4f}" for key in ("continued", "soft", "hard", "agreement")]
        dead = str(row["dead"]) + (
            f" ({row['dead starts']} of {DEAD_STARTS_OF} starts)" if "dead starts" in row else ""
        )
        size = f"{row['size'][0]:.2f} ± {row['size'][1]:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {size} | {dead} | {row['runs']} |")
    return "\n".join(lines)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and half-width of the 95% interval of what is tabulated."""
    metrics = [run["metrics"] for run in runs]
    continued = [each["baseline_continued"]["top1"] for each in metrics]
    result: dict[str, Any] = {"continued": interval(continued)}
    for name in ("soft", "hard"):
        values = [each[name]["top1"] - other for each, other in zip(metrics, continued, strict=True)]
        result[name] = interval(values)
    result["agreement"] = interval([each["agreement"] for each in metrics])
    result["size"] = interval([each["size"]["mean"] for each in metrics])
    return result | {"dead": sum(run["dead"] for run in runs), "runs": len(runs)}


def main() -> None:
    """Train what is missing, write the tables and print them."""
    parser = parser_of(__doc__)
    parser.add_argument("data", help="a folder or a name with classes, or embedded")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=GROUPS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of each stage, in place of the settings' own")
    parser.add_argument("--json", action="store_true", help="print JSON in place of Markdown")
    arguments = parser.parse_args()
    images = read_images(arguments.data, cache=cache_root(), report=show)[0].train
    model = load_backbone(LITE0)
    squashed = explainable(
        model, transform=transform_of(model, "squash"), attention=BoundedLogitAttention
    )  # as in the paper
    features = cached_features(squashed, images, report=show)
    failed = {image for image, _ in features.failures}
    rows = np.array([row for row, name in enumerate(images.names) if name not in failed], np.int64)
    assert images.labels is not None
    examples = in_memory(Examples(features, rows, images.labels[rows]))
    given = {} if arguments.epochs is None else {"epochs": arguments.epochs, "head_epochs": arguments.epochs}
    arguments.out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for group in arguments.groups:
        for name, make in variants(group).items():
            runs = []
            for seed in range(arguments.seeds):
                file = arguments.out / f"{group}, {name}, {seed}.json".replace("/", " per ")
                settings, start = make(seed=seed, **given), name if group == "start" else None
                runs.append(kept(file, partial(measured, examples, len(images.classes), settings, start)))
                print(f"{group}: {name}, seed {seed}", file=sys.stderr, flush=True)
            tables.setdefault(group, {})[name] = summary(runs)
            if group == "start":
                tables[group][name]["dead starts"] = dead_starts(examples, name)
    text = "\n\n".join(f"### {group}\n\n{markdown(table)}" for group, table in tables.items())
    (arguments.out / "ablation.md").write_text(text + "\n")
    (arguments.out / "ablation.json").write_text(json.dumps(tables, indent=1) + "\n")
    print(json.dumps(tables, indent=1) if arguments.json else text)


if __name__ == "__main__":
    main()
