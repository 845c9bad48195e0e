"""Work on a network that leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Restore a network after the block: modes, gradients, which parameters require them, hooks.

    Inside, no parameter requires a gradient, so that none is accumulated.
    """
    modes = {module: module.training for module in network.modules()}
    hooks = [hooks for module in modes for hooks in (module._forward_hooks, module._backward_hooks)]
    before = [dict(registered) for registered in hooks]
    parameters = [(value, value.requires_grad, value.grad) for value in network.parameters()]
    try:
        network.eval().requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for value, required, gradient in parameters:
            value.requires_grad_(required)
            value.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        for registered, known in zip(hooks, before, strict=True):
            for key in [key for key in registered if key not in known]:
                del registered[key]
