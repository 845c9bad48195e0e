"""Which image classifiers of Hugging Face transformers can be wrapped: tiny ones at random weights.

    python -m benchmarks.models.hugging_face [NAME ...]

With no other argument than the preprocessing. Prints a line for each, and how many wrap.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.models.wrapped import lively
from bla.data.photo import Transform
from bla.model.classifier import ClassifierError, explainable
from bla.model.evidence import from_all

SIZE = 64
HALF = (0.5, 0.5, 0.5)
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
HEADS = {"num_attention_heads": [1, 1, 2, 2]}
TOKENS = {"image_size": SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WINDOWS = {"image_size": SIZE, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
TOWER = {"vision_config": {**TOKENS, "patch_size": 16, "intermediate_size": 64}}
LEVIT = {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
NECK = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 64], "num_attention_heads": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "Beit": TOKENS,
    "CLIP": TOWER,
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "Data2VecVision": TOKENS,
    "DeiT": TOKENS,
    "Dinov2": {**TOKENS, "patch_size": 16},
    "Dinov2WithRegisters": {**TOKENS, "patch_size": 16},
    "EfficientNet": {"image_size": SIZE, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "FocalNet": {**STAGES, "image_size": SIZE, "embed_dim": 8},
    "HGNetV2": {},
    "Hiera": {"image_size": [SIZE, SIZE], "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4],
              "mask_unit_size": [4, 4], "num_query_pool": 2},
    "IJepa": TOKENS,
    "Levit": {"image_size": 2 * SIZE, **LEVIT},
    "MetaClip2": TOWER,
    "MobileNetV1": {"image_size": SIZE, "depth_multiplier": 0.25},
    "MobileNetV2": {"image_size": SIZE, "depth_multiplier": 0.25},
    "MobileViT": {"image_size": SIZE, **NECK},
    "MobileViTV2": {"image_size": SIZE, "width_multiplier": 0.25},
    "PoolFormer": STAGES,
    "Pvt": {**STAGES, **HEADS, "image_size": SIZE},
    "PvtV2": {**STAGES, **HEADS, "image_size": SIZE},
    "RegNet": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "ResNet": {**STAGES, "embedding_size": 8, "layer_type": "basic"},
    "Segformer": {**STAGES, **HEADS},
    "Siglip": TOWER,
    "Siglip2": {"vision_config": {**TOKENS, "patch_size": 16, "num_patches": 16, "intermediate_size": 64}},
    "SwiftFormer": {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 16, 32]},
    "Swin": WINDOWS,
    "Swinv2": WINDOWS,
    "TextNet": {},
    "ViT": TOKENS,
    "ViTMSN": TOKENS,
}  # fmt: skip


def tried(name: str) -> str:
    """How a classifier of this name is wrapped, and how far its logits then are from its own; or why it is refused."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=4, **SETTINGS[name])
    model: nn.Module = lively(getattr(transformers, f"{name}ForImageClassification")(config))
    side = 224 if name in ("HGNetV2", "TextNet", "SwiftFormer") else 2 * SIZE if name == "Levit" else SIZE
    pixels = torch.randn(4, 3, side, side)
    for norm in [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
        norm.momentum = 1.0  # one batch seen, without which activations vanish
    try:
        with torch.no_grad():
            model.train()(pixels)
        wrapped = explainable(model.eval(), transform=Transform((side, side), HALF, HALF))
        with torch.no_grad():
            expected = model(pixels).logits
            miss = (from_all(wrapped.head, wrapped.trunk(pixels)) - expected).abs().max() / expected.abs().max()
    except (ClassifierError, RuntimeError) as error:
        return f"refused: {error}"
    grid = "x".join(map(str, wrapped.select(pixels[:1]).hard.shape[1:]))
    return f"wrapped: {grid} cells, logits differ by {miss:.0e} of the largest {wrapped.note}".strip()


def main() -> None:
    """Print a line for each, and how many wrap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"by default all: {', '.join(SETTINGS)}")
    names = parser.parse_args().names or list(SETTINGS)
    warnings.simplefilter("ignore")  # of the library, about models of its own
    wrapped = 0
    for name in names:
        found = tried(name)
        wrapped += found.startswith("wrapped")
        print(f"{name}: {found}", flush=True)
    print(f"{wrapped} of {len(names)} wrap", file=sys.stderr)


if __name__ == "__main__":
    main()
