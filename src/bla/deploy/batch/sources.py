"""The rows of a plan: each photo's number, name, and place or content, read from any shard on."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from bla.data.prefetching import prefetch
from bla.deploy.batch.location import BatchError, Location, is_url, one_line
from bla.deploy.batch.plan import Plan, Shard, named

READ = 64  # rows read from a Parquet file at once
BATCH = 16  # photos in one run of the graph
AHEAD = 2  # such batches are fetched from an object store at once


class Row(NamedTuple):
    """A photo to explain: its number, its name, and its path, URL or content; or why it has none."""

    number: int
    name: str
    photo: Path | str | bytes | None
    error: str = ""

    def fetched(self) -> Row:
        """With the content in place of a URL; a failure that may pass is raised: the batch can be resumed."""
        if not isinstance(self.photo, str):
            return self
        try:
            with fsspec.open(self.photo, "rb") as file:
                return self._replace(photo=file.read())
        except ImportError as error:  # of the package that opens such URLs
            raise BatchError(f"expected a package that opens {self.name}, got {one_line(error)}") from error
        except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:  # of an unknown scheme
            came = f"{type(error).__name__}: {one_line(error)}"
            return self._replace(photo=None, error=f"{self.name}: expected a photo, got {came}")


class Reader:
    """Reads the rows of shards; a shard that follows the one before costs no search."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._place: tuple[int, int] | None = None
        self._values: Iterator[tuple[Any, Any]] = iter(())

    def rows(self, shard: Shard) -> Iterator[Row]:
        """The shard's rows, as many as the file's footer says; rows that are damaged hold the reason."""
        number = shard.number
        try:
            if self._place != (shard.file, shard.first):
                self._values = self._values_from(shard.file, shard.first)
            self._place = None
            for photo, name in itertools.islice(self._values, shard.count):
                yield self._row(shard, number, photo, name)
                number += 1
            if number < shard.number + shard.count:
                raise ValueError("fewer rows than its footer says")
            self._place = (shard.file, shard.first + shard.count)
        except (pa.ArrowException, OSError, ValueError) as error:
            if self.plan.kind == "paths" or (isinstance(error, OSError) and error.errno):  # ours, or the disk's fault
                raise
            reason = f"expected rows in {self.plan.files[shard.file][0]}, got a damaged file: {one_line(error)}"
            for missing in range(number, shard.number + shard.count):
                yield Row(missing, self._called(shard, missing), None, reason)

    def batches(self, shard: Shard) -> Iterator[list[Row]]:
        """The same, as many rows at once as the graph explains in one run; their URLs are fetched at once, ahead."""
        rows = self.rows(shard)
        batches = iter(lambda: list(itertools.islice(rows, BATCH)), [])
        with ThreadPoolExecutor(AHEAD) as pool, ThreadPoolExecutor(AHEAD * BATCH) as each:

            def fetched(batch: list[Row]) -> list[Row]:
                return [*each.map(Row.fetched, batch)] if any(isinstance(row.photo, str) for row in batch) else batch

            yield from prefetch(pool, fetched, batches, ahead=AHEAD)

    def _values_from(self, file: int, first: int) -> Iterator[tuple[Any, Any]]:
        """Contents and names from a row of a file on."""
        place = Location.of(self.plan.files[file][0])
        parquet = pq.ParquetFile(
            place.path,
            filesystem=place.files,
            buffer_size=1 << 20,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        columns = [column for column in (self.plan.content, self.plan.name) if column]
        for group in range(parquet.num_row_groups):  # no batch spans two groups, one of which may be damaged
            rows = parquet.metadata.row_group(group).num_rows
            if first >= rows:
                first -= rows
                continue
            for batch in parquet.iter_batches(READ, row_groups=[group], columns=columns, use_threads=False):
                skipped, first = first, max(0, first - len(batch))
                rest = pa.table(batch.slice(min(skipped, len(batch)))).flatten()  # a struct's fields become dotted
                names = rest[self.plan.name].to_pylist() if self.plan.name else itertools.repeat(None)
                yield from zip(rest[self.plan.content].to_pylist(), names, strict=False)

    def _row(self, shard: Shard, number: int, photo: Any, name: Any) -> Row:
        if self.plan.kind == "paths":
            return _at_path(number, photo)
        called = self._called(shard, number) if name is None else str(name)
        if isinstance(photo, bytes):
            return Row(number, called, photo)
        came = "null" if photo is None else type(photo).__name__
        return Row(number, called, None, f"{called}: expected the bytes of a photo, got {came}")

    def _called(self, shard: Shard, number: int) -> str:
        row = shard.first + number - shard.number
        return "" if self.plan.kind == "paths" else f"{self.plan.files[shard.file][0]}#{row}"


def _at_path(number: int, path: bytes) -> Row:
    name = named(path)
    if is_url(os.fsdecode(path)):
        return Row(number, name, os.fsdecode(path))
    try:
        photo = Path(os.fsdecode(path))
        kind = photo.stat().st_mode
        if stat.S_ISREG(kind):
            return Row(number, name, photo)
        came = "a folder; name a file in it" if stat.S_ISDIR(kind) else "a pipe or a device; name a file"
    except FileNotFoundError:
        came = "no such file; check the path"
    except (OSError, ValueError) as error:
        came = f"one that cannot be read ({one_line(error)})"
    return Row(number, name, None, f"{name}: expected a photo, got {came}")
