"""Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Give a callable of (title, done, total) that shows progress; with a total of 0 the title is a remark."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(title: str, done: int, total: int) -> None:
            if not total:
                progress.console.print(title, markup=False, highlight=False)
                return
            if title not in tasks:
                for task in tasks.values():
                    progress.remove_task(task)
                tasks.clear()
                tasks[title] = progress.add_task(title, total=total)
            progress.update(tasks[title], completed=done)

        yield report


def _lines() -> Callable[[str, int, int], None]:
    last = 0.0

    def report(title: str, done: int, total: int) -> None:
        nonlocal last
        if not total:
            print(title, file=sys.stderr, flush=True)
        elif time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)

    return report


told = _lines()
"""Remarks, and a line now and then: what calls from Python show unless they are given another callable."""
