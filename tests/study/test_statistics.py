"""The statistics of the study against slow references, hand-computed cases, scipy and statsmodels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from bla.study import agreement, bradley_terry, crossed
from bla.study.errors import AnalysisError

SHARE = {"null": 0.5, "bounds": (0.0, 1.0), "seed": 0}


def crossed_data(people: int = 12, photos: int = 9, missing: float = 0.2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(5)
    logit = rng.normal(0, 1, (people, 1)) + rng.normal(0, 1, (1, photos))
    y = (rng.random((people, photos)) < stats.logistic.cdf(logit)).astype(float)
    i, j = np.nonzero(rng.random((people, photos)) >= missing)
    return y[i, j], i, j


def test_two_way_variance_is_that_of_statsmodels() -> None:
    y, i, j = crossed_data()
    found = crossed.mean_over_people_and_photos(y, i, j, np.ones(len(y)), **SHARE)
    import statsmodels.api as sm

    fit = sm.OLS(y, np.ones((len(y), 1))).fit()
    parts = [
        fit.get_robustcov_results("cluster", groups=groups, use_correction=False).cov_params()[0, 0]
        for groups in (i, j, np.arange(len(y)))
    ]
    n, m = len(set(i)), len(set(j))
    variance = n / (n - 1) * parts[0] + m / (m - 1) * parts[1] - parts[2]
    freedom = variance**2 / ((n / (n - 1) * parts[0]) ** 2 / (n - 1) + (m / (m - 1) * parts[1]) ** 2 / (m - 1))
    assert found.freedom == pytest.approx(freedom)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(y.mean() - 0.5) / variance**0.5, freedom))
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, freedom) * variance**0.5)
    assert found.mean == pytest.approx(y.mean())
    assert found.bootstrap[0] < found.mean < found.bootstrap[1]


def test_two_way_bootstrap_is_the_slow_one() -> None:
    y, i, j = crossed_data(6, 5, 0.1)
    weights = 1 / np.bincount(i)[i]
    found = crossed.mean_over_people_and_photos(y, i, j, weights, draws=4_000, **SHARE)
    rng = np.random.default_rng(8)
    means = []
    for _ in range(2_000):
        people, photos = rng.integers(0, 6, 6), rng.integers(0, 5, 5)
        drawn = [k for a in people for b in photos for k in np.flatnonzero((i == a) & (j == b))]
        means.append(np.average(y[drawn], weights=weights[drawn]))
    low, high = found.bootstrap
    assert found.bootstrap == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.04)
    assert high - low == pytest.approx(np.subtract(*np.quantile(means, [0.975, 0.025])), rel=0.06)


def test_a_difference_of_two_means_is_that_of_a_regression() -> None:
    y, i, j = crossed_data(14, 10, 0.0)
    shown = (i + j) % 2 == 1
    found = crossed.mean_over_people_and_photos(
        y, i, j, np.ones(len(y)), against=shown, null=0.0, bounds=(-1.0, 1.0), seed=0
    )
    import statsmodels.api as sm

    fit = sm.OLS(y, np.column_stack([np.ones(len(y)), ~shown])).fit()
    parts = [
        fit.get_robustcov_results("cluster", groups=groups, use_correction=False).cov_params()[1, 1]
        for groups in (i, j, np.arange(len(y)))
    ]
    variance = max(14 / 13 * parts[0] + 10 / 9 * parts[1] - parts[2], 14 / 13 * parts[0], 10 / 9 * parts[1])
    assert found.mean == pytest.approx(fit.params[1])
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, found.freedom) * variance**0.5)
    mirrored = crossed.mean_over_people_and_photos(
        y, i, j, np.ones(len(y)), against=~shown, null=0.0, bounds=(-1.0, 1.0), seed=0
    )
    assert (mirrored.mean, mirrored.p) == pytest.approx((-found.mean, found.p))


def test_many_crossed_tests_at_once_are_the_single_ones() -> None:
    y, i, j = crossed_data()
    weights = 1 / np.bincount(i)[i] / len(set(i))
    single = crossed.mean_over_people_and_photos(y, i, j, weights, draws=10, **SHARE)
    cells = np.zeros((1, 12, 9)), np.zeros((1, 12, 9))
    cells[0][0, i, j] = weights * y
    cells[1][0, i, j] = weights
    assert crossed.p_values([(1.0, *cells)], null=0.5)[0] == pytest.approx(single.p)


def test_crossed_where_everyone_always_chooses_the_same() -> None:
    i, j = np.divmod(np.arange(48), 6)
    found = crossed.mean_over_people_and_photos(np.ones(48), i, j, np.ones(48), draws=50, **SHARE)
    assert found.p == pytest.approx(2 * 0.5**6), "the sign test on the 6 photos"
    assert (found.low, found.high) == pytest.approx((stats.binomtest(6, 6).proportion_ci().low, 1.0))
    mirrored = crossed.mean_over_people_and_photos(np.zeros(48), i, j, np.ones(48), draws=50, **SHARE)
    assert (mirrored.low, mirrored.high) == pytest.approx((0.0, 1 - found.low))
    with pytest.raises(AnalysisError, match="at least 2 people and 2 photos"):
        crossed.mean_over_people_and_photos([1.0, 1.0], [0, 1], [0, 0], [1, 1], **SHARE)


def slow_strengths(wins: np.ndarray) -> np.ndarray:
    def loss(s: np.ndarray) -> float:
        prior = float((s**2).sum()) / (2 * bradley_terry.PRIOR**2)
        pairs = itertools.permutations(range(len(s)), 2)
        return prior + sum(wins[a, b] * np.log1p(np.exp(s[b] - s[a])) for a, b in pairs)

    s = optimize.minimize(loss, np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-8}).x
    return np.asarray(s - s.mean())


@given(st.lists(st.integers(0, 40), min_size=9, max_size=9))
@settings(max_examples=30, deadline=None)
def test_strengths_are_the_mode(counts: list[int]) -> None:
    wins = np.array(counts, float).reshape(3, 3)
    found = bradley_terry.strengths(wins)
    assert found == pytest.approx(slow_strengths(wins), abs=1e-3)
    assert found.sum() == pytest.approx(0, abs=1e-9)
    order = [2, 0, 1]
    assert bradley_terry.strengths(wins[np.ix_(order, order)]) == pytest.approx(found[order], abs=1e-7)
    assert bradley_terry.strengths(wins.T) == pytest.approx(-found, abs=1e-7), "losing for winning"


def test_many_choices_outweigh_the_prior() -> None:
    truth = np.array([0.8, 0.1, -0.9])
    met = 4_000
    wins = np.triu(np.random.default_rng(0).binomial(met, stats.logistic.cdf(truth[:, None] - truth[None, :])), 1)
    wins = wins + np.tril(met - wins.T, -1)
    assert bradley_terry.strengths(wins) == pytest.approx(truth, abs=0.06)
    # maximum likelihood by logistic regression on the same counts
    rows, successes = [], []
    for a, b in itertools.combinations(range(3), 2):
        rows.append([(a == 0) - (b == 0), (a == 1) - (b == 1)])
        successes.append([wins[a, b], wins[b, a]])
    # the third arm's strength is the reference: rows of it are minus the other's
    import statsmodels.api as sm

    fit = sm.GLM(np.array(successes), np.array(rows, float), family=sm.families.Binomial()).fit()
    reference = np.array([*fit.params, 0.0])
    assert bradley_terry.strengths(wins) == pytest.approx(reference - reference.mean(), abs=1e-3)


def test_strengths_where_one_always_wins_and_where_nothing_was_asked() -> None:
    wins = np.array([[0, 1_000_000, 1_000_000], [0, 0, 500_000], [0, 500_000, 0]], float)
    found = bradley_terry.strengths(wins)
    assert np.isfinite(found).all()
    assert found[0] > 5 > found[1] == pytest.approx(found[2])
    assert bradley_terry.strengths(np.zeros((3, 3))) == pytest.approx(np.zeros(3))
    with pytest.raises(AnalysisError, match="none negative"):
        bradley_terry.strengths([[0, -1], [1, 0]])


def test_groups_that_no_comparison_connects() -> None:
    wins = np.zeros((5, 5))
    wins[0, 3], wins[3, 1], wins[2, 4] = 1, 1, 1
    assert bradley_terry.connected(wins) == [[0, 1, 3], [2, 4]]


def test_the_bootstrap_of_strengths_draws_people() -> None:
    rng = np.random.default_rng(0)
    people = np.zeros((40, 2, 2))
    won = rng.binomial(10, stats.logistic.cdf(rng.normal(0.5, 1.5, 40)))
    people[:, 0, 1], people[:, 1, 0] = won, 10 - won
    drawn = bradley_terry.bootstrapped(people, draws=800, seed=0)
    assert drawn.shape == (800, 2)
    slow = [slow_strengths(people[rng.integers(0, 40, 40)].sum(axis=0))[0] for _ in range(200)]
    assert drawn[:, 0].std() == pytest.approx(np.std(slow), rel=0.2)
    pooled = 0.5 * (1 / won.sum() + 1 / (400 - won.sum())) ** 0.5
    assert drawn[:, 0].std() > 1.5 * pooled, "people differ: trials are no units"


def slow_alpha(answers: list[list[int | None]]) -> float:
    """All pairs of answers, written out: rows are people, columns photos."""
    photos = [[a for a in column if a is not None] for column in zip(*answers, strict=True)]
    photos = [photo for photo in photos if len(photo) > 1]
    n = sum(map(len, photos))
    observed = sum(sum(a != b for a, b in itertools.permutations(photo, 2)) / (len(photo) - 1) for photo in photos) / n
    everything = [a for photo in photos for a in photo]
    expected = sum(a != b for a, b in itertools.permutations(everything, 2)) / (n * (n - 1))
    return 1 - observed / expected if expected else float("nan")


@given(st.lists(st.lists(st.sampled_from([None, 0, 1, 2]), min_size=6, max_size=6), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_alpha_is_the_slow_one(answers: list[list[int | None]]) -> None:
    counts = [[sum(row[u] == c for row in answers) for c in range(3)] for u in range(6)]
    found = agreement.agreement(counts, draws=20, seed=0)
    if found.photos:
        reference = slow_alpha(answers)
        assert (found.alpha is None) == np.isnan(reference)
        if found.alpha is not None:
            assert found.alpha == pytest.approx(reference)


def test_alpha_of_krippendorffs_example_with_missing_answers() -> None:
    # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: 4 observers, 12 units, nominal .743
    rows = ["1 2 3 3 2 1 4 1 2 * * *", "1 2 3 3 2 2 4 1 2 5 * 3", "* 3 3 3 2 3 4 2 2 5 1 *", "1 2 3 3 2 4 4 1 2 5 1 *"]
    answers = [[None if c == "*" else int(c) for c in row.split()] for row in rows]
    counts = [[sum(row[u] == c for row in answers) for c in range(1, 6)] for u in range(12)]
    found = agreement.agreement(counts, seed=0)
    assert found.alpha == pytest.approx(0.743, abs=0.001)
    assert found.photos == 11
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.alpha < found.high


def test_alpha_where_all_agree_or_nobody_answered() -> None:
    alike = agreement.agreement([[5, 0], [4, 0]], seed=0)
    assert (alike.alpha, alike.pairs_agreeing) == (None, 1.0)
    assert agreement.agreement([[1, 0], [0, 0]], seed=0).photos == 0
    split = agreement.agreement([[5, 0], [0, 5]], seed=0)
    assert split.alpha == 1.0
