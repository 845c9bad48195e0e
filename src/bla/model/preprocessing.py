"""What a classifier says about itself: preprocessing, class names, its name."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import nn

from bla.data.photo import DataError, Mode, Transform
from bla.data.pipeline import fraction, understood
from bla.model.splitting import ClassifierError, first_convolution, speaks_timm


def transform_of(model: nn.Module, mode: Mode | None = None) -> Transform:
    """The preprocessing that a classifier was trained with, where it says so; ImageNet's at 224 x 224 otherwise.

    timm's classifiers state it. torchvision's are known by the number of their parameters; of several weights with as
    many, the default ones count. A classifier of yours says so by an attribute ``transform`` that holds a
    :class:`bla.data.photo.Transform`. ``mode`` replaces the classifier's own.
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
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    fraction = config["crop_pct"]
    modes: dict[str, Mode] = {"center": "crop", "squash": "squash" if fraction == 1 else "squash-crop"}
    if mode is None and config["crop_mode"] not in modes:  # it pads
        return dataclasses.replace(transform_of_code(create_transform(**config, is_training=False)), source="timm")
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
        crop_fraction=fraction(crop, short),
        source=source,
    )


def transform_of_code(code: Any, model: nn.Module | None = None) -> Transform:
    """The preprocessing that code does: torchvision's, timm's, albumentations', a processor of transformers, or yours.

    The model's first convolution tells how many channels and sides its input has. A ClassifierError says why the code
    is none of a classifier.
    """
    if not callable(code):
        raise ClassifierError(
            "expected a bla.Transform, or code that makes a classifier's input of a Pillow image or an array, got "
            f"{type(code).__name__}"
        )
    try:
        first = None if model is None else first_convolution(model)
        return understood(code) if first is None else understood(code, first.in_channels, first.weight.ndim - 2)
    except DataError as error:
        raise ClassifierError(str(error)) from error


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
