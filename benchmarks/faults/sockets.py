"""1,100 idle connections, renewed as they are closed, to servers that may open 1,024 files: good requests go on.

python -m benchmarks.faults.sockets --sockets 1100 --seconds 30
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.faults.interruptions import small_study
from benchmarks.faults.server import HOST, asked

FILES = 1024


async def held(port: int, sockets: int, seconds: float, path: str) -> tuple[Counter[str], float, int]:
    """Statuses of good requests, the longest wait for one, and how many connections were opened for nothing."""
    end, opened = time.monotonic() + seconds, 0

    async def idle() -> None:
        nonlocal opened
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(HOST, port)
                opened += 1
                with contextlib.suppress(TimeoutError, OSError):
                    async with asyncio.timeout(end - time.monotonic()):
                        await reader.read()
                writer.close()
            await asyncio.sleep(0.2)

    found, worst = Counter[str](), 0.0
    crowd = [asyncio.create_task(idle()) for _ in range(sockets)]
    await asyncio.sleep(2)
    while time.monotonic() < end - 1:
        begun = time.monotonic()
        found[await asked(port, f"GET {path} HTTP/1.1\r\nhost: here\r\n\r\n".encode(), 10)] += 1
        worst = max(worst, time.monotonic() - begun)
        await asyncio.sleep(0.1)
    await asyncio.gather(*crowd)
    return found, worst, opened


def main() -> None:
    """Serve an explainer, then a study, and hold their sockets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sockets", type=int, default=1100)
    parser.add_argument("--seconds", type=float, default=30)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(FILES, 2 * options.sockets),) * 2)
    wrong = False
    with tempfile.TemporaryDirectory() as temporary:
        small_study(Path(temporary))
        for name, arguments, path in (
            ("serve", ["serve", "tf_efficientnet_lite0"], "/healthz"),
            ("study serve", ["study", "serve", f"{temporary}/study", "--requests-a-second", "1000"], "/"),
        ):
            log = Path(temporary, "log")
            command = ["sh", "-c", f'ulimit -n {FILES} && exec "$@"', "sh", sys.executable, "-P", "-m", "bla"]
            with log.open("wb") as said:
                server = subprocess.Popen([*command, *arguments, "--port", "0"], stdout=said, stderr=said)
            try:
                while "http://" not in (text := log.read_text()) and server.poll() is None:
                    time.sleep(0.1)
                port = int(text.partition(f"http://{HOST}:")[2].split()[0].strip("/,"))
                asyncio.run(asked(port, b"GET / HTTP/1.1\r\nhost: here\r\n\r\n", 60))
                before = log.stat().st_size
                found, worst, opened = asyncio.run(held(port, options.sockets, options.seconds, path))
                descriptors = len([*Path(f"/proc/{server.pid}/fd").iterdir()])
                alive = server.poll() is None
            finally:
                server.terminate()
                server.wait()
            lines = log.stat().st_size - before
            print(f"{name}: {dict(found)}, the slowest {worst:.2f} s, {opened} idle ones, {lines} bytes of log, "
                  f"{descriptors} descriptors at the end", flush=True)  # fmt: skip
            wrong |= set(found) != {"200"} or lines > 1000 or not alive or worst > 2
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
