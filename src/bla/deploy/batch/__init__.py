"""Any number of photos to one table of explanations, going on where an earlier call stopped.

Rows are numbered once, cut into shards, and each shard's results appear as one file by one rename: whatever is
killed when, no row is doubled or lost. One machine or a cluster runs the same function on the same shards.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from bla.data.prefetching import cores, prefetch
from bla.deploy.batch.plan import BATCH_FOLDER, GRAPH, SHARD, BatchError, Plan, Reader, Row, Shard, make_plan, read_plan
from bla.deploy.batch.rows import BATCH, SCHEMA, counts_of, explain_rows, part_name, pictures_of, unpacked, write_part
from bla.deploy.engine import Engine
from bla.files import read_json, reading, sole_writer, write_atomically, write_json
from bla.progress import Progress

__all__ = ["SCHEMA", "BatchError", "explain_all", "unpacked"]

RECORD = "batch.json"


def explain_all(
    source: str | Path,
    out: str | Path,
    graph: str | Path,
    *,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    shard: int = SHARD,
    column: str | None = None,
    pictures: bool = False,
    size: int | None = None,
    report: Progress = lambda title, done, total: None,
) -> dict[str, Any]:
    """Explain every photo of a source into ``out/part-*.parquet``; the same call again goes on where it stopped.

    Parameters
    ----------
    source: a folder, a text file with a path a line, a photo, a Parquet file or a folder of them. What is in it is
        noted when the batch begins: photos that come later belong to another batch.
    graph: the exported graph, as ``bla export`` writes it.
    engine: this machine's threads, or Ray's cluster, where every node sees source and ``out`` under the same path.
    workers: threads, or actors of a core each; by default as many as there are cores.
    shard: photos whose results are written, and after a kill done again, together.
    column: of Parquet: the photos' bytes.
    pictures: write ``out/pictures/ROW.png``, the panel, for each photo.
    size: cells to select; by default the explainer chooses, photo by photo.

    Returns
    -------
    The record in ``out/batch.json``, which is there when all is done: rows, how many of each status, parts.

    Raises
    ------
    BatchError
        If there is nothing to explain, or ``out`` holds other work.
    """
    out, graph = Path(out), Path(graph)
    if out.is_file():
        raise BatchError(f"expected a folder for the results, got the file {out}: choose another name")
    if workers is not None and workers < 1:
        raise BatchError(f"expected at least 1 worker, got {workers}")
    opened = Engine(graph, threads=1)
    if opened.card.several_labels:
        raise BatchError(
            "expected an explainer whose photos have one class each, as a row of the results has, got one of several "
            "labels a photo: bla explain tells them all"
        )
    if size is not None and not (opened.card.sizes and 1 <= size <= opened.card.cells):
        raise BatchError(
            f"expected a size from 1 to {opened.card.cells} for an explainer whose size can be set, got {size}"
        )
    with graph.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    busy = BatchError(f"expected a folder that no other batch is writing, got {out}: wait for it")
    with sole_writer(out, busy):
        plan = _planned(source, out, digest, shard=shard, column=column, pictures=pictures, size=size)
        if isinstance(plan, dict):
            report(f"{out} already holds this batch, begun {plan['begun']}: photos that came later are not in it", 0, 0)
            return plan
        for stale in out.glob(".part-*"):  # whose writer was killed
            stale.unlink()
        done = {part.name for part in out.glob("part-*")}
        todo = (one for one in plan.shards() if part_name(one.index) not in done)
        ready = sum(one.count for one in plan.shards() if part_name(one.index) in done)
        if ready:
            report(f"{ready:,} of {plan.rows:,} photos are done: going on", 0, 0)
        state = {"ready": ready}
        title = f"explaining {plan.rows:,} photos"
        report(title, ready, plan.rows)

        def finished(rows: int) -> None:
            state["ready"] += rows
            report(title, state["ready"], plan.rows)

        start = time.monotonic()
        if ready < plan.rows and engine == "local":
            run_locally(plan, todo, opened, out=out, workers=workers or cores(), finished=finished)
        elif ready < plan.rows:
            from bla.deploy.batch.cluster import run_on_ray

            shared = out / BATCH_FOLDER / GRAPH
            write_atomically(shared, graph.read_bytes())
            run_on_ray(plan, list(todo), shared, out=out, workers=workers, finished=finished)
        return _concluded(plan, out, time.monotonic() - start, plan.rows - ready)


def run_locally(
    plan: Plan,
    shards: Iterator[Shard],
    graph: Engine,
    *,
    out: Path,
    workers: int,
    finished: Callable[[int], None],
) -> None:
    """Explain shards in order; every thread decodes and runs the graph, on its own core."""
    reader = Reader(plan)

    def batches() -> Iterator[tuple[Shard, list[Row]]]:
        for shard in shards:
            rows = reader.rows(shard)
            while batch := list(itertools.islice(rows, BATCH)):
                yield shard, batch

    def explained(item: tuple[Shard, list[Row]]) -> tuple[Shard, list[dict[str, Any]]]:
        shard, rows = item
        return shard, explain_rows(graph, rows, size=plan.size, pictures=pictures_of(plan, out))

    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(workers) as pool:
        for shard, some in prefetch(pool, explained, batches(), ahead=2 * workers):
            results += some
            if len(results) == shard.count:
                write_part(out, shard, results)
                results = []
            finished(len(some))


def _planned(
    source: str | Path, out: Path, graph: str, *, shard: int, column: str | None, pictures: bool, size: int | None
) -> Plan | dict[str, Any]:
    """The plan of this batch, new or begun; or its record, if it is done."""
    work = out / BATCH_FOLDER
    record = out / RECORD
    came: Mapping[str, Any] | None = None
    if record.exists():
        with reading("the record of a batch", record, BatchError):
            came = read_json(record)
            kept = came["source"], came["graph"], came["pictures"], came["size"]
    elif (plan := read_plan(work)) is not None:
        kept = plan.source, plan.graph, plan.pictures, plan.size
    else:
        if any(out.glob("part-*")):
            raise BatchError(f"expected a new folder, or one of this batch, got {out} with parts of other work")
        return make_plan(source, work, graph=graph, shard=shard, column=column, pictures=pictures, size=size)
    wanted = str(Path(source).resolve()), graph, pictures, size
    for what, ours, theirs in zip(("source", "graph", "pictures", "size"), wanted, kept, strict=True):
        if ours != theirs:
            raise BatchError(
                f"expected a new folder, or one of this batch, got {out} of a batch with {what} {theirs}, not {ours}: "
                "choose another folder"
            )
    if came is not None:
        shutil.rmtree(work, ignore_errors=True)  # a kill may have left it
        return dict(came)
    assert plan is not None
    return plan


def _concluded(plan: Plan, out: Path, seconds: float, explained: int) -> dict[str, Any]:
    """Count what is there, part by part, and write the record."""
    counts: Counter[str] = Counter()
    parts = 0
    for shard in plan.shards():
        found = counts_of(out / part_name(shard.index))
        if sum(found.values()) != shard.count:
            raise RuntimeError(f"a fault of ours: {part_name(shard.index)} has {found}, not {shard.count} rows")
        counts.update(found)
        parts += 1
    record = {
        "schema_version": 1,
        "source": plan.source,
        "graph": plan.graph,
        "pictures": plan.pictures,
        "size": plan.size,
        "rows": plan.rows,
        "statuses": dict(counts),
        "parts": parts,
        "begun": plan.begun,
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "last_call": {"rows": explained, "seconds": round(seconds, 2)},
    }
    write_json(out / RECORD, record, indent=1)
    shutil.rmtree(out / BATCH_FOLDER)
    return record
