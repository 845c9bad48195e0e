"""The mean by sign flips against exact arithmetic, hand-computed cases and scipy."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bla.metrics import statistics
from bla.metrics.statistics import mean_by_sign_flips, sign_flips

SHARE = {"null": 0.5, "bounds": (0.0, 1.0), "seed": 0}
shares = st.lists(st.fractions(0, 1, max_denominator=12), min_size=1, max_size=8)


def slow_p(values: list[Fraction], null: Fraction) -> float:
    """Go through all assignments of signs, in exact arithmetic."""
    deviations = [value - null for value in values]
    observed = sum(deviations)
    sums = [
        sum(s * d for s, d in zip(signs, deviations, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    above = sum(s >= observed for s in sums)
    below = sum(s <= observed for s in sums)
    return min(1.0, 2 * min(above, below) / len(sums))


@given(shares)
@settings(max_examples=40, deadline=None)
def test_sign_flips_are_those_of_exact_arithmetic(values: list[Fraction]) -> None:
    found = mean_by_sign_flips([float(v) for v in values], **SHARE)
    assert found.p == pytest.approx(slow_p(values, Fraction(1, 2)))
    assert found.exact
    assert found.mean == pytest.approx(float(sum(values) / len(values)))
    together = sign_flips(np.array([[float(v) - 0.5 for v in values]]), draws=99, seed=1)
    assert together[0] == pytest.approx(found.p)


@given(shares.filter(lambda values: len(values) >= 6), st.fractions(0, 1, max_denominator=30))
@settings(max_examples=20, deadline=None)
def test_the_interval_holds_exactly_the_means_that_are_not_rejected(values: list[Fraction], mu: Fraction) -> None:
    found = mean_by_sign_flips([float(v) for v in values], **SHARE)
    for null in (mu, *values):
        if min(abs(float(null) - end) for end in (found.low, found.high)) > 1e-6:
            assert (found.low < float(null) < found.high) == (slow_p(values, null) > 0.05)


def test_hand_computed() -> None:
    # six of six on one side: 2 of the 64 assignments are as far out
    found = mean_by_sign_flips([0.6, 0.7, 0.6, 0.8, 0.9, 0.7], **SHARE)
    assert found.p == pytest.approx(2 / 64)
    assert (found.low, found.high) == pytest.approx((0.6, 0.9))
    # five people cannot exclude anything at 95%
    found = mean_by_sign_flips([0.6, 0.7, 0.6, 0.8, 0.9], **SHARE)
    assert found.p == pytest.approx(2 / 32)
    assert (found.low, found.high) == (0.0, 1.0)


def test_all_the_same_and_all_half() -> None:
    half = mean_by_sign_flips([0.5] * 30, **SHARE)
    assert (half.p, half.low, half.high) == (1.0, 0.5, 0.5)
    ones = mean_by_sign_flips([1.0] * 8, **SHARE)
    assert ones.p == pytest.approx(2 / 2**8)


@pytest.mark.parametrize("people", [17, 40])
def test_random_subsets_agree_with_scipy_and_with_student(people: int) -> None:
    rng = np.random.default_rng(people)
    values = rng.binomial(30, stats.logistic.cdf(rng.normal(0.35, 0.8, people))) / 30
    found = mean_by_sign_flips(values, **SHARE)
    assert not found.exact
    reference = stats.permutation_test(
        (values - 0.5,), np.mean, permutation_type="samples", n_resamples=50_000, rng=np.random.default_rng(1)
    )
    assert found.p == pytest.approx(reference.pvalue, abs=0.01)
    student = stats.ttest_1samp(values, 0.5)
    assert found.p == pytest.approx(student.pvalue, abs=0.02)
    interval = student.confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(interval), abs=0.02)


def test_random_subsets_agree_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).binomial(20, 0.6, 14) / 20
    every = mean_by_sign_flips(values, **SHARE)
    monkeypatch.setattr(statistics, "ENUMERATED", 5)
    some = mean_by_sign_flips(values, **SHARE)
    assert (every.exact, some.exact) == (True, False)
    assert some.p == pytest.approx(every.p, abs=0.005)
    assert (some.low, some.high) == pytest.approx((every.low, every.high), abs=0.005)


@given(shares, st.randoms())
@settings(max_examples=30, deadline=None)
def test_order_does_not_matter_and_swapped_arms_mirror(values: list[Fraction], random: object) -> None:
    x = [float(v) for v in values]
    found = mean_by_sign_flips(x, **SHARE)
    shuffled = list(x)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert mean_by_sign_flips(shuffled, **SHARE) == found
    mirrored = mean_by_sign_flips([1 - v for v in x], **SHARE)
    assert mirrored.p == found.p
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


def test_order_does_not_matter_to_random_subsets() -> None:
    values = np.random.default_rng(0).random(40)
    assert mean_by_sign_flips(values, **SHARE) == mean_by_sign_flips(values[::-1], **SHARE)


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([np.nan], 0.95), ([[0.5]], 0.95), ([0.5], 1.0)])
def test_what_cannot_be_averaged_is_refused(values: list[float], level: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        mean_by_sign_flips(values, level=level, **SHARE)
