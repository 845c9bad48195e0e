"""Files: all-or-nothing writes, JSON records, locks, and the root of all caches."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def write_json(path: Path, record: Any, *, indent: int | None = None, allow_nan: bool = True) -> Path:
    """Write ``record`` as JSON, all or nothing."""
    return write_atomically(path, json.dumps(record, indent=indent, allow_nan=allow_nan).encode())


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote; raises ValueError if the file holds no JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def reading(what: str, path: Path, error: type[Exception], *, remedy: str = "") -> Iterator[None]:
    """Raise ``error`` if the block fails to read ``what`` from the file, since the file holds something else.

    >>> with reading("the plan of a batch", Path("plan.json"), ValueError, remedy=": remove it"):
    ...     {}["rows"]
    Traceback (most recent call last):
    ValueError: expected the plan of a batch in plan.json, got another file (KeyError('rows')): remove it
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise error(f"expected {what} in {path}, got another file ({problem!r}){remedy}") from problem


def check_keys(
    record: Iterable[str], required: Iterable[str], what: str, error: type[Exception], *, optional: Iterable[str] = ()
) -> None:
    """Raise ``error`` if keys are missing from the record or unknown, naming them."""
    missing, unknown = sorted({*required} - {*record}), sorted({*record} - {*required, *optional})
    if missing or unknown:
        raise error(f"expected {what}; missing {missing}, unknown {unknown}")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes ``folder`` at the end of the block; an error leaves nothing."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def sole_writer(folder: Path, busy: Exception) -> Iterator[None]:
    """Be the only process that writes to ``folder`` until the end of the block; raise ``busy`` if another one does."""
    try:
        held = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise busy from None
    with held:
        yield


def timestamp() -> str:
    """The time in UTC, to the second, as records hold it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def cache_root() -> Path:
    """Where caches are kept: ``$BLA_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("BLA_CACHE") or platformdirs.user_cache_path("bla"))
