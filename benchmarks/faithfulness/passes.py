"""Many passes of a classifier, as fast as this machine can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bla.comparison.methods import PooledClassifier
from bla.model.compiled import compiled

Network = Callable[[Tensor], Tensor]
"""Normalised pixels (B, 3, h, w) to logits (B, K)."""


def fastest(pooled: PooledClassifier, example: Tensor) -> Network:
    """The classifier in ONNX Runtime where it is installed and gives the same logits to a thousandth; else in torch."""

    def in_torch(pixels: Tensor) -> Tensor:
        logits: Tensor = pooled(pixels.contiguous(memory_format=torch.channels_last))
        return logits

    if example.is_cuda:
        return in_torch
    return (
        compiled(nn.Sequential(pooled.trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), pooled.head).eval(), example)
        or in_torch
    )
