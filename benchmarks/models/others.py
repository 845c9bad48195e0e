"""Somebody else's classifiers: MobileNetV2 by timm, with weights from the folder that $BLA_MODELS names.

For `--model benchmarks.models.others:imagenet`, which `bla train` and `own_prediction` take.
"""

from __future__ import annotations

import os
from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import nn


def imagenet() -> nn.Module:
    """A thousand classes, from `mobilenetv2_imagenet.safetensors`."""
    return _mobilenet("imagenet")


def birds965() -> nn.Module:
    """965 species, from `mobilenetv2_birds965.safetensors`."""
    return _mobilenet("birds965")


def _mobilenet(name: str) -> nn.Module:
    state = load_file(Path(os.environ["BLA_MODELS"], f"mobilenetv2_{name}.safetensors"))
    model = timm.create_model("mobilenetv2_100", pad_type="same", num_classes=len(state["classifier.bias"]))
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    half = (0.5, 0.5, 0.5)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "mean": half, "std": half}
    return model.eval()
