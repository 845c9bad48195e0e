"""Image classifiers of Hugging Face transformers, at random weights, with their processors. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bla
from bla.data.photo import Transform
from bla.model.classifier import ClassifierError
from bla.model.preprocessing import transform_of_code
from bla.progress import silent

transformers = pytest.importorskip("transformers")

CLASSES = {0: "ant", 1: "bee", 2: "cicada"}
NAMED = {"id2label": CLASSES, "label2id": {name: index for index, name in CLASSES.items()}}
CONVOLUTIONS = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], **NAMED}
TOKENS = {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **NAMED}
SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, **NAMED}
MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "resnet": (
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, layer_type="basic", **CONVOLUTIONS)
        ),
        (2, 2),
    ),
    "convnext": (
        lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**CONVOLUTIONS)),
        (2, 2),
    ),
    "swin": (lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)), (8, 8)),
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TOKENS)), (4, 4)),
    "beit": (lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**TOKENS)), (4, 4)),
    "dinov2": (
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(patch_size=16, **TOKENS)),
        (4, 4),
    ),
    "dinov2 with registers": (
        lambda: transformers.Dinov2WithRegistersForImageClassification(
            transformers.Dinov2WithRegistersConfig(patch_size=16, **TOKENS)
        ),
        (4, 4),
    ),
    "clip": (
        lambda: transformers.CLIPForImageClassification(
            transformers.CLIPConfig(vision_config={**TOKENS, "patch_size": 16, "intermediate_size": 64}, **NAMED)
        ),
        (4, 4),
    ),
}


def processor(**settings: object) -> object:
    return transformers.ViTImageProcessor(size={"height": 64, "width": 64}, **settings)


@pytest.mark.parametrize(("make", "grid"), MAKERS.values(), ids=MAKERS)
def test_a_transformers_classifier_is_wrapped_in_one_line(
    make: Callable[[], nn.Module], grid: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    nn.init.normal_(last.weight)
    wrapped = bla.explainable(model, transform=processor())
    assert (wrapped.classes, wrapped.name) == (tuple(CLASSES.values()), type(model).__name__)
    pixels = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        features = wrapped.trunk(pixels)
        assert features.shape[2:] == grid
        logits = wrapped.classify(features, torch.ones(3, *grid) / np.prod(grid))
        torch.testing.assert_close(logits, model(pixels).logits, rtol=1e-4, atol=1e-4)
    assert wrapped.select(pixels[:1]).hard.shape == (1, *grid)  # one image too


def test_a_transformers_classifier_is_fitted_and_explains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapped = bla.explainable(MAKERS["vit"][0](), transform=processor())
    photos = [np.random.default_rng(index).integers(0, 255, (60, 80, 3), np.uint8) for index in range(10)]
    assert bla.fit(wrapped, photos, epochs=1, cache=tmp_path, report=silent)["images"] == 2
    explanation = wrapped.explain(photos[0])[0]
    assert (explanation.grid, explanation.model) == ((4, 4), "ViTForImageClassification")
    assert explanation.prediction.label in CLASSES.values()


def test_a_processor_gives_the_pixels_that_it_gives_itself() -> None:
    photo = np.random.default_rng(0).integers(
        0, 255, (64, 64, 3), np.uint8
    )  # as large as asked for: nothing is resized
    own = transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)
    )
    wrapped = bla.explainable(
        nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()), transform=own
    )
    expected = own(photo, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(wrapped.pixels(wrapped.transform.read(photo).pixels[None]), expected, rtol=0, atol=1e-5)


def test_transforms_of_processors() -> None:
    large = transformers.ConvNextImageProcessor(size={"shortest_edge": 384}, resample=3)
    with pytest.warns(UserWarning, match="takes its place"):
        mobile = transform_of_code(transformers.MobileNetV2ImageProcessor()).plain()
    with pytest.warns(UserWarning, match="takes its place"):
        convnext = transform_of_code(large).plain()
    half, source = (0.5, 0.5, 0.5), "MobileNetV2ImageProcessor, nearly"
    assert mobile == Transform((224, 224), half, half, "bilinear", "crop", 224 / 256, source)
    assert (convnext.size, convnext.interpolation, convnext.mode) == ((384, 384), "bicubic", "squash")
    with pytest.raises(ClassifierError, match=r"expected a bla.Transform, or code .*, got int"):
        bla.explainable(MAKERS["resnet"][0](), transform=3)
