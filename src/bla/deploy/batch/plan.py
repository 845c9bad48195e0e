"""The plan of a batch: which photos there are, numbered once, and how they are cut into shards."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Meta

from bla.data.image_sets import SUFFIXES, files_below
from bla.deploy.batch.location import BatchError, Location, is_url, one_line
from bla.files import reading, timestamp, typed

SHARD = 4096
LISTS = frozenset({".txt", ".lst", ".list"})
# Columns that may hold a photo's name; the first one present does.
NAMES = ("path", "file_name", "filename", "name", "id", "key", "url", "__key__")
BATCH_FOLDER, PLAN, PATHS, GRAPH = ".batch", "plan.json", "paths.parquet", "graph.onnx"

File = tuple[str, int, int, float]  # path or URL, rows, bytes, and the time of the last change


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``first`` to ``first + count`` of a file; the batch numbers them from ``number`` on. One file of results."""

    index: int
    file: int
    first: int
    count: int
    number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a batch does: two calls with equal tasks belong to one batch."""

    source: str  # a resolved path, or a URL
    graph: str  # SHA-256 of the exported graph that explains
    pictures: bool = False
    scores: bool = False
    size: int | None = None  # None leaves it to the explainer
    fill: str | None = None  # None checks nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Task):
    """The rows of a batch in their order: those of Parquet files, one file after the other."""

    kind: Literal["paths", "content"]  # one file of ours that lists paths, or the user's files that hold the photos
    files: tuple[File, ...]
    content: str  # the column of paths or photos, dotted for a struct's field
    name: str | None  # the column of names; a row without a name is called FILE#ROW
    shard: Annotated[int, Meta(ge=1)]  # the largest number of rows in a shard; a shard lies in one file
    begun: str
    after: tuple[int, int] = (0, 0)  # the rows and parts of earlier calls, before photos were added

    @property
    def rows(self) -> int:
        """The number of photos."""
        return sum(rows for _, rows, _, _ in self.files)

    def shards(self) -> Iterator[Shard]:
        """All shards, in order."""
        number, index = self.after[0], itertools.count(self.after[1])
        for file, (_, rows, _, _) in enumerate(self.files):
            for first in range(0, rows, self.shard):
                count = min(self.shard, rows - first)
                yield Shard(next(index), file, first, count, number)
                number += count


def named(path: bytes) -> str:
    """A path as a row of the results names it."""
    return path.decode("utf-8", "backslashreplace")


def make_plan(source: str | Path, task: Task, work: Location, *, shard: int = SHARD, column: str | None = None) -> Plan:
    """Find the photos of a source and write the plan of a task into ``work``; a resumed batch reads it from there."""
    if shard < 1:
        raise BatchError(f"expected shards of at least 1 row, got {shard}")
    if not is_url(source) and not Path(source).exists():
        raise BatchError(f"expected a folder, a list of files or a Parquet file, got {source}, which does not exist")
    paths, tables = work / PATHS, list[Path]()
    photos = _write_paths(work, _listed(source, tables), shard)
    if photos and tables:
        raise BatchError(f"{source}: expected photos or Parquet files, got both: name a folder of one kind")
    if not photos and not tables:
        raise BatchError(f"{source}: expected photos ({' '.join(sorted(SUFFIXES))}) or Parquet files, got none")
    if photos:
        if column is not None:
            raise BatchError(f"expected --column with Parquet files, got it with {source}")
        return _written(task, work, shard, kind="paths", files=(_file(paths, photos),), content="path", name=None)
    paths.remove()
    files, (content, name) = _of_tables(sorted(tables), column)
    return _written(task, work, shard, kind="content", files=files, content=content, name=name)


def added(
    source: str | Path, task: Task, work: Location, parts: Sequence[Location], *, shard: int = SHARD
) -> Plan | None:
    """The plan of the photos in a source that no row of a finished batch's ``parts`` names; None if there are none.

    Of Parquet files there are none: their rows have no places by which to tell them.
    """
    if not is_url(source) and not Path(source).exists():
        return None
    if missing := [part for part in parts if not part.exists()]:
        raise BatchError(f"expected all {len(parts)} parts of the batch, got none at {missing[0]}: choose a new folder")
    columns = (pq.read_table(part.path, columns=["path"], filesystem=part.files)["path"] for part in parts)
    names = (name for column in columns for name in column.to_pylist())
    known = np.sort(np.fromiter(map(hash, names), np.int64))  # 8 bytes a photo

    def new(path: bytes) -> bool:
        place = np.searchsorted(known, called := hash(named(path)))
        return bool(place == len(known) or known[place] != called)

    if photos := _write_paths(work, filter(new, _listed(source, [])), shard):
        files, after = (_file(work / PATHS, photos),), (len(known), len(parts))
        return _written(task, work, shard, kind="paths", files=files, content="path", name=None, after=after)
    work.clear()
    return None


def _listed(source: str | Path, tables: list[Path]) -> Iterator[bytes]:
    """The places of a source's photos; Parquet files go to ``tables``."""
    place = Path(source)
    if is_url(source):
        yield from _found_at(str(source))
    elif place.is_dir():
        yield from _found(place, tables)
    elif place.suffix.lower() == ".parquet":
        tables.append(place)
    elif place.suffix.lower() in LISTS:
        with place.open("rb") as lines:  # relative paths are relative to where the command runs
            yield from filter(None, (line.strip(b"\r\n") for line in lines))
    else:
        yield os.fsencode(place)


def _written(task: Task, work: Location, shard: int, **found: Any) -> Plan:
    plan = Plan(**dataclasses.asdict(task), **found, shard=shard, begun=timestamp())
    (work / PLAN).write(json.dumps(dataclasses.asdict(plan)).encode())
    return plan


def read_plan(work: Location) -> Plan | None:
    """The plan of a batch that has begun, or None; refused if one of its Parquet files has changed since."""
    if not (work / PLAN).exists():
        return None
    with reading("the plan of a batch", work / PLAN, BatchError):
        plan = typed((work / PLAN).read(), Plan)
        for file in plan.files:
            place = Location.of(file[0])
            if not place.exists() or _file(place, file[1]) != file:
                raise BatchError(
                    f"expected {place} as it was when the batch began, got a changed or missing file: put it back, or "
                    "begin anew in another folder"
                )
            table = pq.read_metadata(place.path, filesystem=place.files)
            names = table.schema.to_arrow_schema().empty_table().flatten().schema.names
            if table.num_rows != file[1] or not {plan.content, plan.name or plan.content} <= {*names}:
                raise ValueError(f"{file[1]} rows with {plan.content}, {plan.name}, not {table.num_rows} with {names}")
    return plan


def _file(place: Location, rows: int) -> File:
    state = place.files.info(place.path)
    return str(place), rows, state["size"], state["mtime"] if place.local else 0.0


def _found(folder: Path, tables: list[Path]) -> Iterator[bytes]:
    """Photos below a folder; Parquet files go to ``tables``."""
    for path in files_below(folder):
        suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122  # a million Paths would take their time
        if suffix in SUFFIXES:
            yield os.fsencode(path)
        elif suffix == ".parquet":
            tables.append(Path(path))


def _found_at(url: str) -> Iterator[bytes]:
    """Photos below a URL, or the one at it, as URLs."""
    place = Location.of(url)
    try:
        if place.files.isfile(place.path):
            if url.lower().endswith((".txt", ".csv", ".parquet")):
                raise BatchError(f"expected a folder or a photo at a URL, got {url}: lists and Parquet files are local")
            yield os.fsencode(url)
            return
        for folder, folders, names in place.files.walk(place.path, on_error="raise"):
            folders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122 - as above
                    yield os.fsencode(place.files.unstrip_protocol(f"{folder}/{name}"))
    except OSError as error:
        came = f"{type(error).__name__}: {one_line(error)}"
        raise BatchError(f"{url}: expected a place that fsspec can list, got {came}") from error


def _write_paths(work: Location, paths: Iterator[bytes], shard: int) -> int:
    """Write paths into ``work`` as they come, a row group a shard; returns how many."""
    work.mkdir()
    schema = pa.schema([("path", pa.binary())])
    count = 0
    with pq.ParquetWriter((work / PATHS).path, schema, filesystem=work.files) as writer:
        while some := list(itertools.islice(paths, shard)):
            writer.write_table(pa.table({"path": some}, schema=schema), row_group_size=shard)
            count += len(some)
    return count


def _of_tables(tables: Sequence[Path], column: str | None) -> tuple[tuple[File, ...], tuple[str, str | None]]:
    """Parquet files, and the columns that all of them have for the photos' bytes and names."""
    columns: list[tuple[str, str | None]] = []
    files = []
    for table in tables:
        try:
            parquet = pq.ParquetFile(table)
        except (pa.ArrowException, OSError) as error:
            raise BatchError(f"{table}: expected a Parquet file, got {one_line(error)}; write it again") from error
        columns.append(_columns(parquet.schema_arrow, table, column))
        files.append(_file(Location.of(table), parquet.metadata.num_rows))
        if columns[-1] != columns[0]:
            raise BatchError(f"{table}: expected the columns of {tables[0]}, {columns[0]}, got {columns[-1]}")
    if not sum(file[1] for file in files):
        raise BatchError(f"{tables[0]}: expected rows, got none")
    return tuple(files), columns[0]


def _columns(schema: pa.Schema, table: Path, wanted: str | None) -> tuple[str, str | None]:
    """The column of the photos' bytes, and that of their names."""
    kinds = {field.name: field.type for field in schema.empty_table().flatten().schema}
    binary = [name for name, kind in kinds.items() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind)]
    if wanted is not None and f"{wanted}.bytes" in binary:
        wanted += ".bytes"
    chosen = binary if wanted is None else [name for name in binary if name == wanted]
    if len(chosen) != 1:
        came = f"{len(chosen)} such: {binary}" if wanted is None else f"{wanted!r}; columns of bytes: {binary}"
        raise BatchError(f"{table}: expected a column with the photos' bytes, got {came}; name one with --column")
    texts = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    beside = f"{chosen[0].rpartition('.')[0]}.path"
    return chosen[0], next((name for name in (beside, *NAMES) if name in texts), None)
