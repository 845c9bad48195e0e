"""Which classifiers can be wrapped: two models of every timm family, and every torchvision classifier.

    python -m benchmarks.models.wrapped --out FOLDER [--families vit ...] [--largest 450] > docs/reference/models.csv

At random weights, and with no other argument than the model. If interrupted, rerun it: it resumes.
"""

from __future__ import annotations

import csv
import functools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from benchmarks.results import kept, parser_of
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.model.heads import MapHead
from bla.model.joining import JoinedHead
from bla.model.preprocessing import transform_of

LINEAR = 1e-4
"""How far the sum of two logits may miss the logits of the sum, of the largest, for a head to count as linear."""


def smallest(family: str) -> list[tuple[str, int]]:
    """A family's model with the fewest parameters, the one with the fewest of another kind, and how many those are.

    A kind is the name up to the first underscore; where there is but one, the second is the next by size.
    """
    sizes = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except Exception:  # some read tensors while they are built: they are left out here
            continue
    ordered = sorted(sizes, key=lambda name: (sizes[name], name))
    others = [name for name in ordered if name.split("_")[0] != ordered[0].split("_")[0]] or ordered[1:]
    return [(name, sizes[name]) for name in (*ordered[:1], *others[:1])]


def candidates(families: list[str]) -> Iterator[tuple[str, str, int, Callable[[], nn.Module]]]:
    """Library, name, parameters and maker, one after the other."""
    for family in families or timm.list_modules():
        for name, size in smallest(family):
            yield f"timm {family}", name, size, functools.partial(timm.create_model, name)
    if not families:
        for name in torchvision.models.list_models(module=torchvision.models):
            settings = {"weights": None} | ({"init_weights": False} if name in ("googlenet", "inception_v3") else {})
            make = functools.partial(torchvision.models.get_model, name, **settings)
            try:
                with torch.device("meta"):
                    model = make()
            except NotImplementedError:  # RegNets read tensors while they are built
                model = make()
            yield "torchvision", name, sum(parameter.numel() for parameter in model.parameters()), make


def lively(model: nn.Module) -> nn.Module:
    """No head that is zero, and no last scale of a block, as some are before they are trained."""
    for module in model.modules():
        scale = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(scale, nn.Parameter) and not scale.any():
            nn.init.ones_(scale)
    *_, head = (module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    nn.init.normal_(head.weight, std=0.1)
    return model.eval()


@torch.inference_mode()
def is_linear(wrapped: ExplainableClassifier) -> bool:
    """Whether logits of cells add up: then they say what each cell speaks for."""
    one, other = torch.rand(2, 1, wrapped.attention.in_channels)
    both, none = wrapped.head(one + other), wrapped.head(torch.zeros_like(one))
    miss = (wrapped.head(one) + wrapped.head(other) - none - both).abs().max()
    return bool(miss <= LINEAR * both.abs().max())


def way(wrapped: ExplainableClassifier) -> str:
    """What kind of head reads the selected cells."""
    if wrapped.note:
        return "approximate"
    if isinstance(wrapped.head, JoinedHead):
        return "exact, class token"
    if isinstance(wrapped.head, MapHead):
        return "exact, whole map"
    return "exact" if is_linear(wrapped) else "exact, non-linear head"


@torch.inference_mode()
def cost(model: nn.Module, wrapped: ExplainableClassifier) -> float:
    """Seconds of the wrapped classifier over those of the classifier, the least of three each."""
    pixels = torch.rand(1, 3, *wrapped.transform.size)
    seconds: dict[str, list[float]] = {"wrapped": [], "model": []}
    for _ in range(3):
        for name, network in (("wrapped", wrapped), ("model", model)):
            start = time.perf_counter()
            network(pixels)
            seconds[name].append(time.perf_counter() - start)
    return round(min(seconds["wrapped"]) / min(seconds["model"]), 2)


def tried(make: Callable[[], nn.Module], *, again: bool = False) -> dict[str, Any]:
    """What wrapping a model gives; of a model that is refused, whether a new head makes it serve.

    ``again``: with batch norms that have seen a batch, where at their start all activations vanish.
    """
    torch.manual_seed(0)
    model = lively(make())
    if again:
        for norm in [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(torch.randn(4, 3, *transform_of(model).size))
        model.eval()
    try:
        wrapped = explainable(model)
        found = {"result": way(wrapped), "cost": cost(model, wrapped)}
    except ClassifierError as error:
        if "features alike everywhere" in str(error) and not again:
            return tried(make, again=True)
        try:
            wrapped, found = explainable(model, head=10), {"result": "with a new head", "why": str(error)}
        except ClassifierError as second:
            return {"result": "refused", "why": str(second)}
    with torch.inference_mode():
        selection = wrapped.select(torch.rand(1, 3, *wrapped.transform.size))
    return found | {"grid": list(selection.hard.shape[1:]), "channels": wrapped.attention.in_channels,
                    "input": list(wrapped.transform.size)}  # fmt: skip


def main() -> None:
    """Try what has not been tried, print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder for a file a model")
    parser.add_argument("--families", nargs="*", default=[], help="timm modules; by default all, and torchvision")
    parser.add_argument("--largest", type=float, default=450, help="millions of parameters of timm's to be tried")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # of the libraries, about models of theirs
    rows, left_out = [], []
    for library, name, size, make in candidates(arguments.families):
        if size > 1e6 * arguments.largest and library != "torchvision":
            left_out.append(f"{name} ({size / 1e6:.0f} million)")
            continue
        file = arguments.out / f"{library.split()[0]}-{name}.json"
        print(f"{library} {name}", file=sys.stderr)
        rows.append((library, name, size, kept(file, functools.partial(tried, make))))
    write(rows)
    counts = Counter((library.split()[0], found["result"]) for library, _, _, found in rows)
    for (library, result), count in sorted(counts.items()):
        print(f"{library}: {count} {result}", file=sys.stderr)
    if left_out:
        print(f"left out, over {arguments.largest:.0f} million parameters: {', '.join(left_out)}", file=sys.stderr)


def write(rows: list[tuple[str, str, int, dict[str, Any]]]) -> None:
    """Print the table as CSV, with the reason where a model did not wrap as it is."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["library, family", "model", "millions", "result", "input", "grid", "channels", "cost", "reason"])
    for library, name, size, found in rows:
        pixels, grid = ("x".join(map(str, found.get(key, ()))) for key in ("input", "grid"))
        last = (found.get(key, "") for key in ("channels", "cost", "why"))
        table.writerow([library, name, f"{size / 1e6:.1f}", found["result"], pixels, grid, *last])


if __name__ == "__main__":
    main()
