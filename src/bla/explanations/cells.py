"""Where the cells of the grid lie in a picture: their pixels, the mask and boxes of a selection, the heat of a map."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from bla.explanations.result import BoolMap, FloatMap, Result

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Cells:
    """Cell (i, j) of the grid lies at ``rows[i]:rows[i+1], columns[j]:columns[j+1]`` of a picture.

    Neighbours share their edges, so that the cells tile the region whatever its size; a cell may be empty.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, explanation: Result, photo: tuple[int, int], picture: tuple[int, int]) -> Cells:
        """The cells in a ``picture`` (width, height) of the whole ``photo`` (width, height); of a volume in a slice."""
        left, top, *_ = explanation.region
        right, bottom, *_ = explanation.region[len(explanation.grid) :]
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

        *_, rows, columns = explanation.grid
        return cls(edges(top, bottom, rows, 1), edges(left, right, columns, 0))

    @property
    def region(self) -> tuple[slice, slice]:
        return slice(self.rows[0], self.rows[-1]), slice(self.columns[0], self.columns[-1])

    @property
    def smallest_side(self) -> int:
        """In pixels; 0 if a cell is empty."""
        return int(min(np.diff(self.rows).min(), np.diff(self.columns).min()))

    def fill(self, size: tuple[int, int]) -> bool:
        """Whether they cover a picture of this size (width, height)."""
        return self.region == (slice(0, size[1]), slice(0, size[0]))

    def box(self, row: int, column: int) -> tuple[slice, slice]:
        return slice(*self.rows[row : row + 2]), slice(*self.columns[column : column + 2])

    def mask(self, selected: BoolMap, size: tuple[int, int]) -> BoolMap:
        """The pixels (h, w) of the selected cells, in a picture of this size (width, height)."""
        mask = np.zeros(size[::-1], np.bool_)
        mask[self.region] = selected.repeat(np.diff(self.rows), axis=0).repeat(np.diff(self.columns), axis=1)
        return mask

    def heat(self, scores: FloatMap, size: tuple[int, int], *, smooth: bool) -> FloatMap:
        """Scores (H, W) as pixels (h, w) from 0, the lowest, to 1, the highest; 0 outside of the region."""
        low, high = float(scores.min()), float(scores.max())
        share = ((scores.astype(np.float64) - low) / (high - low) if high > low else np.ones_like(scores)).astype("f4")
        heat = np.zeros(size[::-1], np.float32)
        height, width = heat[self.region].shape
        if smooth and height and width:
            enlarged = Image.fromarray(share).resize((width, height), Image.Resampling.BICUBIC)
            heat[self.region] = np.asarray(enlarged).clip(0, 1)
        else:
            heat[self.region] = share.repeat(np.diff(self.rows), axis=0).repeat(np.diff(self.columns), axis=1)
        return heat

    def boxes(self, selected: BoolMap) -> list[Box]:
        """(left, top, right, bottom) of each connected part of a selection, the part of most cells first."""
        found, left = [], {(int(row), int(column)) for row, column in np.argwhere(selected)}
        while left:
            part, edge = [], [min(left)]
            left.discard(edge[0])
            while edge:
                row, column = edge.pop()
                part.append((row, column))
                beside = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)} & left
                left -= beside
                edge += sorted(beside)
            (rows, columns), size = zip(*part, strict=True), len(part)
            box = (self.columns[min(columns)], self.rows[min(rows)])
            found.append((-size, (*box, self.columns[max(columns) + 1], self.rows[max(rows) + 1])))
        return [box for _, box in sorted(found)]
