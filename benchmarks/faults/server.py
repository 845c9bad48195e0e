"""Good and hostile clients against `bla serve`: every good request is answered or told to wait, in bounded memory.

python -m benchmarks.faults.server --seconds 120 --clients 200
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
from PIL import Image

from benchmarks.faults.memory import BOMB
from bla.data.photo import DECODING

HOST = "127.0.0.1"


def _photo() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _scans(count: int) -> bytes:
    """A progressive JPEG of 36 million pixels whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (6000, 6000)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def _post(body: bytes, kind: str, path: str = "/v1/explain", *extra: str, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "host: here", f"content-type: {kind}", f"content-length: {size}", *extra]
    return "\r\n".join([*lines, "", ""]).encode() + body


PHOTO = _photo()
EMPTY_PART = b"\0\0\0\0teSt" + zlib.crc32(b"teSt").to_bytes(4)
GOOD = {
    "a photo": _post(PHOTO, "image/jpeg"),
    "JSON": _post(json.dumps({"photos": [base64.b64encode(PHOTO).decode()]}).encode(), "application/json"),
    "a page": b"GET / HTTP/1.1\r\nhost: here\r\n\r\n",
}
HOSTILE = {
    "nothing": b"",
    "half a head": b"POST /v1/explain HTTP/1.1\r\nhost: he",
    "no body": _post(b"", "image/jpeg", length=30_000_000),
    "half a body": _post(PHOTO[:2000], "image/jpeg", length=20_000_000),
    "a bomb": _post(BOMB, "image/webp"),
    "letters as masks": _post(
        b'{"photos":[""],"masks":[' + b'"a",' * 75_000 + b'"",' * 20_000 + b'""]}', "application/json", "/v1/answers"
    ),
    "empty photos": _post(b'{"photos":[' + b'"",' * 600_000 + b'""]}', "application/json"),
    "depth": _post(b"[" * 500_000, "application/json"),
    "noise": random.Random(0).randbytes(20_000),
    "two lengths": _post(b"abc", "image/png", "/v1/explain", "transfer-encoding: chunked"),
    "a broken photo": _post(PHOTO[:1000] + bytes(3000), "image/jpeg"),
    "a bomb to draw": _post(BOMB, "image/webp", "/v1/explain?format=png"),
    "a JPEG of 2,000 scans": _post(_scans(2_000), "image/jpeg"),
    "a PNG of 500,000 parts": _post(b"\x89PNG\r\n\x1a\n" + EMPTY_PART * 500_000, "image/png"),
}
TOLD = {"200", "429", "503"}
"""How a good request may be answered, and a large photo."""


async def asked(port: int, request: bytes, seconds: float) -> str:
    """The status of the answer, or what came instead of one."""
    writer = None
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(request)
            line = await reader.readline()
            return line.split()[1].decode() if line else "closed"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return type(error).__name__
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def attacked(port: int, clients: int, seconds: float) -> dict[str, Counter[str]]:
    """Statuses by kind of request."""
    found: dict[str, Counter[str]] = {name: Counter() for name in (*GOOD, *HOSTILE)}
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        kinds = GOOD if number % 4 == 0 else HOSTILE
        while time.monotonic() < end:
            name = rng.choice(list(kinds))
            status = await asked(port, kinds[name], 40)
            found[name][status] += 1
            await asyncio.sleep(1 + rng.random() * (4 if status in ("429", "503") else 1))

    await asyncio.gather(*map(client, range(clients)))
    return found


def watched(port: int, process: int, seconds: float) -> tuple[list[float], float]:
    """The seconds that each look at /healthz took, and the most MiB that the server and its processes had."""
    server, waits, most, end = psutil.Process(process), list[float](), 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.monotonic()
        status = asyncio.run(asked(port, b"GET /healthz HTTP/1.1\r\nhost: here\r\n\r\n", 30))
        waits.append(time.monotonic() - begun if status == "200" else 30.0)
        for _ in range(4):
            most = max(most, _memory(server))
            time.sleep(0.1)
    return waits, most


def _memory(server: psutil.Process) -> float:
    total = 0
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def main() -> None:
    """Serve, attack, and compare with the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("explainer", nargs="?", default="tf_efficientnet_lite0")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    command = [sys.executable, "-P", "-m", "bla", "serve", options.explainer, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(line for line in server.stderr if "http://" in line)
        port = int(address.rstrip().rstrip("/").rpartition(":")[2])
        try:
            asyncio.run(asked(port, GOOD["a photo"], 60))
            idle = _memory(psutil.Process(server.pid))
            # The watch is another process: how long 200 clients wait for one another is not the server's doing.
            with ProcessPoolExecutor(1) as pool:
                watch = pool.submit(watched, port, server.pid, options.seconds)
                found = asyncio.run(attacked(port, options.clients, options.seconds))
                waits, peak = watch.result()
            print(f"alive: {server.poll() is None}, load average {os.getloadavg()[0]:.1f}")
        finally:
            server.terminate()
    for name, statuses in found.items():
        print(f"{'good' if name in GOOD else 'hostile'}, {name}: {dict(statuses)}")
    bound = 1.5 * idle + DECODING.most / 2**20
    print(f"memory: idle {idle:,.0f} MiB, peak {peak:,.0f} MiB, bound {bound:,.0f} MiB")
    print(
        f"/healthz: {len(waits)} looks, the slowest {max(waits):.2f} s, median {sorted(waits)[len(waits) // 2]:.3f} s"
    )
    good = {status for name in (*GOOD, "a bomb", "a bomb to draw") for status in found[name]}
    faults = sum(statuses["500"] for statuses in found.values())
    raise SystemExit(peak > bound or faults > 0 or not good <= TOLD or max(waits) > 1)


if __name__ == "__main__":
    main()
