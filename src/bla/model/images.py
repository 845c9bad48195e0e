"""Whatever a user passes as an image, read: a path, PIL image, array or tensor to photos and normalised pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from bla.data.photo import DataError, Transform
from bla.explanations.explanation import Unexplained

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor


class Input(NamedTuple):
    """An image as a classifier takes it."""

    name: str
    pixels: npt.NDArray[np.uint8] | Tensor
    """A photo of the transform's size, uint8 (h, w, 3), or normalised pixels (3, h, w)."""
    region: tuple[float, float, float, float]
    """What the pixels show of the upright photo: (left, top, right, bottom) in its pixels."""
    photo: Image.Image | None = None
    """The upright photo, if it came as an image or a tensor."""


def each(images: ImageLike | Iterable[ImageLike]) -> Iterator[ImageLike]:
    """One image, a batch as one array or tensor, or several images, one by one."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        yield images
    elif isinstance(images, (Tensor, np.ndarray)):
        yield from images if images.ndim == 4 else [images]
    else:
        yield from images


def read_image(transform: Transform, index: int, image: ImageLike) -> Input | Unexplained:
    """An image by its path, or "image 3" where it has none; if it cannot be read, why."""
    path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    name = path or f"image {index}"
    if isinstance(image, Tensor) and image.is_floating_point():
        height, width = transform.size
        if image.shape == (3, height, width):
            return Input(name, image, (0, 0, width, height), _shown(transform, image))
        came = tuple(image.shape)
        return Unexplained(name, f"{name}: expected normalised pixels (3, {height}, {width}), got {came}")
    if isinstance(image, Tensor):
        array = image.cpu().numpy()
        image = array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] == 3 else array
    try:
        photo = transform.read(image)
    except DataError as error:
        return Unexplained(name, str(error) if path else f"{name}: {error}")
    return Input(name, photo.pixels, photo.region, photo.upright)


def _shown(transform: Transform, pixels: Tensor) -> Image.Image:
    """The photo of normalised pixels."""
    mean, std = (np.array(each)[:, np.newaxis, np.newaxis] for each in (transform.mean, transform.std))
    values = 255 * (pixels.detach().double().cpu().numpy() * std + mean)
    return Image.fromarray(np.rint(np.nan_to_num(values).clip(0, 255)).astype(np.uint8).transpose(1, 2, 0))
