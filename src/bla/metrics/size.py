"""The size of explanations: how many cells, and how that varies."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def size_summary(counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Summarise a histogram: ``counts[m]`` explanations have m of ``len(counts) - 1`` cells.

    The standard deviation is the population's; the median of an even number lies between the middle two.

    >>> size_summary(np.array([0, 1, 0, 2, 1]))
    {'mean': 2.75, 'std': 1.0897247358851685, 'min': 1, 'median': 3.0, 'max': 4, 'cells': 4}
    """
    total = int(counts.sum())
    if not total:
        raise ValueError("expected at least one explanation, got none")
    sizes = np.arange(len(counts))
    mean = float((counts * sizes).sum() / total)
    ranks = np.cumsum(counts)
    middle = [int(np.searchsorted(ranks, rank, side="right")) for rank in ((total - 1) // 2, total // 2)]
    present = np.flatnonzero(counts)
    return {
        "mean": mean,
        "std": float(np.sqrt((counts * (sizes - mean) ** 2).sum() / total)),
        "min": int(present[0]),
        "median": sum(middle) / 2,
        "max": int(present[-1]),
        "cells": len(counts) - 1,
    }
