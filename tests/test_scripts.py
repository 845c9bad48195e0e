"""Examples and benchmarks can be started: what they import is there. What some of them do is tested beside it."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLAIN = "explain_onnx.py"  # twenty lines from top to bottom, run as they stand by test_export.py
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != PLAIN)
BENCHMARKS = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("benchmarks/*/*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_what_an_example_imports_is_there(script: Path) -> None:
    runpy.run_path(str(script), run_name="loaded")


@pytest.mark.parametrize("module", BENCHMARKS)
def test_what_a_benchmark_imports_is_there(module: str) -> None:
    importlib.import_module(module)


def test_each_folder_of_benchmarks_says_its_question() -> None:
    folders = {path.parent for path in ROOT.glob("benchmarks/*/*.py")}
    assert len(folders) > 4
    assert all((folder / "README.md").is_file() for folder in folders)
