"""The command: contracts of output and exit codes, interruption, broken input, documentation."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from cyclopts import App
from PIL import Image
from safetensors import SafetensorError

import bla
from bla import BlaError
from bla.cli import app, run_command
from bla.cli.sharing import listening
from bla.explanations.explanation import Explanation
from bla.training.settings import Settings
from forked import Starter

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=32, padding=4), nn.ReLU())
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
"""


def photo(seed: int, colour: int) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 120, (40, 60, 3), np.uint8)
    pixels[10:30, 20:50, colour] += 130
    return Image.fromarray(pixels)


TRAIN = ["train", "data", "--model", "tinynet:build", "--epochs", "2", "--out", "run"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the user's own classifier, images of two classes, and a run."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "tinynet.py").write_text(NET)
    for split, count in (("train", 12), ("test", 6)):
        for colour, name in enumerate(("blue", "red")):
            place = folder / "data" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                photo(index + 100 * colour + (split == "test") * 1000, 2 * (1 - colour)).save(place / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("BLA_CACHE", str(folder / "cache"))
        patch.delitem(sys.modules, "tinynet", raising=False)
        assert run_command(TRAIN) == 0
    return folder


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the classifier and the images: no run yet, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BLA_TRUST_CODE", "tinynet:build")
    monkeypatch.delitem(sys.modules, "tinynet", raising=False)
    shutil.copy(original / "tinynet.py", tmp_path)
    shutil.copytree(original / "data", tmp_path / "data")
    return tmp_path


@pytest.fixture
def run(original: Path, place: Path) -> Path:
    """A run in the working folder, and its cached features."""
    shutil.copytree(original / "cache", place / "cache")
    return Path(shutil.copytree(original / "run", place / "run"))


def test_train_evaluate_explain(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*TRAIN, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {
        "schema_version",
        "setup",
        "backbone",
        "transform",
        "classes",
        "data",
        "seed",
        "versions",
        "metrics",
    } <= set(record)
    assert record["classes"] == ["blue", "red"]
    assert run_command(["evaluate", "run", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == record["metrics"]
    assert metrics["images"] == 12
    assert set(metrics["size"]) == {"mean", "std", "min", "median", "max", "cells"}

    photos = [f"data/test/red/{index}.png" for index in range(3)]
    assert run_command(["explain", *photos, "--run", "run", "--size", "5", "--out", "why", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == photos
    for line in lines:
        assert line["size"] == 5 == np.sum(line["selected"])
        assert line["region"] == [0, 0, 60, 40]
        saved = Explanation.load(place / "why" / f"{Path(line['image']).stem}.json")
        assert saved.to_dict() == line
        with Image.open(place / "why" / f"{Path(line['image']).stem}.png") as picture:
            assert picture.height >= 160


def test_a_class_can_be_asked_about(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*TRAIN, "--class-aware", "--hidden", "4", "--mean-size", "8", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["setup"] == "BLA, class-aware"
    assert record["mean_size"]["asked"] == 8
    assert record["mean_size"]["test"] == record["metrics"]["size"]["mean"]
    recommended = [*TRAIN[:-1], "other", "--setup", "recommended", "--no-class-aware", "--hidden", "2", "--json"]
    assert run_command(recommended) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["class_aware"], settings["hidden"], settings["mean_size"]) == (False, [2], 8)
    assert (settings["epochs"], settings["head_epochs"], settings["straight_through"]) == (2, 15, 0.5)
    photo = "data/test/red/0.png"
    for target in ("blue", "0"):
        assert run_command(["explain", photo, "--run", "run", "--target", target, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["target"] == 0
    assert run_command(["explain", photo, "--run", "run", "--target", "green", "--json"]) == 2
    assert "expected a class of tinynet:build by name, or by index from 0 to 1, got 'green'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "epochs"),
    [("recommended --head own", 10), ("bla-px --head own --epochs 3", 3), ("bla-px --batch-size 8", 10)],
)
def test_what_a_setup_leaves_out_is_its_own(options: str, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    def train(data: str, out: Path, settings: Settings, **_: Any) -> None:
        seen.append(settings)
        raise BlaError("enough")

    monkeypatch.setattr("bla.runs.run.train", train)
    assert run_command(["train", "data", "--out", "run", "--setup", *options.split()]) == 2
    assert [(each.setup, each.head.targets, each.stages.epochs) for each in seen] == [("bla-px", "predictions", epochs)]


def test_without_json_it_prints_for_people(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(TRAIN) == 0
    out = capsys.readouterr().out
    assert "hard selection" in out
    assert "bla explain PHOTO --run run" in out
    assert run_command(["explain", "data/test/red", "--run", "run"]) == 0
    out = capsys.readouterr().out
    assert out.count("of 49 cells") == 6
    assert len(list((place / "why").glob("[0-9].png"))) == 6
    photo = str(next(Path("data/test/red").iterdir()))
    assert run_command(["explain", photo, "--run", "run", "--check", "--fill", "blur"]) == 0
    assert "; from these pixels alone: " in capsys.readouterr().out
    assert run_command(["explain", photo, "--run", "run", "--check", "--fill", "blur", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["fill"] == "blur"
    assert run_command(["explain", photo, "--run", "run", "--check", "--fill", "black"]) == 2


def test_ten_broken_files_are_reported_and_the_rest_is_done(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (place / "data/train/red/0.png").read_bytes()
    broken = [b"", b"text", whole[:60], whole[:-30], b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF", b"%PDF", bytes(500)]
    for index, content in enumerate(broken):
        (place / "data/train/red" / f"broken{index}.png").write_bytes(content)
    assert run_command([*TRAIN, "--json"]) == 3
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert len(record["skipped"]) == 10
    assert record["data"]["images"]["train"] == 24
    assert all(f"broken{index}.png" in captured.err for index in range(10))

    assert run_command(["explain", "data/train/red", "missing.jpg", "--run", "run", "--json"]) == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(set(line) == {"image", "error"} for line in lines) == 11
    assert sum("prediction" in line for line in lines) == 12


def test_a_size_is_certified_and_used(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = "data/test/red/0.png"
    assert run_command(["explain", photo, "--run", "run", "--size", "certified", "--json"]) == 2
    assert "expected a certificate of run, got none" in capsys.readouterr().err
    asked = ["calibrate", "run", "data", "--for", "agreement", "--share"]
    assert run_command([*asked, "0.9"]) == 2
    assert "expected at least 29 photos for a share of 0.9" in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "run" / "certificate.json").exists()
    assert run_command([*asked, "0.5", "--json"]) == 0
    certificate = json.loads(capsys.readouterr().out)
    assert certificate == json.loads((place / "run" / "certificate.json").read_text())
    assert run_command([*asked, "0.5"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"certificate: from the .*best cells? alone .* at least 50% of photos like those 12 \(95%", said)
    assert run_command(["evaluate", "run"]) == 0
    assert said in capsys.readouterr().out
    certified = ["explain", photo, "--run", "run", "--size", "certified"]
    assert run_command([*certified, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["size"] == certificate["size"]
    assert said in captured.err
    (place / "run" / "certificate.json").rename(place / "c.json")
    assert run_command([*certified, "--certificate", "c.json", "--json"]) == 0
    assert run_command([*certified, "--certificate", "c.json", "--target", "red"]) == 2
    assert "expected no --target" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere", "--out", "x"], "nowhere: expected a folder of images"),
        (["train", "data", "--out", "x", "--model", "no_such_net"], "expected the name of a timm model"),
        (["train", "data", "--out", "x", "--epochs", "0"], "expected epochs of at least 1"),
        (["train", "data", "--out", "x", "--epochs", "many"], "many"),
        (["train", "data", "--out", "x", "--threshold", "high"], "Invalid value for --threshold: unable to convert"),
        (["train", "data", "--out", "x", "--device", "cuda:99"], "expected device"),
        (["train", "data", "--out", "tinynet.py", "--model", "tinynet:build"], "expected a folder for the run"),
        (["evaluate", "nowhere"], "expected a run folder or a shipped explainer"),
        (["explain", "photo.jpg", "--run", "nowhere"], "expected a run folder"),
        (["explain", "data/test/red/0.png", "--size", "50"], "expected a size from 1 to 49"),
        (["explain", "cache"], "expected images"),
        (["cache", "remove", "abc"], "expected the key of a cache"),
        (["cache", "remove"], "expected keys of caches to remove"),
        (["cache", "remove", "--beyond", "-1"], "-1"),
        (["cache", "remove", "--beyond", "nan"], "nan"),
        (["explode"], "explode"),
        (["train"], "requires an argument"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "cache").mkdir()
    assert run_command(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("bla: ")
    assert message in last
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["explain", "data/test/red/0.png", "--run", "run", "--target", "rde"], "did you mean 'red'?"),
        (
            ["explain", "data/test/red/0.png", "--run", "run", "--siz", "3"],
            "Did you mean --size? (see bla explain --help)",
        ),
        (["compare", "run", "--methods", "gradcam"], "did you mean 'grad-cam'"),
        (["exprot", "run"], 'Did you mean "export"?'),
    ],
)
def test_near_matches_are_named(arguments: list[str], near: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    assert near in capsys.readouterr().err


def test_a_taken_port_is_one_line_and_no_address(capsys: pytest.CaptureFixture[str]) -> None:
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert run_command(["serve", "nowhere", "--port", str(port)]) == 2
    said = f"bla: expected a free port at 127.0.0.1:{port}, got: Address already in use; choose another --port\n"
    assert capsys.readouterr().err == said


def test_the_shell_completes(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.delenv("ZSH_CUSTOM", raising=False)
    assert run_command(["completion", "--shell", "fish"]) == 0
    script = Path(capsys.readouterr().out.removeprefix("New shells complete bla, by ").rstrip(".\n"))
    assert script.is_relative_to(place)
    text = script.read_text()
    assert all(word in text for word in ("explain", "mean-size", "rehearse"))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.strip() == bla.__version__ == metadata.version("bounded-logit-attention")


def test_the_ten_common_options_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "--help"]) == 0
    groups = capsys.readouterr().out.split("╭─ ")[1:]
    assert [group.split(" ─")[0] for group in groups[:3]] == ["Arguments", "Common options", "The classifier"]
    assert len(re.findall(r"^│ [* ]  --", groups[1], re.M)) == 10


def test_our_faults_exit_1_with_a_traceback(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr("bla.runs.run.train", fault)
    assert run_command(TRAIN) == 1
    assert "Traceback" in capsys.readouterr().err


def test_explain_resumes(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explain = ["explain", "data/test/red", "--run", "run", "--out", "why", "--json"]
    written = 0
    save = Explanation.save

    def interrupted(self: Explanation, path: Path) -> Path:
        nonlocal written
        if written == 2:
            raise KeyboardInterrupt
        written += 1
        return save(self, path)

    monkeypatch.setattr(Explanation, "save", interrupted)
    assert run_command(explain) == 130
    assert "rerun the command to resume" in capsys.readouterr().err
    monkeypatch.setattr(Explanation, "save", save)
    kept = {path: path.stat().st_mtime_ns for path in (place / "why").glob("[0-9]*.json")}
    assert len(kept) == 2
    assert run_command(explain) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
    # a photo that changed, and another size, are explained anew
    time.sleep(0.01)
    photo(7, 1).save(place / "data/test/red/0.png")
    assert run_command(explain) == 0
    assert capsys.readouterr().out.splitlines()[0] != lines[0]
    assert run_command([*explain, "--size", "3"]) == 0
    assert {json.loads(line)["size"] for line in capsys.readouterr().out.splitlines()} == {3}


KILLED = """
import os, signal, sys, torch

os.chdir({place!r})
sys.path.insert(0, {place!r})
torch.set_num_threads({threads})

renames = 0

def kill(event, arguments):
    global renames
    if event == "os.rename" and "checkpoint-" in str(arguments[1]):
        renames += 1
        if renames == 4:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
from bla.cli import run_command

run_command({command!r})
"""
"""The command, killed as it moves its fourth checkpoint into place."""


def test_a_killed_training_gives_the_same_run(
    start: Starter, run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*TRAIN[:-1], "killed"]
    program = KILLED.format(place=str(place), threads=torch.get_num_threads(), command=again)
    assert start(1, program) == [-signal.SIGKILL]
    assert not (place / "killed" / "run.json").exists()
    assert len(list((place / "killed").glob("checkpoint-*"))) == 2
    assert run_command(again) == 0
    assert "resumed" in capsys.readouterr().err
    for file in ("model.safetensors", "log.jsonl"):
        assert (place / "killed" / file).read_bytes() == (run / file).read_bytes()
    assert not list((place / "killed").glob("*checkpoint-*"))


def test_caches_are_listed_checked_and_removed(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cache", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["caches"]
    assert sorted(entry["images"] for entry in entries) == [12, 24]
    assert all(entry["complete"] for entry in entries)
    assert run_command(["cache", "check"]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    features = place / "cache" / entries[0]["key"] / "features"
    content = bytearray(features.read_bytes())
    content[1000] ^= 1
    features.write_bytes(content)
    assert run_command(["cache", "check"]) == 3
    assert "damaged: features" in capsys.readouterr().out
    features.with_name("manifest.json").write_text("{")
    assert run_command(["cache", "check"]) == 3
    assert "damaged: its record" in capsys.readouterr().out
    assert run_command(["evaluate", "run"]) in (0, 2)  # whichever split the damage is in, no wrong figure
    assert run_command(["cache", "remove", entries[0]["key"][:10]]) == 0
    assert run_command(["cache", "remove", "--all"]) == 0
    assert run_command(["evaluate", "run"]) == 0


def test_help_is_light_and_describes_every_command() -> None:
    code = "import sys, bla.cli\ntry:\n bla.cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'timm', 'PIL', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in app:
        if not name.startswith("-"):
            assert re.search(rf"^│ {name} +[A-Z]\S+ \w+", done.stdout, re.M), name


def commands(group: App, *above: str) -> Iterator[tuple[str, ...]]:
    for name in group:
        if not name.startswith("-"):
            yield (*above, name)
            yield from commands(group[name], *above, name)


@pytest.mark.parametrize("command", list(commands(app)), ids=" ".join)
def test_every_command_shows_an_example(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: `bla {' '.join(command)}" in text


def test_a_closed_pipe_is_no_fault() -> None:
    program = """
from bla.cli import app, main

@app.command
def flood():
    for line in range(100_000):
        print(line)

main(["flood"])
"""
    command = f"{shlex.join([sys.executable, '-c', program])} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "0"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB"),
        SafetensorError("header too large"),
        sqlite3.DatabaseError("file is not a database"),
        pyarrow.ArrowException("magic bytes"),
        zipfile.BadZipFile("not a zip file"),
        zlib.error("incorrect header check"),
        OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
        OSError(errno.ELOOP, "Too many levels of symbolic links", "a\x1b[2Jb\udcff"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_others_become_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("bla.training.cache.listed", fail)
    assert run_command(["cache", "list"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bla: expected ")
    assert line.isprintable()


def test_a_batch_needs_a_place_that_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["batch", "photos", "memory://out"]) == 2
    assert "expected a place that outlives the command, got memory://out" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--host 0.0.0.0", "--proxy 10.0.0.2", "--url study.example.org", "--host ::"])
def test_where_a_study_is_found_must_be_said(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["study", "serve", "x", *options.split()]) == 2
    assert "expected --url" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "serve x --port 70000", "serve x --megabytes inf", "serve x --latency 1e15", "serve x --megapixels nan",
        "serve x --queue 0", "study serve x --joins-a-minute nan", "study power --simulations 1000000000000",
        "train x --out r --hidden 1000000000", "train x --out r --learning-rate inf", "batch a b --workers 0",
        "compare r --limit -3", "calibrate r p --share nan", "train x --out r --epochs 99999999999999999999",
        "explain x --size 99999999999999999999",
    ],
)  # fmt: skip
def test_numbers_have_ranges(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"Must be|expected \w+ (above|channels|of at least)|expected joins_a_minute above 0", line)
