"""Bounded logit attention: image classifiers that show what they looked at.

The names load on first use, so that ``import bla`` loads no torch; ``__init__.pyi`` gives them to type checkers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HOMES = {
    "BoundedLogitAttention": "model.attention",
    "Explanation": "explanations.explanation",
    "Transform": "data.photo",
    "explainable": "model.classifier",
    "fit": "runs.run",
    "from_pretrained": "runs.hub",
    "load": "runs.run",
    "push_to_hub": "runs.hub",
    "save_pretrained": "runs.hub",
    "train": "runs.run",
}
_MODULES = {"photo": "data.photo"}
"""Modules that were public under an earlier path."""

__all__ = ["BlaError", *_HOMES]  # noqa: PLE0604


class BlaError(ValueError):
    """A mistake that the user can mend: it says what was expected, what came and the remedy."""


@contextmanager
def needs_extra(extra: str, error: type[BlaError] = BlaError) -> Iterator[None]:
    """Raise ``error`` with the command to run if an import in the block fails for want of an optional dependency."""
    try:
        yield
    except ImportError as missing:
        package = (missing.name or "").partition(".")[0]
        raise error(
            f"expected the package {package}, got none: pip install 'bounded-logit-attention[{extra}]'"
        ) from None


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"bla.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bla' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bla.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
