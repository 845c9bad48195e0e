"""The stages against a slow reference in NumPy; determinism, resuming at every position, early stopping, death."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor, nn

from bla.model.attention import BoundedLogitAttention, L2XAttention
from bla.training import checkpoint, mean_size
from bla.training import loop as training
from bla.training.checkpoint import clear_checkpoints
from bla.training.loop import train_networks
from bla.training.mean_size import bound_of_mean_size
from bla.training.networks import Examples, Networks
from bla.training.settings import Settings, TrainingError
from forked import Starter
from small import MAP_CHANNELS as CHANNELS
from small import MAP_CLASSES as CLASSES
from small import MAP_GRID as GRID
from small import assert_same, log_of, make_examples, make_networks, part, tensors

CELLS = GRID[0] * GRID[1]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As in the processes that are killed: sums over several threads round another way. It is faster, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the stages, rebuilt slowly from the paper


class Adam:
    """Kingma and Ba 2015, algorithm 1, in float64."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate, self.t = learning_rate, 0
        self.m: dict[str, Any] = {}
        self.v: dict[str, Any] = {}

    def step(self, values: dict[str, npt.NDArray[np.float64]], gradients: dict[str, Any]) -> None:
        self.t += 1
        for name, g in gradients.items():
            m = self.m[name] = 0.9 * self.m.get(name, 0) + 0.1 * g
            v = self.v[name] = 0.999 * self.v.get(name, 0) + 0.001 * g**2
            rate = m / (1 - 0.9**self.t) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)
            values[name] = values[name] - self.learning_rate * rate


def cross_entropy(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> tuple[float, Any]:
    """The mean loss and its gradient by the logits."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    truth = np.eye(CLASSES)[labels]
    return float(-np.log((p * truth).sum(1)).mean()), (p - truth) / len(labels)


def order_of(settings: Settings, stage: int, epoch: int, count: int) -> list[npt.NDArray[np.int64]]:
    """The batches: the one thing taken over from the code, being a matter of definition."""
    order = np.random.RandomState([settings.seed, 2, stage, epoch]).permutation(count)
    return [order[start : start + settings.stages.batch_size] for start in range(0, count, settings.stages.batch_size)]


def slow_head(
    start: dict[str, Any], settings: Settings, examples: Examples, stage: int, epochs: int
) -> tuple[dict[str, Any], list[float]]:
    """Softmax regression on the average of the map."""
    values, adam, losses = dict(start), Adam(settings.stages.learning_rate), []
    pooled = np.float64(examples.cache.features)[examples.rows].mean(axis=(1, 2))
    for epoch in range(epochs):
        total = 0.0
        for batch in order_of(settings, stage, epoch, len(examples)):
            loss, d = cross_entropy(pooled[batch] @ values["weight"].T + values["bias"], examples.labels[batch])
            total += loss * len(batch)
            adam.step(values, {"weight": d.T @ pooled[batch], "bias": d.sum(0)})
        losses.append(total / len(examples))
    return values, losses


def slow_module(
    start: dict[str, Any], settings: Settings, examples: Examples, threshold: float, train_head: bool
) -> tuple[dict[str, Any], list[float]]:
    """Bounded logit attention by the formulas, with the gradients worked out by hand."""
    values, adam, losses = dict(start), Adam(settings.stages.learning_rate), []
    maps = np.float64(examples.cache.features)[examples.rows].reshape(len(examples), CELLS, CHANNELS)
    for epoch in range(settings.stages.epochs):
        total = 0.0
        for batch in order_of(settings, 1, epoch, len(examples)):
            F = maps[batch]
            u = F @ values["w"] + values["b"]
            z = -np.maximum(u, 0)
            s = np.exp(0.1 * z)
            s /= s.sum(1, keepdims=True)
            g = np.maximum(s - threshold, 0)
            pooled = (g[:, :, None] * F).sum(1)
            loss, d = cross_entropy(pooled @ values["weight"].T + values["bias"], examples.labels[batch])
            total += loss * len(batch)
            ds = (F * (d @ values["weight"])[:, None, :]).sum(2) * (s > threshold)
            du = -0.1 * s * (ds - (s * ds).sum(1, keepdims=True)) * (u > 0)
            gradients = {"w": (du[:, :, None] * F).sum((0, 1)), "b": du.sum()}
            if train_head:
                gradients |= {"weight": d.T @ pooled, "bias": d.sum(0)}
            adam.step(values, gradients)
        losses.append(total / len(examples))
    return values, losses


def linear(state: dict[str, Tensor], name: str) -> dict[str, Any]:
    return {kind: state[f"{name}.1.{kind}"].double().numpy() for kind in ("weight", "bias")}


@pytest.mark.parametrize("setup", ["bla", "bla-t", "bla-ph"])
def test_the_stages_are_what_the_paper_says(setup: Any, tmp_path: Path) -> None:
    settings = Settings(setup=setup, dropout=0.0, epochs=3, head_epochs=4, batch_size=16, learning_rate=0.01, seed=3)
    examples, validation = make_examples(), make_examples(70, seed=1)
    networks = make_networks(settings)
    before = tensors(networks)
    outcome = train_networks(networks, settings, examples, validation, folder=tmp_path)
    after = tensors(networks)
    assert outcome == {"dead": False, "epochs": {"head": 4, "module": 3, "continued": 3}}

    baseline, head_losses = slow_head(linear(before, "baseline"), settings, examples, 0, 4)
    attention = make_networks(settings).attention
    assert isinstance(attention, BoundedLogitAttention)
    attention.calibrate(examples.cache.batch(examples.rows))
    score = part(tensors(attention), "score")
    start = baseline | {"w": score["weight"].double().numpy().reshape(-1), "b": score["bias"].double().numpy()[0]}
    threshold = 0.0 if setup == "bla" else 0.98 / CELLS
    module, module_losses = slow_module(start, settings, examples, threshold, train_head=setup != "bla-ph")
    continued, continued_losses = slow_head(baseline, settings, examples, 2, 3)

    for name, values in (("baseline", baseline), ("head", module), ("continued", continued)):
        for kind, value in linear(after, name).items():
            np.testing.assert_allclose(value, values[kind], rtol=0, atol=2e-4, err_msg=f"{name} {kind}")
    score = part(after, "attention.score")
    np.testing.assert_allclose(score["weight"].numpy().reshape(-1), module["w"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(score["bias"].numpy(), module["b"], rtol=0, atol=2e-4)
    assert (start["w"] - module["w"]).std() > 0.01  # much more than the tolerance

    log = log_of(tmp_path)
    assert [(line["stage"], line["epoch"]) for line in log] == [
        (stage, epoch + 1) for stage, epochs in outcome["epochs"].items() for epoch in range(epochs)
    ]
    expected = [*head_losses, *module_losses, *continued_losses]
    np.testing.assert_allclose([line["loss"] for line in log], expected, rtol=1e-4)
    assert all(left > right for losses in (head_losses, continued_losses) for left, right in itertools.pairwise(losses))
    assert module_losses[0] > module_losses[-1]

    # validation: the baseline on all cells, the module by its hard selection
    maps = np.float64(validation.cache.features)[validation.rows].reshape(-1, CELLS, CHANNELS)
    u = maps @ module["w"] + module["b"]
    chosen = (u <= np.maximum(u.min(1, keepdims=True), 0))[:, :, None]
    hard = (maps * chosen).sum(1) / chosen.sum(1)
    for line, pooled, values in (
        (log[3], maps.mean(1), baseline),
        (log[6], hard, module),
        (log[9], maps.mean(1), continued),
    ):
        logits = pooled @ values["weight"].T + values["bias"]
        loss, _ = cross_entropy(logits, validation.labels)
        assert line["validation"]["loss"] == pytest.approx(loss, rel=2e-3)
        assert line["validation"]["top1"] == pytest.approx((logits.argmax(1) == validation.labels).mean(), abs=0.03)
        assert line["validation"]["top5"] == 1


def test_post_hoc_leaves_the_head_to_the_bit_and_joint_training_does_not() -> None:
    for setup, same in (("bla-ph", True), ("bla", False), ("bla-t", False), ("l2x-f", False)):
        settings = Settings(setup=setup, epochs=1, batch_size=8)
        networks = make_networks(settings)
        before = tensors(networks)
        train_networks(networks, settings, make_examples())
        after = tensors(networks)
        head, baseline = part(after, "head"), part(after, "baseline")
        assert all(torch.equal(head[name], baseline[name]) for name in head) == same, setup
        assert not torch.equal(after["baseline.1.weight"], before["baseline.1.weight"])
        assert not torch.equal(after["continued.1.weight"], after["baseline.1.weight"])
        assert not torch.equal(after["attention.score.weight"], before["attention.score.weight"])


@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_the_rival_learns_a_selection_of_its_size(variant: Any, tmp_path: Path) -> None:
    settings = Settings(setup="l2x-f", size=3, variant=variant, epochs=6, batch_size=8, learning_rate=0.02)
    networks, examples = make_networks(settings), make_examples()
    assert train_networks(networks, settings, examples, folder=tmp_path)["dead"] is False
    losses = [line["loss"] for line in log_of(tmp_path) if line["stage"] == "module"]
    assert losses[-1] < losses[0]
    selection = networks.eval().attention(examples.cache.batch(examples.rows))
    assert (selection.hard.count_nonzero(dim=(1, 2)) == 3).all()


@pytest.mark.parametrize("targets", ["labels", "predictions"])
@pytest.mark.parametrize("setup", ["bla-ph", "l2x-f"])
def test_an_own_head_is_never_changed(setup: Any, targets: Any, tmp_path: Path) -> None:
    settings = Settings(setup=setup, head="own", targets=targets, size=3, epochs=4, batch_size=8, learning_rate=0.02)
    examples = make_examples()
    if targets == "predictions":
        examples = dataclasses.replace(examples, labels=None)
    networks = make_networks(settings)
    assert networks.head is networks.baseline is networks.continued
    before = tensors(networks)
    outcome = train_networks(networks, settings, examples, examples, folder=tmp_path)
    assert outcome["epochs"] == {"module": 4}
    after = tensors(networks)
    assert_same(part(after, "baseline"), part(before, "baseline"))
    assert not torch.equal(after["attention.score.weight"], before["attention.score.weight"])
    assert set(networks.saved()) == {"attention.score.weight", "attention.score.bias"}
    # what it learns is what it is asked for
    with torch.no_grad():
        networks.eval()
        pooled = examples.cache.pooled_batch(examples.rows)
        truth = networks.baseline(pooled).argmax(-1) if targets == "predictions" else torch.from_numpy(examples.labels)
        features = examples.cache.batch(examples.rows)
        hard = networks.attention(features).hard
        logits = networks.head((features * hard[:, None]).sum(dim=(2, 3)))
    last = log_of(tmp_path)[-1]["validation"]
    assert last["loss"] == pytest.approx(nn.functional.cross_entropy(logits, truth).item(), rel=1e-5)
    assert last["top1"] == pytest.approx((logits.argmax(-1) == truth).float().mean().item())


def test_no_example_is_an_error() -> None:
    examples = make_examples()
    none = examples.subset(np.array([], np.int64))
    with pytest.raises(TrainingError, match="expected at least one training image, got none"):
        train_networks(make_networks(Settings()), Settings(), none)
    with pytest.raises(TrainingError, match="expected at least one validation image, got none"):
        train_networks(make_networks(Settings()), Settings(), examples, none)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 200])
def test_batches_cover_everything_once(count: int) -> None:
    examples = make_examples(200).subset(np.arange(count))
    found = list(examples.batches())
    assert np.array_equal(np.concatenate([np.array([], int), *(batch.rows for batch in found)]), examples.rows)
    assert all(0 < len(batch) <= 64 for batch in found)


# --- determinism


@pytest.mark.parametrize("setup", ["bla-t", "l2x-f"])
def test_the_seed_alone_decides(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = make_examples()

    def trained(seed: int) -> dict[str, Tensor]:
        settings = Settings(setup=setup, size=3, epochs=2, batch_size=8, seed=seed, learning_rate=0.01)
        networks = make_networks(settings)
        train_networks(networks, settings, examples)
        return tensors(networks)

    torch.manual_seed(1)
    first = trained(0)
    torch.manual_seed(2)
    monkeypatch.setattr(training, "UNAWAITED", ("cpu",))
    assert_same(trained(0), first)
    other = trained(1)
    for name in ("attention.score.weight", "baseline.1.weight", "head.1.weight", "continued.1.weight"):
        assert not torch.equal(other[name], first[name])


def test_dropout_and_draws_are_new_at_every_step() -> None:
    settings = Settings(setup="l2x-f", size=3, epochs=3, batch_size=20, dropout=0.5)
    networks, examples = make_networks(settings), make_examples()
    masks: list[str] = []
    for head in (networks.baseline, networks.head, networks.continued):
        head[0].register_forward_hook(lambda _, inputs, output: masks.append(str((output == 0).int().tolist())))
    seeds: list[int] = []
    networks.attention.register_forward_hook(lambda *_: seeds.append(torch.initial_seed()))
    train_networks(networks, settings, examples)
    assert len(set(masks)) == len(masks) == 18
    assert len(set(seeds)) == len(seeds) == 6


def test_nothing_but_the_weights_is_left_changed(tmp_path: Path) -> None:
    settings = Settings(setup="bla-ph", epochs=1, batch_size=8)
    networks, examples = make_networks(settings), make_examples()
    networks.train()
    networks.head.eval()
    networks.attention.score.bias.requires_grad_(False)
    networks.continued[1].weight.requires_grad_(False)

    def state() -> tuple[Any, ...]:
        return (
            [module.training for module in networks.modules()],
            [parameter.requires_grad for parameter in networks.parameters()],
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),
            random.getstate(),
            torch.is_grad_enabled(),
        )

    before = state()
    train_networks(networks, settings, examples, examples, folder=tmp_path / "run")
    assert state() == before

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_networks(networks, settings, examples, report=stop)
    assert state() == before


# --- resuming

RESUMED = Settings(
    setup="bla-t", epochs=2, head_epochs=1, batch_size=20, learning_rate=0.05, validation=0.5, patience=1, seed=7
)


def resumed_data() -> tuple[Examples, Examples]:
    """Training images, and validation images whose loss grows from the first epoch on: their labels are wrong."""
    examples = make_examples()
    return examples, dataclasses.replace(examples, labels=(examples.labels + 1) % CLASSES)


def train_resumable(folder: Path, report: Callable[[str, int, int], None] | None = None) -> tuple[Any, ...]:
    """Everything that a training leaves behind."""
    networks = make_networks(RESUMED)
    train, validation = resumed_data()
    options = {} if report is None else {"report": report}
    outcome = train_networks(networks, RESUMED, train, validation, folder=folder, identity={"data": "these"}, **options)
    return outcome, (folder / "log.jsonl").read_text(), tensors(networks)


def assert_as_uninterrupted(came: tuple[Any, ...], expected: tuple[Any, ...], where: object) -> None:
    assert came[:2] == expected[:2], where
    assert_same(came[2], expected[2])


class Interruption:
    """Interrupts the process at its n-th step, in or between the writes, the moves and the removals."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count = at, 0
        adam, rename, text, remove, save = (
            torch.optim.Adam.step, Path.rename, Path.write_text, shutil.rmtree, Path.write_bytes,
        )  # fmt: skip

        def step(optimiser: Any, *arguments: Any) -> None:
            self.tick()
            adam(optimiser, *arguments)
            self.tick()

        def move(path: Path, target: Path) -> Path:
            self.tick()
            rename(path, target)
            self.tick()
            return target

        def write_text(path: Path, content: str, **options: Any) -> int:
            self.tick(lambda: text(path, content[: len(content) // 2], **options))
            return text(path, content, **options)

        def rmtree(path: Path, **options: Any) -> None:
            if Path(path).is_dir():
                self.tick(lambda: min(Path(path).iterdir()).unlink())
            remove(path, **options)
            self.tick()

        def write_bytes(path: Path, content: bytes) -> int:
            self.tick(lambda: save(path, content[: len(content) // 2]))
            return save(path, content)

        monkeypatch.setattr(torch.optim.Adam, "step", step)
        monkeypatch.setattr(Path, "rename", move)
        monkeypatch.setattr(Path, "write_text", write_text)
        monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    def tick(self, half: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.at:
            half()
            raise KeyboardInterrupt

    def report(self, *_: Any) -> None:
        self.tick()


@pytest.fixture
def uninterrupted(tmp_path: Path) -> tuple[Any, ...]:
    result = train_resumable(tmp_path / "uninterrupted")
    outcome, log, _ = result
    assert outcome["epochs"] == {"head": 1, "module": 2, "continued": 2}
    lines = [json.loads(line) for line in log.splitlines()]
    for first, second in (lines[1:3], lines[3:5]):  # so patience had something to do
        assert first["validation"]["loss"] < second["validation"]["loss"]
    return result


def test_interrupted_anywhere_and_resumed_it_ends_the_same(
    uninterrupted: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is much lost: once there is a checkpoint there is always a whole one."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)  # a checkpoint after every step
    steps, step = 0, torch.optim.Adam.step

    def counting(optimiser: Any, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        step(optimiser, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", counting)
    for at in itertools.count(1, 5):  # every fifth place: each line of each step's, in one step or another
        folder, steps = tmp_path / f"run-{at}", 0
        with monkeypatch.context() as patch:
            interruption = Interruption(patch, at)
            try:
                result = train_resumable(folder, interruption.report)
            except KeyboardInterrupt:
                pass
            else:  # it had come to its end before
                assert_as_uninterrupted(result, uninterrupted, "with checkpoints")
                break
        assert_as_uninterrupted(train_resumable(folder), uninterrupted, at)
        assert steps <= 10 + 1, at
        clear_checkpoints(folder)
        assert [path.name for path in folder.iterdir()] == ["log.jsonl"]
    assert (steps, at > 100) == (10, True)


def test_interrupted_again_and_again(
    uninterrupted: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    attempts, result = 0, None
    while result is None:
        attempts += 1
        with monkeypatch.context() as patch:
            interruption = Interruption(patch, 23)
            with contextlib.suppress(KeyboardInterrupt):
                result = train_resumable(tmp_path / "run", interruption.report)
    assert attempts > 5
    assert_as_uninterrupted(result, uninterrupted, attempts)
    # and once more after the end: nothing is left to do
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", None)
        assert_as_uninterrupted(train_resumable(tmp_path / "run"), uninterrupted, "after the end")


KILLED_AT = (1, 2, 3, 4, 6, 7, 9, 10)
"""Optimiser steps, of ten: in and at the ends of the three stages."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and forks as POSIX does")
def test_a_killed_process_is_resumed(uninterrupted: tuple[Any, ...], start: Starter, tmp_path: Path) -> None:
    assert start(1, f"import runpy; runpy.run_path({__file__!r})['main']({str(tmp_path)!r})") == [0]
    for at in KILLED_AT:
        folder = tmp_path / f"killed-{at}"
        assert any(folder.glob("checkpoint-*")) == (at > 1)
        assert_as_uninterrupted(train_resumable(folder), uninterrupted, at)


def test_what_is_half_written_is_ignored_and_removed(uninterrupted: tuple[Any, ...], tmp_path: Path) -> None:
    partial = tmp_path / "run" / ".checkpoint-999.partial"
    partial.mkdir(parents=True)
    (partial / "networks.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "log.jsonl").write_text("of an attempt without checkpoints\n")
    assert_as_uninterrupted(train_resumable(tmp_path / "run"), uninterrupted, "partial")
    assert not partial.exists()


def test_two_whole_checkpoints_stay_until_they_are_cleared(tmp_path: Path) -> None:
    train_resumable(tmp_path)
    assert [path.name.split("-")[0] for path in sorted(tmp_path.iterdir())] == ["checkpoint", "checkpoint", "log.jsonl"]
    clear_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    ("changes", "identity", "named"),
    [
        ({"learning_rate": 0.01}, {"data": "these"}, "settings"),
        ({}, {"data": "others"}, "data"),
        ({"seed": 8}, {"data": "others", "classes": ["a"]}, "data, classes, settings"),
    ],
)
def test_the_checkpoint_of_another_training_is_refused(
    changes: dict[str, Any], identity: dict[str, Any], named: str, tmp_path: Path
) -> None:
    train_resumable(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    settings = RESUMED.replace(**changes)
    with pytest.raises(TrainingError, match=rf"differs in {named}: train with the same settings and data, choose"):
        train_networks(make_networks(settings), settings, *resumed_data(), folder=tmp_path, identity=identity)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


OPTIONS = [
    {"class_aware": True, "hidden": (4,)},
    {"straight_through": 0.5},
    {"final_temperature": 3.0, "threshold": 0},
    {"mean_size": 2.5, "straight_through": 1.0},
    {"mean_size": 3, "dial": 0.5, "patience": None, "validation": 0},
    {"setup": "bla-ph", "head": "own", "targets": "predictions", "class_aware": True, "mean_size": 4, "dial": 0.3},
    {"setup": "l2x-f", "size": 2},
    {"setup": "bla", "gate": True, "context": True, "mean_size": 5, "final_temperature": 1.0, "class_aware": False},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_every_option_resumes_to_the_same(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after optimiser steps at the end of a stage, in an epoch of the module's, and in its next epoch."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    settings = RESUMED.replace(**changes)
    train, validation = resumed_data()

    def trained(folder: Path) -> tuple[Any, ...]:
        networks = make_networks(settings)
        given = validation if settings.held_out else None
        outcome = train_networks(networks, settings, train, given, folder=folder)
        return outcome, (folder / "log.jsonl").read_text(), tensors(networks)

    expected = trained(tmp_path / "uninterrupted")
    adam = torch.optim.Adam.step
    for at in (2, 3, 5) if not settings.own_head else (1, 2, 3):
        steps = itertools.count(1)

        def step(optimiser: Any, *arguments: Any, at: int = at, steps: Any = steps) -> None:
            adam(optimiser, *arguments)
            if next(steps) == at:
                raise KeyboardInterrupt

        folder = tmp_path / f"run-{at}"
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", step)
            with pytest.raises(KeyboardInterrupt):
                trained(folder)
        assert_as_uninterrupted(trained(folder), expected, at)


# --- options beside the paper


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_straight_through_is_a_share_of_the_loss(share: float, tmp_path: Path) -> None:
    """The first step's loss, on all images, from the start of a module whose learning rate is next to nothing."""
    settings = Settings(
        setup="bla-ph", head="own", epochs=1, batch_size=64, learning_rate=1e-12, straight_through=share, threshold=0
    )
    examples, networks = make_examples(), make_networks(settings)
    before = tensors(networks.attention)
    train_networks(networks, settings, examples, folder=tmp_path)
    networks.eval()
    with torch.no_grad():
        features = examples.cache.batch(examples.rows)
        selection = networks.attention(features)
        losses = [
            nn.functional.cross_entropy(
                networks.head((features * weights[:, None]).sum(dim=(2, 3))), torch.from_numpy(examples.labels)
            ).item()
            for weights in (selection.soft, selection.hard)
        ]
    assert log_of(tmp_path)[0]["loss"] == pytest.approx((1 - share) * losses[0] + share * losses[1], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    networks = make_networks(settings)
    train_networks(networks, settings.replace(learning_rate=0.01), examples)
    assert not torch.equal(networks.attention.score.weight, before["score.weight"]), "the soft selection's gradient"


def test_the_temperature_goes_to_its_end_by_equal_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(epochs=2, head_epochs=1, batch_size=10, temperature=0.1, final_temperature=1.6, dropout=0)
    networks, found = make_networks(settings), []
    forward = BoundedLogitAttention.forward

    def recording(module: Any, *arguments: Any, **options: Any) -> Any:
        if module.training:
            found.append(module.temperature)
        return forward(module, *arguments, **options)

    monkeypatch.setattr(BoundedLogitAttention, "forward", recording)
    train_networks(networks, settings, make_examples())
    assert found == pytest.approx([0.1 * 16 ** (step / 8) for step in range(8)])
    assert networks.attention.temperature == settings.attention(CHANNELS).temperature == 1.6


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_dial_draws_sizes_anew(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(epochs=15, head_epochs=1, batch_size=10, dial=share)
    sizes = []
    forward = BoundedLogitAttention.forward

    def recording(module: Any, features: Tensor, *, size: int | None = None) -> Any:
        if module.training:
            sizes.append(size)
        return forward(module, features, size=size)

    monkeypatch.setattr(BoundedLogitAttention, "forward", recording)
    train_networks(make_networks(settings), settings, make_examples())
    drawn = [size for size in sizes if size is not None]
    assert len(sizes) == 60
    assert abs(len(drawn) - 60 * share) <= 10
    assert set(drawn) <= set(range(1, CELLS // 2 + 1))
    assert not share or len(set(drawn)) == CELLS // 2


@pytest.mark.parametrize("size", [1, 1.5, 7.25, CELLS])
@pytest.mark.parametrize(("validated", "aware"), [(False, False), (True, False), (False, True)])
def test_a_mean_size_is_met_where_it_is_set(size: float, validated: bool, aware: bool, tmp_path: Path) -> None:
    settings = Settings(
        epochs=3, batch_size=10, learning_rate=0.01, mean_size=size, validation=0.5 * validated, class_aware=aware
    )
    networks, (train, held_out) = make_networks(settings), resumed_data()
    held_out = held_out.subset(np.arange(13))
    outcome = train_networks(networks, settings, train, held_out if validated else None, folder=tmp_path)
    images = held_out if validated else train
    networks.eval()
    with torch.no_grad():
        sizes = (networks.attention(images.cache.batch(images.rows)).hard > 0).sum(dim=(1, 2)).double()
    on = "validation" if validated else "training, judged unseen" if aware else "training"
    assert (outcome["mean_size"]["asked"], outcome["mean_size"]["on"]) == (size, on)
    assert outcome["mean_size"]["set"] == log_of(tmp_path)[-4]["mean_size"]
    assert abs(outcome["mean_size"]["set"] - size) <= 0.5 / len(images) + 1e-9
    if on != "training, judged unseen":
        assert sizes.mean().item() == outcome["mean_size"]["set"]
    if 1 < size < CELLS:
        assert sizes.min() < sizes.max(), "each image has its own"


def test_the_bound_of_a_class_aware_score_is_set_on_what_unseen_judges_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image once, by a judge trained on the others; then the baseline judges again."""
    settings = Settings(epochs=1, head_epochs=2, batch_size=10, mean_size=3, class_aware=True)
    networks, examples = make_networks(settings), make_examples()
    judged: list[tuple[set[int], set[int]]] = []
    train_judge = mean_size.trained_judge

    def recording(nets: Networks, given: Settings, some: Examples, fold: int) -> nn.Module:
        judge = train_judge(nets, given, some, fold)
        judged.append((set(some.rows.tolist()), set()))
        judge.register_forward_hook(lambda *_: seen.append(len(judged)))
        return judge

    seen: list[int] = []
    features = Networks.features

    def reading(nets: Networks, some: Examples) -> Tensor:
        if judged and nets.attention.judge is not nets.baseline:
            judged[-1][1].update(some.rows.tolist())
        return features(nets, some)

    monkeypatch.setattr(mean_size, "trained_judge", recording)
    monkeypatch.setattr(Networks, "features", reading)
    train_networks(networks, settings, examples)
    assert networks.attention.judge is networks.baseline
    assert sorted(set(seen)) == [1, 2, 3, 4, 5]
    everything = set(examples.rows.tolist())
    assert all(trained | read == everything and not trained & read for trained, read in judged)
    assert sorted(row for _, read in judged for row in read) == sorted(everything)


def test_a_mean_size_beyond_the_map_is_refused() -> None:
    settings = Settings(mean_size=CELLS + 1)
    with pytest.raises(TrainingError, match="expected a mean_size of at most 12, the cells of a map, got 13"):
        train_networks(make_networks(settings), settings, make_examples())


@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(-5, 5).map(float)),
    st.floats(0.5, 7),
    st.integers(1, 6),
)
def test_the_bound_of_a_mean_size_is_the_best_there_is(
    scores: npt.NDArray[np.float32], size: float, least: int
) -> None:
    least = min(least, scores.shape[1])
    score, reached = bound_of_mean_size(torch.from_numpy(scores), size, least)

    def mean(at: float) -> float:
        return float(np.maximum((scores <= at).sum(axis=1), least).mean())

    assert reached == pytest.approx(mean(score))
    assert score not in scores
    assert abs(reached - size) == pytest.approx(min(abs(mean(at) - size) for at in scores.flatten()))


# --- early stopping, divergence, death


def test_patience_keeps_the_best_epoch(tmp_path: Path) -> None:
    train, validation = resumed_data()
    settings = Settings(epochs=6, batch_size=20, learning_rate=0.05, validation=0.5, patience=2)
    networks = make_networks(settings)
    remarks: list[str] = []
    outcome = train_networks(
        networks, settings, train, validation, folder=tmp_path, report=lambda title, *_: remarks.append(title)
    )
    # the best epoch is the first, two more are waited for
    assert outcome["epochs"] == {"head": 3, "module": 3, "continued": 3}
    assert [line["epoch"] for line in log_of(tmp_path)] == [1, 2, 3] * 3
    assert "module: kept the epoch of the smallest validation loss" in remarks
    once = settings.replace(epochs=1, patience=None)
    expected = make_networks(once)
    train_networks(expected, once, train, validation)
    assert_same(tensors(networks), tensors(expected))


def test_without_patience_validation_only_watches(tmp_path: Path) -> None:
    train, validation = resumed_data()
    watched, alone = Settings(epochs=2, validation=0.5), Settings(epochs=2)
    results = []
    for settings, held_out in ((watched, validation), (alone, None)):
        networks = make_networks(settings)
        train_networks(networks, settings, train, held_out, folder=tmp_path / str(len(results)))
        results.append(tensors(networks))
    assert_same(*results)
    assert all("validation" in line for line in log_of(tmp_path / "0"))
    assert not any("validation" in line for line in log_of(tmp_path / "1"))


@pytest.mark.parametrize("unawaited", [(), ("cpu",)])
def test_a_loss_that_is_not_finite_ends_the_training(
    unawaited: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "UNAWAITED", unawaited)
    settings = Settings(epochs=2, batch_size=8, learning_rate=1e30)
    networks = make_networks(settings)
    with pytest.raises(TrainingError, match=r"expected a finite loss, got (nan|inf) in stage .*: lower the"):
        train_networks(networks, settings, make_examples(), folder=tmp_path)


@pytest.mark.parametrize("setup", ["bla", "bla-t", "bla-ph"])
def test_a_module_that_dies_is_reported(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clip_every_cell(attention: BoundedLogitAttention, _: Tensor) -> None:
        nn.init.constant_(attention.score.bias, -100)

    settings = Settings(setup=setup, epochs=2, batch_size=8)
    networks = make_networks(settings)
    before = tensors(networks)
    monkeypatch.setattr(BoundedLogitAttention, "calibrate", clip_every_cell)
    outcome = train_networks(networks, settings, make_examples(), folder=tmp_path)
    assert outcome["dead"] is True
    assert [line.get("dead", False) for line in log_of(tmp_path)] == [False] * 2 + [True] * 2 + [False] * 2
    assert torch.equal(networks.attention.score.weight, before["attention.score.weight"])
    # it says so as well when it resumes after the end
    again = train_networks(make_networks(settings), settings, make_examples(), folder=tmp_path)
    assert again == outcome


def test_a_learning_rate_that_kills_some_modules_is_reported_for_those() -> None:
    examples, dead, alive = make_examples(), [], []
    for seed in range(5):
        settings = Settings(setup="bla", epochs=4, head_epochs=1, batch_size=4, learning_rate=3.0, seed=seed)
        networks = make_networks(settings)
        dead.append(train_networks(networks, settings, examples)["dead"])
        alive.append(bool((networks.eval().attention(examples.cache.batch(examples.rows)).unbounded < 0).any()))
    assert any(dead)
    assert not all(dead)
    assert not any(dies and lives for dies, lives in zip(dead, alive, strict=True))


def test_the_rival_cannot_die(tmp_path: Path) -> None:
    """Nothing is clipped there: a shift of all scores has no meaning."""
    settings = Settings(setup="l2x-f", size=3, epochs=1)
    networks = make_networks(settings)
    nn.init.constant_(networks.attention.score.bias, -100)
    assert isinstance(networks.attention, L2XAttention)
    assert train_networks(networks, settings, make_examples(), folder=tmp_path)["dead"] is False
    assert not any("dead" in line for line in log_of(tmp_path))


# --- in another process: killed at one optimiser step after the other


def main(folder: str) -> None:
    training.CHECKPOINT_SECONDS = 0.0
    torch.optim.Adam([torch.zeros(1)]).step()  # which imports much, once
    step = torch.optim.Adam.step
    for at in KILLED_AT:
        process = os.fork()
        if process == 0:
            steps = itertools.count(1)

            def killing(optimiser: Any, at: int = at, steps: Any = steps) -> None:
                step(optimiser)
                if next(steps) == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            torch.optim.Adam.step = killing
            train_resumable(Path(folder) / f"killed-{at}")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("options", "cells"),
    [({"setup": "l2x-f", "size": 13}, 12), ({"mean_size": 12.5}, 12), ({"setup": "bla-t", "mean_size": 1e6}, 12)],
)
def test_more_cells_than_a_map_has_are_refused_before_training(
    options: dict[str, Any], cells: int, tmp_path: Path
) -> None:
    settings = Settings(epochs=1, **options)
    with pytest.raises(TrainingError, match=f"size of at most {cells}, the cells of a map, got"):
        train_networks(make_networks(settings), settings, make_examples(), folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rate", "said"), [(1e-30, "no weight has moved: raise"), (1e5, "lower the learning rate"), (1e-3, "")]
)
def test_a_learning_rate_that_moves_nothing_or_explodes_is_said(rate: float, said: str) -> None:
    settings, remarks = Settings(epochs=1, learning_rate=rate), list[str]()
    train_networks(make_networks(settings), settings, make_examples(), report=lambda text, *_: remarks.append(text))
    assert any(said in remark for remark in remarks)
    assert bool(said) == any("learning rate" in remark for remark in remarks)
