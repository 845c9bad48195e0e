"""Training: the stages, one after the other, and the checkpoints that a killed one goes on from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bla import operators
from bla.files import read_json
from bla.metrics import decided, scorer, together
from bla.model.attention import Selection
from bla.model.heads import read
from bla.progress import Progress, silent
from bla.training import processes
from bla.training.cache import FeatureCache
from bla.training.mean_size import JUDGES, bound_of_mean_size, trained_judge
from bla.training.networks import Examples, Networks, Stage
from bla.training.settings import Settings, TrainingError

CHECKPOINT_SECONDS = 20.0
EVALUATION_BATCH = 64

_FOLLOWING = 0.2
"""How far the bound goes, at every step, to where the batch has the mean size asked for."""

_SIZED_ON = 10_000
"""Images that the bound is set on at the end of an epoch, at most."""


_Outputs = list[tuple[float, Tensor]]
"""Logits, each with its share of the loss."""


@dataclasses.dataclass(slots=True)
class _Position:
    """Where training stands. All randomness is a function of it and of the seed, so it is all a resume needs."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    loss: float = 0.0
    """Summed over the epoch's images so far."""
    alive: int = 0
    """Images of the epoch so far with a cell off the bound, which passes gradients."""
    best: float | None = None
    waited: int = 0
    """Epochs since the best validation loss."""
    dead: bool = False


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Stage:
    name: Stage
    epochs: int
    trained: tuple[nn.Module, ...]
    evaluated: tuple[nn.Module, ...]
    outputs: Callable[[Examples, npt.NDArray[np.int64], bool], tuple[_Outputs, Selection | None]]
    """Logits for the rows, as they are used or else as they are trained, and the selection that they are made from."""
    begin: Callable[[], None]


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
    """Run the stages; with a ``folder``, log there, leave checkpoints, and go on from the last one.

    The last checkpoint stays until :func:`clear_checkpoints`, so that a result not yet written is not lost.

    A training that was killed and started again gives bit for bit the result of one that was not, on the same
    machine with as many threads: batches, dropout and draws are functions of the seed and the position alone. The
    processes of :mod:`bla.training.processes` train as one: the result is that of one process but for rounding, and
    where one
    stopped, any number of them goes on.

    Parameters
    ----------
    identity: what a checkpoint must agree on to be gone on from, beside the settings.

    Returns
    -------
    ``{"dead": bool, "epochs": {stage: epochs run}}``. Dead: in some epoch no cell of any image passed a gradient.

    Raises
    ------
    TrainingError
        If the loss stops being finite, there is no example, or the folder's checkpoint is another training's.
    """
    if not len(train):
        raise TrainingError("expected at least one training image, got none")
    if validation is not None and not len(validation):
        raise TrainingError("expected at least one validation image, got none: add images or set validation=0")
    session = _Session(
        networks,
        settings,
        train=train,
        validation=validation,
        folder=folder,
        identity=dict(identity or {}),
        report=report,
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    modes = {module: module.training for module in networks.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in networks.parameters()}
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            return session.run()
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, required in gradients.items():
                parameter.requires_grad_(required)


class _Session:
    """One training: networks, optimiser and position, and how they are written and read."""

    def __init__(
        self,
        networks: Networks,
        settings: Settings,
        *,
        train: Examples,
        validation: Examples | None,
        folder: Path | None,
        identity: dict[str, Any],
        report: Progress,
    ) -> None:
        self.networks = networks
        self.settings = settings
        self.train = train
        self.validation = validation
        self.folder = folder
        self.identity = json.loads(json.dumps(identity | {"settings": dataclasses.asdict(settings)}))
        self.report = report if processes.rank() == 0 else silent
        self.device = networks.device
        self.position = _Position()
        self.best: dict[str, Tensor] = {}
        self.log: list[dict[str, Any]] = []
        self.saved_at = time.monotonic()
        self.optimiser: torch.optim.Optimizer | None = None
        # float16 underflows without; for other precisions it does nothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self.epochs_run: dict[str, int] = {}
        self.stages = self._stages()

    def _stages(self) -> list[_Stage]:
        nets, settings = self.networks, self.settings

        def pooled_by(head: nn.Module, stage: Stage) -> Callable[..., tuple[_Outputs, Selection | None]]:
            def outputs(examples: Examples, rows: npt.NDArray[np.int64], _: bool) -> tuple[_Outputs, Selection | None]:
                return [(1.0, head(nets.pooled(examples, rows, stage)))], None

            return outputs

        def attended(examples: Examples, rows: npt.NDArray[np.int64], used: bool) -> tuple[_Outputs, Selection | None]:
            features = nets.features(examples, rows)
            if used:
                selection = nets.attention(features)
                return [(1.0, read(nets.head, features, selection.hard))], selection
            self._set_temperature()
            selection = nets.attention(features, size=self._dialled(features.shape[2] * features.shape[3]))
            through = operators.straight_through(selection.hard, selection.soft)
            shares = [(1 - settings.straight_through, selection.soft), (settings.straight_through, through)]
            return [(share, read(nets.head, features, weights)) for share, weights in shares if share], selection

        def begin_module() -> None:
            nets.begin("module")
            if nets.attention.bounded:
                order = np.sort(_generator(settings.seed, 1).permutation(len(self.train))[:256])
                nets.attention.calibrate(nets.features(self.train, self.train.rows[order]))
                if settings.mean_size is not None:
                    self._meet_size(self.train.subset(order))

        # its children one by one: a judge is not trained
        learning = tuple(child for name, child in nets.attention.named_children() if name != "judge")
        module = _Stage(
            "module",
            settings.epochs,
            (*learning, *(() if settings.frozen_head else (nets.head,)), *nets.trunks("module")),
            (nets.attention, nets.head, *nets.trunks("module")),
            attended,
            begin_module,
        )
        if nets.own_head:
            return [module]
        epochs = settings.head_epochs or settings.epochs

        def pooling(name: Stage, epochs: int, head: nn.Module) -> _Stage:
            trained = (head, *nets.trunks(name))
            return _Stage(name, epochs, trained, trained, pooled_by(head, name), lambda: nets.begin(name))

        return [
            pooling("head", epochs, nets.baseline),
            module,
            pooling("continued", settings.epochs, nets.continued),
        ]

    def run(self) -> dict[str, Any]:
        resumed = self._resume()
        while self.position.stage < len(self.stages):
            stage = self.stages[self.position.stage]
            if not resumed:
                self.networks.eval()
                stage.begin()
            self.optimiser = self._optimiser(stage, resumed)
            resumed = {}
            self._run_stage(stage)
            self.position.stage += 1
            self.optimiser = None  # without one a checkpoint stands before a stage, which has yet to begin
            self._save()
        return {"dead": self.position.dead, "epochs": self.epochs_run, **self._sizes()}

    def _sizes(self) -> dict[str, Any]:
        """What mean size was asked for, and what the epoch that was kept had on the images that it was set on."""
        if self.settings.mean_size is None:
            return {}
        lines = [line for line in self.log if line["stage"] == "module"]
        kept = lines[-1] if self.settings.patience is None else min(lines, key=lambda line: line["validation"]["loss"])
        on = "validation" if self.validation else "training, judged unseen" if self._judged_unseen() else "training"
        return {"mean_size": {"asked": self.settings.mean_size, "set": kept["mean_size"], "on": on}}

    def _run_stage(self, stage: _Stage) -> None:
        position = self.position
        self.networks.eval().requires_grad_(False)
        self._to_train(stage)
        for module in stage.trained:
            module.requires_grad_(True)
        steps = -(-len(self.train) // self.settings.batch_size)
        while position.epoch < stage.epochs:
            title = f"{stage.name}: epoch {position.epoch + 1} of {stage.epochs}"
            order = _generator(self.settings.seed, 2, position.stage, position.epoch).permutation(len(self.train))
            processes.take_the_firsts(self.networks.saved().values())
            while position.step < steps:
                self._step(stage, order)
                if position.step % 8 == 0 or position.step == steps:
                    self.report(title, position.step, steps)
                if position.step < steps and time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                    self._save()
            if not self._finish_epoch(stage) or position.epoch == stage.epochs:
                break  # the end of the stage is saved under this number of steps
            self._save()
        if self.best:
            self._restore_best(stage)
        if stage.name == "module" and self.settings.final_temperature is not None:
            self.networks.attention.temperature = self.settings.final_temperature
        self.epochs_run[stage.name] = sum(line["stage"] == stage.name for line in self.log)
        position.epoch = position.step = position.waited = 0
        position.best, self.best = None, {}

    def _step(self, stage: _Stage, order: npt.NDArray[np.int64]) -> None:
        position, size = self.position, self.settings.batch_size
        assert self.optimiser is not None
        chosen = order[position.step * size : (position.step + 1) * size]
        # Dropout and draws depend on the seed and the position alone: nothing to save, nothing to restore.
        seeds = _generator(self.settings.seed, 3, position.stage, position.epoch, position.step)
        torch.manual_seed(int(seeds.randint(2**31)))
        with processes.part_of(len(chosen)) as part:
            mine = chosen[part.start : part.stop]
            outputs, selection = stage.outputs(self.train, self.train.rows[mine], False)
        targets = self._targets(self.train, mine)
        losses = [share * _loss(logits, targets) for share, logits in outputs]
        everyones = len(chosen) if len(mine) < len(chosen) else len(chosen) * processes.world()
        loss = torch.stack(losses).sum() / everyones
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        alive = loss.new_tensor(len(mine))  # the rival bounds nothing and cannot die
        if selection is not None and self.networks.attention.bounded:
            alive = (selection.unbounded < 0).flatten(1).any(1).sum().to(loss)
        counted = torch.stack([loss.detach(), alive])
        gradients = [parameter.grad for module in stage.trained for parameter in module.parameters()]
        processes.add_up([*(gradient for gradient in gradients if gradient is not None), counted])
        value = counted[0].item()
        if not np.isfinite(value):
            raise TrainingError(
                f"expected a finite loss, got {value} in stage {stage.name}, epoch {position.epoch + 1}, step "
                f"{position.step + 1}: lower the learning rate ({self.settings.learning_rate})"
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if selection is not None and self.settings.mean_size is not None:
            self._follow_size(torch.cat(processes.everyones(selection.unbounded.detach())))
        position.loss += value * len(chosen)
        position.alive += int(counted[1])
        position.step += 1
        position.total_steps += 1

    def _set_temperature(self) -> None:
        if self.settings.final_temperature is None:
            return
        position = self.position
        steps = -(-len(self.train) // self.settings.batch_size)
        done = (position.epoch * steps + position.step) / (self.settings.epochs * steps)
        self.networks.attention.temperature = self.settings.temperature_at(done)

    def _dialled(self, cells: int) -> int | None:
        """The size that this batch is trained at, or None for the module's own bound."""
        if not self.settings.dial:
            return None
        position = self.position
        draws = _generator(self.settings.seed, 4, position.stage, position.epoch, position.step)
        return 1 + draws.randint(max(cells // 2, 1)) if draws.random_sample() < self.settings.dial else None

    def _follow_size(self, unbounded: Tensor) -> None:
        """Move the bound a little towards where this batch's own mean size would be the one asked for."""
        attention, scores = self.networks.attention, -unbounded.flatten(1)
        attention.move_bound(_FOLLOWING * bound_of_mean_size(scores, self._mean_size(scores.shape[1]))[0])

    def _mean_size(self, cells: int) -> float:
        """How many of so many cells are to be selected on average."""
        size = self.settings.mean_size
        assert size is not None
        if size > cells:
            raise TrainingError(f"expected a mean_size of at most {cells}, the cells of a map, got {size}")
        return size if size >= 1 else max(1.0, size * cells)

    def _judged_unseen(self) -> bool:
        """Whether the bound is set by judges of its own: where the judge was trained on the images it is set on."""
        aware = self.networks.attention.class_conditional
        cached = isinstance(self.train.cache, FeatureCache)  # a trunk that is trained too would have to run for each
        return aware and cached and not self.networks.own_head and self.validation is None

    def _meet_size(self, examples: Examples) -> float:
        """Set the bound so that these images have the mean size asked for; returns what they have then."""
        return self._set_bound(self._scores(examples))

    def _meet_size_unseen(self) -> float:
        """As :meth:`_meet_size` on the training images, each as a judge sees it that was not trained on it.

        The baseline is surer of the images that it was trained on than of others, and a class-aware score reads how
        its logits vary over a map: a bound set on what it says of them gives other images other sizes. So each fifth
        of the images is judged by a head trained as the baseline was, on the other four.
        """
        attention = self.networks.attention
        fold_of = _generator(self.settings.seed, 6).permutation(len(self.train)) % JUDGES
        scores = []
        try:
            for fold in range(min(JUDGES, len(self.train))):
                others = self.train.subset(np.flatnonzero(fold_of != fold))
                attention.judge = trained_judge(self.networks, self.settings, others, fold)
                scores.append(self._scores(self.train.subset(np.flatnonzero(fold_of == fold))))
        finally:
            attention.judge = self.networks.baseline
        return self._set_bound(torch.cat(scores))

    @torch.no_grad()
    def _scores(self, examples: Examples) -> Tensor:
        """U of these images' cells, (B, N); of some of the images where there are many."""
        some = np.sort(_generator(self.settings.seed, 5).permutation(len(examples))[:_SIZED_ON])
        attention = self.networks.attention
        scores = [
            -attention(self.networks.features(examples, examples.rows[some[chosen]])).unbounded.flatten(1)
            for chosen in chunks(len(some))
        ]
        return torch.cat([part for parts in processes.everyones(scores) for part in parts])

    def _set_bound(self, scores: Tensor) -> float:
        attention = self.networks.attention
        score, reached = bound_of_mean_size(scores, self._mean_size(scores.shape[1]))
        attention.move_bound(score)
        return reached

    def _targets(self, examples: Examples, chosen: npt.NDArray[np.int64]) -> Tensor:
        """Class indices (B,), or of several labels (B, K): those given, or what the classifier predicts from all cells.

        The predicted class and not its probabilities: those are matched best by selecting every cell.
        """
        if self.settings.targets == "labels":
            assert examples.labels is not None
            return torch.from_numpy(examples.labels[chosen]).to(self.device)
        with torch.no_grad():
            pooled = self.networks.pooled(examples, examples.rows[chosen], "head")
            logits: Tensor = self.networks.baseline(pooled)
        return decided(logits, several=self.settings.several_labels)

    def _finish_epoch(self, stage: _Stage) -> bool:
        """Log the epoch, look at the validation images; False to end the stage here."""
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
                    f"lower the learning rate ({self.settings.learning_rate})"
                )
        if position.alive == 0:
            position.dead = line["dead"] = True
            self.report(
                "the module has died: every cell of every image is at the bound and passes no gradient, so all cells "
                "are selected. Remedy: a lower learning rate or another seed",
                0,
                0,
            )
        go_on = True
        for module in stage.evaluated:
            module.eval()
        if stage.name == "module" and self.settings.mean_size is not None:
            last = position.epoch + 1 == stage.epochs
            if last and self._judged_unseen():
                line["mean_size"] = self._meet_size_unseen()
            else:
                line["mean_size"] = self._meet_size(self.validation or self.train)
        if self.validation is not None:
            line["validation"] = self._validate(stage)
            if self.settings.patience is not None:
                if position.best is None or line["validation"]["loss"] < position.best:
                    position.best, position.waited = line["validation"]["loss"], 0
                    self.best = {key: value.clone() for key, value in self.networks.saved().items()}
                else:
                    position.waited += 1
                go_on = position.waited < self.settings.patience
        self._to_train(stage)
        self.log.append(line)
        if self.folder is not None and processes.rank() == 0:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        position.epoch += 1
        position.step = position.alive = 0
        position.loss = 0.0
        return go_on

    def _to_train(self, stage: _Stage) -> None:
        """Dropout and draws on in what is trained, and nowhere else."""
        for module in stage.trained:
            module.train()
        if stage.name == "module":
            self.networks.attention.train()

    @torch.no_grad()
    def _validate(self, stage: _Stage) -> dict[str, Any]:
        assert self.validation is not None
        accuracy = scorer(several=self.settings.several_labels)
        for chosen in chunks(len(self.validation)):
            [(_, logits)], _ = stage.outputs(self.validation, self.validation.rows[chosen], True)
            targets = self._targets(self.validation, chosen)
            accuracy.update(logits, targets)
        return together(processes.everyones(accuracy)).result()

    def _restore_best(self, stage: _Stage) -> None:
        own = self.networks.saved()
        with torch.no_grad():
            for key, value in self.best.items():
                own[key].copy_(value)
        self.report(f"{stage.name}: kept the epoch of the smallest validation loss", 0, 0)

    def _optimiser(self, stage: _Stage, saved: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        trunks = self.networks.trunks(stage.name)
        groups = [
            {
                "params": [parameter for module in modules for parameter in module.parameters()],
                "lr": rate,
            }
            for modules, rate in (
                ([module for module in stage.trained if module not in trunks], self.settings.learning_rate),
                (trunks, self.settings.trunk_rate),
            )
            if modules
        ]
        optimiser = torch.optim.Adam(groups)
        if saved:
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in saved.items():
                index, _, name = key.partition(".")
                state.setdefault(int(index), {})[name] = value
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return optimiser

    def _save(self) -> None:
        """Write a checkpoint under a temporary name and move it into place by one rename."""
        self.saved_at = time.monotonic()
        if self.folder is None or processes.rank():
            return
        target = self.folder / f"checkpoint-{self.position.total_steps}"
        temporary = self.folder / f".{target.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        state = self.optimiser.state_dict()["state"] if self.optimiser else {}
        optimiser = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
        save_file(_own(self.networks.saved()), temporary / "networks.safetensors")
        save_file(_own(self.best), temporary / "best.safetensors")
        save_file(_own(optimiser), temporary / "optimiser.safetensors")
        position = dataclasses.asdict(self.position)
        record = {
            "identity": self.identity,
            "position": position,
            "log": self.log,
            "epochs_run": self.epochs_run,
            "scaler": self.scaler.state_dict(),
        }
        (temporary / "state.json").write_text(json.dumps(record), encoding="utf-8")
        temporary.rename(target)  # no two checkpoints have the same number of steps
        clear_checkpoints(self.folder, but=target)

    def _resume(self) -> dict[str, Tensor]:
        """Go on from the last whole checkpoint; returns the optimiser's tensors, none where a stage is to begin."""
        if self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        last = processes.agreed(next(reversed(checkpoints(self.folder)), None))
        if last is None:
            if processes.rank() == 0:
                (self.folder / "log.jsonl").unlink(missing_ok=True)
            return {}
        record = read_json(last / "state.json")
        different = [key for key in self.identity if record["identity"].get(key) != self.identity[key]]
        if different:
            raise TrainingError(
                f"expected the checkpoint of this training in {self.folder}, got one that differs in "
                f"{', '.join(different)}: train with the same settings and data, choose another folder, or remove it"
            )
        self.networks.restore(load_file(last / "networks.safetensors"))
        self.best = load_file(last / "best.safetensors")
        self.position = _Position(**record["position"])
        self.log, self.epochs_run = record["log"], record["epochs_run"]
        self.scaler.load_state_dict(record["scaler"])
        optimiser = load_file(last / "optimiser.safetensors")
        processes.together()  # all have read it before the first one writes another
        if processes.rank() == 0:
            lines = "".join(json.dumps(line) + "\n" for line in self.log)
            (self.folder / "log.jsonl").write_text(lines, encoding="utf-8")
        if self.position.stage < len(self.stages):
            stage = self.stages[self.position.stage].name
            self.report(f"resumed in stage {stage}, epoch {self.position.epoch + 1}, step {self.position.step}", 0, 0)
        return optimiser


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, added up over the images; of several labels binary, and their mean."""
    if targets.ndim == 1:
        return functional.cross_entropy(logits, targets, reduction="sum")
    each = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    return each.mean(dim=1).sum()


def clear_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Remove a training's checkpoints, whole and partial, except one."""
    for path in [*checkpoints(folder), *folder.glob(".checkpoint-*.partial")]:
        if path != but:
            shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a training of ours, oldest first; other programs' are left alone."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and (path / "networks.safetensors").exists()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def chunks(count: int) -> Iterator[npt.NDArray[np.int64]]:
    """The indices of ``count`` examples, or of this process's share, a batch of evaluation at a time."""
    mine = processes.share(count)
    for start in mine[::EVALUATION_BATCH]:
        yield np.arange(start, min(start + EVALUATION_BATCH, mine.stop))


def _generator(*key: int) -> np.random.RandomState:
    """A generator for one purpose at one position; RandomState's stream is frozen across NumPy versions."""
    return np.random.RandomState(list(key))


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
