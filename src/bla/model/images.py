"""Whatever a user passes as an image, read: a path, PIL image, array or tensor to photos and normalised pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from bla.data.arrays import Levels, is_one, picture
from bla.data.image_sets import list_images
from bla.data.photo import Box, DataError, Photo, Transform
from bla.explanations.explanation import Unexplained

ImageLike = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[Any] | Tensor
Images = ImageLike | Iterable[Any]
"""One image or several: a folder, list, data set or loader of torch's with or without labels, rows of the hub's."""

_COLUMNS = ("image", "img", "pixel_values", "images", "photo")


class Input(NamedTuple):
    """An image as a classifier takes it."""

    name: str
    pixels: Levels | Tensor
    """A photo of the transform's size, levels (h, w, C), or normalised pixels (C, h, w)."""
    region: Box
    """What the pixels show of the upright photo: (left, top, right, bottom) in its pixels."""
    photo: Image.Image | bytes | None = None
    """The upright photo, if it came as an image or a tensor, or the bytes that it came as."""
    shown: str = ""
    """What of the image the photo shows, if not all."""


def each(images: Images, channels: int = 3) -> Iterator[ImageLike]:
    """One image, a batch as one array or tensor, or several images, one by one, without the labels beside them.

    >>> list(each([("a.jpg", 3), {"label": 1, "image": b"..."}]))
    ['a.jpg', b'...']
    >>> len(list(each((np.zeros((4, 8, 8, 3)), [0, 1, 0, 1]))))
    4
    """
    if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):  # noqa: PTH112  # of a name too long, False
        yield from list_images([images])
    elif isinstance(images, (str, os.PathLike, Image.Image, bytes)) or hasattr(images, "read"):
        yield cast("ImageLike", images)
    elif isinstance(images, (Tensor, np.ndarray)):
        yield from [images] if is_one(images.shape, 2, channels) else images
    elif isinstance(images, Mapping):
        yield from each(_column(images), channels)
    elif isinstance(images, tuple) and _is_labelled(images):
        yield from each(images[0], channels)
    else:
        several = cast("Any", images)
        for row in several if isinstance(several, Iterable) else (several[index] for index in range(len(several))):
            if isinstance(row, (tuple, list)):
                yield from each(row[0] if _is_labelled(row) else row, channels)
            else:
                held = isinstance(row, (str, os.PathLike, Mapping, Tensor, np.ndarray))
                yield from each(row, channels) if held else [row]


def as_photos(transform: Transform, images: Images) -> list[Any]:
    """Photos, as :meth:`bla.data.photo.Transform.read` takes them; of normalised pixels the levels that they are of."""
    found: list[Any] = []
    for index, image in enumerate(each(images, transform.channels)):
        if isinstance(image, Tensor) and image.is_floating_point():
            read = read_image(transform, index, image)
            if isinstance(read, Unexplained):
                raise DataError(read.error)
            found.append(Photo(_levels(transform, image), transform.size[::-1], read.region))
        else:
            found.append(image.cpu().numpy() if isinstance(image, Tensor) else image)
    return found


def _column(row: Mapping[Any, Any]) -> Any:
    """The image, or images, of a row or batch by columns."""
    found = [row[name] for name in _COLUMNS if row.get(name) is not None]
    found = found or [value for value in row.values() if not _is_label(value) and not isinstance(value, (str, Mapping))]
    if not found:
        raise DataError(f"expected a column of images, such as {_COLUMNS[0]!r}, got {', '.join(map(repr, row))}")
    stored = found[0]  # of a data set whose photos are not decoded
    return stored.get("bytes") or stored.get("path") if isinstance(stored, Mapping) else stored


def _is_labelled(row: tuple[Any, ...] | list[Any]) -> bool:
    """Whether an image, or a batch, comes with labels behind it."""
    return len(row) > 1 and _is_label(row[1]) and not _is_label(row[0])


def _is_label(value: Any) -> bool:
    """Whether a value beside an image is a number, or one for each image of a batch."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim < 2
    if isinstance(value, (tuple, list)):
        return bool(value) and all(isinstance(each, (int, float, np.number)) for each in value)
    return isinstance(value, (int, float, np.number))


def read_image(transform: Transform, index: int, image: ImageLike) -> Input | Unexplained:
    """An image by its path, or "image 3" where it has none; if it cannot be read, why."""
    path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    name = path or f"image {index}"
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.shape == transform.shape:
            whole = (0.0,) * len(transform.size) + transform.size[::-1]
            return Input(name, image, whole, *picture(_levels(transform, image)))
        expected, came = ", ".join(map(str, transform.shape)), tuple(image.shape)
        return Unexplained(name, f"{name}: expected normalised pixels ({expected}), got {came}")
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    try:
        photo = transform.read(image)
    except DataError as error:
        return Unexplained(name, str(error) if path else f"{name}: {error}")
    return Input(name, photo.pixels, photo.region, image if isinstance(image, bytes) else photo.upright, photo.shown)


def _levels(transform: Transform, pixels: Tensor) -> npt.NDArray[np.float32]:
    """The levels (h, w, C), from 0 to 255 in photos, of normalised pixels (C, h, w)."""
    values = np.moveaxis(pixels.detach().double().cpu().numpy(), 0, -1)
    levels = 255 * (values * transform.std + transform.mean)
    return levels.clip(*(np.finfo(np.float32).max * np.array([-1, 1]))).astype(np.float32)  # NaN stays
