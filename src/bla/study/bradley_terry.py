"""Strengths of several arms from choices between two at a time (Bradley & Terry 1952).

    P(a is chosen over b) = 1 / (1 + exp(s_b - s_a)),    sum of s = 0

fitted by the mode under s_a ~ N(0, 2^2) of each arm: with W_ab the times that a was chosen over b,

    maximise  sum_ab W_ab log P(a over b) - sum_a s_a^2 / (2 * 2^2).

The prior keeps the strength of an arm that always wins, or was never shown, finite, where maximum likelihood diverges.
It is wide (a difference of 2.8 logits, .94 to .06, is one standard deviation), so that 100 choices outweigh it. The
posterior is strictly concave; Newton's method with step halving finds its one maximum. Arms that no chain of
comparisons connects are not comparable: only the prior places one group (`connected`) beside the other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from bla.study.errors import AnalysisError

Floats = npt.NDArray[np.float64]

PRIOR = 2.0
"""Standard deviation of an arm's strength before any choice, in logits."""


def strengths(wins: npt.ArrayLike) -> Floats:
    """(..., K, K) times that the row's arm was chosen over the column's -> (..., K) strengths in logits, mean 0."""
    w = np.asarray(wins, np.float64)
    if w.ndim < 2 or w.shape[-1] != w.shape[-2] or (w < 0).any() or not np.isfinite(w).all():
        raise AnalysisError(f"expected counts (..., K, K), none negative, got shape {w.shape}")
    flat = w.reshape(-1, *w.shape[-2:]).copy()
    arms = flat.shape[-1]
    flat[:, range(arms), range(arms)] = 0
    met = flat + flat.transpose(0, 2, 1)
    s = np.zeros(flat.shape[:2])
    current = _posterior(flat, s)
    for _ in range(100):
        chance = expit(s[:, :, None] - s[:, None, :])
        gradient = (flat - met * chance).sum(axis=2) - s / PRIOR**2
        curvature = -met * chance * (1 - chance)
        curvature[:, range(arms), range(arms)] = -curvature.sum(axis=2) + 1 / PRIOR**2
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        if np.abs(step).max(initial=0.0) < 1e-10:
            break
        for _ in range(30):  # halve the steps that lead down
            proposed = _posterior(flat, s + step)
            worse = proposed < current - 1e-9 * (1 + np.abs(current))
            if not worse.any():
                break
            step[worse] /= 2
        s, current = s + step, proposed
    return np.asarray((s - s.mean(axis=-1, keepdims=True)).reshape(w.shape[:-1]), np.float64)


def _posterior(wins: Floats, s: Floats) -> Floats:
    likelihood = -(wins * np.logaddexp(0.0, s[:, None, :] - s[:, :, None])).sum(axis=(1, 2))
    return np.asarray(likelihood - (s**2).sum(axis=1) / (2 * PRIOR**2), np.float64)


def bootstrapped(wins: npt.ArrayLike, *, draws: int = 2_000, seed: int) -> Floats:
    """(I, K, K) wins of each person -> (draws, K) strengths, people drawn with replacement."""
    w = np.asarray(wins, np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(w), np.full(len(w), 1 / len(w)), size=draws).astype(np.float64)
    return strengths(np.tensordot(drawn, w, axes=1))


def connected(wins: npt.ArrayLike) -> list[list[int]]:
    """The groups of arms that some chain of comparisons connects, each sorted."""
    met = np.asarray(wins, np.float64) > 0
    count, group = connected_components(met, directed=False)
    return [np.flatnonzero(group == number).tolist() for number in range(count)]
