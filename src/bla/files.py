"""Files: all-or-nothing writes, locks, and where caches are kept."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout


def write_atomically(path: Path, content: bytes) -> Path:
    """Write ``content`` beside ``path`` and move it into place by one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def sole_writer(folder: Path, busy: Exception) -> Iterator[None]:
    """Be the only process that writes to ``folder`` until the end of the block; raise ``busy`` if another one does."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.release()


def cache_root() -> Path:
    """Where caches are kept: ``$BLA_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("BLA_CACHE") or platformdirs.user_cache_path("bla"))
