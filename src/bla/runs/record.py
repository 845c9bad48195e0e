"""The record of a run, run.json: where it is, what it must hold, which versions computed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bla import BlaError
from bla.files import read_json, reading
from bla.training.loop import checkpoints

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parent / "explainers"


class RunError(BlaError):
    """A run folder that is missing, incomplete, or does not fit what it is used for."""


def run_folder(run: str | Path) -> Path:
    """The folder of a run, or of a shipped explainer by name.

    Raises
    ------
    RunError
        If there is neither.
    """
    folder = Path(run)
    if folder.is_dir():
        return folder
    if (SHIPPED / str(run)).is_dir():
        return SHIPPED / str(run)
    shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("*/")))
    raise RunError(f"expected a run folder or a shipped explainer ({shipped}), got {str(run)!r}, which is neither")


def read_record(folder: Path) -> dict[str, Any]:
    """The record in run.json.

    Raises
    ------
    RunError
        If there is no complete run, or one whose record this version does not read.
    """
    path = folder / "run.json"
    if not path.exists():
        remedy = (
            "its training was interrupted; start it again to finish it"
            if checkpoints(folder)
            else "`bla train` writes one"
        )
        raise RunError(f"expected a complete run in {folder}, got no run.json: {remedy}")
    with reading("the record of a run", path, RunError):
        record: dict[str, Any] = read_json(path)
        version = record["schema_version"]
        if version == SCHEMA_VERSION:
            _check_record(record)
            maps = record["settings"].pop("maps", 1)
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        remedy = "update bla to read it" if newer else "train again with this bla"
        raise RunError(f"{path}: expected schema_version {SCHEMA_VERSION}, got {version}: {remedy}")
    if maps != 1:
        raise RunError(
            f"{path}: expected a selection over the last feature map, got maps={maps!r}: earlier maps and several in "
            "one selection are no longer supported; for finer cells train again with a larger --image-size"
        )
    return record


def _check_record(record: Mapping[str, Any]) -> None:
    """KeyError or TypeError where a part is missing or of another kind, as after an edit by hand."""
    backbone, data = record["backbone"], record["data"]
    texts = [record["setup"], record["model"], backbone["digest"], data["root"], data["train"], data["test"]]
    texts += [*record["classes"], backbone["name"] or "", backbone["weights"] or ""]
    parts = [record["transform"], record["settings"], record["metrics"], record["data"]]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(part, dict) for part in parts):
        raise TypeError("a part of it is of another kind")


def versions() -> dict[str, str]:
    """Of what computes: Python and packages."""
    packages = ("bounded-logit-attention", "torch", "torchvision", "timm", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
