"""`bla batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bla import needs_extra
from bla.cli.sharing import DONE, DONE_BUT, Json


def batch(
    source: Path,
    out: Path,
    /,
    *,
    run: str = "tf_efficientnet_lite0",
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    shard: int = 4096,
    column: str | None = None,
    size: int | None = None,
    pictures: Annotated[bool, Parameter(negative=())] = False,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Explain any number of photos into Parquet files. Interrupted, run it again: it goes on.

    Each photo becomes a row, also one that cannot be read, which says why. docs/how-to/batch.md has the columns.

    Parameters
    ----------
    source
        A folder of photos, a text file with a path a line, a Parquet file with photos' bytes, or a folder of such.
    out
        The folder to write part-*.parquet and, at the end, batch.json to.
    run
        A run folder, a shipped explainer's name, or an exported graph, FILE.onnx.
    engine
        local, this machine's cores; or ray, the cluster that RAY_ADDRESS names, else this machine.
    workers
        Threads, or actors. By default as many as there are cores.
    shard
        Photos whose results are written together; after a kill at most so many are done again.
    column
        The Parquet column with the photos' bytes; by default the only one of bytes.
    size
        Select exactly so many cells. By default the explainer chooses, photo by photo.
    pictures
        Write a panel for each photo, OUT/pictures/ROW.png.
    """
    with needs_extra("batch,export"):
        import onnxruntime  # noqa: F401  the engine needs it

        from bla.deploy.batch import explain_all
    from bla.deploy.engine import open_engine
    from bla.progress import shown_progress

    with shown_progress() as report:
        graph = open_engine(run).path
        record = explain_all(
            source,
            out,
            graph,
            engine=engine,
            workers=workers,
            shard=shard,
            column=column,
            pictures=pictures,
            size=size,
            report=report,
        )
    failed = record["rows"] - record["statuses"].get("ok", 0)
    if json_:
        print(json.dumps(record))
    else:
        done, seconds = record["last_call"]["rows"], record["last_call"]["seconds"]
        rate = f", {done / seconds:,.1f} photos a second" if done and seconds else ""
        print(f"{record['rows']:,} rows in {record['parts']} files in {out}{rate}.")
        if failed:
            print(f"{failed:,} photos could not be explained: their rows say why (status, error).")
    return DONE_BUT if failed else DONE
