"""People crossed with photos: a mean over both, for people like these on photos like these.

A test with the person as the unit treats the photos as fixed. If some photos favour an arm with everyone, more people
make it surer of these photos and no surer of others: with 50 people, 30 photos and a photo variance of 1 it rejects in
19 of 100 studies without an effect over all photos. Here the photos are a sample, too.

With y_k the outcome of trial k, of person i(k) and photo j(k), and w_k its weight, sum(w) = 1:

    mean = sum_k w_k y_k,    e_k = w_k (y_k - mean)      (of a difference of two means: mean_1 - mean_2, e_1k - e_2k)
    V = I/(I-1) sum_i (sum_{k in i} e_k)^2 + J/(J-1) sum_j (sum_{k in j} e_k)^2 - sum_ij (sum_{k in ij} e_k)^2

(Cameron, Gelbach & Miller 2011; Owen 2007), not below the larger of its first two terms, V_I and V_J. Then
t = (mean - null) / sqrt(V) on V^2 / (V_I^2/(I-1) + V_J^2/(J-1)) degrees of freedom (Satterthwaite 1946, as in the
quasi-F of Clark 1973). The bootstrap draws people and photos, both with replacement, and weights a trial by the product
of their counts (Owen 2007: it is conservative).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from bla.metrics.statistics import Estimate
from bla.study.errors import AnalysisError

Floats = npt.NDArray[np.float64]

Term = tuple[float, Floats, Floats]
"""A mean that is added or subtracted: +1 or -1, weighted sums of outcomes in each cell, sums of weights."""

_CHUNK = 250  # resamples at a time
_NOTHING = 1e-12  # of rounding


@dataclass(frozen=True, slots=True)
class CrossedMean(Estimate):
    """A mean over people and photos, with the bootstrap's interval."""

    freedom: float
    people: int
    photos: int
    bootstrap: tuple[float, float]
    draws: int


def mean_over_people_and_photos(
    outcomes: npt.ArrayLike,
    people: npt.ArrayLike,
    photos: npt.ArrayLike,
    weights: npt.ArrayLike,
    *,
    against: npt.ArrayLike | None = None,
    null: float,
    level: float = 0.95,
    bounds: tuple[float, float],
    draws: int = 2_000,
    seed: int,
) -> CrossedMean:
    """The estimate, interval and test of a weighted mean of trials, people and photos both drawn.

    All arrays are (N,), an entry per trial; the weights 1 / (trials of the person) count every person once. ``against``
    marks the trials of a second mean, which is subtracted from the first, that of the others.
    """
    y, w = np.asarray(outcomes, np.float64), np.asarray(weights, np.float64)
    who, i = np.unique(np.asarray(people), return_inverse=True)
    what, j = np.unique(np.asarray(photos), return_inverse=True)
    if len(who) < 2 or len(what) < 2:
        raise AnalysisError(f"expected at least 2 people and 2 photos, got {len(who)} and {len(what)}")
    second = np.zeros(len(y), bool) if against is None else np.asarray(against, bool)
    terms = []
    for sign, part in ((1.0, ~second), (-1.0, second)):
        if part.any():
            cells = np.zeros((2, 1, len(who), len(what)))
            share = w[part] / w[part].sum()
            np.add.at(cells[0, 0], (i[part], j[part]), share * y[part])
            np.add.at(cells[1, 0], (i[part], j[part]), share)
            terms.append((sign, *cells))
    p = p_values(terms, null=null)[0]
    mean, variance, freedom, units = (float(part[0]) for part in _clustered(terms))
    if variance > _NOTHING:
        reach = float(stdtrit(freedom, (1 + level) / 2)) * variance**0.5
    else:  # every trial is the same: the interval of Clopper and Pearson for as many units
        reach = (bounds[1] - bounds[0]) * (1 - ((1 - level) / 2) ** (1 / units))
    low, high = max(mean - reach, bounds[0]), min(mean + reach, bounds[1])
    ends = np.quantile(_two_way_bootstrap(terms, draws, seed), [(1 - level) / 2, (1 + level) / 2])
    bootstrap = (float(ends[0]), float(ends[1]))
    return CrossedMean(mean, low, high, float(p), null, level, freedom, len(who), len(what), bootstrap, draws)


def p_values(terms: list[Term], *, null: float) -> Floats:
    """The two-sided p-values of many studies at once, (S,), from terms of (S, I, J) cells of people by photos.

    Student's t; where every trial of a study is the same, the sign test on its people or photos, whichever are fewer.
    """
    mean, variance, freedom, units = _clustered(terms)
    off, varies = np.abs(mean - null), variance > _NOTHING
    t = off / np.sqrt(np.where(varies, variance, 1.0))
    alike = np.where(off > _NOTHING, 2.0 ** (1 - units), 1.0)
    return np.asarray(np.where(varies, 2 * stdtr(freedom, -t), alike), np.float64)


def _clustered(terms: list[Term]) -> tuple[Floats, Floats, Floats, Floats]:
    """Of cells (S, I, J): mean, its variance, degrees of freedom, and how many people or photos, the fewer: (S,) each.

    A person or photo without trials does not count.
    """
    means = [sums.sum(axis=(1, 2)) for _, sums, _ in terms]
    mean = sum((sign * value for (sign, _, _), value in zip(terms, means, strict=True)), np.zeros(len(means[0])))
    e, there = np.zeros(terms[0][1].shape), np.zeros(terms[0][1].shape, bool)
    for (sign, sums, weights), value in zip(terms, means, strict=True):
        e += sign * (sums - weights * value[:, None, None])
        there |= weights > 0
    people, photos = there.any(axis=2).sum(axis=1), there.any(axis=1).sum(axis=1)
    n, m = np.maximum(people - 1, 1), np.maximum(photos - 1, 1)
    by_person = people / n * (e.sum(axis=2) ** 2).sum(axis=1)
    by_photo = photos / m * (e.sum(axis=1) ** 2).sum(axis=1)
    both = (e**2).sum(axis=(1, 2))
    variance = np.maximum(by_person + by_photo - both, np.maximum(by_person, by_photo))
    parts = by_person**2 / n + by_photo**2 / m
    freedom = np.where(parts > 0, variance**2 / np.where(parts > 0, parts, 1.0), np.minimum(n, m))
    return mean, variance, freedom, np.minimum(people, photos).astype(np.float64)


def _two_way_bootstrap(terms: list[Term], draws: int, seed: int) -> Floats:
    """(draws,) means; each resample weights cell (i, j) by how often i and j were drawn: the product of the two."""
    rng = np.random.default_rng(seed)
    _, n, m = terms[0][1].shape
    means = []
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        drawn_people = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        drawn_photos = rng.multinomial(m, np.full(m, 1 / m), size=size).astype(np.float64)
        total = np.zeros(size)
        for sign, sums, weights in terms:
            top = ((drawn_people @ sums[0]) * drawn_photos).sum(axis=1)
            bottom = ((drawn_people @ weights[0]) * drawn_photos).sum(axis=1)
            total += sign * np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)
        means.append(total[np.isfinite(total)])  # a resample may hold no trial at all
    return np.concatenate(means)
