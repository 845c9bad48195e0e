"""Intervals that cover, tests that hold their level, corrections as statsmodels has them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from bla.metrics.statistics import bootstrap, correlation, holm, over_seeds, paired, student


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
    assert paired([1, 2, 4], [0, 1, 3]).p == 0.25
    assert paired([1.0, 1.0], [1.0, 1.0]).p == 1
    rng = np.random.default_rng(2)
    first = rng.normal(0, 1, 100)
    second = first + rng.normal(0.2, 1, 100)
    found = paired(first, second)
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.015)
    assert found.difference == pytest.approx((first - second).mean())
    assert paired(second, first).difference == -found.difference
    assert paired(first, first + 5 + rng.normal(0, 0.1, 100)).p == pytest.approx(1 / 5000)


def test_the_paired_test_holds_its_level() -> None:
    rng = np.random.default_rng(3)
    p = [paired(*rng.normal(0, 1, (2, 30))).p for _ in range(300)]
    assert np.mean(np.array(p) < 0.05) < 0.09


def test_holm_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(6)
    for count in (1, 2, 3, 12):
        for _ in range(2):
            p = np.round(rng.random(count) ** 3, 2).tolist()  # with ties
            assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-12)


def test_over_seeds_covers_another_training() -> None:
    rng = np.random.default_rng(4)
    shift = rng.normal(0, 0.1, 5)
    values = 0.5 + shift[:, None] + rng.normal(0, 0.01, (5, 200))
    interval = over_seeds(values)
    images_alone = bootstrap(values.mean(0))
    assert interval.high - interval.low > 10 * (images_alone.high - images_alone.low)
    assert interval.mean == pytest.approx(values.mean())
    mean, half = student(values.mean(1))
    assert half == pytest.approx(stats.sem(values.mean(1)) * stats.t.ppf(0.975, 4))
    assert math.isnan(student([mean])[1])


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
    with pytest.raises(ValueError, match="the same images"):
        paired([1.0, 2.0], [1.0])
