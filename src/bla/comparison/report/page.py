"""The page: what was found in plain words, then the figures, the photos, and what every number means."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bla.comparison.report.gallery import choose, exhibits
from bla.comparison.report.saved import Comparison, ReportError, read_comparison
from bla.comparison.report.verdict import Finding, findings, percent, summary
from bla.explanations import charts
from bla.files import write_atomically

_STYLES = {"cam": "cam", "norm": "norm", "centre": "centre", "random": "random"}
"""Methods with a colour of their own in the page; others are grey."""
_GROUPS = (
    ("Where the cells lie", "localisation", ("on_object", "recall", "iou", "pointing", "energy")),
    ("What the cells hold, and what is left", "truth", ("accuracy", "evaluator", "evaluator_left")),
    ("What the selection gives away", "leakage", ("mask_only", "retrained", "off_object")),
    ("At the level of pixels", "pixels", ("deletion", "insertion", "kept_grey", "kept_blur", "road_most")),
    ("Sanity", "sanity", ("cascade", "stability", "max_sensitivity", "infidelity")),
)  # fmt: skip
_NOT_SHARES = {"infidelity", "max_sensitivity", "loss", "cascade", "stability"}


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Where the page is, and its verdict."""

    path: Path
    summary: str
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``bla report --json``."""
        return {
            "report": str(self.path),
            "summary": self.summary,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def write_report(folder: str | Path, out: str | Path | None = None, *, photos: int = 12, seed: int = 0) -> Report:
    """Write one self-contained HTML page from a saved comparison; it needs no network and no script.

    Parameters
    ----------
    folder: of a comparison, or of a run that holds one in ``comparison``.
    out: the file to write; by default ``report.html`` beside the comparison.
    photos: how many to show: half drawn by ``seed``, a quarter each the best and the worst.

    Raises
    ------
    ReportError
        If there is no comparison of this schema, or its photos have moved.
    """
    if photos < 1:
        raise ReportError(f"expected at least one photo to show, got {photos}")
    comparison = read_comparison(Path(folder))
    target = Path(out) if out is not None else comparison.folder / "report.html"
    if target.is_dir():
        raise ReportError(f"expected a file to write the page to, got the folder {target}: add a name")
    found = findings(comparison)
    definitions, shown = exhibits(comparison, choose(comparison, photos, seed))
    environment = Environment(
        loader=PackageLoader("bla.comparison.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = percent
    html = environment.get_template("page.html").render(
        comparison=comparison,
        record=comparison.record,
        summary=summary(found),
        findings=found,
        definitions=definitions,
        exhibits=shown,
        seed=seed,
        curve=_curve(comparison),
        sizes=_sizes(comparison),
        groups=_groups(comparison),
        metrics=_table(comparison),
    )
    write_atomically(target, html.encode())
    return Report(target, summary(found), tuple(found))


def _whole_percent(value: float) -> str:
    return percent(value, 0)


def _style(comparison: Comparison, method: str) -> str:
    return "own" if method == comparison.own else _STYLES.get(method, "other")


def _curve(comparison: Comparison) -> dict[str, Any] | None:
    """Accuracy from the best cells and from the rest, and cells on the object, against size."""
    keys = sorted(comparison.methods, key=lambda key: _style(comparison, key) == "other")
    curves = {key: comparison.methods[key]["curve"] for key in keys}
    sizes = curves[comparison.own]["sizes"]
    keys = [key for key in keys if curves[key]["sizes"] == sizes]
    if len(sizes) < 2:
        return None
    judge = comparison.record["judge"]
    panels = {
        "kept": ("Accuracy from the best cells", "higher is better"),
        "left": ("Accuracy from the cells left out", "lower is better"),
        "on_object": ("Share of the best cells on the object", "higher is better"),
    }
    pictures = []
    for part, (title, better) in panels.items():
        drawn = [
            charts.Line(comparison.title(key), _style(comparison, key), [*zip(sizes, curves[key][part], strict=True)])
            for key in keys
            if curves[key].get(part) is not None
        ]
        if drawn:
            ends = "; ".join(
                f"{line.name} from {percent(line.points[0][1])} to {percent(line.points[-1][1])}"
                for line in drawn
                if line.style != "other"
            )
            ticks = [size for size in sizes if size in (sizes[0], sizes[-1]) or size % 4 == 0]
            x = charts.Axis(sizes[0], sizes[-1], tuple((size, str(size)) for size in ticks), "cells")
            y = charts.axis_of([value for line in drawn for _, value in line.points], _whole_percent)
            picture = charts.lines(drawn, x, y, words=f"{title}. {better}. {ends}.")
            pictures.append((title, better, Markup(picture)))
    legend = [(comparison.title(key), _style(comparison, key)) for key in keys if _style(comparison, key) != "other"]
    others = [comparison.title(key) for key in keys if _style(comparison, key) == "other"]
    return {"panels": pictures, "legend": legend, "others": others, "judge": judge, "sizes": (sizes[0], sizes[-1])}


def _sizes(comparison: Comparison) -> dict[str, Any]:
    counts = [0] * comparison.cells
    for image in comparison.record["images"]:
        counts[int(image["size"]) - 1] += 1
    size = comparison.record["size"]
    says = f"Photos by size: from {size['min']} to {size['max']} cells, {size['mean']:.1f} on average."
    return {"picture": Markup(charts.bars(counts, label="cells selected", words=says)), **size}


def _groups(comparison: Comparison) -> list[dict[str, Any]]:
    """Dots with intervals, a small figure a metric, for the metrics that were measured."""
    found = []
    for title, name, metrics in _GROUPS:
        pictures = []
        for metric in (metric for metric in metrics if metric in comparison.metrics):
            shares = metric not in _NOT_SHARES
            rows = [
                charts.Row(
                    comparison.title(key),
                    intervals=(
                        charts.Interval(
                            figure.mean,
                            figure.low,
                            figure.high,
                            percent(figure.mean) if shares else f"{figure.mean:.3g}",
                            _style(comparison, key),
                        ),
                    ),
                )
                for key in comparison.methods
                if (figure := comparison.figure(key, metric)) is not None
            ]
            if not rows:
                continue
            meaning = comparison.metrics[metric]
            better = {"higher": "higher is better", "lower": "lower is better", None: "neither way is better"}[
                meaning["better"]
            ]
            told = "; ".join(f"{row.name} {row.intervals[0].label}" for row in rows)
            axis = charts.axis_of(
                [end for row in rows for end in (row.intervals[0].low, row.intervals[0].high)],
                _whole_percent if shares else "{:.3g}".format,
                mark=(comparison.record["leakage"]["chance"], "chance") if metric == "mask_only" else None,
            )
            picture = charts.rows(rows, axis, words=f"{meaning['title']}, {better}. {told}.", names=152)
            pictures.append((meaning["title"], better, meaning["formula"], Markup(picture)))
        if pictures:
            found.append({"title": title, "name": name, "pictures": pictures})
    return found


def _table(comparison: Comparison) -> list[dict[str, Any]]:
    """Every metric with its meaning and each method's figure."""
    rows = []
    for metric, meaning in comparison.metrics.items():
        shares = metric not in _NOT_SHARES
        cells = []
        for key in comparison.methods:
            figure = comparison.figure(key, metric)
            cells.append("" if figure is None else percent(figure.mean) if shares else f"{figure.mean:.3f}")
        arrow = Markup({"higher": "&uarr;", "lower": "&darr;", None: ""}[meaning["better"]])
        rows.append({**meaning, "arrow": arrow, "cells": cells})
    return rows
