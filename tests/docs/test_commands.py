"""The reference of the commands is that of the code."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from bla.cli import app

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_reference_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bla"])
    script = runpy.run_path(str(REFERENCE / "commands.py"))
    assert (REFERENCE / "cli.md").read_text() == script["reference"](), "run: python docs/reference/commands.py"


def test_every_command_and_option_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bla"])
    page = (REFERENCE / "cli.md").read_text()
    for line in app.generate_docs().splitlines():
        if line.startswith("* `"):
            assert f"`{line.split('`')[1].split()[0]}" in page
        elif line.startswith("bla "):
            assert f"`{line.replace(' [OPTIONS]', '')}`" in page or line.endswith(" COMMAND")
