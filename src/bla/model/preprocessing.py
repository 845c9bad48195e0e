"""What a classifier says about itself: preprocessing, class names, its name."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from bla.data.photo import DataError, Interpolation, Mode, Transform
from bla.model.splitting import ClassifierError, speaks_timm

_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which image processors use."""


def transform_of(model: nn.Module, mode: Mode | None = None) -> Transform:
    """The preprocessing that a classifier was trained with, where it says so; ImageNet's at 224 x 224 otherwise.

    timm's classifiers state it. torchvision's are known by the number of their parameters; of several weights with as
    many, the default ones count. A classifier of yours says so by an attribute ``transform`` that holds a
    :class:`bla.data.photo.Transform`. ``mode`` replaces the classifier's own. A ClassifierError says that the
    classifier pads its photos, which no mode does.
    """
    own = getattr(model, "transform", None)
    if isinstance(own, Transform):
        transform = own
    elif speaks_timm(model):
        transform = _of_timm(model, mode)
    elif type(model).__module__.startswith("torchvision.models."):
        transform = _of_torchvision(model)
    else:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
        transform = Transform(size=(224, 224), mean=mean, std=std, interpolation="bilinear", source="assumed")
    return transform if mode is None else dataclasses.replace(transform, mode=mode)


def _of_timm(model: nn.Module, mode: Mode | None) -> Transform:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    fraction = config["crop_pct"]
    modes: dict[str, Mode] = {"center": "crop", "squash": "squash" if fraction == 1 else "squash-crop"}
    if mode is None and config["crop_mode"] not in modes:
        raise ClassifierError(
            f"{name_of(model)}: expected timm's crop_mode center or squash, got {config['crop_mode']}, which pads the "
            "photo: pass transform=bla.Transform(...), or train with mode='squash'"
        )
    return Transform(
        size=tuple(config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        mode=mode or modes[config["crop_mode"]],
        crop_fraction=fraction,
        source="timm",
    )


def _of_torchvision(model: nn.Module) -> Transform:
    """The preset of the weights with as many parameters, the architecture's default ones first."""
    from torchvision.models import WeightsEnum
    from torchvision.transforms._presets import ImageClassification

    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = vars(sys.modules[type(model).__module__]).values()
    kinds: list[Any] = [kind for kind in known if isinstance(kind, type) and issubclass(kind, WeightsEnum)]
    for kind in kinds:
        for weights in sorted(kind, key=lambda each: each is not kind.DEFAULT):
            preset = weights.transforms()
            if weights.meta.get("num_params") == parameters and isinstance(preset, ImageClassification):
                return _of_preset(preset, f"torchvision's {weights}")
    return _of_preset(ImageClassification(crop_size=224))


def _of_preset(preset: Any, source: str = "torchvision") -> Transform:
    (crop,), (short,) = preset.crop_size, preset.resize_size
    return Transform(
        size=(crop, crop),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        mode="crop",
        crop_fraction=_fraction(crop, short),
        source=source,
    )


def _fraction(side: int, whole: int) -> float:
    """The crop fraction by which ``floor(side / fraction)`` is ``whole``."""
    fraction = side / whole
    return fraction if math.floor(side / fraction) == whole else math.nextafter(fraction, 0)


def transform_of_processor(processor: Any) -> Transform:
    """The preprocessing of an image processor of Hugging Face transformers, or of a preset of torchvision's weights.

    A ClassifierError says that a processor does to photos what no :class:`bla.data.photo.Transform` does.
    """
    if type(processor).__module__ == "torchvision.transforms._presets" and hasattr(processor, "crop_size"):
        return _of_preset(processor)
    try:
        settings = processor.to_dict()
        size, share = settings["size"], settings.get("crop_pct") or 1.0
        crop = settings.get("crop_size") if settings.get("do_center_crop") else None
        short = size.get("shortest_edge")
        whole = int(short / share) if short else min(size["height"], size["width"])
        mode: Mode = "crop" if short else "squash-crop"
        if crop:
            height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        elif short and short < 384:  # ConvNeXt's crops up to here
            height, width = short, short
        else:
            height, width = (short, short) if short else (size["height"], size["width"])
            mode, whole = "squash", min(height, width)
        plain = settings.get("do_normalize", True)
        power = 2 if settings.get("include_top") else 1  # EfficientNet's divides by std once more then
        transform = Transform(
            size=(height, width),
            mean=tuple(settings["image_mean"]) if plain else (0.0, 0.0, 0.0),
            std=tuple(each**power for each in settings["image_std"]) if plain else (1.0, 1.0, 1.0),
            interpolation=_RESAMPLING[int(settings.get("resample", 2))],
            mode=mode,
            crop_fraction=_fraction(min(height, width), whole),
            source="transformers",
        )
    except (AttributeError, DataError, KeyError, TypeError) as error:
        raise ClassifierError(
            "expected a bla.Transform, an image processor of transformers or a preset of torchvision's weights, got "
            f"{type(processor).__name__} ({type(error).__name__}: {error})"
        ) from error
    _check_alike(processor, transform)
    return transform


def _check_alike(processor: Any, transform: Transform) -> None:
    """Refuse a processor that does more than its settings say: a wide and a tall photo of two ramps tell."""
    pixel = 255 / min(transform.size)  # their crop may begin one beside ours
    for columns, rows in ((450, 300), (300, 450)):
        across, down = np.meshgrid(np.linspace(0, 255, columns), np.linspace(0, 255, rows))
        photo = Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
        theirs = np.asarray(processor(images=photo, return_tensors="np")["pixel_values"][0])
        levels = theirs.transpose(1, 2, 0) * np.array(transform.std) + np.array(transform.mean)
        seen = transform.pixels(photo)
        if levels.shape != seen.shape or np.abs(255 * levels - seen).mean() > 1 + 1.5 * pixel:
            raise ClassifierError(
                f"expected a processor that resizes, crops and normalises alone, got {type(processor).__name__}, which "
                f"does not do as '{transform.in_words()}': pass transform=bla.Transform(...)"
            )


def classes_of(model: nn.Module, outputs: int) -> list[str]:
    """The classes' names: those of a transformers model, ImageNet's, or "class 0", ...

    ImageNet's are those of 1,000 classes of a model of timm's or torchvision's, or of a module that consists of one.
    A transformers model that only numbers its classes, or has two of one name, counts as having none.
    """
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(labels, dict) and sorted(labels) == list(range(outputs)):
        names = [str(labels[index]) for index in range(outputs)]
        if len({*names}) == outputs and names[0] != "LABEL_0":
            return names
    if outputs == 1000 and any(map(_has_imagenets_classes, model.modules())):
        return imagenet_classes()
    return [f"class {index}" for index in range(outputs)]


def _has_imagenets_classes(model: nn.Module) -> bool:
    if speaks_timm(model):
        return getattr(model, "num_classes", None) == 1000
    if not type(model).__module__.startswith("torchvision.models."):
        return False
    widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    widths += [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    return 1000 in (widths[-1:] if isinstance(model, nn.Linear) else widths)


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1,000 classes: the first synonym, with the synset where two share it."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = [info.index_to_description(index).split(",")[0] for index in range(1000)]
    # two are cranes, and two are maillots
    return [
        name if names.count(name) == 1 else f"{name} ({info.index_to_label_name(index)})"
        for index, name in enumerate(names)
    ]


def name_of(model: nn.Module) -> str:
    """A timm model's architecture, the name that transformers loaded a model by, or the class's."""
    config = getattr(model, "pretrained_cfg", None)
    loaded_by = getattr(getattr(model, "config", None), "name_or_path", None)
    return (config or {}).get("architecture") or (isinstance(loaded_by, str) and loaded_by) or type(model).__name__
