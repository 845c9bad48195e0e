"""How sure a figure is: bootstrap over images, paired tests on the same images, seeds, many comparisons at once."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.ArrayLike

RESAMPLES = 2000
FLIPS = 4999
_AT_ONCE = 16_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float
    high: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Paired:
    """A difference of means over the same images, its 95% interval, and the p of no difference."""

    difference: float
    low: float
    high: float
    p: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def bootstrap(values: Values, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean over images and its percentile bootstrap interval (Efron 1979). Of one image the interval is a point.

    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0, images=3)
    """
    known = _finite(values, 1)
    low, high = np.quantile(_resampled_means(known[None], resamples, seed, seeds=False), [0.025, 0.975])
    return Interval(float(known.mean()), float(low), float(high), len(known))


def paired(first: Values, second: Values, *, seed: int = 0) -> Paired:
    """Compare two methods on the same images: ``first - second``.

    The interval is the percentile bootstrap's over images; p is two-sided, by random sign flips of the differences
    (all of them up to 12 images), with the identity counted:
    ``(1 + #{|mean of flipped| >= |mean|}) / (1 + flips)``.

    >>> paired([1.0, 1.0, 0.0], [0.0, 0.0, 0.0]).p
    0.5
    """
    one, other = _finite(first, 1), _finite(second, 1)
    if one.shape != other.shape:
        raise ValueError(f"expected the same images of both, got {len(one)} and {len(other)}")
    difference = one - other
    interval = bootstrap(difference, seed=seed)
    return Paired(interval.mean, interval.low, interval.high, _sign_flips(difference, seed), interval.images)


def over_seeds(values: Values, *, seed: int = 0) -> Interval:
    """The mean of (seeds, images) values and the interval of resampling both, so that it covers another training.

    >>> over_seeds([[1.0, 0.0], [1.0, 0.0]]).mean
    0.5
    """
    known = _finite(values, 2)
    low, high = np.quantile(_resampled_means(known, RESAMPLES, seed, seeds=True), [0.025, 0.975])
    return Interval(float(known.mean()), float(low), float(high), known.shape[1])


def student(values: Values) -> tuple[float, float]:
    """Mean and half-width of the 95% t interval over a few trainings; of one training the half-width is NaN.

    >>> mean, half = student([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    from scipy import stats

    known = _finite(values, 1)
    if len(known) < 2:
        return float(known.mean()), math.nan
    half = known.std(ddof=1) / math.sqrt(len(known)) * stats.t.ppf(0.975, len(known) - 1)
    return float(known.mean()), float(half)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p values that hold for all comparisons at once, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    worst = 0.0
    for place, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = worst
    return [float(value) for value in corrected]


def correlation(first: Values, second: Values, *, seed: int = 0) -> Interval:
    """Pearson's correlation over images and its bootstrap interval; 0 where one of the two does not vary."""
    pairs = np.stack([_finite(first, 1), _finite(second, 1)])
    rng = np.random.default_rng(seed)
    count = pairs.shape[1]
    resampled = [_pearson(pairs[:, rng.integers(count, size=count)]) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(_pearson(pairs), float(low), float(high), count)


def _pearson(pairs: npt.NDArray[np.float64]) -> float:
    centred = pairs - pairs.mean(axis=1, keepdims=True)
    spread = math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / spread) if spread > 0 else 0.0


def _finite(values: Values, dimensions: int) -> npt.NDArray[np.float64]:
    known = np.asarray(values, np.float64)
    if known.ndim != dimensions or not known.size:
        raise ValueError(f"expected values of {dimensions} dimension(s), at least one, got shape {known.shape}")
    if not np.isfinite(known).all():
        raise ValueError("expected finite values, got NaN or infinity: leave out the images that have none")
    return known


def _resampled_means(
    values: npt.NDArray[np.float64], resamples: int, seed: int, *, seeds: bool
) -> npt.NDArray[np.float64]:
    trainings, images = values.shape
    rng = np.random.default_rng([seed, 1])
    means = []
    for weights in _portions(_weights, images, resamples, seed):
        each = weights @ values.T  # (count, trainings)
        if seeds:
            each = np.take_along_axis(each, rng.integers(trainings, size=each.shape), axis=1)
        means.append(each.mean(axis=1))
    return np.concatenate(means)


def _sign_flips(difference: npt.NDArray[np.float64], seed: int) -> float:
    moved = difference[difference != 0]
    if not moved.size:
        return 1.0
    least = abs(moved.sum()) * (1 - 1e-9)
    if moved.size <= 12:
        signs = 1 - 2 * ((np.arange(2**moved.size)[:, None] >> np.arange(moved.size)) & 1)
        return float((np.abs(signs @ moved) >= least).mean())
    beyond = sum(
        int((np.abs(signs @ difference) >= least).sum()) for signs in _portions(_signs, difference.size, FLIPS, seed)
    )
    return (1 + beyond) / (1 + FLIPS)


def _portions(
    draw: Callable[[int, int, int, int], npt.NDArray[np.float64]], images: int, count: int, seed: int
) -> Iterator[npt.NDArray[np.float64]]:
    """``count`` rows of draws over the images, as many at once as memory allows."""
    at_once = max(1, min(count, _AT_ONCE // images))
    for portion, start in enumerate(range(0, count, at_once)):
        yield draw(images, min(at_once, count - start), seed, portion)


# A comparison asks for the same draws for every metric and method.
@functools.lru_cache(maxsize=4)
def _weights(images: int, count: int, seed: int, portion: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng([seed, 2, portion])
    drawn = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
    return np.asarray(counts / images, np.float64)


@functools.lru_cache(maxsize=4)
def _signs(images: int, count: int, seed: int, portion: int) -> npt.NDArray[np.float64]:
    signs = np.random.default_rng([seed, 3, portion]).integers(2, size=(count, images), dtype=np.int8)
    return 2 * signs.astype(np.float64) - 1
