"""A row of results: its schema, its making from a photo, and the writing of a shard of rows."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bla.deploy.batch.location import Location
from bla.deploy.batch.plan import Plan, Shard
from bla.deploy.batch.sources import Row
from bla.deploy.engine import Engine
from bla.deploy.pictures import picture
from bla.explanations.explanation import Prediction, Unexplained

SCHEMA_VERSION = 4
_KINDS = (("index", pa.int32()), ("label", pa.string()), ("probability", pa.float32()))


def _answer(prefix: str) -> list[pa.Field]:
    return [pa.field(f"{prefix}{name}", kind) for name, kind in _KINDS]


SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        *_answer(""),
        *_answer("classifier_"),
        pa.field("agrees", pa.bool_()),
        *(pa.field(name, pa.list_(pa.struct(_KINDS))) for name in ("top", "classifier_top")),
        pa.field("size", pa.int32()),
        pa.field("mask", pa.binary()),
        pa.field("grid", pa.list_(pa.int32(), 2)),
        pa.field("unbounded", pa.list_(pa.float32())),
        pa.field("region", pa.list_(pa.float32(), 4)),
        *(pa.field(name, pa.int32()) for name in ("sufficient", "decisive", "bound")),
        *_answer("kept_"),
        *_answer("removed_"),
        *(pa.field(name, pa.float32()) for name in ("probability_kept", "probability_removed")),
    ]
)


def _fields(guess: Prediction, prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}{name}": getattr(guess, name) for name, _ in _KINDS}


def explain_rows(graph: Engine, rows: Sequence[Row], plan: Plan, out: Location) -> list[dict[str, Any]]:
    """A result for each row, in order; a failed one holds the reason. Panels, if wanted, go to ``out/_pictures``."""
    names = [row.name for row in rows]
    photos = [
        Unexplained(row.name, row.error) if row.photo is None else graph.read(row.name, row.photo) for row in rows
    ]
    results = []
    explained = graph.explanations(names, photos, sizes=plan.size, fill=plan.fill)
    for row, photo, found in zip(rows, photos, explained, strict=True):
        result = dict.fromkeys(SCHEMA.names) | {"row": row.number, "path": row.name}
        if isinstance(found, Unexplained):
            status = "unreadable" if isinstance(photo, Unexplained) else "not finite"
            results.append(result | {"status": status, "error": found.error})
            continue
        cells = {"size": found.size, "mask": np.packbits(found.selected).tobytes(), "grid": found.grid}
        tops = {"top": found.top, "classifier_top": found.classifier_top or ()}
        cells |= {name: [_fields(guess) for guess in top] for name, top in tops.items()}
        cells |= {"unbounded": found.unbounded.ravel()} if plan.scores else {}
        answers = {"": found.prediction, "classifier_": found.classifier}
        if (check := found.check) is not None:
            answers |= {"kept_": check.kept, "removed_": check.removed}
            cells |= {name: getattr(check, name) for name in ("probability_kept", "probability_removed")}
        result |= {"status": "ok", "agrees": found.agrees, **cells, "region": found.region}
        result |= {} if found.sizes is None else dataclasses.asdict(found.sizes)
        for prefix, answer in answers.items():
            if answer is not None:
                result |= _fields(answer, prefix)
        results.append(result)
        if plan.pictures and row.photo is not None:
            (out / f"_pictures/{row.number:09}.png").write(picture(row.photo, found, width=480))
    return results


def unpacked(mask: bytes, grid: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The selected cells (H, W) of a row's ``mask`` and ``grid``.

    >>> unpacked(bytes([0b10100000]), [2, 2]).tolist()
    [[True, False], [True, False]]
    """
    height, width = grid
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=height * width).reshape(height, width).astype(bool)


def part_name(index: int) -> str:
    """The file of a shard's results."""
    return f"part-{index:06}.parquet"


def write_part(folder: Location, shard: Shard, results: Sequence[Mapping[str, Any]]) -> None:
    """Write a shard's results, all or nothing."""
    if [result["row"] for result in results] != list(range(shard.number, shard.number + shard.count)):
        raise RuntimeError(f"a fault of ours: shard {shard.index} has other rows than its own")
    counts = Counter(result["status"] for result in results)
    notes = {"bla": json.dumps({"schema_version": SCHEMA_VERSION, "counts": counts})}
    table = pa.Table.from_pylist(list(results), schema=SCHEMA.with_metadata(notes))
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    (folder / part_name(shard.index)).write(content.getvalue())
