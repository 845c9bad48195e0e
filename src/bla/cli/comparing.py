"""`bla compare`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bla.cli.sharing import CacheFolder, Device, Flag, Json, RunName, Seed, TrustCode, require, say, skipped, within


def compare(
    run: RunName,
    data: str | None = None,
    /,
    *,
    out: Path | None = None,
    methods: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    leakage: Flag = False,
    pixels: Annotated[int, within(0, 1_000_000)] = 0,
    sanity: Flag = False,
    limit: Annotated[int | None, within(1, 1_000_000_000)] = None,
    seed: Seed = 0,
    trust_code: TrustCode = None,
    device: Device = "auto",
    cache: CacheFolder = None,
    json_: Json = False,
) -> int:
    """Compare a run's explanations with other methods at equal area. If interrupted, rerun: it resumes.

    Example: `bla compare run photos --methods cam grad-cam random`

    :param data: A folder or photo, with or without classes, boxes or masks. By default the run's test images.
    :param out: The folder to write. By default RUN/comparison, for a shipped explainer "comparison".
    :param methods: random, centre, norm, cam, cam-3x3, c-e, c-e-3x3, finer-cam, grad-cam, grad-cam++, layer-cam,
        hires-cam, softmax-attention, l2x, learned-mask, shuffled; score-cam, integrated-gradients and occlusion, which
        are slow; or all. By default those that read the feature map alone and, where there are training images, those
        trained on them.
    :param leakage: Train an evaluator, probes and heads that measure what the selections give away.
    :param pixels: Run the whole network on changed pixels of this many random photos: 8 passes per photo and method; on
        at most 50 of them also deletion, insertion, ROAD and others, which take seconds.
    :param sanity: Compare maps of randomised networks, and of flipped, shifted and noisy photos.
    :param limit: Compare on this many random photos.
    """
    from bla.comparison import compare as compared
    from bla.comparison.catalogue import CHEAP, METHODS, method_names
    from bla.progress import shown_progress

    if pixels or any(METHODS[name].library for name in method_names(methods or CHEAP)):
        require("compare")
    folder = out or (Path(run) / "comparison" if Path(run).is_dir() else Path("comparison"))
    with shown_progress() as report:
        drawn = partial(
            compared, model=trust_code, leakage=leakage, sanity=sanity, pixels=pixels, limit=limit, seed=seed
        )
        result = drawn(run, data, out=folder, methods=methods, device=device, cache=cache, report=report)
    if json_:
        print(json.dumps(result))
    else:
        _print_table(result)
        say(f"The result is {folder / 'compare.json'}, the explanations are in {folder / 'explanations'}.")
    return skipped([(entry["image"], entry["error"]) for entry in result["skipped"]])


_COLUMNS = ["accuracy", "agreement", "comprehensiveness", "evaluator", "evaluator_left", "area", "area_left"]
_COLUMNS += ["on_object", "mask_only", "retrained", "kept", "removed", "deletion", "insertion"]
_HEADS = {"comprehensiveness": "compreh.", "evaluator_left": "left out", "area": "area kept"}


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [metric for metric in _COLUMNS if metric in result["metrics"]]
    arrows = {"higher": " ↑", "lower": " ↓", None: ""}
    heads = [_HEADS.get(name, name.replace("_", " ")) + arrows[result["metrics"][name]["better"]] for name in shown]
    title = f"{result['data']['images']} photos, equal area"
    table = Table("method", *heads, "ms", "MB", title=title, title_justify="left")
    for record in result["methods"].values():
        values, memory = record["values"], record["cost"]["peak_memory_mb"]
        cells = [f"{values[metric]['mean']:.3f}" if values.get(metric) else "" for metric in shown]
        cost = [f"{record['cost']['ms_per_image']:.1f}", "" if memory is None else f"{memory:.0f}"]
        table.add_row(record["title"], *cells, *cost)
    Console(width=None if sys.stdout.isatty() else 40 + 13 * len(shown)).print(table)
    size, baseline, cells = result["size"], result["baseline"], result["grid"][0] * result["grid"][1]
    say(
        f"Size {size['mean']:.1f} of {cells} cells. ms: beyond the forward pass of {baseline['forward_ms']} ms. Areas "
        f"are judged by the {result['judge']}. Labels: {result['data']['labels']}."
    )
