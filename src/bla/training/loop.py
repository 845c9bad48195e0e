"""Training: the stages, one after the other, with checkpoints from which an interrupted training resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bla.metrics import scorer
from bla.progress import Progress, silent
from bla.training import distributed
from bla.training.checkpoint import Checkpoint, Position, checkpoints
from bla.training.mean_size import SizeControl
from bla.training.networks import Examples, Networks
from bla.training.settings import Settings, TrainingError
from bla.training.stages import Stage, stages_of

CHECKPOINT_SECONDS = 20.0


def train_networks(
    networks: Networks,
    settings: Settings,
    train: Examples,
    validation: Examples | None = None,
    *,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    report: Progress = silent,
) -> dict[str, Any]:
    """Run the stages; with a ``folder``, log there, leave checkpoints, and resume from the last one.

    The last checkpoint stays until :func:`bla.training.checkpoint.clear_checkpoints`, so that a result not yet written
    is not lost.

    A training that was interrupted and resumed gives bit for bit the result of one that was not, on the same machine
    with as many threads: batches, dropout and draws are functions of the seed and the position alone (NumPy keeps
    RandomState's stream across versions). Several processes fine-tune a trunk together if all call this:
    :mod:`bla.training.distributed`.

    Parameters
    ----------
    identity: what a checkpoint must agree on, beside the settings, to resume from it.

    Returns
    -------
    ``{"dead": bool, "epochs": {stage: epochs run}}``. Dead: in some epoch no cell of any image passed a gradient. With
    a mean size also ``"mean_size": {"asked", "set", "on"}``.

    Raises
    ------
    TrainingError
        If the loss stops being finite, there is no example, or the folder's checkpoint is another training's.
    """
    if not len(train):
        raise TrainingError("expected at least one training image, got none")
    if validation is not None and not len(validation):
        raise TrainingError("expected at least one validation image, got none: add images or set validation=0")
    loop = _Loop(
        networks,
        settings,
        train=train,
        validation=validation,
        folder=folder,
        identity=identity or {},
        report=report,
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    modes = {module: module.training for module in networks.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in networks.parameters()}
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            return loop.run()
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, required in gradients.items():
                parameter.requires_grad_(required)


class _Loop:
    """One training: stages, optimiser and position. The first process alone validates, logs and writes."""

    def __init__(
        self,
        networks: Networks,
        settings: Settings,
        *,
        train: Examples,
        validation: Examples | None,
        folder: Path | None,
        identity: Mapping[str, Any],
        report: Progress,
    ) -> None:
        self.networks, self.settings, self.train, self.validation = networks, settings, train, validation
        self.folder = folder
        self.identity = json.loads(json.dumps({**identity, "settings": settings.record()}))
        # a frozen trunk's features train in seconds: the first process does that alone
        self.processes = distributed.world() if settings.trunk is not None else 1
        self.first = self.processes == 1 or distributed.rank() == 0
        self.report = report if self.first else silent
        self.steps = -(-len(train) // settings.stages.batch_size)
        self.patience = settings.held_out.patience if settings.held_out else None
        self.position = Position()
        self.best: dict[str, Tensor] = {}
        self.log: list[dict[str, Any]] = []
        self.epochs_run: dict[str, int] = {}
        self.saved_at = time.monotonic()
        self.optimiser: torch.optim.Optimizer | None = None
        # float16 underflows without; for other precisions it does nothing
        half = settings.trunk is not None and settings.trunk.precision == "float16"
        self.scaler = torch.amp.GradScaler(networks.device.type, enabled=half)
        size = settings.selection.mean_size
        self.size_control = None if size is None else SizeControl(networks, settings, size, train, validation)
        self.stages = stages_of(networks, settings, self.size_control)

    def run(self) -> dict[str, Any]:
        resumed = self._resume()
        while self.position.stage < len(self.stages):
            stage = self.stages[self.position.stage]
            if not resumed:
                self.networks.eval()
                stage.begin(self.train)
            self.optimiser = self._optimiser(stage, resumed)
            resumed = {}
            self._run_stage(stage)
            self.position.stage += 1
            self.optimiser = None  # without one a checkpoint stands before a stage, which has yet to begin
            self._save()
        outcome = {"dead": self.position.dead, "epochs": self.epochs_run, **self._mean_size()}
        return distributed.agreed(outcome) if self.processes > 1 else outcome

    def _mean_size(self) -> dict[str, Any]:
        """The mean size asked for, and the kept epoch's on the images that it was set on."""
        if self.size_control is None or not self.first:
            return {}
        lines = [line for line in self.log if line["stage"] == "module"]
        kept = lines[-1] if self.patience is None else min(lines, key=lambda line: line["validation"]["loss"])
        control = self.size_control
        return {"mean_size": {"asked": control.size, "set": kept["mean_size"], "on": control.met_on}}

    def _run_stage(self, stage: Stage) -> None:
        position = self.position
        stage.to_train()
        while position.epoch < stage.epochs:
            title = f"{stage.name}: epoch {position.epoch + 1} of {stage.epochs}"
            draws = np.random.RandomState([self.settings.seed, 2, position.stage, position.epoch])
            order = draws.permutation(len(self.train))
            forward = distributed.parallel(stage) if self.processes > 1 else stage
            while position.step < self.steps:
                self._step(stage, forward, order)
                if position.step % 8 == 0 or position.step == self.steps:
                    self.report(title, position.step, self.steps)
                if position.step < self.steps and time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self._save()
            if self.first:
                self._finish_epoch(stage)
            position.epoch, position.step = position.epoch + 1, 0
            position.loss = position.alive = 0
            ended = self.patience is not None and position.waited >= self.patience
            if self.processes > 1:
                ended = distributed.agreed(ended)
            if ended or position.epoch == stage.epochs:
                break  # the end of the stage is saved under this number of steps
            self._save()
        if self.best:
            self._restore_best(stage)
        stage.end()
        self.epochs_run[stage.name] = sum(line["stage"] == stage.name for line in self.log)
        position.epoch = position.step = position.waited = 0
        position.best, self.best = None, {}

    def _step(self, stage: Stage, forward: nn.Module, order: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        position, size = self.position, self.settings.stages.batch_size
        assert self.optimiser is not None
        chosen = order[position.step * size : (position.step + 1) * size]
        # Dropout and draws depend on the seed and the position alone: nothing to save, nothing to restore.
        own = distributed.rank() if self.processes > 1 else 0
        key = [self.settings.seed, 3, position.stage, position.epoch, position.step, *([own] if own else [])]
        torch.manual_seed(int(np.random.RandomState(key).randint(2**31)))
        mine = chosen[own :: self.processes]
        batch = self.train.subset(mine if len(mine) else chosen[:1])  # without a row it takes part, at no weight
        summed, alive, unbounded = forward(batch, position, self.steps)
        loss = summed * (bool(len(mine)) / len(chosen))
        self.optimiser.zero_grad()
        self.scaler.scale(loss * self.processes).backward()
        counted = torch.stack([loss.detach(), alive * bool(len(mine))])
        if self.processes > 1:
            distributed.summed(counted)
        value = counted[0].item()
        if not np.isfinite(value):
            raise TrainingError(
                f"expected a finite loss, got {value} in stage {stage.name}, epoch {position.epoch + 1}, step "
                f"{position.step + 1}: lower the learning rate ({self.settings.stages.learning_rate})"
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if stage.size_control is not None:
            scores = unbounded.detach()[: len(mine)]
            stage.size_control.follow(torch.cat(distributed.gathered(scores)) if self.processes > 1 else scores)
        position.loss += value * len(chosen)
        position.alive += int(counted[1])
        position.step += 1
        position.total_steps += 1

    def _finish_epoch(self, stage: Stage) -> None:
        """Meet the mean size, validate, and log."""
        position = self.position
        line: dict[str, Any] = {
            "stage": stage.name,
            "epoch": position.epoch + 1,
            "loss": position.loss / len(self.train),
        }
        for parameter in (parameter for module in stage.trained for parameter in module.parameters()):
            if not torch.isfinite(parameter).all():
                raise TrainingError(
                    f"expected finite weights, got NaN or infinity in stage {stage.name}, epoch {position.epoch + 1}: "
                    f"lower the learning rate ({self.settings.stages.learning_rate})"
                )
        if position.alive == 0:
            position.dead = line["dead"] = True
            self.report(
                "the module has died: every cell of every image is at the bound and passes no gradient, so all cells "
                "are selected. Remedy: a lower learning rate or another seed",
                0,
                0,
            )
        self.networks.eval()
        if stage.size_control is not None:
            line["mean_size"] = stage.size_control.meet(last=position.epoch + 1 == stage.epochs)
        if self.validation is not None:
            line["validation"] = self._validate(stage, self.validation)
            if self.patience is not None:
                if position.best is None or line["validation"]["loss"] < position.best:
                    position.best, position.waited = line["validation"]["loss"], 0
                    self.best = {key: value.clone() for key, value in self.networks.saved().items()}
                else:
                    position.waited += 1
        stage.to_train()
        self.log.append(line)
        if self.folder is not None:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @torch.no_grad()
    def _validate(self, stage: Stage, validation: Examples) -> dict[str, Any]:
        accuracy = scorer(several=self.settings.several_labels)
        for batch in validation.batches():
            accuracy.update(stage.used(batch), stage.targets(batch))
        return accuracy.result()

    def _restore_best(self, stage: Stage) -> None:
        own = self.networks.saved()
        with torch.no_grad():
            for key, value in self.best.items():
                own[key].copy_(value)
        self.report(f"{stage.name}: kept the epoch of the smallest validation loss", 0, 0)

    def _optimiser(self, stage: Stage, saved: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Adam, the trunk with its own learning rate; in the state that a checkpoint holds, if there is one."""
        trunks = self.networks.trunks(stage.name)
        groups = [([module for module in stage.trained if module not in trunks], self.settings.stages.learning_rate)]
        if self.settings.trunk is not None and trunks:
            groups.append(([*trunks], self.settings.trunk.trunk_rate))
        optimiser = torch.optim.Adam(
            [
                {"params": [parameter for module in modules for parameter in module.parameters()], "lr": rate}
                for modules, rate in groups
            ]
        )
        if saved:
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in saved.items():
                index, _, name = key.partition(".")
                state.setdefault(int(index), {})[name] = value
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return optimiser

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if self.folder is None or not self.first:
            return
        state = self.optimiser.state_dict()["state"] if self.optimiser else {}
        optimiser = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
        Checkpoint(
            self.position,
            self.log,
            self.epochs_run,
            self.scaler.state_dict(),
            networks=self.networks.saved(),
            best=self.best,
            optimiser=optimiser,
        ).write(self.folder, self.identity)

    def _resume(self) -> dict[str, Tensor]:
        """Restore the last whole checkpoint; returns the optimiser's tensors, none where a stage has yet to begin."""
        if self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        last = next(reversed(checkpoints(self.folder)), None)
        if self.processes > 1:
            last = distributed.agreed(last)
        if last is None:
            if self.first:
                (self.folder / "log.jsonl").unlink(missing_ok=True)
            return {}
        checkpoint = Checkpoint.read(last, self.identity)
        self.networks.restore(checkpoint.networks)
        self.best, self.position = checkpoint.best, checkpoint.position
        self.log, self.epochs_run = checkpoint.log, checkpoint.epochs_run
        self.scaler.load_state_dict(checkpoint.scaler)
        if self.first:
            lines = "".join(json.dumps(line) + "\n" for line in self.log)
            (self.folder / "log.jsonl").write_text(lines, encoding="utf-8")
        if self.position.stage < len(self.stages):
            stage = self.stages[self.position.stage].name
            self.report(f"resumed in stage {stage}, epoch {self.position.epoch + 1}, step {self.position.step}", 0, 0)
        return checkpoint.optimiser
