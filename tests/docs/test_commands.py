"""The reference of the commands is that of the code."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_the_reference_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bla"])
    script = runpy.run_path(str(REFERENCE / "commands.py"))
    assert (REFERENCE / "cli.md").read_text() == script["reference"](), "run: python docs/reference/commands.py"


def test_every_command_and_option_is_in_it() -> None:
    from bla.cli import app

    page = (REFERENCE / "cli.md").read_text()
    for line in app.generate_docs().splitlines():
        if line.startswith(("* `", "## bla", "### bla")) and "](#" not in line:
            assert line.replace(" *[default: False]*", "") in page
