"""Explanation and photo to picture: the panel of four, the overlay alone, the selected cells alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from bla.explanations.explanation import BoolMap, Explanation, FloatMap, Prediction
from bla.explanations.lettering import font, legible, length, percent, shorten

Pixels = npt.NDArray[np.uint8]

# Eight of the 256 colours of cividis as matplotlib has it (matplotlib/_cm_listed.py), after Nuñez, Anderton and
# Renslow (2018), "Optimizing colormaps with consideration for color vision deficiency", PLoS ONE 13(7): e0199239.
# Straight lines between them stay within 8/255 of the full table.
_CIVIDIS = {
    0: (0, 34, 78), 22: (0, 49, 113), 35: (32, 58, 111), 64: (67, 78, 108),
    134: (130, 128, 121), 186: (182, 169, 111), 226: (224, 203, 86), 255: (254, 232, 56),
}  # fmt: skip
_INK, _QUIET, _HATCH, _HAIRLINE, _BLANK, _WHITE = ((grey,) * 3 for grey in (24, 100, 128, 190, 216, 255))
_DIMMED, _PALE = (np.rint(np.arange(256) * 0.4 + lift).astype(np.uint8) for lift in (0, 153))  # by grey level
_DARK, _LIGHT = (16,) * 3, (255,) * 3  # the outline's strokes: on any photo one of them stands out

_TITLES = ("input", "scores", "selected cells", "overlay")
_FOR, _AGAINST = (0, 90, 181), (220, 100, 10)  # distinct with any colour vision
_ALARM = (190, 0, 30)  # in grey as dark as text
_BOUND = "at the bound"
_UNSEEN = "not seen by the model"
_SMALLEST_PANEL = 160  # pixels; below it the labels would outgrow the pictures


def panel(photo: Image.Image, explanation: Explanation, *, height: int = 320) -> Image.Image:
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

    Examples
    --------
    >>> from bla.explanations.explanation import Explanation, Prediction
    >>> cat = Prediction(281, "tabby", 0.9)
    >>> maps = dict(grid=(1, 2), unbounded=[[0.5, -1]], scores=[[0, -1]], soft=None, selected=[[1, 0]])
    >>> why = Explanation("cat.jpg", cat, (cat,), "BLA", region=(0, 0, 64, 48), **maps)
    >>> panel(Image.new("RGB", (64, 48), "tan"), why, height=240).height
    240
    """
    if height < _SMALLEST_PANEL:
        raise ValueError(f"expected a height of at least {_SMALLEST_PANEL} pixels for a panel, got {height}")
    sheet = layout(photo.size, explanation, height)
    shown = photo.convert("RGB").resize(sheet.picture, Image.Resampling.BICUBIC, reducing_gap=3)
    pixels, cells = np.asarray(shown), sheet.cells
    within = shown if explanation.votes is None else _voted(shown, explanation.votes.cells, cells)
    heat, selected = _heat(shown, explanation.scores, cells), explanation.selected
    pictures = pixels, heat, _blanked(shown, selected, cells), _spotlit(shown, within, selected, cells)
    canvas = Image.new("RGB", sheet.size, _WHITE)
    draw = ImageDraw.Draw(canvas)
    for (x, y), picture, ground in zip(sheet.corners, pictures, (pixels, None, None, pixels), strict=True):
        draw.rectangle((x - 1, y - 1, x + sheet.picture[0], y + sheet.picture[1]), outline=_HAIRLINE)
        canvas.paste(Image.fromarray(_hatched(picture, ground, cells)), (x, y))
    for key, corner in sheet.keys:
        canvas.paste(key, corner)
    for text in sheet.texts:
        draw.text((text.x, text.y), text.words, text.ink, font(text.size), anchor="ls")
    return canvas


def overlay(photo: Image.Image, explanation: Explanation) -> Image.Image:
    """The photo at its own size: the selected cells unchanged but for an outline, the rest grey and dark.

    The outline, dark beside light, runs along the inside of the selected region's boundary; cells of less than
    5 pixels are too small to carry it and have none. What the model did not see is pale and hatched. Raises ValueError
    if the photo cannot be the one that was explained.
    """
    photo = photo.convert("RGB")
    cells = Cells.of(explanation, photo.size, photo.size)
    return Image.fromarray(_hatched(_spotlit(photo, photo, explanation.selected, cells), np.asarray(photo), cells))


def cutout(photo: Image.Image, explanation: Explanation) -> Image.Image:
    """The selected cells alone, at the photo's own size, on a blank ground with faint lines between cells.

    Raises ValueError if the photo cannot be the one that was explained.
    """
    cells = Cells.of(explanation, photo.size, photo.size)
    return Image.fromarray(_hatched(_blanked(photo.convert("RGB"), explanation.selected, cells), None, cells))


@dataclasses.dataclass(frozen=True, slots=True)
class Cells:
    """Cell (i, j) of the grid lies at ``rows[i]:rows[i+1], columns[j]:columns[j+1]`` of a picture.

    Neighbours share their edges, so that the cells tile the region whatever its size; a cell may be empty.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, explanation: Explanation, photo: tuple[int, int], picture: tuple[int, int]) -> Cells:
        """The cells in a ``picture`` (width, height) of the whole ``photo`` (width, height)."""
        left, top, right, bottom = explanation.region
        # a pixel of tolerance: a region may have gone through resizing and back in floating point
        if min(left, top) < -1 or right > photo[0] + 1 or bottom > photo[1] + 1:
            raise ValueError(
                f"expected the photo that was explained, with the region {explanation.region} in it, got one of "
                f"{photo[0]} x {photo[1]} pixels: pass it at its own size and upright (PIL.ImageOps.exif_transpose)"
            )

        def edges(start: float, stop: float, count: int, side: int) -> tuple[int, ...]:
            scale = picture[side] / photo[side]
            nearest = np.floor(np.linspace(start * scale, stop * scale, count + 1) + 0.5)
            return tuple(nearest.clip(0, picture[side]).astype(int).tolist())

        rows, columns = explanation.grid
        return cls(edges(top, bottom, rows, 1), edges(left, right, columns, 0))

    @property
    def region(self) -> tuple[slice, slice]:
        """Where all cells lie."""
        return slice(self.rows[0], self.rows[-1]), slice(self.columns[0], self.columns[-1])

    @property
    def smallest_side(self) -> int:
        """In pixels; 0 if a cell is empty."""
        return int(min(np.diff(self.rows).min(), np.diff(self.columns).min()))

    def fill(self, size: tuple[int, int]) -> bool:
        """Whether they cover a picture of this size (width, height)."""
        return self.region == (slice(0, size[1]), slice(0, size[0]))

    def box(self, row: int, column: int) -> tuple[slice, slice]:
        """Where a cell lies."""
        return slice(*self.rows[row : row + 2]), slice(*self.columns[column : column + 2])


def _scale(scores: FloatMap) -> tuple[float, float]:
    """The ends of the colour bar: the lowest score, and 0 or the highest score of a method without a bound."""
    return float(scores.min()) + 0.0, max(float(scores.max()), 0.0)  # + 0.0: no "-0"


def _at_bound(scores: FloatMap) -> BoolMap:
    # where scores exceed 0 there is no bound, and a 0 means nothing
    return np.equal(scores, 0) if scores.max() <= 0 else np.zeros(scores.shape, np.bool_)


def _tinted(photo: Image.Image, colours: npt.NDArray[np.floating], relief: float, cells: Cells) -> Pixels:
    """Cells in ``colours`` (H, W, 3) with a faint relief of the photo, which keeps the mean colour of each cell."""
    detail = relief * np.asarray(photo.convert("L"), np.float64)
    picture = np.zeros((*detail.shape, 3), np.uint8)
    for row, column in np.ndindex(colours.shape[:2]):
        box = cells.box(row, column)
        if detail[box].size:
            shade = detail[box] - detail[box].mean()
            picture[box] = np.clip(np.rint(colours[row, column] + shade[..., np.newaxis]), 0, 255)
    return picture


def _heat(photo: Image.Image, scores: FloatMap, cells: Cells) -> Pixels:
    low, high = _scale(scores)
    share = (scores.astype(np.float64) - low) / (high - low) if high > low else np.ones(scores.shape)
    canvas = Image.fromarray(_tinted(photo, cividis(share).astype(np.float64), 0.16, cells))
    for row, column in np.argwhere(_at_bound(scores)):
        _draw_dot(canvas, *cells.box(row, column), 0.26 * cells.smallest_side)
    return np.asarray(canvas)


def _blanked(photo: Image.Image, selected: BoolMap, cells: Cells) -> Pixels:
    picture = np.full((photo.height, photo.width, 3), _BLANK, np.uint8)
    if cells.smallest_side > 5:
        # faint lines let the cells be counted
        picture[list(cells.rows[1:-1])] = _WHITE
        picture[:, list(cells.columns[1:-1])] = _WHITE
    return _outlined(picture, photo, selected, cells)


def _spotlit(photo: Image.Image, within: Image.Image, selected: BoolMap, cells: Cells) -> Pixels:
    """The photo dimmed, with what is ``within`` the selected cells."""
    grey = np.asarray(photo.convert("L"))
    return _outlined(np.repeat(_DIMMED[grey][..., np.newaxis], 3, axis=-1), within, selected, cells)


def _voted(photo: Image.Image, votes: FloatMap, cells: Cells) -> Image.Image:
    """The photo's relief with each cell in the colour of its vote; white is none, full colour the largest."""
    shares = (votes.astype(np.float64) / max(float(np.abs(votes).max()), 1e-12))[..., np.newaxis]
    colours = 255 + np.abs(shares) * (np.where(shares > 0, _FOR, _AGAINST) - 255.0)
    return Image.fromarray(_tinted(photo, colours, 0.4, cells))


def _outlined(picture: Pixels, photo: Image.Image, selected: BoolMap, cells: Cells) -> Pixels:
    """``picture`` with the photo in the selected cells and an outline along the inside of their region."""
    source, around, shown = np.asarray(photo), np.pad(selected, 1), np.argwhere(selected)
    for row, column in shown:
        picture[cells.box(row, column)] = source[cells.box(row, column)]
    stroke = min(max(1, round(min(photo.size) / 190)), cells.smallest_side // 5)
    # Light is what lies within two strokes of an unselected cell or of the photo's border, dark what lies within one.
    for depth, ink in ((2 * stroke, _LIGHT), (stroke, _DARK)):
        for row, column in shown:
            down, across = cells.box(row, column)
            downs = slice(down.start, down.start + depth), down, slice(down.stop - depth, down.stop)
            acrosses = slice(across.start, across.start + depth), across, slice(across.stop - depth, across.stop)
            for i, j in np.argwhere(~around[row : row + 3, column : column + 3]):
                picture[downs[i], acrosses[j]] = ink
    return picture


def _hatched(picture: Pixels, photo: Pixels | None, cells: Cells) -> Pixels:
    """The picture within the region; outside of it hatching, on a pale ``photo`` or on white."""
    height, width = picture.shape[:2]
    if cells.fill((width, height)):
        return picture
    ground = np.full_like(picture, 255) if photo is None else _PALE[photo]
    hatched = _hatch(ground, period=max(5, round(min(height, width) / 26)))
    hatched[cells.region] = picture[cells.region]
    return hatched


def _hatch(ground: Pixels, period: int) -> Pixels:
    diagonals = np.add.outer(*(np.arange(side, dtype=np.int32) for side in ground.shape[:2])) % period
    ground[diagonals < max(1, period // 6)] = _HATCH
    return ground


def _draw_dot(canvas: Image.Image, down: slice, across: slice, diameter: float) -> None:
    """A dot in the middle of a box, with soft edges: ImageDraw's own discs are ragged at this size."""
    side = 8 * max(1, round(diameter))
    disc = Image.new("L", (side, side))
    ImageDraw.Draw(disc).ellipse((0, 0, side - 1, side - 1), fill=255)
    left, top = ((span.start + span.stop - side // 8) // 2 for span in (across, down))
    canvas.paste(_DARK, (left, top), disc.reduce(8))


def cividis(share: npt.NDArray[np.float64]) -> Pixels:
    """Colours of shape (..., 3) for shares in [0, 1] of shape (...)."""
    colours = np.array(list(_CIVIDIS.values()))
    channels = [np.interp(255 * share, list(_CIVIDIS), colours[:, channel]) for channel in range(3)]
    between: Pixels = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return between


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


def layout(photo: tuple[int, int], explanation: Explanation, height: int) -> Layout:
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
    texts += [Text(x, y - lift, title, medium, _INK) for (x, y), title in zip(corners, titles, strict=True)]
    keys = []

    def note(x: int, y: int, words: str, key: Pixels | None = None) -> None:
        if key is not None:
            keys.append((Image.fromarray(key), (x, y - swatch)))
        texts.append(Text(x if key is None else x + indent, y, words, small, _QUIET))

    if counted:
        note(corners[3][0], corners[3][1] + drop, counted)
    if unseen:
        hatch = _hatch(np.full((swatch, swatch, 3), 255, np.uint8), period=max(4, swatch // 3))
        note(corners[0][0], corners[0][1] + drop, _UNSEEN, hatch)
    (x, y), right = corners[1], corners[1][0] + column
    if low < high:
        start, stop = x + length(ends[0], small) + space, right - length(ends[1], small) - space
        bar = cividis(np.linspace(0, 1, stop - start))
        keys.append((Image.fromarray(np.tile(bar, (swatch - 1, 1, 1))), (start, y + drop + 1 - swatch)))
        note(x, y + drop, ends[0])
        note(stop + space, y + drop, ends[1])
    dot = Image.new("RGB", (swatch, swatch), _CIVIDIS[255])  # on its cells' colour, as in the map
    _draw_dot(dot, slice(0, swatch), slice(0, swatch), swatch / 2)
    corner = (x, y + drop) if low == high else (right - length(mark, small) - bound * indent, y - lift)
    note(*corner, mark, np.asarray(dot) if bound else None)
    return Layout(size, picture, cells, corners, keys, texts)


def _header(
    explanation: Explanation, x: int, room: int, baselines: Sequence[int], sizes: tuple[int, int, int]
) -> list[Text]:
    (first, second, *last), (large, medium, small) = baselines, sizes
    guess, space = _written(explanation.classifier or explanation.prediction), round(0.8 * medium)
    share = percent(guess.probability)
    label = shorten(guess.label, large, room - space - length(share, large))
    texts = [Text(x, first, label, large, _INK), Text(x + length(label, large) + space, first, share, large, _QUIET)]
    cells, ink = f"{explanation.size} of {explanation.cells} cells", _INK
    count = f"from {cells}"
    if explanation.disagrees:
        count, ink = f"DISAGREES with the classifier: {cells} say", _ALARM
    if explanation.classifier is not None:
        count += f"{'' if explanation.disagrees else ':'} {_written(explanation.prediction)}"
    elif explanation.disagrees:  # one label of several
        count = f"DISAGREES: the classifier has other labels than these {cells}"
    count = shorten(count, medium, room)
    texts.append(Text(x, second, count, medium, ink))
    left, right = x + length(count, medium) + space, x + room
    if explanation.target is not None and explanation.target != guess.index:
        names = {known.index: known.label for known in (*explanation.top, guess)}
        name = legible(names.get(explanation.target, ""), f"class {explanation.target}")
        asked = shorten(f"asked about: {name}", medium, x + round(0.7 * room) - left)
        texts.append(Text(left, second, asked, medium, _INK))
        left += length(asked, medium) + space
    parts = dict.fromkeys((explanation.method, explanation.setup, explanation.model))
    origin = shorten("  ·  ".join(legible(part, "?") for part in parts if part), small, right - left)
    texts.append(Text(right - length(origin, small), second, origin, small, _QUIET))
    if explanation.check is not None:
        about, kept, removed = map(
            _written, (explanation.check.about, explanation.check.kept, explanation.check.removed)
        )
        checked = dataclasses.replace(explanation.check, about=about, kept=kept, removed=removed).lines
        texts += [Text(x, y, shorten(line, medium, room), medium, _INK) for y, line in zip(last, checked, strict=True)]
    return texts


def _written(guess: Prediction) -> Prediction:
    return dataclasses.replace(guess, label=legible(guess.label, f"class {guess.index}"))
