"""Batches: throughput against a loop in one process, memory on a million tiny images, kills, a billion photos. JSON.

    python -m benchmarks.speed.batch throughput PHOTOS [--run RUN] [--images 256] [--rounds 5]
    python -m benchmarks.speed.batch memory [--rows 1000000]
    python -m benchmarks.speed.batch kills PHOTOS [--run RUN]
    python -m benchmarks.speed.batch billion PHOTOS [--run RUN] [--images 256] [--rounds 5]

The memory test runs a tiny exported network at 32 x 32: it is about the rows, not about the network.
"""

from __future__ import annotations

import io
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.results import parser_of
from bla.data.image_sets import list_images
from bla.data.prefetching import cores, prefetch
from bla.deploy.batch import explain_all
from bla.deploy.batch.location import Location
from bla.deploy.batch.plan import SHARD, Task, make_plan
from bla.deploy.engine import Engine, open_engine


def throughput(photos: Path, run: str, images: int, rounds: int) -> dict[str, Any]:
    """Batch against the same decoding and the same graph on all cores, without plan, rows or files; in turn."""
    graph = open_engine(run).path
    every = list_images([photos])
    paths = [every[index] for index in np.linspace(0, len(every) - 1, min(images, len(every))).astype(int)]
    whole, single = Engine(graph), Engine(graph, threads=1)
    groups = [paths[start : start + 16] for start in range(0, len(paths), 16)]

    def turns() -> None:
        for group in groups:
            whole.run(np.stack([whole.transform.read(path).pixels for path in group]))

    def threads() -> None:
        def work(group: list[Path]) -> object:
            return single.run(np.stack([single.transform.read(path).pixels for path in group]))

        with ThreadPoolExecutor(cores()) as pool:
            for _ in prefetch(pool, work, groups, ahead=2 * cores()):
                pass

    def batch() -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "list.txt").write_text("\n".join(map(str, paths)))
            explain_all(Path(folder) / "list.txt", Path(folder) / "out", graph)

    seconds: dict[str, list[float]] = {"turns": [], "threads": [], "batch": []}
    single.run(np.zeros((16, *single.transform.size, 3), np.uint8))
    calls = {"turns": turns, "threads": threads, "batch": batch}
    for turn in range(rounds):
        names = list(calls)[turn % 3 :] + list(calls)[: turn % 3]  # none always comes first
        for name in names:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    rate = {name: len(paths) / statistics.median(times) for name, times in seconds.items()}
    best = [
        min(one, other) / mine
        for one, other, mine in zip(seconds["turns"], seconds["threads"], seconds["batch"], strict=True)
    ]
    return {
        "claim": "throughput of batch, of the better of two loops of decoding and the same graph, in one process",
        "target": 0.9,
        "value": statistics.median(best),
        "rounds": [round(value, 3) for value in best],
        "images_a_second": {name: round(value, 1) for name, value in rate.items()},
        "images": len(paths),
    }


def memory(rows: int) -> dict[str, Any]:
    """Peak anonymous memory on a tenth of the rows and on all."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        graph = _tiny(folder / "tiny.onnx")
        kinds = [_jpeg(seed) for seed in range(64)]
        peaks, rates = [], []
        for count in (rows // 10, rows):
            table = folder / f"{count}.parquet"
            schema = pa.schema([("path", pa.string()), ("jpg", pa.binary())])
            with pq.ParquetWriter(table, schema) as writer:
                for start in range(0, count, 50_000):
                    some = range(start, min(start + 50_000, count))
                    columns = {"path": [f"{row}.jpg" for row in some], "jpg": [kinds[row % 64] for row in some]}
                    writer.write_table(pa.table(columns, schema=schema))
            command = [sys.executable, "-m", "bla", "batch", table, folder / f"out{count}", "--run", graph, "--json"]
            process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
            peak = 0
            while process.poll() is None:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]))
                except (OSError, IndexError):
                    pass
                time.sleep(0.1)
            assert process.stdout is not None
            record = json.loads(process.stdout.read())
            if record["statuses"] != {"ok": count}:
                raise SystemExit(f"expected {count} rows, got {record['statuses']}")
            peaks.append(peak / 1024)
            rates.append(count / record["last_call"]["seconds"])
    return {
        "claim": f"growth of batch's anonymous memory from {rows // 10:,} to {rows:,} tiny images",
        "value": peaks[1] / peaks[0] - 1,
        "megabytes": [round(peak) for peak in peaks],
        "images_a_second": [round(rate) for rate in rates],
    }


def kills(photos: Path, run: str, times: int = 10) -> dict[str, Any]:
    """Killed at random moments after a further part was written; the rows against an uninterrupted batch's."""
    graph = open_engine(run).path
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        explain_all(photos, Path(place) / "whole", graph, shard=16)
        command = [sys.executable, "-m", "bla", "batch", photos, out, "--run", graph, "--shard", "16"]
        done = 0
        for seed in range(times):
            process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            before = len(list(out.glob("part-*")))
            while len(list(out.glob("part-*"))) == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(random.Random(seed).random() * 0.2)
            done += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run([*map(str, command)], check=False, capture_output=True)
        rows = [pq.read_table(sorted(folder.glob("part-*"))).to_pylist() for folder in (Path(place) / "whole", out)]
    return {
        "claim": "rows doubled, lost or different after kills",
        "value": sum(a != b for a, b in zip(*rows, strict=True)),
        "rows": len(rows[0]),
        "kills": done,
    }


def billion(photos: Path, run: str, images: int, rounds: int) -> dict[str, Any]:
    """What a billion such photos take on a cluster, from pieces measured here in processor seconds of one core.

    The driver lists the photos and, at the end, adds up the parts; between the two, all cores explain.
    """
    rows, cluster, dollars_an_hour, dollars_a_get = 10**9, 1000, 0.04, 0.4e-6
    start = time.process_time()
    graph = open_engine(run, threads=1)
    opening = time.process_time() - start
    every = list_images([photos])
    paths = [str(every[index % len(every)]) for index in range(images)]
    pieces: dict[str, list[float]] = {"list a photo": [], "explain a photo": [], "add up a part": []}
    with tempfile.TemporaryDirectory() as place:
        folder, many = Path(place), 100_000
        (folder / "many.txt").write_text("\n".join(f"s3://bucket/photos/{number:012}.jpg" for number in range(many)))
        (folder / "list.txt").write_text("\n".join(paths))
        for turn in range(rounds):
            times, out = [time.process_time()], folder / f"out{turn}"
            make_plan(folder / "many.txt", Task(source="", graph=""), Location.of(folder / "work"))
            times.append(time.process_time())
            explain_all(folder / "list.txt", out, graph, workers=1)
            times.append(time.process_time())
            for _ in range(100):
                pq.read_schema(out / "part-000000.parquet")
            times.append(time.process_time())
            for found, taken, count in zip(pieces.values(), np.diff(times), (many, images, 100), strict=True):
                found.append(taken / count)
        size = (out / "part-000000.parquet").stat().st_size / images
    one = {name: statistics.median(found) for name, found in pieces.items()}
    alone = one["list a photo"] * rows + one["add up a part"] * rows / SHARD
    hours = (alone + opening + one["explain a photo"] * rows / cluster) / 3600
    return {
        "claim": f"hours for {rows:,} photos on {cluster:,} cores",
        "value": hours,
        "hours_of_the_driver_alone": alone / 3600,
        "dollars": {"cores": hours * cluster * dollars_an_hour, "requests to an object store": rows * dollars_a_get},
        "gigabytes_of_results": size * rows / 1e9,
        "seconds": one | {"open a graph": opening},
        "least_and_most": {name: [min(found), max(found)] for name, found in pieces.items()},
        "priced_at": {"dollars_a_core_hour": dollars_an_hour, "dollars_a_million_requests": dollars_a_get * 1e6},
    }


def _tiny(path: Path) -> Path:
    import torch
    from torch import nn

    from bla.data.photo import Transform
    from bla.deploy.export import export
    from bla.model.classifier import explainable

    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU())
    net = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    wrapped = explainable(net, transform=Transform((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear"))
    wrapped.fitted = True
    return export(wrapped, path).path


def _jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=60)
    return file.getvalue()


def main() -> None:
    """Parse, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["throughput", "memory", "kills", "billion"])
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--run", default="tf_efficientnet_lite0")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    if options.what != "memory" and options.photos is None:
        parser.error("expected a folder of photos")
    if options.what == "memory":
        result = memory(options.rows)
    elif options.what == "kills":
        result = kills(options.photos, options.run)
    elif options.what == "billion":
        result = billion(options.photos, options.run, options.images, options.rounds)
    else:
        result = throughput(options.photos, options.run, options.images, options.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
