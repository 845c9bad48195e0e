"""What is measured: callables, tensors and explanations in, figures out; the same code for every method.

The names load on first use, so that :mod:`bla.metrics.statistics` loads no torch; ``__init__.pyi`` gives them to type
checkers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Accuracy": "accuracy",
    "Curve": "judging",
    "Evaluator": "leakage",
    "Metric": "metric",
    "Ranked": "judging",
    "SeveralLabels": "several",
    "decided": "several",
    "is_affine": "cells",
    "judge_methods": "judging",
    "localise": "localisation",
    "mask_probe": "leakage",
    "places": "ranking",
    "read_cells": "cells",
    "retrained": "leakage",
    "scorer": "several",
    "size_summary": "size",
    "top_cells": "ranking",
    "train_evaluator": "leakage",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bla.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bla.metrics.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
