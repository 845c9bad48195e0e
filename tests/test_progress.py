"""Progress: remarks and lines on standard error, a bar on a terminal or in a notebook, nothing on standard output."""

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
        report("reading", 9, 9)  # soon, but the last
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "reading: 1 of 9",
        "reading: 3 of 9, 0.2 a second, 0:00:33 left",
        "a remark [with brackets]",
        "reading: 9 of 9, 0.7 a second",
    ]
    assert captured.out == ""


@pytest.mark.parametrize("notebook", [False, True])
def test_a_bar_on_a_terminal_and_in_a_notebook(
    notebook: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if notebook:
        monkeypatch.setattr(progress, "tqdm", type("tqdm_notebook", (progress.tqdm,), {}))
    else:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.shown_progress() as report:
        report("reading", 4, 9)
        report("a remark [with brackets]", 0, 0)
        report("reading", 9, 9)
        report("writing", 2, 5)
    captured = capsys.readouterr()
    states = [state.strip() for state in captured.err.replace("\n", "\r").split("\r") if state.strip()]
    assert "a remark [with brackets]" in states
    assert states[0].startswith("reading:  44%")
    assert "4/9" in states[0]
    assert states[-1].startswith("writing:  40%")
    assert captured.err.endswith("\r"), "no bar remains"
    assert captured.out == ""


def test_a_task_that_begins_again_counts_from_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    show = progress.Display()
    for done in (40, 90, 0, 10):
        show("epoch", done, 100)
        now += 20
    assert capsys.readouterr().err.splitlines() == [
        "epoch: 40 of 100",
        "epoch: 90 of 100, 2.5 a second, 0:00:04 left",
        "epoch: 0 of 100",
        "epoch: 10 of 100, 0.5 a second, 0:03:00 left",
    ]
