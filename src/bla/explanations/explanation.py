"""The result: a prediction and the cells that alone made it. Frozen, versioned, saved all or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from bla import BlaError
from bla.files import read_json, write_json

SCHEMA_VERSION = 1

FloatMap = npt.NDArray[np.float32]
BoolMap = npt.NDArray[np.bool_]


class ExplanationError(BlaError):
    """An explanation that contradicts itself, or a file that does not hold one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """A class and the probability that the classifier gives it."""

    index: int
    label: str
    probability: float


VoteMethod = Literal["exact", "integrated gradients", "left out one by one"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """What each selected cell says for a class, or for it rather than another: :mod:`bla.model.votes` says how it is
    found.

    Attributes
    ----------
    target, against: the classes' indices; ``against`` is None where one was asked about by itself.
    labels: their names, one or two.
    cells: ``(H, W)``, zero where nothing is selected.
    offset, logit: what is said without any cell, and in all; of exact votes ``offset + cells.sum() == logit``.
    method: ``exact``, where the head is linear; ``integrated gradients`` or ``left out one by one`` where it is not.
    """

    target: int
    against: int | None
    labels: tuple[str, ...]
    cells: FloatMap
    offset: float
    logit: float
    method: VoteMethod

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        shape = np.shape(self.cells)
        object.__setattr__(self, "cells", _read_only_map("votes", self.cells, np.float32, (shape[0], shape[-1])))
        if self.method not in get_args(VoteMethod):
            raise ExplanationError(f"expected votes found in one of {get_args(VoteMethod)}, got {self.method!r}")
        if len(self.labels) != 1 + (self.against is not None):
            raise ExplanationError(f"expected a label for each class asked about, got {self.labels}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "target": self.target,
            "against": self.against,
            "labels": list(self.labels),
            "cells": _rows(self.cells),
            "offset": self.offset,
            "logit": self.logit,
            "method": self.method,
        }


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MapCells:
    """The cells of one of several feature maps that one selection is over; the fields are an explanation's."""

    grid: tuple[int, int]
    unbounded: FloatMap
    scores: FloatMap
    soft: FloatMap
    selected: BoolMap

    def __post_init__(self) -> None:
        _fix_cells(self, _VALUES)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return _cells_to_dict(self)


def finest(grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid that maps are laid over one another on: as many rows and columns as any of them has."""
    return max(height for height, _ in grids), max(width for _, width in grids)


def laid(cells: npt.NDArray[Any], grid: tuple[int, int]) -> npt.NDArray[Any]:
    """A map (H, W) on a finer grid: each place takes the value of the cell that its middle lies in.

    >>> laid(np.array([[1, 2]]), (2, 4)).tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    rows, columns = ((2 * np.arange(fine) + 1) * own // (2 * fine) for fine, own in zip(grid, cells.shape, strict=True))
    return cells[np.ix_(rows, columns)]


def spread(cells: FloatMap, grid: tuple[int, int]) -> FloatMap:
    """As :func:`laid`, each cell's value divided among its places, so that the sum stays.

    >>> spread(np.array([[1.0, 2.0]]), (2, 4)).tolist()
    [[0.25, 0.25, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]]
    """
    cell = laid(np.arange(cells.size).reshape(cells.shape), grid)
    shares: FloatMap = laid(cells, grid) / np.bincount(cell.ravel(), minlength=cells.size)[cell]
    return shares


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """A prediction with the subset of the feature map that it was made from.

    Attributes
    ----------
    image: the photo's path, or a name for an image that has none.
    prediction: the class predicted from the selected cells alone; ``top`` lists the best five.
    method, model, setup: what explained, which classifier, and how the explainer was trained.
    target: the class that was asked about; None for a class-agnostic explanation.
    grid: ``(H, W)``, the cells of the feature map.
    unbounded: ``(H, W)``, -u: ranks the cells, larger is more relevant.
    scores: ``(H, W)``, z <= 0: the bounded scores; a cell at the bound has 0.
    soft: ``(H, W)`` relaxed weights, or None where a method has none.
    selected: ``(H, W)`` booleans: the explanation; ``size`` counts them.
    region: ``(left, top, right, bottom)`` in pixels of the upright photo: the part that the grid covers.
    votes: what each selected cell says for a class that was asked about; None where none was.
    maps: of one selection over several feature maps the cells of each; None of one map. ``grid`` is then the finest,
        ``selected`` says which of its places any selected cell covers, ``unbounded`` and ``scores`` are of the best
        cell that covers each place, ``soft`` is None, and ``size`` counts cells, whatever map they are of.
    present: where an image may have several labels, the votes for each with a probability above one half, the likeliest
        first, and perhaps none; ``top`` has their probabilities. None where every image has one class.

    Raises
    ------
    ExplanationError
        If shapes, size, region, probabilities or finiteness contradict one another.

    Examples
    --------
    >>> cat = Prediction(281, "tabby", 0.9)
    >>> maps = dict(grid=(1, 2), unbounded=[[0.5, -1]], scores=[[0, -1]], soft=None, selected=[[1, 0]])
    >>> why = Explanation("cat.jpg", cat, (cat,), "BLA", region=(0, 0, 64, 48), **maps)
    >>> why.size, why.selected.tolist()
    (1, [[True, False]])
    >>> Explanation.from_dict(why.to_dict()) == why
    True
    """

    image: str
    prediction: Prediction
    top: tuple[Prediction, ...]
    method: str
    grid: tuple[int, int]
    unbounded: FloatMap
    scores: FloatMap
    soft: FloatMap | None
    selected: BoolMap
    region: tuple[float, float, float, float]
    target: int | None = None
    model: str = ""
    setup: str = ""
    schema_version: int = SCHEMA_VERSION
    votes: Votes | None = None
    present: tuple[Votes, ...] | None = None
    maps: tuple[MapCells, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "top", tuple(self.top))
        object.__setattr__(self, "region", tuple(float(side) for side in self.region))
        _fix_cells(self, [name for name in _VALUES if getattr(self, name) is not None])
        if self.present is not None:
            object.__setattr__(self, "present", tuple(self.present))
        for votes in (*([] if self.votes is None else [self.votes]), *(self.present or ())):
            if votes.cells.shape != self.grid:
                raise ExplanationError(f"expected votes on the grid {self.grid}, got {votes.cells.shape}")
        if self.maps is not None:
            object.__setattr__(self, "maps", tuple(self.maps))
            if not np.array_equal(over(self.maps)["selected"], self.selected):
                raise ExplanationError("expected selected to be where the maps' selected cells lie, got others")
        if not self.selected.any():
            raise ExplanationError("expected at least one selected cell, got none")
        if self.schema_version != SCHEMA_VERSION:
            raise ExplanationError(
                f"expected schema_version {SCHEMA_VERSION}, got {self.schema_version}: "
                "explain the image again with this version of bla"
            )
        left, top, right, bottom = self.region
        if not (left < right and top < bottom):
            raise ExplanationError(f"expected a region with left < right and top < bottom, got {self.region}")
        for guess in (self.prediction, *self.top):
            if not 0.0 <= guess.probability <= 1.0:
                raise ExplanationError(f"expected a probability in [0, 1], got {guess.probability}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Explanation) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # equality is by value, and the maps are arrays

    @property
    def each_map(self) -> Sequence[Explanation | MapCells]:
        """Where its cells lie: the maps that there are several of, else itself."""
        return (self,) if self.maps is None else self.maps

    @property
    def size(self) -> int:
        """The number of selected cells."""
        return sum(int(each.selected.sum()) for each in self.each_map)

    @property
    def cells(self) -> int:
        """The number of cells that there are to select from."""
        return sum(each.selected.size for each in self.each_map)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``bla explain --json``."""
        return {
            "schema_version": self.schema_version,
            "image": self.image,
            "prediction": dataclasses.asdict(self.prediction),
            "top": [dataclasses.asdict(guess) for guess in self.top],
            "method": self.method,
            "target": self.target,
            **_cells_to_dict(self),
            "size": self.size,
            "region": list(self.region),
            "model": self.model,
            "setup": self.setup,
            **({} if self.votes is None else {"votes": self.votes.to_dict()}),
            **({} if self.present is None else {"present": [votes.to_dict() for votes in self.present]}),
            **({} if self.maps is None else {"maps": [each.to_dict() for each in self.maps]}),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Explanation:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        ExplanationError
            Naming the keys that are missing or unknown, or what contradicts itself.
        """
        keys = {field.name for field in dataclasses.fields(cls)} | {"size"}
        # votes have those that were asked about a class, present those of several labels, maps those of several maps
        record = {"votes": None, "present": None, "maps": None, **record}
        if set(record) != keys:
            missing, unknown = sorted(keys - set(record)), sorted(set(record) - keys)
            raise ExplanationError(f"expected an explanation's keys; missing {missing}, unknown {unknown}")
        values = dict(record)
        size = values.pop("size")
        try:
            values["prediction"] = Prediction(**values["prediction"])
            values["top"] = tuple(Prediction(**guess) for guess in values["top"])
            values["votes"] = None if values["votes"] is None else Votes(**values["votes"])
            if values["present"] is not None:
                values["present"] = tuple(Votes(**votes) for votes in values["present"])
            if values["maps"] is not None:
                values["maps"] = tuple(MapCells(**each) for each in values["maps"])
            explanation = cls(**values)
        except ExplanationError:
            raise
        except (TypeError, IndexError, ValueError) as error:
            raise ExplanationError(f"expected an explanation, got a malformed one: {error}") from error
        if explanation.size != size:
            raise ExplanationError(f"expected size {explanation.size}, the selected cells, got {size}")
        return explanation

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as JSON, all or nothing: the file appears whole or not at all."""
        return write_json(Path(path), self.to_dict(), indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ExplanationError
            If the file is not JSON or does not hold an explanation.
        """
        try:
            record = read_json(Path(path))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ExplanationError(f"expected an explanation in {path}, got no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ExplanationError(f"expected an explanation in {path}, got a JSON {type(record).__name__}")
        return cls.from_dict(record)


def over(maps: Sequence[MapCells]) -> dict[str, Any]:
    """The fields of an explanation over several maps: what the finest grid shows of them, and they themselves.

    >>> fine = MapCells((1, 2), [[0, -2]], [[0, -2]], [[0.6, 0.2]], [[1, 0]])
    >>> coarse = MapCells((1, 1), [[-1]], [[-1]], [[0.2]], [[0]])
    >>> shown = over([fine, coarse])
    >>> shown["grid"], shown["scores"].tolist(), shown["selected"].tolist()
    ((1, 2), [[0.0, -1.0]], [[True, False]])
    """
    grid = finest([each.grid for each in maps])
    best = {
        name: np.max([laid(getattr(each, name), grid) for each in maps], axis=0)
        for name in ("unbounded", "scores", "selected")
    }
    return {"grid": grid, **best, "soft": None, "maps": tuple(maps)}


@dataclasses.dataclass(frozen=True, slots=True)
class Unexplained:
    """A photo that could not be explained, and why."""

    image: str
    error: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``bla explain --json`` for a photo that failed."""
        return dataclasses.asdict(self)


_VALUES = ("unbounded", "scores", "soft")


def _fix_cells(of: Explanation | MapCells, values: Iterable[str]) -> None:
    """Make the grid two whole numbers, and these maps and the selection arrays on it that cannot be changed."""
    grid = (int(of.grid[0]), int(of.grid[1]))
    object.__setattr__(of, "grid", grid)
    for name in values:
        object.__setattr__(of, name, _read_only_map(name, getattr(of, name), np.float32, grid))
    object.__setattr__(of, "selected", _read_only_map("selected", of.selected, np.bool_, grid))


def _cells_to_dict(of: Explanation | MapCells) -> dict[str, Any]:
    return {
        "grid": list(of.grid),
        "unbounded": _rows(of.unbounded),
        "scores": _rows(of.scores),
        "soft": None if of.soft is None else _rows(of.soft),
        "selected": of.selected.astype(int).tolist(),
    }


def _read_only_map(name: str, value: npt.ArrayLike, kind: type[Any], grid: tuple[int, int]) -> npt.NDArray[Any]:
    array = np.array(value, dtype=kind)
    if array.shape != grid:
        raise ExplanationError(f"expected {name} of shape {grid}, the grid's, got {array.shape}")
    if not np.isfinite(array).all():
        raise ExplanationError(f"expected finite {name}, got NaN or infinity")
    array.setflags(write=False)
    return array


def _rows(values: FloatMap) -> Sequence[Sequence[float]]:
    # The shortest decimal that gives the float32 back: exact, and a third of the length of the float64's.
    return [[float(str(value + 0.0)) for value in row] for row in values]  # + 0.0: no "-0.0"
