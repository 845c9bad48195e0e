"""The classifier that methods explain, and a method: whatever turns a batch of photos into a map for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from bla import BlaError
from bla.model.heads import reads_maps

Explains = Literal["baseline", "own", "nothing"]
"""The classifier that a method's map speaks of: the mean-pooled one, the method's own head, or none (a control)."""


class ComparisonError(BlaError):
    """A method that is not known, or cannot explain this classifier."""


class PooledClassifier(nn.Module):
    """The classifier without attention: logits = head(mean over the cells of trunk(pixels)).

    What follows ``cells`` (an identity on the feature map, where the libraries hook) can be run from features alone.

    Examples
    --------
    >>> net = PooledClassifier(nn.Conv2d(3, 4, 8, stride=8), nn.Linear(4, 2))
    >>> net(torch.rand(5, 3, 32, 16)).shape, net.on_features(torch.rand(5, 4, 4, 2)).shape
    (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        if reads_maps(head):
            raise ComparisonError(
                "expected a head that reads pooled features, as the methods compared do, got one that reads maps "
                "(VGG's, or that of a class token): train with head='new' to compare"
            )
        self.trunk = trunk
        self.cells = nn.Identity()
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of normalised pixels (B, 3, h, w)."""
        return self.on_features(self.trunk(pixels))

    def on_features(self, features: Tensor) -> Tensor:
        """Logits (B, K) of features (B, C, H, W)."""
        logits: Tensor = self.head(self.cells(features).mean(dim=(2, 3)))
        return logits


class OnFeatures(nn.Module):
    """The part of a :class:`PooledClassifier` after its trunk, as a module that the libraries can take."""

    def __init__(self, classifier: PooledClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K) of features (B, C, H, W)."""
        return self.classifier.on_features(features)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What a method may look at.

    Attributes
    ----------
    features: (B, C, H, W), the last map.
    targets: (B,) the class that each image is asked about.
    rows: (B,) the images' places in the set, for controls that are random or borrow another image's map.
    pixels: (B, 3, h, w), normalised; None where only features are at hand.
    """

    features: Tensor
    targets: Tensor
    rows: Tensor
    pixels: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.features), len(self.targets), len(self.rows)}
        lengths |= {len(self.pixels)} if self.pixels is not None else set()
        if len(lengths) != 1:
            raise ComparisonError(
                f"expected a target, a row and features for each image, got {sorted(lengths)} of them"
            )

    def seen(self) -> Tensor:
        """The pixels, for a method that needs them."""
        if self.pixels is None:
            raise ComparisonError("expected pixels for a method that runs the whole network, got features alone")
        return self.pixels


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Method:
    """What explains: a name, what its map speaks of, and the callable that makes the maps.

    Attributes
    ----------
    name: the key in results.
    title: for people.
    explains: which classifier the map speaks of.
    class_specific: whether the map depends on the class asked about.
    maps: a batch to maps (B, H, W), larger is more relevant.
    note: what a reader must know: a library and its version, a cap, how it was trained.
    needs_pixels: whether it runs the whole network, and not only what follows the feature map.
    head: the head that reads its selection, pooled features (B, C) to logits; None: the baseline's.
    sizes: a batch to the number of cells (B,) that the method chooses by itself; None: it chooses none.
    """

    name: str
    title: str
    explains: Explains
    class_specific: bool
    maps: Callable[[Batch], Tensor]
    note: str = ""
    needs_pixels: bool = False
    head: nn.Module | None = None
    sizes: Callable[[Batch], Tensor] | None = None


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Let a library work on a network, and give it back as it was: modes, gradients, what requires them, hooks.

    Inside, no parameter requires a gradient, so that none is accumulated.
    """
    modes = {module: module.training for module in network.modules()}
    hooks = {module: (dict(module._forward_hooks), dict(module._backward_hooks)) for module in network.modules()}
    parameters = [(value, value.requires_grad, value.grad) for value in network.parameters()]
    try:
        for value, _, _ in parameters:
            value.requires_grad_(False)
        network.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for value, required, gradient in parameters:
            value.requires_grad_(required)
            value.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        for module, (forward, backward) in hooks.items():
            for registered, before in ((module._forward_hooks, forward), (module._backward_hooks, backward)):
                for key in [key for key in registered if key not in before]:
                    del registered[key]
