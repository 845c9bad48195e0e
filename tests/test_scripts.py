"""Examples and benchmarks can be started: what they import is there. What some of them do is tested beside it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLAIN = "explain_onnx.py"  # twenty lines from top to bottom, run as they stand by test_export.py
SCRIPTS = sorted(
    path for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.py") if path.name != PLAIN
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_it_imports_is_there(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(script.parent)
    runpy.run_path(str(script), run_name="loaded")
