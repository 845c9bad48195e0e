r"""Faithfulness on the feature map: what a head predicts from the mean of some cells, and from the mean of the others.

A head reads :math:`\frac{1}{m}\sum_{n \in S} F_n` for a set S of m cells. No trunk runs, so that ten thousand images
from a feature cache take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bla.metrics.fitting import Rows

Head = Callable[[Tensor], Tensor]
"""Pooled features (B, C) to logits (B, K)."""

Features = Tensor | Callable[[Rows], Tensor]
"""Features (N, C, H, W), or a callable from row numbers to those rows, such as a feature cache's ``batch``."""

SIZES = tuple(range(1, 13))
"""The sizes of the curve of accuracy against size."""


def batches(features: Features, count: int, size: int) -> Iterator[tuple[Rows, Tensor]]:
    """Row numbers and features of ``count`` images in order, ``size`` at a time."""
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        yield rows, rows_of(features, rows)


def rows_of(features: Features, rows: Rows) -> Tensor:
    """The features (B, C, H, W) of some rows."""
    return features[rows] if isinstance(features, Tensor) else features(rows)


def is_affine(head: Head, channels: int, like: Tensor) -> bool:
    """Whether head(a + b - c) = head(a) + head(b) - head(c) holds on random vectors, as it does for an affine head.

    >>> is_affine(torch.nn.Linear(4, 2), 4, torch.empty(0)), is_affine(torch.nn.ReLU(), 4, torch.empty(0))
    (True, False)
    """
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 16, channels, generator=generator).to(like)
    with torch.no_grad():
        whole, parts = head(a + b - c), head(a) + head(b) - head(c)
    return bool((whole - parts).abs().max() <= 1e-4 * whole.abs().max().clamp(min=1e-6))


@torch.no_grad()
def read_cells(head: Head, features: Tensor, masks: Tensor, *, affine: bool = False) -> Tensor:
    """The logits (B, M, K) of a head for the mean over each of M sets of cells; an empty set has the mean 0.

    Parameters
    ----------
    features: (B, C, H, W).
    masks: booleans (B, M, H, W).
    affine: the head is affine (:func:`is_affine`), so that it can read every cell once instead of every set.

    >>> masks = torch.tensor([[[[True, False]], [[True, True]]]])
    >>> read_cells(lambda pooled: pooled, torch.tensor([[[[2.0, 4.0]]]]), masks).tolist()
    [[[2.0], [3.0]]]
    """
    if masks.ndim != 4 or masks.shape[0] != features.shape[0] or masks.shape[2:] != features.shape[2:]:
        raise ValueError(
            f"expected masks of shape (batch, sets, height, width) for features {tuple(features.shape)}, got "
            f"{tuple(masks.shape)}"
        )
    cells = features.flatten(2).transpose(1, 2)
    weights = masks.flatten(2).to(features.dtype)
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1)
    if affine:
        nothing = head(torch.zeros_like(cells[:1, 0]))
        each = head(cells.reshape(-1, cells.shape[2])).reshape(*cells.shape[:2], -1) - nothing
        return torch.bmm(weights, each) + nothing
    pooled = torch.bmm(weights, cells)
    return head(pooled.flatten(0, 1)).reshape(*pooled.shape[:2], -1)


def judged(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether logits (B, M, K) predict the class (B,), and their loss; each (B, M). A tie goes to the first class."""
    wide = logits.double()
    own = labels[:, None, None].expand(-1, logits.shape[1], 1)
    loss = wide.logsumexp(dim=2) - wide.gather(2, own).squeeze(2)
    return logits.argmax(dim=2) == labels[:, None], loss


def probability(logits: Tensor, classes: Tensor) -> Tensor:
    """The probability (B, M) of each image's class (B,) by logits (B, M, K)."""
    own = classes[:, None, None].expand(-1, logits.shape[1], 1)
    return logits.double().softmax(dim=2).gather(2, own).squeeze(2)
