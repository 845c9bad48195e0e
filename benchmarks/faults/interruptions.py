"""Kill -9, and failures injected at writes, in train, explain, batch and a study that is served, on tiny data.

After each the same command runs again, in the end to its end: the result is that of an undisturbed run, with nothing
lost, doubled or half written, and no process ever shows a traceback.

python -m benchmarks.faults.interruptions --kills 60 --failures 30
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from bla.cli import run_command
from bla.explanations.explanation import Explanation, Prediction
from bla.study.behaviour import Behaviour
from bla.study.errors import StudyError
from bla.study.plan import Plan
from bla.study.preparing import Wishes, prepare
from bla.study.rehearsal import Actor, Walker
from bla.study.store import Store
from bla.study.texts import Texts

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 9, stride=32, padding=4), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
"""
Trouble = Callable[[], None]
"""What a process does to itself before its command."""


# --- processes


def started(arguments: list[str], log: Path, trouble: Trouble | None = None) -> int:
    """A child that runs a command of bla; fork spares the imports, so that kills meet the work."""
    sys.stdout.flush()
    come, go = os.pipe()  # the log itself must not fail
    if child := os.fork():
        os.close(go)
        threading.Thread(target=_copied, args=(come, log), daemon=True).start()
        return child
    code = 99
    try:
        os.dup2(go, 1)
        os.dup2(go, 2)
        if trouble is not None:
            trouble()
        code = run_command(arguments)
        sys.stdout.flush()
    except SystemExit as left:  # by a signal
        code = left.code if isinstance(left.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _copied(source: int, log: Path) -> None:
    with os.fdopen(source, "rb", 0) as said, log.open("ab", 0) as file:
        shutil.copyfileobj(said, file)


def ended(child: int, seconds: float | None = None) -> int | None:
    """The exit code; None if the process had to be killed after so many seconds."""
    if seconds is not None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (done := os.waitpid(child, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(done[1])
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code


class Failing:
    """The n-th call that changes the disk fails: opening a file to write it, fsync, a rename, a new folder."""

    def __init__(self, number: int) -> None:
        self.number, self.shared = number, mmap.mmap(-1, 8)

    @property
    def calls(self) -> int:
        """How many there were, also in a child."""
        return int.from_bytes(self.shared[:])

    def __call__(self) -> None:
        for name in ("fsync", "rename", "replace", "mkdir"):
            setattr(os, name, self._instead(getattr(os, name)))
        builtins.open = self._instead(builtins.open, self._writes)  # type: ignore[assignment]
        Path.open = self._instead(Path.open, self._writes)  # type: ignore[method-assign]

    @staticmethod
    def _writes(*arguments: Any, **options: Any) -> bool:
        mode = options.get("mode", arguments[1] if len(arguments) > 1 else "r")
        return isinstance(mode, str) and not {*"wxa"}.isdisjoint(mode)

    def _instead(self, call: Callable[..., Any], counts: Callable[..., bool] = lambda *_, **__: True) -> Any:
        def instead(*arguments: Any, **options: Any) -> Any:
            if counts(*arguments, **options):
                self.shared[:] = (self.calls + 1).to_bytes(8)
                if self.calls == self.number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return instead


def limited(size: int) -> Trouble:
    """No file can grow beyond a size, in whatever language it is written."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# --- commands that end


@dataclasses.dataclass(frozen=True)
class Task:
    """A command by the place of its result, and what must be the same however often it was interrupted."""

    name: str
    arguments: Callable[[Path], list[str]]
    result: Callable[[Path], object]


def _weights(run: Path) -> object:
    record = json.loads((run / "run.json").read_text())
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name != ".lock")
    return {n: w.numpy().tobytes() for n, w in load_file(run / "model.safetensors").items()}, record["metrics"], names


def _whys(out: Path) -> object:
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    pictures = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.png")}
    return {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}, pictures


def _rows(out: Path) -> object:
    rows = [row for part in sorted(out.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    return sorted((row["row"], row["path"], row["mask"], row["status"]) for row in rows)


TASKS = [
    Task("train", lambda out: ["train", "data", "--model", "network:build", "--epochs", "8",
                               "--head-epochs", "8", "--seed", "3", "--out", str(out)], _weights),
    Task("explain", lambda out: ["explain", "data/test", "--run", "run", "--out", str(out)], _whys),
    Task("batch", lambda out: ["batch", "data/test", str(out), "--run", "run", "--shard", "8"], _rows),
]  # fmt: skip


class Interrupted:
    """Interrupts a task again and again, and looks at each result."""

    def __init__(self, task: Task, rng: random.Random) -> None:
        self.task, self.rng, self.found, self.number = task, rng, Counter[str](), 0
        self.log = Path(f"{task.name}.log").resolve()
        for _ in range(2):  # the first may export, once for all
            whole, counting, begun = self._place(), Failing(-1), time.monotonic()
            assert ended(started(task.arguments(whole), self.log, counting)) == 0, self.log.read_text()
        self.seconds, self.whole, self.calls = time.monotonic() - begun, task.result(whole), counting.calls

    def _place(self) -> Path:
        """A new one; what the command caches is removed, for else the second run would have less to do."""
        for kept in Path("cache").iterdir():
            if kept.is_dir() and kept.name != "exported":  # the graphs that another process makes
                shutil.rmtree(kept)
        self.number += 1
        return Path(f"{self.task.name}-{self.number}")

    def kill(self, times: int) -> None:
        """Kill it so many times at random moments; a run that ends is compared, and another begins."""
        killed, place = 0, self._place()
        while killed < times:
            if self._run(place, seconds=self.rng.uniform(0, 1.1 * self.seconds)) is None:
                killed += 1
                self.found["killed"] += 1
            else:
                self._compare(place)
                place = self._place()
        self._finish(place)

    def fail(self, times: int) -> None:
        """Let writes fail, each in a run of its own, which is then repeated undisturbed."""
        for number in range(times):
            place = self._place()
            calls, size = self.rng.randint(1, self.calls), int(2 ** self.rng.uniform(4, 13))
            code = self._run(place, Failing(calls) if number % 2 else limited(size))
            self.found["failed" if code else "not met"] += 1
            self.found[f"exit code {code}"] += code not in (0, 2, 3)
            self._finish(place)

    def _run(self, place: Path, trouble: Trouble | None = None, seconds: float | None = None) -> int | None:
        return ended(started(self.task.arguments(place), self.log, trouble), seconds)

    def _finish(self, place: Path) -> None:
        if (code := self._run(place)) == 0:
            self._compare(place)
            return
        time.sleep(0.1)
        self.found["does not resume"] += 1
        print(
            f"{self.task.name} does not resume, exit code {code}:", *self.log.read_text().splitlines()[-12:], sep="\n"
        )

    def _compare(self, place: Path) -> None:
        same = place.exists() and self.task.result(place) == self.whole
        self.found["same results" if same else "other results"] += 1
        if same:
            shutil.rmtree(place)


# --- the study


class Stubborn(Walker):
    """A participant who sends again until there is an answer."""

    def _load(self, address: str, form: dict[str, str] | None = None, tries: int = 1) -> bytes:
        while True:
            try:
                return super()._load(address, form, tries)
            except (StudyError, OSError):  # the server is down, or cannot write
                time.sleep(0.05)

    def _send(self, address: str, **values: str) -> None:
        super()._send(address, **values)
        time.sleep(0.05)


def small_study(folder: Path) -> Plan:
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for number in range(8):
        path = folder / "photos" / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(path)
        for method in ("one", "other"):
            order, guess = rng.permutation(9).reshape(3, 3), Prediction(0, "cat", 0.9)
            maps = {"unbounded": order - 5.0, "scores": np.minimum(order - 5.0, 0), "soft": None, "selected": order > 4}
            why = Explanation(str(path), guess, (guess,), method, (3, 3), region=(0, 0, 64, 48), **maps)  # type: ignore[arg-type]
            (folder / method).mkdir(exist_ok=True)
            why.save(folder / method / f"{number}.json")
    wishes = Wishes(trials=8, repeats=0, catches=0, practice=0, title="Which?")
    plan, _ = prepare(folder / "study", [str(folder / "one"), str(folder / "other")], wishes)
    texts = folder / "study" / "texts.toml"
    texts.write_text(re.sub(r"(?m)^\[(?!\w+\]$)", "(", texts.read_text()))
    return plan


@contextlib.contextmanager
def _taking_part(plan: Plan, texts: Texts, address: str, end: threading.Event) -> Iterator[list[Actor]]:
    """Three at a time take part in a study until the end, each to the last trial."""
    people: list[Actor] = []
    numbers = itertools.count()

    def one_after_another() -> None:
        while not end.is_set():
            actor = Actor(plan, Behaviour(drop_out=0), 0, next(numbers))
            people.append(actor)
            walker = Stubborn(plan, texts, actor, address)
            walker.begin()
            walker.walk()

    threads = [threading.Thread(target=one_after_another) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield people
    finally:
        end.set()
        for thread in threads:
            thread.join()


def study(kills: int, failures: int, rng: random.Random) -> Counter[str]:
    """Serve a study, and interrupt it while people answer: each answer is stored once, as it was given."""
    found, folder, log = Counter[str](), Path("look"), Path("study.log").resolve()
    plan = small_study(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["study", "serve", str(folder / "study"), "--port", str(port), "--joins-a-minute", "100000"]
    texts, end = Texts.load(folder / "study" / "texts.toml"), threading.Event()
    child = started(arguments, log)
    with _taking_part(plan, texts, f"http://127.0.0.1:{port}", end) as people:
        for number in range(kills + failures):
            time.sleep(rng.uniform(0.5, 1.5))
            os.kill(child, signal.SIGKILL if number < kills else signal.SIGTERM)
            ended(child)
            found["killed" if number < kills else "failed"] += 1
            child = started(arguments, log, None if number < kills else limited(int(2 ** rng.uniform(12, 18))))
        os.kill(child, signal.SIGTERM)
        ended(child)
        child = started(arguments, log)
        end.set()
    os.kill(child, signal.SIGTERM)
    found["wrong exit"] += ended(child) != 0
    with Store.of(folder / "study") as store:
        collected = store.collected(plan)
    finished = [person for person in collected.participants if person.finished]
    given = Counter((response.participant, response.position) for response in collected.responses)
    trials = sum(person.trials for person in collected.participants)
    found["lost"] += abs(len(people) - len(finished)) + trials - len(given)
    found["doubled"] += sum(count - 1 for count in given.values()) + len(collected.participants) - len(people)
    found["answers"] = len(collected.responses)
    return found


def main() -> None:
    """Interrupt everything, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--failures", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        Path("network.py").write_text(NETWORK)
        sys.path.insert(0, temporary)
        os.environ |= {"BLA_CACHE": f"{temporary}/cache", "BLA_TRUST_CODE": "network:build"}
        for part, label, number in itertools.product(("train", "test"), "ab", range(20)):
            path = Path("data", part, label, f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, label == "a", part == "test"]).integers(0, 256, (60, 80, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        assert ended(started(TASKS[0].arguments(Path("run")), Path("run.log"))) == 0, Path("run.log").read_text()
        wrong = 0
        for task in (None, *reversed(TASKS)):  # the quickest first
            begun = time.monotonic()
            kills, failures = options.kills // 4, options.failures // 4 + (task is None) * (options.failures % 4)
            if task is None:
                name, found = "study", study(kills, failures, rng)
            else:
                interrupted = Interrupted(task, rng)
                interrupted.kill(kills)
                interrupted.fail(failures)
                name, found = task.name, interrupted.found
            found["tracebacks"] = Path(f"{name}.log").read_text().count("Traceback")
            print(f"{name}: {dict(+found)}, {time.monotonic() - begun:.0f} s", flush=True)
            good = {"killed", "failed", "not met", "same results", "answers"}
            wrong += sum(count for key, count in found.items() if key not in good)
            if "Traceback" in (said := Path(f"{name}.log").read_text()):
                print(said[said.index("Traceback") :][:3000])
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
