"""Several processes: one cache, one writer, a trunk that all of them train, kills and resumes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from forked import Starter
from small import assert_same

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

def plain():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=16, padding=4), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.ReLU())
    return small(nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))

def normed():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=16, padding=4), nn.BatchNorm2d(8), nn.Dropout2d(0.2), nn.ReLU())
    return small(nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the user's, 43 images to train on and 9 to test, some broken: nothing divides by two."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "tinynet.py").write_text(NET)
    for split, count in (("train", 21), ("test", 4)):
        for label, name in enumerate(("blue", "red")):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(count + label):
                pixels = np.random.RandomState([index, label]).randint(0, 120, (20, 30, 3), np.uint8)
                pixels[5:15, 5:20, 2 * (1 - label)] += 130
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{index}.png")
    (folder / "data" / "train" / "blue" / "7.png").write_bytes(b"broken")
    (folder / "data" / "train" / "red" / "21.png").write_bytes(b"broken")
    (folder / "data" / "test" / "red" / "3.png").write_bytes(b"")
    return folder


CACHE = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {place!r})
    import tinynet
    from bla.training import distributed
    from bla.training.cache import cached_features
    from bla.model.classifier import explainable
    from bla.data.image_sets import image_folder
    with distributed.joined():
        found = cached_features(explainable(tinynet.build()), image_folder({data!r}).train, root=Path({root!r}))
        assert len(found.features) == 43
        assert len(found.failures) == 2
"""


def test_the_cache_of_several_is_that_of_one(start: Starter, place: Path, tmp_path: Path) -> None:
    for world in (1, 2, 7):  # of seven, one gets no chunk
        program = CACHE.format(place=str(place), data=str(place / "data"), root=str(tmp_path / str(world)))
        assert start(world, program) == [0] * world
    caches = {world: next((tmp_path / str(world)).glob("*/")) for world in (1, 2, 7)}
    assert len({cache.name for cache in caches.values()}) == 1
    manifests = []
    for cache in caches.values():
        assert sorted(file.name for file in cache.iterdir()) == ["features", "manifest.json", "pooled"]
        for file in ("features", "pooled"):
            assert (cache / file).read_bytes() == (caches[1] / file).read_bytes()
        manifests.append(json.loads((cache / "manifest.json").read_text()) | {"created": ""})
    assert manifests[0] == manifests[1] == manifests[2]


def test_the_masked_answers_of_two_are_those_of_one(start: Starter, place: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        program = CACHE.format(place=str(place), data=str(place / "data"), root=str(tmp_path / str(world)))
        program = program.replace("cache import cached_features", "masked import masked_answers as answers_to")
        program = program.replace("cached_features(", "answers_to(").replace("root=", "count=4, root=")
        assert start(world, program.replace("found.features", "found.answers")) == [0] * world
    one, two = (next((tmp_path / name).glob("*/")) for name in ("1", "2"))
    for file in ("targets", "masks", "answers"):
        assert (two / file).read_bytes() == (one / file).read_bytes()


def test_a_cache_build_of_two_is_killed_and_resumed(start: Starter, place: Path, tmp_path: Path) -> None:
    program = CACHE.format(place=str(place), data=str(place / "data"), root=str(tmp_path / "caches"))

    def begun() -> bool:
        return any((tmp_path / "caches").glob("*/part-*-of-2/progress.json"))

    slow = program.replace("with distributed", "import time\n    from bla.data.photo import Transform\n"
        "    read = Transform.read\n    Transform.read = lambda *given: (time.sleep(.05), read(*given))[1]\n"
        "    with distributed")  # fmt: skip
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
    from bla.progress import silent
    from bla.training import checkpoint, loop
    from bla.training.settings import Settings
    out = Path({out!r})
    for name, (model, settings) in {families!r}.items():
        made = Settings(**settings)
        run.train({data!r}, out / name, made, model=getattr(tinynet, model)(), cache=out, report=silent)
"""

FEW: dict[str, Any] = {"epochs": 2, "head_epochs": 1, "learning_rate": 0.01, "batch_size": 20, "dropout": 0.0}
"""41 photos in batches of 20: the last one is of a single photo."""
FROZEN = {
    "draws": ("build", FEW | {"setup": "l2x-f", "size": 2}),
    "judged": ("build", FEW | {"class_aware": True, "mean_size": 3.0, "hidden": (4,), "threshold": 0.0}),
}
TUNED = {
    "bounded": ("plain", FEW | {"trunk_rate": 0.01, "straight_through": 0.5, "dial": 0.5, "mean_size": 3.0}),
    "watched": ("plain", FEW | {"trunk_rate": 0.01, "setup": "bla-ph", "validation": 0.1, "patience": 1}),
}
NORMED = {"normed": ("normed", FEW | {"trunk_rate": 0.01, "dropout": 0.2, "augment": True, "batch_size": 16})}


def trained(start: Starter, place: Path, out: Path, world: int, families: Any) -> None:
    program = TRAIN.format(place=str(place), data=str(place / "data"), out=str(out), families=families)
    assert start(world, program) == [0] * world


@pytest.fixture(scope="module")
def by_one(start: Starter, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("by-one")
    trained(start, place, out, 1, FROZEN | TUNED | NORMED)
    return out


def parts(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Weights, record without what differs from run to run, and log."""
    record = json.loads((folder / "run.json").read_text())
    for key in ("created", "seconds", "trunk"):
        record.pop(key, None)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return load_file(folder / "model.safetensors"), record, log


def assert_alike(came: Path, expected: Path, tolerance: float = 1e-4) -> None:
    """The same but for rounding: gradients are summed in another order."""
    (weights, record, log), (weights_of_one, record_of_one, log_of_one) = parts(came), parts(expected)
    assert set(weights) == set(weights_of_one)
    for key, value in weights_of_one.items():
        torch.testing.assert_close(weights[key], value, rtol=tolerance, atol=tolerance, msg=f"{came.name}: {key}")
    metrics, metrics_of_one = record.pop("metrics"), record_of_one.pop("metrics")
    for name in ("baseline", "baseline_continued", "soft", "soft_renormalised", "hard"):
        assert metrics[name] == pytest.approx(metrics_of_one[name], rel=100 * tolerance), name
    assert metrics["images"] == metrics_of_one["images"] == 8
    assert record == record_of_one
    assert [line["stage"] for line in log] == [line["stage"] for line in log_of_one]
    for line, line_of_one in zip(log, log_of_one, strict=True):
        assert line["loss"] == pytest.approx(line_of_one["loss"], rel=100 * tolerance)


def test_from_cached_features_several_train_exactly_what_one_trains(
    start: Starter, place: Path, by_one: Path, tmp_path: Path
) -> None:
    trained(start, place, tmp_path, 2, FROZEN)
    for name in FROZEN:
        (weights, *others), (weights_of_one, *others_of_one) = parts(tmp_path / name), parts(by_one / name)
        assert others == others_of_one
        assert_same(weights, weights_of_one)


@pytest.mark.parametrize("world", [2, 3])
def test_several_fine_tune_what_one_fine_tunes(
    world: int, start: Starter, place: Path, by_one: Path, tmp_path: Path
) -> None:
    """Without batch normalisation, dropout and augmentation; with three, two have no part of the last batch."""
    trained(start, place, tmp_path, world, TUNED)
    for name in TUNED:
        assert_alike(tmp_path / name, by_one / name)


def test_batch_normalisation_and_dropout_are_each_processes_own(
    start: Starter, place: Path, by_one: Path, tmp_path: Path
) -> None:
    trained(start, place, tmp_path, 2, NORMED)
    (weights, record, log), (weights_of_one, _, log_of_one) = parts(tmp_path / "normed"), parts(by_one / "normed")
    assert all(value.isfinite().all() for value in weights.values())
    running = [key for key in weights if key.endswith("running_mean")]
    assert len(running) == 3
    assert not any(torch.equal(weights[key], weights_of_one[key]) for key in running)
    for line, line_of_one in zip(log, log_of_one, strict=True):
        assert line["loss"] == pytest.approx(line_of_one["loss"], rel=0.2)
    assert record["metrics"]["images"] == 8


def test_one_of_two_is_killed_and_any_number_resumes(start: Starter, place: Path, by_one: Path, tmp_path: Path) -> None:
    families = {"bounded": TUNED["bounded"]}
    dying = TRAIN.replace("    for name, (", """    loop.CHECKPOINT_SECONDS = 0
    from torch.optim import Adam
    step, taken = Adam.step, 0
    def killed(optimiser, *given):
        global taken
        step(optimiser, *given)
        taken += 1
        if rank == 1 and taken == 5:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
    Adam.step = killed
    for name, (""")  # fmt: skip
    dying = dying.replace("        run.train(", "        try: run.train(").replace("report=silent)", """report=silent)
        except Exception as error:
            (out / 'error').write_text(repr(error))
            raise""")  # fmt: skip
    program = dying.format(place=str(place), data=str(place / "data"), out=str(tmp_path), families=families)
    assert start(2, program) == [1, -signal.SIGKILL]
    error = (tmp_path / "error").read_text()
    assert error.startswith("ProcessError('expected all 2 processes at work, but one has ended")
    assert len(list((tmp_path / "bounded").glob("checkpoint-*"))) <= 2, "the first process alone writes"
    assert not (tmp_path / "bounded" / "run.json").exists()
    shutil.copytree(tmp_path / "bounded", tmp_path / "again" / "bounded")
    trained(start, place, tmp_path, 2, families)
    trained(start, place, tmp_path / "again", 1, families)
    for out in (tmp_path, tmp_path / "again"):
        assert_alike(out / "bounded", by_one / "bounded")
        left = sorted(file.name for file in (out / "bounded").glob("[!.]*"))
        assert left == ["log.jsonl", "model.safetensors", "run.json"]


def test_the_command_trains_and_measures_by_several(start: Starter, place: Path, tmp_path: Path) -> None:
    """By torchrun's agent, here with forked processes; every image counts once, and one process prints."""
    launch = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc-per-node", "2", "-m", "bla"]
    options = f"--out {tmp_path}/run --model tinynet:build --epochs 1 --cache {tmp_path}/cache --json".split()
    program = f"""
    import os, sys
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args
    from bla.cli import run_command
    sys.path.insert(0, {str(place)!r})
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join({str(tmp_path)!r}, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    config, _, command = config_from_args(parse_args({[*launch, "train", str(place / "data"), *options]!r}))
    config.start_method = "fork"
    codes = elastic_launch(config, run_command)(command[3:])
    assert codes == {{0: 3, 1: 0}}, codes  # done but for broken photos, which one process says
    """
    done = start(1, program)
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert done == [0], err
    assert err.count("skipped ") == 3, err
    metrics = json.loads(out)["metrics"]
    assert metrics["images"] == 8
    program = f"""
    import contextlib, sys
    sys.path.insert(0, {str(place)!r})
    from bla.cli import run_command
    with open({str(tmp_path)!r} + f"/said-{{rank}}", "w") as said, contextlib.redirect_stdout(said):
        trusted = ["--trust-code", "tinynet:build", "--json"]
        run_command(["evaluate", {str(tmp_path / "run")!r}, "--cache", {str(tmp_path / "other")!r}, *trusted])
    """
    assert start(3, program) == [0] * 3
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(3)]
    assert said[1:] == ["", ""]
    measured = json.loads(said[0])
    for name, value in metrics.items():
        assert measured[name] == pytest.approx(value, rel=1e-6), name
