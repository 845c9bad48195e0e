"""The explanation of a photo, which shows itself: in a notebook, as a picture, as arrays of the photo's size."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from bla.data.arrays import picture as picture_of
from bla.data.photo import DataError, open_photo
from bla.explanations.cells import Box, Cells
from bla.explanations.panel import panel
from bla.explanations.picture import columns_of, figure, picture, tiled
from bla.explanations.render import Heat, encoded, overlay
from bla.explanations.result import (
    SCHEMA_VERSION,
    BoolMap,
    Check,
    ExplanationError,
    FloatMap,
    Prediction,
    Result,
    Sizes,
    VoteMethod,
    Votes,
    likeliest,
)
from bla.files import write_atomically

__all__ = [
    "SCHEMA_VERSION", "BoolMap", "Check", "Explanation", "ExplanationError", "FloatMap", "Prediction", "Sizes",
    "Unexplained", "VoteMethod", "Votes", "gallery", "likeliest",
]  # fmt: skip

Panel = Literal["plain", "paper"]
_SMALL = 420  # pixels across in a notebook


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Explanation(Result):
    """A prediction with the subset of the feature map that it was made from.

    It knows its photo, and is displayed as a picture where it is the last value of a notebook's cell. An
    ExplanationError says if shapes, size, region, probabilities or finiteness contradict one another.

    Attributes
    ----------
    image: the photo's path, or a name for an image that has none; ``photo`` is then the upright image, or a
        file's bytes.
    prediction: the class predicted from the selected cells alone; ``top`` lists the best five.
    classifier: the class that the classifier predicts from all cells; ``classifier_top`` lists its best five. None in
        explanations saved by older versions.
    agrees: whether the two are one class; of several labels, whether the same ones are present. None where unknown.
    sizes: :class:`Sizes`, where every photo has one class.
    check: what the pixels alone say, if that was checked.
    method, model, setup: what explained, which classifier, and how the explainer was trained.
    target: the class of a class-conditional explanation; None for a class-agnostic one.
    grid: ``(H, W)``, the cells of the feature map.
    unbounded: ``(H, W)``, -u: ranks the cells, larger is more relevant.
    scores: ``(H, W)``, z <= 0: the bounded scores; a cell at the bound has 0.
    soft: ``(H, W)`` relaxed weights, or None where a method has none.
    selected: ``(H, W)`` booleans: the explanation; ``size`` counts them.
    region: ``(left, top, right, bottom)`` in pixels of the upright photo: the part that the grid covers.
        Of a volume the grid is ``(D, H, W)``, the region ``(left, top, front, right, bottom, back)``; pictures and
        boxes are of its :attr:`slice`, masks and heatmaps ``(d, h, w)``.
    votes: what each selected cell contributes to a class named in the request; else None.
    present: where an image may have several labels, the votes for each with a probability above one half, the likeliest
        first, and perhaps none; ``top`` has their probabilities. None where every image has one class.
    note: how the explanation is approximate, or doubtful; None where it is neither.
    shown: what the picture shows where it is not the whole photo: some of its channels, or the classifier's input.

    >>> cat = Prediction(281, "tabby", 0.9)
    >>> maps = dict(grid=(1, 2), unbounded=[[0.5, -1]], scores=[[0, -1]], soft=None, selected=[[1, 0]])
    >>> photo = Image.new("RGB", (64, 48), "tan")
    >>> why = Explanation("a cat", cat, (cat,), "BLA", region=(0, 0, 64, 48), photo=photo, **maps)
    >>> why
    <Explanation of a cat: tabby 90.0% (from 1 of 2 cells)>
    >>> why.boxes(), why.mask().shape, float(why.heatmap(smooth=False)[0, 0])
    ([(0, 0, 32, 48)], (48, 64), 1.0)
    >>> Explanation.from_dict(why.to_dict()) == why
    True
    """

    photo: Any = None  # Image.Image | bytes | None, which is no type of a record

    def __repr__(self) -> str:
        return f"<Explanation of {self.image}: {self}>"

    def upright(self) -> Image.Image:
        """The photo: the image itself, or read from its path; a DataError if there is no photo."""
        if isinstance(self.photo, Image.Image):
            return self.photo
        if isinstance(self.photo, np.ndarray):  # the levels of a volume
            return picture_of(self.photo[self.middles[self.slice or 0]])[0]
        try:
            return open_photo(self.photo or self.image)
        except DataError as error:
            remedy = "give it with dataclasses.replace(explanation, photo=image)"
            raise DataError(f"expected the photo that was explained, got: {error}; or {remedy}") from None

    def overlay(self, *, size: tuple[int, int] | None = None, heat: Heat | None = None) -> Image.Image:
        """The photo with the selected cells outlined: :func:`bla.explanations.render.overlay`."""
        return overlay(self.upright(), self, size=size, heat=heat)

    def picture(self, *, panel: Panel = "plain", heat: Heat | None = None, width: int | None = None) -> Image.Image:
        """The overlay with its words, :func:`bla.explanations.picture.picture`, or the paper's four pictures."""
        if panel not in get_args(Panel):
            raise ExplanationError(f"expected a panel among {', '.join(get_args(Panel))}, got {panel!r}")
        photo = self.upright()
        return _paper(photo, self) if panel == "paper" else picture(photo, self, width=width, heat=heat)

    def heatmap(self, size: tuple[int, int] | None = None, *, smooth: bool = True) -> FloatMap:
        r"""The ranking of the cells as pixels: (h, w) of the photo, or of another ``size`` (width, height).

        .. math:: (v_n - \min v) / (\max v - \min v), \quad v = -u

        for cell n, smooth between the cells' middles or cell by cell; 0 outside of ``region``.
        """
        cells, size = self._cells(size)
        if self.slice is None:
            return cells.heat(self.unbounded, size, smooth=smooth)
        low, spread = float(self.unbounded.min()), float(np.ptp(self.unbounded)) or 1.0
        each = [cells.heat(one, size, smooth=smooth) * np.ptp(one) + one.min() - low for one in self.unbounded]
        return self._volume(np.stack(each) / np.float32(spread))

    def mask(self, size: tuple[int, int] | None = None) -> BoolMap:
        """The selected cells' pixels: booleans (h, w) of the photo, or of another ``size`` (width, height)."""
        cells, size = self._cells(size)
        if self.slice is None:
            return cells.mask(self.selected, size)
        return self._volume(np.stack([cells.mask(one, size) for one in self.selected]))

    def boxes(self) -> list[Box]:
        """(left, top, right, bottom) of each connected part of the selection in pixels, the one of most cells first."""
        return self._cells(None)[0].boxes(self.sliced().selected)

    def _volume(self, layers: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Pixels (D, h, w) of the grid's layers as those of the volume's slices (d, h, w)."""
        depth = len(self.photo) if isinstance(self.photo, np.ndarray) else int(self.edges[-1])
        found = np.zeros((depth, *layers.shape[1:]), layers.dtype)
        for start, stop, pixels in zip(self.edges, self.edges[1:], layers, strict=False):
            found[start:stop] = pixels
        return found

    def _cells(self, size: tuple[int, int] | None) -> tuple[Cells, tuple[int, int]]:
        photo = self.upright().size
        return Cells.of(self, photo, size or photo), size or photo

    def show(self) -> None:
        """Display it: in a notebook below the cell, elsewhere in the system's picture viewer."""
        shell = sys.modules.get("IPython")
        if shell is not None and hasattr(shell.get_ipython(), "kernel"):
            shell.display.display(self)
        else:
            self.picture().show(title=self.image)

    def plot(self, ax: Any = None, *, heat: Heat | None = None) -> Any:
        """Draw the overlay on matplotlib ``ax``, by default new ones, with the answer as title; returns them."""
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError:
                raise ExplanationError(
                    "expected matplotlib to plot on, got none: pip install matplotlib, or call .picture()"
                ) from None
            ax = plt.figure().add_subplot()
        ax.imshow(np.asarray(self.overlay(heat=heat)))
        ax.set_axis_off()
        ax.set_title(str(self.classifier or self.prediction))
        return ax

    def save(self, path: str | os.PathLike[str], *, panel: Panel = "plain", heat: Heat | None = None) -> Path:
        """Write JSON (``why.json``), or the picture (``why.png``, or another format that Pillow writes), or nothing."""
        path = Path(path)
        if path.suffix.lower() == ".json":
            return Result.save(self, path)
        kind = picture_format(path)
        return write_atomically(path, encoded(self.picture(panel=panel, heat=heat), kind))

    def _repr_png_(self) -> bytes | None:
        with contextlib.suppress(DataError):  # of a photo that is no longer there, a notebook shows the line of text
            return encoded(self.picture(width=_SMALL), "PNG")
        return None

    def _repr_html_(self) -> str | None:
        with contextlib.suppress(DataError):
            return figure(self.upright(), self, _SMALL)
        return None


_paper = panel  # which the methods' argument hides


def picture_format(path: Path, others: str = ".json") -> str:
    """Pillow's name of the format of a file to write; an ExplanationError lists the suffixes that work."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ExplanationError(
            f"expected a name that ends in {others}, .png, .jpg, .webp, .pdf or another suffix that Pillow writes, "
            f"got {path.name!r}"
        )
    return kind


def gallery(
    explanations: Explanation | Iterable[Explanation],
    *,
    columns: int | None = None,
    width: int = 320,
    heat: Heat | None = None,
) -> Image.Image:
    """A contact sheet: the pictures of explanations, each ``width`` pixels wide, in rows of ``columns``.

    A notebook displays it; ``.save("sheet.png")`` writes it.

    >>> cat, photo = Prediction(281, "tabby", 0.9), Image.new("RGB", (64, 48), "tan")
    >>> maps = dict(grid=(1, 2), unbounded=[[0.5, -1]], scores=[[0, -1]], soft=None, selected=[[1, 0]])
    >>> why = Explanation("a cat", cat, (cat,), "BLA", region=(0, 0, 64, 48), photo=photo, **maps)
    >>> gallery([why, why], width=200).width
    448
    """
    given = [explanations] if isinstance(explanations, Explanation) else list(explanations)
    if not given:
        raise ExplanationError("expected explanations for a gallery, got none")
    for one in given:
        if not isinstance(one, Explanation):
            raise ExplanationError(f"expected explanations for a gallery, got {one!r}: leave it out")
    drawn = [one.picture(width=width, heat=heat) for one in given]
    return tiled(drawn, columns or columns_of(len(drawn)))


@dataclasses.dataclass(frozen=True, slots=True)
class Unexplained:
    """A photo that could not be explained, and why."""

    image: str
    error: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``bla explain --json`` for a photo that failed."""
        return dataclasses.asdict(self)
