"""The exported graph and the server against what a user would take instead. Prints a Markdown table, or JSON.

    python -m benchmarks.speed.serving PHOTOS [--only graph nodes int8 gradcam overload knee] [--json]

PHOTOS is a folder of photos. Ratios are of pairs measured in turn in one run. What serving costs beside a bare loop is
one of :mod:`benchmarks.speed.limits`.
"""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import onnx
import onnxruntime
import psutil
import torch
from torch import Tensor, nn

from benchmarks.results import parser_of
from bla.data.image_sets import list_images
from bla.deploy.engine import Engine
from bla.deploy.export import OPSET, export
from bla.model.backbones import load_backbone
from bla.model.classifier import ExplainableClassifier
from bla.model.compiled import session
from bla.runs.run import load

BATCH = 16


class Plain(nn.Module):
    """The classifier alone; with ``cam``, the class activation map of the predicted class too (linear heads)."""

    def __init__(self, name: str, weight: Tensor | None) -> None:
        super().__init__()
        self.model, self.weight = load_backbone(name), weight

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits, and the map (B, H, W)."""
        features = self.model.forward_features(pixels)
        logits = self.model.forward_head(features)
        if self.weight is None:
            return (logits,)
        chosen = self.weight[logits.argmax(-1)][:, None]
        return logits, torch.bmm(chosen, features.flatten(2)).unflatten(-1, features.shape[2:]).squeeze(1)


def written(module: nn.Module, path: Path, size: tuple[int, int]) -> onnxruntime.InferenceSession:
    """Exported and opened as the explainer is."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(
            module.eval(), (torch.zeros(2, 3, *size),), dynamo=True, dynamic_shapes=shapes, opset_version=OPSET,
            input_names=["pixels"], verbose=False,
        )  # fmt: skip
        program.save(path)
    return session(path, threads=1)


def in_turn(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, round by round, in an order that turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            calls[name]()
            if turn >= 2:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """Of the medians."""
    return statistics.median(seconds[one]) / statistics.median(seconds[other])


def graph(wrapped: ExplainableClassifier, file: Path, rounds: int) -> list[Any]:
    """The explained prediction against the classifier alone and CAM, all exported; a batch of 16, processor time."""
    size = wrapped.transform.size
    weight = next(module.weight for module in reversed([*wrapped.head.modules()]) if isinstance(module, nn.Linear))
    sessions = {
        "explained": session(file, threads=1),
        "plain": written(Plain(wrapped.name, None), file.with_name("plain.onnx"), size),
        "cam": written(Plain(wrapped.name, weight), file.with_name("cam.onnx"), size),
    }
    feeds = {"pixels": np.random.default_rng(0).standard_normal((BATCH, 3, *size)).astype(np.float32)}
    calls = {name: lambda s=each: s.run(None, feeds) for name, each in sessions.items()}
    seconds = in_turn(calls, rounds, clock=time.process_time)
    each = {name: round(1e3 * statistics.median(values) / BATCH, 2) for name, values in seconds.items()}
    claims = (("plain", "classifier alone", "<= 1.02"), ("cam", "CAM", "<= 1"))
    return [
        (f"exported explained prediction over exported {title}, time", wanted, ratio(seconds, "explained", name), each)
        for name, title, wanted in claims
    ]


def nodes(wrapped: ExplainableClassifier, file: Path, rounds: int) -> list[dict[str, Any]]:
    """What the explained graph computes beyond the classifier's, by ONNX Runtime's profiler; a batch of 16.

    Least of the rounds; the profiler makes small nodes dearer. A node is an operation with the shape that it gives.
    """
    plain = file.with_name("plain.onnx")
    written(Plain(wrapped.name, None), plain, wrapped.transform.size)
    feeds = {"pixels": np.random.default_rng(0).standard_normal((BATCH, 3, *wrapped.transform.size), np.float32)}
    spent: list[dict[tuple[str, str], list[float]]] = []
    for graph in (plain, file):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = 1, True, 3
        options.profile_file_prefix = str(file.with_name("profile"))
        profiled = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(rounds):
            profiled.run(None, feeds)
        each: dict[tuple[str, str, str], list[float]] = {}
        for event in json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8")):
            if event["name"].endswith("_kernel_time"):
                given = next(shape for of in event["args"]["output_type_shape"] for shape in of.values())
                node = event["name"], event["args"]["op_name"], " x ".join(map(str, given))
                each.setdefault(node, []).append(event["dur"] / BATCH)
        spent.append({})
        for (_, *kind), durations in each.items():
            spent[-1].setdefault((kind[0], kind[1]), []).append(min(durations))
    alone, ours = spent
    kinds = {kind for kind in {**ours, **alone} if len(ours.get(kind, ())) != len(alone.get(kind, ()))}
    more = {kind: sum(ours.get(kind, ())) - sum(alone.get(kind, ())) for kind in kinds}
    large = sorted((kind for kind in kinds if abs(more[kind]) >= 3), key=lambda kind: -more[kind])
    rows = [(*kind, more[kind]) for kind in large]
    rows.append(("all others", "", sum(more[kind] for kind in kinds.difference(large))))
    rows.append(("together", "", sum(more.values())))
    whole = sum(map(sum, alone.values()))
    return [
        {"node": name, "gives": shape, "us a photo": round(time, 1), "of the classifier": f"{time / whole:.2%}"}
        for name, shape, time in rows
    ]


def int8(wrapped: ExplainableClassifier, file: Path, photos: list[Path], rounds: int) -> list[Any]:
    """The explained prediction in int8 against float32, and against the part that classifies; processor time."""
    quick = export(wrapped, file.with_name("int8.onnx"), calibration=photos)
    part = onnx.utils.Extractor(onnx.load(quick.path)).extract_model(["pixels"], ["classifier_logits"])
    (copy,) = (node for node in part.graph.node if node.name == "copy")  # which only the explanation needs
    for node in part.graph.node:
        node.input[:] = [copy.input[0] if name == copy.output[0] else name for name in node.input]
    part.graph.node.remove(copy)
    sessions = {
        "float32": session(file, threads=1),
        "int8": session(quick.path, threads=1),
        "plain int8": session(part.SerializeToString(), threads=1),
    }
    feeds = {"pixels": np.random.default_rng(0).standard_normal((BATCH, 3, *wrapped.transform.size), np.float32)}
    calls = {name: lambda s=graph: s.run(None, feeds) for name, graph in sessions.items()}
    seconds = in_turn(calls, rounds, clock=time.process_time)
    each: dict[str, Any] = {name: round(1e3 * statistics.median(of) / BATCH, 2) for name, of in seconds.items()}
    each |= {"agreement": quick.card.note}
    return [
        ("float32's explained prediction over int8's, time", ">= 2.5", ratio(seconds, "float32", "int8"), each),
        (
            "int8's explained prediction over its classifier alone, time",
            "<= 1.02",
            ratio(seconds, "int8", "plain int8"),
            each,
        ),
    ]


def gradcam(wrapped: ExplainableClassifier, file: Path, rounds: int) -> list[Any]:
    """pytorch-grad-cam's GradCAM on the same pixels and cores."""
    from pytorch_grad_cam import GradCAM

    model = load_backbone(wrapped.name).requires_grad_(True)
    cam = GradCAM(model=model, target_layers=[model.bn2])
    pixels = torch.randn(BATCH, 3, *wrapped.transform.size)
    session, feeds = Engine(file)._session, {"pixels": pixels.numpy()}
    calls = {"ours": lambda: session.run(None, feeds), "gradcam": lambda: cam(input_tensor=pixels, targets=None)}
    seconds = in_turn(calls, rounds)
    each = {name: round(1e3 * statistics.median(values) / BATCH, 2) for name, values in seconds.items()}
    claim = "pytorch-grad-cam's GradCAM over the exported explanation, time"
    return [(claim, ">= 10", ratio(seconds, "gradcam", "ours"), each)]


@contextmanager
def served(file: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server of the file in a process of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "bla", "serve", str(file), "--port", str(port), *options])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                httpx.get(f"{address}/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class Sent(NamedTuple):
    """What became of requests: their statuses, seconds from due to answered, and by how many the client was late."""

    statuses: Counter[int]
    seconds: list[float]
    late: list[float]


async def send(address: str, photos: list[bytes], *, rate: float | None, room: int) -> Sent:
    """All photos, at a rate (open loop), or ``room`` at a time."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=room)
    gate, sent = asyncio.Semaphore(room), Sent(Counter(), [], [])
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:

        async def one(photo: bytes, due: float) -> None:
            sent.late.append(time.monotonic() - due)
            answer = await client.post(f"{address}/v1/explain", content=photo, headers={"content-type": "image/jpeg"})
            sent.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                sent.seconds.append(time.monotonic() - due)

        async def gated(photo: bytes) -> None:
            async with gate:
                await one(photo, time.monotonic())

        if rate is None:
            await asyncio.gather(*map(gated, photos))
        else:
            start, tasks = time.monotonic(), []
            for index, photo in enumerate(photos):
                await asyncio.sleep(max(0.0, start + index / rate - time.monotonic()))
                tasks.append(asyncio.create_task(one(photo, start + index / rate)))
            await asyncio.gather(*tasks)
    return sent


def overload(photos: list[bytes], file: Path) -> list[Any]:
    """Twice the load that the server bears, arriving whatever it answers."""
    with served(file) as (address, process):
        asyncio.run(send(address, photos[:64], rate=None, room=32))
        start = time.monotonic()
        asyncio.run(send(address, photos, rate=None, room=32))
        bearable = len(photos) / (time.monotonic() - start)
        before = process.memory_info().rss
        many = list(itertools.islice(itertools.cycle(photos), int(2 * bearable * 10)))
        statuses = asyncio.run(send(address, many, rate=2 * bearable, room=64)).statuses
        after = process.memory_info().rss
        waiting = httpx.get(f"{address}/healthz").json()["waiting"]
    detail = {
        "photos a second": round(bearable, 1), "statuses": dict(statuses), "waiting afterwards": waiting,
        "megabytes before and after": [round(before / 1e6), round(after / 1e6)],
    }  # fmt: skip
    other = len(many) - statuses[200] - statuses[429]
    return [("answers other than 200 and 429 at twice the bearable load", "0", other, detail)]


def knee(photos: list[bytes], file: Path, target: float, seconds: float = 8.0) -> list[dict[str, Any]]:
    """Rising rates until the 95th percentile of the answers' times exceeds the target, in milliseconds.

    Then, from a server that has the target, the last rate that was met, and more.
    """
    rows: list[dict[str, Any]] = []

    def load(address: str, options: str, rate: float) -> float:
        sent = asyncio.run(
            send(address, [*itertools.islice(itertools.cycle(photos), int(rate * seconds))], rate=rate, room=64)
        )
        half, most = np.percentile(sent.seconds, (50, 95))
        rows.append({
            "server": options, "photos a second": round(rate, 1), "answered": sent.statuses[200],
            "refused": sent.statuses[429], "median, ms": round(1e3 * half), "95th percentile, ms": round(1e3 * most),
            "client late, ms": round(1e3 * np.percentile(sent.late, 95)),
        })  # fmt: skip
        print(*rows[-1].values(), sep=" | ", flush=True)
        return float(1e3 * most)

    options = "--queue 4096"
    with served(file, *options.split()) as (address, _):
        asyncio.run(send(address, photos[:64], rate=None, room=32))
        start = time.monotonic()
        asyncio.run(send(address, photos, rate=None, room=32))
        rate, met = len(photos) / 2 / (time.monotonic() - start), 0.0
        while load(address, options, rate) <= target:
            rate, met = 1.15 * rate, rate
    print(f"knee: {met:.1f} photos a second within {target:g} ms", flush=True)
    options += f" --latency {target:g}"
    with served(file, *options.split()) as (address, _):
        asyncio.run(send(address, photos[:64], rate=None, room=8))
        for times in (1, 1.5, 2):
            load(address, options, times * met)
    return rows


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("photos", type=Path, help="a folder of photos")
    parser.add_argument("--only", nargs="*", default=["graph", "gradcam", "overload"])
    parser.add_argument("--run", default="tf_efficientnet_lite0")
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--target", type=float, default=200, help="of the knee, in milliseconds")
    parser.add_argument("--csv", type=Path, help="where the table of knee or nodes goes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    paths = list_images([arguments.photos])[: arguments.images]
    photos = [path.read_bytes() for path in paths]
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        wrapped = load(arguments.run, device="cpu")
        file = export(wrapped, Path(folder, "explainer.onnx")).path
        benchmarks: dict[str, Callable[[], list[Any]]] = {
            "graph": lambda: graph(wrapped, file, arguments.rounds),
            "int8": lambda: int8(wrapped, file, paths, arguments.rounds),
            "gradcam": lambda: gradcam(wrapped, file, max(3, arguments.rounds // 3)),
            "overload": lambda: overload(photos, file),
        }
        tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "knee": lambda: knee(photos, file, arguments.target),
            "nodes": lambda: nodes(wrapped, file, arguments.rounds),
        }
        for name in filter(tables.get, arguments.only):
            table = tables[name]()
            print(json.dumps(table, indent=1))
            if arguments.csv:
                with arguments.csv.open("w", newline="", encoding="utf-8") as out:
                    writer = csv.DictWriter(out, table[0], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(table)
        for name in filter(benchmarks.get, arguments.only):
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            rows += benchmarks[name]()
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| claim | wanted | measured | |\n| --- | --- | --- | --- |")
    for claim, wanted, value, detail in rows:
        print(f"| {claim} | {wanted} | {value:.3f} | {json.dumps(detail)} |")


if __name__ == "__main__":
    main()
