"""Bounded logit attention: image classifiers that show what they looked at.

The names load on first use, so that ``import bla`` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bla.attention import BoundedLogitAttention as BoundedLogitAttention
    from bla.classifier import explainable as explainable
    from bla.explanation import Explanation as Explanation
    from bla.hub import from_pretrained as from_pretrained
    from bla.hub import push_to_hub as push_to_hub
    from bla.hub import save_pretrained as save_pretrained
    from bla.run import fit as fit
    from bla.run import load as load
    from bla.run import train as train

_HOMES = {
    "BoundedLogitAttention": "attention",
    "Explanation": "explanation",
    "explainable": "classifier",
    "fit": "run",
    "from_pretrained": "hub",
    "load": "run",
    "push_to_hub": "hub",
    "save_pretrained": "hub",
    "train": "run",
}

__all__ = [
    "BoundedLogitAttention",
    "Explanation",
    "explainable",
    "fit",
    "from_pretrained",
    "load",
    "push_to_hub",
    "save_pretrained",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bla' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bla.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
