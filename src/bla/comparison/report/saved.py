"""A comparison as `bla compare` saved it, read and checked."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bla import BlaError
from bla.comparison.methods import RUN
from bla.explanations.explanation import Explanation, ExplanationError
from bla.files import read_json, reading
from bla.metrics.statistics import Interval

SCHEMA_VERSION = 1
"""The version of compare.json that this page understands."""


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
        return None if value is None else Interval(**value)

    def difference(self, metric: str, against: str) -> Difference | None:
        """The run minus a method, on the same photos."""
        for row in self.record["comparisons"]:
            if row["metric"] == metric and row["against"] == against:
                return Difference(row["difference"], row["low"], row["high"], row["p_holm"])
        return None

    def paired(self, metric: str, against: str) -> list[float]:
        """The run minus a method on each photo that has both values."""
        own, other = (self.methods[name]["each"].get(metric, []) for name in (self.own, against))
        return [a - b for a, b in zip(own, other, strict=True) if a is not None and b is not None]

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
    if kind != "comparison" or version != SCHEMA_VERSION:
        raise ReportError(
            f"{path}: expected a comparison of schema_version {SCHEMA_VERSION}, got {kind!r} {version}: compare again "
            "with this bla"
        )
    missing = sorted({"methods", "metrics", "comparisons", "images", "grid", "size", "data", "run"} - set(record))
    if missing or RUN not in record["methods"] or not record["images"]:
        raise ReportError(f"expected the result of a comparison in {path}, got one without {missing or 'photos'}")
    return Comparison(place, record, record["methods"], record["metrics"])
