"""Batches: every row once, whatever is killed when and whatever the input; the same rows from every engine."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from bla.cli import run_command
from bla.deploy.batch import SCHEMA, BatchError, explain_all, sources, unpacked
from bla.deploy.batch import cluster as cluster_of_batch
from bla.deploy.batch import plan as planning
from bla.deploy.batch.location import Location
from bla.deploy.batch.plan import Plan, Task, make_plan
from bla.deploy.batch.sources import Reader, Row
from bla.deploy.engine import Engine, EngineError
from bla.explanations.explanation import Explanation
from small_exports import Pair


def photo(seed: int) -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 120, (20, 30, 3), np.uint8)
    pixels[5:15, 5:20, seed % 3] += 130
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def graph(plain: Pair) -> Path:
    return plain[1].path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """23 photos in folders."""
    for index in range(23):
        path = tmp_path / "photos" / f"folder{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(index))
    return tmp_path / "photos"


def rows_of(out: Path | str) -> list[dict[str, Any]]:
    """As any reader of Parquet folders sees it."""
    place = Location.of(out)
    parts = [(place / name).path for name in sorted(place.names()) if name.startswith("part-")]
    return pq.read_table(parts, schema=SCHEMA, filesystem=place.files).to_pylist()


@pytest.fixture
def bucket() -> Iterator[str]:
    """The URL of an object store that is emptied at the end."""
    fsspec.filesystem("memory").touch("/bucket/photos.txt")
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


# --- the plan


def planned(source: Path, work: Path, **options: Any) -> Plan:
    return make_plan(source, Task(source=str(source), graph="g"), Location.of(work), **options)


def tables(folder: Path, groups: Sequence[Sequence[int]]) -> Path:
    """Parquet files with so many rows in each row group; row n's photo is the number n as text."""
    folder.mkdir()
    number = 0
    for index, sizes in enumerate(groups):
        schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
        with pq.ParquetWriter(folder / f"{index}.parquet", schema) as writer:
            for size in sizes:
                values = [{"bytes": b"%d" % n, "path": f"{n}.jpg"} for n in range(number, number + size)]
                writer.write_table(pa.table({"image": values}, schema=schema), row_group_size=max(1, size))
                number += size
    return folder


@pytest.mark.parametrize("shard", [1, 3, 7, 1000])
def test_every_row_is_read_once_in_any_order(shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "READ", 4)
    source = tables(tmp_path / "tables", [(5, 1, 13), (), (0, 2), (9,)])
    plan = planned(source, tmp_path / "work", shard=shard)
    assert planning.read_plan(Location.of(tmp_path / "work")) == plan
    assert plan.rows == 30
    shards = list(plan.shards())
    assert sum(one.count for one in shards) == 30
    assert max(one.count for one in shards) <= shard
    expected = [(n, f"{n}.jpg", b"%d" % n) for n in range(30)]
    forwards = Reader(plan)
    assert [(row.number, row.name, row.photo) for one in shards for row in forwards.rows(one)] == expected
    anyhow = Reader(plan)
    order = np.random.RandomState(0).permutation(len(shards))
    found = [(row.number, row.name, row.photo) for index in order for row in anyhow.rows(shards[index])]
    assert sorted(found) == expected


def test_paths_of_any_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    names = [
        b"plain.png",
        b"new\nline.png",
        b"caf\xe9.png",
        "日本.png".encode(),
        b"%s {x} 'q'.PNG",
        b"a" * 200 + b".png",
    ]
    for name in names:
        path = os.path.join(os.fsencode(folder), name)  # noqa: PTH118
        folder.mkdir(exist_ok=True)
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(b"x")
    for odd in (".hidden.png", "notes.txt"):
        (folder / odd).write_bytes(b"x")
    (folder / "again").symlink_to(folder)
    plan = planned(folder, tmp_path / "work", shard=4)
    rows = [row for shard in plan.shards() for row in Reader(plan).rows(shard)]
    assert {os.fsencode(row.photo.name) for row in rows if isinstance(row.photo, Path)} == set(names)
    assert len(rows) == len(names)
    assert all(row.name.encode() for row in rows), "every name can be written as UTF-8"


def test_lists_name_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo(0))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    names = ["a.png", "missing.png", "pipe.png", "loop.png", "", "a.png", "..", "/dev/zero", "nul\0.png", "x" * 5000]
    (tmp_path / "list.txt").write_bytes(b"\r\n".join(os.fsencode(tmp_path / name if name else "") for name in names))
    plan = planned(tmp_path / "list.txt", tmp_path / "work")
    (shard,) = plan.shards()
    rows = list(Reader(plan).rows(shard))
    assert [row.photo is not None for row in rows] == [True, False, False, False, True, False, False, False, False]
    errors = [row.error for row in rows if row.photo is None]
    assert all("expected a photo, got" in error for error in errors)
    assert "no such file" in errors[0]
    assert "a pipe or a device" in errors[1]
    assert "a folder" in errors[3]


def test_columns_are_found_or_asked_for(tmp_path: Path) -> None:
    def plan_of(columns: dict[str, Any], **options: Any) -> Plan:
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        return planned(tmp_path / "t.parquet", tmp_path / "work", **options)

    assert plan_of({"jpg": [b"x"], "key": ["a"], "label": [1]}).content == "jpg"
    assert plan_of({"jpg": [b"x"], "key": ["a"], "label": [1]}).name == "key"
    assert plan_of({"image": [{"bytes": b"x", "path": "p"}]}).name == "image.path"
    assert plan_of({"jpg": [b"x"], "mask": [b"y"]}, column="mask").content == "mask"
    assert plan_of({"image": [{"bytes": b"x", "path": "p"}]}, column="image").content == "image.bytes"
    with pytest.raises(BatchError, match=r"got 2 such: \['jpg', 'mask'\]; name one with --column"):
        plan_of({"jpg": [b"x"], "mask": [b"y"]})
    with pytest.raises(BatchError, match="got 0 such"):
        plan_of({"label": [1]})
    with pytest.raises(BatchError, match="got 'label'; columns of bytes"):
        plan_of({"label": [1], "jpg": [b"x"]}, column="label")


def test_a_damaged_table_loses_no_other_row(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    pq.write_table(
        pa.table(
            {
                "jpg": [rng.randint(0, 4, 2000).astype(np.uint8).tobytes() for _ in range(400)],
                "key": [f"k{n}" for n in range(400)],
            }
        ),
        tmp_path / "t.parquet",
        row_group_size=100,
        compression="zstd",
        use_dictionary=False,
    )
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "t.parquet").row_group(1).column(0).data_page_offset
    content[start + 1000 : start + 9000] = bytes(8000)
    (tmp_path / "t.parquet").write_bytes(content)
    plan = planned(tmp_path / "t.parquet", tmp_path / "work", shard=50)
    reader = Reader(plan)
    rows = [row for shard in plan.shards() for row in reader.rows(shard)]
    assert [row.number for row in rows] == list(range(400))
    broken = {row.number for row in rows if row.photo is None}
    assert broken
    assert broken <= set(range(100, 200))
    assert all("got a damaged file" in rows[number].error for number in broken)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "which does not exist"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "expected photos .* or Parquet files, got none"),
        (lambda p: (p / "x.parquet").write_bytes(b"PAR1") and p / "x.parquet", "expected a Parquet file, got"),
        (lambda p: pq.write_table(pa.table({"b": pa.array([], "binary")}), p / "e.parquet") or p / "e.parquet", "rows"),
        (lambda p: (p / "l.txt").write_bytes(b"\n\n") and p / "l.txt", "got none"),
    ],
)  # fmt: skip
def test_sources_that_hold_nothing(make: Any, message: str, tmp_path: Path, graph: Path) -> None:
    with pytest.raises(BatchError, match=message):
        explain_all(make(tmp_path), tmp_path / "out", graph)


# --- results


def test_rows_say_what_the_graph_says(photos: Path, graph: Path, tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    record = explain_all(photos, tmp_path / "out", graph, shard=5, report=lambda *call: progress.append(call))
    rows = rows_of(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(23))
    assert {row["path"] for row in rows} == {str(path) for path in photos.rglob("*.png")}
    assert record["rows"] == 23
    assert record["statuses"] == {"ok": 23}
    assert record["parts"] == 5
    assert progress[0][1:] == (0, 23)
    assert progress[-1][1:] == (23, 23)
    engine = Engine(graph, threads=1)
    for row in rows:
        outputs = engine.run(engine.transform.read(row["path"]).pixels[None])
        probabilities = np.exp(outputs.logits[0]) / np.exp(outputs.logits[0]).sum()
        assert row["index"] == probabilities.argmax()
        assert row["label"] == engine.classes[row["index"]]
        assert row["probability"] == pytest.approx(probabilities.max(), rel=1e-4)
        whole = np.exp(outputs.classifier_logits[0]) / np.exp(outputs.classifier_logits[0]).sum()
        assert row["classifier_index"] == whole.argmax()
        assert row["classifier_label"] == engine.classes[row["classifier_index"]]
        assert row["classifier_probability"] == pytest.approx(whole.max(), rel=1e-4)
        assert row["agrees"] == (row["index"] == row["classifier_index"])
        assert [row[name] for name in ("sufficient", "decisive", "bound")] == outputs.sizes[0].tolist()
        assert [guess["index"] for guess in row["top"]] == np.argsort(-probabilities, kind="stable")[:5].tolist()
        assert row["top"][0] == {name: row[name] for name in ("index", "label", "probability")}
        assert [guess["index"] for guess in row["classifier_top"]] == np.argsort(-whole, kind="stable")[:5].tolist()
        assert row["unbounded"] is None
        assert row["kept_index"] is row["probability_removed"] is None
        selected = outputs.selected[0]
        assert (unpacked(row["mask"], row["grid"]) == selected).all()
        assert row["size"] == selected.sum()
        assert row["region"] == [0, 0, 30, 20]
        assert (row["status"], row["error"]) == ("ok", None)


def test_a_folder_a_list_and_a_table_give_the_same_rows(photos: Path, graph: Path, tmp_path: Path, bucket: str) -> None:
    explain_all(photos, tmp_path / "folder", Engine(graph, threads=1))
    expected = rows_of(tmp_path / "folder")
    paths = [row["path"] for row in expected]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    pq.write_table(pa.table({"path": paths, "x": [Path(path).read_bytes() for path in paths]}), tmp_path / "t.parquet")
    for name in ("list.txt", "t.parquet"):
        explain_all(tmp_path / name, f"{bucket}/{name}", graph, shard=4, workers=3)
        assert rows_of(f"{bucket}/{name}") == expected


def test_photos_and_results_in_an_object_store(
    photos: Path, graph: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(photos), "/bucket/", recursive=True)
    store.pipe("/bucket/notes.txt", b"")
    explain_all(photos, tmp_path / "folder", graph)
    expected = [row | {"path": Path(row["path"]).relative_to(photos)} for row in rows_of(tmp_path / "folder")]
    for source, out in ((f"{bucket}/photos", f"{bucket}/out"), (photos.as_uri(), (tmp_path / "out").as_uri())):
        record = explain_all(source, out, graph, shard=5, workers=2)
        found = rows_of(out)
        assert found[0]["path"].startswith(source.partition("://")[0])
        assert [row | {"path": Path(row["path"].rpartition("photos/")[2])} for row in found] == expected
        assert Location.of(out).names() - {".lock"} == {
            "_batch.json",
            *(f"part-00000{index}.parquet" for index in range(5)),
        }
        assert explain_all(source, out, graph) == record
        with pytest.raises(BatchError, match="of a batch with scores False, not True"):
            explain_all(source, out, graph, scores=True)
    (tmp_path / "list.txt").write_text(f"{bucket}/photos/folder0/0.png\n{bucket}/missing.png\nunknown://y.png")
    explain_all(tmp_path / "list.txt", f"{bucket}/listed", graph, pictures=True)
    assert [row["status"] for row in rows_of(f"{bucket}/listed")] == ["ok", "unreadable", "unreadable"]
    assert store.cat("/bucket/listed/_pictures/000000000.png").startswith(b"\x89PNG")
    for source, came in (("memory://nowhere", "FileNotFoundError"), ("unknown://bucket", "Protocol not known")):
        with pytest.raises(BatchError, match=came):
            explain_all(source, tmp_path / "none", graph)
    together = threading.Barrier(8, timeout=60)  # passes only if eight photos are fetched at once
    fetch = Row.fetched
    monkeypatch.setattr(Row, "fetched", lambda row: (together.wait(), fetch(row))[1])
    explain_all(f"{bucket}/photos/folder0", f"{bucket}/eight", graph, workers=1)
    with pytest.raises(BatchError, match="unknown://out: expected a URL that fsspec can open"):
        explain_all(photos, "unknown://out", graph)
    store.pipe("/bucket/list.txt", b"a.jpg")
    with pytest.raises(BatchError, match=r"a folder or a photo at a URL, got .*list.txt: lists"):
        explain_all(f"{bucket}/list.txt", tmp_path / "none", graph)


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("", "a folder or a URL such as"),
        ("s3:/bucket", "a URL such as"),
        ("file/x", "can be written, .*: Not a directory"),
    ],
)
def test_results_need_a_place(out: str, reason: str, photos: Path, graph: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BatchError, match=reason):
        explain_all(photos, f"{tmp_path}/{out}" if "file" in out else out, graph)


def test_a_check_on_request_is_the_engines(photos: Path, graph: Path, tmp_path: Path) -> None:
    record = explain_all(photos / "folder0", tmp_path / "out", graph, fill="grey")
    assert record["fill"] == "grey"
    rows = rows_of(tmp_path / "out")
    found = Engine(graph, threads=1).explain_each([row["path"] for row in rows], check=True, fill="grey")
    for row, why in zip(rows, found, strict=True):
        assert isinstance(why, Explanation)
        assert why.check is not None
        for name, guess in (("kept", why.check.kept), ("removed", why.check.removed)):
            assert (row[f"{name}_index"], row[f"{name}_label"]) == (guess.index, guess.label)
            assert row[f"{name}_probability"] == pytest.approx(guess.probability, rel=1e-4)
            assert row[f"probability_{name}"] == pytest.approx(getattr(why.check, f"probability_{name}"), rel=1e-4)
    with pytest.raises(BatchError, match="of a batch with fill grey, not None"):
        explain_all(photos / "folder0", tmp_path / "out", graph)


def test_pictures_scores_and_sizes_on_request(photos: Path, graph: Path, tmp_path: Path) -> None:
    explain_all(photos / "folder0", tmp_path / "out", graph, size=5, pictures=True, scores=True)
    import pandas

    table = pandas.read_parquet(tmp_path / "out")  # the folder, whatever else it holds
    assert list(table.columns) == SCHEMA.names
    assert table.row.tolist() == list(range(8))
    rows = rows_of(tmp_path / "out")
    assert {row["size"] for row in rows} == {5}
    for row in rows:
        best = np.argsort(-np.array(row["unbounded"]), kind="stable")[:5]
        assert set(np.flatnonzero(unpacked(row["mask"], row["grid"]))) == set(best)
    for row in rows:
        with Image.open(tmp_path / "out" / "_pictures" / f"{row['row']:09}.png") as picture:
            assert picture.height >= 160
    with pytest.raises(EngineError, match="expected a size from 1 to 20"):
        explain_all(photos, tmp_path / "new", graph, size=21)


def test_200_kinds_of_bad_input_become_rows(bad_photos: dict[str, bytes], graph: Path, tmp_path: Path) -> None:
    assert len(bad_photos) >= 200
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, content in bad_photos.items():
        (folder / f"{name}.jpg").write_bytes(content)
    pq.write_table(pa.table({"path": list(bad_photos), "x": list(bad_photos.values())}), tmp_path / "t.parquet")
    record = explain_all(folder, tmp_path / "a", graph)
    assert record["rows"] == len(bad_photos)
    assert record["statuses"]["unreadable"] > 100
    from_files = {Path(row["path"]).stem: row for row in rows_of(tmp_path / "a")}
    explain_all(tmp_path / "t.parquet", tmp_path / "b", graph)
    from_bytes = {row["path"]: row for row in rows_of(tmp_path / "b")}
    assert set(from_files) == set(from_bytes) == set(bad_photos)
    for name in bad_photos:
        a, b = from_files[name], from_bytes[name]
        assert {**a, "row": 0, "path": "", "error": ""} == {**b, "row": 0, "path": "", "error": ""}
        for row in (a, b):
            assert row["status"] in ("ok", "unreadable")
            assert (row["error"] is None) == (row["status"] == "ok") == (row["mask"] is not None)
            assert name in (row["error"] or name)
            assert "Traceback" not in (row["error"] or "")


def test_nulls_and_other_types_in_a_table(graph: Path, tmp_path: Path) -> None:
    values = [{"bytes": photo(0), "path": None}, {"bytes": None, "path": "b"}, None, {"bytes": b"", "path": "\x00"}]
    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "t.parquet")
    assert explain_all(tmp_path / "t.parquet", tmp_path / "out", graph)["statuses"] == {"ok": 1, "unreadable": 3}
    rows = rows_of(tmp_path / "out")
    assert rows[0]["path"].endswith("t.parquet#0")
    assert rows[1]["error"] == "b: expected the bytes of a photo, got null"


# --- interruptions


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 photos in a table, broken ones among them."""
    kinds = [photo(index) for index in range(7)] + [b"broken"]
    names = [f"{index}.png" for index in range(240)]
    table = pa.table({"path": names, "jpg": [kinds[index % 8] for index in range(240)]})
    path = tmp_path_factory.mktemp("many") / "many.parquet"
    pq.write_table(table, path, row_group_size=70)
    return path


@pytest.fixture(scope="module")
def uninterrupted(many: Path, graph: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("uninterrupted")
    explain_all(many, out, graph)
    return rows_of(out)


PROGRAM = """
import os, sys
from bla.deploy.batch import explain_all
import bla.deploy.engine
for line in sys.stdin:  # a process a line, without importing everything each time
    child = os.fork()
    if not child:
        source, out, graph, engine = line.split()
        explain_all(source, out, graph, shard=10, engine=engine, workers=2)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    """Starts batches in processes of their own, and kills each when a further part is there."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", PROGRAM]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def killed(self, source: Path, out: Path, graph: Path, engine: str = "local") -> int:
        """How many parts there are when it has been killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        before = len(list(out.glob("part-*")))
        print(source, out, graph, engine, file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        deadline = time.monotonic() + 300
        while len(list(out.glob("part-*"))) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        assert int(self.process.stdout.readline()) == -signal.SIGKILL
        return len(list(out.glob("part-*")))


@pytest.fixture(scope="module")
def starter(cluster: str) -> Iterator[Starter]:
    found = Starter()
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    found.process.wait()
    assert found.process.stdout is not None
    found.process.stdout.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Ray with four logical cores and a GPU, for the module: with two, Ray Data may wait for an actor for ever."""
    import ray

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of files and sockets that its start leaves open
        context = ray.init(
            num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000
        )
        patch.setenv("RAY_ADDRESS", context.address_info["address"])
        yield
    ray.shutdown()


def test_killed_again_and_again_nothing_is_doubled_or_lost(
    starter: Starter, many: Path, graph: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    parts = 0
    for _ in range(4):
        more = starter.killed(many, out, graph)
        assert more > parts
        parts = more
        assert not (out / "_batch.json").exists()
        some = rows_of(out)  # what is there is whole at any time
        assert some == [uninterrupted[row["row"]] for row in some]
    (out / ".part-000023.parquet.abc").write_bytes(b"of a killed writer")
    notes: list[str] = []
    record = explain_all(many, out, graph, report=lambda title, done, total: notes.append(title))
    assert "are done already: resuming" in notes[0]
    assert rows_of(out) == uninterrupted
    assert record["rows"] == 240
    assert record["statuses"] == {"ok": 210, "unreadable": 30}
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == sorted(
        [*(f"part-{index:06}.parquet" for index in range(24)), "_batch.json"]
    )
    # done is done
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert explain_all(many, out, graph) == record
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == {
        path: value for path, value in before.items() if path.name != ".lock"
    }


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize(("kind", "write"), [(Path, "replace"), (MemoryFileSystem, "pipe_file")])
def test_interrupted_at_any_write(
    call: int, kind: Any, write: str, *, photos: Path, graph: Path, tmp_path: Path, bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The plan, a part, the record: whichever rename or put does not come about, the next call makes it good."""
    out = str(tmp_path / "out") if kind is Path else f"{bucket}/out"
    writes, count = getattr(kind, write), itertools.count()

    def interrupted(*values: Any, **options: Any) -> object:
        if next(count) == call:
            raise KeyboardInterrupt
        return writes(*values, **options)

    monkeypatch.setattr(kind, write, interrupted)
    with pytest.raises(KeyboardInterrupt):
        explain_all(photos, out, graph, shard=12)
    monkeypatch.setattr(kind, write, writes)
    assert not (Location.of(out) / "_batch.json").exists()
    explain_all(photos, out, graph, shard=12)
    assert [row["row"] for row in rows_of(out)] == list(range(23))


def test_other_work_is_refused(photos: Path, graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = explain_all(photos, out, graph)
    notes: list[str] = []
    assert explain_all(photos, out, graph, report=lambda title, *_: notes.append(title)) == record
    assert "nothing was added since" in notes[0]
    with pytest.raises(BatchError, match="of a batch with source"):
        explain_all(photos / "folder0", out, graph)
    with pytest.raises(BatchError, match="of a batch with pictures False, not True"):
        explain_all(photos, out, graph, pictures=True)
    (out / "_batch.json").unlink()
    with pytest.raises(BatchError, match="with parts of other work"):
        explain_all(photos, out, graph)
    with FileLock(tmp_path / "busy" / ".lock"), pytest.raises(BatchError, match="no other batch is writing"):
        explain_all(photos, tmp_path / "busy", graph)
    with pytest.raises(BatchError, match="at least 1 worker"):
        explain_all(photos, tmp_path / "new", graph, workers=0)
    with pytest.raises(BatchError, match="at least 1 row"):
        explain_all(photos, tmp_path / "new", graph, shard=0)
    with pytest.raises(BatchError, match="the file"):
        explain_all(photos, photos / "folder0/0.png", graph)


def test_photos_added_later_are_explained_alone(
    photos: Path, graph: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, listed = f"{bucket}/out", tmp_path / "list.txt"
    first = [os.fsencode(path) for path in sorted(photos.glob("*/*.png"))]
    listed.write_bytes(b"\n".join([*first[:10], b"\xff.png"]))
    explain_all(listed, out, graph, shard=4)
    before, files = rows_of(out), fsspec.filesystem("memory")
    times = {name: files.modified(name) for name in files.glob("/bucket/out/part-*")}
    listed.write_bytes(b"\n".join([*first[5:], b"\xff.png", first[0]]))
    monkeypatch.setattr("bla.deploy.batch._concluded", lambda *_: pytest.fail("killed"))  # before the record
    with pytest.raises(pytest.fail.Exception):
        explain_all(listed, out, graph, shard=4)
    monkeypatch.undo()
    notes: list[str] = []
    record = explain_all(listed, out, graph, report=lambda title, done, total: notes.append(f"{title} {done} {total}"))
    assert notes[0].startswith("13 of 13 photos are done already")
    rows = rows_of(out)
    assert (record["rows"], record["parts"], record["statuses"]) == (24, 7, {"ok": 23, "unreadable": 1})
    assert rows[:11] == before
    assert [row["row"] for row in rows] == list(range(24))
    assert [os.fsencode(row["path"]) for row in rows[11:]] == first[10:]
    assert {name: files.modified(name) for name in times} == times
    assert explain_all(listed, out, graph) == record


def test_a_table_that_changes_on_the_way_is_refused(starter: Starter, many: Path, graph: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    shutil.copy(many, table)
    starter.killed(table, tmp_path / "out", graph)
    os.utime(table, ns=(0, 0))
    with pytest.raises(BatchError, match="a changed or missing file"):
        explain_all(table, tmp_path / "out", graph)


# --- Ray


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_ray_gives_the_same_rows_after_a_kill_too(
    starter: Starter, many: Path, graph: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path, *,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And its actors share the GPUs of a cluster whose ONNX Runtime can use them."""
    import ray

    out, held = tmp_path / "out", list[float]()
    parts = starter.killed(many, out, graph, "ray")
    assert 0 < parts < 24
    monkeypatch.setattr(cluster_of_batch, "has_cuda", lambda: True)
    progress: list[tuple[str, int, int]] = []

    def report(*call: Any) -> None:
        progress.append(call)
        held.append(1 - ray.available_resources().get("GPU", 0))

    record = explain_all(many, out.as_uri(), graph, engine="ray", workers=2, report=report)
    assert max(held) in (0.5, 1)
    assert ("actors with 0.5 of a GPU compute on the CPU", 0, 0) in progress
    assert rows_of(out) == uninterrupted
    assert record["statuses"] == {"ok": 210, "unreadable": 30}
    assert progress[-1][1:] == (240, 240)


def test_the_command(
    photos: Path, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["batch", "photos", "out", "--run", str(graph)]
    assert run_command(command) == 0
    assert "23 rows in 1 files in out" in capsys.readouterr().out
    assert all(row["path"].startswith("photos/folder") for row in rows_of(tmp_path / "out"))
    assert run_command([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statuses"] == {"ok": 23}
    (photos / "broken.png").write_bytes(b"broken")
    assert run_command(["batch", "photos", (tmp_path / "url").as_uri(), "--run", str(graph), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["statuses"] == {"ok": 23, "unreadable": 1}
    assert run_command(["batch", "nowhere", "out2", "--run", str(graph)]) == 2
    assert run_command(["batch", "photos", "out2", "--run", "nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err
