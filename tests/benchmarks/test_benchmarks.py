"""The benchmarks run, at a small size: their code is what the claims stand on."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.paper import tables
from bla.data import embedded
from small_study import small_study

Run = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.write(tmp_path_factory.mktemp("data") / "embedded", train=24, test=8)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """What a benchmark prints, run in this process: a process for each would load torch anew."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(f"benchmarks.{name}").main()
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_performance(run: Run, data: Path) -> None:
    options = ["--images", "2", "--epochs", "1", "--rounds", "1", "--batch", "1", "--json"]
    results = json.loads(run("speed.performance", data, "--only", "speedup", "caching", "explained", *options))
    assert set(results["speedup"]["by_setup"]) == {"bla", "bla-t", "bla-ph", "l2x-f"}
    # no bounds on a ratio of so few images: other work on the machine moves it; the claim is measured at full size
    assert all(results[name]["value"] > 0 for name in ("speedup", "caching", "explained"))


def test_memory_of_training_is_measured(run: Run) -> None:
    assert int(run("speed.performance", "--train-on-random-features", "40")) > 10_000


def test_judging(run: Run, tmp_path: Path) -> None:
    figures = json.loads(run("speed.judging", "--out", tmp_path, "--images", "70", "--methods", "2", "--json"))
    assert figures["images"] == 70
    assert list(figures["seconds"]) == ["2"]


def test_masked_answers(run: Run) -> None:
    options = ["--models", "test_resnet", "--photos", "2", "--count", "4", "--rounds", "1", "--json"]
    figures = json.loads(run("speed.masked_answers", *options))
    assert all(value > 0 for value in figures["test_resnet"].values())


class Pool:
    """As a process pool that is done at once: a task and its figures are pickled."""

    def __init__(self, jobs: int, **_: Any) -> None:
        assert jobs == 1

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(task))())))
        return done


def test_paper(run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ProcessPoolExecutor", Pool)
    setups = ["bla"]
    options = ["--out", tmp_path / "runs", "--setups", *setups, "--epochs", "1"]
    text = run("paper.tables", data, *options, "--folds", "2", "--jobs", "0")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows == ["setup", *setups] * 2
    figures = json.loads((tmp_path / "runs" / "paper.json").read_text())["embedded"]
    mean, half_width = figures["bla"]["size"]
    assert 1 <= mean <= 49
    assert half_width >= 0
    assert figures["bla"]["runs"] == 2
    assert (tmp_path / "runs" / "paper.md").read_text().strip() == text.strip()
    resumed = json.loads(run("paper.tables", data, *options, "--seeds", "1", "--json"))["embedded"]  # by a pool
    first = json.loads((tmp_path / "runs" / "embedded" / "bla-0" / "figures.json").read_text())
    assert resumed["bla"]["runs"] == 1
    assert resumed["bla"]["megabytes"][0] == first["megabytes"], "a finished run is kept"


def test_ablation(run: Run, data: Path, tmp_path: Path) -> None:
    options = ["--out", tmp_path / "runs", "--groups", "start", "--seeds", "1", "--epochs", "1"]
    tables = json.loads(run("paper.ablation", data, *options, "--json"))
    assert set(tables) == {"start"}
    dead = {name: row["dead starts"] for name, row in tables["start"].items()}
    assert dead["zero"] == 100
    assert dead["calibrated to the features"] == 0
    assert tables["start"]["zero"]["dead"] == 1
    assert tables["start"]["zero"]["size"][0] == 49


def test_the_shortcut_of_a_biased_classifier_is_exposed(run: Run, shared_data: Path, tmp_path: Path) -> None:
    """Planted evidence on real features: a poisoned classifier's shortcut is what its explanations show."""
    torch.set_num_threads(1)  # the order of summation depends on the number of threads
    small = ["--classes", "3", "--photos", "14", "--kinds", "biased", "--settings", "BLA", "--masks", "8"]
    options = ["--out", tmp_path, *small, "--seeds", "1", "--json"]
    found = json.loads(run("faithfulness.planted", shared_data / "birds100", *options))["biased, BLA"]
    # bounds for a small training; the figures at full size are in docs/background/evidence.md
    assert found["first_if_marked"] > found["first_if_plain"] + 0.5  # biased, else there is nothing to expose
    assert found["explanations"] > 15
    covered = {name: share["mean"] for name, share in found["covered"].items()}
    assert covered["bla"] > 0.9
    assert covered["bla"] > covered["centre"] + 0.2
    assert covered["bla"] > covered["random"] + 0.5
    assert found["default"]["untrained"]["covered own"]["mean"] > 0.9
    assert found["default"]["fitted"]["size decisive"]["mean"] >= 1


def test_contact(run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with its weights, and one whose weights cannot be had: the sheet tells them apart."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
    options = ["--out", tmp_path / "out", "--models", "tf_efficientnet_lite0", "test_resnet", "--classes", "2"]
    run("models.contact", data, *options, "--photos", "2", "--seconds", "2")
    known, random = json.loads((tmp_path / "out" / "contact.json").read_text())
    assert (known["trunk"], random["trunk"]) == ("ImageNet weights", "random trunk")
    assert len(known["explanations"]) == 2
    assert {found["prediction"]["label"] for found in known["explanations"]} <= set(embedded.CLASSES[:2])
    with Image.open(tmp_path / "out" / "contact.png") as sheet:
        assert sheet.width > 2 * 150
        drawn = np.asarray(sheet.convert("L"))
    assert all((part < 128).any() for part in np.array_split(drawn, 3))  # the photos, and a row for each model


def test_study_analysis(run: Run, tmp_path: Path) -> None:
    study, _ = small_study(tmp_path)
    options = ["--studies", "6", "--people", "12", "--photos", "12", "--share", "0.75"]
    rehearsing = ["--study", study, "--rehearsals", "2", "--rehearsing", "3"]
    figures = json.loads(run("study.analysis", *options, *rehearsing, "--json"))
    assert figures["simulated"] is True
    assert all(row["found"] <= 0.5 and row["by_arrays"]["found"] < 0.15 for row in figures["null"])
    assert all(row["found"] > 0.3 and row["promised"] >= 0.8 for row in figures["effect"])
    assert figures["rehearsals"]["same_answers"] == figures["rehearsals"]["same_results"] == 2


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_study_load(run: Run, kind: str) -> None:
    """Nothing lost or doubled."""
    server = os.environ.get("BLA_TEST_POSTGRESQL")
    if kind == "postgresql" and not server:
        if os.environ.get("CI"):
            pytest.fail("expected BLA_TEST_POSTGRESQL in CI")
        pytest.skip("needs BLA_TEST_POSTGRESQL, the URL of a PostgreSQL server to make databases on")
    small = ["--people", "6", "--trials", "8", "--thinking", "0.05", "--arriving", "1", "--limit", "60000"]
    small += ["--db", str(server)] if kind == "postgresql" else []
    found = json.loads(run("study.load", *small, "--kills", "1", "--json"))
    assert found["passed"]
    assert (found["finished"], found["answers"], found["kills"]) == (6, 48, 1)
    assert (found["lost"], found["doubled"], found["changed"]) == (0, 0, 0)


def test_preprocessing(run: Run, tmp_path: Path) -> None:
    for index in range(2):
        pixels = np.random.RandomState(index).randint(0, 256, (260, 300 + index, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    printed = run("faithfulness.preprocessing", tmp_path, "--weights", "random", "--json")
    (found,) = json.loads(printed).values()
    assert (found["photos"], found["ours"], found["pixels"]) == (2, 1, 1)
