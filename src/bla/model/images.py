"""Whatever a user passes as an image, read: a path, PIL image, array or tensor to photos and normalised pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from bla.data.image_sets import list_images
from bla.data.photo import DataError, Transform
from bla.explanations.explanation import Unexplained

ImageLike = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[np.uint8] | Tensor
Images = ImageLike | Iterable[Any]
"""One image or several: a folder, list, data set or loader of torch's with or without labels, rows of the hub's."""

_SEEN = 1e-2
"""Levels of 255 by which a difference counts."""
_COLUMNS = ("image", "img", "pixel_values", "images", "photo")


class Input(NamedTuple):
    """An image as a classifier takes it."""

    name: str
    pixels: npt.NDArray[np.uint8] | Tensor
    """A photo of the transform's size, uint8 (h, w, 3), or normalised pixels (3, h, w)."""
    region: tuple[float, float, float, float]
    """What the pixels show of the upright photo: (left, top, right, bottom) in its pixels."""
    photo: Image.Image | bytes | None = None
    """The upright photo, if it came as an image or a tensor, or the bytes that it came as."""


def each(images: Images) -> Iterator[ImageLike]:
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
        yield from images if images.ndim == 4 else [images]
    elif isinstance(images, Mapping):
        yield from each(_column(images))
    elif isinstance(images, tuple) and _is_labelled(images):
        yield from each(images[0])
    else:
        several = cast("Any", images)
        for row in several if isinstance(several, Iterable) else (several[index] for index in range(len(several))):
            if isinstance(row, (tuple, list)):
                yield from each(row[0] if _is_labelled(row) else row)
            else:
                yield from each(row) if isinstance(row, (str, os.PathLike, Mapping, Tensor, np.ndarray)) else [row]


def as_photos(transform: Transform, images: Images, say: Callable[[str], None] = lambda _: None) -> list[Any]:
    """Photos of any size, as :meth:`bla.data.photo.Transform.read` takes them; of normalised pixels those of the input.

    These are rounded to 8 bits, which is said with the largest difference.
    """
    found: list[Any] = []
    off = 0.0
    for index, image in enumerate(each(images)):
        if isinstance(image, Tensor) and image.is_floating_point():
            read = read_image(transform, index, image)
            if isinstance(read, Unexplained):
                raise DataError(read.error)
            shown = np.asarray(read.photo)
            off = max(off, float(np.abs(_levels(transform, image) - shown.transpose(2, 0, 1)).max()))
            found.append(transform.framed(shown[None])[0])
        else:
            found.append(_upright(image) if isinstance(image, Tensor) else image)
    if off > _SEEN:
        say(f"normalised pixels are rounded to levels from 0 to 255: by at most {off:.2g}")
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
        height, width = transform.size
        if image.shape == (3, height, width):
            return Input(name, image, (0, 0, width, height), _shown(transform, image))
        came = tuple(image.shape)
        return Unexplained(name, f"{name}: expected normalised pixels (3, {height}, {width}), got {came}")
    if isinstance(image, Tensor):
        image = _upright(image)
    try:
        photo = transform.read(image)
    except DataError as error:
        return Unexplained(name, str(error) if path else f"{name}: {error}")
    return Input(name, photo.pixels, photo.region, image if isinstance(image, bytes) else photo.upright)


def _upright(image: Tensor) -> npt.NDArray[Any]:
    """A tensor as an array with its colours last."""
    array: npt.NDArray[Any] = image.cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] == 3 else array


def _levels(transform: Transform, pixels: Tensor) -> npt.NDArray[np.float64]:
    """The levels (3, h, w), from 0 to 255 in photos, of normalised pixels."""
    mean, std = (np.array(each)[:, np.newaxis, np.newaxis] for each in (transform.mean, transform.std))
    return np.asarray(255 * (pixels.detach().double().cpu().numpy() * std + mean))


def _shown(transform: Transform, pixels: Tensor) -> Image.Image:
    """The photo of normalised pixels."""
    values = np.nan_to_num(_levels(transform, pixels)).clip(0, 255)
    return Image.fromarray(np.rint(values).astype(np.uint8).transpose(1, 2, 0))
