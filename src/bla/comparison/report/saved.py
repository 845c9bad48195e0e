"""A comparison as `bla compare` saved it, read and checked."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from bla import BlaError
from bla.comparison.methods import RUN
from bla.explanations.explanation import Explanation, ExplanationError
from bla.files import read_json, reading, typed
from bla.metrics.statistics import Interval

SCHEMA_VERSION = 1
"""The version of compare.json that this page understands."""


class _Cost(TypedDict):
    ms_per_image: float | None
    peak_memory_mb: float | None


class _Method(TypedDict):
    title: str
    explains: str
    note: str
    cost: _Cost
    values: dict[str, Interval | None]
    each: dict[str, list[float | None]]
    curve: dict[str, list[float] | None]


class _Metric(TypedDict):
    name: str
    title: str
    formula: str
    source: str
    better: Literal["higher", "lower"] | None
    version: int


class _Row(TypedDict):
    metric: str
    against: str
    difference: float
    low: float
    high: float
    p_holm: float


class _Image(TypedDict):
    image: str
    label: str | None
    predicted: str
    size: int


class _Run(TypedDict):
    setup: str
    model: str


class _Data(TypedDict):
    root: str
    images: int
    digest: str
    labels: str
    seed: int


class _Size(TypedDict):
    mean: float
    min: float
    median: float
    max: float


class _Baseline(TypedDict):
    accuracy: float | None
    forward_ms: float | None


class _Evaluator(TypedDict):
    architecture: str
    law: str
    steps: Any
    accuracy_from_all_cells: float


class _Leakage(TypedDict):
    chance: float
    evaluator: _Evaluator


class _Record(TypedDict):
    """What the page reads of compare.json."""

    run: _Run
    data: _Data
    grid: tuple[int, int]
    explains: dict[str, str]
    judge: str
    metrics: dict[str, _Metric]
    baseline: _Baseline
    methods: dict[str, _Method]
    comparisons: list[_Row]
    size: _Size
    leakage: NotRequired[_Leakage | None]
    images: list[_Image]
    versions: dict[str, str]
    created: str


class ReportError(BlaError):
    """A comparison that is missing or is none, or a photo that has moved."""


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """The run minus another method on the same photos, its 95% interval, and p corrected for several comparisons."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def sign(self) -> int:
        """1 or -1 if the sign is significant at 5%, else 0."""
        if self.p >= 0.05 or self.low <= 0 <= self.high:
            return 0
        return 1 if self.mean > 0 else -1


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """The record in compare.json, and the explanations beside it; methods and metrics by key, in the record's order."""

    folder: Path
    record: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Mapping[str, Any]]

    @property
    def own(self) -> str:
        """The key of the run's own method, which sets the sizes."""
        return RUN

    @property
    def cells(self) -> int:
        """N, the cells of the grid."""
        height, width = self.record["grid"]
        return int(height) * int(width)

    def title(self, method: str) -> str:
        """A method's name for people."""
        return str(self.methods[method]["title"])

    def figure(self, method: str, metric: str) -> Interval | None:
        """None if the metric was not measured for the method."""
        value = self.methods.get(method, {}).get("values", {}).get(metric)
        return None if value is None else Interval(*(value[name] for name in Interval.__slots__))

    def difference(self, metric: str, against: str) -> Difference | None:
        """The run minus a method, on the same photos."""
        for row in self.record["comparisons"]:
            if row["metric"] == metric and row["against"] == against:
                return Difference(row["difference"], row["low"], row["high"], row["p_holm"])
        return None

    def paired(self, metric: str, against: str) -> list[float]:
        """The run minus a method on each photo that has both values."""
        own, other = (self.methods[name]["each"].get(metric, []) for name in (self.own, against))
        return [a - b for a, b in zip(own, other, strict=False) if a is not None and b is not None]

    def explanations(self, method: str, indices: Sequence[int]) -> list[Explanation]:
        """A method's explanations of some photos, by index; a ReportError if the file does not hold them."""
        path = self.folder / "explanations" / f"{method}.jsonl"
        try:
            with path.open(encoding="utf-8") as file:
                lines = dict(enumerate(itertools.islice(file, max(indices) + 1)))
            return [Explanation.from_dict(json.loads(lines[index])) for index in indices]
        except (OSError, KeyError, json.JSONDecodeError, ExplanationError) as error:
            raise ReportError(
                f"expected the explanations of the comparison in {path}, got none or others ({error!r}): "
                "run bla compare again"
            ) from error


def read_comparison(folder: Path) -> Comparison:
    """The comparison in a folder, or in the folder ``comparison`` of a run folder."""
    place = next((place for place in (folder, folder / "comparison") if (place / "compare.json").exists()), None)
    if place is None:
        raise ReportError(
            f"expected a comparison in {folder}, got no compare.json there or in {folder / 'comparison'}: "
            "`bla compare RUN` writes one"
        )
    path = place / "compare.json"
    with reading("the result of a comparison", path, ReportError):
        record = read_json(path)
        version, kind = record["schema_version"], record["kind"]
        json.dumps(record, allow_nan=False)
    if kind != "comparison" or version != SCHEMA_VERSION:
        raise ReportError(
            f"{path}: expected a comparison of schema_version {SCHEMA_VERSION}, got {kind!r} {version}: compare again "
            "with this bla"
        )
    with reading("the result of a comparison", path, ReportError, remedy=": compare again"):
        _check(typed(path.read_bytes(), _Record))
    return Comparison(place, record, record["methods"], record["metrics"])


def _check(record: _Record) -> None:
    """A ValueError where the parts of a record contradict one another."""
    count, cells = len(record["images"]), math.prod(record["grid"])
    whole = {len(numbers) for method in record["methods"].values() for numbers in method["each"].values()} <= {count}
    curves = [[numbers for numbers in method["curve"].values() if numbers] for method in record["methods"].values()]
    fits = {
        "photos": count > 0,
        f"the method {RUN!r}": RUN in record["methods"],
        "a grid": min(record["grid"]) > 0 and cells <= 2**20,
        "sizes of 1 to all cells": all(1 <= image["size"] <= cells for image in record["images"]),
        "a value for each photo": whole,
        "curves of one length": all("sizes" in method["curve"] for method in record["methods"].values())
        and len({len(numbers) for curve in curves for numbers in curve}) == 1,
        "classifiers that are explained": {method["explains"] for method in record["methods"].values()}
        <= {*record["explains"]},
        "what chance is": bool(record.get("leakage"))
        or not any("mask_only" in method["values"] for method in record["methods"].values()),
        "comparisons of methods": {row["against"] for row in record["comparisons"]} <= {*record["methods"]},
        "metrics with their meanings": {row["metric"] for row in record["comparisons"]}.union(
            *(method["values"] for method in record["methods"].values())
        )
        <= {*record["metrics"]},
    }
    if wrong := [what for what, so in fits.items() if not so]:
        raise ValueError(f"expected {wrong[0]}, got none or others")
