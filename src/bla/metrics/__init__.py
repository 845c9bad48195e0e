"""What is measured: callables, tensors and explanations in, figures out; the same code for every method.

The names load on first use, so that :mod:`bla.metrics.statistics` loads no torch; ``__init__.pyi`` gives them to type
checkers.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "accuracy": ("Accuracy", "Values"),
    "cells": ("is_affine", "read_cells"),
    "judging": ("Curve", "Ranked", "judge_methods"),
    "leakage": ("Evaluator", "encoding", "mask_probe", "retrained", "train_evaluator"),
    "pixels": ("train_pixel_evaluator",),
    "localisation": ("grid_pointing", "localise", "mosaic"),
    "metric": ("Metric",),
    "ranking": ("places", "top_cells"),
    "several": ("SeveralLabels", "decided", "scorer"),
    "size": ("size_summary",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bla.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bla.metrics.{_HOMES[name]}"), name)


def __dir__() -> list[str]:  # the site describes these names
    return sorted([*globals(), *_HOMES])
