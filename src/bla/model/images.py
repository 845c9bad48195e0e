"""Whatever a user passes as an image, read: a path, PIL image, array or tensor to photos and normalised pixels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from bla.data.arrays import Levels, is_one, picture
from bla.data.image_sets import list_images
from bla.data.photo import Box, DataError, Photo, Transform
from bla.explanations.explanation import Unexplained
from bla.progress import show

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
    photo: Image.Image | bytes | Levels | None = None
    """The upright photo, if it came as an image or a tensor, the bytes that it came as, or the levels of a volume."""
    shown: str = ""
    """What of the image the photo shows, if not all."""
    doubt: str = ""
    """Why the pixels may not be what the classifier takes."""


def each(images: Images, shape: Sequence[int] = (3, 1, 1)) -> Iterator[ImageLike]:
    """One image, a batch as one array or tensor, or several images, one by one, without the labels beside them.

    ``shape`` is a normalised input's, (C, height, width), which tells a batch of grey images from colours.

    >>> list(each([("a.jpg", 3), {"label": 1, "image": b"..."}]))
    ['a.jpg', b'...']
    >>> len(list(each((np.zeros((4, 8, 8, 3)), [0, 1, 0, 1]))))
    4
    """
    if isinstance(images, (bytearray, memoryview)):
        yield bytes(images)
    elif isinstance(images, (str, os.PathLike)) and os.path.isdir(images):  # noqa: PTH112  # of a name too long, False
        yield from list_images([images])
    elif isinstance(images, (str, os.PathLike, Image.Image, bytes)) or hasattr(images, "read"):
        yield cast("ImageLike", images)
    elif isinstance(images, np.ndarray) and images.dtype.kind in "OSU":  # names, or images of several sizes
        yield from each(images.ravel().tolist(), shape)
    elif isinstance(images, (Tensor, np.ndarray)):
        yield from [images] if is_one(images.shape, len(shape) - 1, shape[0]) else images
    elif isinstance(images, Mapping):
        yield from each(_column(images), shape)
    elif hasattr(images, "iterrows"):  # a table of pandas
        yield from each(_column(dict(cast("Any", images).items())), shape)
    elif isinstance(images, tuple) and (first := _labelled(images)) is not None:
        yield from each(first, shape)
    elif not any(hasattr(images, name) for name in ("__iter__", "__getitem__")):
        raise DataError(
            "expected images: paths, a folder, bytes, Pillow images, arrays, tensors, a data set or a loader, got "
            f"{type(images).__name__}"
        )
    else:
        several = cast("Any", images)
        for row in several if isinstance(several, Iterable) else (several[index] for index in range(len(several))):
            if isinstance(row, (tuple, list)):
                first = _labelled(row)
                yield from each(row if first is None else first, shape)
            else:
                held = isinstance(row, (str, os.PathLike, bytearray, memoryview, Mapping, Tensor, np.ndarray))
                yield from each(row, shape) if held else [row]


def alike(inputs: Iterable[Input]) -> Iterator[list[Input]]:
    """The inputs in runs of one shape, each of which makes a batch."""
    for _, run in itertools.groupby(inputs, key=lambda item: item.pixels.shape):
        yield list(run)


def as_photos(transform: Transform, images: Images) -> list[Any]:
    """Photos, as :meth:`bla.data.photo.Transform.read` takes them; of normalised pixels the levels that they are of."""
    found: list[Any] = []
    doubts: list[str] = []
    for index, image in enumerate(each(images, transform.shape)):
        if isinstance(image, Tensor) and image.is_floating_point():
            read = read_image(transform, index, image)
            if isinstance(read, Unexplained):
                raise DataError(read.error)
            doubts += [f"image {index}: {read.doubt}"] if read.doubt else []
            found.append(Photo(_levels(transform, image), tuple(image.shape[:0:-1]), read.region))
        else:
            found.append(image.cpu().numpy() if isinstance(image, Tensor) else image)
    if doubts:
        show(f"{len(doubts)} of {len(found)} images: {doubts[0]}", 0, 0)
    return found


def _column(row: Mapping[Any, Any]) -> Any:
    """The image, or images, of a row or batch by columns."""
    if type(row).__name__.endswith("DatasetDict"):
        raise DataError(
            f"expected one split of a data set, got {', '.join(row)}: choose one, as data[{next(iter(row))!r}]"
        )
    named = [name for name in _COLUMNS if row.get(name) is not None]
    found = named[:1] or [name for name, value in row.items() if _is_image(value) and not _is_name(value)]
    if len(found) != 1:
        what = (
            f"one column of images, got {', '.join(map(repr, found))}: pass that alone"
            if found
            else (f"a column of images, such as {_COLUMNS[0]!r}, got {', '.join(map(repr, row))}")
        )
        raise DataError(f"expected {what}")
    stored = row[found[0]]  # of a data set whose photos are not decoded
    return stored.get("bytes") or stored.get("path") if isinstance(stored, Mapping) else stored


def _labelled(row: tuple[Any, ...] | list[Any]) -> Any:
    """The image, or batch, that comes with labels behind it, or its number before it; None if all are images."""
    images = itertools.dropwhile(lambda value: not _is_image(value), row)
    first, *behind = [*images] or [None]
    if not behind:
        return first if len(row) > 1 else None
    second = behind[0]
    name = _is_name(second) and not _is_name(first)
    flat = isinstance(second, (Tensor, np.ndarray)) and second.ndim == 2 < _depth(first)  # of each class, or a mask
    return first if name or flat or not _is_image(second) else None


def _is_image(value: Any) -> bool:
    """Whether a value can be an image, or several, and no label."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 1
    if isinstance(value, Mapping):
        return not {"bytes", "path"}.isdisjoint(value)
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_image, value))
    return isinstance(value, (str, os.PathLike, bytes, Image.Image)) or hasattr(value, "read")


def _is_name(value: Any) -> bool:
    """Whether a value is text, or several."""
    return isinstance(value, str) or (isinstance(value, (tuple, list)) and bool(value) and all(map(_is_name, value)))


def _depth(value: Any) -> int:
    """How many dimensions an image, or several, have."""
    if isinstance(value, (tuple, list)):
        return 1 + _depth(value[0])
    return int(value.ndim) if isinstance(value, (Tensor, np.ndarray)) else 3


def read_image(transform: Transform, index: int, image: ImageLike) -> Input | Unexplained:
    """An image by its path, or "image 3" where it has none; if it cannot be read, why."""
    path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    name = path or f"image {index}"
    if isinstance(image, Tensor) and image.is_floating_point():
        if transform.admits(image.shape):
            whole = (0.0,) * len(transform.size) + tuple(image.shape[:0:-1])
            try:
                doubt = _doubt(transform, image)
            except DataError as error:
                return Unexplained(name, f"{name}: {error}")
            levels = _levels(transform, image)
            seen, cut = (levels, "") if levels.ndim == 4 else picture(levels)
            return Input(name, image, whole, seen, cut, doubt)
        expected, came = ", ".join(map(str, transform.shape)), tuple(image.shape)
        return Unexplained(name, f"{name}: expected normalised pixels ({expected}), got {came}")
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    try:
        photo = transform.read(image)
    except DataError as error:
        return Unexplained(name, str(error) if path else f"{name}: {error}")
    shown = image if photo.upright is None and isinstance(image, bytes) else photo.upright
    return Input(name, photo.pixels, photo.region, shown, photo.shown)


def _doubt(transform: Transform, pixels: Tensor) -> str:
    """Why pixels do not seem to be normalised; a DataError where they cannot be."""
    least, most = (float(value) for value in pixels.detach().aminmax())
    black, white = ((level - np.array(transform.mean)) / transform.std for level in (0, 1))
    came = f"from {least:.3g} to {most:.3g}, where normalised ones run from {black.min():.3g} to {white.max():.3g}"
    if least >= 0 and 20 * white.max() < most <= 65535:
        raise DataError(
            f"expected normalised pixels, got a tensor of values {came}: pass a photo's levels as uint8 (.byte()), or "
            "normalise them as in the classifier's training"
        )
    if least >= 0 and most - least > 0.3 and most <= 1 and black.max() < -0.5:
        return f"doubtful: the tensor's values are {came}; pass a photo as uint8, or normalise it"
    return ""


def _levels(transform: Transform, pixels: Tensor) -> npt.NDArray[np.float32]:
    """The levels (h, w, C), from 0 to 255 in photos, of normalised pixels (C, h, w)."""
    values = np.moveaxis(pixels.detach().double().cpu().numpy(), 0, -1)
    levels = 255 * (values * transform.std + transform.mean)
    return levels.clip(*(np.finfo(np.float32).max * np.array([-1, 1]))).astype(np.float32)  # NaN stays
