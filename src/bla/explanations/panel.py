"""The paper's panel of four pictures, with the scores: for those who know the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from bla.explanations.cells import Cells
from bla.explanations.lettering import font, legible, length, percent, shorten
from bla.explanations.render import WHITE, Pixels, blanked, cividis, dot, hatch, hatched, scored, spotlit, voted
from bla.explanations.result import BoolMap, FloatMap, Prediction, Result

INK, QUIET, _HAIRLINE = ((grey,) * 3 for grey in (24, 100, 190))
ALARM = (190, 0, 30)  # in grey as dark as text
_TITLES = ("input", "scores", "selected cells", "overlay")
_BOUND = "at the bound"
_UNSEEN = "not seen by the model"
_SMALLEST_PANEL = 160  # pixels; below it the labels would outgrow the pictures


def panel(photo: Image.Image, explanation: Result, *, height: int = 320) -> Image.Image:
    """The paper's panel: input, bounded scores, selected cells and overlay, under a header with the result.

    Scores are drawn cell by cell, unsmoothed, on a linear scale from the lowest to 0, and dots mark the cells at the
    bound. If the explanation has votes, the last picture tints each selected cell by its vote, blue for the class
    and orange against it, the stronger the larger the vote. The photo shines through faintly, without shifting the
    mean colour of a cell from the one on the colour bar. What lies outside of ``explanation.region`` is hatched and
    labelled as not seen by the model.

    The photo is upright. ``height`` is the whole panel's in pixels, at least 160; text and strokes scale with it. The
    width follows from the photo's shape and is at most about five times the height: panels of wider photos are lower,
    those of very narrow ones higher, so that cells stay large enough to be seen. Raises ValueError if ``height`` is too
    small, or the photo cannot be the one that was explained.

    >>> from bla.explanations.result import Prediction, Result
    >>> cat = Prediction(281, "tabby", 0.9)
    >>> maps = dict(grid=(1, 2), unbounded=[[0.5, -1]], scores=[[0, -1]], soft=None, selected=[[1, 0]])
    >>> why = Result("cat.jpg", cat, (cat,), "BLA", region=(0, 0, 64, 48), **maps)
    >>> panel(Image.new("RGB", (64, 48), "tan"), why, height=240).height
    240
    """
    if height < _SMALLEST_PANEL:
        raise ValueError(f"expected a height of at least {_SMALLEST_PANEL} pixels for a panel, got {height}")
    sheet, explanation = layout(photo.size, explanation, height), explanation.sliced()
    shown = photo.convert("RGB").resize(sheet.picture, Image.Resampling.BICUBIC, reducing_gap=3)
    pixels, cells = np.asarray(shown), sheet.cells
    within = shown if explanation.votes is None else voted(shown, explanation.votes.cells, cells)
    (low, high), scores, selected = _scale(explanation.scores), explanation.scores, explanation.selected
    share = (scores.astype(np.float64) - low) / (high - low) if high > low else np.ones(scores.shape)
    heat = scored(shown, share, _at_bound(scores), cells)
    pictures = pixels, heat, blanked(shown, selected, cells), spotlit(shown, within, selected, cells)
    canvas = Image.new("RGB", sheet.size, WHITE)
    draw = ImageDraw.Draw(canvas)
    for (x, y), picture, ground in zip(sheet.corners, pictures, (pixels, None, None, pixels), strict=True):
        draw.rectangle((x - 1, y - 1, x + sheet.picture[0], y + sheet.picture[1]), outline=_HAIRLINE)
        canvas.paste(Image.fromarray(hatched(picture, ground, cells)), (x, y))
    for key, corner in sheet.keys:
        canvas.paste(key, corner)
    for text in sheet.texts:
        draw.text((text.x, text.y), text.words, text.ink, font(text.size, text.words), anchor="ls")
    return canvas


def _scale(scores: FloatMap) -> tuple[float, float]:
    """The ends of the colour bar: the lowest score, and 0 or the highest score of a method without a bound."""
    return float(scores.min()) + 0.0, max(float(scores.max()), 0.0)  # + 0.0: no "-0"


def _at_bound(scores: FloatMap) -> BoolMap:
    # where scores exceed 0 there is no bound, and a 0 means nothing
    return np.equal(scores, 0) if scores.max() <= 0 else np.zeros(scores.shape, np.bool_)


class Text(NamedTuple):
    """A line of text from ``x`` on along the baseline ``y``."""

    x: int
    y: int
    words: str
    size: int
    ink: tuple[int, ...]


class Layout(NamedTuple):
    """Where everything stands, in pixels of the panel; the four pictures are of one size."""

    size: tuple[int, int]
    picture: tuple[int, int]
    cells: Cells
    corners: list[tuple[int, int]]
    keys: list[tuple[Image.Image, tuple[int, int]]]
    texts: list[Text]


def layout(photo: tuple[int, int], explanation: Result, height: int) -> Layout:
    """The panel of a ``photo`` (width, height); see :func:`panel` for ``height``."""
    unit = height / 320
    large, medium, small = max(12, round(23 * unit)), max(10, round(14 * unit)), max(9, round(12 * unit))
    margin, gap, space, swatch = round(18 * unit), round(20 * unit), round(0.5 * small), round(0.85 * small)

    # Down: two lines of header, with a check four; then for each row of pictures their titles, themselves, their notes.
    first, lines = margin + round(0.74 * large), 3 if explanation.check else 1
    baselines = [first, *(first + round(1.6 * medium * line) for line in range(1, lines + 1))]
    head, above, below = baselines[-1] + medium, round(1.7 * medium), round(1.6 * small)

    def enlargement(columns: int) -> float:
        across = (5 * height - 2 * margin - (columns - 1) * gap) / columns / photo[0]
        rows = 4 // columns
        down = ((height - head - margin - (rows - 1) * gap) / rows - above - below) / photo[1]
        return max(min(across, down), min(40 * unit / photo[0], 4 * down))

    columns = 4 if enlargement(4) > 0.75 * enlargement(2) else 2
    picture = (max(1, round(photo[0] * enlargement(columns))), max(1, round(photo[1] * enlargement(columns))))
    lift, drop, pitch = round(0.55 * medium), picture[1] + round(1.35 * small), above + picture[1] + below + gap

    # Across: a column is as wide as its picture, or as the widest of the lines above and below the pictures.
    low, high = _scale(explanation.scores)
    ends = f"z = {low:.3g}", f"{high:.3g}"
    bound = bool(_at_bound(explanation.scores).any())
    mark = _BOUND if bound else f"none {_BOUND}" if high == 0 else ""
    if low == high:
        mark = f"all cells {_BOUND}" if bound else f"all cells at {high:.3g}"
    indent = swatch + space
    scored = indent + length(mark, small) + (0 if low == high else 3 * space + length(_TITLES[1], medium))
    barred = 2 * space + 4 * small + sum(length(end, small) for end in ends)
    cells = Cells.of(explanation, photo, picture)
    unseen = not cells.fill(picture)
    noted = indent + length(_UNSEEN, small) if unseen else 0
    column = max(picture[0], scored, barred, noted, *(length(title, medium) for title in _TITLES))
    last = column if columns == 2 else max(picture[0], length(_TITLES[-1], medium))
    titles, counted = _TITLES, ""
    if (votes := explanation.votes) is not None:
        names = [legible(label, "?") for label in votes.labels]
        titles = (*_TITLES[:3], shorten("for " + ", not ".join(names), medium, last))
        largest = float(np.abs(votes.cells).max())
        counted = shorten(f"blue for, orange against, at most {largest:.2g}", small, last)
    corners = [(margin + i % columns * (column + gap), head + above + i // columns * pitch) for i in range(4)]
    size = corners[-1][0] + last + margin, corners[-1][1] + picture[1] + below + margin

    texts = _header(explanation, margin, size[0] - 2 * margin, baselines, (large, medium, small))
    texts += [Text(x, y - lift, title, medium, INK) for (x, y), title in zip(corners, titles, strict=True)]
    keys = []

    def note(x: int, y: int, words: str, key: Pixels | None = None) -> None:
        if key is not None:
            keys.append((Image.fromarray(key), (x, y - swatch)))
        texts.append(Text(x if key is None else x + indent, y, words, small, QUIET))

    if counted:
        note(corners[3][0], corners[3][1] + drop, counted)
    if unseen:
        striped = hatch(np.full((swatch, swatch), 255, np.uint8), period=max(4, swatch // 3))
        note(corners[0][0], corners[0][1] + drop, _UNSEEN, striped)
    (x, y), right = corners[1], corners[1][0] + column
    if low < high:
        start, stop = x + length(ends[0], small) + space, right - length(ends[1], small) - space
        bar = cividis(np.linspace(0, 1, stop - start))
        keys.append((Image.fromarray(np.tile(bar, (swatch - 1, 1, 1))), (start, y + drop + 1 - swatch)))
        note(x, y + drop, ends[0])
        note(stop + space, y + drop, ends[1])
    colour = tuple(cividis(np.ones(())).tolist())  # its cells', as in the map
    swatched = Image.new("RGB", (swatch, swatch), colour)
    dot(swatched, slice(0, swatch), slice(0, swatch), swatch / 2)
    corner = (x, y + drop) if low == high else (right - length(mark, small) - bound * indent, y - lift)
    note(*corner, mark, np.asarray(swatched) if bound else None)
    return Layout(size, picture, cells, corners, keys, texts)


def _header(
    explanation: Result, x: int, room: int, baselines: Sequence[int], sizes: tuple[int, int, int]
) -> list[Text]:
    (first, second, *last), (large, medium, small) = baselines, sizes
    guess, space = _written(explanation.classifier or explanation.prediction), round(0.8 * medium)
    share = percent(guess.probability)
    label = shorten(guess.label, large, room - space - length(share, large))
    texts = [Text(x, first, label, large, INK), Text(x + length(label, large) + space, first, share, large, QUIET)]
    cells, ink = f"{explanation.size} of {explanation.cells} cells", INK
    count = f"from {cells}"
    if explanation.disagrees:
        count, ink = f"DISAGREES with the classifier: {cells} say", ALARM
    if explanation.classifier is not None:
        count += f"{'' if explanation.disagrees else ':'} {_written(explanation.prediction)}"
    elif explanation.disagrees:  # one label of several
        count = f"DISAGREES: the classifier has other labels than these {cells}"
    count = shorten(count, medium, room)
    texts.append(Text(x, second, count, medium, ink))
    left, right = x + length(count, medium) + space, x + room
    if explanation.asked is not None:
        name = legible(explanation.asked, f"class {explanation.target}")
        asked = shorten(f"chosen for: {name}", medium, x + round(0.7 * room) - left)
        texts.append(Text(left, second, asked, medium, INK))
        left += length(asked, medium) + space
    parts = dict.fromkeys((explanation.view, explanation.method, explanation.setup, explanation.model))
    origin = shorten("  ·  ".join(legible(part, "?") for part in parts if part), small, right - left)
    texts.append(Text(right - length(origin, small), second, origin, small, QUIET))
    if (check := explanation.check) is not None:
        about, kept, removed = map(_written, (check.about, check.kept, check.removed))
        checked = dataclasses.replace(check, about=about, kept=kept, removed=removed).lines
        texts += [Text(x, y, shorten(line, medium, room), medium, INK) for y, line in zip(last, checked, strict=True)]
    return texts


def _written(guess: Prediction) -> Prediction:
    return dataclasses.replace(guess, label=legible(guess.label, f"class {guess.index}"))
