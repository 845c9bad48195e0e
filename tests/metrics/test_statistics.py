"""Intervals that cover, tests that hold their level, sign flips as scipy has them, Holm as the closed test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bla.metrics.statistics import (
    bootstrap,
    correlation,
    holm,
    images_to_decide,
    lower_bound,
    mean_by_sign_flips,
    over_seeds,
    sign_flips,
)


def test_bootstrap_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap(values) == interval, "the seed alone decides"
    assert bootstrap([0.5]).low == bootstrap([0.5]).high == 0.5


def test_bootstrap_covers() -> None:
    rng = np.random.default_rng(1)
    covered = [
        interval.low <= 0.3 <= interval.high for interval in (bootstrap(rng.random(80) < 0.3) for _ in range(200))
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_the_paired_test_is_exact_for_few_and_near_the_t_test_for_many() -> None:
    # of the 8 ways to flip three differences alike, all + and all - are as far from 0
    assert sign_flips([[1, 1, 1]]) == 0.25
    assert sign_flips([[0.0, 0.0]]) == 1
    rng = np.random.default_rng(2)
    first = rng.normal(0, 1, 100)
    second = first + rng.normal(0.2, 1, 100)
    assert sign_flips([first - second]) == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.015)
    assert bootstrap(second - first).mean == -bootstrap(first - second).mean
    assert sign_flips([-5 - rng.normal(0, 0.1, 100)]) == pytest.approx(1 / 5000)


def test_sign_flips_hold_their_level() -> None:
    rng = np.random.default_rng(3)
    p = sign_flips(rng.normal(0, 1, (300, 30)))
    assert np.mean(p < 0.05) < 0.09


@pytest.mark.parametrize("units", [9, 40])
def test_sign_flips_are_scipys(units: int) -> None:
    deviations = np.random.default_rng(units).normal(0.25, 1, (4, units))
    deviations[3] = 0
    found = sign_flips(deviations)
    for sample, p in zip(deviations[:3], found[:3], strict=True):
        reference = stats.permutation_test(
            (sample,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
        )
        assert p == pytest.approx(reference.pvalue, abs=1e-12 if units == 9 else 0.02)
    assert found[3] == 1
    assert sign_flips(1e-12 * deviations) == pytest.approx(found), "the scale does not matter"


def test_a_mean_by_sign_flips_has_the_same_p_and_an_interval_near_students() -> None:
    for people in (14, 40):
        values = np.random.default_rng(people).normal(0.6, 0.2, people)
        found = mean_by_sign_flips(values, null=0.5, bounds=(0, 1), seed=0)
        assert found.exact == (people == 14)
        assert found.p == pytest.approx(sign_flips(values[None] - 0.5)[0], abs=1e-12 if found.exact else 0.01)
        interval = stats.ttest_1samp(values, 0.5).confidence_interval()
        assert (found.low, found.high) == pytest.approx(tuple(interval), abs=0.02)


def test_holm_is_the_closed_test_of_bonferronis() -> None:
    """A hypothesis is rejected where every intersection that holds it is: p = max over them of count x smallest p."""
    rng = np.random.default_rng(6)
    for count in (1, 2, 3, 6, 6):
        p = np.round(rng.random(count) ** 3, 2).tolist()  # with ties
        sets = [some for size in range(1, count + 1) for some in itertools.combinations(range(count), size)]
        joint = {some: min(1.0, len(some) * min(p[index] for index in some)) for some in sets}
        closed = [max(value for some, value in joint.items() if index in some) for index in range(count)]
        assert holm(p) == pytest.approx(closed, abs=1e-12)


def test_over_seeds_covers_another_training() -> None:
    rng = np.random.default_rng(4)
    shift = rng.normal(0, 0.1, 5)
    values = 0.5 + shift[:, None] + rng.normal(0, 0.01, (5, 200))
    interval = over_seeds(values)
    images_alone = bootstrap(values.mean(0))
    assert interval.high - interval.low > 10 * (images_alone.high - images_alone.low)
    assert interval.mean == pytest.approx(values.mean())


def test_correlation_is_pearsons() -> None:
    rng = np.random.default_rng(5)
    first = rng.normal(0, 1, 150)
    second = first + rng.normal(0, 1, 150)
    interval = correlation(first, second)
    assert interval.mean == pytest.approx(stats.pearsonr(first, second).statistic)
    low, high = stats.pearsonr(first, second).confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.04)
    assert correlation(first, np.ones(150)).mean == 0


def test_what_has_no_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="finite values"):
        bootstrap([1.0, math.nan])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_the_number_of_images_to_decide_a_difference_has_the_power_that_it_claims() -> None:
    pilot = np.array([1] * 14 + [-1] * 8 + [0] * 78)
    needed = images_to_decide(pilot)
    assert needed is not None
    drawn = np.random.default_rng(0).choice(pilot, size=(4000, needed))
    z = drawn.mean(axis=1) / (drawn.std(axis=1) / math.sqrt(needed))
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=0.03)
    assert images_to_decide([1, -1, 0]) is None
    assert images_to_decide([0.5, 0.5]) == 1


def test_the_lower_bound_is_clopper_and_pearsons() -> None:
    for successes, trials, confidence in (
        (1, 1, 0.95),
        (3, 7, 0.9),
        (12, 12, 0.99),
        (478, 500, 0.95),
        (1, 20_000, 0.5),
    ):
        expected = stats.beta.ppf(1 - confidence, successes, trials - successes + 1)
        assert lower_bound(successes, trials, confidence) == pytest.approx(expected, abs=1e-9)
    # of 2 of 3 successes: 3 p^2 (1 - p) + p^3 = 0.5 at p = 0.5
    assert lower_bound(2, 3, 0.5) == pytest.approx(0.5)
    assert lower_bound(0, 5) == 0
    with pytest.raises(ValueError, match="from 0 to 3 successes"):
        lower_bound(4, 3)
