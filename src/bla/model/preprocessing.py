"""What a classifier says about itself: preprocessing, class names, its name."""

from __future__ import annotations

from typing import Any

from torch import nn

from bla.data.photo import Interpolation, Transform
from bla.model.splitting import ClassifierError, speaks_timm

_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which image processors use."""


def transform_of(model: nn.Module) -> Transform:
    """The preprocessing that a classifier was trained with, where it says so; ImageNet's at 224 x 224 otherwise.

    A classifier of yours says so by an attribute ``transform`` that holds a :class:`bla.data.photo.Transform`.
    """
    own = getattr(model, "transform", None)
    if isinstance(own, Transform):
        return own
    if speaks_timm(model):
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        return Transform(
            size=tuple(config["input_size"][1:]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_fraction=config["crop_pct"],
            source="timm",
        )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return Transform(size=(224, 224), mean=mean, std=std, interpolation="bilinear", source="assumed")


def transform_of_processor(processor: Any) -> Transform:
    """The preprocessing of an image processor of Hugging Face transformers: size, colours, interpolation, crop.

    The whole photo is squashed, as everywhere, unless ``mode="crop"`` is set; the crop is then the processor's.
    """
    try:
        settings = processor.to_dict()
        size, crop = settings["size"], settings.get("crop_size")
        short = size.get("shortest_edge")
        if crop and settings.get("do_center_crop"):
            height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        else:
            height, width = (short, short) if short else (size["height"], size["width"])
        share = min(height, width) / short if short and crop else settings.get("crop_pct") or 1.0
        plain = settings.get("do_normalize", True)
        return Transform(
            size=(height, width),
            mean=tuple(settings["image_mean"]) if plain else (0.0, 0.0, 0.0),
            std=tuple(settings["image_std"]) if plain else (1.0, 1.0, 1.0),
            interpolation=_RESAMPLING[int(settings.get("resample", 2))],
            crop_fraction=share,
            source="transformers",
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ClassifierError(
            "expected a bla.Transform or an image processor of transformers, got "
            f"{type(processor).__name__} ({type(error).__name__}: {error})"
        ) from error


def classes_of(model: nn.Module, outputs: int) -> list[str]:
    """The classes' names: those of a transformers model, ImageNet's for 1,000 classes, or "class 0", ...

    A transformers model that only numbers its classes, or has two of one name, counts as having none.
    """
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(labels, dict) and sorted(labels) == list(range(outputs)):
        names = [str(labels[index]) for index in range(outputs)]
        if len({*names}) == outputs and names[0] != "LABEL_0":
            return names
    return imagenet_classes() if outputs == 1000 else [f"class {index}" for index in range(outputs)]


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
