"""Progress: remarks and lines on standard error, a bar on a terminal, nothing on standard output."""

from __future__ import annotations

import sys

import pytest

from bla import progress


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress.shown_progress() as report:
        report("reading", 1, 9)
        report("reading", 2, 9)  # too soon
        now += progress.SECONDS_BETWEEN_LINES + 1
        report("reading", 3, 9)
        report("a remark [with brackets]", 0, 0)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "reading: 1 of 9",
        "reading: 3 of 9, 0.2 a second, 0:00:33 left",
        "a remark [with brackets]",
    ]
    assert captured.out == ""


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress.shown_progress() as report:
        report("reading", 1, 9)
        report("a remark [with brackets]", 0, 0)
        report("writing", 2, 5)
    captured = capsys.readouterr()
    assert "a remark [with brackets]" in captured.err
    assert captured.out == ""
