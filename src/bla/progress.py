"""Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and out of how much; out of 0: a remark."""


def silent(title: str, done: int, total: int) -> None:
    """Show no progress."""


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Give a callable of (title, done, total) that shows progress; with a total of 0 the title is a remark."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    rate = TextColumn("{task.fields[rate]}")
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()]
    with Bars(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}
        pace = Pace()

        def report(title: str, done: int, total: int) -> None:
            if not total:
                progress.console.print(title, markup=False, highlight=False)
                return
            if title not in tasks:
                for task in tasks.values():
                    progress.remove_task(task)
                tasks.clear()
                tasks[title] = progress.add_task(title, total=total, rate="")
            rate, _ = pace(title, done, total)
            progress.update(tasks[title], completed=done, rate=f"{rate:.1f}/s" if rate else "")

        yield report


def _lines() -> Progress:
    last = 0.0
    pace = Pace()

    def report(title: str, done: int, total: int) -> None:
        nonlocal last
        if not total:
            print(title, file=sys.stderr, flush=True)
            return
        rate, left = pace(title, done, total)
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            text = f", {rate:.1f} a second, {datetime.timedelta(seconds=round(left))} left" if rate else ""
            print(f"{title}: {done} of {total}{text}", file=sys.stderr, flush=True)

    return report


class Pace:
    """How fast what bears a title goes, since it was first told of: what an earlier call did does not count.

    >>> pace = Pace()
    >>> pace("working", 5, 9)
    (0.0, inf)
    """

    def __init__(self) -> None:
        self.title = ""
        self.first, self.since = 0, 0.0

    def __call__(self, title: str, done: int, total: int) -> tuple[float, float]:
        """Steps a second, and seconds left."""
        now = time.monotonic()
        if title != self.title or done < self.first:
            self.title, self.first, self.since = title, done, now
        if done == self.first:
            return 0.0, math.inf
        rate = (done - self.first) / max(now - self.since, 1e-9)
        return rate, (total - done) / rate


told = _lines()
"""Remarks, and a line now and then: what calls from Python show unless they are given another callable."""
