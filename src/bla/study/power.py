"""How many people a study needs: the registered test itself, on simulated studies.

Power is the share of studies, in which the stated effect holds, whose registered test finds it. Studies are drawn as
`simulation` says, people and photos varying, and tested as `analysis` tests. Exact tests of counts have a power that
goes up and down with the number of people (of 199 people more than of 200), and simulated power wavers, too. So the
number is chosen so: halving between a number that falls short and one that does not, and trying the saw's next teeth
above, gives the smallest n tried above all that fell short; then new studies of n people, which had no part in the
choice, give the power that is promised, and its interval. Should that be below the wanted power, n is raised by a
twentieth and measured anew.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bla.progress import Progress
from bla.study import crossed, signflip
from bla.study.errors import AnalysisError
from bla.study.plan import Plan, Population
from bla.study.simulation import Behaviour, Trials, studies_in_memory

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DRAWS = 4_999
"""Random subsets of a simulated study's test: the same test, its p-values on a coarser grid than a real study's."""
MOST = 2_000
"""People, beyond which no study is searched for."""
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
    tried: tuple[tuple[int, float], ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; all of it simulated, as it says."""
        return {
            "simulated": True,
            "people": self.promised.people,
            "wanted": self.wanted,
            "promised": asdict(self.promised),
            "tried": [{"people": people, "power": power} for people, power in self.tried],
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Effect:
    """What is to be found, among whom, and by which test.

    `share` is the mean share of main trials that the first arm wins, before noise; with `against` it is the share of
    right answers with the first arm, and `against` that with the second. `comparisons` is how many pairs of arms are
    tested: each at alpha / comparisons, which Holm's correction is never stricter than.
    """

    share: float
    behaviour: Behaviour
    trials: Trials
    against: float | None = None
    population: Population = "people"
    alpha: float = 0.05
    comparisons: int = 1

    @property
    def null(self) -> float:
        """The first share if there is nothing to find."""
        return 0.5 if self.against is None else self.against

    def __post_init__(self) -> None:
        """Refuse what has no power."""
        for share in (self.share, self.null):
            if not 0 < share < 1:
                raise AnalysisError(f"expected a share between 0 and 1, got {share}")
        if self.against is not None and self.trials.each < 2:
            raise AnalysisError("expected at least 2 trials a person, one with each arm, got 1")
        if not 0 < self.alpha < 1 or self.comparisons < 1:
            raise AnalysisError(
                f"expected alpha between 0 and 1 and at least 1 comparison, got {self.alpha}, {self.comparisons}"
            )
        if self.population == "people and photos" and self.trials.photos < 2:
            raise AnalysisError("expected at least 2 photos to say anything about others, got 1")


def effect_of(
    share: float,
    behaviour: Behaviour,
    plan: Plan | None = None,
    *,
    against: float | None = None,
    photos: int | None = None,
    trials: int | None = None,
    arms: int | None = None,
    alpha: float | None = None,
    population: Population | None = None,
) -> Effect:
    """An effect between two of a plan's arms, or of a study of 30 photos and 2 arms; what is given goes before both.

    Of several arms each pair is shown in its part of the trials.
    """
    if plan is not None and (plan.task == "preference") != (against is None):
        raise AnalysisError(
            f"expected {'no ' if plan.task == 'preference' else ''}share of right answers with the other arm, "
            f"for this study's task is {plan.task}"
        )
    rules = None if plan is None else plan.exclusions
    if photos is None:
        photos = 30 if plan is None else len(plan.photos)
    if trials is None:
        trials = photos if plan is None else min(plan.trials, photos)
    if arms is None:
        arms = 2 if plan is None else len(plan.arms)
    if alpha is None:
        alpha = 0.05 if plan is None else plan.analysis.alpha
    if arms < 2:
        raise AnalysisError(f"expected at least 2 arms, got {arms}")
    pairs = arms * (arms - 1) // 2
    # Side by side a trial is about one pair; else about one arm, and two arms of them are compared.
    each = trials // pairs if against is None else 2 * trials // arms
    if each < 1:
        raise AnalysisError(f"expected a trial or more of each of {pairs} pairs of arms, got {trials} trials")
    return Effect(
        share,
        behaviour,
        Trials(
            photos,
            each,
            catches=0 if plan is None else len(plan.catches),
            passes=0 if rules is None else rules.catches_to_pass,
            complete=0.0 if rules is None else rules.share_to_complete,
        ),
        against=against,
        population=population or ("people" if plan is None else plan.analysis.population),
        alpha=alpha,
        comparisons=pairs,
    )


def power_of(
    effect: Effect, people: int, *, studies: int = 2_000, seed: int = 0, report: Progress | None = None
) -> Power:
    """The power of a study of `people` recruited people."""
    if people < 2 or studies < 1:
        raise AnalysisError(f"expected at least 2 people and 1 study, got {people} and {studies}")
    found, analysed, total = 0, 0.0, 0.0
    rng = np.random.default_rng([seed, people])
    done = 0
    for size in _portions(studies, people * effect.trials.photos):
        outcomes, second = _drawn(effect, people, size, rng)
        p = p_values(outcomes, second, effect, seed=seed + done)  # with one seed all would share one set of subsets
        found += int((p <= effect.alpha / effect.comparisons).sum())
        values = _values(outcomes, second, effect)
        there = ~np.isnan(values)
        analysed += float(there.sum()) / people
        total += float(values[there].sum()) / max(int(there.sum()), 1) * size
        done += size
        if report is not None:
            report(f"simulating studies of {people} people", done, studies)
    low, high = wilson(found, studies)
    return Power(people, found / studies, low, high, studies, analysed / studies * people, total / studies)


def people_needed(
    effect: Effect,
    power: float = 0.8,
    *,
    studies: int = 2_000,
    most: int = MOST,
    seed: int = 0,
    report: Progress | None = None,
) -> Needed:
    """The people to recruit so that the study finds the effect with the wanted power."""
    if effect.share == effect.null:
        raise AnalysisError(
            f"expected an effect to find, got {effect.share} against {effect.null}: no number of people finds what is "
            "not there"
        )
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
    for people in range(high + step, high + 4 * step, step):  # the saw's next teeth
        measured(people)
    short = [people for people, value in tried.items() if value < power]
    chosen = min(people for people in tried if people > max(short, default=0))
    while True:
        promised = power_of(effect, chosen, studies=studies, seed=seed + 1, report=report)
        if promised.power >= power or chosen >= most:
            break
        chosen += max(1, chosen // 20)
    settings = asdict(effect) | {"seed": seed, "studies": studies}
    return Needed(promised, power, tuple(sorted(tried.items())), settings)


def p_values(outcomes: Floats, second: Bools, effect: Effect, *, seed: int) -> Floats:
    """(S, I, J) outcomes, nan where there is none, and whether they are of the second arm -> (S,) p-values.

    They are those of the registered test, over the effect's population.
    """
    values = _values(outcomes, second, effect)
    analysed = ~np.isnan(values)
    if effect.population == "people":
        null = 0.5 if effect.against is None else 0.0
        return signflip.p_values(np.where(analysed, values - null, 0.0), draws=DRAWS, seed=seed)
    people = np.maximum(analysed.sum(axis=1), 1)
    terms = []
    for sign, mask in _arms(second, effect):
        there = ~np.isnan(outcomes) & mask & analysed[:, :, None]
        weights = there / np.maximum(there.sum(axis=2), 1)[:, :, None] / people[:, None, None]
        terms.append((sign, np.where(there, outcomes, 0.0) * weights, weights))
    return crossed.p_values(terms, null=0.5 if effect.against is None else 0.0)


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


def _drawn(effect: Effect, people: int, studies: int, rng: np.random.Generator) -> tuple[Floats, Bools]:
    return studies_in_memory(
        effect.share,
        effect.behaviour,
        effect.trials,
        people,
        studies,
        against=effect.against,
        population=effect.population,
        rng=rng,
    )


def _portions(studies: int, cells: int) -> list[int]:
    size = max(1, min(_TOGETHER, _CELLS // cells))
    return [min(size, studies - start) for start in range(0, studies, size)]


def wilson(found: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a share.

    >>> [round(end, 3) for end in wilson(60, 100)]
    [0.502, 0.691]
    """
    share = found / of
    middle = (share + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * (share * (1 - share) / of + z**2 / (4 * of**2)) ** 0.5
    return middle - half, middle + half
