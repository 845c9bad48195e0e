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
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults.memory import BOMB
from bla.data.photo import DECODING

HOST = "127.0.0.1"


def _photo() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def _post(body: bytes, kind: str, path: str = "/v1/explain", *extra: str, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "host: here", f"content-type: {kind}", f"content-length: {size}", *extra]
    return "\r\n".join([*lines, "", ""]).encode() + body


PHOTO = _photo()
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
}


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


async def attacked(port: int, clients: int, seconds: float) -> tuple[dict[str, Counter[str]], list[float]]:
    """Statuses by kind of request, and the seconds that each look at /healthz took."""
    found: dict[str, Counter[str]] = {name: Counter() for name in (*GOOD, *HOSTILE)}
    waits: list[float] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        kinds = GOOD if number % 4 == 0 else HOSTILE
        while time.monotonic() < end:
            name = rng.choice(list(kinds))
            status = await asked(port, kinds[name], 40)
            found[name][status] += 1
            await asyncio.sleep(1 + rng.random() * (4 if status == "429" else 1))

    async def health() -> None:
        while time.monotonic() < end:
            begun = time.monotonic()
            status = await asked(port, b"GET /healthz HTTP/1.1\r\nhost: here\r\n\r\n", 30)
            waits.append(time.monotonic() - begun if status == "200" else 30.0)
            await asyncio.sleep(1)

    await asyncio.gather(health(), *map(client, range(clients)))
    return found, waits


def _memory(process: int, field: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


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
            idle = _memory(server.pid, "VmRSS")
            found, waits = asyncio.run(attacked(port, options.clients, options.seconds))
            peak = _memory(server.pid, "VmHWM")
            print(f"alive: {server.poll() is None}")
        finally:
            server.terminate()
    for name, statuses in found.items():
        print(f"{'good' if name in GOOD else 'hostile'}, {name}: {dict(statuses)}")
    bound = 1.5 * idle + DECODING.most / 2**20
    print(f"memory: idle {idle:,.0f} MiB, peak {peak:,.0f} MiB, bound {bound:,.0f} MiB")
    print(
        f"/healthz: {len(waits)} looks, the slowest {max(waits):.2f} s, median {sorted(waits)[len(waits) // 2]:.3f} s"
    )
    good = {status for name in GOOD for status in found[name]}
    faults = sum(statuses["500"] for statuses in found.values())
    raise SystemExit(peak > bound or faults > 0 or not good <= {"200", "429"} or max(waits) > 1)


if __name__ == "__main__":
    main()
