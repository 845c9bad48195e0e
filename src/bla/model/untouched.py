"""Work on a network, or on a copy of it, that leaves it as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
"""Kinds of hooks that a module has."""


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Restore a network after the block: modes, gradients, which parameters require them, hooks.

    Inside, no parameter requires a gradient, so that none is accumulated.
    """
    modes = {module: module.training for module in network.modules()}
    kinds = [f"_{kind}_hooks" for kind in HOOKS]
    hooks = [getattr(module, kind) for module in modes for kind in kinds]
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


@contextmanager
def seeing(modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, Any], None]) -> Iterator[None]:
    """Call ``see`` with the name and the output of each of these modules that runs in the block."""
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: see(name, output))
        for name, module in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def copied(model: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode, without the user's hooks; torch's own hooks compute weights and stay."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    kept = pytree.tree_leaves([vars(module) for module in modules])
    computed = [value for value in kept if isinstance(value, Tensor) and not value.is_leaf]  # activations that it keeps
    try:
        with torch.no_grad():  # under which copies of TorchScript's parameters are parameters
            own = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception:  # locks, open files, a trainer
        own = cast(nn.Module, _twin(model, {}))
    for parameter in own.parameters():
        parameter.requires_grad_(False)
    for module in own.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        module._compiled_call_impl = None
        for name, child in module._modules.items():
            module._modules[name] = getattr(child, "_orig_mod", child)
        for kind in HOOKS:
            hooks = getattr(module, f"_{kind}_hooks")
            for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.")]:
                del hooks[key]
    return own.eval()


def _twin(value: Any, known: dict[int, Any]) -> Any:
    """A module with copies of all modules and tensors that it consists of, and its other attributes as they are."""
    if value is None or id(value) in known:
        return known.get(id(value))
    if isinstance(value, Tensor):
        known[id(value)] = twin = value.detach().clone()
        return nn.Parameter(twin, requires_grad=False) if isinstance(value, nn.Parameter) else twin
    known[id(value)] = twin = value.__class__.__new__(value.__class__)
    for name, own in vars(value).items():
        parts = name in ("_parameters", "_buffers", "_modules")
        made = {key: _twin(part, known) for key, part in own.items()} if parts else own
        vars(twin)[name] = copy.copy(made) if name.endswith("_hooks") else made
    return twin
