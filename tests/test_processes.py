"""Several processes as one: one cache, one writer, kills and resumes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ZYGOTE = """
import json, os, sys, traceback
import torch
from torch.distributed import distributed_c10d
from bla import run, training
torch.set_num_threads(1)
for line in sys.stdin:  # processes a line, without importing everything each time
    world, port, program = json.loads(line)
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            try:
                exec(program, {"rank": rank, "world": world})
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Starter:
    """Runs a program in so many processes, which know of one another as under torchrun."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ZYGOTE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def __call__(self, world: int, program: str, kill: Callable[[], bool] | None = None) -> list[int]:
        """Exit codes; with ``kill``, all are killed when it says so, the last one first."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        print(json.dumps([world, port, textwrap.dedent(program)]), file=self.process.stdin, flush=True)
        children = json.loads(self.process.stdout.readline())
        deadline = time.monotonic() + 60
        while kill is not None and not kill() and time.monotonic() < deadline:
            time.sleep(0.001)
        for child in reversed(children) if kill is not None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return list(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    assert starter.process.stdin is not None
    assert starter.process.stdout is not None
    starter.process.stdin.close()
    starter.process.wait()
    starter.process.stdout.close()


NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=32, padding=4), nn.ReLU())
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the user's, 301 images to train on and 23 to test, some broken: nothing divides by two."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "tinynet.py").write_text(NET)
    for split, count in (("train", 150), ("test", 11)):
        for label, name in enumerate(("blue", "red")):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(count + label):
                pixels = np.random.RandomState([index, label]).randint(0, 120, (20, 30, 3), np.uint8)
                pixels[5:15, 5:20, 2 * (1 - label)] += 130
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{index}.png")
    (folder / "data" / "train" / "blue" / "7.png").write_bytes(b"broken")
    (folder / "data" / "train" / "red" / "149.png").write_bytes(b"broken")
    (folder / "data" / "test" / "red" / "3.png").write_bytes(b"")
    return folder


CACHE = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {place!r})
    import tinynet
    from bla import processes
    from bla.cache import cached_features
    from bla.classifier import explainable
    from bla.data import image_folder
    with processes.joined():
        found = cached_features(explainable(tinynet.build()), image_folder({data!r}).train, root=Path({root!r}))
        assert len(found.features) == 301
        assert len(found.failures) == 2
"""


def test_the_cache_of_several_is_that_of_one(start: Starter, place: Path, tmp_path: Path) -> None:
    for world in (1, 2, 4):  # of four, one gets no chunk
        program = CACHE.format(place=str(place), data=str(place / "data"), root=str(tmp_path / str(world)))
        assert start(world, program) == [0] * world
    caches = {world: next((tmp_path / str(world)).glob("*/")) for world in (1, 2, 4)}
    assert len({cache.name for cache in caches.values()}) == 1
    manifests = []
    for cache in caches.values():
        assert sorted(file.name for file in cache.iterdir()) == ["features", "manifest.json", "pooled"]
        for file in ("features", "pooled"):
            assert (cache / file).read_bytes() == (caches[1] / file).read_bytes()
        manifests.append(json.loads((cache / "manifest.json").read_text()) | {"created": ""})
    assert manifests[0] == manifests[1] == manifests[2]


def test_a_cache_build_of_two_is_killed_and_gone_on_with(start: Starter, place: Path, tmp_path: Path) -> None:
    program = CACHE.format(place=str(place), data=str(place / "data"), root=str(tmp_path / "caches"))

    def begun() -> bool:
        return any((tmp_path / "caches").glob("*/part-*-of-2/progress.json"))

    slow = program.replace("with processes", "import time\n    from bla import cache\n    old = cache._try_read\n"
        "    cache._try_read = lambda *a: (time.sleep(.01), old(*a))[1]\n    with processes")  # fmt: skip
    assert start(2, slow, begun) == [-signal.SIGKILL] * 2
    assert not list((tmp_path / "caches").glob("*/manifest.json"))
    assert start(2, program) == [0, 0]
    assert start(1, program.replace(str(tmp_path / "caches"), str(tmp_path / "one"))) == [0]
    for file in ("features", "pooled"):
        two, one = (next((tmp_path / name).glob(f"*/{file}")).read_bytes() for name in ("caches", "one"))
        assert two == one
