"""A tiny classifier of five classes on a grid of 4 x 5, to be exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import bla
from bla.data.photo import Transform
from bla.deploy.export import Exported
from bla.model.attention import Attention, BoundedLogitAttention
from bla.model.classifier import ExplainableClassifier

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


def wrapped(attention: Attention | None = None, transform: Transform | None = None) -> ExplainableClassifier:
    """The classifier, with an attention on 8 channels that counts as fitted."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=16, padding=4), nn.ReLU())
    net = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    transform = transform or Transform((64, 80), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear")
    attention = attention or BoundedLogitAttention(8)
    classifier = bla.explainable(net, attention=attention, transform=transform, classes=CLASSES)
    calibrate: Any = getattr(attention, "calibrate", lambda features: None)
    calibrate(classifier.trunk(torch.randn(4, 3, 64, 80)))
    classifier.fitted = True
    return classifier


Pair = tuple[ExplainableClassifier, Exported]
