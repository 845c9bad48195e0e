"""NaN and infinity are named at their source."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bla.model.finite import unfinite


def spoilt(name: str, value: float = math.nan) -> Callable[[nn.Module, Tensor], None]:
    def spoil(network: nn.Module, _: Tensor) -> None:
        network.state_dict()[name].view(-1)[0] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda _, pixels: pixels[0, 0, 0].fill_(math.inf), "NaN or infinity in its pixels: replace them"),
        (spoilt("0.weight"), "NaN or infinity in 0.weight (1 of 12 numbers): load finite weights"),
        (spoilt("1.running_var", math.inf), "NaN or infinity in 1.running_var (1 of 4 numbers): load finite weights"),
        (spoilt("1.running_var", -4.0), "NaN or infinity from 1 (BatchNorm2d, in torch.float32): pass the transform"),
        (lambda network, _: network[0].weight.fill_(3e38), "NaN or infinity from 0 (Conv2d, in torch.float32): pass"),
    ],
    ids=["pixels", "weight", "statistics", "impossible statistics", "overflow"],
)
@torch.no_grad()
def test_the_source_is_named(spoil: Callable[[nn.Module, Tensor], None], said: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(24, 2)).eval()
    pixels = 2 + torch.rand(1, 3, 2, 3)
    spoil(network, pixels)
    assert unfinite(network, pixels, network).startswith(said)
    assert not any(module._forward_hooks for module in network.modules())
