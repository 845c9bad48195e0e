"""What every benchmark does with its results: keep each one, so that a rerun resumes; mean and interval over seeds."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bla.files import write_json

ROOT = Path(__file__).parents[1]
"""Where `python -m benchmarks...` is run."""


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """A result from its file, or measured and then written, all or nothing."""
    if not path.exists():
        write_json(path, measure())
    return json.loads(path.read_text(encoding="utf-8"))


def digest(*seen: object) -> str:
    """What tells results apart in the names of their files: twelve hex digits of all that a result depends on."""
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t); NaN for the width of a single value."""
    if len(values) == 1:
        return float(values[0]), float("nan")
    return float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """A parser of the command line that shows a module's documentation as it stands."""
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
