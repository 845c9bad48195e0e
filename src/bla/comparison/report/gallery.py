"""Photos with the cells that each method selects, at equal area. The page holds each photo once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bla.comparison.report.saved import Comparison, ReportError
from bla.data.photo import DataError, open_photo
from bla.explanations.explanation import Explanation
from bla.explanations.render import embedded

LONGEST = 260
"""The longest side of a photo in the page, in pixels."""
_DRAWN = 1024
"""Maps with more cells are drawn as a picture instead of shapes."""
_FAILURES = {
    "kept": "these cells' pixels alone do not keep the prediction",
    "agreement": "these cells give another class",
}
"""The metrics whose 0 is a failure, the gravest first."""
_ORDER = (
    "cam", "c-e", "finer-cam", "grad-cam", "grad-cam++", "centre", "random", "score-cam", "integrated-gradients",
    "occlusion", "learned-mask", "layer-cam", "norm", "l2x", "softmax-attention", "cam-3x3", "c-e-3x3", "shuffled",
)  # fmt: skip
"""The order of the columns; the last ones are left out if there are many."""


def choose(comparison: Comparison, count: int, seed: int) -> list[tuple[int, str]]:
    """Photos to show, by index, and why: half drawn by the seed, a quarter each the best and the worst.

    Best and worst are by the loss of the prediction from the selected cells; without it all are drawn by the seed. The
    worst are failures as long as there are any: first those whose pixels alone do not keep the prediction, then those
    whose cells give another class.
    """
    total = len(comparison.record["images"])
    each = comparison.methods[comparison.own]["each"]
    losses = [(loss, index) for index, loss in enumerate(each.get("loss", [])) if loss is not None]
    order = [index for _, index in sorted(losses)]

    def failure(index: int) -> tuple[int, str]:
        for rank, (metric, words) in enumerate(_FAILURES.items()):
            if metric in each and each[metric][index] == 0:
                return rank, words
        return len(_FAILURES), "no failure, but the largest loss"

    extremes = min(count // 4, len(order) // 2)
    worst = order[::-1]
    worst.sort(key=lambda index: failure(index)[0])
    del worst[extremes:]
    best = [index for index in order if index not in worst][:extremes]
    chosen = [(index, "among the best: smallest loss") for index in best]
    chosen += [(index, f"among the worst: {failure(index)[1]}") for index in worst]
    taken = {index for index, _ in chosen}
    rest = [index for index in range(total) if index not in taken]
    drawn = random.Random(seed).sample(rest, min(len(rest), count - len(chosen)))
    return [(index, "drawn at random") for index in sorted(drawn)] + chosen


def exhibits(comparison: Comparison, chosen: Sequence[tuple[int, str]], methods: int = 7) -> list[dict[str, Any]]:
    """What the page shows of the chosen photos; methods that select the same cells in all of them share a column."""
    columns = _columns(comparison, [index for index, _ in chosen], methods)
    found = []
    for place, (index, why) in enumerate(chosen):
        image = comparison.record["images"][index]
        path = Path(image["image"])
        try:
            photo = open_photo(path).convert("RGB")
        except DataError as error:
            message = f"expected the photo of the comparison, got: {error}. Put it back, or compare again"
            raise ReportError(message) from error
        small = photo.copy()
        small.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS, reducing_gap=3)
        shown = {"name": path.name, "why": why, "label": image["label"], "otherwise": image["predicted"]}
        shown |= {"own": columns[0][1][place], "photo": embedded(small, "jpeg", quality=80), "size": small.size}
        shown["cuts"] = [_cut(title, each[place], small.width / photo.width) for title, each in columns]
        found.append(shown)
    return found


def _columns(comparison: Comparison, indices: Sequence[int], methods: int) -> list[tuple[str, list[Explanation]]]:
    """Titles and explanations, the run's own first."""
    keys = [comparison.own, *(key for key in _ORDER if key in comparison.methods and key != comparison.own)]
    keys += [key for key in comparison.methods if key not in keys]
    found: dict[bytes, tuple[list[str], list[Explanation]]] = {}
    for key in keys:
        explanations = comparison.explanations(key, indices)
        same = b"".join(explanation.selected.tobytes() for explanation in explanations)
        found.setdefault(same, ([], explanations))[0].append(comparison.title(key))
    return [(", ".join(titles), explanations) for titles, explanations in found.values()][:methods]


def _cut(title: str, explanation: Explanation, scale: float) -> dict[str, Any]:
    """A method's cells: an SVG path in units of cells, or if there are many, a picture that darkens those left out.

    ``region`` is what the grid covers, in the page's pixels.
    """
    cells, shade = "", ""
    if explanation.selected.size <= _DRAWN:
        cells = "".join(f"M{column} {row}h1v1h-1Z" for row, column in np.argwhere(explanation.selected).tolist())
    else:
        pixels = np.zeros((*explanation.grid, 4), np.uint8)
        pixels[..., 3] = np.where(explanation.selected, 0, 166)
        shade = embedded(Image.fromarray(pixels), "png", optimize=True)
    region = [side * scale for side in explanation.region]
    cut = {"title": title, "words": _in_words(explanation, title), "region": region, "grid": explanation.grid}
    return cut | {"cells": cells, "shade": shade}


def _in_words(explanation: Explanation, title: str) -> str:
    """Where the selected cells lie, for screen readers."""
    rows, columns = explanation.grid
    centre = (np.argwhere(explanation.selected) + 0.5).mean(axis=0) / (rows, columns)
    down = ("top", "middle", "bottom")[min(2, int(3 * centre[0]))]
    across = ("left", "centre", "right")[min(2, int(3 * centre[1]))]
    where = "the centre" if (down, across) == ("middle", "centre") else f"the {down} {across}"
    return f"{title}: {explanation.size} of {explanation.cells} cells, around {where}"
