"""Methods that a user hands in as they are: a function, or an object of captum or pytorch-grad-cam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bla.comparison.methods.libraries import on_cells
from bla.comparison.methods.method import Batch, ComparisonError, Method
from bla.model.untouched import untouched
from bla.model.whole import Whole


def given(what: Any, classifier: Whole, name: str) -> Method:
    """A method that is called for one photo at a time; see :func:`bla.compare` for what it may be."""
    answer = _asked(what, classifier)

    def maps(batch: Batch) -> Tensor:
        found = []
        for pixels, target in zip(batch.seen(), batch.targets.tolist(), strict=True):
            with untouched(classifier):
                raw = answer(pixels[None].clone().requires_grad_(), target)
            found.append(_flat(raw, name).to(batch.features.device))
        return on_cells(torch.stack(found), batch)

    return Method(name, name, "baseline", True, maps, "as it was given", needs_pixels=True)


def _asked(what: Any, classifier: Whole) -> Callable[[Tensor, int], Any]:
    if callable(getattr(what, "attribute", None)):  # captum
        return lambda pixels, target: what.attribute(pixels, target=target)
    if type(what).__module__.startswith("pytorch_grad_cam"):
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        return lambda pixels, target: what(input_tensor=pixels, targets=[ClassifierOutputTarget(target)])
    if callable(what):
        return lambda pixels, target: what(classifier, pixels, target)
    raise ComparisonError(
        "expected a method's name, a function (model, pixels, target) -> map, or an object of captum or "
        f"pytorch-grad-cam, got {type(what).__name__}"
    )


def _flat(raw: Any, name: str) -> Tensor:
    """A map (h, w), summed over colours or channels."""
    values = torch.as_tensor(raw).detach().float()
    while values.ndim > 2:
        values = values.sum(dim=0)
    if values.ndim != 2 or not values.isfinite().all():
        shape = tuple(torch.as_tensor(raw).shape)
        raise ComparisonError(f"{name}: expected a finite map (h, w) of one photo, got {shape}, or NaN or infinity")
    return values
