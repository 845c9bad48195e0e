"""Where NaN or infinity comes from, in words that name it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bla.model.untouched import seeing


def unfinite(network: nn.Module, pixels: Tensor, run: Callable[[Tensor], Any] | None = None) -> str:
    """Where the NaN or infinity of a network's answer comes from: its pixels (B, 3, h, w), a weight, or a layer.

    With ``run``, which calls the network, the layer is found.

    >>> layer = nn.Conv2d(3, 2, 1)
    >>> unfinite(layer, torch.full((1, 3, 4, 4), torch.nan))
    'NaN or infinity in its pixels: replace them'
    >>> _ = nn.init.constant_(layer.bias, torch.inf)
    >>> unfinite(layer, torch.rand(1, 3, 4, 4))
    'NaN or infinity in bias (2 of 2 numbers): load finite weights'
    """
    if not pixels.isfinite().all():
        return "NaN or infinity in its pixels: replace them"
    for name, value in itertools.chain(network.named_parameters(), network.named_buffers()):
        if value.is_floating_point() and (broken := int((~value.isfinite()).sum())):
            return f"NaN or infinity in {name} ({broken} of {value.numel()} numbers): load finite weights"
    remedy = "pass the transform it was trained with, or compute in float32"
    if run is None:
        return f"NaN or infinity made of finite weights and pixels: {remedy}"
    modules = {name: each for name, each in network.named_modules() if not isinstance(each, torch.jit.ScriptModule)}
    found: list[str] = []

    def see(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"{name or 'its last layer'} ({type(modules[name]).__name__}, in {output.dtype})")

    with seeing(modules.items(), see):
        run(pixels)
    return f"NaN or infinity{' from '.join(['', *found[:1]])}: {remedy}"
