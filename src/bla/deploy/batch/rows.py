"""A row of results: its schema, how it is made from a photo, and how a shard of them is written."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bla.data.photo import DataError, Photo, Transform, open_photo
from bla.deploy.batch.plan import Plan, Reader, Row, Shard
from bla.deploy.engine import Engine
from bla.explanations.explanation import Explanation
from bla.explanations.render import panel
from bla.files import write_atomically

SCHEMA_VERSION = 1
BATCH = 16
"""Photos that the graph explains at once."""
STATUSES = ("ok", "unreadable", "not finite")
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("index", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("probability", pa.float32()),
        pa.field("size", pa.int32()),
        pa.field("mask", pa.binary()),
        pa.field("grid", pa.list_(pa.int32(), 2)),
        pa.field("region", pa.list_(pa.float32(), 4)),
    ]
)


def explain_rows(
    graph: Engine, rows: Sequence[Row], *, size: int | None = None, pictures: Path | None = None
) -> list[dict[str, Any]]:
    """Results for rows, in order; what cannot be explained says why. Panels go to ``pictures``."""
    read: list[Photo | str] = [_read(graph.transform, row) for row in rows]
    photos = [photo for photo in read if isinstance(photo, Photo)]
    found = iter(_explained(graph, photos, size) if photos else ())
    results = []
    for row, photo in zip(rows, read, strict=True):
        blank = dict.fromkeys(SCHEMA.names) | {"row": row.number, "path": row.name}
        if isinstance(photo, str):
            results.append(blank | {"status": "unreadable", "error": photo})
            continue
        values = next(found)
        if values is None:
            error = f"{row.name}: expected finite logits, got NaN or infinity from the classifier"
            results.append(blank | {"status": "not finite", "error": error})
            continue
        results.append(blank | {"status": "ok", "region": photo.region, **values})
        if pictures is not None and row.photo is not None:
            explanation = graph.explanations([photo], [row.name], sizes=size)[0]
            if isinstance(explanation, Explanation):
                content = io.BytesIO()
                panel(open_photo(row.photo), explanation).save(content, "PNG", compress_level=3)
                write_atomically(pictures / f"{row.number:09}.png", content.getvalue())
    return results


def _read(transform: Transform, row: Row) -> Photo | str:
    if row.photo is None:
        return row.error
    try:
        return transform.read(row.photo)
    except DataError as error:
        return str(error) if isinstance(row.photo, Path) else f"{row.name}: {error}"


def _explained(graph: Engine, photos: Sequence[Photo], size: int | None) -> list[dict[str, Any] | None]:
    outputs = graph.run(np.stack([photo.pixels for photo in photos]), sizes=size)
    logits: npt.NDArray[np.float64] = outputs.logits.astype(np.float64)
    finite = np.isfinite(logits.min(axis=1) + logits.max(axis=1) + outputs.unbounded.sum(axis=(1, 2)))
    logits = np.where(finite[:, None], logits, 0)
    best = logits.argmax(axis=1)
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = 1 / np.exp(logits).sum(axis=1)
    selected = outputs.selected
    grid = list(selected.shape[1:])
    flat = selected.reshape(len(photos), -1)
    masks, sizes = np.packbits(flat, axis=1), flat.sum(axis=1)
    return [
        {
            "index": int(index),
            "label": graph.classes[index],
            "probability": float(probability),
            "size": int(size),
            "mask": mask.tobytes(),
            "grid": grid,
        }
        if good
        else None
        for good, index, probability, size, mask in zip(finite, best, probabilities, sizes, masks, strict=True)
    ]


def explain_shard(reader: Reader, shard: Shard, graph: Engine, out: Path) -> None:
    """Explain one shard, batch by batch, and write it."""
    rows, results = reader.rows(shard), list[dict[str, Any]]()
    while batch := list(itertools.islice(rows, BATCH)):
        results += explain_rows(graph, batch, size=reader.plan.size, pictures=pictures_of(reader.plan, out))
    write_part(out, shard, results)


def unpacked(mask: bytes, grid: Sequence[int]) -> npt.NDArray[np.bool_]:
    """The selected cells (H, W) of a row's ``mask`` and ``grid``.

    >>> unpacked(bytes([0b10100000]), [2, 2]).tolist()
    [[True, False], [True, False]]
    """
    height, width = grid
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=height * width).reshape(height, width).astype(bool)


def pictures_of(plan: Plan, out: Path) -> Path | None:
    """Where the panels go, if any."""
    return out / "pictures" if plan.pictures else None


def part_name(index: int) -> str:
    """The file of a shard's results."""
    return f"part-{index:06}.parquet"


def write_part(folder: Path, shard: Shard, results: Sequence[Mapping[str, Any]]) -> None:
    """Write a shard's results: the file is there whole or not at all."""
    if [result["row"] for result in results] != list(range(shard.number, shard.number + shard.count)):
        raise RuntimeError(f"a fault of ours: shard {shard.index} has other rows than its own")
    counts = Counter(result["status"] for result in results)
    notes = {"bla": json.dumps({"schema_version": SCHEMA_VERSION, "counts": counts})}
    table = pa.Table.from_pylist(list(results), schema=SCHEMA.with_metadata(notes))
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_atomically(folder / part_name(shard.index), content.getvalue())


def counts_of(part: Path) -> dict[str, int]:
    """How many rows of each status a part holds, from its footer."""
    notes = json.loads(pq.read_schema(part).metadata[b"bla"])
    return dict(notes["counts"])
