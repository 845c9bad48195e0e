"""People who are not there: answers drawn from a stated model, as a pure function of a seed.

A person i who looks at photo j chooses arm a over arm b with

    logit P = (s_a - s_b) + (u_ia - u_ib) + (v_ja - v_jb) + side * (+1 if a stands on the left, else -1)
    u_ia ~ N(0, person_sd^2 / 2),    v_ja ~ N(0, photo_sd^2 / 2)

so that between two arms people differ by person_sd logits and photos by photo_sd (logit-normal). In tasks with a right
answer arm a is answered rightly with logit P = s_a + u_ia + v_ja (and u, v with the whole variance). A share `noise` of
the answers is a coin's. A careless person's answers all are, and so are the answers to catch trials. With probability
`drop_out` a person leaves before the end, at a trial that is equally likely to be any.

Nothing that comes from here may be shown without the word "simulated".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bla.study.errors import AnalysisError
from bla.study.plan import Population

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_FAR = 100.0
_LOGITS = np.linspace(-_FAR, _FAR, 8_001)  # where mean shares are computed; between them they are interpolated
_Z = np.linspace(-8, 8, 321)
_DENSITY = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()
_PHOTOS, _PERSON, _ANSWER = 1, 2, 3  # streams of random numbers


@dataclass(frozen=True)
class Behaviour:
    """How simulated people answer; the model is in the module's docstring.

    `strengths` are logits, one an arm. `attention` is the chance that a careful person passes a catch trial.
    """

    strengths: tuple[float, ...] = (0.0, 0.0)
    person_sd: float = 1.0
    photo_sd: float = 0.5
    noise: float = 0.0
    side: float = 0.0
    drop_out: float = 0.0
    careless: float = 0.0
    attention: float = 1.0
    seconds: float = 5.0

    def __post_init__(self) -> None:
        """Refuse what is no behaviour."""
        for name in ("noise", "drop_out", "careless", "attention"):
            if not 0 <= getattr(self, name) <= 1:
                raise AnalysisError(f"expected {name} from 0 to 1, got {getattr(self, name)}")
        for name in ("person_sd", "photo_sd"):
            if not 0 <= getattr(self, name) <= 10:
                raise AnalysisError(f"expected {name} from 0 to 10 logits, got {getattr(self, name)}")
        if not self.seconds > 0:
            raise AnalysisError(f"expected seconds above 0, got {self.seconds}")
        if not self.strengths or not np.isfinite([*self.strengths, self.side]).all():
            raise AnalysisError(f"expected finite strengths, at least one, and side bias, got {self.strengths}")


@dataclass(frozen=True)
class Reply:
    """What a simulated person does with a trial: on which side is the choice, whether it is right, how long it took."""

    left: bool
    right_answer: bool
    seconds: float


@dataclass(frozen=True)
class Person:
    """One simulated person. All it does follows from the seed, its number and the trial's."""

    behaviour: Behaviour
    seed: int
    number: int
    leanings: tuple[float, ...]
    careful: bool
    leaves_before: int | None
    """The trial, from 0, at which the person is gone."""
    pace: float

    def choice(self, trial: int, *, left: int, right: int, photo: int) -> Reply:
        """Answer which of two arms' pictures is better."""
        b = self.behaviour
        shift = photo_leanings(self.seed, photo, len(b.strengths), b.photo_sd / 2**0.5)
        worth = np.asarray(b.strengths) + self.leanings + shift
        return self._reply(trial, worth[left] - worth[right] + b.side)

    def judgement(self, trial: int, *, arm: int, photo: int) -> Reply:
        """Answer a question that has a right answer, shown arm's picture."""
        b = self.behaviour
        shift = photo_leanings(self.seed, photo, len(b.strengths), b.photo_sd)
        return self._reply(trial, b.strengths[arm] + self.leanings[arm] * 2**0.5 + shift[arm])

    def catch(self, trial: int) -> Reply:
        """Answer a catch trial."""
        rng = self._rng(trial)
        passed = rng.random() < (self.behaviour.attention if self.careful else 0.5)
        return Reply(left=bool(rng.random() < 0.5), right_answer=bool(passed), seconds=self._seconds(rng))

    def _reply(self, trial: int, logit: float) -> Reply:
        rng = self._rng(trial)
        at_random = not self.careful or rng.random() < self.behaviour.noise
        chance = 0.5 if at_random else float(_sigmoid(np.array(logit)))
        yes = bool(rng.random() < chance)
        return Reply(left=yes, right_answer=yes, seconds=self._seconds(rng))

    def _rng(self, trial: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _ANSWER, self.number, trial])

    def _seconds(self, rng: np.random.Generator) -> float:
        return float(self.pace * np.exp(0.5 * rng.standard_normal()))


def person(behaviour: Behaviour, seed: int, number: int, trials: int) -> Person:
    """Draw person `number` of the study `seed`, who has `trials` trials before them."""
    rng = np.random.default_rng([seed, _PERSON, number])
    leanings = rng.normal(0, behaviour.person_sd / 2**0.5, len(behaviour.strengths))
    careful = bool(rng.random() >= behaviour.careless)
    leaves = rng.random() < behaviour.drop_out
    at = int(rng.integers(0, max(trials, 1)))
    return Person(
        behaviour=behaviour,
        seed=seed,
        number=number,
        leanings=tuple(leanings.tolist()),
        careful=careful,
        leaves_before=at if leaves else None,
        pace=float(behaviour.seconds * np.exp(0.3 * rng.standard_normal())),
    )


def photo_leanings(seed: int, photo: int, arms: int, sd: float) -> Floats:
    """(arms,) by how much photo `photo` favours each arm, with everyone."""
    return np.asarray(np.random.default_rng([seed, _PHOTOS, photo]).normal(0, sd, arms), np.float64)


def centre(share: float, sd: float) -> float:
    """The logit m for which the mean of 1 / (1 + exp(-(m + sd Z))) over a normal Z is `share`.

    >>> round(centre(0.5, 2.0), 6), round(centre(0.6, 0.0), 3)  # the second is log(.6/.4)
    (0.0, 0.405)
    """
    if not 0 < share < 1:
        raise AnalysisError(f"expected a share between 0 and 1, got {share}")
    low, high = -_FAR, _FAR
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(middle + sd * _Z) @ _DENSITY < share else (low, middle)
    return (low + high) / 2


def _centres(share: float, shifts: Floats, sd: float) -> Floats:
    """(S,) logits m_s with mean over j and Z of sigmoid(m_s + shifts_sj + sd Z) = share, by bisection."""
    if not 0 < share < 1:
        raise AnalysisError(f"expected a share between 0 and 1, got {share}")
    low, high = np.full(len(shifts), -_FAR), np.full(len(shifts), _FAR)
    means = _mean_shares(sd)
    for _ in range(50):
        middle = (low + high) / 2
        under = np.interp(middle[:, None] + shifts, _LOGITS, means).mean(axis=1) < share
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return np.asarray((low + high) / 2, np.float64)


@lru_cache(maxsize=64)
def _mean_shares(sd: float) -> Floats:
    """The mean over Z of sigmoid(m + sd Z) for each m of `_LOGITS`, by the trapezoid rule."""
    return np.asarray(_sigmoid(_LOGITS[:, None] + sd * _Z) @ _DENSITY, np.float64)


def logit_sd(share: float, variance: float) -> float:
    """The standard deviation in logits of units whose shares have this mean and this variance, by bisection.

    >>> round(logit_sd(0.5, 0.0434), 2), logit_sd(0.5, 0.0)
    (1.0, 0.0)
    """
    if not 0 < share < 1 or variance <= 0:
        return 0.0
    low, high = 0.0, 10.0
    for _ in range(20):
        middle = (low + high) / 2
        shares = _sigmoid(centre(share, middle) + middle * _Z)
        low, high = (middle, high) if _DENSITY @ (shares - share) ** 2 < variance else (low, middle)
    return (low + high) / 2 if low > 0 else 0.0


def strengths_for(shares: Sequence[float], person_sd: float, photo_sd: float) -> tuple[float, ...]:
    """Strengths of arms so that a person's mean share of choices over the last arm is the one given; the last has 0.

    >>> [round(s, 2) for s in strengths_for([0.6], 0.0, 0.0)]
    [0.41, 0.0]
    """
    return (*(centre(share, float(np.hypot(person_sd, photo_sd))) for share in shares), 0.0)


def strengths_on(shares: Sequence[float], behaviour: Behaviour, seed: int, photos: int) -> tuple[float, ...]:
    """The same on the very photos of the simulated study `seed`, whose leanings would move the shares."""
    arms = len(shares) + 1
    leanings = np.stack([photo_leanings(seed, photo, arms, behaviour.photo_sd / 2**0.5) for photo in range(photos)])
    return (
        *(
            float(_centres(share, (leanings[:, arm] - leanings[:, -1])[None], behaviour.person_sd)[0])
            for arm, share in enumerate(shares)
        ),
        0.0,
    )


def strengths_for_accuracy(shares: Sequence[float], person_sd: float, photo_sd: float) -> tuple[float, ...]:
    """Strengths of arms so that the mean share of right answers with each is the one given."""
    return tuple(centre(share, float(np.hypot(person_sd, photo_sd))) for share in shares)


@dataclass(frozen=True)
class Trials:
    """How a simulated study of two arms is laid out: photos, and how many of them each person is asked about."""

    photos: int
    each: int
    catches: int = 0
    passes: int = 0
    """Catch trials that a person must pass to be analysed."""
    complete: float = 0.0
    """Share of the main trials that a person must have answered to be analysed."""

    def __post_init__(self) -> None:
        """Refuse what cannot be laid out."""
        if not 1 <= self.each <= self.photos:
            raise AnalysisError(f"expected 1 to {self.photos} trials a person, a photo each, got {self.each}")
        if not 0 <= self.passes <= self.catches or not 0 <= self.complete <= 1:
            raise AnalysisError(
                f"expected 0 to {self.catches} catch trials to pass and a share from 0 to 1 of trials to complete, "
                f"got {self.passes} and {self.complete}"
            )


def studies_in_memory(
    share: float,
    behaviour: Behaviour,
    trials: Trials,
    people: int,
    studies: int,
    *,
    against: float | None = None,
    population: Population,
    rng: np.random.Generator,
) -> tuple[Floats, Bools]:
    """(S, I, J) outcomes of many studies of two arms, nan: not asked or excluded; (S, I, J) whether of the second arm.

    Side by side (`against` is None) an outcome is 1 where the first arm is chosen, and all are of the first arm; else
    it is 1 where the answer is right, and half of a person's photos are shown with the second arm, where the mask is
    True. `share` is the first arm's mean over the population, before noise, `against` the second's. For the population
    of people photos are what they are in a study, and shares hold on them: strengths are set to the photos' leanings.
    For people and photos the photos are drawn, too, and their leanings move a study's shares.
    """
    b, shape = behaviour, (studies, people, trials.photos)
    # The place of each photo in each person's own random order. Every second one has the first arm on the left, or is
    # shown with the second arm.
    place = rng.random(shape, np.float32).argsort(axis=2)
    odd = place % 2 == 1
    first = _logits(share, b, shape, population, rng)
    if against is None:
        second = np.zeros(shape, bool)
        logit = first + np.where(odd, -b.side, b.side)
    else:
        second = odd
        logit = np.where(odd, _logits(against, b, shape, population, rng), first)
    careless = rng.random((studies, people, 1)) < b.careless
    coin = careless | (rng.random(shape) < b.noise)
    outcomes = (rng.random(shape) < np.where(coin, 0.5, _sigmoid(logit))).astype(np.float64)
    leaves = np.where(
        rng.random((studies, people)) < b.drop_out, rng.integers(0, trials.each, (studies, people)), trials.each
    )
    outcomes[place >= leaves[:, :, None]] = np.nan  # at most `each` are asked
    passed = rng.binomial(trials.catches, np.where(careless[:, :, 0], 0.5, b.attention))
    out = (passed < trials.passes) | (leaves < trials.complete * trials.each) | (leaves == 0)
    outcomes[out] = np.nan
    return outcomes, second


def _logits(
    share: float, behaviour: Behaviour, shape: tuple[int, int, int], population: Population, rng: np.random.Generator
) -> Floats:
    """(S, I, J) of people and photos drawn anew."""
    b, (studies, people, photos) = behaviour, shape
    photo = rng.normal(0, b.photo_sd, (studies, 1, photos))
    if population == "people":
        middle = _centres(share, photo[:, 0], b.person_sd)
    else:
        middle = np.full(studies, centre(share, float(np.hypot(b.person_sd, b.photo_sd))))
    return np.asarray(middle[:, None, None] + photo + rng.normal(0, b.person_sd, (studies, people, 1)), np.float64)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))), np.float64)
