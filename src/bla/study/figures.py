"""The figures of a results page: what each shows, in dots and intervals and in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bla.explanations.charts import Axis, Interval, Row, axis_of, rows

Results = Mapping[str, Any]


class Figure(NamedTuple):
    """A chart and its caption; `words` says more to those who do not see it."""

    title: str
    rows: Sequence[Row]
    axis: Axis
    caption: str
    words: str = ""

    def svg(self, word: str) -> str:
        """The chart as inline SVG; `word` goes before its title."""
        return rows(self.rows, self.axis, words=f"{word}{self.title}. {self.caption} {self.words}".strip())


def figures(results: Results, verdicts: Sequence[str]) -> dict[str, Figure]:
    """All figures that this study has, by name."""
    choice = results["registered"]["task"] == "preference"
    found = {"people": _people(results, choice, verdicts)}
    if results["strengths"] is not None and results["strengths"]["arms"]:
        found["strengths"] = _strengths(results["strengths"]["arms"])
    if results["accuracy"]:
        found["accuracy"] = _accuracy(results["accuracy"])
    if results["exploratory"]["photos"]:
        found["photos"] = _photos(results["exploratory"]["photos"], choice)
    if seconds := results["quality"]["seconds"]:
        found["seconds"] = Figure(
            "Response times",
            [Row("", tuple(seconds["medians"]))],
            axis_of([0, *seconds["medians"]], "{:g} s".format, label="seconds per trial"),
            "Each dot is one person's median time per trial. Half of the people's medians lie between "
            f"{seconds['lower_quartile']:.1f} and {seconds['upper_quartile']:.1f} s.",
        )
    if side := results["quality"]["side"]:
        found["side"] = Figure(
            "Sides",
            [Row("", tuple(side["values"]))],
            _shares("answers on the left"),
            "Each dot is one person's share of answers on the left. Sides are balanced: without a bias towards one "
            "side it is about 50%.",
        )
    return found


def _people(results: Results, choice: bool, verdicts: Sequence[str]) -> Figure:
    drawn, values = [], [0.2]
    for entry in results["comparisons"]:
        tests = [("people", "these photos", ""), ("people_and_photos", "photos like these", "hollow")]
        intervals = [
            Interval(entry[key]["mean"], entry[key]["low"], entry[key]["high"], label, style)
            for key, label, style in tests
            if entry[key] is not None
        ]
        values += [abs(end) for one in intervals for end in (one.low, one.high)] + [abs(v) for v in entry["values"]]
        name = f"{entry['first']} {'rather than' if choice else 'minus'} {entry['second']}"
        drawn.append(Row(name, tuple(entry["values"]), tuple(intervals)))
    below = (
        "Below them the mean over people with its interval: filled for these photos, hollow for photos like these. "
        f"Dashed: no {'preference' if choice else 'difference'}."
    )
    if choice:
        dots = "Each dot is one person: the share of their choices that fell on the first-named arm."
        axis = _shares("share of a person's choices")
        return Figure("What people chose", drawn, axis, f"{dots} {below}", " ".join(verdicts))
    dots = "Each dot is one person: their right answers with the first-named arm minus those with the other."
    label = "difference in right answers, percentage points"
    axis = axis_of([-max(values), max(values)], lambda v: f"{100 * v:+.0f}" if v else "0", label=label, mark=(0, ""))
    return Figure("What helped people", drawn, axis, f"{dots} {below}", " ".join(verdicts))


def _strengths(arms: Sequence[Mapping[str, Any]]) -> Figure:
    arms = sorted(arms, key=lambda entry: -entry["strength"])
    most = max(abs(value) for entry in arms for value in (entry["low"], entry["high"]))
    return Figure(
        "Strengths of the arms",
        [_interval_row(entry, "strength", f"{entry['strength']:+.2f}") for entry in arms],
        axis_of([-most, most], lambda v: f"{v:+g}" if v else "0", label="strength, logits", mark=(0, "")),
        "Each arm's strength by the Bradley-Terry model, in logits about their mean, with its interval from a "
        "bootstrap of people. An arm that is 1 logit stronger wins 73% of the choices between the two.",
        ", ".join(f"{entry['arm']} {entry['strength']:+.2f}" for entry in arms) + ".",
    )


def _accuracy(arms: Sequence[Mapping[str, Any]]) -> Figure:
    known = [entry for entry in arms if entry["people"]]
    return Figure(
        "Right answers with each arm",
        [_interval_row(entry, "mean", f"{entry['mean']:.1%}") for entry in known],
        _shares("right answers"),
        "Each dot is one person: the share of their answers with this arm that were right. Below, the mean over "
        "people.",
        ", ".join(f"{entry['arm']} {entry['mean']:.1%}" for entry in known) + ".",
    )


def _photos(photos: Sequence[Mapping[str, Any]], choice: bool) -> Figure:
    groups: dict[str, list[float]] = defaultdict(list)
    for photo in photos:
        name = f"{photo['first']} rather than {photo['second']}" if choice else str(photo["first"])
        groups[name].append(photo["share"])
    what = "chose the first-named arm" if choice else "answered correctly with this arm"
    return Figure(
        "Photo by photo",
        [Row(name, tuple(values)) for name, values in groups.items()],
        _shares("people choosing it" if choice else "right answers"),
        f"Exploratory. Each dot is one photo: the share of people who {what}.",
    )


def _interval_row(entry: Mapping[str, Any], middle: str, label: str) -> Row:
    interval = Interval(entry[middle], entry["low"], entry["high"], label)
    return Row(entry["arm"], tuple(entry.get("values", ())), (interval,))


def _shares(label: str) -> Axis:
    return Axis(0, 1, tuple((k / 4, f"{25 * k}%") for k in range(5)), label, mark=(0.5, ""))
