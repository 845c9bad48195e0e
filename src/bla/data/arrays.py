"""Arrays of any number of channels, of pictures or volumes, as levels from 0 to 255; and pictures of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bla import BlaError

Range = tuple[float, float]
Levels = npt.NDArray[Any]
"""(h, w, C), or (d, h, w, C) of a volume, from 0 to 255: uint8, or float32 where the source is finer."""

TWELVE_BITS = 4095


class DataError(BlaError):
    """Data that cannot be used: the message says what was expected, what came and the remedy."""


def is_one(shape: Sequence[int], rank: int, channels: int) -> bool:
    """Whether an array of this shape is one image, and not several of them, or of ``rank`` sides.

    >>> is_one((28, 28), 2, 1), is_one((9, 28, 28), 2, 1), is_one((9, 28, 28, 3), 2, 3), is_one((4, 8, 8, 8), 3, 4)
    (True, False, False, True)
    """
    if channels == 1 and len(shape) == rank + 1:
        return 1 in (shape[0], shape[-1]) or shape[-1] in (3, 4)
    return len(shape) <= rank + 1


def as_levels(array: npt.NDArray[Any], rank: int, channels: int, value_range: Range | None) -> Levels:
    """The levels (*sides, C) of an array with its channels first or last, or, if there is but one, without them.

    uint8 stays as it is. ``value_range`` holds the values of others that stand for 0 and 255, by default those of
    uint16; a grey picture serves all of three channels. A DataError says that a range has to be stated, or is exceeded.

    >>> as_levels(np.array([[0, 4095]], np.uint16), 2, 1, (0, 4095))[0, :, 0].tolist()
    [0.0, 255.0]
    """
    placed = _channels_last(array, rank, channels)
    if array.dtype == np.uint8:
        return placed
    if array.dtype.kind not in "uif" or not array.size:
        raise DataError(f"expected numbers as pixels, got {array.dtype} {array.shape}; convert them")
    least, most = float(array.min()), float(array.max())
    if not np.isfinite([least, most]).all():
        raise DataError("expected finite pixels, got NaN or infinity; replace them")
    came = f"{array.dtype.name} from {least:g} to {most:g}"
    if value_range is None and (array.dtype.name != "uint16" or 0 < most <= TWELVE_BITS):
        raise DataError(range_wanted(came))
    low, high = value_range or (0.0, 65535.0)
    if least < low or most > high:
        raise DataError(
            f"expected values from {low:g} to {high:g}, got {came}: clip them (array.clip({low:g}, {high:g})), or "
            "state another value_range"
        )
    return ((placed.astype(np.float64) - low) * (255 / (high - low))).astype(np.float32)


def range_wanted(came: str) -> str:
    """What to say of pixels that do not tell which values are black and white."""
    remedy = "bla.Transform(..., value_range=(0, 4095)) for 12 bits, (0, 65535) for 16, (0, 1) for shares"
    return f"expected a stated range of the pixels' values, got {came}: {remedy}"


def _channels_last(array: npt.NDArray[Any], rank: int, channels: int) -> npt.NDArray[Any]:
    shape = array.shape
    if len(shape) == rank + 1 and channels in (shape[-1], shape[0]):
        return array if shape[-1] == channels else np.moveaxis(array, 0, -1)
    grey = array[..., np.newaxis] if len(shape) == rank else array
    if grey.ndim == rank + 1 and 1 in (grey.shape[-1], grey.shape[0]) and channels in (1, 3)[: 4 - rank]:
        grey = grey if grey.shape[-1] == 1 else np.moveaxis(grey, 0, -1)
        return np.repeat(grey, channels, axis=-1)
    sides = "(d, h, w" if rank == 3 else "(h, w"
    whole = [*([f"{sides})"] if channels == 1 else []), f"{sides}, {channels})", f"({channels}, {sides[1:]})"]
    raise DataError(f"expected an array of shape {' or '.join(whole)}, got {shape}; transpose it, or pick its channels")


def resized(levels: Levels, size: Sequence[int], kind: Image.Resampling) -> Levels:
    """Levels (*sides, C) resized to these sides with antialiasing, each channel and slice alone, then the depth."""
    *depth, height, width = size
    if levels.shape[-3:-1] != (height, width):
        planes = np.moveaxis(levels, -1, 0).reshape(-1, *levels.shape[-3:-1])
        each = np.array([np.asarray(Image.fromarray(plane).resize((width, height), kind)) for plane in planes])
        levels = np.moveaxis(each.reshape(levels.shape[-1], *levels.shape[:-3], height, width), 0, -1)
    if depth and levels.shape[0] != depth[0]:
        rows = Image.fromarray(levels.reshape(levels.shape[0], -1))
        levels = np.asarray(rows.resize((rows.width, depth[0]), kind)).reshape(*depth, *levels.shape[1:])
    return levels


def picture(levels: Levels) -> tuple[Image.Image, str]:
    """A picture (h, w) of levels (h, w, C), and in words what it shows of them if that is not all.

    Of four channels or more it shows the first three, of two the first. Where they take little of the range, or leave
    it, they are stretched to their own.
    """
    channels = levels.shape[-1]
    some = levels if channels in (1, 3) else levels[..., : 3 if channels > 3 else 1]
    said = ""
    if some.shape[-1] < channels:
        said = "channels 1 to 3" if channels > 3 else "channel 1"
        said += f" of {channels}"
    if some.dtype != np.uint8 or channels not in (1, 3):
        values = np.nan_to_num(some.astype(np.float64))
        low, high = np.percentile(values, (1, 99))
        if low < -1 or high > 256 or high - low < 100:
            values = (values - low) * (255 / (high - low or 1))
            said += f"{', ' if said else ''}contrast stretched"
        some = np.rint(values.clip(0, 255)).astype(np.uint8)
    return Image.fromarray(some[..., 0] if some.shape[-1] == 1 else some), said
