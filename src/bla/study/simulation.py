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

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize
from scipy.special import expit

from bla.study.behaviour import Behaviour
from bla.study.effect import Effect
from bla.study.errors import AnalysisError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_FAR = 100.0
_LOGITS = np.linspace(-_FAR, _FAR, 8_001)  # where mean shares are computed; between them they are interpolated
_Z = np.linspace(-8, 8, 321)
_DENSITY = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()
_PHOTOS, _PERSON, _ANSWER = 1, 2, 3  # streams of random numbers


class Reply(NamedTuple):
    """A simulated answer: yes is the left picture or the right answer."""

    yes: bool
    seconds: float


class Person:
    """One simulated person with `trials` trials to answer, determined by the seed and the person's number."""

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
        return self._drawn(self._rng(trial), self.behaviour.attention if self.careful else 0.5)

    def _reply(self, trial: int, logit: float) -> Reply:
        rng = self._rng(trial)
        at_random = not self.careful or rng.random() < self.behaviour.noise
        return self._drawn(rng, 0.5 if at_random else float(expit(logit)))

    def _rng(self, trial: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _ANSWER, self.number, trial])

    def _drawn(self, rng: np.random.Generator, probability: float) -> Reply:
        return Reply(bool(rng.random() < probability), float(self._pace * np.exp(0.5 * rng.standard_normal())))


def photo_leanings(seed: int, photo: int, arms: int, sd: float) -> Floats:
    """(arms,) logits by which photo `photo` favours each arm, with everyone."""
    return np.asarray(np.random.default_rng([seed, _PHOTOS, photo]).normal(0, sd, arms), np.float64)


def centre(share: float, sd: float) -> float:
    """The logit m for which the mean of 1 / (1 + exp(-(m + sd Z))) over a normal Z is `share`."""
    if not 0 < share < 1:
        raise AnalysisError(f"expected a share between 0 and 1, got {share}")
    return float(optimize.brentq(lambda logit: expit(logit + sd * _Z) @ _DENSITY - share, -_FAR, _FAR))


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
    """The standard deviation in logits, at most 10, of units with this mean share and this variance of shares."""

    def excess(sd: float) -> float:
        return float(_DENSITY @ (expit(centre(share, sd) + sd * _Z) - share) ** 2 - variance)

    if not 0 < share < 1 or variance <= 0:
        return 0.0
    return 10.0 if excess(10.0) < 0 else float(optimize.brentq(excess, 0.0, 10.0))


def strengths_for(shares: Sequence[float], person_sd: float, photo_sd: float) -> tuple[float, ...]:
    """Strengths with which each arm has this mean share: of right answers, or of choices over an arm of strength 0."""
    return tuple(centre(share, float(np.hypot(person_sd, photo_sd))) for share in shares)


def strengths_on(shares: Sequence[float], behaviour: Behaviour, seed: int, photos: int) -> tuple[float, ...]:
    """Strengths with which each arm has this share of choices over one more, of strength 0, on the photos of `seed`."""
    sd, last = behaviour.photo_sd / 2**0.5, len(shares)
    leanings = np.stack([photo_leanings(seed, photo, last + 1, sd) for photo in range(photos)])
    shifts = (leanings[:, :last] - leanings[:, last:]).T
    found = [centres(share, shift[None], behaviour.person_sd) for share, shift in zip(shares, shifts, strict=True)]
    return (*(float(strength[0]) for strength in found), 0.0)


def simulated_studies(effect: Effect, people: int, studies: int, rng: np.random.Generator) -> tuple[Floats, Bools]:
    """(S, I, J) outcomes of many studies of two arms, nan: not asked or excluded; (S, I, J) whether of the second arm.

    Side by side an outcome is 1 where the first arm is chosen, and all are of the first arm. With `against` it is 1
    where the answer is right, and half of a person's photos are shown with the second arm, where the mask is True. For
    the population of people the photos are fixed: the shares hold on each study's own photos. For people and photos
    the photos are drawn, too, and move a study's shares.
    """
    b, trials, shape = effect.behaviour, effect.trials, (studies, people, effect.trials.photos)
    # The place of each photo in each person's own random order. Every second one has the first arm on the left, or is
    # shown with the second arm.
    place = rng.random(shape, np.float32).argsort(axis=2)
    odd = place % 2 == 1
    first = _logits(effect, effect.share, shape, rng)
    if effect.against is None:
        second, logit = np.zeros(shape, bool), first + np.where(odd, -b.side, b.side)
    else:
        second, logit = odd, np.where(odd, _logits(effect, effect.against, shape, rng), first)
    careless = rng.random((studies, people, 1)) < b.careless
    coin = careless | (rng.random(shape) < b.noise)
    outcomes = (rng.random(shape) < np.where(coin, 0.5, expit(logit))).astype(np.float64)
    leaving = rng.random((studies, people)) < b.drop_out
    leaves = np.where(leaving, rng.integers(0, trials.each, (studies, people)), trials.each)
    outcomes[place >= leaves[:, :, None]] = np.nan  # at most `each` are asked
    passed = rng.binomial(trials.catches, np.where(careless[:, :, 0], 0.5, b.attention))
    out = (passed < trials.passes) | (leaves < trials.complete * trials.each) | (leaves == 0)
    outcomes[out] = np.nan
    return outcomes, second


def _logits(effect: Effect, share: float, shape: tuple[int, int, int], rng: np.random.Generator) -> Floats:
    """(S, I, J) logits of newly drawn people and photos."""
    b, (studies, people, photos) = effect.behaviour, shape
    photo = rng.normal(0, b.photo_sd, (studies, 1, photos))
    if effect.population == "people":
        middle = centres(share, photo[:, 0], b.person_sd)
    else:
        middle = np.full(studies, centre(share, float(np.hypot(b.person_sd, b.photo_sd))))
    return np.asarray(middle[:, None, None] + photo + rng.normal(0, b.person_sd, (studies, people, 1)), np.float64)
