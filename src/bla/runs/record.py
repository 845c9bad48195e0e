"""The record of a run, ``run.json``: its fields, where it lies, how it is read and written. Loads no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from bla import BlaError
from bla.files import reading, timestamp, typed, write_atomically, write_json

SCHEMA_VERSION = 1
RECORD, WEIGHTS, CERTIFICATE = "run.json", "model.safetensors", "certificate.json"
SHIPPED = Path(__file__).parent / "explainers"
"""The explainers that come with the package, a run folder each."""


class RunError(BlaError):
    """A run folder that is missing, incomplete, or does not fit what it is used for."""


class Backbone(TypedDict):
    """The classifier that was trained on."""

    name: str | None  # None if it was passed as an object
    weights: str | None  # a file, "random", or None for those that come with the name
    digest: str  # SHA-256 of the trunk's weights
    head: NotRequired[str]  # of its own head's, where that is explained
    said: NotRequired[dict[str, float]]  # of noise, by the index of its likeliest classes: how its output was read


class Data(TypedDict):
    """The images that were trained and measured on."""

    train: str  # SHA-256
    test: str
    root: str  # a name, an absolute path, or "" for splits in memory
    images: NotRequired[dict[str, int]]  # how many could be read: train, validation, test


class Skipped(TypedDict):
    """An image that could not be read."""

    image: str
    error: str


class Record(TypedDict):
    """What run.json holds."""

    schema_version: int
    setup: str
    model: str
    backbone: Backbone
    transform: dict[str, Any]
    data: Data
    classes: list[str]
    seed: int
    settings: dict[str, Any]
    dead: bool  # the module died in training: it selects every cell
    epochs: dict[str, int]
    mean_size: NotRequired[dict[str, Any]]
    skipped: list[Skipped]
    versions: dict[str, str]
    created: str
    seconds: float
    metrics: dict[str, Any]
    trunk: NotRequired[str]  # SHA-256 of the trained trunk's weights, if it was trained


def run_folder(run: str | Path) -> Path:
    """The folder of a run, or of a shipped explainer by name; RunError if there is neither."""
    for folder in (Path(run), SHIPPED / str(run)):
        if folder.is_dir():
            return folder
    shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("*/")))
    raise RunError(f"expected a run folder or a shipped explainer ({shipped}), got {str(run)!r}, which is neither")


def read_record(folder: Path) -> Record:
    """The record of a complete run; RunError if there is none, or this version cannot read its record."""
    path = folder / RECORD
    if not path.exists():
        again = any(folder.glob("checkpoint-*/networks.safetensors"))
        remedy = "its training was interrupted; start it again to finish it" if again else "`bla train` writes one"
        raise RunError(f"expected a complete run in {folder}, got no {RECORD}: {remedy}")
    with reading("the record of a run", path, RunError):
        content = path.read_bytes()
        version = typed(content, dict[str, Any])["schema_version"]
        record = typed(content, Record) if version == SCHEMA_VERSION else None
    if record is None:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        remedy = "update bla to read it" if newer else "train again with this bla"
        raise RunError(f"{path}: expected schema_version {SCHEMA_VERSION}, got {version}: {remedy}")
    if (maps := record["settings"].pop("maps", 1)) != 1:
        raise RunError(
            f"{path}: expected a selection over the last feature map, got maps={maps!r}: earlier maps and several in "
            "one selection are no longer supported; for finer cells train again with a larger --image-size"
        )
    return record


def new_record(**fields: Any) -> Record:
    """A record with these fields, made now by these versions."""
    made = {"versions": versions(), "created": timestamp()}
    defaults = {"schema_version": SCHEMA_VERSION, "dead": False, "epochs": {}, "skipped": [], "seconds": 0.0}
    return cast("Record", defaults | fields | made)


def write_run(folder: Path, record: Record, files: Mapping[str, bytes]) -> None:
    """Write the files of a run, and its record last: a folder with a record is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, CERTIFICATE):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_json(folder / RECORD, record, indent=1)


def content_digest(folder: Path, version: str = "") -> str:
    """SHA-256 of a run's record and weights, and of the version of what is made from them."""
    digest = hashlib.sha256(version.encode())
    for name in (RECORD, WEIGHTS):
        if not (folder / name).is_file():
            raise RunError(f"expected a complete run in {folder}, got no {name}")
        content = (folder / name).read_bytes()
        digest.update(b"%d:" % len(content) + content)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    packages = ("bounded-logit-attention", "torch", "torchvision", "timm", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
