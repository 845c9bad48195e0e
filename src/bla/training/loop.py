"""Training: the stages, one after the other, with checkpoints from which an interrupted training resumes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bla.metrics import scorer
from bla.metrics.fitting import Rows
from bla.model.untouched import untouched
from bla.progress import Progress, silent
from bla.training import distributed
from bla.training.checkpoint import Checkpoint, Position, last_whole
from bla.training.loggers import Callback, Update
from bla.training.mean_size import SizeControl
from bla.training.measuring import measure
from bla.training.networks import Examples, Networks
from bla.training.settings import Settings, TrainingError
from bla.training.stages import Stage, stages_of

CHECKPOINT_SECONDS = 20.0
LOG = "log.jsonl"
UNAWAITED = ("cuda",)
"""Devices for which the loop does not wait at every step."""
WATCHED = 256
"""Images of training by which a callback is told how a training without validation goes."""


def train_networks(
    networks: Networks,
    settings: Settings,
    train: Examples,
    validation: Examples | None = None,
    *,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    report: Progress = silent,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Run the stages; with a ``folder``, log there, leave checkpoints, and resume from the last one.

    The last checkpoint stays until :func:`bla.training.checkpoint.clear_checkpoints`, in case the result is not yet
    written. A resumed training gives bit for bit the result of an uninterrupted one, on the same machine with as many
    threads: batches, dropout and draws are functions of the seed and the position alone (NumPy keeps RandomState's
    stream across versions). Several processes fine-tune a trunk together if all call this.

    Returns ``{"dead": bool, "epochs": {stage: epochs run}}``, with a mean size also ``"mean_size": {"asked", "set",
    "on"}``. Dead: in some epoch no cell of any image passed a gradient. A TrainingError says that the loss is no longer
    finite, that there is no example, or that the folder's checkpoint has other settings or another ``identity``.
    """
    if not len(train):
        raise TrainingError("expected at least one training image, got none")
    if validation is not None and not len(validation):
        raise TrainingError("expected at least one validation image, got none: add images or set validation=0")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # a frozen trunk's features train in seconds: the first process does that alone
    processes = distributed.alone() if settings.trunk is None else nullcontext()
    with processes, untouched(networks), torch.random.fork_rng(devices):
        return _Loop(networks, settings, train, validation, folder, identity or {}, report, callback).run()


@dataclasses.dataclass
class _Loop:
    """One training: stages, optimiser and position. The first process alone validates, logs and writes."""

    networks: Networks
    settings: Settings
    train: Examples
    validation: Examples | None
    folder: Path | None
    identity: Mapping[str, Any]
    report: Progress
    callback: Callback | None

    def __post_init__(self) -> None:
        settings = self.settings
        self.identity = json.loads(json.dumps({**self.identity, "settings": settings.record()}))
        self.first = distributed.rank() == 0
        self.report = self.report if self.first else silent
        self.steps = -(-len(self.train) // settings.stages.batch_size)
        self.patience = settings.held_out.patience if settings.held_out else None
        self.position = Position()
        self.best: dict[str, Tensor] = {}
        self.uncounted: list[tuple[Tensor, int]] = []
        """Loss and live cells of the last steps, on the device, and the images of each."""
        self.saved_at = time.monotonic()
        self.optimiser: torch.optim.Optimizer | None = None
        # float16 underflows without; for other precisions it does nothing
        half = settings.trunk is not None and settings.trunk.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.networks.device.type, enabled=half)
        self._check_size()
        self.started: list[Tensor] = []
        sized = settings.selection.mean_size is not None
        self.size_control = SizeControl(self.networks, settings, self.train, self.validation) if sized else None
        self.stages = stages_of(self.networks, settings, self.size_control)

    def _check_size(self) -> None:
        """A TrainingError, before any training, if more cells are to be selected than a map has."""
        selection = self.settings.selection
        for name in ("size", "mean_size"):
            if (size := getattr(selection, name, None)) is not None and size > 1:
                with torch.no_grad():
                    cells = self.networks.features(self.train.subset(np.array([0])))[0, 0].numel()
                if size > cells:
                    raise TrainingError(f"expected a {name} of at most {cells}, the cells of a map, got {size}")

    def run(self) -> dict[str, Any]:
        resumed = self._resume()
        while self.position.stage < len(self.stages):
            stage = self.stages[self.position.stage]
            if not resumed:
                self.networks.eval()
                stage.begin(self.train)
                small = (module for module in stage.trained if module in self.networks.children())
                self.started = [value.detach().clone() for module in small for value in module.parameters()]
            self.optimiser = self._optimiser(stage, resumed)
            resumed = {}
            self._run_stage(stage)
            self.position.stage += 1
            self.optimiser = None  # without one a checkpoint stands before a stage, which has yet to begin
            self._save()
        return distributed.agreed(self._outcome())

    def _outcome(self) -> dict[str, Any]:
        log = self.position.log
        outcome: dict[str, Any] = {"dead": self.position.dead, "epochs": dict(Counter(line["stage"] for line in log))}
        if self.size_control is not None and self.first:
            lines = [line for line in log if line["stage"] == "module"]
            kept = lines[-1] if self.patience is None else min(lines, key=lambda line: line["validation"]["loss"])
            asked, on = self.settings.selection.mean_size, self.size_control.met_on
            outcome["mean_size"] = {"asked": asked, "set": kept["mean_size"], "on": on}
        return outcome

    def _run_stage(self, stage: Stage) -> None:
        position = self.position
        stage.to_train()
        ended = False
        while not ended:
            title = f"{stage.name}: epoch {position.epoch + 1} of {stage.epochs}"
            key = (self.settings.seed, 2, position.stage, position.epoch)
            order = np.random.RandomState(key).permutation(len(self.train))
            forward = distributed.parallel(stage)
            while position.step < self.steps:
                self._step(stage, forward, order)
                if position.step % 8 == 0 or position.step == self.steps:
                    self.report(title, position.step, self.steps)
                if position.step < self.steps and time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self._count(stage)
                    self._save()
            if self.first:
                self._finish_epoch(stage)
            position.epoch, position.step, position.loss, position.alive = position.epoch + 1, 0, 0.0, 0
            waited = self.patience is not None and position.waited >= self.patience
            ended = distributed.agreed(waited) or position.epoch == stage.epochs
            if not ended:
                self._save()
        if self.best:
            self.networks.restore(self.best)
            self.report(f"{stage.name}: kept the epoch of the smallest validation loss", 0, 0)
        position.epoch = position.step = position.waited = 0
        position.best, self.best = None, {}

    def _step(self, stage: Stage, forward: nn.Module, order: Rows) -> None:
        position, size = self.position, self.settings.stages.batch_size
        assert self.optimiser is not None
        chosen = order[position.step * size : (position.step + 1) * size]
        # Dropout and draws depend on the seed and the position alone: nothing to save, nothing to restore.
        rank, world = distributed.rank(), distributed.world()
        key = (self.settings.seed, 3, position.stage, position.epoch, position.step, *([rank] if rank else []))
        on_cpu = self.networks.device.type == "cpu"  # where torch.manual_seed also prepares to seed absent devices
        (torch.default_generator if on_cpu else torch).manual_seed(int(np.random.RandomState(key).randint(2**31)))
        mine = chosen[rank::world]
        batch = self.train.subset(mine if len(mine) else chosen[:1])  # without a row it takes part, at no weight
        summed, alive, unbounded = forward(batch, position, self.steps)
        loss = summed * (bool(len(mine)) / len(chosen))
        self.optimiser.zero_grad()
        self.scaler.scale(loss * world).backward()
        counted = distributed.summed(torch.stack([loss.detach(), alive * bool(len(mine))]))
        self.uncounted.append((counted, len(chosen)))
        if self.networks.device.type not in UNAWAITED or stage.size_control is not None or self.callback is not None:
            self._count(stage)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * stage.pace(stage.done(position, self.steps))
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if stage.size_control is not None:
            stage.size_control.follow(torch.cat(distributed.gathered(unbounded.detach()[: len(mine)])))
        position.step += 1
        position.total_steps += 1
        if self.callback is not None and self.first:
            self.callback(Update(stage.name, position.total_steps, position.epoch + 1, counted[0].item()))
        if position.step % 8 == 0 or position.step == self.steps:
            self._count(stage)

    def _count(self, stage: Stage) -> None:
        """Add up the losses of the last steps, for which a GPU has to be waited for."""
        if not self.uncounted:
            return
        values = torch.stack([counted for counted, _ in self.uncounted]).tolist()
        for (value, alive), (_, images) in zip(values, self.uncounted, strict=True):
            if not np.isfinite(value):
                raise self._diverged("a finite loss", value, stage)
            self.position.loss += value * images
            self.position.alive += int(alive)
        self.uncounted.clear()

    def _diverged(self, expected: str, came: object, stage: Stage) -> TrainingError:
        where, rate = f"stage {stage.name}, epoch {self.position.epoch + 1}", self.settings.stages.learning_rate
        return TrainingError(f"expected {expected}, got {came} in {where}: lower the learning rate ({rate})")

    def _say_pace(self, stage: Stage, loss: float) -> None:
        """Say so if the learning rate has moved nothing, or so much that the loss is that of no classifier."""
        rate = self.settings.stages.learning_rate
        small = (module for module in stage.trained if module in self.networks.children())
        now = [value for module in small for value in module.parameters()]
        if self.started and all(map(torch.equal, self.started, now)):
            self.report(f"stage {stage.name}: no weight has moved: raise the learning rate ({rate:g})", 0, 0)
        elif loss > 20:
            self.report(f"stage {stage.name}: the loss is {loss:.3g}: lower the learning rate ({rate:g})", 0, 0)

    def _finish_epoch(self, stage: Stage) -> None:
        """Meet the mean size, validate, and log."""
        position = self.position
        loss = position.loss / len(self.train)
        line: dict[str, Any] = {"stage": stage.name, "epoch": position.epoch + 1, "loss": loss}
        if not all(value.isfinite().all() for module in stage.trained for value in module.parameters()):
            raise self._diverged("finite weights", "NaN or infinity", stage)
        if position.alive == 0:
            position.dead = line["dead"] = True
        self.networks.eval()
        if position.epoch + 1 == stage.epochs or position.epoch == 0:
            self._say_pace(stage, loss)
        if stage.size_control is not None:
            line["mean_size"] = stage.size_control.meet(last=position.epoch + 1 == stage.epochs)
        if self.validation is not None:
            accuracy = scorer(self.networks.task)
            with torch.no_grad():
                for batch in self.validation.batches():
                    accuracy.update(stage.used(batch), stage.targets(batch))
            line["validation"] = accuracy.result()
            if self.patience is not None:
                position.waited += 1
                if position.best is None or line["validation"]["loss"] < position.best:
                    position.best, position.waited = line["validation"]["loss"], 0
                    self.best = {key: value.clone() for key, value in self.networks.saved().items()}
        if self.callback is not None and stage.name == "module":
            found = measure(self.networks, self.validation or self._watched())
            told = (found["agreement"], found["size"]["mean"])
            self.callback(Update(stage.name, position.total_steps, position.epoch + 1, loss, *told))
        stage.to_train()
        position.log.append(line)
        if self.folder is not None:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _watched(self) -> Examples:
        """Some of the images that are trained on, always the same."""
        drawn = np.random.RandomState([self.settings.seed, 5]).permutation(len(self.train))[:WATCHED]
        return self.train.subset(np.sort(drawn))

    def _optimiser(self, stage: Stage, saved: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Adam, the trunk with its own learning rate; in the state that a checkpoint holds, if there is one."""
        _, *trunks = self.networks.of_stage(stage.name)
        rate, trunk = self.settings.stages.learning_rate, self.settings.trunk
        optimiser = torch.optim.Adam(
            {"params": module.parameters(), "rate": trunk.trunk_rate if trunk and module in trunks else rate}
            for module in stage.trained
        )
        if saved:
            record = optimiser.state_dict()
            for key, value in saved.items():
                index, _, name = key.partition(".")
                record["state"].setdefault(int(index), {})[name] = value
            optimiser.load_state_dict(record)
        return optimiser

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if self.folder is None or not self.first:
            return
        state = self.optimiser.state_dict()["state"] if self.optimiser else {}
        optimiser = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
        checkpoint = Checkpoint(self.position, self.scaler.state_dict(), self.networks.saved(), self.best, optimiser)
        checkpoint.write(self.folder, self.identity)

    def _resume(self) -> dict[str, Tensor]:
        """Restore the last whole checkpoint; returns the optimiser's tensors, none where a stage has yet to begin."""
        if self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        last = distributed.agreed(last_whole(self.folder, self.report) if self.first else None)
        checkpoint = None if last is None else Checkpoint.read(last, self.identity)
        if checkpoint is not None:
            self.networks.restore(checkpoint.networks)
            self.best, self.position = checkpoint.best, checkpoint.position
            self.scaler.load_state_dict(checkpoint.scaler)
            if self.position.stage < len(self.stages):
                name, epoch = self.stages[self.position.stage].name, self.position.epoch + 1
                self.report(f"resumed in stage {name}, epoch {epoch}, step {self.position.step}", 0, 0)
        if self.first:
            lines = "".join(json.dumps(line) + "\n" for line in self.position.log)
            (self.folder / LOG).write_text(lines, encoding="utf-8")
        return checkpoint.optimiser if checkpoint is not None else {}
