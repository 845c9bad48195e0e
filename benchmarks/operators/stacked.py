"""Small networks of several seeds, trained at once: the leading dimension of every tensor is the seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


class StackedLinear:
    """A linear layer a seed: (S, B, in) to (S, B, out)."""

    def __init__(self, seeds: int, inner: int, outer: int, generator: torch.Generator) -> None:
        limit = math.sqrt(6 / (inner + outer))  # Glorot's, the papers' code's
        self.weight = (torch.rand(seeds, inner, outer, generator=generator) * 2 - 1).mul_(limit).requires_grad_()
        self.bias = torch.zeros(seeds, 1, outer).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class StackedBatchNorm:
    """Batch normalisation a seed."""

    def __init__(self, seeds: int, width: int) -> None:
        self.scale = torch.ones(seeds, width).requires_grad_()
        self.shift = torch.zeros(seeds, width).requires_grad_()
        self.mean, self.variance = torch.zeros(seeds, width), torch.ones(seeds, width)
        self.momentum = 0.01  # Keras' default, as is epsilon; the papers' code has both

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        # one seed after the other: torch's own layer is three times as fast as the same along a middle dimension
        each = zip(x, self.mean, self.variance, self.scale, self.shift, strict=True)
        normalised = [functional.batch_norm(*one, training=training, momentum=self.momentum, eps=1e-3) for one in each]
        return torch.stack(normalised)


class StackedMLP:
    """Fully connected layers with an activation between them, and batch normalisation if asked for."""

    def __init__(
        self, seeds: int, widths: list[int], generator: torch.Generator, activation: Activation, normalise: bool = False
    ) -> None:
        self.layers = [StackedLinear(seeds, inner, outer, generator) for inner, outer in itertools.pairwise(widths)]
        self.norms = [StackedBatchNorm(seeds, width) for width in widths[1:-1]] if normalise else []
        self.activation = activation

    def __call__(self, x: Tensor, training: bool = True) -> Tensor:
        for index, layer in enumerate(self.layers[:-1]):
            x = self.activation(layer(x))
            if self.norms:
                x = self.norms[index](x, training)
        return self.layers[-1](x)

    @torch.no_grad()
    def settle(self, batches: Iterable[Tensor]) -> None:
        """Put means over ``batches`` for the moving averages of batch normalisation, which lag behind the weights.

        Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.
        """
        for index, x in enumerate(batches):
            for norm in self.norms:
                norm.momentum = 1 / (index + 1)
            self(x)

    def kernels(self) -> Iterator[Tensor]:
        """What a penalty on weights is put on."""
        yield from (layer.weight for layer in self.layers)

    def parameters(self) -> Iterator[Tensor]:
        """All that is trained."""
        for layer in self.layers:
            yield from (layer.weight, layer.bias)
        for norm in self.norms:
            yield from (norm.scale, norm.shift)


def cross_entropy(logits: Tensor, probability: Tensor) -> Tensor:
    """Of class 1's probability (S, B), given one logit a sample (S, B): (S, B)."""
    return functional.binary_cross_entropy_with_logits(logits, probability, reduction="none")
