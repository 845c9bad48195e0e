"""Checkpoints: where a training stands, written all or nothing, from which an interrupted one resumes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from bla.files import typed, whole_folder
from bla.progress import Progress, silent
from bla.training.settings import TrainingError

TENSORS = ("networks", "best", "optimiser")
CHECKSUMS = "checksums.json"
KEPT = 2
"""Checkpoints that stay: if the last one is damaged, the one before is used."""


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
        """Write it all or nothing, and remove those before the last one."""
        target = folder / f"checkpoint-{self.position.total_steps}"  # no two have the same number of steps
        with whole_folder(target) as partial:
            for name in TENSORS:
                (partial / f"{name}.safetensors").write_bytes(tensor_bytes(getattr(self, name)))
            record = {"identity": identity, "position": dataclasses.asdict(self.position), "scaler": self.scaler}
            (partial / "state.json").write_text(json.dumps(record), encoding="utf-8")
            (partial / CHECKSUMS).write_text(json.dumps(_checksums(partial)), encoding="utf-8")
        clear_checkpoints(folder, but=checkpoints(folder)[-KEPT:])

    @classmethod
    def read(cls, path: Path, identity: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint in a folder; a TrainingError if it is another training's."""
        record = typed((path / "state.json").read_bytes(), _State)
        different = [key for key in identity if record.identity.get(key) != identity[key]]
        if different:
            raise TrainingError(
                f"expected the checkpoint of this training in {path.parent}, got one that differs in "
                f"{', '.join(different)}: train with the same settings and data, choose another folder, or remove it"
            )
        tensors = (load_file(path / f"{name}.safetensors") for name in TENSORS)
        return cls(record.position, record.scaler, *tensors)


@dataclasses.dataclass(frozen=True)
class _State:
    identity: dict[str, Any]
    position: Position
    scaler: dict[str, Any]


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a training, oldest first; other programs' are ignored."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    ours = ("networks.safetensors", CHECKSUMS)
    found = [path for path in steps if steps[path].isdecimal() and any((path / name).exists() for name in ours)]
    return sorted(found, key=lambda path: int(steps[path]))


def last_whole(folder: Path, report: Progress = silent) -> Path | None:
    """The newest checkpoint that is as it was written; a damaged one is renamed, and the one before is tried."""
    for path in reversed(checkpoints(folder)):
        try:
            if typed((path / CHECKSUMS).read_bytes(), dict[str, int]) == _checksums(path):
                return path
        except (OSError, ValueError):
            pass
        aside = path.rename(path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}"))
        report(f"{path} is damaged: it is set aside as {aside.name}, and the checkpoint before it is used", 0, 0)
    return None


def _checksums(path: Path) -> dict[str, int]:
    """CRC-32 of each file of a checkpoint."""
    files = ("state.json", *(f"{name}.safetensors" for name in TENSORS))
    return {name: zlib.crc32((path / name).read_bytes()) for name in files}


def clear_checkpoints(folder: Path, but: Sequence[Path] = ()) -> None:
    """Remove a training's checkpoints, whole and partial, except some."""
    for path in [*checkpoints(folder), *folder.glob(".checkpoint-*")]:
        if path not in but:
            shutil.rmtree(path)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; each tensor is copied, as the format refuses tensors that share memory."""
    return save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
