"""What an explanation says: a prediction and the cells that alone made it. Frozen, versioned, saved all or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from bla import BlaError
from bla.explanations.lettering import percent
from bla.files import check_keys, typed, write_json

SCHEMA_VERSION = 2
READ_VERSIONS = (1, 2)
"""Of version 1 are explanations without the classifier's own answer: ``classifier``, ``sizes`` and ``check``."""

FloatMap = npt.NDArray[np.float32]
BoolMap = npt.NDArray[np.bool_]

_KEYS = (
    "schema_version", "image", "prediction", "top", "method", "target", "grid", "unbounded", "scores", "soft",
    "selected", "size", "region", "model", "setup",
)  # fmt: skip
_OPTIONAL = (  # written where they are known
    "classifier", "classifier_top", "agrees", "sizes", "check", "votes", "present", "note", "shown",
)  # fmt: skip
_TIED = "undecided: all cells say the same, so that it means nothing which are selected"


class ExplanationError(BlaError):
    """An explanation that contradicts itself, or a file that does not hold one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """A class and the probability that the classifier gives it; or, of a regression, the ``value``."""

    index: int
    label: str
    probability: float
    value: float | None = None

    def __str__(self) -> str:
        return f"{self.label} {percent(self.probability) if self.value is None else f'{self.value:.4g}'}"


def likeliest(
    probabilities: npt.NDArray[np.floating[Any]],
    classes: Sequence[str],
    *,
    several_labels: bool = False,
    regression: bool = False,
) -> tuple[Prediction, ...]:
    """The five likeliest classes, among equal ones the first; with several labels also any other above one half.

    Of a ``regression`` the one "probability" is the value.

    >>> [guess.label for guess in likeliest(np.array([0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.2]), "abcdefg")]
    ['b', 'g', 'a', 'c', 'd']
    """
    if regression:
        return (Prediction(0, classes[0], 1.0, float(probabilities[0])),)
    shown = max(5, int((probabilities > 0.5).sum())) if several_labels else 5
    rest, last = -probabilities, min(shown, len(classes)) - 1
    near = np.flatnonzero(~(rest > np.partition(rest, last)[last]))  # sorting thousands takes ten times as long
    best = near[np.argsort(rest[near], kind="stable")][:shown].tolist()
    return tuple(Prediction(index, classes[index], min(float(probabilities[index]), 1.0)) for index in best)


VoteMethod = Literal["exact", "integrated gradients", "left out one by one"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """The contribution of each selected cell to a class, or to one class over another (:mod:`bla.model.votes`).

    Attributes
    ----------
    target, against: the classes' indices; ``against`` is None where the class stands alone.
    labels: their names, one or two.
    cells: ``(H, W)``, zero where nothing is selected.
    offset, logit: the value without any cell, and the whole; of exact votes ``offset + cells.sum() == logit``.
    method: ``exact`` for a linear head, else ``integrated gradients`` or ``left out one by one``.
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
        object.__setattr__(self, "cells", _read_only_map("votes", self.cells, np.float32, shape))
        if self.method not in get_args(VoteMethod):
            raise ExplanationError(f"expected votes found in one of {get_args(VoteMethod)}, got {self.method!r}")
        if len(self.labels) != 1 + (self.against is not None):
            raise ExplanationError(f"expected a label for each class of the votes, got {self.labels}")


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes with a meaning, in cells, of the ranking by ``unbounded``; of the class that the classifier predicts.

    Attributes
    ----------
    sufficient: the smallest prefix of the ranking from which the head gives the classifier's class, as it does from
        every longer one.
    decisive: the smallest prefix without which the head gives another class; all cells if there is none.
    bound: the cells at the learned bound.
    """

    sufficient: int
    decisive: int
    bound: int


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """The whole classifier's answers to the photo with only, and without, the selected cells' pixels.

    Attributes
    ----------
    about: the class that was explained, with its probability from the whole photo.
    kept, removed: the likeliest class there.
    probability_kept, probability_removed: of the class ``about``.
    fill: what replaces the other pixels (:data:`bla.data.masking.FILLS`).
    """

    about: Prediction
    kept: Prediction
    removed: Prediction
    probability_kept: float
    probability_removed: float
    fill: str

    @property
    def lines(self) -> tuple[str, str]:
        """The two answers in words."""
        kept = self._in_words(self.probability_kept, self.kept)
        removed = self._in_words(self.probability_removed, self.removed)
        return f"from these pixels alone: {kept}", f"without them: {removed}"

    def __str__(self) -> str:
        return "; ".join(self.lines)

    def _in_words(self, probability: float, first: Prediction) -> str:
        if first.value is not None:
            return str(first)
        found = str(dataclasses.replace(self.about, probability=probability))
        return found if first.index == self.about.index else f"{found} (likeliest: {first})"


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result:
    """What an :class:`bla.Explanation` says: its fields, held against one another, and their JSON."""

    image: str
    prediction: Prediction
    top: tuple[Prediction, ...]
    method: str
    grid: tuple[int, ...]
    unbounded: FloatMap
    scores: FloatMap
    soft: FloatMap | None
    selected: BoolMap
    region: tuple[float, ...]
    target: int | None = None
    model: str = ""
    setup: str = ""
    schema_version: int = SCHEMA_VERSION
    classifier: Prediction | None = None
    agrees: bool | None = None
    sizes: Sizes | None = None
    check: Check | None = None
    votes: Votes | None = None
    present: tuple[Votes, ...] | None = None
    note: str | None = None
    shown: str | None = None
    classifier_top: tuple[Prediction, ...] | None = None

    def __post_init__(self) -> None:
        grid = tuple(map(int, self.grid))
        if len(grid) not in (2, 3) or len(self.region) != 2 * len(grid):
            raise ExplanationError(f"expected a grid of 2 or 3 sides and a region, got {self.grid} and {self.region}")
        frozen: dict[str, Any] = {"top": tuple(self.top), "region": tuple(map(float, self.region)), "grid": grid}
        for name in ("unbounded", "scores", "soft", "selected"):
            if (values := getattr(self, name)) is not None:
                kind = np.bool_ if name == "selected" else np.float32
                frozen[name] = _read_only_map(name, values, kind, grid)
        for name in ("present", "classifier_top"):
            if (values := getattr(self, name)) is not None:
                frozen[name] = tuple(values)
        for name, value in frozen.items():
            object.__setattr__(self, name, value)
        for votes in (self.votes, *(self.present or ())):
            if votes is not None and votes.cells.shape != self.grid:
                raise ExplanationError(f"expected votes on the grid {self.grid}, got {votes.cells.shape}")
        if not self.selected.any():
            raise ExplanationError("expected at least one selected cell, got none")
        if self.schema_version not in READ_VERSIONS:
            raise ExplanationError(
                f"expected schema_version {SCHEMA_VERSION}, got {self.schema_version}: "
                "explain the image again with this version of bla"
            )
        starts, stops = self.region[: len(grid)], self.region[len(grid) :]
        if not all(start < stop for start, stop in zip(starts, stops, strict=True)):
            raise ExplanationError(f"expected a region with left < right and top < bottom, got {self.region}")
        for guess in (self.prediction, *self.top, *([self.classifier] if self.classifier else [])):
            if not 0.0 <= guess.probability <= 1.0:
                raise ExplanationError(f"expected a probability in [0, 1], got {guess.probability}")

    @classmethod
    def from_arrays(
        cls,
        image: str,
        probabilities: npt.NDArray[np.floating[Any]],
        classes: Sequence[str],
        *,
        selected: npt.NDArray[np.bool_],
        from_all: npt.NDArray[np.floating[Any]],
        several_labels: bool = False,
        regression: bool = False,
        masked: Sequence[npt.NDArray[np.floating[Any]]] = (),
        fill: str | None = None,
        **fields: Any,
    ) -> Self:
        """An explanation from the probabilities (K,) of ``classes``, from the selected cells and ``from_all`` cells.

        ``masked`` are the probabilities of the whole classifier with only the selected pixels, and without them, under
        a ``fill``. Of a ``regression`` each "probability" (1,) is its value. A ranking of one value is noted.
        """
        first = partial(likeliest, classes=classes, several_labels=several_labels, regression=regression)
        top, whole = first(probabilities), first(from_all)
        agrees = None if regression else top[0].index == whole[0].index
        if several_labels:
            agrees = bool(((probabilities > 0.5) == (from_all > 0.5)).all())
        shown: dict[str, Any] = {"prediction": top[0], "top": top, "classifier": whole[0], "classifier_top": whole}
        shown["agrees"] = agrees
        if fill is not None:
            votes, about = fields.get("votes"), fields.get("target")
            about = about if about is not None else votes.target if votes else whole[0].index
            asked = whole[0] if regression else Prediction(about, classes[about], float(from_all[about]))
            kept, removed = (likeliest(of, classes, regression=regression)[0] for of in masked)
            alone, without = (1.0 if regression else float(of[about]) for of in masked)
            shown["check"] = Check(asked, kept, removed, alone, without, fill)
        tied = selected.size > 1 and not np.ptp(fields["unbounded"])
        fields["note"] = "; ".join(filter(None, (fields.get("note"), _TIED * tied))) or None
        return cls(image=image, grid=selected.shape, selected=selected, **shown, **fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Result) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # equality is by value, and the maps are arrays

    @property
    def size(self) -> int:
        """The number of selected cells."""
        return int(self.selected.sum())

    @property
    def cells(self) -> int:
        """The number of cells that there are to select from."""
        return self.selected.size

    @property
    def slice(self) -> int | None:
        """Of a volume, the layer of the grid that holds most of the selected cells, which pictures show; else None."""
        return None if len(self.grid) == 2 else int(self.selected.sum(axis=(1, 2)).argmax())

    def sliced(self, place: int | None = None) -> Result:
        """Of a volume, what it says of one layer, by default :attr:`slice`; of a photo itself."""
        place = self.slice if place is None else place
        if place is None or len(self.grid) == 2:
            return self
        maps = {name: getattr(self, name) for name in ("unbounded", "scores", "soft", "selected")}
        flat = {name: None if each is None else each[place] for name, each in maps.items()}
        votes = self.votes and dataclasses.replace(self.votes, cells=self.votes.cells[place])
        left, top, _, right, bottom, _ = self.region
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Result)}
        changed = flat | {"grid": self.grid[1:], "votes": votes, "present": None, "region": (left, top, right, bottom)}
        return Result(**own | changed)

    @property
    def view(self) -> str:
        """What a picture shows where that is not the whole photo, in words; else nothing."""
        if self.slice is None:
            return self.shown or ""
        held, number = self.selected[self.slice].sum(), self.middles[self.slice] + 1
        return f"{held} in this layer, {self.slice + 1} of {self.grid[0]}: slice {number} of {round(self.region[5])}"

    @property
    def edges(self) -> npt.NDArray[np.int64]:
        """Of a volume the slices at which the layers of the grid begin, and the end of the last, (D + 1,)."""
        return np.rint(np.linspace(self.region[2], self.region[5], self.grid[0] + 1)).astype(np.int64)

    @property
    def middles(self) -> npt.NDArray[np.int64]:
        """Of a volume the slices in the middle of the grid's layers, (D,)."""
        return (self.edges[:-1] + self.edges[1:] - 1) // 2

    @property
    def asked(self) -> str | None:
        """The class that the cells were chosen for, where that is not the classifier's own; else None."""
        if self.target is None or self.target == (self.classifier or self.prediction).index:
            return None
        labels = {guess.index: guess.label for guess in (*self.top, self.prediction)}
        if self.votes is not None:
            labels[self.votes.target] = self.votes.labels[0]
        return labels.get(self.target, f"class {self.target}")

    @property
    def disagrees(self) -> bool:
        """Whether the classifier's own answer is another one, although its own answer was to be explained."""
        return self.agrees is False and self.asked is None

    def __str__(self) -> str:
        """The classifier's answer and the selection's in one line; if they differ, this is said first."""
        return f"{self._in_words()}; {self.note}" if self.note else self._in_words()

    def _in_words(self) -> str:
        chosen = "" if self.asked is None else f" chosen for {self.asked}"
        cells, said = f"{self.size} of {self.cells} cells{chosen}", str(self.prediction)
        if self.present is not None:
            labels = {votes.target for votes in self.present}
            said = ", ".join(str(guess) for guess in self.top if guess.index in labels) or "no label above 50%"
        if self.classifier is None or (self.present is not None and self.agrees):
            return f"{said} (from {cells})"
        if self.disagrees:
            return f"DISAGREES: the classifier says {self.classifier}, the selected {cells} say {said}"
        return f"{self.classifier} (from {cells}: {said})"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``bla explain --json``."""
        record = {key: _plain(getattr(self, key)) for key in _KEYS}
        record |= {key: _plain(value) for key in _OPTIONAL if (value := getattr(self, key)) is not None}
        if self.check is not None:
            record["check"]["words"] = str(self.check)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; an ExplanationError names keys that are missing, unknown or contradictory."""
        if "maps" in record:
            raise ExplanationError(
                "expected cells of one feature map, got a selection over several, which is no longer supported: for "
                "finer cells train again with a larger --image-size, and explain the image again"
            )
        check_keys(record, _KEYS, "an explanation's keys", ExplanationError, optional=_OPTIONAL)
        values = {key: value for key, value in record.items() if key != "size"}
        if isinstance(values.get("check"), dict):
            values["check"] = {key: value for key, value in values["check"].items() if key != "words"}
        try:
            explanation = typed(json.dumps(values), cls)
        except (ValueError, TypeError) as error:
            raise ExplanationError(f"expected an explanation, got a malformed one: {error}") from error
        if explanation.size != record["size"]:
            raise ExplanationError(f"expected size {explanation.size}, the selected cells, got {record['size']}")
        return explanation

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as JSON, all or nothing: the file appears whole or not at all."""
        return write_json(Path(path), self.to_dict(), indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote; an ExplanationError if the file is not JSON or holds no explanation."""
        try:
            record = typed(Path(path).read_bytes(), dict[str, Any])
        except ValueError as error:
            raise ExplanationError(f"expected an explanation in {path}, got another file: {error}") from error
        return cls.from_dict(record)


def _read_only_map(name: str, value: npt.ArrayLike, kind: type[Any], grid: tuple[int, ...]) -> npt.NDArray[Any]:
    array = np.array(value, dtype=kind)
    if array.shape != grid:
        raise ExplanationError(f"expected {name} of shape {grid}, the grid's, got {array.shape}")
    if not np.isfinite(array).all():
        raise ExplanationError(f"expected finite {name}, got NaN or infinity")
    array.setflags(write=False)
    return array


def _plain(value: Any) -> Any:
    """As JSON: records as objects, maps as rows."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if not isinstance(value, np.ndarray):
        each = ((field.name, getattr(value, field.name), field.default) for field in dataclasses.fields(value))
        return {name: _plain(own) for name, own, default in each if own is not None or default is not None}
    if value.dtype == np.bool_:
        return value.astype(int).tolist()
    # The shortest decimal that gives the float32 back: exact, and a third of the length of the float64's.
    return [float(str(each + 0.0)) if value.ndim == 1 else _plain(each) for each in value]  # + 0.0: no "-0.0"
