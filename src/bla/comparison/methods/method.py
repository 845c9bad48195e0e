"""A method: whatever turns a batch of photos into a map for each; and the classifier that methods explain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bla import BlaError
from bla.model.heads import reads_maps
from bla.model.whole import Whole

RUN = "bla"
"""The name of the run's own method in results, whatever its setup."""

Explains = Literal["baseline", "own", "nothing"]
"""Which classifier a method's map explains: the mean-pooled one, the one with the method's own head, or none."""


class ComparisonError(BlaError):
    """A method that is not known, or cannot explain this classifier."""


class PooledClassifier(Whole):
    """A classifier whose head reads the mean over the cells of its trunk's map."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__(trunk, head)
        if reads_maps(head):
            raise ComparisonError(
                "expected a head that reads pooled features, as the methods compared do, got one that reads maps "
                "(VGG's, or that of a class token): train with head='new' to compare"
            )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What a method sees of some images.

    Attributes
    ----------
    features: (B, C, H, W), the last map.
    targets: (B,) the class to explain in each image.
    rows: (B,) the images' places in the set, for controls that are random or borrow another image's map.
    pixels: (B, 3, h, w), normalised; None for methods that need only features.
    """

    features: Tensor
    targets: Tensor
    rows: Tensor
    pixels: Tensor | None = None

    def __post_init__(self) -> None:
        parts = (self.features, self.targets, self.rows, *([] if self.pixels is None else [self.pixels]))
        if len(lengths := {len(part) for part in parts}) != 1:
            raise ComparisonError(f"expected a target, a row and features for each image, got {sorted(lengths)}")

    def seen(self) -> Tensor:
        """The pixels, for a method that needs them."""
        if self.pixels is None:
            raise ComparisonError("expected pixels for a method that runs the whole network, got features alone")
        return self.pixels


class Cells(NamedTuple):
    """A method's explanation of a batch, each (B, H, W), as in an Explanation; ``weights`` are what its head reads."""

    unbounded: Tensor
    scores: Tensor
    soft: Tensor | None
    selected: Tensor
    weights: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A way to explain: the callable that makes the maps, and what a comparison must know about it.

    Attributes
    ----------
    name: the key in results.
    title: for people.
    explains: which classifier the map explains.
    class_specific: whether the map depends on the target class.
    maps: a batch to maps (B, H, W), larger is more relevant.
    note: what a reader must know: a library and its version, a cap, how it was trained.
    needs_pixels: whether it runs the whole network, and not only what follows the feature map.
    reads_photo: whether the map is computed from the photo that it explains.
    head: the head that reads its selection, pooled features (B, C) to logits; None: the baseline's.
    select: a batch to the cells that the method selects by itself; None: it only ranks them.
    """

    name: str
    title: str
    explains: Explains
    class_specific: bool
    maps: Callable[[Batch], Tensor]
    note: str = ""
    needs_pixels: bool = False
    reads_photo: bool = True
    head: nn.Module | None = None
    select: Callable[[Batch], Cells] | None = None

    def on_pixels(self, batch: Batch, trunk: nn.Module) -> Callable[[Tensor], Tensor]:
        """Pixels to maps, for the targets of a batch of photos, also for several copies of each photo in place."""

        def maps(pixels: Tensor) -> Tensor:
            copies = len(pixels) // len(batch.rows)
            with torch.no_grad():
                features = trunk(pixels)
            rows, targets = (values.repeat_interleave(copies) for values in (batch.rows, batch.targets))
            return self.maps(Batch(features, targets, rows, pixels)).float()

        return maps
