"""What a figure means: its formula, its source, which direction is better, and the version of our implementation."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """The meaning of a figure, saved beside it.

    Attributes
    ----------
    name: the key in results.
    title: for people.
    formula: what is computed for an image; the figure is the mean over images unless it says otherwise.
    source: who proposed it.
    better: which direction is better; None where neither is.
    version: raised whenever the same input would give another figure.

    Examples
    --------
    >>> Metric("size", "cells", "m", "arXiv 2105.14824", None).to_dict()["better"] is None
    True
    """

    name: str
    title: str
    formula: str
    source: str
    better: Literal["higher", "lower"] | None
    version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def by_name(*metrics: Metric) -> dict[str, Metric]:
    """Metrics by their name."""
    return {metric.name: metric for metric in metrics}
