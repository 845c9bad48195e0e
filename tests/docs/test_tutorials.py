"""The tutorials run, on small networks and few photos, and each is a notebook, in which an explanation is a picture."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
NET = '"test_resnet", "random"'
RUN = 'model="test_resnet", weights="random", image_size=64'
SMALLER = {
    "explain": [('"tf_efficientnet_lite0"', NET), ("train=48, test=16", "train=8, test=8"), ("(3, 6, 12)", "(3, 6)")],
    "audit": [
        ("photos(name, 0, 12)", "photos(name, 0, 2)"),
        ("photos(name, 1_000_000, 8)", "photos(name, 1_000_000, 1)"),
        ("epochs=10", "epochs=1"),
        ("POST_HOC)", f"POST_HOC, {RUN})"),
        ('if found.prediction.label == "cup"', "if True"),
    ],
    "train": [
        ("train=48, test=32", "train=8, test=8"),
        ("epochs=10)", f"epochs=1), {RUN}"),
        ("mean_size=6)", f"mean_size=2, epochs=1), {RUN}"),
    ],
    "inspect": [('"tf_efficientnet_lite0"', NET), ("range(30)", "range(4)"), ("(224, 224)", "(96, 96)")],
}


@pytest.fixture(scope="module")
def running() -> dict[str, Any]:
    return runpy.run_path(str(TUTORIALS / "run.py"), run_name="loaded")


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", SMALLER)
def test_a_tutorial_runs_and_displays_its_pictures(
    running: dict[str, Any], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = TUTORIALS / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert [wanted for wanted, _ in SMALLER[name] if wanted not in text] == []

    def smaller(code: str) -> str:
        for wanted, instead in SMALLER[name]:
            code = code.replace(wanted, instead)
        return code

    done = list(running["ran"](page, smaller))
    assert [bool(block["printed"]) for block, _, _ in done] == [bool(printed) for _, printed, _ in done]
    assert [bool(block["picture"]) for block, _, _ in done] == [picture is not None for _, _, picture in done]
    for block, _, picture in done:
        if picture is not None:
            assert np.asarray(picture).std() > 10
            assert (TUTORIALS / block["picture"]).stat().st_size < 200_000


def test_every_tutorial_is_run_and_is_a_notebook(running: dict[str, Any]) -> None:
    assert {path.stem for path in TUTORIALS.glob("*.md")} == set(running["PAGES"]) == set(SMALLER)
    for name in SMALLER:
        written = (TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8")
        assert written == running["notebook"](TUTORIALS / f"{name}.md"), "run: python docs/tutorials/run.py"
        nbformat.validate(nbformat.reads(written, as_version=4))


def test_a_notebooks_kernel_shows_an_explanation_as_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.radial_gradient("L").save(tmp_path / "cat.jpg")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")
    cells = ["from small import CLASSES, Tiny; import bla", "w = bla.explainable(Tiny(), classes=CLASSES)"]
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in [*cells, 'w.explain("cat.jpg")[0]']]
    NotebookClient(book, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (shown,) = book.cells[2].outputs
    assert shown.output_type == "execute_result"
    assert set(shown.data) == {"image/png", "text/html", "text/plain"}
    assert shown.data["text/plain"].startswith("<Explanation of cat.jpg: class ")
    assert len(shown.data["text/plain"]) < 120
