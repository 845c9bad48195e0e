"""Writes under faults: a disk that fails at any call, power that fails between any two."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bla.files import whole_folder, write_atomically, write_json
from bla.training.checkpoint import CHECKSUMS, KEPT, Checkpoint, Position, checkpoints, last_whole


def replaced(folder: Path) -> None:
    write_atomically(folder / "a.bin", b"new")


def record(folder: Path) -> None:
    write_json(folder / "a.json", {"new": 1})


def made(folder: Path) -> None:
    with whole_folder(folder / "made") as partial:
        (partial / "one").write_bytes(b"1")
        (partial / "two").write_bytes(b"2")


def checkpoint(folder: Path, steps: int = 3) -> None:
    tensors = {"w": torch.full((4,), float(steps))}
    Checkpoint(Position(total_steps=steps), {}, tensors, {}, {}).write(folder, {"seed": 0})


WRITES: dict[str, Callable[[Path], None]] = {
    "a file": replaced, "a record": record, "a folder": made, "a checkpoint": checkpoint,
}  # fmt: skip


class Disk:
    """What happens on the disk, in order; it fails at call number ``at``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = -1) -> None:
        self.events: list[tuple[str, str]] = []
        self.at = at
        for name in ("fsync", "rename", "replace", "mkdir", "unlink"):
            monkeypatch.setattr(os, name, self._noted(name, getattr(os, name)))
        monkeypatch.setattr(shutil, "rmtree", self._noted("rmtree", shutil.rmtree))

    def _noted(self, name: str, call: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: object, **options: object) -> None:
            first = arguments[0]
            path = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else first
            self.events.append((name, str(path)))
            if len(self.events) - 1 == self.at and name not in ("unlink", "rmtree"):  # cleaning up may not fail, too
                raise OSError(errno.ENOSPC, "No space left on device")
            call(*arguments, **options)
            if name in ("rename", "replace"):
                self.events.append(("renamed", str(arguments[1])))

        return noted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With what was there before."""
    (tmp_path / "a.bin").write_bytes(b"old")
    (tmp_path / "a.json").write_text('{"old": 1}')
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    return tmp_path


def state(folder: Path) -> dict[str, object]:
    newest = last_whole(folder)
    return {
        "a.bin": (folder / "a.bin").read_bytes(),
        "a.json": json.loads((folder / "a.json").read_text()),
        "made": sorted(path.name for path in (folder / "made").glob("*")),
        "checkpoint": newest and newest.name,
    }


@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_fails_anywhere_leaves_the_old_or_the_new(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, seen = state(folder), set()
    for at in range(40):
        with monkeypatch.context() as patch:
            disk = Disk(patch, at)
            failed = False
            try:
                WRITES[name](folder)
            except OSError:
                failed = True
        now = state(folder)
        changed = [key for key in old if old[key] != now[key]]
        assert changed in ([], [{"a file": "a.bin", "a record": "a.json", "a folder": "made"}.get(name, "checkpoint")])
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], "nothing partial stays"
        seen.add((failed, bool(changed)))
        if not failed and len(disk.events) <= at:
            break
        for path in (folder / "made", folder / "checkpoint-3"):
            shutil.rmtree(path, ignore_errors=True)
        (folder / "a.bin").write_bytes(b"old")
        (folder / "a.json").write_text('{"old": 1}')
    assert (False, True) in seen
    assert (True, False) in seen


@pytest.mark.parametrize("name", WRITES)
def test_power_may_fail_at_any_time(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is renamed is on the disk before, and the renaming before anything older goes or the call returns."""
    disk = Disk(monkeypatch)
    WRITES[name](folder)
    renamed = [index for index, event in enumerate(disk.events) if event[0] == "renamed"]
    assert renamed
    for index in renamed:
        source, target = disk.events[index - 1][1], disk.events[index][1]
        before = {path for kind, path in disk.events[: index - 1] if kind == "fsync"}
        assert source in before
        if Path(target).is_dir():
            assert {path.name for path in Path(target).iterdir()} <= {Path(path).name for path in before}
        after = [event for event in disk.events[index + 1 :] if event[0] in ("fsync", "rmtree")]
        assert after[0] == ("fsync", str(folder)), "before an older one is removed"


def damages(path: Path) -> Iterator[Callable[[], object]]:
    for file in ("state.json", "networks.safetensors", "optimiser.safetensors", CHECKSUMS):
        content = (path / file).read_bytes()
        yield (path / file).unlink
        flipped = content[:9] + bytes([content[9] ^ 4]) + content[10:]
        for wrong in (b"", content[:-1], b"\0" * len(content), flipped, b"[" * 99_999):
            yield lambda file=file, wrong=wrong: (path / file).write_bytes(wrong)  # type: ignore[misc]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(folder: Path) -> None:
    said: list[str] = []
    assert len(checkpoints(folder)) == KEPT
    shutil.copytree(folder / "checkpoint-2", folder / "kept")
    for damage in damages(folder / "checkpoint-2"):
        damage()
        assert last_whole(folder, lambda text, *_: said.append(text)) == folder / "checkpoint-1"
        assert "checkpoint-2 is damaged: it is set aside as damaged-checkpoint-2-" in said[-1]
        assert Checkpoint.read(folder / "checkpoint-1", {"seed": 0}).position.total_steps == 1
        shutil.copytree(folder / "kept", folder / "checkpoint-2")
    assert last_whole(folder) == folder / "checkpoint-2"
    (folder / "checkpoint-1" / "state.json").unlink()
    (folder / "checkpoint-2" / "state.json").unlink()
    assert last_whole(folder) is None
