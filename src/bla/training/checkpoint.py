"""Checkpoints: where a training stands, written all or nothing, from which an interrupted one resumes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from bla.files import read_json, whole_folder
from bla.training.settings import TrainingError

TENSORS = ("networks", "best", "optimiser")


@dataclasses.dataclass(slots=True)
class Position:
    """Where training stands. All randomness is a function of it and of the seed, so a resume needs nothing else."""

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
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """A line for every epoch that has ended."""


@dataclasses.dataclass(slots=True)
class Checkpoint:
    """All that a resume needs. ``optimiser`` is empty between two stages: the next one has yet to begin."""

    position: Position
    scaler: dict[str, Any]
    networks: dict[str, Tensor]
    best: dict[str, Tensor]
    optimiser: dict[str, Tensor]

    def write(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Write it all or nothing, and remove the others."""
        target = folder / f"checkpoint-{self.position.total_steps}"  # no two have the same number of steps
        with whole_folder(target) as partial:
            for name in TENSORS:
                (partial / f"{name}.safetensors").write_bytes(tensor_bytes(getattr(self, name)))
            record = {"identity": identity, "position": dataclasses.asdict(self.position), "scaler": self.scaler}
            (partial / "state.json").write_text(json.dumps(record), encoding="utf-8")
        clear_checkpoints(folder, but=target)

    @classmethod
    def read(cls, path: Path, identity: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint in a folder; a TrainingError if it is another training's."""
        record = read_json(path / "state.json")
        different = [key for key in identity if record["identity"].get(key) != identity[key]]
        if different:
            raise TrainingError(
                f"expected the checkpoint of this training in {path.parent}, got one that differs in "
                f"{', '.join(different)}: train with the same settings and data, choose another folder, or remove it"
            )
        tensors = (load_file(path / f"{name}.safetensors") for name in TENSORS)
        return cls(Position(**record["position"]), record["scaler"], *tensors)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a training, oldest first; other programs' are ignored."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    found = [path for path in steps if steps[path].isdecimal() and (path / "networks.safetensors").exists()]
    return sorted(found, key=lambda path: int(steps[path]))


def clear_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Remove a training's checkpoints, whole and partial, except one."""
    for path in [*checkpoints(folder), *folder.glob(".checkpoint-*")]:
        if path != but:
            shutil.rmtree(path)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; each tensor is copied, as the format refuses tensors that share memory."""
    return save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
