"""Bounded logit attention: image classifiers that show what they looked at.

The names load on first use, so that ``import bla`` loads no torch; ``__init__.pyi`` gives them to type checkers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_HOMES = {
    "BoundedLogitAttention": "model.attention",
    "Explanation": "explanations.explanation",
    "Transform": "data.photo",
    "compare": "comparison.side_by_side",
    "explainable": "model.classifier",
    "fit": "runs.run",
    "from_pretrained": "runs.hub",
    "gallery": "explanations.explanation",
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


def meant(name: str, names: Iterable[str]) -> str:
    """What to add to an error about an unknown name: the shortest that hold it, else the nearest, or nothing.

    >>> meant("tabby", ["tabby cat", "tiger cat", "hen"]), meant("hem", ["cock", "hen"]), meant("x", ["hen"])
    ("; did you mean 'tabby cat'?", "; did you mean 'hen'?", '')
    >>> meant("gradcam", ["random", "grad-cam++", "grad-cam"])
    "; did you mean 'grad-cam' or 'grad-cam++'?"
    """
    import difflib

    def folded(text: str) -> str:
        return "".join(filter(str.isalnum, text.casefold()))

    asked, listed = folded(name), sorted(names, key=len)
    near = [each for each in listed if asked in folded(each)]
    if not near:
        known = {folded(each): each for each in reversed(listed)}
        near = [known[each] for each in difflib.get_close_matches(asked, known)]
    best = " or ".join(map(repr, near[:3]))
    return f"; did you mean {best}?" if asked and best else ""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("bounded-logit-attention")
    if name in _MODULES:
        return importlib.import_module(f"bla.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bla' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bla.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
