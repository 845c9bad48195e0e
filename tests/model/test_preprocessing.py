"""The classifier's own preprocessing: the pixels of timm's, torchvision's and transformers' pipelines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms._presets import ImageClassification

import bla
from bla.data.photo import Transform
from bla.model.classifier import ClassifierError
from bla.model.preprocessing import transform_of, transform_of_processor

HALF = (0.5, 0.5, 0.5)
SHAPES = [(300, 231), (187, 400), (30, 41), (5, 3), (90, 90), (40, 400)]  # rows, columns


def noise(rows: int, columns: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(rows).randint(0, 256, (rows, columns, 3), np.uint8))


def timms(**config: Any) -> nn.Module:
    """A small model of timm with another configuration; its input stays tiny."""
    return timm.create_model("resnet10t", pretrained_cfg_overlay={"mean": HALF, "std": HALF, **config})


def levels(pixels: torch.Tensor, transform: Transform) -> np.ndarray[Any, Any]:
    """Normalised pixels (3, H, W) as levels (H, W, 3)."""
    back = pixels.double().permute(1, 2, 0).numpy() * transform.std + transform.mean
    return np.rint(255 * back)


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 64, 64), "crop_pct": 0.875},
        {"input_size": (3, 64, 64), "crop_pct": 0.89, "interpolation": "bilinear"},
        {"input_size": (3, 64, 96), "crop_pct": 0.9},
        {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "squash"},
        {"input_size": (3, 64, 96), "crop_pct": 0.9, "crop_mode": "squash"},
    ],
    ids=["centre", "bilinear", "oblong", "squash", "squash and crop"],
)
def test_the_pixels_are_timms(config: dict[str, Any], tmp_path: Path) -> None:
    model = timms(**config)
    transform, theirs = transform_of(model), create_transform(**resolve_model_data_config(model), is_training=False)
    for rows, columns in SHAPES:
        photo = noise(rows, columns)
        photo.save(tmp_path / "photo.png")
        assert np.array_equal(transform.read(tmp_path / "photo.png").pixels, levels(theirs(photo), transform))


def test_a_pipeline_that_pads_is_refused_unless_another_is_named() -> None:
    model = timms(crop_mode="border")
    with pytest.raises(ClassifierError, match=r"resnet10t: expected .*, got border, which pads"):
        bla.explainable(model)
    assert transform_of(model, "squash").mode == "squash"
    assert bla.explainable(model, transform=Transform((64, 64), HALF, HALF)).transform.mode == "squash"


def test_another_mode_keeps_the_rest() -> None:
    own = transform_of(timms(crop_pct=0.95))
    assert transform_of(timms(crop_pct=0.95), "squash") == dataclasses.replace(own, mode="squash")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        # resnet18 has one set of weights, resnet50's default ones are the second; 10 classes have none
        ("resnet18", (256, "torchvision's ResNet18_Weights.IMAGENET1K_V1")),
        ("resnet50", (232, "torchvision's ResNet50_Weights.IMAGENET1K_V2")),
        (10, (256, "torchvision")),
    ],
)
def test_torchvisions_models_have_the_preset_of_their_weights(model: str | int, said: tuple[int, str]) -> None:
    with torch.device("meta"):
        named = {"name": model} if isinstance(model, str) else {"name": "resnet18", "num_classes": model}
        made = torchvision.models.get_model(**named)
    short, source = said
    words = f"preprocessing: short side to {short} (bilinear), centre crop 224 x 224, from {source}"
    assert transform_of(made).in_words() == words


def test_a_preset_is_a_transform() -> None:
    for crop, short in ((224, 232), (64, 73), (61, 61)):
        preset = ImageClassification(crop_size=crop, resize_size=short, mean=HALF, std=HALF)
        transform = transform_of_processor(preset)
        for rows, columns in SHAPES:
            photo = noise(rows, columns)
            assert np.array_equal(transform.pixels(photo), levels(preset(photo), transform))
    model = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert bla.explainable(model, transform=preset).transform.source == "torchvision"


@pytest.mark.parametrize(
    ("name", "options", "mode"),
    [
        ("ViT", {"size": {"height": 64, "width": 96}}, "squash"),
        ("MobileNetV2", {"size": {"shortest_edge": 80}, "crop_size": {"height": 72, "width": 72}}, "crop"),
        ("ConvNext", {"size": {"shortest_edge": 56}}, "crop"),
        ("ConvNext", {"size": {"shortest_edge": 384}}, "squash"),
        ("PoolFormer", {"size": {"shortest_edge": 72}, "crop_size": {"height": 72, "width": 72}}, "crop"),
        ("DeiT", {}, "squash-crop"),
        ("EfficientNet", {"size": {"height": 64, "width": 64}}, "squash"),
    ],
)
def test_processors_crop_as_they_say(name: str, options: dict[str, Any], mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{name}ImageProcessor")(**options)
    transform = transform_of_processor(processor)
    assert (transform.mode, transform.source) == (mode, "transformers")
    photo = noise(20, 40).resize((400, 200))
    theirs = torch.as_tensor(processor(images=photo, return_tensors="np")["pixel_values"][0])
    assert np.abs(levels(theirs, transform) - transform.pixels(photo)).mean() < 0.5


def test_a_processor_that_does_more_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ClassifierError, match=r"normalises alone, got LevitImageProcessor, .*pass transform=bla"):
        transform_of_processor(transformers.LevitImageProcessor())
    with pytest.raises(ClassifierError, match=r"MobileViTImageProcessor \(DataError: expected 0.01 <= crop_fraction"):
        transform_of_processor(transformers.MobileViTImageProcessor())


def test_what_is_used_is_said_in_one_line() -> None:
    squash = Transform((224, 260), HALF, HALF)
    assert squash.in_words() == "preprocessing: whole photo squashed to 260 x 224 (bicubic)"
    assumed = transform_of(nn.Flatten()).in_words()
    assert assumed.endswith("squashed to 224 x 224 (bilinear), assumed: the classifier states none")
    oblong = Transform((70, 140), HALF, HALF, mode="crop", source="timm")
    assert oblong.in_words().endswith("resized to cover 160 x 80 (bicubic), centre crop 140 x 70, from timm")
    both = dataclasses.replace(oblong, mode="squash-crop").in_words()
    assert both == "preprocessing: whole photo squashed to 160 x 80 (bicubic), centre crop 140 x 70, from timm"
