"""Several processes as one: one cache, one writer, kills and resumes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ZYGOTE = """
import json, os, sys, traceback
import torch
from torch.distributed import distributed_c10d
from bla.runs import run
from bla.training import loop as training
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
from bla.data.photo import Transform

def small(net):
    net.transform = Transform((64, 64), (0.5,) * 3, (0.5,) * 3)
    return net

def build():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=16, padding=4), nn.ReLU())
    return small(nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))

class Deep(nn.Module):
    # some rows skip a layer, by a draw; dropout and batch normalisation are in the way of all
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 9, stride=16, padding=4, bias=False), nn.Conv2d(8, 8, 1)
        self.norm, self.dropout = nn.BatchNorm2d(8), nn.Dropout2d(0.2)
    def forward(self, x):
        x = self.dropout(self.norm(self.first(x)))
        if self.training:
            x = x + self.second(x) * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.7)
        return x

def deep():
    torch.manual_seed(0)
    return small(nn.Sequential(Deep(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
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
    from bla.training import processes
    from bla.training.cache import cached_features
    from bla.model.classifier import explainable
    from bla.data.image_sets import image_folder
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


# --- training

TRAIN = """
    import sys
    sys.path.insert(0, {place!r})
    import tinynet
    from pathlib import Path
    from bla.runs import run
    from bla.training import loop as training
    from bla.progress import silent
    from bla.training.settings import Settings
    out = Path({out!r})
    for name, (model, settings) in {families!r}.items():
        try:
            made = Settings(**settings)
            run.train({data!r}, out / name, made, model=getattr(tinynet, model)(), cache=out, report=silent)
        except Exception:
            print(name, flush=True, file=sys.stderr)
            raise
"""

FEW: dict[str, Any] = {"epochs": 1, "head_epochs": 1, "learning_rate": 0.01, "batch_size": 149}
"""299 photos in batches of 149: the last one is of a single photo."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout": ("build", FEW | {"epochs": 2, "batch_size": 32}),
    "draws": ("build", FEW | {"setup": "l2x-f", "size": 2}),
    "sizes": ("build", FEW | {"straight_through": 0.5, "dial": 0.5, "mean_size": 3.0, "final_temperature": 1.0}),
    "judged": ("build", FEW | {"class_aware": True, "mean_size": 3.0, "hidden": (4,), "threshold": 0.0}),
    "watched": ("build", FEW | {"setup": "bla-t", "epochs": 3, "validation": 0.1, "patience": 1}),
    "end to end": ("deep", FEW | {"trunk_rate": 0.01, "augment": True}),
    "in float16": ("deep", FEW | {"trunk_rate": 0.01, "precision": "float16"}),
}  # fmt: skip


def trained(start: Starter, place: Path, out: Path, world: int, **families: Any) -> None:
    program = TRAIN.format(place=str(place), data=str(place / "data"), out=str(out), families=families or FAMILIES)
    assert start(world, program) == [0] * world


@pytest.fixture(scope="module")
def by_one(start: Starter, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("by-one")
    trained(start, place, out, 1)
    return out


def assert_alike(came: Path, expected: Path, tolerance: float = 1e-4) -> None:
    one, two = (load_file(run / "model.safetensors") for run in (expected, came))
    assert set(one) == set(two)
    if (
        came.name == "draws"
    ):  # which a softmax does not see: what moves it is rounding, and Adam makes whole steps of it
        del one["attention.score.bias"]
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=tolerance, atol=tolerance, msg=f"{came.name}: {key}")
    first, second = (json.loads((run / "run.json").read_text()) for run in (expected, came))
    for record in (first, second):
        for key in ("created", "seconds", "trunk"):
            record.pop(key, None)
    metrics = [record.pop("metrics") for record in (first, second)]
    for name in ("baseline", "baseline_continued", "soft", "soft_renormalised", "hard"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=100 * tolerance), name
    assert metrics[1]["images"] == metrics[0]["images"] == 22
    assert first == second
    lines = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (expected, came)]
    assert [line["stage"] for line in lines[1]] == [line["stage"] for line in lines[0]]
    for came_line, line in zip(lines[1], lines[0], strict=True):
        assert came_line["loss"] == pytest.approx(line["loss"], rel=100 * tolerance)


@pytest.mark.parametrize("world", [2, 3])
def test_several_train_what_one_trains(world: int, start: Starter, place: Path, by_one: Path, tmp_path: Path) -> None:
    trained(start, place, tmp_path, world)
    for name in FAMILIES:
        # in half precision rounding turns the signs of small gradients
        assert_alike(tmp_path / name, by_one / name, 0.05 if name == "in float16" else 1e-4)


def test_one_of_two_is_killed_and_any_number_goes_on(start: Starter, place: Path, by_one: Path, tmp_path: Path) -> None:
    families = {"dropout": FAMILIES["dropout"]}
    dying = TRAIN.replace("    for name, (", """    training.CHECKPOINT_SECONDS = 0
    step = training._Session._step
    def killed(session, *given):
        step(session, *given)
        if rank == 1 and session.position.total_steps == 13:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
    training._Session._step = killed
    for name, (""")  # fmt: skip
    dying = dying.replace(
        "print(name, flush=True, file=sys.stderr)", "(out / 'error').write_text(repr(sys.exc_info()[1]))"
    )
    program = dying.format(place=str(place), data=str(place / "data"), out=str(tmp_path), families=families)
    assert start(2, program) == [1, -signal.SIGKILL]
    told = (tmp_path / "error").read_text()
    assert told.startswith("ProcessError('expected all 2 processes at work, but one has ended")
    assert len(list((tmp_path / "dropout").glob("checkpoint-*"))) == 1, "of the first process alone"
    assert not (tmp_path / "dropout" / "run.json").exists()
    shutil.copytree(tmp_path / "dropout", tmp_path / "again" / "dropout")
    trained(start, place, tmp_path, 2, **families)
    trained(start, place, tmp_path / "again", 1, **families)
    for out in (tmp_path, tmp_path / "again"):
        assert_alike(out / "dropout", by_one / "dropout")
        assert sorted(file.name for file in (out / "dropout").glob("[!.]*")) == [
            "log.jsonl",
            "model.safetensors",
            "run.json",
        ]


def test_the_command_trains_and_measures_by_several(start: Starter, place: Path, tmp_path: Path) -> None:
    """By torchrun itself; every image counts once, whatever the shares, and one of them tells."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bla"]
    options = f"--model tinynet:build --epochs 1 --cache {tmp_path}/cache --json".split()
    environment = os.environ | {"PYTHONPATH": f"{place}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "train", str(place / "data"), "--out", str(tmp_path / "run"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stderr.count("skipped ") == 3, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["images"] == 22
    program = f"""
    import contextlib, sys
    sys.path.insert(0, {str(place)!r})
    from bla.cli import run_command
    with open({str(tmp_path)!r} + f"/said-{{rank}}", "w") as said, contextlib.redirect_stdout(said):
        run_command(["evaluate", {str(tmp_path / "run")!r}, "--cache", {str(tmp_path / "cache")!r}, "--json"])
    """
    assert start(3, program) == [0] * 3
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(3)]
    assert said[1:] == ["", ""]
    measured = json.loads(said[0])
    for name, value in metrics.items():
        assert measured[name] == pytest.approx(value, rel=1e-6), name
