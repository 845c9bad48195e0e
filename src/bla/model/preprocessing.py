"""What a classifier says about itself: preprocessing, class names, its name."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bla.data.photo import DataError, Mode, Transform
from bla.data.pipeline import fraction, understood
from bla.model.splitting import ClassifierError, first_convolution, speaks_timm
from bla.model.untouched import untouched
from bla.progress import quiet


def transform_of(model: nn.Module, mode: Mode | None = None) -> Transform:
    """The preprocessing that a classifier was trained with, where it, or a part of it, says so; else an assumption.

    timm's classifiers state it. torchvision's are known by the number of their parameters, whatever the number of their
    classes; of several weights with as many, the default ones count. Those of transformers have a processor in the
    folder, or the cache, that they were loaded from. A classifier of yours says so by an attribute ``transform`` that
    holds a :class:`bla.data.photo.Transform`. Where one is a part of yours, what you do before it is taken off.

    Assumed are 224 x 224 pixels, normalised as ImageNet's; not normalised, for a classifier that does that itself.
    ``mode`` replaces the classifier's own.
    """
    parts = list(_speaking(model, mode))
    if parts and all(stated == parts[0][1] for _, stated in parts):
        part, transform = parts[0]
        if part is not model and (before := _before(model, part, transform)) is not None and before.in_order:
            own = np.array(transform.std)
            transform = _normalised(transform, transform.mean + before.shift * own, before.scale * own)
    elif type(model).__module__.startswith("torchvision.models."):
        transform = _of_preset(_imagenets(), "assumed")
    else:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
        transform = Transform(size=(224, 224), mean=mean, std=std, interpolation="bilinear", source="assumed")
        first = first_convolution(model)
        before = None if first is None else _before(model, first, transform)
        if before is not None and (white := before.white()):
            transform = _normalised(transform, np.zeros(3), np.full(3, 1 / white))
            transform = dataclasses.replace(transform, source="assumed, but for what it normalises itself")
    return transform if mode is None else dataclasses.replace(transform, mode=mode)


def _speaking(model: nn.Module, mode: Mode | None) -> Iterator[tuple[nn.Module, Transform]]:
    """The outermost parts of a classifier that state their preprocessing, and it; perhaps the whole."""
    if (stated := _stated(model, mode)) is not None:
        yield model, stated
    else:
        for part in model.children():
            yield from _speaking(part, mode)


def _stated(model: nn.Module, mode: Mode | None) -> Transform | None:
    own = getattr(model, "transform", None)
    if isinstance(own, Transform):
        return own
    if speaks_timm(model):
        return _of_timm(model, mode)
    if type(model).__module__.startswith("torchvision.models."):
        return _of_torchvision(model)
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if type(model).__module__.startswith("transformers.") and isinstance(name, str) and name:
        with contextlib.suppress(Exception), quiet():  # none is saved there
            import transformers

            processors: Any = transformers.AutoImageProcessor
            found = transform_of_code(processors.from_pretrained(name, local_files_only=True), model)
            return found if mode is None or type(found) is Transform else None
    return None


class _Before(NamedTuple):
    """What a part of a classifier is given: x times ``scale`` plus ``shift``, (3,), of each channel of the pixels."""

    scale: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]
    in_order: bool
    """Whether the channels are in the order of the pixels'."""

    def white(self) -> float | None:
        """Which value is white, where 0 is black and both become numbers about 0; None if that cannot be told."""
        for white in (1.0, 255.0):
            grey = -self.shift / (self.scale * white)
            if ((grey > 0.2) & (grey < 0.8)).all():
                return white
        return 255.0 if np.allclose(self.scale * 255, 1, rtol=0.02) and np.allclose(self.shift, 0) else None


def _before(model: nn.Module, part: nn.Module, transform: Transform) -> _Before | None:
    """What is done before a part to photos of one colour; None if nothing is, or something else."""
    first = next(model.parameters(), torch.empty(0))
    levels = torch.tensor([[0.0] * 3, [1.0] * 3, [2.0] * 3, [1.0, 2.0, 3.0]])
    if type(transform) is not Transform or transform.channels != 3 or len(transform.size) != 2 or first.is_meta:
        return None
    pixels = levels.to(first)[..., None, None].expand(-1, -1, *transform.size).contiguous()
    seen: list[Tensor] = []

    def see(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.extend(value for value in (*given, *named.values()) if isinstance(value, Tensor))
        raise StopIteration

    with untouched(model), torch.no_grad(), contextlib.suppress(Exception):  # of what takes other inputs
        part.register_forward_pre_hook(see, with_kwargs=True)
        model(pixels)
    if not seen or seen[0].ndim != 4 or seen[0].shape[:2] != (4, 3):
        return None
    height, width = seen[0].shape[2:]
    zero, one, two, mixed = seen[0][:, :, height // 2, width // 2].double().cpu().numpy()
    scale, shift = one - zero, zero
    same = np.allclose(scale, 1, atol=1e-3) and np.allclose(shift, 0, atol=1e-3)
    if same or not (scale > 0).all():
        return None
    channels = (mixed - shift) / scale
    if np.abs([*((two - shift) / scale - 2), *(np.sort(channels) - [1, 2, 3])]).max() > 1e-2:
        return None
    return _Before(scale, shift, bool((np.diff(channels) > 0).all()))


def _normalised(transform: Transform, mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64]) -> Transform:
    """With another mean and std, to six digits."""
    digits = [float(f"{number:.6g}") for number in std]
    return dataclasses.replace(transform, mean=tuple(mean.round(6) + 0.0), std=tuple(digits))


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


def _of_torchvision(model: nn.Module) -> Transform | None:
    """The preset of the weights with as many parameters, but for the classes; the architecture's default ones first."""
    from torchvision.models import WeightsEnum

    known = vars(sys.modules[type(model).__module__]).values()
    if not any(getattr(each, "__annotations__", {}).get("return") is type(model) for each in known):
        return None  # a part of one
    kinds: list[Any] = [kind for kind in known if isinstance(kind, type) and WeightsEnum in kind.__bases__]
    counts = [sum(parameter.numel() for parameter in model.parameters())]
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    counts += [counts[0] + (1000 - layer.out_features) * (layer.in_features + 1) for layer in linear[-1:]]
    for count, kind in itertools.product(counts, kinds):
        for weights in sorted(kind, key=lambda each: each is not kind.DEFAULT):
            preset = weights.transforms()
            if weights.meta.get("num_params") == count and isinstance(preset, type(_imagenets())):
                return _of_preset(preset, f"torchvision's {weights}")
    return _of_preset(kinds[0].DEFAULT.transforms(), f"torchvision's {kinds[0].DEFAULT}") if len(kinds) == 1 else None


def _imagenets() -> Any:
    from torchvision.transforms._presets import ImageClassification

    return ImageClassification(crop_size=224)


def _of_preset(preset: Any, source: str) -> Transform:
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
