"""Any number of photos to one table of explanations; an interrupted batch resumes.

Rows are numbered once and cut into shards, and each shard's results appear as one file by one rename or put: whenever
a process is killed, no row is doubled or lost. One machine or a cluster runs the same function on the same shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from bla.data.prefetching import cores, prefetch
from bla.deploy.batch.location import BatchError, Location, is_url
from bla.deploy.batch.plan import (
    BATCH_FOLDER,
    GRAPH,
    PLAN,
    SHARD,
    Plan,
    Shard,
    Task,
    added,
    make_plan,
    read_plan,
)
from bla.deploy.batch.rows import SCHEMA, explain_rows, part_name, unpacked, write_part
from bla.deploy.batch.sources import Reader
from bla.deploy.engine import Engine
from bla.files import reading, real, timestamp, typed
from bla.progress import Progress, silent

__all__ = ["SCHEMA", "BatchError", "explain_all", "unpacked"]

RECORD = "_batch.json"  # readers of folders of Parquet skip what begins with _ or .


@dataclasses.dataclass(frozen=True, slots=True)
class LastCall:
    """What the last call did: so many rows, in seconds."""

    rows: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(Task):
    """The record of a finished batch: its rows, how many of each status, and parts; and when it was made."""

    schema_version: Literal[1] = 1
    rows: int
    statuses: dict[str, int]
    parts: int
    begun: str
    ended: str = dataclasses.field(default_factory=timestamp)
    last_call: LastCall


def explain_all(
    source: str | Path,
    out: str | Path,
    graph: str | Path | Engine,
    *,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    shard: int = SHARD,
    column: str | None = None,
    pictures: bool = False,
    scores: bool = False,
    size: int | None = None,
    fill: str | None = None,
    report: Progress = silent,
) -> dict[str, Any]:
    """Explain every photo of a source into ``out/part-*.parquet``. If interrupted, call it again: it resumes.

    Parameters
    ----------
    source: a folder, a text file with a path or URL a line, a photo, a Parquet file or a folder of them; or the URL of
        photos, such as s3://bucket/folder, which fsspec opens. The batch lists its photos when it begins; a call after
        its end explains those that have been added since, though not rows of Parquet files.
    out: a folder, or the URL of one in an object store, which has no locks: run one batch at a time into it.
    graph: the exported graph, as ``bla export`` writes it, or an engine of one thread that holds it.
    engine: this machine's threads, or Ray's cluster, where every node sees source and ``out`` under the same path.
    workers: threads, or actors of a core each, which share the cluster's GPUs; by default one for each core.
    shard: the number of photos in one file of results; after a kill, an unfinished shard is explained again.
    column: the Parquet column with the photos' bytes.
    pictures: write ``out/_pictures/ROW.png`` for each photo.
    scores: keep every cell's score, the column ``unbounded``.
    size: cells to select; by default the explainer chooses, photo by photo.
    fill: check each explanation under this fill, one of :data:`bla.data.masking.FILLS`, in two more passes.

    Returns
    -------
    The record, which ``out/_batch.json`` holds once all rows are done: rows, how many of each status, parts.

    Raises
    ------
    BatchError
        If there is nothing to explain, or ``out`` holds other work.
    EngineError
        If the explainer cannot select ``size`` cells.
    """
    results = Location.of(out)
    if results.files.isfile(results.path):
        raise BatchError(f"expected a folder for the results, got the file {out}: choose another name")
    if workers is not None and workers < 1:
        raise BatchError(f"expected at least 1 worker, got {workers}")
    opened = graph if isinstance(graph, Engine) else Engine(graph, threads=1)
    if opened.card.several_labels:
        raise BatchError(
            "expected an explainer of one class a photo, as a row of the results has, got one of several labels a "
            "photo: use bla explain"
        )
    if size is not None:
        opened.card.checked_size(size)
    with opened.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    place = str(source if is_url(source) else real(source))
    task = Task(source=place, graph=digest, pictures=pictures, scores=scores, size=size, fill=fill)
    work = results / BATCH_FOLDER
    busy = BatchError(f"expected a folder that no other batch is writing, got {out}: wait for it")
    with results.sole_writer(busy):
        plan, record = _begun(task, results), _finished(task, results)
        if plan is None and record is not None:
            parts = [results / part_name(index) for index in range(record["parts"])]
            if (plan := added(source, task, work, parts, shard=shard)) is None:
                report(f"{out} already holds this batch, begun {record['begun']}, and nothing was added since", 0, 0)
                return record
            report(f"{plan.rows:,} photos were added to the {record['rows']:,} of {record['begun']}", 0, 0)
        plan = plan or make_plan(source, task, work, shard=shard, column=column)
        done = results.names()
        for unfinished in (name for name in done if name.startswith(".part-")):  # its writer was killed
            (results / unfinished).remove()
        todo = [one for one in plan.shards() if part_name(one.index) not in done]
        left = sum(one.count for one in todo)
        ready = plan.rows - left
        if ready:
            report(f"{ready:,} of {plan.rows:,} photos are done already: resuming", 0, 0)
        title, start = f"explaining {plan.rows:,} photos", time.monotonic()
        report(title, ready, plan.rows)
        if engine == "local" or not todo:
            explained = run_locally(plan, todo, opened, out=results, workers=workers or cores())
        else:
            from bla.deploy.batch.cluster import run_on_ray

            (work / GRAPH).write(opened.path.read_bytes())
            explained = run_on_ray(plan, todo, work / GRAPH, out=results, workers=workers, report=report)
        for rows in explained:
            ready += rows
            report(title, ready, plan.rows)
        return _concluded(plan, results, LastCall(left, round(time.monotonic() - start, 2)))


def run_locally(plan: Plan, shards: Sequence[Shard], graph: Engine, *, out: Location, workers: int) -> Iterator[int]:
    """Explain shards in order; every thread decodes and runs the graph, on its own core. Yields the rows done."""
    reader = Reader(plan)
    batches = ((shard, rows) for shard in shards for rows in reader.batches(shard))

    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(workers) as pool:
        explained = prefetch(
            pool, lambda item: (item[0], explain_rows(graph, item[1], plan, out)), batches, ahead=2 * workers
        )
        for shard, some in explained:
            results += some
            if len(results) == shard.count:
                write_part(out, shard, results)
                results = []
            yield len(some)


def _finished(task: Task, out: Location) -> dict[str, Any] | None:
    """The record of this batch, if it is done."""
    if not (out / RECORD).exists():
        return None
    with reading("the record of a batch", out / RECORD, BatchError):
        record = typed((out / RECORD).read(), Finished)
    _check_same(task, record, out)
    return dataclasses.asdict(record)


def _begun(task: Task, out: Location) -> Plan | None:
    """The plan of this batch, if it has begun."""
    plan = read_plan(out / BATCH_FOLDER)
    if plan is not None:
        _check_same(task, plan, out)
    elif RECORD not in (names := out.names()) and any(name.startswith("part-") for name in names):
        raise BatchError(f"expected a new folder, or one of this batch, got {out} with parts of other work")
    return plan


def _check_same(task: Task, kept: Task, out: Location) -> None:
    for name, ours in dataclasses.asdict(task).items():
        if ours != (theirs := getattr(kept, name)):
            raise BatchError(
                f"expected a new folder, or one of this batch, got {out} of a batch with {name} {theirs}, not "
                f"{ours}: choose another folder"
            )


def _concluded(plan: Plan, out: Location, last_call: LastCall) -> dict[str, Any]:
    """Add up the statuses that the footers of all parts hold, and write the record."""
    parts = [out / part_name(index) for index in range(plan.after[1] + sum(1 for _ in plan.shards()))]
    with ThreadPoolExecutor(cores()) as pool:
        schemas = pool.map(lambda part: pq.read_schema(part.path, filesystem=part.files), parts)
        counts = sum((Counter(json.loads(one.metadata[b"bla"])["counts"]) for one in schemas), Counter[str]())
    task: dict[str, Any] = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Task)}
    made: dict[str, Any] = {"rows": plan.after[0] + plan.rows, "statuses": dict(counts), "parts": len(parts)}
    record = dataclasses.asdict(Finished(**task, **made, begun=plan.begun, last_call=last_call))
    (out / RECORD).write(json.dumps(record, indent=1).encode())
    (out / BATCH_FOLDER / PLAN).remove()  # without it the folder is none of a batch that has begun
    (out / BATCH_FOLDER).clear()
    return record
