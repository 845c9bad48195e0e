"""How certain a figure is: bootstrap intervals, sign-flip tests, and Holm's correction for several comparisons.

The sign-flip test takes one number x_i from each of n independent units (people, photos). Under the hypothesis that the
x_i lie symmetrically about mu, each x_i - mu is as likely with the other sign, and

    p = 2 min(P(sum of flipped >= observed sum), P(sum of flipped <= observed sum)),  at most 1,

over the 2^n assignments of signs, or over random ones with the observed assignment counted in, which keeps the level
exact (Phipson & Smyth 2010; Hemerik & Goeman 2018). Where the x_i are not symmetric, the test holds for their mean in
the limit, as Student's does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.ArrayLike
Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
ENUMERATED = 16
"""Up to this many units all 2^n assignments of signs are enumerated; beyond it they are drawn at random."""
TIE = 1e-9
"""Sums closer than this are equal: a share like 1/3 has no exact float."""
_SUBSETS_AT_ONCE = 2048
_WEIGHTS_AT_ONCE = 16_000_000


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
class Estimate:
    """A mean, its interval at ``level``, and its two-sided p-value against ``null``."""

    mean: float
    low: float
    high: float
    p: float
    null: float
    level: float


@dataclasses.dataclass(frozen=True, slots=True)
class SignFlipMean(Estimate):
    """A mean over people; ``subsets`` counts the assignments of signs, and ``exact`` says that these are all."""

    people: int
    subsets: int
    exact: bool


def bootstrap(values: Values, *, seed: int = 0) -> Interval:
    """The mean over images and its percentile bootstrap interval (Efron 1979); a single image's interval is a point.

    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0, images=3)
    """
    return over_seeds(_finite(values, 1)[None], seed=seed)


def over_seeds(values: Values, *, seed: int = 0) -> Interval:
    """The mean of (trainings, images) values and the interval of resampling both, so that it covers another training.

    >>> over_seeds([[1.0, 0.0], [1.0, 0.0]]).mean
    0.5
    """
    known = _finite(values, 2)
    trainings, images = known.shape
    rng = np.random.default_rng([seed, 1])
    means = []
    for weights in _resamples(images, seed):
        each = weights @ known.T
        drawn = np.take_along_axis(each, rng.integers(trainings, size=each.shape), axis=1)
        means.append(drawn.mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(known.mean()), float(low), float(high), images)


def images_to_decide(differences: Values, *, power: float = 0.8) -> int | None:
    r"""How many images would show a paired difference of this mean and spread, as likely as ``power``; None if it is 0.

    .. math:: n = \Bigl\lceil (z_{0.975} + z_{\mathrm{power}})^2 \, s^2 / \bar d^2 \Bigr\rceil

    The normal approximation for the mean of n differences d; with those of -1, 0 and 1 it is McNemar's.

    >>> images_to_decide([1, 1, 0, 0, 0, 0, 0, -1])
    181
    """
    known = _finite(differences, 1)
    if abs(known.mean()) < TIE:
        return None
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power)
    return max(1, math.ceil(float(z**2 * known.var() / known.mean() ** 2)))


def sign_flips(deviations: Values, *, draws: int = 9_999, seed: int = 0) -> Floats:
    """The sign-flip test of many samples at once: (S, n) deviations from the null -> (S,) two-sided p-values.

    A unit that is missing from a sample deviates by 0, which changes no sum. All samples share their random signs.

    >>> sign_flips([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).tolist()
    [0.5, 1.0]
    """
    known = _finite(deviations, 2)
    known = known[:, known.any(axis=0)]
    scaled = (known / np.abs(known).max(axis=1, initial=1e-300, keepdims=True)).T
    above, below, total = np.ones(len(known)), np.ones(len(known)), 1
    for subsets in _subsets(len(scaled), draws, seed):
        # flipping a subset leaves the sum as high or higher exactly where the subset's own sum is not positive
        sums = subsets @ scaled
        above += (sums <= TIE).sum(axis=0)
        below += (sums >= -TIE).sum(axis=0)
        total += len(subsets)
    return np.minimum(1.0, 2 * np.minimum(above, below) / total)


def mean_by_sign_flips(
    values: Values, *, null: float, level: float = 0.95, bounds: tuple[float, float], draws: int = 99_999, seed: int
) -> SignFlipMean:
    """The mean of one number per person, the sign-flip test's p-value and the interval of all means it accepts.

    A subset's flip leaves the sum as high or higher if and only if the subset's mean is at most mu. So one list, the
    means of all subsets, gives the test of every mu and, from its two ends, the interval (Hartigan 1969).

    Parameters
    ----------
    values: (n,) finite.
    null: the mean under the hypothesis: 1/2 for a share of two arms, 0 for a difference.
    bounds: the smallest and largest possible mean: the interval where there are too few people to exclude any.
    draws: random subsets, where there are more than :data:`ENUMERATED` people.

    >>> found = mean_by_sign_flips([0.6, 0.7, 0.6, 0.8, 0.9, 0.7], null=0.5, bounds=(0, 1), seed=0)
    >>> found.p, found.low, found.high
    (0.03125, 0.6, 0.9)
    """
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level}")
    x = np.sort(_finite(values, 1))  # sorted, so that random subsets do not depend on the order either
    means = np.sort(np.concatenate([(part @ x) / part.sum(axis=1) for part in _subsets(len(x), draws, seed)]))
    total = len(means) + 1  # and the observed assignment, in which nobody is flipped
    above = 1 + np.searchsorted(means, null + TIE, side="right")
    below = 1 + len(means) - np.searchsorted(means, null - TIE, side="left")
    outside = math.floor((1 - level) / 2 * total + TIE)  # assignments to leave out at each end
    low, high = (float(means[outside - 1]), float(means[-outside])) if 1 <= outside <= len(means) else bounds
    p = float(min(1.0, 2 * min(above, below) / total))
    return SignFlipMean(
        float(x.mean()), low, high, p, null, level, people=len(x), subsets=total, exact=len(x) <= ENUMERATED
    )


def lower_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    r"""The one-sided lower confidence bound on a share, exact (Clopper & Pearson 1934).

    .. math:: P(\mathrm{Bin}(n, p) \ge x) = 1 - \text{confidence}

    at this bound p, of x successes in n trials; it is 0 where x is.

    >>> round(lower_bound(29, 29), 4), round(0.05 ** (1 / 29), 4)
    (0.9019, 0.9019)
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"expected from 0 to {trials} successes, got {successes}")
    steps = np.arange(1, trials + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((trials + 1 - steps) / steps))])[successes:]  # log binomials
    k = np.arange(successes, trials + 1)
    low, high = 0.0, 1.0
    for _ in range(60 if successes else 0):
        p = (low + high) / 2
        tail = np.exp(ways + k * math.log(p) + (trials - k) * math.log1p(-p)).sum()
        low, high = (p, high) if tail <= 1 - confidence else (low, p)
    return low


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for several comparisons (Holm 1979): max over p_(j) <= p_(k) of (m - j + 1) p_(j), at most 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    return [float(value) for value in corrected]


def correlation(first: Values, second: Values, *, seed: int = 0) -> Interval:
    """Pearson's correlation over images and its bootstrap interval; 0 where one of the two does not vary."""
    pairs = np.stack([_finite(first, 1), _finite(second, 1)])
    rng = np.random.default_rng(seed)
    count = pairs.shape[1]
    resampled = [_pearson(pairs[:, rng.integers(count, size=count)]) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(_pearson(pairs), float(low), float(high), count)


def _pearson(pairs: Floats) -> float:
    centred = pairs - pairs.mean(axis=1, keepdims=True)
    spread = math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / spread) if spread > 0 else 0.0


def _finite(values: Values, dimensions: int) -> Floats:
    known = np.asarray(values, np.float64)
    if known.ndim != dimensions or not known.size:
        raise ValueError(f"expected values of {dimensions} dimension(s), at least one, got shape {known.shape}")
    if not np.isfinite(known).all():
        raise ValueError("expected finite values, got NaN or infinity: leave out what has no value")
    return known


def _subsets(n: int, draws: int, seed: int) -> Iterator[Floats]:
    """Which units are flipped: rows of 0 and 1, never none (which is counted apart), a portion at a time."""
    if n <= ENUMERATED:
        numbers = np.arange(1, 2**n)
        for start in range(0, len(numbers), _SUBSETS_AT_ONCE):
            yield (numbers[start : start + _SUBSETS_AT_ONCE, None] >> np.arange(n) & 1).astype(np.float64)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, draws, _SUBSETS_AT_ONCE):
        rows = rng.integers(0, 2, (min(_SUBSETS_AT_ONCE, draws - start), n), np.int8)
        yield rows[rows.any(axis=1)].astype(np.float64)


def _resamples(images: int, seed: int) -> Iterator[Floats]:
    """The bootstrap's weights of the images, :data:`RESAMPLES` rows in all, as many at once as memory allows."""
    at_once = max(1, min(RESAMPLES, _WEIGHTS_AT_ONCE // images))
    for portion, start in enumerate(range(0, RESAMPLES, at_once)):
        yield _weights(images, min(at_once, RESAMPLES - start), seed, portion)


# cached: a comparison needs the same draws for every metric and method
@functools.lru_cache(maxsize=4)
def _weights(images: int, count: int, seed: int, portion: int) -> Floats:
    rng = np.random.default_rng([seed, 2, portion])
    drawn = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
    return np.asarray(counts / images, np.float64)
