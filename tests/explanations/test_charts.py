"""Charts: values where they belong, names escaped, words for those who do not see them."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from bla.explanations.charts import WIDTH, Axis, Interval, Line, Row, axis_of, bars, lines, rows

SHARES = Axis(0, 1, ((0, "0%"), (0.5, "50%"), (1, "100%")), "share", mark=(0.5, "chance"))


def test_a_curve_rises_to_the_right() -> None:
    picture = lines(
        [Line("a", "own", [(1, 0.0), (3, 1.0)])], Axis(1, 3, ((1, "1"),), "cells"), SHARES, words="it rises"
    )
    ((x1, y1, x2, y2),) = re.findall(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', picture)
    assert float(x1) < float(x2)
    assert float(y1) > float(y2), "up is up"
    assert 'aria-label="it rises"' in picture


def test_bars_are_as_high_as_their_counts() -> None:
    picture = bars([2, 0, 4, 0], label="cells", words="s")
    heights = [float(height) for height in re.findall(r'class="bar"[^>]*height="([\d.]+)"', picture)]
    assert heights[0] == pytest.approx(heights[2] / 2, abs=0.1)
    assert heights[1] == 0
    assert len(heights) == 3


@pytest.mark.parametrize("names", [0, 120])
def test_a_mean_stands_inside_its_interval_and_every_value_has_a_dot(names: float) -> None:
    row = Row("a", (0.1, 0.1, 0.9), (Interval(0.5, 0.4, 0.6, "50%", "own"), Interval(0.5, -3, 0.6)))
    picture = rows([row], SHARES, words="s", names=names)
    (line,) = re.findall(r'mean own"><line x1="([\d.]+)" x2="([\d.]+)".*?cx="([\d.]+)"', picture)
    low, high, middle = map(float, line)
    assert middle == pytest.approx((low + high) / 2, abs=0.11)
    dots = re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', picture)
    assert len(set(dots)) == 3, "none hides another"
    assert all(names <= float(x) <= WIDTH for x, _ in dots)
    assert min(map(float, re.findall(r' x1="([\d.]+)"', picture))) >= names, "what is off the axis stands at its end"
    assert ">chance<" in picture


def test_names_are_escaped_in_well_formed_svg() -> None:
    for picture in (
        rows([Row("<b>", (), (Interval(1, 0, 2, "<i>"),))], axis_of([0, 2], str, label="<u>"), words='"<s>"'),
        lines([Line("<b>", "own", [(0, 0), (1, 1)])], SHARES, SHARES, words="&"),
        bars([1], label="<b>", words="w"),
    ):
        tree = ElementTree.fromstring(picture)
        assert tree.get("role") == "img"
        assert not tree.findall(".//b")


def test_an_axis_holds_all_values_even_one_alone() -> None:
    for values in ([0.3], [0.0, 0.0], [-5.0, 1200.0], [1e-9, 2e-9]):
        axis = axis_of(values, str)
        assert axis.low < min(values) <= max(values) < axis.high
        assert 2 <= len(axis.ticks) <= 7
        assert all(axis.low <= at <= axis.high for at, _ in axis.ticks)
