"""Pictures of the photo's own size: the overlay, the selected cells alone, and what they are painted with."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from bla.explanations.cells import Cells
from bla.explanations.result import BoolMap, FloatMap, Result

Pixels = npt.NDArray[np.uint8]
Heat = Literal["smooth", "cells"]

# Eight of the 256 colours of cividis as matplotlib has it (matplotlib/_cm_listed.py), after Nuñez, Anderton and
# Renslow (2018), "Optimizing colormaps with consideration for color vision deficiency", PLoS ONE 13(7): e0199239.
# Straight lines between them stay within 8/255 of the full table.
_CIVIDIS = {
    0: (0, 34, 78), 22: (0, 49, 113), 35: (32, 58, 111), 64: (67, 78, 108),
    134: (130, 128, 121), 186: (182, 169, 111), 226: (224, 203, 86), 255: (254, 232, 56),
}  # fmt: skip
_BLANK, WHITE = ((grey,) * 3 for grey in (216, 255))
_DARK, _LIGHT = (16,) * 3, (255, 205, 0)  # the outline's strokes: on any photo one of them stands out, also in grey
_FOR, _AGAINST = (0, 90, 181), (220, 100, 10)  # distinct with any colour vision


def overlay(
    photo: Image.Image, explanation: Result, *, size: tuple[int, int] | None = None, heat: Heat | None = None
) -> Image.Image:
    """The photo, at its own or another size: the selected cells unchanged but for an outline, the rest dim.

    The outline, dark beside yellow, runs along the inside of the selected region's boundary; cells of less than
    5 pixels are too small to carry it and have none. What the model did not see is darker still, and hatched. With
    votes, each selected cell has the colour of its vote. With ``heat`` the photo is grey, under the colours of
    ``explanation.unbounded``, smooth or cell by cell. Raises ValueError if the photo cannot be the one that was
    explained, or ``heat`` is neither.
    """
    if heat not in (None, *get_args(Heat)):
        raise ValueError(f"expected a heat among {', '.join(get_args(Heat))}, or None, got {heat!r}")
    size, explanation = size or photo.size, explanation.sliced()
    cells = Cells.of(explanation, photo.size, size)
    photo = photo.convert("RGB")
    if size != photo.size:
        photo = photo.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    if heat is not None:
        shown = np.asarray(_heated(photo, cells.heat(explanation.unbounded, photo.size, smooth=heat == "smooth")))
        drawn = outlined(shown.copy(), Image.fromarray(shown), explanation.selected, cells)
    else:
        within = photo if explanation.votes is None else voted(photo, explanation.votes.cells, cells)
        drawn = spotlit(photo, within, explanation.selected, cells)
    return Image.fromarray(hatched(drawn, np.asarray(photo), cells))


def cutout(photo: Image.Image, explanation: Result) -> Image.Image:
    """The selected cells alone, at the photo's own size, on a blank ground with faint lines between cells.

    Raises ValueError if the photo cannot be the one that was explained.
    """
    cells, explanation = Cells.of(explanation, photo.size, photo.size), explanation.sliced()
    return Image.fromarray(hatched(blanked(photo.convert("RGB"), explanation.selected, cells), None, cells))


def _heated(photo: Image.Image, heat: FloatMap) -> Image.Image:
    """The photo in grey under cividis, the more colour the more heat."""
    grey = np.asarray(photo.convert("L"), np.float32)[..., np.newaxis]
    colour = cividis(heat.astype(np.float64)).astype(np.float32)
    share = (0.45 + 0.3 * heat)[..., np.newaxis]
    return Image.fromarray(np.rint((1 - share) * grey + share * colour).astype(np.uint8))


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


def scored(photo: Image.Image, share: npt.NDArray[np.float64], dotted: BoolMap, cells: Cells) -> Pixels:
    """Each cell in the colour of its share, from 0 to 1; some have a dot."""
    canvas = Image.fromarray(_tinted(photo, cividis(share).astype(np.float64), 0.16, cells))
    for row, column in np.argwhere(dotted):
        dot(canvas, *cells.box(row, column), 0.26 * cells.smallest_side)
    return np.asarray(canvas)


def blanked(photo: Image.Image, selected: BoolMap, cells: Cells) -> Pixels:
    """The selected cells alone."""
    picture = np.full((photo.height, photo.width, 3), _BLANK, np.uint8)
    if cells.smallest_side > 5:
        # faint lines let the cells be counted
        picture[list(cells.rows[1:-1])] = WHITE
        picture[:, list(cells.columns[1:-1])] = WHITE
    return outlined(picture, photo, selected, cells)


def spotlit(photo: Image.Image, within: Image.Image, selected: BoolMap, cells: Cells) -> Pixels:
    """The photo dimmed to half, with a quarter of its colour, and what is ``within`` the selected cells."""
    grey, colour = np.asarray(photo.convert("L"), np.float32)[..., np.newaxis], np.asarray(photo, np.float32)
    return outlined(np.rint(0.375 * grey + 0.125 * colour + 8).astype(np.uint8), within, selected, cells)


def voted(photo: Image.Image, votes: FloatMap, cells: Cells) -> Image.Image:
    """The photo's relief with each cell in the colour of its vote; white is none, full colour the largest."""
    shares = (votes.astype(np.float64) / max(float(np.abs(votes).max()), 1e-12))[..., np.newaxis]
    colours = 255 + np.abs(shares) * (np.where(shares > 0, _FOR, _AGAINST) - 255.0)
    return Image.fromarray(_tinted(photo, colours, 0.4, cells))


def outlined(picture: Pixels, photo: Image.Image, selected: BoolMap, cells: Cells) -> Pixels:
    """``picture`` with the photo in the selected cells and an outline along the inside of their region."""
    source, around, shown = np.asarray(photo), np.pad(selected, 1), np.argwhere(selected)
    for row, column in shown:
        picture[cells.box(row, column)] = source[cells.box(row, column)]
    stroke = min(max(1, round(min(photo.size) / 190)), cells.smallest_side // 5)
    # Yellow is what lies within two strokes of an unselected cell or of the photo's border, dark what lies within one.
    for depth, ink in ((2 * stroke, _LIGHT), (stroke, _DARK)):
        for row, column in shown:
            down, across = cells.box(row, column)
            downs = slice(down.start, down.start + depth), down, slice(down.stop - depth, down.stop)
            acrosses = slice(across.start, across.start + depth), across, slice(across.stop - depth, across.stop)
            for i, j in np.argwhere(~around[row : row + 3, column : column + 3]):
                picture[downs[i], acrosses[j]] = ink
    return picture


def hatched(picture: Pixels, photo: Pixels | None, cells: Cells) -> Pixels:
    """The picture within the region; outside of it hatching, on a dark ``photo`` or on white."""
    height, width = picture.shape[:2]
    if cells.fill((width, height)):
        return picture
    ground, ink = np.full((height, width), 255, np.uint8), 128
    if photo is not None:
        ground, ink = np.asarray(Image.fromarray(photo).convert("L")) // 3, 72
    whole = hatch(ground, period=max(5, round(min(height, width) / 26)), ink=ink)
    whole[cells.region] = picture[cells.region]
    return whole


def hatch(ground: Pixels, period: int, ink: int = 128) -> Pixels:
    """Diagonal lines on a grey ground (h, w), as colours (h, w, 3)."""
    diagonals = np.add.outer(*(np.arange(side, dtype=np.int32) for side in ground.shape)) % period
    return np.where(diagonals < max(1, period // 8), np.uint8(ink), ground)[..., np.newaxis].repeat(3, axis=-1)


def dot(canvas: Image.Image, down: slice, across: slice, diameter: float) -> None:
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


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file; ``kind`` and ``options`` are of Pillow's ``save``."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def embedded(picture: Image.Image, kind: str, **options: Any) -> str:
    """A picture as the address that an HTML page holds it by, :func:`encoded`."""
    return f"data:image/{kind};base64," + base64.b64encode(encoded(picture, kind, **options)).decode("ascii")
