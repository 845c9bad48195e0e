"""Explanations on disk as they are made, what they cost, and where a resumed call goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bla.explanations.explanation import Explanation
from bla.files import read_json, write_json


class Writer:
    """A method's explanations on disk, a line a photo, and how far they are: what a resumed call goes on from."""

    def __init__(self, base: Path, signature: str) -> None:
        self.lines = base.with_name(base.name + ".jsonl")
        self.record = base.with_name(base.name + ".state.json")
        self.state: dict[str, Any] = {"signature": signature, "bytes": 0, "photos": 0, "seconds": 0.0, "peak": None}

    def open(self) -> list[Explanation]:
        """What is there of the same comparison, cut back to the last whole batch."""
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        try:
            state = read_json(self.record)
            whole = state["signature"] == self.state["signature"] and self.lines.stat().st_size >= state["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            self.lines.write_bytes(b"")
            return []
        self.state = state
        os.truncate(self.lines, state["bytes"])
        return [Explanation.from_dict(json.loads(line)) for line in self.lines.read_text("utf-8").splitlines()]

    def __enter__(self) -> Writer:
        self.handle = self.lines.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def append(self, fresh: Sequence[Explanation], seconds: float, peak: int | None) -> None:
        """Add a batch; the record says that it is there only when it is."""
        content = "".join(json.dumps(entry.to_dict()) + "\n" for entry in fresh).encode()
        self.handle.write(content)
        self.handle.flush()
        state = self.state
        state["bytes"] += len(content)
        state["photos"] += len(fresh)
        state["seconds"] += seconds
        if peak is not None:
            state["peak"] = max(peak, state["peak"] or 0)
        write_json(self.record, state)

    def cost(self) -> dict[str, Any]:
        """Milliseconds a photo beyond the forward pass, and the most memory beyond what was there before."""
        state = self.state
        return {
            "ms_per_image": round(1000 * state["seconds"] / max(1, state["photos"]), 3),
            "peak_memory_mb": None if state["peak"] is None else round(state["peak"] / 1e6, 1),
        }


class PeakMemory:
    """The most memory that is taken from here on, beyond what is taken now: of the device, or the process (Linux)."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.before: int | None = None
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
            self.before = torch.cuda.memory_allocated(place)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
            self.before = self._high_water()
        except OSError:
            self.before = None

    def bytes(self) -> int | None:
        """None where it cannot be told."""
        if self.before is None:
            return None
        if self.place.type == "cuda":
            return torch.cuda.max_memory_allocated(self.place) - self.before
        return max(0, self._high_water() - self.before)

    @staticmethod
    def _high_water() -> int:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise OSError("no high-water mark")


def wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
