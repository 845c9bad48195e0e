"""Charts as inline SVG: curves, bars, and rows of dots with intervals. Each function turns data into a string.

Every chart is 440 units wide, so that its text can be read on a phone, and carries its content in words for screen
readers. Colours are the page's, by class: ``grid``, ``mark``, ``tick``, ``label``, ``name``, ``line``, ``bar``,
``dot`` (one value) and ``mean`` (a mean with its interval), the last two with the caller's own class beside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 440
_EDGE, _LEFT, _TOP, _HEIGHT = 14.0, 52.0, 12.0, 290.0
_FOOT = 46.0  # the height of the tick labels and the axis label
_BOTTOM = _HEIGHT - _FOOT
_COLUMNS = 44  # of stacked dots
_VALUES = 58.0  # the width of the column of intervals' labels


class Axis(NamedTuple):
    """From ``low`` to ``high``, with labelled ticks; ``mark`` is a value with its name (or "") at a dashed line."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str = ""
    mark: tuple[float, str] | None = None

    def place(self, value: float, start: float, stop: float) -> float:
        """Where a value stands between two coordinates; a value off the axis stands at its end."""
        inside = min(max(value, self.low), self.high)
        return round(start + (inside - self.low) / (self.high - self.low) * (stop - start), 1)


def axis_of(
    values: Sequence[float], write: Callable[[float], str], *, label: str = "", mark: tuple[float, str] | None = None
) -> Axis:
    """An axis that holds all values with a margin, with three to six round ticks, written by ``write``.

    >>> [text for _, text in axis_of([0.72, 0.92], "{:.2f}".format).ticks]
    ['0.75', '0.80', '0.85', '0.90']
    """
    known = [*values, *([mark[0]] if mark else [])]
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.05 * max(abs(high), 0.1)
    low, high = low - margin, high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [round(index * step, 10) for index in range(first, last + 1)]
    return Axis(low, high, tuple((tick, write(tick)) for tick in ticks), label, mark)


class Line(NamedTuple):
    """A curve: its name, its class in the page's style sheet, and its points (x, y)."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


class Interval(NamedTuple):
    """A mean with its interval, its class in the page's style sheet, and a label."""

    mean: float
    low: float
    high: float
    label: str = ""
    style: str = ""


class Row(NamedTuple):
    """A row of a chart: a name, a dot for each value, and means with their intervals below."""

    name: str
    values: tuple[float, ...] = ()
    intervals: tuple[Interval, ...] = ()


def lines(curves: Sequence[Line], x: Axis, y: Axis, *, words: str) -> str:
    """Curves over x; the first is drawn last, on top. ``words`` is the chart for those who do not see it."""
    parts = _axes(x, y)
    for curve in reversed(curves):
        points = " ".join(
            f"{x.place(at, _LEFT, WIDTH - _EDGE)},{y.place(value, _BOTTOM, _TOP)}" for at, value in curve.points
        )
        title = f"<title>{escape(curve.name)}</title>"
        parts.append(f'<polyline class="line {curve.style}" points="{points}">{title}</polyline>')
    return _svg(_HEIGHT, words, parts)


def bars(counts: Sequence[int], *, label: str, words: str) -> str:
    """A histogram: how often 1, 2, ... occur, up to the last that does."""
    most = max(counts)
    last = max(number for number, count in enumerate(counts, start=1) if count)
    shown = [number for number in range(1, last + 1) if number in (1, last) or (number % 5 == 0 and last - number > 2)]
    x = Axis(0.5, last + 0.5, tuple((number, str(number)) for number in shown), label)
    y = Axis(0, most, ((0, "0"), (most, str(most))))
    parts = _axes(x, y)
    width = max((WIDTH - _EDGE - _LEFT) / last - 1, 0.5)
    for number, count in enumerate(counts[:last], start=1):
        left, top = x.place(number, _LEFT, WIDTH - _EDGE) - width / 2, y.place(count, _BOTTOM, _TOP)
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_BOTTOM - top:.1f}">'
            f"<title>{number}: {count}</title></rect>"
        )
    return _svg(_HEIGHT, words, parts)


def rows(drawn: Sequence[Row], axis: Axis, *, words: str, names: float = 0) -> str:
    """Rows on one axis, with a column of names ``names`` wide; with 0 each name stands above its row."""
    left, right = max(names, _EDGE), WIDTH - _EDGE
    if any(interval.label for row in drawn for interval in row.intervals):
        right -= _VALUES
    top = y = 18.0 if axis.mark and axis.mark[1] else 8.0
    parts: list[str] = []
    for row in drawn:
        style = f"name {row.intervals[0].style}".strip() if row.intervals else "name"
        if names:
            parts.append(_text(style, names - 8, y + 16, row.name, "end"))
        elif row.name:
            parts.append(_text(style, 2, y + 14, row.name, "start"))
            y += 20
        if row.values:
            dots, height = _stacked(row.values, axis, left, right, y)
            parts += dots
            y += height
        for interval in row.intervals:
            y += 12
            parts += _interval(interval, axis, left, right, y)
            y += 8
        y += 2 if names else 8
    height = y + 4 + (_FOOT if axis.label else 26)
    return _svg(height, words, [*_across(axis, left, right, top - 2, y + 4), *parts])


def _interval(interval: Interval, axis: Axis, left: float, right: float, y: float) -> list[str]:
    low, high, mean = (axis.place(value, left, right) for value in (interval.low, interval.high, interval.mean))
    parts = [
        f'<g class="{f"mean {interval.style}".strip()}"><line x1="{low}" x2="{high}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle cx="{mean}" cy="{y:.1f}" r="5"/></g>'
    ]
    if interval.label:
        parts.append(_text("tick", WIDTH - 2, y + 4.5, interval.label, "end"))
    return parts


def _stacked(values: Sequence[float], axis: Axis, left: float, right: float, top: float) -> tuple[list[str], float]:
    """Dots in columns along the axis, stacked so that no value hides another, and their height."""
    wide = (right - left) / _COLUMNS
    columns = [round(axis.place(value, 0, _COLUMNS)) for value in sorted(values)]
    tallest = max(Counter(columns).values())
    step = min(wide, 110 / tallest)
    height = max(step * tallest, 12.0)
    radius = max(min(step, wide) / 2 - 0.4, 0.5)
    stacked: Counter[int] = Counter()
    parts = []
    for column in columns:
        x, y = left + column * wide, top + height - (stacked[column] + 0.5) * step
        stacked[column] += 1
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
    return parts, height


def _across(axis: Axis, left: float, right: float, top: float, bottom: float) -> list[str]:
    """A horizontal axis below a chart, with a vertical line at each tick and at the mark."""
    parts = []
    for at, text in axis.ticks:
        x = axis.place(at, left, right)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom:.1f}"/>')
        near_left, near_right = x < 2 * _EDGE, x > WIDTH - 2 * _EDGE
        anchor = "start" if near_left else "end" if near_right else "middle"
        parts.append(_text("tick", 2 if near_left else WIDTH - 2 if near_right else x, bottom + 17, text, anchor))
    if axis.mark:
        x = axis.place(axis.mark[0], left, right)
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{top}" y2="{bottom:.1f}"/>')
        parts.append(_text("tick", x, top - 4, axis.mark[1], "middle"))
    return [*parts, _text("label", (left + right) / 2, bottom + 37, axis.label, "middle")]


def _axes(across: Axis, up: Axis) -> list[str]:
    """A vertical axis with a horizontal line at each tick, and a horizontal axis."""
    parts = []
    for at, text in up.ticks:
        y = up.place(at, _BOTTOM, _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _EDGE}" y1="{y}" y2="{y}"/>')
        parts.append(_text("tick", _LEFT - 6, y + 4.5, text, "end"))
    return [*parts, *_across(across, _LEFT, WIDTH - _EDGE, _TOP, _BOTTOM)]


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    if not text:
        return ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, words: str, parts: Sequence[str]) -> str:
    opening = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(words)}">'
    return opening + "".join(parts) + "</svg>"
