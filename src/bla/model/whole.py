"""The classifier that is explained, with no cell left out."""

from __future__ import annotations

from torch import Tensor, nn

from bla.model.evidence import from_all


class Whole(nn.Module):
    """Normalised pixels (B, 3, h, w) to logits (B, K): the head on all cells of the trunk's map alike.

    What follows ``cells``, an identity on that map and a layer to hook, can run on features alone.

    >>> import torch
    >>> net = Whole(nn.Conv2d(3, 4, 8, stride=8), nn.Linear(4, 2))
    >>> net(torch.rand(5, 3, 32, 16)).shape, net.on_features(torch.rand(5, 4, 4, 2)).shape
    (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.cells, self.head = trunk, nn.Identity(), head

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of normalised pixels (B, 3, h, w)."""
        return self.on_features(self.trunk(pixels))

    def on_features(self, features: Tensor) -> Tensor:
        """Logits (B, K) of features (B, C, H, W)."""
        return from_all(self.head, self.cells(features))
