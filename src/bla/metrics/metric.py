"""What a figure means: its formula, its source, which direction is better, and the version of our implementation."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """The meaning of a figure, saved beside it.

    Attributes
    ----------
    formula: what is computed for an image; the figure is the mean over images unless it says otherwise.
    better: which direction is better; None where neither is.
    version: raised whenever the same input would give another figure.
    """

    name: str
    title: str
    formula: str
    source: str
    better: Literal["higher", "lower"] | None = None
    version: int = 1


_MEANINGS = tomllib.loads(Path(__file__).with_name("meanings.toml").read_text(encoding="utf-8"))
METRICS = {name: Metric(name, **meaning) for name, meaning in _MEANINGS.items()}
"""The metrics of a comparison, by name."""
