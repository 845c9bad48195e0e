"""The tutorials run as they stand: they print what they say, and make the pictures beside them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def running() -> dict[str, Any]:
    return runpy.run_path(str(TUTORIALS / "run.py"), run_name="loaded")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder for all: what one page made, the next finds."""
    return tmp_path_factory.mktemp("tutorials")


@pytest.mark.parametrize("name", ["explain", "audit", "train"])
def test_a_tutorial_prints_and_draws_what_it_shows(
    running: dict[str, Any], place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    page = TUTORIALS / f"{name}.md"
    done = list(running["ran"](page))
    assert len(done) >= 6
    for block in done:
        assert NUMBER.sub("#", block.printed) == NUMBER.sub("#", block.written)
        # rounding differs between processors, and grows in training: a few photos of some thirty, a few cells
        for came, written in zip(NUMBER.findall(block.printed), NUMBER.findall(block.written), strict=True):
            near = 2 if "." not in written else 0.1 if float(written) <= 1 else 0.2 * float(written)
            assert float(came) == pytest.approx(float(written), abs=near), block.printed
    pictures = re.findall(r"!\[[^\]]+\]\(([\w-]+\.jpg)\)", page.read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        made, shown = Image.open(picture), Image.open(TUTORIALS / picture)
        assert made.size == shown.size
        assert np.abs(np.asarray(made, np.float64) - np.asarray(shown)).mean() < 12
        assert (TUTORIALS / picture).stat().st_size < 200_000


def test_every_tutorial_is_run(running: dict[str, Any]) -> None:
    assert {path.stem for path in TUTORIALS.glob("*.md")} == set(running["PAGES"])
