"""What is to be explained: rows numbered once and for all, cut into shards, read from any of them on."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bla import BlaError
from bla.data.image_sets import SUFFIXES
from bla.files import read_json, reading, write_json

SHARD = 4096
READ = 64
"""Rows read from a Parquet file at once."""
LISTS = frozenset({".txt", ".lst", ".list"})
NAMES = ("path", "file_name", "filename", "name", "id", "key", "url", "__key__")
"""Columns that tell what a row's photo is called, the first that there is."""
BATCH_FOLDER, PLAN, PATHS, GRAPH = ".batch", "plan.json", "paths.parquet", "graph.onnx"


class BatchError(BlaError):
    """Photos that cannot be found, or a folder of results that belongs to other work."""


class Row(NamedTuple):
    """A photo to explain: its number, what it is called, and where or what it is; or why it is neither."""

    number: int
    name: str
    photo: Path | bytes | None
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``first`` to ``first + count`` of a file, whose numbers begin with ``number``; written as one file."""

    index: int
    file: int
    first: int
    count: int
    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The rows of a batch in their order: those of Parquet files, one after the other.

    Attributes
    ----------
    kind: ``paths``: one file of ours that lists paths; ``content``: files of the user's that hold the photos.
    files: (path, rows, bytes, time of the last change) each.
    content, name: columns, dotted where a struct's; a row without name is called FILE#ROW.
    shard: rows in a shard at most; a shard lies in one file.
    source: what the user gave.
    graph: SHA-256 of the exported graph that explains.
    begun: when.
    pictures: whether panels are written.
    size: cells to select; None: the explainer's own choice.
    """

    kind: Literal["paths", "content"]
    files: tuple[tuple[str, int, int, int], ...]
    content: str
    name: str | None
    shard: int
    source: str
    graph: str
    begun: str
    pictures: bool
    size: int | None

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(rows for _, rows, _, _ in self.files)

    def shards(self) -> Iterator[Shard]:
        """All of them, in order."""
        number, index = 0, itertools.count()
        for file, (_, rows, _, _) in enumerate(self.files):
            for first in range(0, rows, self.shard):
                count = min(self.shard, rows - first)
                yield Shard(next(index), file, first, count, number)
                number += count


class Reader:
    """Reads the rows of shards; going on with the next shard where the last one ended costs nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._place = (-1, -1)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None

    def rows(self, shard: Shard) -> Iterator[Row]:
        """The shard's rows, each once, whatever is wrong with the file: its footer told how many there are."""
        done = 0
        try:
            if self._place != (shard.file, shard.first):
                self._seek(shard.file, shard.first)
            while done < shard.count:
                batch = self._next(shard.count - done)
                for row in self._understood(batch, shard, done):
                    yield row
                    done += 1
            self._place = (shard.file, shard.first + shard.count)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's fault rather than the file's
                raise
            self._place, self._rest = (-1, -1), None
            reason = f"expected rows in {self.plan.files[shard.file][0]}, got a damaged file: {_one_line(error)}"
            for missing in range(done, shard.count):
                name = self._called(shard, shard.first + missing)
                yield Row(shard.number + missing, name, None, reason)

    def _seek(self, file: int, first: int) -> None:
        parquet = pq.ParquetFile(
            self.plan.files[file][0], buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
        before, group = 0, 0
        while before + parquet.metadata.row_group(group).num_rows <= first:
            before += parquet.metadata.row_group(group).num_rows
            group += 1
        columns = [column for column in (self.plan.content, self.plan.name) if column]
        self._batches = itertools.chain.from_iterable(  # group by group: no batch spans two, of which one is damaged
            parquet.iter_batches(READ, row_groups=[index], columns=columns, use_threads=False)
            for index in range(group, parquet.metadata.num_row_groups)
        )
        self._rest = None
        skipped = 0
        while skipped < first - before:
            skipped += len(self._next(first - before - skipped))

    def _next(self, most: int) -> pa.RecordBatch:
        """Some rows, at most so many."""
        batch = next(self._batches, None) if self._rest is None else self._rest
        if batch is None:
            raise ValueError("fewer rows than its footer says")
        self._rest = batch.slice(most) if len(batch) > most else None
        return batch.slice(0, most)

    def _understood(self, batch: pa.RecordBatch, shard: Shard, done: int) -> Iterator[Row]:
        photos = _column(batch, self.plan.content)
        names = _column(batch, self.plan.name) if self.plan.name else [None] * len(batch)
        for offset, (photo, name) in enumerate(zip(photos, names, strict=True)):
            number = shard.number + done + offset
            if self.plan.kind == "paths":
                yield _at_path(number, photo)
                continue
            called = self._called(shard, shard.first + done + offset) if name is None else str(name)
            if isinstance(photo, bytes):
                yield Row(number, called, photo)
            else:
                came = "null" if photo is None else type(photo).__name__
                yield Row(number, called, None, f"{called}: expected the bytes of a photo, got {came}")

    def _called(self, shard: Shard, row: int) -> str:
        return "" if self.plan.kind == "paths" else f"{self.plan.files[shard.file][0]}#{row}"


def make_plan(
    source: str | Path,
    work: Path,
    *,
    graph: str,
    shard: int = SHARD,
    column: str | None = None,
    pictures: bool = False,
    size: int | None = None,
) -> Plan:
    """Find the photos and write the plan into ``work``; whoever resumes reads it, and never looks again.

    Parameters
    ----------
    source: a folder of photos at any depth; a text file with a path a line; a photo; a Parquet file or a folder
        of them, with a column of photos' bytes.
    column: the Parquet column, dotted for a struct's field; by default the only one that holds bytes.

    Raises
    ------
    BatchError
        If there is no photo, or both photos and Parquet files, or no column is known to hold the bytes.
    """
    place = Path(source)
    if shard < 1:
        raise BatchError(f"expected shards of at least 1 row, got {shard}")
    if not place.exists():
        raise BatchError(f"expected a folder, a list of files or a Parquet file, got {source}, which does not exist")
    work.mkdir(parents=True, exist_ok=True)
    begun = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    paths = work / PATHS
    tables: list[Path] = []
    if place.is_dir():
        photos = _write_paths(paths, _found(place, tables), shard)
    elif place.suffix.lower() == ".parquet":
        tables, photos = [place], 0
    elif place.suffix.lower() in LISTS:
        photos = _write_paths(paths, _listed(place), shard)
    else:
        photos = _write_paths(paths, iter([os.fsencode(place)]), shard)
    if photos and tables:
        raise BatchError(f"{source}: expected photos or Parquet files, got both: name a folder of one kind")
    if not photos and not tables:
        raise BatchError(f"{source}: expected photos ({' '.join(sorted(SUFFIXES))}) or Parquet files, got none")
    if photos:
        if column is not None:
            raise BatchError(f"expected --column with Parquet files, got it with {source}")
        plan = Plan(
            "paths", (_stated(paths, photos),), "path", None, shard, str(place.resolve()), graph, begun, pictures, size
        )
    else:
        paths.unlink(missing_ok=True)
        files, columns = _of_tables(sorted(tables), column)
        plan = Plan("content", files, *columns, shard, str(place.resolve()), graph, begun, pictures, size)
    write_json(work / PLAN, dataclasses.asdict(plan))
    return plan


def read_plan(work: Path) -> Plan | None:
    """The plan of a batch that was begun, or None.

    Raises
    ------
    BatchError
        If files that it counts on have changed since.
    """
    if not (work / PLAN).exists():
        return None
    with reading("the plan of a batch", work / PLAN, BatchError):
        record = read_json(work / PLAN)
        plan = Plan(**record | {"files": tuple(tuple(file) for file in record["files"])})
    for file in plan.files:
        now = _stated(Path(file[0]), file[1]) if Path(file[0]).exists() else None
        if plan.kind == "content" and now != file:
            raise BatchError(
                f"expected {file[0]} as it was when the batch began, got a changed or missing file: put it back, or "
                "begin anew in another folder"
            )
    return plan


def _stated(path: Path, rows: int) -> tuple[str, int, int, int]:
    state = path.stat()
    return str(path.resolve()), rows, state.st_size, state.st_mtime_ns


def _found(folder: Path, tables: list[Path]) -> Iterator[bytes]:
    """Photos below a folder, folder by folder, sorted; Parquet files go to ``tables``."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files) if real not in seen else ():
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  # a million Paths would take their time
            if not name.startswith(".") and suffix in SUFFIXES:
                yield os.fsencode(os.path.join(place, name))  # noqa: PTH118
            elif not name.startswith(".") and suffix == ".parquet":
                tables.append(Path(place, name))
        seen.add(real)


def _listed(file: Path) -> Iterator[bytes]:
    """The lines of a list of paths; relative ones are relative to where the command runs."""
    with file.open("rb") as lines:
        for line in lines:
            if path := line.strip(b"\r\n"):
                yield path


def _write_paths(file: Path, paths: Iterator[bytes], shard: int) -> int:
    """Write paths as they come, a row group a shard; returns how many."""
    schema = pa.schema([("path", pa.binary())])
    count = 0
    with pq.ParquetWriter(file, schema) as writer:
        while some := list(itertools.islice(paths, shard)):
            writer.write_table(pa.table({"path": some}, schema=schema), row_group_size=shard)
            count += len(some)
    return count


def _of_tables(
    tables: Sequence[Path], column: str | None
) -> tuple[tuple[tuple[str, int, int, int], ...], tuple[str, str | None]]:
    columns: list[tuple[str, str | None]] = []
    files = []
    for table in tables:
        try:
            parquet = pq.ParquetFile(table)
        except (pa.ArrowException, OSError) as error:
            raise BatchError(f"{table}: expected a Parquet file, got {_one_line(error)}; write it again") from error
        columns.append(_columns(parquet.schema_arrow, table, column))
        files.append(_stated(table, parquet.metadata.num_rows))
        if columns[-1] != columns[0]:
            raise BatchError(f"{table}: expected the columns of {tables[0]}, {columns[0]}, got {columns[-1]}")
    if not sum(file[1] for file in files):
        raise BatchError(f"{tables[0]}: expected rows, got none")
    return tuple(files), columns[0]


def _columns(schema: pa.Schema, table: Path, wanted: str | None) -> tuple[str, str | None]:
    """The column of the photos' bytes, and that of their names."""
    kinds: dict[str, pa.DataType] = {}
    for field in schema:
        kinds[field.name] = field.type
        if pa.types.is_struct(field.type):
            kinds |= {f"{field.name}.{inner.name}": inner.type for inner in field.type}
    binary = [name for name, kind in kinds.items() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind)]
    if wanted is not None and f"{wanted}.bytes" in binary:
        wanted += ".bytes"
    chosen = binary if wanted is None else [name for name in binary if name == wanted]
    if len(chosen) != 1:
        came = f"{len(chosen)} such: {binary}" if wanted is None else f"{wanted!r}; columns of bytes: {binary}"
        raise BatchError(f"{table}: expected a column with the photos' bytes, got {came}; name one with --column")
    texts = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    home = chosen[0].rpartition(".")[0]
    names = [f"{home}.path"] if home else []
    return chosen[0], next((name for name in [*names, *NAMES] if name in texts), None)


def _column(batch: pa.RecordBatch, name: str) -> list[Any]:
    first, *inner = name.split(".") if name not in batch.schema.names else [name]
    values: list[Any] = batch.column(first).to_pylist()
    for key in inner:
        values = [None if value is None else value.get(key) for value in values]
    return values


def _at_path(number: int, path: bytes) -> Row:
    name = path.decode("utf-8", "backslashreplace")
    try:
        photo = Path(os.fsdecode(path))
        kind = photo.stat().st_mode
        if stat.S_ISREG(kind):
            return Row(number, name, photo)
        came = "a folder; name a file in it" if stat.S_ISDIR(kind) else "a pipe or a device; name a file"
    except FileNotFoundError:
        came = "no such file; check the path"
    except (OSError, ValueError) as error:
        came = f"one that cannot be read ({_one_line(error)})"
    return Row(number, name, None, f"{name}: expected a photo, got {came}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _refuse(error: OSError) -> None:
    raise BatchError(f"{error.filename}: expected a readable folder, got {error.strerror}") from error
