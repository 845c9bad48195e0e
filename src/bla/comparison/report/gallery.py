"""Photos with the cells that each method selects, at equal area. The page holds each photo once."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from bla.comparison.report.saved import Comparison, ReportError
from bla.data.photo import DataError, open_photo
from bla.explanations.explanation import Explanation

LONGEST = 260
"""The longest side of a photo in the page, in pixels."""
_DRAWN = 1024
"""Maps with more cells are drawn as a picture instead of shapes."""
_ORDER = (
    "cam", "grad-cam", "grad-cam++", "centre", "random", "score-cam", "integrated-gradients", "occlusion",
    "learned-mask", "layer-cam", "norm", "l2x", "softmax-attention", "shuffled",
)  # fmt: skip
"""The order of the columns; the last ones are left out if there are many."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """The photo with the cells of one method, or of several that select the same."""

    title: str
    picture: Markup


@dataclasses.dataclass(frozen=True, slots=True)
class Exhibit:
    """A photo, why it was chosen, and every method's cells on it; ``otherwise`` is the prediction from all cells."""

    name: str
    why: str
    label: str | None
    predicted: str
    probability: float
    otherwise: str
    size: int
    cuts: tuple[Cut, ...]


def choose(comparison: Comparison, count: int, seed: int) -> list[tuple[int, str]]:
    """Photos to show, by index, and why: half drawn by the seed, a quarter each the best and the worst.

    Best and worst are by the loss of the prediction from the selected cells; without it all are drawn by the seed.
    """
    total = len(comparison.record["images"])
    losses = sorted(comparison.each(comparison.own, "loss").items(), key=lambda pair: (pair[1], pair[0]))
    extremes = min(count // 4, len(losses) // 2)
    chosen = [(index, "among the best: smallest loss") for index, _ in losses[:extremes]]
    chosen += [(index, "among the worst: largest loss") for index, _ in losses[::-1][:extremes]]
    taken = {index for index, _ in chosen}
    rest = [index for index in range(total) if index not in taken]
    drawn = random.Random(seed).sample(rest, min(len(rest), count - len(chosen)))
    return [(index, "drawn at random") for index in sorted(drawn)] + chosen


def exhibits(
    comparison: Comparison, chosen: Sequence[tuple[int, str]], methods: int = 7
) -> tuple[Markup, list[Exhibit]]:
    """The photos as definitions for the page, once each, and the exhibits that use them.

    Methods that select the same cells in all these photos share a column.

    Raises
    ------
    ReportError
        If a photo has moved, or the explanations are missing.
    """
    indices = [index for index, _ in chosen]
    columns = _columns(comparison, indices, methods)
    photos, found = [], []
    for place, (index, why) in enumerate(chosen):
        image = comparison.record["images"][index]
        photo = _opened(Path(image["image"]))
        scale = min(1.0, LONGEST / max(photo.size))
        width, height = (max(1, round(side * scale)) for side in photo.size)
        small = photo.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
        photos.append(
            Markup('<image id="photo-{}" width="{}" height="{}" href="{}"/>').format(
                place, width, height, _embedded(small, "jpeg", quality=80)
            )
        )
        cuts = [Cut("the photo", _cut((width, height), place, "the photo"))]
        for title, explanations in columns:
            layers = _layers(explanations[place], (width, height), photo.size)
            cuts.append(Cut(title, _cut((width, height), place, _in_words(explanations[place], title), layers)))
        own = columns[0][1][place]
        found.append(
            Exhibit(
                name=Path(image["image"]).name,
                why=why,
                label=image["label"],
                predicted=own.prediction.label,
                probability=own.prediction.probability,
                otherwise=image["predicted"],
                size=own.size,
                cuts=tuple(cuts),
            )
        )
    return Markup().join(photos), found


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


def _opened(path: Path) -> Image.Image:
    try:
        return open_photo(path).convert("RGB")
    except DataError as error:
        raise ReportError(
            f"expected the photo of the comparison, got: {error}. Put it back, or compare again"
        ) from error


def _embedded(picture: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _cut(size: tuple[int, int], place: int, words: str, layers: Markup | str = "") -> Markup:
    return Markup(
        '<svg class="cut" viewBox="0 0 {} {}" role="img" aria-label="{}"><use href="#photo-{}"/>{}</svg>'
    ).format(*size, words, place, layers)


def _layers(explanation: Explanation, shown: tuple[int, int], photo: tuple[int, int]) -> Markup:
    """Shapes that darken the cells left out, and darken more what the model did not see."""
    width, height = shown
    left, top, right, bottom = (
        side * shown[axis % 2] / photo[axis % 2] for axis, side in enumerate(explanation.region)
    )
    rows, columns = explanation.grid
    tall, wide = (bottom - top) / rows, (right - left) / columns
    region = f"M{left:.2f} {top:.2f}H{right:.2f}V{bottom:.2f}H{left:.2f}Z"
    if explanation.selected.size > _DRAWN:
        dark = Markup('<image x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" preserveAspectRatio="none" '
            'style="image-rendering:pixelated" href="{}"/>'
        ).format(left, top, right - left, bottom - top, _shade(explanation))  # fmt: skip
        outline = Markup()
    else:
        cells = "".join(
            f"M{left + column * wide:.2f} {top + row * tall:.2f}h{wide:.2f}v{tall:.2f}h{-wide:.2f}Z"
            for row, column in np.argwhere(explanation.selected).tolist()
        )
        dark = Markup('<path class="dark" fill-rule="evenodd" d="{}"/>').format(region + cells)
        outline = Markup('<path class="edge" d="{}"/>').format(cells)
    unseen = Markup('<path class="unseen" fill-rule="evenodd" d="M0 0H{}V{}H0Z{}"/>').format(width, height, region)
    return dark + unseen + outline


def _shade(explanation: Explanation) -> str:
    """A picture that darkens the cells left out."""
    pixels = np.zeros((*explanation.grid, 4), np.uint8)
    pixels[..., 3] = np.where(explanation.selected, 0, 166)
    return _embedded(Image.fromarray(pixels), "png", optimize=True)


def _in_words(explanation: Explanation, title: str) -> str:
    """Where the selected cells lie, for screen readers."""
    rows, columns = explanation.grid
    centre = (np.argwhere(explanation.selected) + 0.5).mean(axis=0) / (rows, columns)
    down = ("top", "middle", "bottom")[min(2, int(3 * centre[0]))]
    across = ("left", "centre", "right")[min(2, int(3 * centre[1]))]
    where = "the centre" if (down, across) == ("middle", "centre") else f"the {down} {across}"
    return f"{title}: {explanation.size} of {explanation.cells} cells, around {where}"
