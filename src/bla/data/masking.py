r"""Photos of which only the pixels of some cells are kept, the rest filled: NumPy arrays or torch tensors alike.

It loads no torch, for where there is none. Tensors stay on their device.

Each step is linear and separable: a mask :math:`M` is enlarged to the photo by :math:`A_h M A_w^\top`, and a fill is
:math:`C_h X C_w^\top` of each colour :math:`X`, so that every step is two small matrix products.

.. math:: \text{masked}(X, M) = m X + (1 - m)\, C_h X C_w^\top, \qquad m = A_h M A_w^\top
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from bla.data.photo import DataError

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[np.float32]
Pixels = TypeVar("Pixels", "npt.NDArray[Any]", "Tensor")

FILLS: tuple[str, ...] = ("coarse", "blur", "mean", "grey")
"""What replaces removed pixels: the photo reduced to 12 x 12 points and enlarged again (the default); the photo under a
Gaussian of 5% of its longer side; the photo's own mean colour; 0, which is the mean colour of the normalisation."""
POINTS = 12
_BLUR_SHARE = 0.05


@functools.lru_cache(maxsize=64)
def enlarging(cells: int, pixels: int) -> Array:
    """Bilinear enlargement along one side, (pixels, cells): torch's ``interpolate`` with ``align_corners=False``.

    >>> enlarging(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    place = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    return _frozen(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(cells))))


@functools.lru_cache(maxsize=64)
def coarse(pixels: int, points: int = POINTS) -> Array:
    """The average over each of ``points`` parts of a side, enlarged again bilinearly: (pixels, pixels).

    The parts are those of torch's ``interpolate(mode="area")``: neighbours share a pixel where they do not divide it.

    >>> (coarse(4, 2) @ [1, 1, 3, 3]).tolist()
    [1.0, 1.5, 2.5, 3.0]
    """
    edges, pixel = np.arange(points + 1) * pixels, np.arange(pixels)
    inside = (pixel >= edges[:-1, None] // points) & (pixel < -(-edges[1:, None] // points))
    return _frozen(enlarging(points, pixels) @ (inside / inside.sum(axis=1, keepdims=True)))


@functools.lru_cache(maxsize=64)
def blurring(pixels: int, sigma: float) -> Array:
    """A Gaussian up to three ``sigma`` along one side, the photo mirrored at its outermost pixels: (pixels, pixels)."""
    steps = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (steps / max(sigma, 1e-9)) ** 2)
    period = max(1, 2 * pixels - 2)
    read = (np.arange(pixels)[:, None] + steps) % period
    matrix = np.zeros((pixels, pixels))
    np.add.at(matrix, (np.arange(pixels)[:, None], np.minimum(read, period - read)), weights / weights.sum())
    return _frozen(matrix)


def filling(fill: str, *sides: int) -> list[Array]:
    """The matrices of a fill in :data:`FILLS`, (h, h) and (w, w), for photos of these sides; of volumes three.

    A DataError if there is no such fill.
    """
    if fill == "coarse":
        matrices = [coarse(side) for side in sides]
    elif fill == "blur":
        matrices = [blurring(side, _BLUR_SHARE * max(sides)) for side in sides]
    elif fill in FILLS:
        matrices = [np.full((side, side), (fill == "mean") / side, np.float32) for side in sides]
    else:
        raise DataError(f"expected a fill among {', '.join(FILLS)}, got {fill!r}")
    return matrices


def filled(photos: Pixels, fill: str = FILLS[0]) -> Pixels:
    """What replaces the removed pixels of normalised photos (B, 3, h, w), of the same shape."""
    found: Pixels = _along([_like(matrix, photos) for matrix in filling(fill, *photos.shape[2:])], photos)
    return found if isinstance(photos, np.ndarray) else photos.clone().copy_(found)  # in their memory format


def enlarged(masks: Pixels, like: Pixels) -> Pixels:
    """Masks (B, H, W) enlarged bilinearly to the pixels of photos (B, 3, h, w): (B, h, w)."""
    sides = zip(masks.shape[1:], like.shape[2:], strict=True)
    found: Pixels = _along([_like(enlarging(cells, pixels), like) for cells, pixels in sides], _like(masks, like))
    return found


def masked(photos: Pixels, masks: Pixels, fill: str = FILLS[0]) -> Pixels:
    """Normalised photos (B, 3, h, w) with the pixels of masks (B, H, W) kept and the others filled.

    A mask is 1 where its cell is kept and 0 where it is removed; the edge between is interpolated.

    >>> masked(np.ones((1, 3, 4, 4), np.float32), np.array([[[1, 0]]]), "grey")[0, 0, 0].tolist()
    [1.0, 0.75, 0.25, 0.0]
    """
    fills = filled(photos, fill)
    found: Pixels = fills + enlarged(masks, photos)[:, None] * (photos - fills)
    return found


def masked_photos(
    photos: npt.NDArray[np.uint8], masks: npt.NDArray[np.bool_], mean: Sequence[float], fill: str = FILLS[0]
) -> Array:
    """The same of photos (B, h, w, 3) not yet normalised by the colour ``mean``: levels from 0 to 255, not rounded."""
    middle = 255 * np.array(mean, np.float32)
    found: Array = np.moveaxis(masked(np.moveaxis(photos - middle, -1, 1), masks, fill), 1, -1) + middle
    return found


def _along(matrices: Sequence[Any], values: Any) -> Any:
    """A matrix along each of the last sides of values, two of pictures and three of volumes."""
    *depth, down, across = matrices
    found = down @ values @ across.T
    for matrix in depth:
        shape = (*found.shape[:-3], len(matrix), *found.shape[-2:])
        found = (matrix @ found.reshape(*found.shape[:-2], -1)).reshape(shape)
    return found


def _like(values: Any, photos: Any) -> Any:
    """Values in the photos' type and place."""
    if isinstance(photos, np.ndarray):
        return values.astype(photos.dtype)
    return photos.new_tensor(values) if isinstance(values, np.ndarray) else values.to(photos)


def _frozen(matrix: npt.NDArray[np.floating]) -> Array:
    found = np.asarray(matrix, np.float32)
    found.flags.writeable = False
    return found
