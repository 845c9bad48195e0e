"""What threads that decode photos share: memory, and Pillow's warnings."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator


class Room:
    """Bytes that threads share: each waits until what it takes is there."""

    def __init__(self, most: int) -> None:
        self.most, self.free = most, most
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Take so many, :attr:`most` at most, until the end of the block."""
        with self._changed:
            self._changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self._changed:
                self.free += count
                self._changed.notify_all()


class _PillowQuiet:
    """Ignore Pillow's warnings while any thread is inside.

    ``warnings.catch_warnings`` is not safe with threads: the last to leave could restore another's filters.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._restore.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore.close()


PILLOW_QUIET = _PillowQuiet()
