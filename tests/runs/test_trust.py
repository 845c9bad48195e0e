"""A run folder is data: whatever reads it runs no code that it names, unless the caller repeats the name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import bla
from bla.comparison import compare
from bla.deploy.engine import EngineError, open_engine
from bla.deploy.export import export
from bla.deploy.pictures import explain_files
from bla.runs.calibration import calibrate
from bla.runs.record import SHIPPED, RunError
from bla.runs.run import evaluate

NAMES = ["stranger:build", "os:abort", "hf-hub:someone/net", "local-dir:/somewhere", "stranger:", ":build"]
READERS: dict[str, Callable[[Path], object]] = {
    "load": bla.load,
    "from_pretrained": bla.from_pretrained,
    "save_pretrained": lambda run: bla.save_pretrained(run, "shared", with_classifier=True),
    "evaluate": evaluate,
    "explain": lambda run: [*explain_files([Path("photo.png")], run=run)],
    "compare": lambda run: compare(run, out="comparison"),
    "export": lambda run: export(run, "out.onnx"),
    "calibrate": lambda run: calibrate(run, "photos"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stranger's run, in a working folder with the code that it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLA_CACHE", str(tmp_path / "cache"))
    Path("stranger.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef build(): return 1\n")
    return named(Path(shutil.copytree(SHIPPED / "tf_efficientnet_lite0", tmp_path / "run")), NAMES[0])


def named(run: Path, name: str) -> Path:
    record = json.loads((run / "run.json").read_text())
    record["backbone"]["name"] = name
    (run / "run.json").write_text(json.dumps(record))
    return run


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_a_run_names(reader: str, run: Path) -> None:
    with pytest.raises(
        RunError, match=r"'stranger:build', which is not run unasked, got None: .*--trust-code stranger"
    ):
        READERS[reader](run)
    assert not Path("ran").exists()
    assert "stranger" not in sys.modules


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trusted", [None, "another:build"])
def test_only_the_code_that_is_trusted_by_name_is_run(name: str, trusted: str | None, run: Path) -> None:
    with pytest.raises(RunError, match="not run unasked"):
        bla.load(named(run, name), model=trusted)
    with pytest.raises(ValueError, match=r"to return a torch\.nn\.Module, got int"):
        bla.load(named(run, NAMES[0]), model=NAMES[0])
    assert sys.modules.pop("stranger")


def test_modules_in_the_working_folder_are_not_ours(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process exports what is served: a file there must not pass for a library, which Python's -P ensures."""
    commands: list[list[str]] = []

    def refused(command: list[str], **_: object) -> nullcontext[SimpleNamespace]:
        commands.append(command)
        return nullcontext(SimpleNamespace(returncode=2, stderr=["bla: refused"]))

    monkeypatch.setattr("bla.deploy.engine.subprocess.Popen", refused)
    with pytest.raises(EngineError, match="refused"):
        open_engine(run, model=NAMES[0])
    assert commands[0][:4] == [sys.executable, "-P", "-m", "bla"]
    assert commands[0][-2:] == ["--trust-code", NAMES[0]]
