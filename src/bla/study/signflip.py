"""A mean over people, tested and bounded by flipping signs: exact at any number of people, with ties or without.

Of person i there is one number x_i (a share of trials, a difference of two accuracies). The hypothesis is that the x_i
are independent and lie symmetrically about mu, as a share does about 1/2 when nothing tells the arms apart. Each
x_i - mu is then as likely with the other sign, and the p-value is the share of the 2^n assignments of signs whose sum
is at least as far out as the one observed. Where the x_i are not symmetric the test holds for their mean in the
limit, as Student's does: the sum of squares stays the same under a flip, so that ordering by the sum is ordering by t.

A flip of the people in M leaves the sum as high or higher if and only if mean(x in M) <= mu. So one list, the means
over all subsets of people, gives the test of every mu and, from its two ends, the interval (Hartigan 1969). For many
people the subsets are drawn at random and the observed one counted in, which keeps the level exact (Phipson & Smyth
2010; Hemerik & Goeman 2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bla.study.errors import AnalysisError

Floats = npt.NDArray[np.float64]

ENUMERATED = 16
"""Up to so many people all 2^n subsets are gone through; of more, random ones."""
TIE = 1e-9
"""Sums closer than this are equal: a share like 1/3 has no exact float."""
_CHUNK = 2_048  # subsets at a time


@dataclass(frozen=True)
class Mean:
    """A mean over people: its interval at `level`, the two-sided p-value against `null`, and how they were found."""

    mean: float
    low: float
    high: float
    p: float
    null: float
    level: float
    people: int
    subsets: int
    exact: bool  # every subset, or random ones


def mean_over_people(
    values: npt.ArrayLike,
    *,
    null: float,
    level: float = 0.95,
    bounds: tuple[float, float],
    draws: int = 99_999,
    seed: int,
) -> Mean:
    """The registered estimate, interval and test of one number a person.

    Parameters
    ----------
    values
        (n,) one finite number a person.
    null
        The mean under the hypothesis: 1/2 of a share of two arms, 0 of a difference.
    level
        Of the interval.
    bounds
        What a mean can be at least and at most: what the interval says where so few people exclude nothing.
    draws
        Random subsets where there are more than `ENUMERATED` people.
    seed
        Of those.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise AnalysisError(f"expected one finite number of each of at least 1 person, got {x.shape} values")
    if not 0 < level < 1:
        raise AnalysisError(f"expected a level between 0 and 1, got {level}")
    n = len(x)
    x = np.sort(x)  # who came first does not matter, with random subsets either
    exact = n <= ENUMERATED
    means = np.concatenate([(part @ x) / part.sum(axis=1) for part in _subsets(n, draws, seed)])
    means.sort()
    total = len(means) + 1  # and the observed assignment: nobody flipped
    above = 1 + np.searchsorted(means, null + TIE, side="right")  # as high or higher
    below = 1 + len(means) - np.searchsorted(means, null - TIE, side="left")
    outside = int(np.floor((1 - level) / 2 * total + TIE))  # assignments to leave out at each end
    inside = outside >= 1 and outside <= len(means)
    low, high = (float(means[outside - 1]), float(means[-outside])) if inside else bounds
    return Mean(
        mean=float(x.mean()),
        low=low,
        high=high,
        p=float(min(1.0, 2 * min(above, below) / total)),
        null=null,
        level=level,
        people=n,
        subsets=total,
        exact=exact,
    )


def p_values(deviations: Floats, *, draws: int, seed: int) -> Floats:
    """The same test of many studies at once: (S, n) deviations from the null -> (S,) two-sided p-values.

    Who is not analysed deviates by 0, which changes no sum. The studies share their random subsets.
    """
    studies, n = deviations.shape
    above, below, total = np.ones(studies), np.ones(studies), 1
    for part in _subsets(n, draws, seed):
        sums = part @ deviations.T
        above += (sums <= TIE).sum(axis=0)
        below += (sums >= -TIE).sum(axis=0)
        total += len(part)
    return np.minimum(1.0, 2 * np.minimum(above, below) / total)


def _subsets(n: int, draws: int, seed: int) -> Iterator[Floats]:
    """Who is flipped: rows of 0 and 1, never nobody (which is counted apart), a chunk at a time."""
    if n <= ENUMERATED:
        numbers = np.arange(1, 2**n)
        for start in range(0, len(numbers), _CHUNK):
            yield (numbers[start : start + _CHUNK, None] >> np.arange(n) & 1).astype(np.float64)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, draws, _CHUNK):
        rows = rng.integers(0, 2, (min(_CHUNK, draws - start), n), np.int8)
        yield rows[rows.any(axis=1)].astype(np.float64)


def holm(p: npt.ArrayLike) -> Floats:
    """P-values corrected for being several (Holm 1979): p_(k) -> max over j <= k of (m - j + 1) p_(j), at most 1.

    >>> holm([0.01, 0.04, 0.03]).round(4).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected
