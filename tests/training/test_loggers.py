"""Where a training is watched: what it tells, that watching changes nothing, and loggers by their packages' names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

import bla
from bla.training import loggers
from bla.training.loggers import Update
from bla.training.loop import train_networks
from bla.training.measuring import measure
from bla.training.settings import Settings
from small import Tiny, assert_same, log_of, make_examples, make_networks, tensors


def test_every_step_and_the_end_of_every_epoch_are_told_and_change_nothing(tmp_path: Path) -> None:
    settings, told = Settings(epochs=2, head_epochs=1, batch_size=16), list[Update]()
    watched, alone = make_networks(settings), make_networks(settings)
    train_networks(watched, settings, make_examples(), make_examples(20, seed=1), folder=tmp_path, callback=told.append)
    train_networks(alone, settings, make_examples(), make_examples(20, seed=1))
    assert_same(tensors(watched), tensors(alone))
    ends = [update for update in told if update.agreement is not None]
    steps = [update for update in told if update.agreement is None]
    assert [update.step for update in steps] == list(range(1, 3 * (1 + 2 + 2) + 1))
    assert [update.stage for update in steps] == ["head"] * 3 + ["module"] * 6 + ["continued"] * 6
    assert [(update.step, update.epoch) for update in ends] == [(6, 1), (9, 2)]
    logged = [line["loss"] for line in log_of(tmp_path) if line["stage"] == "module"]
    assert [update.loss for update in ends] == logged
    assert np.average([update.loss for update in steps[3:6]], weights=[16, 16, 8]) == pytest.approx(logged[0])
    found = measure(watched, make_examples(20, seed=1))
    assert (ends[-1].agreement, ends[-1].size) == (found["agreement"], found["size"]["mean"])


def test_without_validation_the_images_of_training_are_watched() -> None:
    settings, told = Settings(epochs=1, batch_size=16), list[Update]()
    networks = make_networks(settings)
    train_networks(networks, settings, make_examples(), callback=told.append)
    (end,) = (update for update in told if update.agreement is not None)
    assert end.agreement == measure(networks, make_examples())["agreement"]


STEP, END = Update("module", 7, 1, 0.5), Update("module", 8, 1, 0.4, 0.9, 7.5)
NAMED = {"module/epoch_loss": 0.4, "module/agreement": 0.9, "module/size": 7.5}


def test_loggers_get_numbers_by_name_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars, runs, flushed = list[Any](), list[Any](), list[bool]()
    writer = SimpleNamespace(add_scalar=lambda *said: scalars.append(said), flush=lambda: flushed.append(True))
    client = SimpleNamespace(log_metrics=lambda values, step: runs.append((values, step)))
    run = SimpleNamespace(log=lambda values, step: runs.append((values, step)))
    monkeypatch.setitem(sys.modules, "mlflow", client)
    for log in (loggers.tensorboard(writer), loggers.wandb(run), loggers.mlflow(client), loggers.mlflow()):
        log(STEP)
        log(END)
    assert scalars == [("module/loss", 0.5, 7), *((name, value, 8) for name, value in NAMED.items())]
    assert flushed == [True]
    assert runs == [({"module/loss": 0.5}, 7), (NAMED, 8)] * 3


def test_lightning_explains_a_fixed_batch_after_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    package, callbacks = ModuleType("lightning.pytorch"), ModuleType("lightning.pytorch.callbacks")
    callbacks.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    for module in (package, callbacks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    said = list[Any]()

    def logger(**others: Any) -> SimpleNamespace:
        return SimpleNamespace(log_metrics=lambda values, step: said.append((values, step)), run_id="run", **others)

    trainer = SimpleNamespace(is_global_zero=True, global_step=5, loggers=[
        logger(experiment=SimpleNamespace(add_image=lambda name, array, step, dataformats: said.append(array.shape))),
        logger(experiment=None, log_image=lambda name, pictures, step: said.append(pictures[0].size)),
        logger(experiment=SimpleNamespace(log_image=lambda run, picture, file: said.append((run, file)))),
        logger(experiment=None),
    ])  # fmt: skip
    photos = [np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8) for seed in range(2)]
    network = nn.ModuleDict({"net": Tiny()}).train()
    before = tensors(network)
    watching = loggers.lightning(photos, lambda module: module["net"], classes=["a", "b", "c"])
    assert isinstance(watching, callbacks.Callback)  # type: ignore[attr-defined]
    watching.on_train_epoch_end(trainer, network)
    assert network.training
    assert_same(tensors(network), before)
    numbers = [entry for entry in said if isinstance(entry, tuple) and isinstance(entry[0], dict)]
    assert len(numbers) == 4
    assert numbers[0][0].keys() == {"explanations/agreement", "explanations/size"}
    rows, columns, colours = said[1]
    assert colours == 3
    assert said[3] == (columns, rows)
    assert said[5] == ("run", "explanations/5.png")


def test_bars_of_tqdm_show_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    wrapped, told = bla.explainable(Tiny()), list[Update]()
    photos = [np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8) for seed in range(10)]
    bla.fit(wrapped, photos, epochs=1, masks=8, cache=tmp_path, report=tqdm, callback=told.append)
    assert "module: epoch 1 of 1: 100%" in capsys.readouterr().err
    assert told[-1].agreement is not None
