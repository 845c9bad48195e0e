"""Photos with the cells that each method selects, at equal area: every photo is in the page once."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from bla.comparison.report.saved import Comparison, ReportError, each
from bla.data.photo import DataError, open_photo
from bla.explanations.explanation import Explanation

LONGEST = 260
"""Of a photo's sides in the page, in pixels."""
_DRAWN = 1024
"""Maps of more cells are drawn as a picture, not as shapes."""
_ORDER = (
    "cam", "grad-cam", "grad-cam++", "centre", "random", "score-cam", "integrated-gradients", "occlusion",
    "learned-mask", "layer-cam", "norm", "l2x", "softmax-attention", "shuffled",
)  # fmt: skip
"""Of the columns; those that come late are left out where there are many."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """The photo with the cells of one method, or of several that select the same."""

    title: str
    picture: Markup


@dataclasses.dataclass(frozen=True, slots=True)
class Exhibit:
    """A photo, why it was chosen, and what every method selects on it."""

    name: str
    why: str
    label: str | None
    predicted: str
    probability: float
    otherwise: str
    """What the classifier predicts from all cells."""
    size: int
    cuts: tuple[Cut, ...]


def choose(comparison: Comparison, count: int, seed: int) -> list[tuple[int, str]]:
    """Photos to show, by index, and why: half drawn by the seed, a quarter each the best and the worst.

    Best and worst are by the loss of the prediction from the selected cells; where that was not measured all are
    drawn by the seed.
    """
    total = len(comparison.record["images"])
    losses = sorted(each(comparison, comparison.own, "loss"), key=lambda pair: (pair[1], pair[0]))
    extremes = min(count // 4, len(losses) // 2)
    chosen = [(index, "among the best: smallest loss") for index, _ in losses[:extremes]]
    chosen += [(index, "among the worst: largest loss") for index, _ in losses[::-1][:extremes]]
    taken = {index for index, _ in chosen}
    rest = [index for index in range(total) if index not in taken]
    drawn = random.Random(seed).sample(rest, min(len(rest), count - len(chosen)))
    return [(index, "drawn by chance") for index in sorted(drawn)] + chosen


def exhibits(
    comparison: Comparison, chosen: Sequence[tuple[int, str]], methods: int = 7
) -> tuple[Markup, list[Exhibit]]:
    """The photos as definitions for the page, once each, and the exhibits that use them.

    Methods that select the same cells on all these photos are shown as one.

    Raises
    ------
    ReportError
        If a photo has moved, or the explanations are not there.
    """
    indices = [index for index, _ in chosen]
    columns = _columns(comparison, indices, methods)
    photos, found = [], []
    for place, (index, why) in enumerate(chosen):
        image = comparison.record["images"][index]
        photo = _opened(Path(image["image"]))
        scale = min(1.0, LONGEST / max(photo.size))
        width, height = (max(1, round(side * scale)) for side in photo.size)
        data = _jpeg(photo.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3))
        photos.append(
            Markup('<image id="photo-{}" width="{}" height="{}" href="{}"/>').format(place, width, height, data)
        )
        plain = Markup(
            '<svg class="cut" viewBox="0 0 {} {}" role="img" aria-label="the photo"><use href="#photo-{}"/></svg>'
        ).format(width, height, place)
        cuts = [Cut("the photo", plain)]
        for title, explanations in columns:
            words = _in_words(explanations[place], title)
            cuts.append(Cut(title, _drawn(explanations[place], place, (width, height), photo.size, words)))
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
    """Titles and explanations: the run's own first, then others, a control always among them."""
    keys = [comparison.own, *(key for key in _ORDER if key in comparison.methods and key != comparison.own)]
    keys += [key for key in comparison.methods if key not in keys]
    found: dict[bytes, tuple[list[str], list[Explanation]]] = {}
    for key in keys:
        explanations = comparison.explanations(key, indices)
        same = b"".join(explanation.selected.tobytes() for explanation in explanations)
        found.setdefault(same, ([], explanations))[0].append(comparison.title(key))
    columns = [(", ".join(titles), explanations) for titles, explanations in found.values()]
    return columns[:methods]


def _opened(path: Path) -> Image.Image:
    try:
        return open_photo(path).convert("RGB")
    except DataError as error:
        raise ReportError(
            f"expected the photo of the comparison, got: {error}. Put it back, or compare again"
        ) from error


def _jpeg(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _drawn(explanation: Explanation, place: int, shown: tuple[int, int], photo: tuple[int, int], words: str) -> Markup:
    """The photo with what is not selected darkened, and what the model did not see darkened more."""
    width, height = shown
    left, top, right, bottom = (
        side * shown[axis % 2] / photo[axis % 2] for axis, side in enumerate(explanation.region)
    )
    rows, columns = explanation.grid
    tall, wide = (bottom - top) / rows, (right - left) / columns
    frame = f"M0 0H{width}V{height}H0Z"
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
        region = f"M{left:.2f} {top:.2f}H{right:.2f}V{bottom:.2f}H{left:.2f}Z"
        dark = Markup('<path class="dark" fill-rule="evenodd" d="{}"/>').format(region + cells)
        outline = Markup('<path class="edge" d="{}"/>').format(cells)
    unseen = Markup('<path class="unseen" fill-rule="evenodd" d="{}"/>').format(
        frame + f"M{left:.2f} {top:.2f}H{right:.2f}V{bottom:.2f}H{left:.2f}Z"
    )
    return Markup(
        '<svg class="cut" viewBox="0 0 {} {}" role="img" aria-label="{}"><use href="#photo-{}"/>{}{}{}</svg>'
    ).format(width, height, words, place, dark, unseen, outline)


def _shade(explanation: Explanation) -> str:
    """A picture that darkens what is not selected."""
    pixels = np.zeros((*explanation.grid, 4), np.uint8)
    pixels[..., 3] = np.where(explanation.selected, 0, 166)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _in_words(explanation: Explanation, title: str) -> str:
    """Where the selected cells lie, for those who do not see them."""
    rows, columns = explanation.grid
    centre = (np.argwhere(explanation.selected) + 0.5).mean(axis=0) / (rows, columns)
    down = ("top", "middle", "bottom")[min(2, int(3 * centre[0]))]
    across = ("left", "centre", "right")[min(2, int(3 * centre[1]))]
    where = "the centre" if (down, across) == ("middle", "centre") else f"the {down} {across}"
    return f"{title}: {explanation.size} of {explanation.cells} cells, around {where}"
