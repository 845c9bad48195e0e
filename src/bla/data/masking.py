r"""Photos of which only the pixels of some cells are kept, the rest filled; NumPy alone, for where there is no torch.

Each step is linear and separable: a mask :math:`M` is enlarged to the photo by :math:`A_h M A_w^\top`, and a fill is
:math:`C_h X C_w^\top` of each colour :math:`X`, so that every step is two small matrix products.

.. math:: \text{masked}(X, M) = m X + (1 - m)\, C_h X C_w^\top, \qquad m = A_h M A_w^\top
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from bla.data.photo import DataError

Array = npt.NDArray[np.float32]

FILLS = ("coarse", "blur", "mean", "grey")
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


def filling(fill: str, height: int, width: int) -> tuple[Array, Array]:
    """The two matrices of a fill in :data:`FILLS`, (h, h) and (w, w), for photos of this shape.

    A DataError if there is no such fill.
    """
    sides = (height, width)
    if fill == "coarse":
        matrices = [coarse(side) for side in sides]
    elif fill == "blur":
        matrices = [blurring(side, _BLUR_SHARE * max(sides)) for side in sides]
    elif fill in FILLS:
        matrices = [np.full((side, side), (fill == "mean") / side, np.float32) for side in sides]
    else:
        raise DataError(f"expected a fill among {', '.join(FILLS)}, got {fill!r}")
    return matrices[0], matrices[1]


def filled(photos: Array, fill: str = FILLS[0]) -> Array:
    """What replaces the removed pixels of normalised photos (B, 3, h, w), of the same shape."""
    down, across = filling(fill, *photos.shape[2:])
    return np.asarray(down @ photos @ across.T, np.float32)


def masked(photos: Array, masks: npt.NDArray[np.generic], fill: str = FILLS[0]) -> Array:
    """Normalised photos (B, 3, h, w) with the pixels of masks (B, H, W) kept and the others filled.

    A mask is 1 where its cell is kept and 0 where it is removed; the edge between is interpolated.

    >>> masked(np.ones((1, 3, 4, 4), np.float32), np.array([[[1, 0]]]), "grey")[0, 0, 0].tolist()
    [1.0, 0.75, 0.25, 0.0]
    """
    (height, width), (rows, columns) = photos.shape[2:], masks.shape[1:]
    kept = enlarging(rows, height) @ masks.astype(np.float32) @ enlarging(columns, width).T
    fills = filled(photos, fill)
    return fills + kept[:, None] * (photos - fills)


def _frozen(matrix: npt.NDArray[np.floating]) -> Array:
    found = np.asarray(matrix, np.float32)
    found.flags.writeable = False
    return found
