"""A certificate: the smallest size that :func:`bla.runs.calibration.calibrate` certified. Loads no torch."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

from bla.files import reading, typed
from bla.progress import Progress, silent
from bla.runs.record import CERTIFICATE, WEIGHTS, Record, RunError, read_record, run_folder

SCHEMA_VERSION = 1
Quantity = Literal["agreement", "kept", "removed"]
SAYS: dict[str, str] = {
    "agreement": "from the {} alone the head says the classifier's class",
    "kept": "from the pixels of the {} alone the classifier keeps its class",
    "removed": "without the pixels of the {} the classifier no longer says its class",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What ``certificate.json`` holds: the smallest certified size, and all that the claim depends on.

    ``rate`` is the share of the ``photos`` that passed at this size; ``images``, ``model`` and ``weights`` are SHA-256
    of these photos, the classifier's trunk and the run's weights; ``seed`` divided the photos, if nothing else did.
    """

    quantity: Quantity
    share: float
    confidence: float
    size: int
    cells: int
    rate: float
    bound: float
    photos: int
    images: str
    fill: str | None
    transform: dict[str, Any]
    model: str
    weights: str
    seed: int
    versions: dict[str, str]
    created: str
    schema_version: int = SCHEMA_VERSION

    def __str__(self) -> str:
        says = SAYS[self.quantity].format("best cell" if self.size == 1 else f"{self.size} best cells")
        sure = f"{100 * self.confidence:g}% confidence" + ("" if self.fill is None else f"; fill {self.fill}")
        return f"certificate: {says} in at least {100 * self.share:g}% of photos like those {self.photos:,} ({sure})"


def read_certificate(run: str | Path, file: Path | None = None, report: Progress = silent) -> Certificate | None:
    """The certificate of a run, by default from its folder; None if it has none.

    A RunError says that the file is another, or certifies another classifier or other weights; other preprocessing is
    reported.
    """
    folder = run_folder(run)
    path = file or folder / CERTIFICATE
    if file is None and not path.exists():
        return None
    with reading("a certificate", path, RunError, remedy=": `bla calibrate` writes one"):
        found = typed(path.read_bytes(), Certificate)
        if found.schema_version != SCHEMA_VERSION or not 1 <= found.size <= found.cells:
            raise ValueError(f"schema_version {found.schema_version}, {found.quantity} at {found.size}")
    record = read_record(folder)
    if (found.model, found.weights) != digests(folder, record):
        what = "explainer" if found.model == digests(folder, record)[0] else "classifier"
        raise RunError(f"{path}: expected a certificate of this {what}, got one of another: calibrate again")
    if found.transform != record["transform"]:
        report(f"{path}: the certificate was made with other preprocessing, and may not hold", 0, 0)
    return found


def digests(folder: Path, record: Record) -> tuple[str, str]:
    """SHA-256 of the classifier's trunk and of the run's weights."""
    weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    return record.get("trunk", record["backbone"]["digest"]), weights
