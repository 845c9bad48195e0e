"""Agreement between people on the same photos: Krippendorff's alpha for names, some answers missing.

    alpha = 1 - D_o / D_e,    D_o = 1/n sum_{c != k} o_ck,    D_e = sum_{c != k} n_c n_k / (n (n - 1))

with o_ck = sum over photos u of (ordered pairs of answers c and k given to u by two people) / (m_u - 1), m_u the
answers to u (at least 2, or u does not count), n_c the answers c among them and n their sum (Krippendorff 2004,
section 11.3). 1 is full agreement, 0 what chance gives, below 0 less. Where everyone always gives the same answer
D_e is 0: nothing varies, alpha has no value, and the share of agreeing pairs, 1, says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha with its interval over photos, and the share of pairs of answers that agree."""

    alpha: float | None
    low: float | None
    high: float | None
    pairs_agreeing: float | None
    photos: int


def agreement(counts: npt.ArrayLike, *, level: float = 0.95, draws: int = 2_000, seed: int) -> Agreement:
    """(U, C) how many people gave photo u the answer c -> alpha; the interval draws photos with replacement."""
    table = np.asarray(counts, np.float64)
    table = table[table.sum(axis=1) >= 2]
    if not len(table):
        return Agreement(None, None, None, None, 0)
    alpha, agreeing = _alphas(table, np.ones((1, len(table))))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=draws).astype(np.float64)
    resampled, _ = _alphas(table, drawn)
    resampled = resampled[np.isfinite(resampled)]
    found = float(alpha[0]) if np.isfinite(alpha[0]) else None
    low, high = None, None
    if found is not None and len(table) > 1 and len(resampled):
        low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Agreement(found, low, high, float(agreeing[0]), len(table))


def _alphas(table: Floats, times: Floats) -> tuple[Floats, Floats]:
    """(U, C) counts, photo u taken `times` (S, U) -> (S,) alpha, nan where nothing varies; (S,) pairs agreeing."""
    m = table.sum(axis=1)
    same = (table * (table - 1)).sum(axis=1) / (m - 1)  # of the m of a photo, those that agree, in pairs
    n, by_answer = times @ m, times @ table
    differing = 1 - times @ same / n
    expected = 1 - (by_answer * (by_answer - 1)).sum(axis=1) / (n * (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = np.where(expected > 1e-12, 1 - differing / expected, np.nan)
    return alpha, 1 - differing
