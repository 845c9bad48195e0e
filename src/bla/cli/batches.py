"""`bla batch`."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Literal

from bla.cli.sharing import DONE, DONE_BUT, Check, Fill, Flag, Json, RunOrGraph, TrustCode, require, say, within


def batch(
    source: str,
    out: str,
    /,
    *,
    run: RunOrGraph = "tf_efficientnet_lite0",
    engine: Literal["local", "ray"] = "local",
    workers: Annotated[int | None, within(1, 1024)] = None,
    shard: Annotated[int, within(1, 10_000_000)] = 4096,
    column: str | None = None,
    size: int | None = None,
    check: Check = False,
    fill: Fill = "coarse",
    pictures: Flag = False,
    scores: Flag = False,
    trust_code: TrustCode = None,
    json_: Json = False,
) -> int:
    """Explain any number of photos into Parquet files.

    Each photo becomes a row; if it cannot be read, the row says why. docs/how-to/batch.md lists the columns. If
    interrupted, rerun: it resumes; if photos were added, rerun: it explains these.

    Example: `bla batch photos out --run run --workers 4`

    :param source: A folder of photos or its URL (s3://...), a text file of paths, or Parquet with encoded photos.
    :param out: The folder or URL for part-*.parquet and, at the end, _batch.json. `pandas.read_parquet(OUT)` reads it.
    :param engine: local: this machine's cores; ray: the cluster at RAY_ADDRESS, else this machine.
    :param workers: Threads, or actors. By default one per core.
    :param shard: Photos per Parquet file; at most this many are repeated after an interruption.
    :param column: The Parquet column of encoded photos. By default the only binary one.
    :param size: Select exactly this many cells. By default the explainer chooses for each photo.
    :param pictures: Write pictures: OUT/_pictures/ROW.png.
    :param scores: Add a column of all cells' scores: unbounded.
    """
    require("batch", "export", *(["ray"] if engine == "ray" else []))
    from bla.deploy.batch import BatchError, explain_all
    from bla.deploy.engine import open_engine
    from bla.progress import shown_progress

    if out.startswith("memory:"):
        raise BatchError(f"expected a place that outlives the command, got {out}: choose a folder or an object store")
    with shown_progress() as report:
        explained = partial(explain_all, engine=engine, workers=workers, shard=shard, column=column)
        opened = open_engine(run, model=trust_code, threads=1, report=report)
        computed = f"; computed on the {opened.device}" if engine == "local" else ""
        report(f"{opened.card.transform.in_words()}{computed}", 0, 0)
        asked = fill if check else None
        record = explained(source, out, opened, pictures=pictures, scores=scores, size=size, fill=asked, report=report)
    failed = record["rows"] - record["statuses"].get("ok", 0)
    if json_:
        print(json.dumps(record))
    else:
        done, seconds = record["last_call"]["rows"], record["last_call"]["seconds"]
        rate = f", {done / seconds:,.1f} photos per second" if done and seconds else ""
        say(f"{record['rows']:,} rows in {record['parts']} files in {out}{rate}.")
        if failed:
            say(f"{failed:,} photos could not be explained: the columns status and error say why.")
    return DONE_BUT if failed else DONE
