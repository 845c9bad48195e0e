"""Progress on standard error: a bar in terminals and notebooks, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 10.0
Progress = Callable[[str, int, int], None]
"""Called with the task, the steps done and the steps in all; with 0 steps in all, the text is a remark."""


def printable(text: str) -> str:
    r"""Text for people: what is no printable character is escaped, so that a name cannot command a terminal.

    >>> printable("red\x1b[2J \udcff\u202egpj.exe")
    'red\\x1b[2J \\udcff\\u202egpj.exe'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def silent(title: str, done: int, total: int) -> None:
    """Show no progress."""


class Display:
    """A `Progress` that shows one task at a time, with its rate and the time left.

    ``bars`` is a class of tqdm's, whose bars it then shows wherever it is.
    Rate and time left count from a task's first call, so that steps done by an earlier process do not inflate them.
    """

    def __init__(self, bars: type[tqdm] | None = None) -> None:
        self.bars = bars
        self.title, self.first, self.since, self.last = "", 0, 0.0, -math.inf
        self.begun = False  # whether a line of this task has been printed: then its last one is, too
        self.bar: tqdm | None = None

    def __call__(self, title: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps are done, or a remark if ``total`` is 0."""
        if not total:
            tqdm.write(printable(title), file=sys.stderr)
            return
        if printable(title) != self.title or done < self.first:
            self.close()
            self.title, self.first, self.since = printable(title), done, time.monotonic()
            self.begun = False
        if self.bars or sys.stderr.isatty() or tqdm is not tqdm_asyncio:  # in a notebook, it is another class
            self._redraw(done, total)
        elif (self.begun and done >= total) or time.monotonic() - self.last > SECONDS_BETWEEN_LINES:
            self._print(done, total)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.title = None, ""

    def _redraw(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = (self.bars or tqdm)(
                desc=self.title, initial=done, total=total, unit="", leave=False, miniters=1, dynamic_ncols=True
            )
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def _print(self, done: int, total: int) -> None:
        self.last, self.begun = time.monotonic(), True
        rate = (done - self.first) / max(self.last - self.since, 1e-9)
        pace = f", {rate:.1f} a second" if rate else ""
        if rate and done < total:
            pace += f", {datetime.timedelta(seconds=round((total - done) / rate))} left"
        print(f"{self.title}: {done} of {total}{pace}", file=sys.stderr, flush=True)


show = Display()
"""What Python calls show progress by unless they are given another callable."""


def progress_of(report: Progress | type[tqdm]) -> Progress:
    """A `Progress` from one, or from a class of tqdm's: ``bla.fit(..., report=tqdm)``."""
    return Display(report) if isinstance(report, type) else report


def shown_progress() -> closing[Display]:
    """Give a callable that shows progress, and remove its bar at the end of the block."""
    return closing(Display())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let nothing that another library says reach the terminal: its warnings, logs and listings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
