"""Simulated people: answers drawn from a stated model, as a pure function of a seed.

Person i, looking at photo j, chooses arm a over arm b with

    logit P = (s_a - s_b) + (u_ia - u_ib) + (v_ja - v_jb) + side * (+1 if a stands on the left, else -1)
    u_ia ~ N(0, person_sd^2 / 2),    v_ja ~ N(0, photo_sd^2 / 2)

so that between two arms people differ by person_sd logits and photos by photo_sd (logit-normal). In tasks with a right
answer, arm a is answered correctly with logit P = s_a + u_ia + v_ja (and u, v with the whole variance). A share `noise`
of the answers is drawn by a fair coin; so are all answers of a careless person, attention checks included. With
probability `drop_out` a person leaves before the end, at a uniformly drawn trial.

Nothing that comes from here may be shown without the word "simulated".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from cyclopts import Parameter
from scipy import optimize
from scipy.special import expit

from bla.study.errors import AnalysisError

Floats = npt.NDArray[np.float64]

_FAR = 100.0
_LOGITS = np.linspace(-_FAR, _FAR, 8_001)  # where mean shares are computed; between them they are interpolated
_Z = np.linspace(-8, 8, 321)
_DENSITY = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()
_PHOTOS, _PERSON, _ANSWER = 1, 2, 3  # streams of random numbers


@dataclass(frozen=True)
class Behaviour:
    """How simulated people answer; the model is in the module's docstring. The command line sets all but three."""

    strengths: Annotated[tuple[float, ...], Parameter(parse=False)] = (0.0, 0.0)
    """Logits, one per arm."""
    person_sd: float = 1.0
    """Standard deviation between people in what they prefer, in logits."""
    photo_sd: float = 0.5
    """Standard deviation between photos in which arm they favour, in logits."""
    noise: float = 0.0
    """Share of answers given at random."""
    side: float = 0.0
    """Bias towards the left picture, in logits."""
    drop_out: float = 0.0
    """Share of people who leave before the end."""
    careless: float = 0.0
    """Share of people who answer everything at random, attention checks included."""
    attention: Annotated[float, Parameter(parse=False)] = 1.0
    """Probability that a careful person passes an attention check."""
    seconds: Annotated[float, Parameter(parse=False)] = 5.0
    """Median response time."""

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
class RehearsalBehaviour(Behaviour):
    """The behaviour of a rehearsal's people unless stated otherwise: some leave, some are careless."""

    drop_out: float = 0.05
    """Share of people who leave before the end."""
    careless: float = 0.05
    """Share of people who answer everything at random, attention checks included."""


class Reply(NamedTuple):
    """A simulated answer: yes is the left picture or the right answer."""

    yes: bool
    seconds: float


class Person:
    """One simulated person, who has `trials` trials to answer: determined by the seed and the person's number."""

    def __init__(self, behaviour: Behaviour, seed: int, number: int, trials: int) -> None:
        self.behaviour, self.seed, self.number = behaviour, seed, number
        rng = np.random.default_rng([seed, _PERSON, number])
        self._leanings = rng.normal(0, behaviour.person_sd / 2**0.5, len(behaviour.strengths))
        self.careful = bool(rng.random() >= behaviour.careless)
        leaves = rng.random() < behaviour.drop_out
        at = int(rng.integers(0, max(trials, 1)))
        self.leaves_before = at if leaves else None
        """The first trial, from 0, that the person does not answer."""
        self._pace = float(behaviour.seconds * np.exp(0.3 * rng.standard_normal()))

    def choice(self, trial: int, *, left: int, right: int, photo: int) -> Reply:
        """Answer which of two arms' pictures is better."""
        b = self.behaviour
        shift = photo_leanings(self.seed, photo, len(b.strengths), b.photo_sd / 2**0.5)
        worth = np.asarray(b.strengths) + self._leanings + shift
        return self._reply(trial, worth[left] - worth[right] + b.side)

    def judgement(self, trial: int, *, arm: int, photo: int) -> Reply:
        """Answer a question that has a right answer, with one arm's picture in view."""
        b = self.behaviour
        shift = photo_leanings(self.seed, photo, len(b.strengths), b.photo_sd)
        return self._reply(trial, b.strengths[arm] + self._leanings[arm] * 2**0.5 + shift[arm])

    def catch(self, trial: int) -> Reply:
        """Answer an attention check."""
        rng = self._rng(trial)
        passed = rng.random() < (self.behaviour.attention if self.careful else 0.5)
        return Reply(bool(passed), self._seconds(rng))

    def _reply(self, trial: int, logit: float) -> Reply:
        rng = self._rng(trial)
        at_random = not self.careful or rng.random() < self.behaviour.noise
        yes = bool(rng.random() < (0.5 if at_random else expit(logit)))
        return Reply(yes, self._seconds(rng))

    def _rng(self, trial: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _ANSWER, self.number, trial])

    def _seconds(self, rng: np.random.Generator) -> float:
        return float(self._pace * np.exp(0.5 * rng.standard_normal()))


def photo_leanings(seed: int, photo: int, arms: int, sd: float) -> Floats:
    """(arms,) logits by which photo `photo` favours each arm, with everyone."""
    return np.asarray(np.random.default_rng([seed, _PHOTOS, photo]).normal(0, sd, arms), np.float64)


def centre(share: float, sd: float) -> float:
    """The logit m for which the mean of 1 / (1 + exp(-(m + sd Z))) over a normal Z is `share`.

    >>> round(centre(0.5, 2.0), 6), round(centre(0.6, 0.0), 3)  # the second is log(.6/.4)
    (0.0, 0.405)
    """
    if not 0 < share < 1:
        raise AnalysisError(f"expected a share between 0 and 1, got {share}")
    return _root(lambda logit: expit(logit + sd * _Z) @ _DENSITY - share, -_FAR, _FAR)


def centres(share: float, shifts: Floats, sd: float) -> Floats:
    """(S,) logits m_s with mean over j and Z of sigmoid(m_s + shifts_sj + sd Z) = share, by bisection."""
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
    return np.asarray(expit(_LOGITS[:, None] + sd * _Z) @ _DENSITY, np.float64)


def logit_sd(share: float, variance: float) -> float:
    """The standard deviation in logits, at most 10, of units with this mean share and this variance of shares.

    >>> round(logit_sd(0.5, 0.0434), 2), logit_sd(0.5, 0.0)
    (1.0, 0.0)
    """

    def excess(sd: float) -> float:
        return float(_DENSITY @ (expit(centre(share, sd) + sd * _Z) - share) ** 2 - variance)

    if not 0 < share < 1 or variance <= 0:
        return 0.0
    return 10.0 if excess(10.0) < 0 else _root(excess, 0.0, 10.0)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.brentq(function, low, high))


def strengths_for(shares: Sequence[float], person_sd: float, photo_sd: float) -> tuple[float, ...]:
    """Strengths with which each arm has this mean share: of right answers, or of choices over an arm of strength 0.

    >>> [round(s, 2) for s in strengths_for([0.6], 0.0, 0.0)]
    [0.41]
    """
    return tuple(centre(share, float(np.hypot(person_sd, photo_sd))) for share in shares)


def strengths_on(shares: Sequence[float], behaviour: Behaviour, seed: int, photos: int) -> tuple[float, ...]:
    """Strengths with which each arm has this share of choices over the last on the photos of simulated study `seed`.

    The strength of the last arm is 0.
    """
    sd, last = behaviour.photo_sd / 2**0.5, len(shares)
    leanings = np.stack([photo_leanings(seed, photo, last + 1, sd) for photo in range(photos)])
    found = [
        float(centres(share, (leanings[:, arm] - leanings[:, last])[None], behaviour.person_sd)[0])
        for arm, share in enumerate(shares)
    ]
    return (*found, 0.0)
