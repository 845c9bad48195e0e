"""The figures of a results page: inline SVG that follows the page's colours, each with its words.

A figure is drawn for a width of 440 units, so that its text can be read on a phone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 440
_LEFT, _RIGHT = 14, 14
_COLUMNS = 44


@dataclass(frozen=True)
class Axis:
    """A horizontal axis from `low` to `high`, with ticks and how they are written; `null` gets a dashed line."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    null: float | None = None

    def x(self, value: float) -> float:
        """Where a value stands."""
        return round(_LEFT + (value - self.low) / (self.high - self.low) * (WIDTH - _LEFT - _RIGHT), 1)


def share_axis(label: str) -> Axis:
    """From 0% to 100%, nothing at 50%."""
    return Axis(0, 1, tuple((k / 4, f"{25 * k}%") for k in range(5)), label, null=0.5)


def difference_axis(values: Sequence[float], label: str) -> Axis:
    """Around 0, as wide as the values need."""
    reach = min(1.0, max(0.2, *(abs(value) for value in values)))
    reach = next(step for step in (0.2, 0.4, 0.6, 0.8, 1.0) if reach <= step + 1e-9)
    ticks = tuple((reach * k / 2, f"{50 * reach * k:+.0f}" if k else "0") for k in range(-2, 3))
    return Axis(-reach, reach, ticks, label, null=0)


def seconds_axis(values: Sequence[float]) -> Axis:
    """From 0 s to a round number above all values."""
    most = max(values, default=1.0)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if most <= 5 * step)
    return Axis(0, 5 * step, tuple((k * step, f"{k * step} s") for k in range(6)), "seconds a trial")


def logit_axis(values: Sequence[float]) -> Axis:
    """Around 0, in logits."""
    most = max((abs(value) for value in values), default=1.0)
    step = next(step for step in (0.5, 1, 2, 3, 5, 10, 20, 10**6) if most <= 2 * step)
    ticks = tuple((k * step, f"{k * step:+g}" if k else "0") for k in range(-2, 3))
    return Axis(-2 * step, 2 * step, ticks, "strength, logits", null=0)


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; the second of two on a row is drawn hollow."""

    mean: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Row:
    """A row of a figure: a name, a dot for each value, means below them."""

    name: str
    values: tuple[float, ...] = ()
    intervals: tuple[Interval, ...] = ()


def figure(rows: Sequence[Row], axis: Axis, *, name: str, title: str, description: str) -> str:
    """Rows under one another on one axis, as SVG; `name` is its own on the page.

    The title and the description are what a screen reader says.
    """
    parts: list[str] = []
    y = 8.0
    for row in rows:
        y, drawn = _row(row, axis, y)
        parts += drawn
    bottom = y + 4
    grid = [
        f'<line class="grid" x1="{axis.x(at)}" x2="{axis.x(at)}" y1="6" y2="{bottom:.1f}"/>' for at, _ in axis.ticks
    ]
    if axis.null is not None:
        grid.append(f'<line class="null" x1="{axis.x(axis.null)}" x2="{axis.x(axis.null)}" y1="6" y2="{bottom:.1f}"/>')
    for at, text in axis.ticks:
        anchor = "start" if axis.x(at) < 2 * _LEFT else "end" if axis.x(at) > WIDTH - 2 * _RIGHT else "middle"
        x = {"start": 2.0, "end": WIDTH - 2.0}.get(anchor, axis.x(at))
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 17:.1f}" text-anchor="{anchor}">{escape(text)}</text>')
    parts.append(
        f'<text class="label" x="{WIDTH / 2}" y="{bottom + 37:.1f}" text-anchor="middle">{escape(axis.label)}</text>'
    )
    height = bottom + 46
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
        + "".join(grid + parts)
        + "</svg>"
    )


def _row(row: Row, axis: Axis, y: float) -> tuple[float, list[str]]:
    parts = []
    if row.name:
        y += 14
        parts.append(f'<text class="name" x="2" y="{y:.1f}">{escape(row.name)}</text>')
        y += 6
    if row.values:
        drawn, height = _dots(row.values, axis, y)
        parts += drawn
        y += height
    for number, interval in enumerate(row.intervals):
        y += 12
        kind = "mean hollow" if number else "mean"
        x1, x2, x = (axis.x(_inside(value, axis)) for value in (interval.low, interval.high, interval.mean))
        parts.append(
            f'<g class="{kind}"><line x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{x}" cy="{y:.1f}" r="5"/></g>'
        )
        if interval.label:
            x, anchor = (x2 + 8, "start") if x2 < WIDTH * 0.62 else (x1 - 8, "end")
            text = escape(interval.label)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 4.5:.1f}" text-anchor="{anchor}">{text}</text>')
        y += 8
    return y + 8, parts


def _inside(value: float, axis: Axis) -> float:
    return min(max(value, axis.low), axis.high)


def _dots(values: Sequence[float], axis: Axis, top: float) -> tuple[list[str], float]:
    """Stacked dots: a column for each place on the axis, so that no value hides another."""
    wide = (WIDTH - _LEFT - _RIGHT) / _COLUMNS
    columns = [round((_inside(value, axis) - axis.low) / (axis.high - axis.low) * _COLUMNS) for value in sorted(values)]
    tallest = max(Counter(columns).values())
    step = min(wide, 110 / tallest)
    height = max(step * tallest, 12.0)
    radius = max(min(step, wide) / 2 - 0.4, 0.5)
    stacked: Counter[int] = Counter()
    parts = []
    for column in columns:
        x = _LEFT + column * wide
        y = top + height - (stacked[column] + 0.5) * step
        stacked[column] += 1
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
    return parts, height
