"""A study under load: many people think, answer and come again, and the server may be killed on the way.

People of a real study, 200 of them with 3 to 8 s of thinking before each of 30 answers, against `bla study serve` in a
process of its own. Each loads the page and its pictures as a browser does, and sends every twentieth answer twice.
With --kills the server is killed (SIGKILL) so many times, evenly spread, and started again; people who meet it dead
reload after 1 to 4 s. At the end every answer in the store is compared with what its person was told is stored.

    python -m benchmarks.study.load --db sqlite --kills 10
    python -m benchmarks.study.load --db postgresql://postgres@127.0.0.1/postgres
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode
from uuid import uuid4

import numpy as np
import sqlalchemy as sa

from benchmarks.results import parser_of
from bla.data import embedded
from bla.explanations.explanation import Explanation, Prediction
from bla.study.keys import Keys
from bla.study.plan import Plan
from bla.study.preparing import Wishes, prepare
from bla.study.store import Store


@dataclass
class Seen:
    """What the people saw: the server's own times by kind of request, refusals, failed connections."""

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: int = 0
    problems: list[str] = field(default_factory=list)


class Browser:
    """A browser's connection, cookies, and patience: a request that fails is made again."""

    def __init__(self, port: int, seen: Seen, patience: float) -> None:
        self.port, self.seen, self.patience = port, seen, patience
        self.cookies: dict[str, str] = {}
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, address: str, values: dict[str, str] | None = None) -> tuple[int, str, bytes]:
        """Status, where it leads, content."""
        body = urlencode(values).encode() if values is not None else b""
        while True:
            try:
                return await asyncio.wait_for(self._once(method, address, body), 60)
            except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
                self.seen.failures += 1
                self.close()
                await asyncio.sleep(random.uniform(1, 4) * self.patience)

    async def _once(self, method: str, address: str, body: bytes) -> tuple[int, str, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        head = f"{method} {address} HTTP/1.1\r\nhost: study\r\ncookie: {cookie}\r\ncontent-length: {len(body)}\r\n"
        if body:
            head += "content-type: application/x-www-form-urlencoded\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        status, length, location = int(lines[0].split()[1]), 0, ""
        for line in lines[1:]:
            name, _, value = line.partition(": ")
            if name == "content-length":
                length = int(value)
            elif name == "location":
                location = value
            elif name == "set-cookie":
                self.cookies.update([value.split(";")[0].split("=", 1)])
            elif name == "server-timing":
                kind = f"{method} /{address.split('/')[1]}"
                self.seen.milliseconds.setdefault(kind, []).append(float(value.partition("dur=")[2]))
        content = await reader.readexactly(length)
        self.seen.statuses[status] += 1
        if status >= 400:
            self.seen.problems.append(f"{method} {address}: {status}")
        return status, location, content

    def close(self) -> None:
        """Give up the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def fields(html: str) -> dict[str, str]:
    """A form's hidden fields."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', html))


async def person(number: int, port: int, seen: Seen, options: argparse.Namespace) -> tuple[str, dict[int, int]]:
    """One participation: the completion code, and the answers by position."""
    rng = random.Random(number)
    await asyncio.sleep(rng.uniform(0, options.arriving))
    browser, given = Browser(port, seen, options.thinking), {}
    _, _, page = await browser.ask("GET", "/")
    await browser.ask("POST", "/begin", fields(page.decode()) | {"agree": "yes"})
    await browser.ask("GET", "/instructions")
    for asset in ("/static/study.css", "/static/study.js"):
        await browser.ask("GET", asset)
    while True:
        status, location, content = await browser.ask("GET", "/trial")
        if status == 303 and location == "/end":
            break
        html = content.decode()
        for address in re.findall(r'<img src="([^"]+)"', html):
            await browser.ask("GET", address)
        await asyncio.sleep(rng.uniform(3, 8) * options.thinking)
        values, choice = fields(html), rng.randrange(2)
        given[int(values["position"])] = choice
        for _ in range(2 if rng.random() < 0.05 else 1):
            await browser.ask("POST", "/answer", values | {"choice": str(choice)})
    _, _, page = await browser.ask("GET", "/end")
    browser.close()
    return re.findall(r"<code>([\w-]+)</code>", page.decode())[0], given


class Server:
    """`bla study serve`, which can be killed and started again."""

    def __init__(self, study: Path, url: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.command = [
            sys.executable, "-m", "bla", "study", "serve", str(study), "--port", str(self.port), "--db", url,
            "--timing", "--joins-a-minute", "100000",
        ]  # fmt: skip
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL)

    async def ready(self) -> None:
        """Wait until it answers."""
        while True:
            if self.process.poll() is not None:
                raise SystemExit("the server ended by itself")
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return
            except OSError:
                await asyncio.sleep(0.05)

    async def killed(self, times: int, seconds: float) -> None:
        """Kill it so many times, evenly spread over so many seconds."""
        for _ in range(times):
            await asyncio.sleep(seconds / (times + 1))
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = self._started()
            await self.ready()


async def crowd(server: Server, seen: Seen, options: argparse.Namespace) -> list[tuple[str, dict[int, int]]]:
    """Everyone at once."""
    await server.ready()
    length = options.arriving + 5.5 * options.thinking * options.trials
    killer = asyncio.create_task(server.killed(options.kills, length))
    done = await asyncio.gather(*(person(number, server.port, seen, options) for number in range(options.people)))
    await killer
    return done


def made_study(folder: Path, trials: int) -> Path:
    """A study of generated photos; what the explanations say does not matter here."""
    rng = np.random.default_rng(0)
    for number in range(trials):
        image, _, label = embedded.make(number)
        path = folder / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        said = Prediction(label, embedded.CLASSES[label], 0.9)
        for method in ("one", "other"):
            ranks = rng.normal(size=(7, 7))
            why = Explanation(
                image=os.fspath(path), prediction=said, top=(said,), method=method, grid=(7, 7), unbounded=ranks,
                scores=np.minimum(ranks, 0), soft=None, selected=ranks > 0.8, region=(0, 0, *image.size),
            )  # fmt: skip
            why.save(folder / method / f"{number}.json")
    arms = [os.fspath(folder / method) for method in ("one", "other")]
    catches, repeats = min(2, trials // 4), min(2, trials // 4)
    wishes = Wishes(trials=trials - catches - repeats, repeats=repeats, catches=catches, practice=0)
    prepare(folder / "study", arms, wishes)
    words = folder / "study" / "texts.toml"
    words.write_text(re.sub(r"^\[To the researcher.*\]$", "A benchmark asks.", words.read_text(), flags=re.M))
    return folder / "study"


def database(given: str, study: Path) -> str:
    """A new, empty database."""
    if given == "sqlite":
        return f"sqlite:///{study / 'study.db'}"
    name = f"bla_{uuid4().hex}"
    engine = sa.create_engine(given.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    engine.dispose()
    return given.rpartition("/")[0] + f"/{name}"


def compared(study: Path, url: str, told: list[tuple[str, dict[int, int]]]) -> dict[str, int]:
    """Answers in the store against those that people gave."""
    store, keys = Store(url), Keys.load(study)
    collected = store.collected(Plan.load(study))
    store.close()
    codes = {keys.completion_code(person.participant): person.participant for person in collected.participants}
    stored = {(r.participant, r.position): r.place for r in collected.responses}
    given = {(codes[code], position): choice for code, answers in told for position, choice in answers.items()}
    return {
        "participants": len(collected.participants),
        "finished": sum(person.finished for person in collected.participants),
        "answers": len(collected.responses),
        "lost": len(set(given) - set(stored)),
        "doubled": len(collected.responses) - len(stored) + len(set(stored) - set(given)),
        "changed": sum(stored[key] != choice for key, choice in given.items() if key in stored),
    }


def main() -> None:
    """Run and tell; exit 1 where anything was lost, doubled, changed or refused, or the server was slow."""
    parser = parser_of(__doc__)
    parser.add_argument("--db", default="sqlite", help="sqlite, or the URL of a PostgreSQL server")
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--thinking", type=float, default=1.0, help="scales the 3 to 8 s; the claim is at 1")
    parser.add_argument("--arriving", type=float, default=20.0, help="seconds over which people arrive")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, help="milliseconds, of the 95th percentile")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seen = Seen()
    with tempfile.TemporaryDirectory() as temporary:
        study = made_study(Path(temporary), options.trials)
        url = database(options.db, study)
        server = Server(study, url)
        began = time.perf_counter()
        try:
            told = asyncio.run(crowd(server, seen, options))
        finally:
            server.process.kill()
            server.process.wait()
        seconds = time.perf_counter() - began
        found = compared(study, url, told)
    times = [value for values in seen.milliseconds.values() for value in values]
    pages = [value for kind, values in seen.milliseconds.items() if "pictures" not in kind for value in values]
    result = {
        "database": options.db.partition(":")[0],
        "people": options.people,
        "trials": options.trials,
        "thinking_seconds": [3 * options.thinking, 8 * options.thinking],
        "kills": options.kills,
        "cores": os.cpu_count(),
        "seconds": round(seconds, 1),
        "requests": sum(seen.statuses.values()),
        "failed_connections": seen.failures,
        "refused": len(seen.problems),
        "server_ms": dict(zip(("median", "p95", "p99", "max"), percentiles(times), strict=True)),
        "server_ms_without_pictures": dict(zip(("median", "p95", "p99", "max"), percentiles(pages), strict=True)),
    } | found
    whole = options.people * options.trials
    fine = (
        not seen.problems
        and found["finished"] == found["participants"] == options.people
        and found["answers"] == whole
        and found["lost"] == found["doubled"] == found["changed"] == 0
        and max(result["server_ms"]["p95"], result["server_ms_without_pictures"]["p95"]) < options.limit
        and (options.kills > 0 or seen.failures == 0)
    )
    print(json.dumps(result | {"passed": fine}, indent=None if options.json else 1))
    for problem in seen.problems[:5]:
        print(problem, file=sys.stderr)
    if not fine:
        sys.exit(1)


def percentiles(times: list[float]) -> list[float]:
    """Median, 95th, 99th, greatest."""
    return [round(float(value), 1) for value in np.quantile(times, [0.5, 0.95, 0.99, 1.0])]


if __name__ == "__main__":
    main()
