"""The page: the verdict in plain words, then charts, photos, and the meaning of every number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bla.comparison.report.gallery import choose, exhibits
from bla.comparison.report.saved import Comparison, ReportError, read_comparison
from bla.comparison.report.verdict import Finding, decision, findings, headline, not_shown, percent, summary, to_settle
from bla.explanations import charts
from bla.files import write_atomically

_STYLED = ("cam", "norm", "centre", "random")
"""Methods with their own colour in the page; others are grey."""
_BETTER = {"higher": "higher is better", "lower": "lower is better", None: "neither direction is better"}
_ARROWS = {"higher": Markup("&uarr;"), "lower": Markup("&darr;"), None: ""}
_GROUPS = (
    ("Where the cells lie", "localisation", ("on_object", "recall", "iou", "pointing", "energy")),
    ("What the selected cells tell, and what the others tell", "truth",
     ("accuracy", "agreement", "evaluator", "evaluator_left")),
    ("What the selection gives away", "leakage", ("mask_only", "retrained", "off_object")),
    ("Changed pixels", "pixels", ("kept", "removed", "kept_area", "removed_area", "deletion", "insertion")),
    ("Sanity checks", "sanity", ("max_sensitivity", "infidelity")),
)  # fmt: skip
_NOT_SHARES = {"infidelity", "max_sensitivity", "loss"}
_CURVES = {
    "kept": ("Accuracy from the best cells", "higher"),
    "left": ("Accuracy from the cells left out", "lower"),
    "on_object": ("Share of the best cells on the object", "higher"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Where the page is, and its verdict.

    A decision in one sentence, the figures behind it, the tests counted, each test, what would settle the open ones,
    and what was not measured.
    """

    path: Path
    decision: str
    headline: str
    summary: str
    findings: tuple[Finding, ...]
    to_settle: str
    not_shown: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``bla report --json``."""
        found = dataclasses.asdict(self)
        return {"report": str(found.pop("path")), **found}


def write_report(folder: str | Path, out: str | Path | None = None, *, photos: int = 12, seed: int = 0) -> Report:
    """Write one self-contained HTML page from a saved comparison; it needs no network and no script.

    Parameters
    ----------
    folder: of a comparison, or of a run that holds one in ``comparison``.
    out: the file to write; by default ``report.html`` beside the comparison.
    photos: how many to show: half drawn by ``seed``, a quarter each the best and the worst.

    A ReportError if there is no comparison of this schema, or its photos have moved.
    """
    if photos < 1:
        raise ReportError(f"expected at least one photo to show, got {photos}")
    comparison = read_comparison(Path(folder))
    target = Path(out) if out is not None else comparison.folder / "report.html"
    if target.is_dir():
        raise ReportError(f"expected a file to write the page to, got the folder {target}: add a name")
    found = findings(comparison)
    shown = exhibits(comparison, choose(comparison, photos, seed))
    templates = PackageLoader("bla.comparison.report", "templates")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    known = comparison.record["baseline"]["accuracy"] is not None  # else accuracy is agreement
    groups = [
        {
            "title": title,
            "name": name,
            "pictures": _pictures(comparison, [key for key in keys if known or key != "accuracy"]),
        }
        for title, name, keys in _GROUPS
    ]
    said = (decision(comparison, found), headline(comparison), summary(found))
    verdict = Report(target, *said, tuple(found), to_settle(found), tuple(not_shown(comparison)))
    words = {"record": comparison.record, "own": comparison.own, "verdict": verdict, "exhibits": shown, "seed": seed}
    drawn = {"curve": _curve(comparison), "sizes": _sizes(comparison), "groups": groups, "metrics": _table(comparison)}
    html = environment.get_template("page.html").render(words | drawn)
    write_atomically(target, html.encode())
    return verdict


def _style(comparison: Comparison, method: str) -> str:
    return "own" if method == comparison.own else method if method in _STYLED else "other"


def _written(metric: str, value: float) -> str:
    return f"{value:.3g}" if metric in _NOT_SHARES else percent(value)


def _curve(comparison: Comparison) -> dict[str, Any] | None:
    """Accuracy from the best cells and from the rest, and cells on the object, against size."""
    styles = {key: _style(comparison, key) for key in comparison.methods}
    keys = sorted(styles, key=lambda key: styles[key] == "other")
    curves = {key: comparison.methods[key]["curve"] for key in keys}
    sizes = curves[comparison.own]["sizes"]
    if len(sizes) < 2:
        return None
    ticks = tuple((size, str(size)) for size in sizes if size in (sizes[0], sizes[-1]) or size % 4 == 0)
    across = charts.Axis(sizes[0], sizes[-1], ticks, "cells")
    pictures = []
    labelled = comparison.record["baseline"]["accuracy"] is not None
    for part, (named, better) in _CURVES.items():
        title = named if labelled else named.replace("Accuracy", "Agreement with the classifier")
        drawn = [
            charts.Line(comparison.title(key), styles[key], [*zip(sizes, curves[key][part], strict=True)])
            for key in keys
            if curves[key].get(part) is not None
        ]
        if drawn:
            ends = "; ".join(
                f"{line.name} from {percent(line.points[0][1])} to {percent(line.points[-1][1])}"
                for line in drawn
                if line.style != "other"
            )
            up = charts.axis_of([value for line in drawn for _, value in line.points], _tick)
            picture = charts.lines(drawn, across, up, words=f"{title}. {_BETTER[better]}. {ends}.")
            pictures.append((title, _BETTER[better], Markup(picture)))
    return {
        "panels": pictures,
        "legend": [(comparison.title(key), styles[key]) for key in keys if styles[key] != "other"],
        "others": [comparison.title(key) for key in keys if styles[key] == "other"],
        "judge": comparison.record["judge"],
        "sizes": (sizes[0], sizes[-1]),
    }


def _sizes(comparison: Comparison) -> dict[str, Any]:
    counts = [0] * comparison.cells
    for image in comparison.record["images"]:
        counts[int(image["size"]) - 1] += 1
    size = comparison.record["size"]
    words = f"Photos by size: from {size['min']} to {size['max']} cells, {size['mean']:.1f} on average."
    return {"picture": Markup(charts.bars(counts, label="cells selected", words=words)), **size}


def _pictures(comparison: Comparison, metrics: Sequence[str]) -> list[tuple[str, str, Markup]]:
    """For each metric that was measured its title, the better direction, and all methods' means with intervals."""
    found = []
    wide = 16 + 7.6 * max(len(comparison.title(key)) for key in comparison.methods)
    names = wide if wide <= 210 else 0  # longer ones stand above their rows
    for metric in metrics:
        rows = [
            charts.Row(comparison.title(key), (), (charts.Interval(
                figure.mean, figure.low, figure.high, _written(metric, figure.mean), _style(comparison, key)),))
            for key in comparison.methods if (figure := comparison.figure(key, metric)) is not None
        ]  # fmt: skip
        if not rows:
            continue
        meaning = comparison.metrics[metric]
        better = _BETTER[meaning["better"]]
        values = "; ".join(f"{row.name} {row.intervals[0].label}" for row in rows)
        axis = charts.axis_of(
            [end for row in rows for end in (row.intervals[0].low, row.intervals[0].high)],
            "{:.3g}".format if metric in _NOT_SHARES else _tick,
            mark=(comparison.record["leakage"]["chance"], "chance") if metric == "mask_only" else None,
        )
        picture = charts.rows(rows, axis, words=f"{meaning['title']}, {better}. {values}.", names=names)
        found.append((meaning["title"], better, Markup(picture)))
    return found


def _tick(share: float) -> str:
    return f"{100 * share:g}%"


def _table(comparison: Comparison) -> list[dict[str, Any]]:
    """Every metric with its meaning and each method's figure."""
    rows = []
    for metric, meaning in comparison.metrics.items():
        figures = {key: comparison.figure(key, metric) for key in comparison.methods}
        cells = [(key, "" if each is None else _written(metric, each.mean)) for key, each in figures.items()]
        rows.append({**meaning, "arrow": _ARROWS[meaning["better"]], "cells": cells})
    return rows
