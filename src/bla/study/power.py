"""How many people a study needs: the registered test itself, on simulated studies.

Power is the share of studies with the stated effect in which the registered test finds it. It rises and falls with the
number of people (199 people can have more than 200), and simulated power fluctuates, too. So bisection and a few larger
numbers give the smallest n tried above all that fell short; then new studies of n people, which had no part in the
choice, give the power that is promised. Below the wanted power, n is raised by a twentieth and measured anew.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from bla.metrics.statistics import sign_flips
from bla.progress import Progress, silent
from bla.study import crossed
from bla.study.effect import Effect
from bla.study.errors import AnalysisError
from bla.study.simulation import Bools, Floats, simulated_studies

_CELLS, _TOGETHER = 1_500_000, 200  # simulated trials, and studies, at a time


@dataclass(frozen=True)
class Power:
    """The share of simulated studies that found the effect, with its 95% interval (Wilson's) from `studies` of them."""

    people: int
    power: float
    low: float
    high: float
    studies: int
    analysed: float
    """People left after exclusions, on average."""
    mean: float
    """Of what is tested, over all studies: a share, or a difference of two."""

    def to_dict(self, effect: Effect, seed: int) -> dict[str, Any]:
        """As JSON has it; all of it simulated, as it says."""
        return {"simulated": True, **asdict(self), "settings": asdict(effect) | {"seed": seed}}


@dataclass(frozen=True)
class Needed:
    """The people that an effect needs, the power promised for them, and the numbers that were tried on the way."""

    promised: Power
    wanted: float
    tried: list[dict[str, float]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; all of it simulated, as it says."""
        return {"simulated": True, "people": self.promised.people, **asdict(self)}


def power_of(effect: Effect, people: int, *, studies: int = 2_000, seed: int = 0, report: Progress = silent) -> Power:
    """The power of a study of `people` recruited people."""
    if people < 2 or studies < 1:
        raise AnalysisError(f"expected at least 2 people and 1 study, got {people} and {studies}")
    found, analysed, total = 0, 0.0, 0.0
    rng = np.random.default_rng([seed, people])
    portion = max(1, min(_TOGETHER, _CELLS // (people * effect.trials.photos)))
    for start in range(0, studies, portion):
        size = min(portion, studies - start)
        outcomes, second = simulated_studies(effect, people, size, rng)
        p = p_values(outcomes, second, effect, seed=seed + start)  # with one seed all would share one set of subsets
        found += int((p <= effect.alpha / effect.comparisons).sum())
        values = _values(outcomes, second, effect)
        there = ~np.isnan(values)
        analysed += float(there.sum())
        total += float(values[there].sum()) / max(int(there.sum()), 1) * size
        report(f"simulating studies of {people} people", start + size, studies)
    low, high = stats.binomtest(found, studies).proportion_ci(method="wilson")
    return Power(people, found / studies, float(low), float(high), studies, analysed / studies, total / studies)


def people_needed(
    effect: Effect,
    power: float = 0.8,
    *,
    studies: int = 2_000,
    most: int = 2_000,
    seed: int = 0,
    report: Progress = silent,
) -> Needed:
    """The people to recruit so that the study finds the effect with the wanted power."""
    if effect.share == effect.null:
        shares = f"{effect.share} against {effect.null}"
        raise AnalysisError(f"expected an effect to find, got {shares}: no number of people finds what is not there")
    if not 0 < power < 1:
        raise AnalysisError(f"expected a power between 0 and 1, got {power}")
    tried: dict[int, float] = {}

    def measured(people: int) -> float:
        if people not in tried:
            tried[people] = power_of(effect, people, studies=studies, seed=seed, report=report).power
        return tried[people]

    high = 8
    while measured(high) < power:
        if high >= most:
            raise AnalysisError(
                f"expected an effect that at most {most} people can show, but {most} reach a power of "
                f"{tried[high]:.2f}: ask for a larger share, more photos or trials, or a lower power"
            )
        high = min(2 * high, most)
    low = 2 if high == 8 else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measured(middle) >= power else (middle, high)
    step = max(1, high // 50)
    for people in range(high + step, high + 4 * step, step):  # where the power may fall short again
        measured(people)
    short = [people for people, value in tried.items() if value < power]
    chosen = min(people for people in tried if people > max(short, default=0))
    while True:
        promised = power_of(effect, chosen, studies=studies, seed=seed + 1, report=report)
        if promised.power >= power or chosen >= most:
            break
        chosen += max(1, chosen // 20)
    listed: list[dict[str, float]] = [{"people": people, "power": tried[people]} for people in sorted(tried)]
    return Needed(promised, power, listed, asdict(effect) | {"seed": seed, "studies": studies})


def p_values(outcomes: Floats, second: Bools, effect: Effect, *, seed: int) -> Floats:
    """(S, I, J) outcomes, nan where there is none, and whether of the second arm -> (S,) p of the registered test."""
    values = _values(outcomes, second, effect)
    analysed = ~np.isnan(values)
    null = 0.5 if effect.against is None else 0.0
    if effect.population == "people":
        # Fewer random subsets than for a real study: the same test, its p-values on a coarser grid.
        return sign_flips(np.where(analysed, values - null, 0.0), draws=4_999, seed=seed)
    people = np.maximum(analysed.sum(axis=1), 1)
    terms = []
    for sign, mask in _arms(second, effect):
        there = ~np.isnan(outcomes) & mask & analysed[:, :, None]
        weights = there / np.maximum(there.sum(axis=2), 1)[:, :, None] / people[:, None, None]
        terms.append((sign, np.where(there, outcomes, 0.0) * weights, weights))
    return crossed.p_values(terms, null=null)


def _values(outcomes: Floats, second: Bools, effect: Effect) -> Floats:
    """(S, I) the x_i of each person; nan of those who are not compared."""
    values = np.zeros(outcomes.shape[:2])
    for sign, mask in _arms(second, effect):
        there = ~np.isnan(outcomes) & mask
        with np.errstate(invalid="ignore"):
            values += sign * np.where(there, outcomes, 0.0).sum(axis=2) / there.sum(axis=2)
    return values


def _arms(second: Bools, effect: Effect) -> list[tuple[float, Bools]]:
    return [(1.0, ~second)] if effect.against is None else [(1.0, ~second), (-1.0, second)]
