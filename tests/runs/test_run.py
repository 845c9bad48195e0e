"""Run folders: trained, measured against a slow recomputation, loaded, evaluated; and fitting in place."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bla
from bla.data.image_sets import ImageSet, image_folder
from bla.data.photo import DataError, Transform
from bla.model.attention import BoundedLogitAttention, L2XAttention
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.runs import run
from bla.runs.record import RunError
from bla.runs.run import evaluate, fit, load, open_run, pick_device, train
from bla.training import loop as training
from bla.training.cache import cached_features
from bla.training.photos import Photos, StreamedFeatures
from bla.training.settings import Settings, TrainingError
from small import CHANNELS, CLASSES, GRID, Tiny, as_files, photo, some_photos, write_classes

METRICS = {"baseline", "baseline_continued", "soft", "soft_renormalised", "hard", "agreement", "size", "images"}
QUICK = Settings(setup="bla-t", epochs=3, head_epochs=12, batch_size=8, learning_rate=0.005)
SHORT = Settings(setup="bla-t", epochs=1, batch_size=16)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Sums over several threads round another way; and for small networks one thread is faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLA_CACHE", str(tmp_path / "caches"))


@pytest.fixture(scope="session")
def data(colours: Path) -> Path:
    return colours


@pytest.fixture(scope="session")
def trained(tiny_run: Path) -> Path:
    """A run that tests read, or copy; by the settings QUICK."""
    return tiny_run


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# --- the folder


def test_the_folder_holds_what_the_contract_says(trained: Path, data: Path) -> None:
    assert files_of(trained) == ["log.jsonl", "model.safetensors", "run.json"]
    record = record_of(trained)
    contract = {
        "schema_version", "setup", "backbone", "transform", "classes", "data", "seed", "versions", "metrics",
    }  # fmt: skip
    assert contract <= set(record)
    assert (record["schema_version"], record["setup"], record["seed"]) == (1, "BLA-T", 0)
    assert record["classes"] == list(CLASSES)
    assert record["model"] == "tiny"
    assert record["backbone"]["name"] is None
    assert Transform.from_dict(record["transform"]).size == (24, 40)
    assert Settings.from_record(record["settings"]) == QUICK
    splits = image_folder(data)
    assert record["data"] == {
        "train": splits.train.digest(),
        "test": splits.test.digest(),
        "root": str(data.resolve()),
        "images": {"train": 30, "validation": 0, "test": 6},
    }
    assert {"python", "torch", "timm", "numpy", "bounded-logit-attention"} <= set(record["versions"])
    assert (record["dead"], record["epochs"], record["skipped"]) == (
        False, {"head": 12, "module": 3, "continued": 3}, [],
    )  # fmt: skip
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in log] == [
        (stage, epoch + 1) for stage, epochs in record["epochs"].items() for epoch in range(epochs)
    ]
    tensors = load_file(trained / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"attention", "baseline", "head", "continued"}

    metrics = record["metrics"]
    assert set(metrics) == METRICS
    for name in METRICS - {"agreement", "size", "images"}:
        assert set(metrics[name]) == {"loss", "top1", "top5"}
    assert set(metrics["size"]) == {"mean", "std", "min", "median", "max", "cells"}
    assert (metrics["images"], metrics["size"]["cells"]) == (6, 15)
    losses = [line["loss"] for line in log if line["stage"] == "head"]
    assert losses[-1] < losses[0]


def pixels_of(transform: Transform, images: ImageSet, index: int) -> Tensor:
    """Normalised pixels, (1, 3, h, w), by the definition."""
    values = (transform.read(images.path(index)).pixels / 255 - transform.mean) / transform.std
    return torch.from_numpy(values).permute(2, 0, 1)[None].float()


def slow_metrics(folder: Path, model: Tiny, images: ImageSet, settings: Settings) -> dict[str, Any]:
    """From the photos, one by one, without cache, wrapper or modules: the formulas and the tensors of the run.

    Features are rounded to float16 as the cache rounds them: near the bound a rounding can select a cell.
    """
    tensors = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    transform = Transform.from_dict(record_of(folder)["transform"])
    model = model.double().eval()
    own = settings.own_head

    def logits_by(name: str, pooled: Tensor) -> Tensor:
        if own:
            return model.fc(pooled)
        return tensors[f"{name}.1.weight"] @ pooled + tensors[f"{name}.1.bias"]

    rows: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in METRICS - {"agreement", "size", "images"}}
    agreed, sizes = [], []
    for index in range(len(images)):
        with torch.no_grad():
            F = model.forward_features(pixels_of(transform, images, index).double())[0].reshape(CHANNELS, -1)
        w, b = tensors["attention.score.weight"].reshape(-1), tensors["attention.score.bias"]
        stored = F.half().double()
        u = w @ stored + b
        if settings.setup == "l2x-f":
            chosen = torch.zeros_like(u).index_fill(0, (-u).topk(settings.selection.size).indices, 1)
            soft = chosen / settings.selection.size  # its soft weights are random: not compared
        else:
            z = -u.clamp(min=0)
            chosen = (z == z.max()).double()
            soft = (0.1 * z).softmax(0)
            if settings.setup != "bla":
                soft = (soft - 0.98 / len(u)).clamp(min=0)
        pools = {
            "baseline": F.mean(1),
            "baseline_continued": F.mean(1),
            "soft": stored @ soft,
            "soft_renormalised": stored @ (soft / soft.sum()),
            "hard": stored @ (chosen / chosen.sum()),
        }
        heads = {"baseline": "baseline", "baseline_continued": "continued"}
        with torch.no_grad():
            logits = {name: logits_by(heads.get(name, "head"), pooled) for name, pooled in pools.items()}
        best = int(logits["baseline"].argmax())
        truth = best if settings.head.targets == "predictions" else CLASSES.index(images.names[index].split("/")[0])
        for name, values in logits.items():
            rows[name].append((values, truth))
        agreed.append(int(logits["hard"].argmax()) == best)
        sizes.append(int(chosen.sum()))
    found: dict[str, Any] = {
        name: {
            "loss": np.mean([-values.log_softmax(0)[truth] for values, truth in pairs]),
            "top1": np.mean([int(values.argmax()) == truth for values, truth in pairs]),
            "top5": 1.0,  # of three classes
        }
        for name, pairs in rows.items()
    }
    size = {
        "mean": np.mean(sizes), "std": np.std(sizes), "min": min(sizes), "median": np.median(sizes),
        "max": max(sizes), "cells": GRID[0] * GRID[1],
    }  # fmt: skip
    return found | {"agreement": np.mean(agreed), "size": size, "images": len(images)}


@pytest.mark.parametrize(
    "settings",
    [
        QUICK,
        Settings(setup="bla", epochs=2, batch_size=8, learning_rate=0.02, seed=1),
        Settings(setup="bla-ph", epochs=2, batch_size=8, learning_rate=0.02, seed=2, validation=0.2),
        Settings(setup="l2x-f", size=4, epochs=2, batch_size=8, learning_rate=0.02),
        Settings(setup="bla-ph", head="own", targets="labels", epochs=2, batch_size=8, learning_rate=0.02),
        Settings(setup="bla-ph", head="own", targets="predictions", epochs=2, batch_size=8, learning_rate=0.02),
    ],
    ids=["bla-t", "bla", "bla-ph", "l2x-f", "own-labels", "own-predictions"],
)
def test_the_metrics_equal_a_slow_recomputation(settings: Settings, data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", settings, model=Tiny(), device="cpu")
    images = image_folder(data, seed=settings.seed).test
    expected = slow_metrics(tmp_path / "run", Tiny(), images, settings)
    metrics = record_of(tmp_path / "run")["metrics"]
    assert metrics == result.record["metrics"]
    assert set(metrics) == set(expected) == METRICS
    for name, value in expected.items():
        if settings.setup == "l2x-f" and name.startswith("soft"):
            continue
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    if settings.own_head:
        assert metrics["baseline"] == metrics["baseline_continued"]
        assert {name.split(".")[0] for name in load_file(tmp_path / "run" / "model.safetensors")} == {"attention"}


def test_a_second_call_returns_the_run_as_it_is(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (folder / "checkpoint-9").mkdir()  # killed after run.json, before its last checkpoint was removed
    (folder / "checkpoint-9" / "networks.safetensors").touch()
    before = {name: (folder / name).read_bytes() for name in files_of(trained)}
    for name in ("train_networks", "read_parts"):
        monkeypatch.setattr(run, name, None)
    remarks: list[str] = []
    again = train(data, folder, QUICK, model=Tiny(), device="cpu", report=lambda title, *_: remarks.append(title))
    assert again.record == record_of(trained)
    assert remarks[1:] == [f"{folder} already holds this run"]
    assert files_of(folder) == files_of(trained)
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == before
    pixels = torch.randn(3, 3, 24, 40)
    assert torch.equal(again.classifier(pixels), load(trained, model=Tiny(), device="cpu")(pixels))
    assert again.classifier.fitted


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": Settings(setup="bla")}, "settings"),
        ({"model": Tiny(1)}, "backbone"),
        ({"mode": "crop"}, "transform"),
        ({"data": 11}, "data"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    changes: dict[str, Any], named: str, trained: Path, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"settings": QUICK, "model": Tiny(), "device": "cpu"} | changes
    count = options.pop("data", None)
    place = write_classes(tmp_path / "data", count) if count else data
    before = record_of(trained)
    with pytest.raises(TrainingError, match=rf"an empty folder or this run in .* that differs in {named}: choose"):
        train(place, trained, **options)
    assert record_of(trained) == before


def test_an_interrupted_run_ends_as_one_that_was_not(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    folder, attempts = tmp_path / "run", 0

    def report(title: str, done: int, total: int) -> None:
        if title.startswith(("head: epoch 2", "module: epoch 1", "continued: epoch 2", "evaluating")):
            seen.add(title)
            if len(seen) > attempts:
                raise KeyboardInterrupt

    seen: set[str] = set()
    while not (folder / "run.json").exists():
        try:
            train(data, folder, QUICK, model=Tiny(), device="cpu", report=report)
        except KeyboardInterrupt:
            attempts += 1
            assert not (folder / "run.json").exists()
            with pytest.raises(RunError, match=r"no run\.json: its training was interrupted; start it again"):
                load(folder, model=Tiny())
    assert attempts == 4
    assert files_of(folder) == files_of(trained)
    for name in ("model.safetensors", "log.jsonl"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes()
    assert record_of(folder)["metrics"] == record_of(trained)["metrics"]


def test_of_two_trainings_in_one_folder_the_second_is_refused(data: Path, tmp_path: Path) -> None:
    inside, finish = threading.Event(), threading.Event()

    def wait(title: str, *_: Any) -> None:
        if title.startswith("module"):
            inside.set()
            finish.wait(120)

    options: dict[str, Any] = {"model": Tiny(), "device": "cpu", "report": wait}
    first = threading.Thread(target=train, args=(data, tmp_path / "run", SHORT), kwargs=options)
    first.start()
    try:
        assert inside.wait(120)
        with pytest.raises(TrainingError, match=r"expected a folder that no other training is writing, got .*run"):
            train(data, tmp_path / "run", SHORT, model=Tiny(), device="cpu")
    finally:
        finish.set()
        first.join(60)
    assert record_of(tmp_path / "run")["metrics"]["images"] == 6


def test_a_file_in_the_place_of_the_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(TrainingError, match="expected a folder for the run, got the file"):
        train(data, tmp_path / "run", QUICK, model=Tiny())


def test_broken_photos_are_skipped_and_listed(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    splits = image_folder(folder)
    broken = [splits.train.path(3), splits.test.path(1), splits.test.path(2)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    remarks: list[str] = []
    train(folder, tmp_path / "run", SHORT, model=Tiny(), device="cpu", report=lambda title, *_: remarks.append(title))
    record = record_of(tmp_path / "run")
    assert [entry["image"] for entry in record["skipped"]] == [path.relative_to(folder).as_posix() for path in broken]
    for path, entry in zip(broken, record["skipped"], strict=True):
        assert str(path) in entry["error"]
    assert record["data"]["images"] == {"train": 29, "validation": 0, "test": 4}
    assert record["metrics"]["images"] == 4
    assert any("3 images cannot be read and take no part" in remark for remark in remarks)
    metrics, failures = evaluate(tmp_path / "run", model=Tiny(), device="cpu")
    assert metrics == record["metrics"]
    assert [name for name, _ in failures] == [entry["image"] for entry in record["skipped"][1:]]


def test_a_validation_share_is_held_out_of_the_training_images(data: Path, tmp_path: Path) -> None:
    settings = Settings(epochs=2, batch_size=8, validation=0.2, patience=1)
    train(data, tmp_path / "run", settings, model=Tiny(), device="cpu")
    assert record_of(tmp_path / "run")["data"]["images"] == {"train": 24, "validation": 6, "test": 6}
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        assert set(json.loads(line)["validation"]) == {"loss", "top1", "top5"}


# --- images without classes


@pytest.fixture
def flat(data: Path, tmp_path: Path) -> Path:
    (tmp_path / "flat").mkdir()
    for index, path in enumerate(sorted(data.rglob("*.*"))):
        shutil.copy(path, tmp_path / "flat" / f"{index:02}{path.suffix}")
    return tmp_path / "flat"


def test_images_without_classes_serve_to_learn_the_classifiers_predictions(flat: Path, tmp_path: Path) -> None:
    settings = Settings(setup="bla-ph", head="own", targets="predictions", epochs=2, batch_size=8, learning_rate=0.02)
    result = train(flat, tmp_path / "run", settings, model=Tiny(), device="cpu")
    record = record_of(tmp_path / "run")
    assert record["classes"] == list(CLASSES)
    assert record["metrics"]["images"] == 7
    assert record["metrics"]["baseline"]["top1"] == 1  # by definition
    assert record["metrics"]["hard"]["top1"] == record["metrics"]["agreement"]
    assert evaluate(tmp_path / "run", model=Tiny(), device="cpu")[0] == record["metrics"]
    assert result.classifier.explain(flat / "00.png")[0].setup == "BLA-PH"
    other = Tiny()
    with torch.no_grad():
        list(other.parameters())[-1].add_(1)  # the head's bias: the trunk is the same
    with pytest.raises(RunError, match="expected the classifier it was trained on"):
        load(tmp_path / "run", model=other, device="cpu")


def test_an_own_head_has_its_own_preprocessing_and_a_new_one_sees_the_whole_photo(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    assert record_of(trained)["transform"]["mode"] == "squash"
    own = Settings(setup="bla-ph", head="own", targets="labels", epochs=1, batch_size=8)
    remarks: list[str] = []
    options: dict[str, Any] = {"device": "cpu", "report": lambda title, *_: remarks.append(title)}
    squashed = train(data, tmp_path / "squash", own, model=Tiny(), mode="squash", **options)
    cropped = train(data, tmp_path / "crop", own, model=Tiny(), **options)
    for run_, mode in ((squashed, "squash"), (cropped, "crop")):
        assert record_of(tmp_path / mode)["transform"]["mode"] == run_.classifier.transform.mode == mode
        assert remarks.count(run_.classifier.transform.in_words()) == 1
    # 50 x 30 pixels are as many as the resize gives, of which the middle 40 x 24 are kept
    (explanation,) = load(tmp_path / "crop", model=Tiny(), device="cpu").explain(np.zeros((30, 50, 3), np.uint8))
    assert explanation.region == (5, 3, 45, 27)


def test_images_without_classes_do_not_serve_where_labels_are_needed(flat: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected class folders to train a new head on.*head='own'"):
        train(flat, tmp_path / "run", QUICK, model=Tiny())
    labels = Settings(setup="bla-ph", head="own", targets="labels")
    with pytest.raises(DataError, match="expected class folders for targets='labels'"):
        train(flat, tmp_path / "run", labels, model=Tiny())
    with pytest.raises(DataError, match="expected class folders"):
        evaluate(trained, flat, model=Tiny())


def test_an_own_head_takes_labels_by_name(data: Path, tmp_path: Path) -> None:
    """Two of its three classes are there: the second is the classifier's third."""
    for name in ("class 0", "class 2"):
        shutil.copytree(data / name, tmp_path / "two" / name)
    settings = Settings(setup="bla-ph", head="own", targets="labels", epochs=1, batch_size=8)
    train(tmp_path / "two", tmp_path / "run", settings, model=Tiny(), device="cpu")
    images = image_folder(tmp_path / "two").test
    expected = slow_metrics(tmp_path / "run", Tiny(), images, settings)
    assert record_of(tmp_path / "run")["metrics"]["hard"] == pytest.approx(expected["hard"], rel=2e-3)
    assert record_of(tmp_path / "run")["classes"] == list(CLASSES)
    (tmp_path / "two" / "class 2").rename(tmp_path / "two" / "cat")
    with pytest.raises(DataError, match=r"expected classes of the classifier, got \['cat'\]; it knows \['class 0'"):
        train(tmp_path / "two", tmp_path / "other", settings, model=Tiny())


# --- loading


def test_a_loaded_run_predicts_from_the_selected_cells(trained: Path) -> None:
    classifier = load(trained, model=Tiny(), device="cpu")
    assert (classifier.classes, classifier.name, classifier.setup) == (CLASSES, "tiny", "BLA-T")
    assert classifier.fitted
    assert not classifier.training
    tensors, model = load_file(trained / "model.safetensors"), Tiny()
    pixels = torch.randn(5, 3, 24, 40)
    with torch.no_grad():
        F = model.forward_features(pixels)
        u = (F * tensors["attention.score.weight"][0, :, 0, 0, None, None][None]).sum(1) + tensors[
            "attention.score.bias"
        ]
        z = -u.clamp(min=0)
        chosen = (z == z.amax(dim=(1, 2), keepdim=True)).float()
        pooled = (F * (chosen / chosen.sum(dim=(1, 2), keepdim=True))[:, None]).sum(dim=(2, 3))
        logits = pooled @ tensors["head.1.weight"].T + tensors["head.1.bias"]
        torch.testing.assert_close(classifier(pixels), logits, rtol=1e-5, atol=1e-5)
        opened = open_run(trained, model=Tiny(), device="cpu")
        assert torch.equal(opened.classifier(pixels), classifier(pixels))
    assert opened.record == record_of(trained)
    explanation = classifier.explain(photo(0, 1))[0]
    assert (explanation.grid, explanation.setup, explanation.model) == (GRID, "BLA-T", "tiny")
    assert explanation.region == (0, 0, 50, 30)


def test_a_classifier_by_name_needs_no_model_to_load(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``module:callable`` stands for any name: run.json says what to build."""
    (tmp_path / "my_tiny_classifiers.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('tiny_source', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\nbuild = module.Tiny\n"
    )
    monkeypatch.chdir(tmp_path)
    name = "my_tiny_classifiers:build"
    result = train(data, "run", SHORT, model=name, device="cpu")
    assert result.record["backbone"]["name"] == result.record["model"] == name
    pixels = torch.randn(2, 3, 24, 40)
    assert torch.equal(load("run", model=name, device="cpu")(pixels), result.classifier(pixels))
    assert evaluate("run", model=name, device="cpu")[0] == result.record["metrics"]


def test_a_run_is_of_one_classifier(trained: Path) -> None:
    with pytest.raises(RunError, match="expected model=, the classifier it was trained on, which came as an object"):
        load(trained)
    with pytest.raises(RunError, match=r"expected the classifier it was trained on \(weights [0-9a-f]{12}\.\.\.\)"):
        load(trained, model=Tiny(1), device="cpu")


def test_folders_that_hold_no_run(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a run folder or a shipped explainer \(.*\), got '.*nowhere'"):
        load(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"got no run\.json: `bla train` writes one"):
        load(tmp_path)
    record = record_of(trained)
    for content, message in [
        (b"\xff", "expected the record of a run in .*, got another file"),
        (b'{"schema_version": 1', "got another file"),
        (b"[1]", "got another file"),
        (b"{}", "got another file"),
        (b'{"schema_version": 1}', "got another file"),
        (json.dumps(record | {"schema_version": 99}).encode(), "expected schema_version 1, got 99: update bla"),
        (json.dumps(record | {"settings": {"colour": "red"}}).encode(), "got another file"),
        (json.dumps(record | {"transform": {}}).encode(), "got another file"),
    ]:
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(RunError, match=message):
            load(tmp_path, model=Tiny(), device="cpu")


@pytest.mark.parametrize("damage", ["missing", "torn", "other", "shape"])
def test_damaged_weights_are_named(damage: str, trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    path = folder / "model.safetensors"
    match damage:
        case "missing":
            path.unlink()
        case "torn":
            path.write_bytes(path.read_bytes()[:-4])
        case "other":
            save_file({"weight": torch.zeros(1)}, path)
        case "shape":
            save_file(load_file(path) | {"head.1.bias": torch.zeros(9)}, path)
    with pytest.raises(RunError, match=r"expected the weights of the run in .*model\.safetensors"):
        load(folder, model=Tiny(), device="cpu")


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", ""):
        with pytest.raises(RunError, match="expected device auto, cpu or a CUDA device that is present"):
            pick_device(name)


# --- evaluating


def test_evaluating_on_its_own_data_gives_its_own_metrics(trained: Path, data: Path) -> None:
    metrics, failures = evaluate(trained, model=Tiny(), device="cpu")
    assert (metrics, failures) == (record_of(trained)["metrics"], ())
    assert evaluate(trained, data, model=Tiny(), device="cpu")[0] == metrics


def test_data_that_have_moved(data: Path, tmp_path: Path) -> None:
    place, moved = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "moved"
    train(place, tmp_path / "run", SHORT, model=Tiny(), device="cpu")
    place.rename(moved)
    with pytest.raises(RunError, match=r"was trained with in .*data, which are not here: pass --data"):
        evaluate(tmp_path / "run", model=Tiny(), device="cpu")
    assert evaluate(tmp_path / "run", moved, model=Tiny(), device="cpu")[0] == record_of(tmp_path / "run")["metrics"]
    # nor does training anew care where the images are
    remarks: list[str] = []
    train(moved, tmp_path / "run", SHORT, model=Tiny(), device="cpu", report=lambda title, *_: remarks.append(title))
    assert remarks[1:] == [f"{tmp_path / 'run'} already holds this run"]


def test_a_folder_that_has_changed_since_is_not_measured_on(data: Path, tmp_path: Path) -> None:
    """The division is drawn anew with one photo more, and images trained on would count as test images."""
    place = Path(shutil.copytree(data, tmp_path / "data"))
    train(place, tmp_path / "run", SHORT, model=Tiny(), device="cpu")
    photo(99, 0).save(place / CLASSES[0] / "one more.png")
    for source in (None, place):
        with pytest.raises(RunError, match=r"expected the test images of .*the folder has changed since"):
            evaluate(tmp_path / "run", source, model=Tiny(), device="cpu")


def test_other_data_that_come_undivided_are_measured_on_in_full(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for label, name in enumerate(CLASSES):
        (other / name).mkdir(parents=True)
        for index in range(4):
            photo(70 + index, label).save(other / name / f"{index}.png")
    assert evaluate(trained, other, model=Tiny(), device="cpu")[0]["images"] == 4 * len(CLASSES)


def test_other_data_must_have_classes_of_the_run(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected classes of the classifier, got \['cat', 'dog'\]"):
        evaluate(trained, write_classes(tmp_path / "pets", 3, ("cat", "dog")), model=Tiny())
    fewer = tmp_path / "fewer"
    for label in (0, 2):
        (fewer / "train" / CLASSES[label]).mkdir(parents=True)
        (fewer / "test" / CLASSES[label]).mkdir(parents=True)
        for index in range(4):
            photo(50 + index, label).save(fewer / "train" / CLASSES[label] / f"{index}.png")
            photo(60 + index, label).save(fewer / "test" / CLASSES[label] / f"{index}.png")
    metrics, _ = evaluate(trained, fewer, model=Tiny(), device="cpu")
    expected = slow_metrics(trained, Tiny(), image_folder(fewer).test, QUICK)
    assert metrics["images"] == 8
    for name in ("baseline", "hard", "soft"):
        assert metrics[name] == pytest.approx(expected[name], rel=2e-3)


# --- fitting in place


def wrap(attention: Any = None, seed: int = 0) -> tuple[Tiny, ExplainableClassifier]:
    model = Tiny()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return model, explainable(model, attention=attention or BoundedLogitAttention)


@pytest.mark.parametrize(
    "images",
    [
        lambda _: some_photos(),
        lambda _: [np.asarray(image) for image in some_photos()],
        as_files,
        lambda folder: [str(path) for path in as_files(folder)],
        lambda folder: as_files(folder)[0].parent,
        lambda folder: [*as_files(folder)[:5], *some_photos()[5:10], *map(np.asarray, some_photos()[10:])],
    ],
    ids=["pillow", "arrays", "paths", "strings", "folder", "mixed"],
)
def test_fitting_trains_the_attention_and_nothing_else(images: Callable[[Path], Any], tmp_path: Path) -> None:
    model, wrapped = wrap()
    model.train()
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    inside = {name: value.clone() for name, value in wrapped.state_dict().items()}
    with pytest.raises(ClassifierError, match=r"never fitted: call bla\.fit"):
        wrapped.explain(photo(0, 0))
    metrics = fit(wrapped, images(tmp_path / "photos"), epochs=2, batch_size=4, learning_rate=0.02)
    assert set(metrics) == METRICS
    assert metrics["images"] == 3
    assert metrics["baseline"]["top1"] == 1  # its own predictions are what it learns
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    changed = {name for name, value in wrapped.state_dict().items() if not torch.equal(value, inside[name])}
    assert changed == {"attention.score.weight", "attention.score.bias", "_fitted"}
    assert wrapped.fitted
    assert not wrapped.training
    assert len(wrapped.explain(some_photos(2))) == 2


def test_fitting_learns(tmp_path: Path) -> None:
    """After some epochs the hard predictions agree better with the classifier's than at the start."""
    images = [photo(index, index % 3) for index in range(60)]
    first, later = (fit(wrap()[1], images, epochs=epochs, batch_size=8, learning_rate=0.03) for epochs in (1, 12))
    assert later["hard"]["loss"] < first["hard"]["loss"]


def test_the_seed_alone_decides_what_is_fitted(tmp_path: Path) -> None:
    """Neither torch's generator, nor the weights that the attention had, nor an earlier fit."""
    results = []
    for noise in (1, 2):
        _, wrapped = wrap(seed=noise)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        for _ in range(noise):
            metrics = fit(wrapped, some_photos(), epochs=2, batch_size=4, seed=5, cache=tmp_path / str(noise))
        assert torch.equal(torch.get_rng_state(), state)
        results.append((metrics, wrapped.attention.score.weight.tolist()))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_training_is_in_float32(dtype: torch.dtype, data: Path, tmp_path: Path) -> None:
    expected = rf"expected a classifier in float32 to train on, got {dtype}"
    with pytest.raises(ClassifierError, match=expected):
        fit(explainable(Tiny().to(dtype)), some_photos())
    with pytest.raises(ClassifierError, match=expected):
        train(data, tmp_path / "run", model=Tiny().to(dtype), device="cpu")


def test_a_fit_that_fails_leaves_the_fitted_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, wrapped = wrap()
    fit(wrapped, some_photos(), epochs=1)
    before = copy.deepcopy(wrapped.state_dict())

    def interrupting(title: str, *_: int) -> None:
        if title.startswith("module"):
            raise KeyboardInterrupt

    with pytest.raises(DataError, match="expected class folders"):
        fit(wrapped, some_photos(), targets="labels")
    with pytest.raises(KeyboardInterrupt):
        fit(wrapped, some_photos(), epochs=1, report=interrupting)
    monkeypatch.setattr(run, "train_networks", lambda *_, **__: {"dead": True})
    with pytest.raises(TrainingError, match=r"module has died: all \d+ cells .* lower the learning rate \(0\.001\)"):
        fit(wrapped, some_photos(), epochs=1)
    assert wrapped.fitted
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


def test_fitting_where_gradients_are_off_and_from_a_generator() -> None:
    model = Tiny()
    with torch.inference_mode():
        wrapped = explainable(model)
        fit(wrapped, (image for image in some_photos()), epochs=1)
    with torch.no_grad():
        fit(wrapped, some_photos(), epochs=1)
    assert wrapped.fitted
    with pytest.raises(ClassifierError, match="expected a wrapped classifier, got Tiny"):
        fit(Tiny(), some_photos())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "edit",
    [{"classes": 5}, {"backbone": None}, {"backbone": {}}, {"data": None}, {"settings": 1}, {"metrics": None}],
    ids=str,
)
def test_an_edited_record_is_refused(edit: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (folder / "run.json").write_text(json.dumps(record_of(trained) | edit))
    with pytest.raises(RunError, match="expected the record of a run"):
        load(folder, model=Tiny(), device="cpu")


def test_a_run_of_the_time_of_several_maps_loads_if_it_has_one(trained: Path, tmp_path: Path) -> None:
    folder, record = Path(shutil.copytree(trained, tmp_path / "run")), record_of(trained)
    (folder / "run.json").write_text(json.dumps(record | {"settings": record["settings"] | {"maps": 1}}))
    assert load(folder, model=Tiny(), device="cpu").fitted
    (folder / "run.json").write_text(json.dumps(record | {"settings": record["settings"] | {"maps": 2}}))
    with pytest.raises(RunError, match=r"got maps=2: .* train again with a larger --image-size"):
        load(folder, model=Tiny(), device="cpu")


def test_other_programs_checkpoints_are_left_alone(data: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-best", "checkpoint-500"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-5.pt").touch()
    train(data, tmp_path / "run", SHORT, model=Tiny(), device="cpu")
    assert {"checkpoint-best", "checkpoint-500", "checkpoint-5.pt", "run.json"} <= set(files_of(tmp_path / "run"))


def test_fitting_to_the_labels_of_a_folder(data: Path) -> None:
    _, wrapped = wrap()
    remarks: list[tuple[str, int, int]] = []
    metrics = fit(wrapped, data, targets="labels", epochs=1, report=lambda *call: remarks.append(call))
    images = image_folder(data).test
    transform = wrapped.transform
    predicted = Tiny()(torch.cat([pixels_of(transform, images, index) for index in range(6)])).argmax(-1).numpy()
    assert metrics["baseline"]["top1"] == pytest.approx((predicted == images.labels).mean())
    assert ("evaluating", 6, 6) in remarks
    with pytest.raises(DataError, match="expected class folders for targets='labels'"):
        fit(wrapped, some_photos(), targets="labels")


def test_fitting_the_rival(data: Path) -> None:
    _, wrapped = wrap(L2XAttention(CHANNELS, size=4))
    assert fit(wrapped, image_folder(data).train, epochs=1)["size"]["mean"] == 4
    assert wrapped.explain(photo(0, 0))[0].size == 4


def test_fitting_skips_photos_that_cannot_be_read(tmp_path: Path) -> None:
    paths = as_files(tmp_path / "photos")
    paths[4].write_bytes(b"broken")
    paths[7].unlink()
    remarks: list[str] = []
    metrics = fit(wrap()[1], paths, epochs=1, report=lambda title, *_: remarks.append(title))
    assert any(
        remark.startswith(f"2 images cannot be read and take no part, the first: {paths[4]}") for remark in remarks
    )
    assert 1 <= metrics["images"] <= 3


def test_what_cannot_be_fitted(trained: Path, tmp_path: Path) -> None:
    _, wrapped = wrap()
    with pytest.raises(DataError, match="got object"):
        fit(wrapped, [object()] * 4)  # type: ignore[list-item]
    with pytest.raises(DataError, match="expected at least two images, to train on one and measure on another, got 1"):
        fit(wrapped, some_photos(1))
    with pytest.raises(DataError, match="measure on another, got 0; add some"):
        fit(wrapped, [])
    with pytest.raises(bla.BlaError, match="expected a stated range of the pixels' values, got float64"):
        fit(wrapped, [np.zeros((4, 4, 3))] * 4)
    with pytest.raises(ClassifierError, match="expected a wrapped classifier with its own head"):
        fit(load(trained, model=Tiny(), device="cpu"), some_photos())
    assert not wrapped.fitted


# --- real photos


def test_real_birds_end_to_end(shared_data: Path, tmp_path: Path) -> None:
    for species in sorted((shared_data / "birds100" / "train").iterdir())[:3]:
        (tmp_path / "birds" / species.name).mkdir(parents=True)
        for path in sorted(species.iterdir())[:10]:
            shutil.copy(path, tmp_path / "birds" / species.name)
    settings = Settings(setup="bla", epochs=2, batch_size=8)
    result = train(tmp_path / "birds", tmp_path / "run", settings, device="cpu")
    assert isinstance(result.classifier.attention, BoundedLogitAttention)
    metrics = result.record["metrics"]
    assert metrics["images"] == 6
    assert metrics["size"]["cells"] == 49
    assert metrics["baseline"]["top1"] > 0.6  # three species; a tenth of a second of training
    assert evaluate(tmp_path / "run", device="cpu") == (metrics, ())
    photos = sorted((tmp_path / "birds").rglob("*.jpg"))[:2]
    explanations = result.classifier.explain(photos)
    assert [explanation.image for explanation in explanations] == [os.fspath(path) for path in photos]
    for explanation in explanations:
        assert explanation.prediction.label in result.record["classes"]
        assert 1 <= explanation.size <= 49


def test_a_larger_input_has_finer_cells_and_a_share_of_them_is_selected(data: Path, tmp_path: Path) -> None:
    settings = Settings(epochs=3, head_epochs=12, batch_size=8, learning_rate=0.005, mean_size=0.25)
    run = train(data, tmp_path / "run", settings, model=Tiny(), image_size=64, device="cpu", cache=tmp_path)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["transform"]["size"] == [64, 64]
    assert run.record["metrics"]["size"]["cells"] == 64
    assert abs(run.record["mean_size"]["set"] - 16) < 0.5
    loaded = load(tmp_path / "run", model=Tiny())
    assert loaded.transform.size == (64, 64)
    assert loaded.explain(photo(0, 0))[0].grid == (8, 8)


# --- streamed


def test_streamed_features_are_the_cached_ones(data: Path, tmp_path: Path) -> None:
    wrapped = bla.explainable(Tiny())
    images = image_folder(data).train
    cache = cached_features(wrapped, images, root=tmp_path, kind="float32")
    stream = StreamedFeatures(wrapped, Photos(images, wrapped.transform))
    rows = np.random.default_rng(0).permutation(len(images))
    rows = np.concatenate([rows, rows[:7]])  # more than go through the trunk at a time
    torch.testing.assert_close(stream.batch(rows), cache.batch(rows))
    torch.testing.assert_close(stream.pooled_batch(rows[:5]), cache.pooled_batch(rows[:5]))
    assert not stream.batch(rows).requires_grad


@pytest.mark.parametrize(
    "changed", [{}, {"setup": "bla-ph", "head": "own", "targets": "predictions"}, {"class_aware": True, "mean_size": 4}]
)
def test_a_streamed_run_is_the_cached_one_and_keeps_nothing(
    changed: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    settings = SHORT.replace(validation=0.2, **changed)
    kept = train(data, tmp_path / "kept", settings, model=Tiny(), device="cpu", cache=tmp_path / "caches")
    none = tmp_path / "none"
    run = train(data, tmp_path / "run", settings, model=Tiny(), device="cpu", cache=none, stream=True)
    assert not none.exists()
    for name, value in run.networks.saved().items():  # but for the float16 of the cache
        torch.testing.assert_close(value, kept.networks.saved()[name], atol=0.02, rtol=0.02)
    assert evaluate(tmp_path / "run", model=Tiny(), device="cpu", cache=none, stream=True) == (
        run.record["metrics"],
        (),
    )
    assert not none.exists()


def test_a_streamed_training_goes_on_where_it_was_interrupted(data: Path, tmp_path: Path) -> None:
    settings = QUICK.replace(head_epochs=1)
    whole = train(data, tmp_path / "whole", settings, model=Tiny(), device="cpu", stream=True)

    def interrupt(title: str, done: int, total: int) -> None:
        if title.startswith("module: epoch 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "run", settings, model=Tiny(), device="cpu", stream=True, report=interrupt)
    resumed = train(data, tmp_path / "run", settings, model=Tiny(), device="cpu", stream=True)
    assert resumed.record["metrics"] == whole.record["metrics"]


def test_streaming_lists_broken_photos_and_names_the_one_that_broke_later(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    splits = image_folder(folder)
    broken, later = splits.train.path(3), splits.train.path(5)
    broken.write_bytes(b"no photo")
    run = train(folder, tmp_path / "run", SHORT, model=Tiny(), device="cpu", stream=True)
    assert [entry["image"] for entry in run.record["skipped"]] == [splits.train.names[3]]
    stream = StreamedFeatures(run.classifier, Photos(splits.train, run.classifier.transform))
    later.write_bytes(b"no photo any more")
    with pytest.raises(DataError, match=re.escape(str(later))):
        stream.batch(np.array([4, 5]))


def test_streamed_features_that_are_not_finite_are_refused_by_name(data: Path) -> None:
    model = Tiny()
    wrapped = bla.explainable(model)
    images = image_folder(data).train
    with torch.no_grad():
        next(wrapped.trunk.parameters()).mul_(float("inf"))
    with pytest.raises(DataError, match=f"{re.escape(images.names[2])}: expected finite features"):
        StreamedFeatures(wrapped, Photos(images, wrapped.transform)).batch(np.array([2, 3]))


def test_fit_streams_too(tmp_path: Path) -> None:
    wrapped = bla.explainable(Tiny(), attention=BoundedLogitAttention)
    metrics = fit(wrapped, as_files(tmp_path / "photos"), epochs=1, cache=tmp_path / "none", stream=True)
    assert metrics["images"] == 3
    assert not (tmp_path / "none").exists()
