"""Figures as inline SVG: curves, a histogram, intervals. Colours are the page's, so that light and dark both serve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from bla.comparison.report.saved import Figure

_WIDTH, _HEIGHT = 340.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 12.0, 12.0, 38.0


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A curve: its name, its class in the page's style sheet, and y for every x."""

    name: str
    style: str
    values: Sequence[float]


def curves(sizes: Sequence[int], lines: Sequence[Line], *, across: str, up: str, says: str) -> Markup:
    """Lines over sizes; the first is drawn last, on top.

    Parameters
    ----------
    across, up: what the axes are.
    says: the figure in words, for those who do not see it.
    """
    low, high = _span([value for line in lines for value in line.values])
    steps = _ticks(low, high)

    def x(size: float) -> float:
        first, last = sizes[0], sizes[-1]
        return _LEFT + (size - first) / max(1, last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_grid_line(y(step), f"{100 * step:.0f}%") for step in steps]
    shown = [size for size in sizes if size in (sizes[0], sizes[-1]) or size % 4 == 0]
    parts += [_text(x(size), _HEIGHT - _BOTTOM + 16, str(size), "middle") for size in shown]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, across, "middle"))
    for line in reversed(lines):
        path = " ".join(f"{x(size):.1f},{y(value):.1f}" for size, value in zip(sizes, line.values, strict=True))
        parts.append(Markup('<polyline class="line {}" points="{}"><title>{}</title></polyline>').format(
            line.style, path, line.name
        ))  # fmt: skip
    return _picture(_WIDTH, _HEIGHT, f"{up}. {says}", parts)


def histogram(counts: Sequence[int], *, across: str, says: str) -> Markup:
    """Bars: how many photos have 1, 2, ... cells."""
    most = max(counts)
    last = max(size for size, count in enumerate(counts, start=1) if count)
    width = (_WIDTH - _LEFT - _RIGHT) / last
    room = _HEIGHT - _TOP - _BOTTOM
    parts = [_grid_line(_TOP, str(most)), _grid_line(_HEIGHT - _BOTTOM, "0")]
    for size, count in enumerate(counts[:last], start=1):
        height = room * count / most
        parts.append(Markup(
            '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{} cells: {}</title></rect>'
        ).format(
            _LEFT + (size - 1) * width + 0.5, _HEIGHT - _BOTTOM - height, max(width - 1, 0.5), height, size, count
        ))  # fmt: skip
        if size in (1, last) or (size % 5 == 0 and last - size > 2):
            parts.append(_text(_LEFT + (size - 0.5) * width, _HEIGHT - _BOTTOM + 16, str(size), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, across, "middle"))
    return _picture(_WIDTH, _HEIGHT, says, parts)


def intervals(
    rows: Sequence[tuple[str, str, Figure]], *, says: str, mark: tuple[float, str] | None = None, shares: bool = True
) -> Markup:
    """A dot with its 95% interval a row: (name, class, figure).

    Parameters
    ----------
    mark: a value to draw a line at, and its name: chance, say.
    shares: the values are shares, shown in per cent.
    """
    names, line, top = 128.0, 22.0, 18.0
    width, height = 420.0, top + 22.0 * len(rows) + 26
    values = [side for _, _, figure in rows for side in (figure.low, figure.high)]
    low, high = _span([*values, *([mark[0]] if mark else [])])

    def x(value: float) -> float:
        return names + (value - low) / (high - low) * (width - names - 52)

    def told(value: float) -> str:
        return f"{100 * value:.1f}%" if shares else f"{value:.3g}"

    parts = []
    for step in _ticks(low, high):
        parts.append(Markup('<line class="rule" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2:.1f}"/>').format(
            x(step), top - 8, height - 22
        ))  # fmt: skip
        label = f"{100 * step:.0f}%" if shares else f"{step:.3g}"
        parts.append(_text(x(step), height - 8, label, "middle"))
    if mark:
        parts.append(Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2:.1f}"/>').format(
            x(mark[0]), top - 8, height - 22
        ))  # fmt: skip
        parts.append(_text(x(mark[0]), top - 10, mark[1], "middle"))
    for index, (name, style, figure) in enumerate(rows):
        y = top + line * (index + 0.5)
        parts.append(_text(names - 8, y + 4, name, "end", style if style == "own" else ""))
        parts.append(Markup(
            '<g class="dot {0}"><line x1="{1:.1f}" x2="{2:.1f}" y1="{3:.1f}" y2="{3:.1f}"/>'
            '<circle cx="{4:.1f}" cy="{3:.1f}" r="4.5"/></g>'
        ).format(style, x(figure.low), x(figure.high), y, x(figure.mean)))  # fmt: skip
        parts.append(_text(width - 4, y + 4, told(figure.mean), "end"))
    return _picture(width, height, says, parts)


def _picture(width: float, height: float, says: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="figure" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        width, height, says, Markup().join(parts)
    )


def _grid_line(y: float, label: str) -> Markup:
    rule = Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
    return rule + _text(_LEFT - 6, y + 4, label, "end")


def _text(x: float, y: float, words: str, anchor: str, style: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        style, x, y, anchor, escape(words)
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A range that holds all values with some air, and is never empty."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.05 * max(abs(high), 0.1)
    return low - air, high + air


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range, three to six of them.

    >>> _ticks(0.71, 0.93)
    [0.75, 0.8, 0.85, 0.9]
    """
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]
