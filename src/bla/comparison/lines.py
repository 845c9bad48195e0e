"""A file of JSON lines that grows batch by batch, and resumes after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bla.files import typed, write_atomically, write_json


class JsonLines:
    """``NAME.jsonl`` and ``NAME.state.json``, which is written after each batch and says how many lines are whole.

    Attributes
    ----------
    found: the lines, at first those that an earlier call with the same signature wrote.
    state: what the caller keeps beside them.
    """

    def __init__(self, base: Path, signature: str) -> None:
        self.path = base.with_name(base.name + ".jsonl")
        self.record = base.with_name(base.name + ".state.json")
        self.state: dict[str, Any] = {"signature": signature, "photos": 0}
        self.found: list[Any] = []
        whole: list[str] = []
        try:
            state = typed(self.record.read_bytes(), dict[str, Any])
            lines = self.path.read_text("utf-8").splitlines()
            if state["signature"] == signature and 0 <= state["photos"] <= len(lines):
                whole = lines[: state["photos"]]
                self.found, self.state = [json.loads(line) for line in whole], state
        except (OSError, ValueError, KeyError, TypeError):
            self.found, whole = [], []
        write_atomically(self.path, "".join(line + "\n" for line in whole).encode())

    def append(self, fresh: Sequence[Any], **state: Any) -> None:
        """Add a batch; the record counts it only once it is written."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in fresh)
        self.found += fresh
        self.state |= {"photos": len(self.found), **state}
        write_json(self.record, self.state)
