"""Files: all-or-nothing writes, JSON records, locks, and the root of all caches."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import io
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
from filelock import FileLock, Timeout

Kind = TypeVar("Kind")


def opened(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file to read; OSError if it is a pipe or a device, which may keep the reader waiting for ever."""
    mode = os.stat(path).st_mode  # noqa: PTH116  a million Paths would take their time
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe or a device", os.fspath(path))
    return Path(path).open("rb")


def write_atomically(path: Path, content: bytes) -> Path:
    """Write ``content`` beside ``path`` and move it into place by one rename, which is on the disk at the return."""
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
    sync(path.parent)
    return path


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, record: Any, *, indent: int | None = None, allow_nan: bool = True) -> Path:
    """Write ``record`` as JSON, all or nothing."""
    return write_atomically(path, json.dumps(record, indent=indent, allow_nan=allow_nan).encode())


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote; raises ValueError if the file holds no JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def typed(content: bytes | str, kind: type[Kind]) -> Kind:
    """JSON as a dataclass, a TypedDict or another type, part by part and without conversions.

    A ValueError names the first part that is wrong, or keys that a dataclass does not have.

    >>> typed('{"a": [1, 2.5]}', dict[str, list[float]]), typed("[1, 2]", tuple[int, int])
    ({'a': [1.0, 2.5]}, (1, 2))
    >>> typed('{"a": [1, "2"]}', dict[str, list[float]])
    Traceback (most recent call last):
    ValueError: Expected `float`, got `str` - at `$[...][1]`
    """
    import msgspec  # loads when the first record is read

    try:
        record = json.loads(content)
        found = msgspec.convert(record, kind, dec_hook=_array)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{error!s:.300}") from None
    if unknown := [*_unknown(record, found)]:
        raise ValueError(f"unknown keys {unknown!s:.300}")
    return found


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, its parts included; NaN and infinity are no numbers.

    >>> is_a((1, 2), tuple[int, ...]), is_a((1, True), tuple[int, ...]), is_a(3, float), is_a(float("nan"), float)
    (True, False, True, False)
    """
    import msgspec

    value = value.item() if hasattr(value, "item") else value  # of NumPy and torch
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return not isinstance(value, float) or math.isfinite(value)


def _array(_: Any, rows: Any) -> Any:
    import numpy as np

    return np.asarray(rows)


def _unknown(record: Any, found: Any) -> Iterator[str]:
    """The keys of the record that the dataclasses found in it do not have."""
    if dataclasses.is_dataclass(found) and isinstance(record, dict):
        fields = {field.name for field in dataclasses.fields(found)}
        yield from record.keys() - fields
        for name in record.keys() & fields:
            yield from _unknown(record[name], getattr(found, name))


@contextmanager
def reading(what: str, path: object, error: type[Exception], *, remedy: str = "") -> Iterator[None]:
    """Raise ``error`` if the block fails to read ``what`` from the file, since the file holds something else.

    >>> with reading("the plan of a batch", Path("plan.json"), ValueError, remedy=": remove it"):
    ...     {}["rows"]
    Traceback (most recent call last):
    ValueError: expected the plan of a batch in plan.json, got another file (KeyError('rows')): remove it
    """
    try:
        yield
    except error:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as problem:
        said = problem if type(problem) is ValueError else repr(problem)
        raise error(f"expected {what} in {path}, got another file ({said}){remedy}") from problem


def check_keys(
    record: Iterable[str], required: Iterable[str], what: str, error: type[Exception], *, optional: Iterable[str] = ()
) -> None:
    """Raise ``error`` if keys are missing from the record or unknown, naming them."""
    missing, unknown = sorted({*required} - {*record}), sorted({*record} - {*required, *optional})
    if missing or unknown:
        raise error(f"expected {what}; missing {missing}, unknown {unknown}"[:500])


def real(path: str | os.PathLike[str]) -> Path:
    """The absolute path behind links; unlike ``Path.resolve``, of links in a circle too."""
    return Path(os.path.realpath(path))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes ``folder``, on the disk, at the end; an error leaves nothing."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
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
