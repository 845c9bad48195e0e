"""Explainers shared: what is in the folder, what comes back, what is refused. Nothing goes over a network."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import bla
from bla.data.photo import Transform
from bla.model.attention import Attention, BoundedLogitAttention, L2XAttention
from bla.model.backbones import load_backbone
from bla.model.classifier import ExplainableClassifier, explainable
from bla.model.own_prediction import TRAINED
from bla.runs.hub import CLASSIFIER, HubError, from_pretrained, push_to_hub, save_pretrained
from bla.runs.record import RunError
from bla.runs.run import evaluate, fit, load, train
from bla.training.settings import Settings

NET = "test_resnet"  # timm's smallest
TRANSFORM = Transform((96, 96), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
PHOTOS = [np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8) for seed in range(10)]


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return load_backbone(NET, "random")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, classifier: nn.Module) -> Path:
    """A run with a new head on weights in a file of the user's."""
    place = tmp_path_factory.mktemp("private place")
    for label in ("blue", "red"):
        for index in range(6):
            pixels = np.random.default_rng([index, len(label)]).integers(0, 150, (30, 30, 3), dtype=np.uint8)
            pixels[..., 2 if label == "blue" else 0] += 100
            (place / "data" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / "data" / label / f"{index}.png")
    (place / "data" / "red" / "broken.png").write_bytes(b"broken")
    state = {
        key: value + 0.01 if value.is_floating_point() else value for key, value in classifier.state_dict().items()
    }
    torch.save(state, place / "weights.pt")
    settings = Settings(epochs=1, hidden=(4,))
    train(place / "data", place / "run", settings, model=NET, weights=place / "weights.pt", image_size=96)
    return place / "run"


@pytest.fixture(scope="module")
def fitted(classifier: nn.Module) -> ExplainableClassifier:
    wrapped = explainable(classifier, transform=TRANSFORM)
    wrapped.metrics = fit(wrapped, PHOTOS, epochs=1)  # type: ignore[assignment]
    return wrapped


def same(a: ExplainableClassifier, b: ExplainableClassifier) -> bool:
    ours, theirs = ([e.to_dict() for e in one.explain(PHOTOS[:3])] for one in (a, b))
    return ours == theirs and a.classes == b.classes


def test_a_run_comes_back_as_it_was(run_folder: Path, tmp_path: Path) -> None:
    shared = save_pretrained(run_folder, tmp_path / "shared", with_classifier=True)
    assert sorted(file.name for file in shared.iterdir()) == sorted(
        ["README.md", CLASSIFIER, "model.safetensors", "run.json"]
    )
    assert (shared / "model.safetensors").read_bytes() == (run_folder / "model.safetensors").read_bytes()
    moved = shutil.move(shared, tmp_path / "elsewhere")
    assert same(from_pretrained(moved), load(run_folder))
    assert same(load(moved), load(run_folder))
    assert (
        evaluate(moved, run_folder.parent / "data")[0] == json.loads((run_folder / "run.json").read_text())["metrics"]
    )
    again = save_pretrained(moved, tmp_path / "again", with_classifier=True)
    for name in (CLASSIFIER, "run.json", "README.md"):
        assert (again / name).read_bytes() == (Path(moved) / name).read_bytes()


def test_no_path_of_this_machine_is_shared(run_folder: Path, tmp_path: Path) -> None:
    assert "private place" in (run_folder / "run.json").read_text()
    for weights in (True, False):
        shared = save_pretrained(run_folder, tmp_path / str(weights), with_classifier=weights)
        text = (shared / "run.json").read_text() + (shared / "README.md").read_text()
        assert "private place" not in text
        assert "broken.png" in text


def test_each_tensor_is_there_once(
    run_folder: Path, fitted: ExplainableClassifier, classifier: nn.Module, tmp_path: Path
) -> None:
    shared = save_pretrained(run_folder, tmp_path / "shared", with_classifier=True)
    trained, own = load_file(shared / "model.safetensors"), load_file(shared / CLASSIFIER)
    assert {key.split(".")[0] for key in trained} == {"attention", "baseline", "head", "continued"}
    assert set(own) == set(classifier.state_dict())
    assert not (save_pretrained(run_folder, tmp_path / "small") / CLASSIFIER).exists()
    # a timm classifier's trunk and head are one module, which the wrapped one's state holds twice
    shared = save_pretrained(fitted, tmp_path / "fitted", model=NET, with_classifier=True)
    numbers = sum(value.numel() for file in shared.glob("*.safetensors") for value in load_file(file).values())
    assert numbers < 0.51 * sum(value.numel() for value in fitted.state_dict().values())
    assert {key.split(".")[0] for key in load_file(shared / "model.safetensors")} == {"attention"}


def test_weights_that_nobody_else_has_are_asked_for(run_folder: Path, classifier: nn.Module, tmp_path: Path) -> None:
    shared = save_pretrained(run_folder, tmp_path / "shared")
    with pytest.raises(RunError, match="expected model="):
        from_pretrained(shared)
    theirs = load_backbone(NET, run_folder.parent / "weights.pt")
    assert same(from_pretrained(shared, model=theirs), load(run_folder))
    with pytest.raises(RunError, match="expected the classifier it was trained on"):
        from_pretrained(shared, model=classifier)


@pytest.mark.parametrize(
    "attention",
    [
        BoundedLogitAttention(512, threshold="auto", hidden=(4, 3)),
        BoundedLogitAttention(512, temperature=0.2, gate=True, context=True),
        L2XAttention(512, size=3, variant="corrected"),
        None,
    ],
    ids=["threshold", "gate", "l2x", "default"],
)
def test_a_fitted_classifier_comes_back_as_it_was(
    attention: Attention | None, classifier: nn.Module, tmp_path: Path
) -> None:
    if attention is not None:
        channels = explainable(classifier, transform=TRANSFORM, attention=BoundedLogitAttention).attention.in_channels
        attention = type(attention)(channels, **attention.settings)
    names = [f"kind {index}" for index in range(1000)]
    wrapped = explainable(classifier, attention=attention, transform=TRANSFORM, classes=names)
    with pytest.raises(HubError, match=r"before bla\.fit"):
        save_pretrained(wrapped, tmp_path / "shared")
    metrics = fit(wrapped, PHOTOS, epochs=1)
    shared = save_pretrained(wrapped, tmp_path / "shared", model=NET, metrics=metrics, with_classifier=True)
    assert same(from_pretrained(shared), wrapped)
    named = save_pretrained(wrapped, tmp_path / "named", metrics=metrics)
    assert same(from_pretrained(named, model=classifier), wrapped)
    assert f"agrees with the one from all cells on {metrics['agreement']:.1%}" in (named / "README.md").read_text()


@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos"])  # a class token, and tokens that are averaged
def test_a_classifier_of_tokens_is_shared_whole(name: str, tmp_path: Path) -> None:
    wrapped = explainable(load_backbone(name, "random"), attention=BoundedLogitAttention)
    wrapped.fitted = True
    shared = save_pretrained(wrapped, tmp_path / "shared", model=name, with_classifier=True)
    assert set(load_file(shared / CLASSIFIER)) == set(load_backbone(name, "random").state_dict())
    assert same(from_pretrained(shared), wrapped)


def test_a_traced_classifier_of_tokens_is_shared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mytokens.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.model, self.fc = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 3)\n\n    def forward(self, pixels):\n"
        "        return self.fc(self.model(pixels).flatten(2).transpose(1, 2).mean(1))\n"
    )
    import mytokens  # type: ignore[import-not-found]

    net = mytokens.Net()
    wrapped = explainable(net, transform=TRANSFORM, attention=BoundedLogitAttention)
    wrapped.fitted = True
    shared = save_pretrained(wrapped, tmp_path / "shared", model="mytokens:Net", with_classifier=True)
    assert set(load_file(shared / CLASSIFIER)) == set(net.state_dict()), "though one of its parts is called model"
    assert same(from_pretrained(shared, model=mytokens.Net()), wrapped)


def test_a_traced_classifier_is_shared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 8, 9, 16), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))\n"
    )
    import mynet  # type: ignore[import-not-found]

    wrapped = explainable(mynet.build(), transform=TRANSFORM)
    fit(wrapped, PHOTOS, epochs=1)
    shared = save_pretrained(wrapped, tmp_path / "shared", model="mynet:build", with_classifier=True)
    with pytest.raises(RunError, match=r"expected model=.*mynet:build.*not run unasked"):
        from_pretrained(shared)
    assert same(from_pretrained(shared, model=mynet.build()), wrapped), "it takes the weights in the folder"
    with pytest.raises(HubError, match="expected a model that"):
        from_pretrained(shared, model=nn.Linear(2, 2))
    with pytest.raises(HubError, match=f"expected the tensors of {NET}"):
        save_pretrained(wrapped, tmp_path / "other", model=NET, with_classifier=True)
    assert "None were recorded" in (shared / "README.md").read_text()


def test_the_hub_and_back(fitted: ExplainableClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded is put where a download would leave it, and read from there offline."""
    cache = tmp_path / "cache"
    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, token: object) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls["created"] = options
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
            calls["uploaded"] = options
            place = cache / f"models--{repo_id.replace('/', '--')}"
            (place / "refs").mkdir(parents=True)
            (place / "refs" / "main").write_text("f" * 40)
            shutil.copytree(folder_path, place / "snapshots" / ("f" * 40))
            return SimpleNamespace(commit_url="https://example.org/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    url = push_to_hub(fitted, "someone/explainer", model=NET, with_classifier=True, private=True, token="secret")
    assert url == "https://example.org/commit"
    assert calls["token"] == "secret"
    assert calls["created"] == {"private": True, "exist_ok": True}
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *names, **options: download(*names, cache_dir=cache, **options)
    )
    assert same(from_pretrained("someone/explainer"), fitted)
    with pytest.raises(HubError, match=r"expected a folder, or an explainer on the Hub, got 'someone/other'"):
        from_pretrained("someone/other")


@pytest.mark.parametrize("name", ["nowhere", "../nowhere", "/no/where", "a/b/c", "a b/c"])
def test_other_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="expected a folder, or"):
        from_pretrained(name)


def edited(folder: Path, **changes: Any) -> Path:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | changes))
    return folder


def test_folders_of_others_are_not_trusted(run_folder: Path, tmp_path: Path) -> None:
    shared = save_pretrained(run_folder, tmp_path / "shared", with_classifier=True)
    backbone = json.loads((shared / "run.json").read_text())["backbone"]
    for weights in ("/etc/passwd", "../other.safetensors", str(run_folder.parent / "weights.pt")):
        edited(shared, backbone=backbone | {"weights": weights})
        with pytest.raises(HubError, match="that wants weights from"):
            from_pretrained(shared)


def test_older_schemas_are_read_or_refused(run_folder: Path, tmp_path: Path) -> None:
    shared = save_pretrained(run_folder, tmp_path / "shared", with_classifier=True)
    record = json.loads((shared / "run.json").read_text())
    assert same(from_pretrained(shared), load(run_folder))
    # settings that came later have a default
    edited(shared, settings={key: record["settings"][key] for key in ("setup", "epochs", "hidden")})
    assert same(from_pretrained(shared), load(run_folder))
    with pytest.raises(RunError, match=r"expected schema_version \d+, got 0: train again"):
        from_pretrained(edited(shared, schema_version=0))
    with pytest.raises(RunError, match=r"expected schema_version \d+, got 99: update bla"):
        from_pretrained(edited(shared, schema_version=99))


def test_files_of_the_users_are_left_alone(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    for target in (tmp_path / "mine", tmp_path / "mine" / "README.md", run_folder):
        with pytest.raises(HubError, match="choose another name"):
            save_pretrained(run_folder, target)
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    with pytest.raises(HubError, match="beside a run"):
        save_pretrained(run_folder, tmp_path / "shared", model=NET)
    with pytest.raises(HubError, match="share its run folder"):
        save_pretrained(load(run_folder), tmp_path / "shared")
    with pytest.raises(RunError, match="expected a run folder or a shipped explainer"):
        save_pretrained(tmp_path / "nowhere", tmp_path / "shared")


def test_the_shipped_explainer_is_shared_by_name(tmp_path: Path) -> None:
    shared = save_pretrained("tf_efficientnet_lite0", tmp_path / "shared")
    text = (shared / "README.md").read_text()
    assert "4,406 images of `photos and imagenet500, two views each`" in text
    assert "100.0%" in text
    assert bla.from_pretrained is from_pretrained


class Several(nn.Module):
    """Two heads on one map; what it returns is read as it is told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.heads = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), nn.Linear(8, 10)
        nn.init.normal_(self.heads.weight, std=3)

    def forward(self, pixels: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        logits, others = (scale * self.heads(self.stem(pixels).mean((2, 3)))).split(5, dim=1)
        return {"logits": logits, "others": others, "shares": logits.sigmoid()}


@pytest.mark.parametrize(
    "told",
    [
        {"output": "others"},
        {"inputs": {"scale": 0.2}},
        {"output": lambda returned: returned["logits"][:, :3]},
        {"output": "shares", "meaning": "logits"},
        {"output": "shares", "several_labels": False},
        {"output": lambda returned: returned["logits"][:, :1], "meaning": "value"},
    ],
    ids=["output", "inputs", "a part", "meaning", "one label", "a value"],
)
def test_a_classifier_that_was_told_more_comes_back_wrapped_as_it_was(told: dict[str, Any], tmp_path: Path) -> None:
    model = Several().eval()
    own = explainable(model, transform=TRANSFORM, **told)
    own.fitted, own.setup = True, TRAINED
    shared = save_pretrained(own, tmp_path / "shared")
    assert same(from_pretrained(shared, model=explainable(model, transform=TRANSFORM, **told)), own)
    with pytest.raises(RunError, match="wrapped as it was then"):
        from_pretrained(shared, model=model)
    turned = dataclasses.replace(TRANSFORM, mode="crop")
    with pytest.raises(RunError, match="expected a classifier wrapped with"):
        from_pretrained(shared, model=explainable(model, transform=turned, **told))


def test_an_approximation_is_marked_when_it_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(4 * 36, 3))
    own = explainable(model, transform=TRANSFORM)
    own.fitted = True
    again = from_pretrained(save_pretrained(own, tmp_path / "shared"), model=model)
    assert again.note == own.note
    assert "approximate" in again.explain(PHOTOS[0])[0].note
