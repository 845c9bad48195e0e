"""End to end: against a slow training by hand and a frozen trunk; interrupted; in lower precision; as run folders."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bla
from bla.cli import run_command
from bla.comparison import compare
from bla.comparison.methods import ComparisonError
from bla.data.image_sets import image_folder
from bla.data.photo import DataError
from bla.model.attention import BoundedLogitAttention
from bla.model.backbones import weights_digest
from bla.model.classifier import explainable
from bla.model.heads import weighted_sum
from bla.progress import silent
from bla.runs import run
from bla.runs.record import RunError
from bla.runs.run import evaluate, load, open_run, train
from bla.training import loop
from bla.training.checkpoint import Checkpoint
from bla.training.finetuning import TunedNetworks
from bla.training.loop import train_networks
from bla.training.networks import Examples, new_head
from bla.training.photos import Photos, augmentation, readable_photos
from bla.training.settings import Settings, TrainingError
from small import CHANNELS, CLASSES, Tiny, assert_same, log_of, part, tensors, write_classes

TUNED = Settings(epochs=2, head_epochs=3, batch_size=8, learning_rate=0.01, trunk_rate=0.004)


class Normed(Tiny):
    """With batch normalisation and dropout in the trunk."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.drop = nn.Dropout(0.1)

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.drop(self.norm(self.stem(pixels)).relu())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("data") / "colours")


def made(data: Path, settings: Settings, model: nn.Module | None = None) -> tuple[TunedNetworks, Examples]:
    """Networks on a fresh trunk, and photos to train them on."""
    wrapped = explainable(model or Normed(), classes=CLASSES)
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        attention, head = settings.attention(CHANNELS), new_head(CHANNELS, len(CLASSES), settings.head.dropout)
    images = image_folder(data).whole()
    examples = Examples(Photos(images, wrapped.transform), np.arange(len(images)), images.labels)
    return TunedNetworks(attention, head, wrapped.trunk, settings=settings, pixels=wrapped.pixels), examples


def slow_training(networks: TunedNetworks, examples: Examples, settings: Settings) -> None:
    """The stages as written in :mod:`bla.training.finetuning`, in plain torch."""
    photos = examples.cache
    assert isinstance(photos, Photos)
    assert examples.labels is not None
    labels = torch.from_numpy(np.array(examples.labels))
    networks.eval().requires_grad_(False)
    parts: list[tuple[nn.Module, nn.Module, int]] = [
        (networks.baseline_trunk, networks.baseline, settings.stages.head_epochs or settings.stages.epochs),
        (networks.trunk, networks.head, settings.stages.epochs),
        (networks.continued_trunk, networks.continued, settings.stages.epochs),
    ]
    for stage, (trunk, head, epochs) in enumerate(parts):
        if stage:
            trunk.load_state_dict(networks.baseline_trunk.state_dict())
            head.load_state_dict(networks.baseline.state_dict())
        attention = networks.attention
        assert isinstance(attention, BoundedLogitAttention)
        if stage == 1:
            order = np.sort(np.random.RandomState([settings.seed, 1]).permutation(len(examples))[:256])
            attention.calibrate(trunk(networks._pixels(photos.batch(order))))
        learning: list[nn.Module] = [head, attention] if stage == 1 else [head]
        for module in (trunk, *learning):
            module.train().requires_grad_(True)
        adam = torch.optim.Adam(
            [
                {
                    "params": [p for module in learning[::-1] for p in module.parameters()],
                    "lr": settings.stages.learning_rate,
                },
                {"params": list(trunk.parameters()), "lr": settings.trunk.trunk_rate},
            ]
        )
        for epoch in range(epochs):
            order = np.random.RandomState([settings.seed, 2, stage, epoch]).permutation(len(examples))
            for step, start in enumerate(range(0, len(examples), settings.stages.batch_size)):
                chosen = order[start : start + settings.stages.batch_size]
                draws = np.random.RandomState([settings.seed, 3, stage, epoch, step])
                torch.manual_seed(int(draws.randint(2**31)))
                pixels = photos.augmented(chosen) if settings.trunk.augment else photos.batch(chosen)
                features = trunk(networks._pixels(pixels))
                pooled = weighted_sum(features, attention(features).soft) if stage == 1 else features.mean(dim=(2, 3))
                adam.zero_grad()
                functional.cross_entropy(head(pooled), labels[chosen]).backward()
                adam.step()
        for module in (trunk, *learning):
            module.eval().requires_grad_(False)


@pytest.mark.parametrize("augment", [False, True])
def test_the_stages_are_those_of_the_slow_training(data: Path, augment: bool) -> None:
    settings = TUNED.replace(augment=augment)
    networks, examples = made(data, settings)
    start = tensors(networks)
    train_networks(networks, settings, examples)
    slow, same = made(data, settings)
    assert_same(tensors(slow), start)
    with torch.random.fork_rng([]):
        slow_training(slow, same, settings)
    came, expected = tensors(networks), tensors(slow)
    for name, value in came.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        if name.endswith(("stem.weight", "running_mean", "running_var", "1.weight", "score.weight")):
            assert not torch.equal(value, start[name]), f"{name} is trained"


def test_all_ends_as_it_was_but_trained(data: Path) -> None:
    networks, examples = made(data, TUNED)
    modes = {name: module.training for name, module in networks.named_modules()}
    gradients = [parameter.requires_grad for parameter in networks.parameters()]
    random = torch.get_rng_state()
    train_networks(networks, TUNED, examples)
    assert modes == {name: module.training for name, module in networks.named_modules()}
    assert gradients == [parameter.requires_grad for parameter in networks.parameters()]
    assert torch.equal(random, torch.get_rng_state())


def test_post_hoc_leaves_the_tuned_classifier_as_it_is(data: Path) -> None:
    """Weights and running statistics: batch normalisation of a trunk that is not trained follows nothing."""
    networks, examples = made(data, TUNED.replace(setup="bla-ph"))
    start = tensors(networks)
    train_networks(networks, TUNED.replace(setup="bla-ph"), examples)
    came = tensors(networks)
    assert_same(part(came, "trunk"), part(came, "baseline_trunk"))
    assert_same(part(came, "head"), part(came, "baseline"))
    for name in ("model.stem.weight", "model.norm.running_mean", "model.norm.weight"):
        assert not torch.equal(came[f"trunk.{name}"], start[f"trunk.{name}"]), "tuned in the first stage"
        assert not torch.equal(came[f"trunk.{name}"], came[f"continued_trunk.{name}"])
    assert not torch.equal(came["attention.score.weight"], start["attention.score.weight"])


def test_batch_normalisation_uses_what_it_followed(data: Path) -> None:
    """Evaluated one by one or together, a tuned trunk gives the same features: no batch is looked at any more."""
    networks, examples = made(data, TUNED)
    train_networks(networks, TUNED, examples)
    networks.eval()
    together = networks.features(examples.subset(np.arange(8)))
    alone = torch.cat([networks.features(examples.subset(np.array([i]))) for i in range(8)])
    torch.testing.assert_close(together, alone)
    assert not together.requires_grad


def test_a_trunk_that_hardly_moves_gives_what_cached_features_give(data: Path, tmp_path: Path) -> None:
    quick = TUNED.replace(trunk_rate=None)
    frozen = train(data, tmp_path / "frozen", quick, model=Tiny(), cache=tmp_path / "cache", report=silent)
    still = TUNED.replace(trunk_rate=1e-12)
    tuned = train(data, tmp_path / "tuned", still, model=Tiny(), cache=tmp_path / "cache", report=silent)
    for name in ("baseline", "baseline_continued", "soft", "soft_renormalised", "hard"):
        assert tuned.record["metrics"][name] == pytest.approx(frozen.record["metrics"][name], rel=0.02, abs=0.005)
    assert tuned.record["metrics"]["size"]["mean"] == pytest.approx(frozen.record["metrics"]["size"]["mean"], abs=0.3)


# --- interrupted


class StopError(Exception):
    """A kill."""


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_interrupted_anywhere_it_ends_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    settings = TUNED.replace(
        epochs=1, head_epochs=2, batch_size=16, augment=True, precision=precision, validation=0.2, patience=2
    )
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def once(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        networks, examples = made(data, settings)
        kept, held_out = examples.subset(np.arange(0, 30)), examples.subset(np.arange(30, 36))
        outcome = train_networks(networks, settings, kept, held_out, folder=folder)
        return tensors(networks), outcome

    expected = once(tmp_path / "whole")
    lines = log_of(tmp_path / "whole")
    write = Checkpoint.write
    for at in itertools.count(1, 2 if precision == "float32" else 4):
        folder, saves = tmp_path / f"run-{at}", 0

        def stopping(checkpoint: Checkpoint, *given: Any, at: int = at) -> None:
            nonlocal saves
            saves += 1
            write(checkpoint, *given)
            if saves == at:
                raise StopError

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "write", stopping)
            try:
                once(folder)
            except StopError:
                pass
            else:
                break
        state = json.loads((next(folder.glob("checkpoint-*")) / "state.json").read_text())
        assert bool(state["scaler"]) == (precision == "float16"), "the scale of the loss goes on too"
        came = once(folder)
        assert_same(came[0], expected[0])
        assert came[1] == expected[1]
        assert log_of(folder) == lines
        shutil.rmtree(folder)
    assert at > 6


# --- precision and augmentation


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_stops_at_the_features(data: Path, precision: Any) -> None:
    settings = TUNED.replace(precision=precision)
    networks, examples = made(data, settings)
    seen: list[torch.dtype] = []
    networks.trunk.register_forward_hook(lambda _, __, features: seen.append(features.dtype))
    outcome = train_networks(networks, settings, examples)
    assert set(seen) == {getattr(torch, precision)}
    assert not outcome["dead"]
    assert networks.features(examples.subset(np.arange(2))).dtype == torch.float32
    assert all(value.dtype != getattr(torch, precision) for value in tensors(networks).values())
    exact, _ = made(data, TUNED)
    train_networks(exact, TUNED, examples)
    changed = exact.trunk.state_dict()["model.stem.weight"] - networks.trunk.state_dict()["model.stem.weight"]
    assert 0 < changed.abs().max() < 0.05, "near the training in float32, and not the same"


def test_augmentation_is_a_function_of_torchs_generator(data: Path) -> None:
    images = image_folder(data).whole()
    photos = Photos(images, explainable(Tiny()).transform)
    rows = np.array([0, 5, 0, 7])

    def drawn(seed: int) -> Any:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return photos.augmented(rows)

    first = drawn(0)
    assert first.shape == photos.batch(rows).shape == (4, 24, 40, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(drawn(0), first)
    assert (drawn(1) != first).any()
    assert (first[0] != first[2]).any(), "each photo by itself"
    np.testing.assert_array_equal(photos.batch(rows)[0], photos.transform.read(images.path(0)).pixels)
    assert "RandomResizedCrop" in repr(augmentation((24, 40), "lanczos"))


# --- run folders


@pytest.fixture(scope="module")
def tuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    settings = TUNED.replace(head_epochs=12, augment=True)
    train(data, folder / "run", settings, model=Normed(), device="cpu", cache=folder / "cache", report=silent)
    return folder / "run"


def test_a_run_holds_its_trunk(tuned: Path, data: Path, tmp_path: Path) -> None:
    record = json.loads((tuned / "run.json").read_text())
    classifier = load(tuned, model=Normed(seed=5))  # weights of any start: its own come with the run
    assert record["trunk"] == weights_digest(classifier.trunk) != record["backbone"]["digest"]
    assert record["backbone"]["digest"] == weights_digest(explainable(Normed()).trunk), "what training started from"
    assert record["model"] == classifier.name == "tiny, end to end"
    [explanation] = classifier.explain(data / "class 0" / "00.png")
    assert explanation.model == "tiny, end to end"
    assert explanation.grid == (3, 5)
    metrics, failures = evaluate(tuned, model=Normed(seed=5), cache=tmp_path)
    assert (metrics, failures) == (record["metrics"], ())
    assert not list(tmp_path.iterdir()), "no features are cached of a trunk that is trained"


def test_its_metrics_are_those_of_three_trunks(tuned: Path, data: Path) -> None:
    opened = open_run(tuned, model=Normed())
    networks = opened.networks.eval()
    assert isinstance(networks, TunedNetworks)
    images = image_folder(data).test
    pixels = opened.classifier.pixels(Photos(images, opened.classifier.transform).batch(np.arange(len(images))))
    labels = torch.from_numpy(np.array(images.labels))
    with torch.no_grad():
        logits = {
            "baseline": networks.baseline(networks.baseline_trunk(pixels).mean(dim=(2, 3))),
            "baseline_continued": networks.continued(networks.continued_trunk(pixels).mean(dim=(2, 3))),
            "hard": opened.classifier(pixels),
        }
    for name, values in logits.items():
        loss = functional.cross_entropy(values, labels).item()
        assert opened.record["metrics"][name]["loss"] == pytest.approx(loss, abs=1e-5), name
    agreed = (logits["hard"].argmax(-1) == logits["baseline"].argmax(-1)).float().mean().item()
    assert opened.record["metrics"]["agreement"] == pytest.approx(agreed)
    assert opened.record["metrics"]["baseline"]["top1"] > 0.6, "it learns"


def test_another_trunk_is_refused(tuned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tuned, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"trunk": "0" * 64}))
    with pytest.raises(RunError, match=r"expected the weights of the run in .*another trunk"):
        load(folder, model=Normed())


def test_a_finished_run_is_returned_as_it_is(tuned: Path, data: Path, tmp_path: Path) -> None:
    before = (tuned / "model.safetensors").read_bytes()
    settings = TUNED.replace(head_epochs=12, augment=True)
    again = train(data, tuned, settings, model=Normed(), device="cpu", report=silent)
    assert (tuned / "model.safetensors").read_bytes() == before
    assert weights_digest(again.classifier.trunk) == again.record["trunk"]
    with pytest.raises(TrainingError, match="differs in settings"):
        train(data, tuned, settings.replace(trunk_rate=0.1), model=Normed(), report=silent)


def test_photos_that_cannot_be_read_take_no_part(data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "class 1" / "00.png").write_bytes(b"")
    (broken / "class 2" / "03.jpg").write_bytes(b"no photo")
    settings = TUNED.replace(epochs=1, head_epochs=1)
    trained = train(broken, tmp_path / "run", settings, model=Tiny(), report=silent)
    assert [entry["image"] for entry in trained.record["skipped"]] == ["class 1/00.png", "class 2/03.jpg"]
    assert sum(trained.record["data"]["images"].values()) == 34
    for path in broken.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="expected images that can be read, got none of 36"):
        readable_photos(image_folder(broken).whole(), explainable(Tiny()).transform)


def test_settings_that_contradict() -> None:
    for wrong, message in [
        ({"augment": True}, "expected no augment without trunk_rate: a frozen trunk gives features once"),
        ({"precision": "bfloat16"}, "expected no precision without trunk_rate"),
        ({"trunk_rate": 0.0}, "expected trunk_rate above 0"),
        ({"trunk_rate": 1e-4, "precision": "int8"}, "expected precision 'float32' or 'bfloat16'"),
        ({"trunk_rate": 1e-4, "head": "own", "setup": "bla-ph"}, "expected head='new' with trunk_rate"),
        ({"trunk_rate": 1e-4, "class_aware": True}, "expected setup bla-ph for class_aware with trunk_rate"),
    ]:
        with pytest.raises(TrainingError, match=message):
            Settings(**wrong)  # type: ignore[arg-type]


def test_from_scratch_by_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights of a small net of timm's: trained, loaded without fetching any, shared."""
    command = ["train", str(data), "--out", str(tmp_path / "run")]
    options = "--model test_efficientnet --weights random --epochs 1 --batch-size 12 --trunk-rate 1e-3 --augment"
    assert run_command([*command, *options.split(), "--precision", "bfloat16", "--device", "cpu", "--json"]) == 0
    trained = open_run(tmp_path / "run", device="cpu")
    assert json.loads(capsys.readouterr().out) == trained.record
    chosen = trained.record["settings"]
    assert (chosen["trunk_rate"], chosen["augment"], chosen["precision"]) == (1e-3, True, "bfloat16")
    assert trained.record["backbone"]["weights"] == "random"
    classifier = load(tmp_path / "run", device="cpu")
    assert weights_digest(classifier.trunk) == trained.record["trunk"]
    assert run.evaluate(tmp_path / "run", device="cpu")[0] == trained.record["metrics"]
    shared = bla.save_pretrained(tmp_path / "run", tmp_path / "shared", with_classifier=True)
    assert sorted(path.name for path in shared.iterdir()) == ["README.md", "model.safetensors", "run.json"]
    assert trained.record["trunk"] in (shared / "README.md").read_text()
    again = bla.from_pretrained(shared, device="cpu")
    assert weights_digest(again.trunk) == trained.record["trunk"]
    with pytest.raises(ComparisonError, match="each was trained end to end with its own trunk"):
        compare(tmp_path / "run", out=tmp_path / "compared", device="cpu")
