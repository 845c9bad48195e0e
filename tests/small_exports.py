"""Tiny classifiers of five classes, to be exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import bla
from bla.data.photo import Transform
from bla.deploy.export import Exported
from bla.model.attention import Attention, BoundedLogitAttention
from bla.model.classifier import ExplainableClassifier

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


def averaging() -> nn.Module:
    """A linear head on the mean of the cells, 4 x 5 for a photo of 64 x 80."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=16, padding=4), nn.ReLU())
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def normalising() -> nn.Module:
    """A head on the mean of the cells that is not linear."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=16, padding=4), nn.ReLU())
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 5))


def deepening() -> nn.Module:
    """A linear head on 4 x 4 cells, before which there is a map of 8 x 8."""
    early = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.ReLU())
    late = nn.Sequential(nn.Conv2d(6, 8, 2, stride=2), nn.ReLU())
    return nn.Sequential(early, late, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def flattening() -> nn.Module:
    """A head that flattens its 4 x 4 cells, as VGG's does."""
    return nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def of_tokens() -> nn.Module:
    """A class token that reads 4 x 4 patch tokens."""
    tiny = {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **tiny)


def wrapped(
    attention: Attention | None = None,
    transform: Transform | None = None,
    network: Callable[[], nn.Module] = averaging,
) -> ExplainableClassifier:
    """A classifier of five classes, with an attention that counts as fitted."""
    torch.manual_seed(0)
    transform = transform or Transform((64, 80), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear")
    attention = attention or BoundedLogitAttention(8)
    classifier = bla.explainable(network(), attention=attention, transform=transform, classes=CLASSES)
    attention.calibrate(classifier.trunk(torch.randn(4, 3, *transform.size)))
    classifier.fitted = True
    return classifier


Pair = tuple[ExplainableClassifier, Exported]


def photos(rows: int, height: int = 64, width: int = 80, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3), np.uint8)
