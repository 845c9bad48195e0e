"""Simulated people and power: what was put in comes out, the level is kept, the promise holds."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, stats

from bla.cli import run_command
from bla.study.behaviour import Behaviour
from bla.study.effect import Effect, Trials
from bla.study.errors import AnalysisError
from bla.study.power import p_values, people_needed, power_of
from bla.study.simulation import Person, centre, photo_leanings, simulated_studies, strengths_for, strengths_on

QUIET = Behaviour(person_sd=1.0, photo_sd=0.5)


@pytest.mark.parametrize(("share", "sd"), [(0.6, 0.0), (0.6, 1.0), (0.9, 2.5), (0.05, 1.5)])
def test_the_centre_gives_the_share(share: float, sd: float) -> None:
    logit = centre(share, sd)
    mean = integrate.quad(lambda z: stats.norm.pdf(z) * stats.logistic.cdf(logit + sd * z), -12, 12)[0]
    assert mean == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("population", ["people", "people and photos"])
def test_what_goes_into_studies_comes_out(population: str) -> None:
    behaviour = Behaviour(person_sd=1.0, photo_sd=1.5, side=0.4)
    rng = np.random.default_rng(0)
    effect = Effect(0.65, behaviour, Trials(40, 20), population=population)  # type: ignore[arg-type]
    outcomes, _ = simulated_studies(effect, 30, 150, rng)
    assert outcomes.shape == (150, 30, 40)
    asked = ~np.isnan(outcomes)
    assert (asked.sum(axis=2) == 20).all(), "each person is asked so often, a photo at most once"
    by_study = np.nanmean(outcomes, axis=(1, 2))
    assert by_study.mean() == pytest.approx(0.65, abs=0.015), (
        "a balanced side bias moves nothing but a little curvature"
    )
    # on the same photos, studies differ by their people alone; else by their photos, too
    spread = by_study.std()
    people_alone = (np.nanmean(outcomes, axis=2).std(axis=1).mean()) / 30**0.5
    assert spread == pytest.approx(people_alone, rel=0.2) if population == "people" else spread > 1.15 * people_alone


def test_people_leave_and_are_excluded_as_stated() -> None:
    behaviour = Behaviour(drop_out=0.3, careless=0.2, attention=0.9)
    trials = Trials(20, 20, catches=4, passes=3, complete=0.5)
    rng = np.random.default_rng(1)
    outcomes, _ = simulated_studies(Effect(0.6, behaviour, trials), 200, 50, rng)
    asked = (~np.isnan(outcomes)).sum(axis=2)
    assert set(np.unique(asked)) == {0, *range(10, 21)}
    passing = 0.8 * stats.binom.sf(2, 4, 0.9) + 0.2 * stats.binom.sf(2, 4, 0.5)
    assert (asked > 0).mean() == pytest.approx(passing * (0.7 + 0.3 * 0.5), abs=0.01)


def test_a_person_does_what_the_arrays_do() -> None:
    behaviour = Behaviour((*strengths_for([0.7], 1.0, 0.5), 0.0), person_sd=1.0, photo_sd=0.5, side=0.5, noise=0.1)
    lefts, firsts, by_person = [], [], []
    for number in range(300):
        someone = Person(behaviour, 7, number, 20)
        wins = []
        for trial in range(20):
            swapped = trial % 2
            reply = someone.choice(trial, left=swapped, right=1 - swapped, photo=trial + 20 * (number % 40))
            assert reply.seconds > 0
            lefts.append(reply.yes)
            wins.append(reply.yes != bool(swapped))
        firsts += wins
        by_person.append(np.mean(wins))
    assert np.mean(firsts) == pytest.approx(0.1 * 0.5 + 0.9 * 0.7, abs=0.03)
    # the same by arrays, whose people vary as much
    rng = np.random.default_rng(2)
    effect = Effect(0.7, behaviour, Trials(20, 20), population="people and photos")
    arrays, _ = simulated_studies(effect, 300, 5, rng)
    assert np.std(by_person) == pytest.approx(arrays.mean(axis=2).std(), rel=0.1)
    expected = 0.05 + 0.9 * np.mean([stats.logistic.cdf(sign * centre(0.7, 1.1) + 0.5) for sign in (1, -1)])
    assert np.mean(lefts) == pytest.approx(expected, abs=0.04)
    assert np.mean(lefts) > 0.53


def test_a_person_is_a_pure_function_of_seed_and_number() -> None:
    behaviour = Behaviour(person_sd=1.0, drop_out=0.5, careless=0.3, noise=0.2)

    def seen(seed: int, number: int) -> tuple[object, ...]:
        someone = Person(behaviour, seed, number, 10)
        replies = [someone.choice(trial, left=0, right=1, photo=2) for trial in range(10)]
        return someone.leaves_before, replies, someone.catch(1)

    assert seen(3, 5) == seen(3, 5)
    assert seen(3, 6) != seen(3, 5)
    assert seen(4, 5) != seen(3, 5)
    leaving = [Person(behaviour, 0, number, 10).leaves_before for number in range(400)]
    assert sum(at is not None for at in leaving) / 400 == pytest.approx(0.5, abs=0.08)
    assert {at for at in leaving if at is not None} == set(range(10))


def test_catch_trials_tell_the_careless() -> None:
    behaviour = Behaviour(careless=0.5, attention=0.95)
    people = [Person(behaviour, 0, number, 10) for number in range(200)]
    passed = {
        careful: np.mean([p.catch(t).yes for p in people if p.careful == careful for t in range(10)])
        for careful in (True, False)
    }
    assert passed[True] == pytest.approx(0.95, abs=0.02)
    assert passed[False] == pytest.approx(0.5, abs=0.04)


def test_judgements_have_the_accuracy_put_in() -> None:
    behaviour = Behaviour(strengths_for([0.8, 0.6], 0.7, 0.7), person_sd=0.7, photo_sd=0.7)
    people = [Person(behaviour, 0, number, 60) for number in range(100)]
    for arm, share in enumerate((0.8, 0.6)):
        right = [p.judgement(t, arm=arm, photo=t).yes for p in people for t in range(60)]
        assert np.mean(right) == pytest.approx(share, abs=0.04)


def test_strengths_on_the_very_photos_hold_on_them() -> None:
    base = Behaviour(person_sd=0.0, photo_sd=1.5)
    strengths = strengths_on([0.6, 0.3], base, 11, 12)
    for arm, share in enumerate((0.6, 0.3)):
        gaps = [photo_leanings(11, photo, 3, 1.5 / 2**0.5) for photo in range(12)]
        chances = [stats.logistic.cdf(strengths[arm] + gap[arm] - gap[2]) for gap in gaps]
        assert np.mean(chances) == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("population", ["people", "people and photos"])
def test_the_registered_test_keeps_its_level(population: str) -> None:
    """Studies in which there is nothing to find, people and photos varying."""
    effect = Effect(0.5, Behaviour(person_sd=1.0, photo_sd=0.5, side=0.3), Trials(30, 30), population=population)  # type: ignore[arg-type]
    found = power_of(effect, 24, studies=2_000, seed=1)
    assert 0.03 <= found.power <= 0.07
    assert found.mean == pytest.approx(0.5, abs=0.01)


def test_people_alone_are_not_photos() -> None:
    """Where photos vary for everyone, the test over people is of these photos: of others it says too much."""
    wide = Effect(0.5, Behaviour(person_sd=0.5, photo_sd=1.0), Trials(15, 15), population="people and photos")
    rng = np.random.default_rng(0)
    drawn = simulated_studies(wide, 50, 200, rng)
    assert (p_values(*drawn, replace(wide, population="people"), seed=0) <= 0.05).mean() > 0.25
    assert (p_values(*drawn, wide, seed=0) <= 0.05).mean() < 0.09


@pytest.mark.parametrize("population", ["people", "people and photos"])
def test_what_power_promises_holds(population: str) -> None:
    behaviour = Behaviour(person_sd=1.0, photo_sd=0.5, noise=0.05, drop_out=0.1)
    effect = Effect(0.65, behaviour, Trials(30, 20, complete=0.5), population=population)  # type: ignore[arg-type]
    needed = people_needed(effect, 0.8, studies=250, seed=0)
    assert needed.promised.power >= 0.8
    assert needed.promised.low < needed.promised.power < needed.promised.high
    again = power_of(effect, needed.promised.people, studies=500, seed=77)
    assert again.power == pytest.approx(needed.promised.power, abs=0.06)
    record = needed.to_dict()
    assert record["simulated"] is True
    assert people_needed(effect, 0.8, studies=250, seed=0) == needed, "seeded"
    short = {entry["people"]: entry["power"] for entry in record["tried"]}
    assert all(power >= 0.8 for people, power in short.items() if people >= record["people"])
    assert any(power < 0.8 for people, power in short.items() if people < record["people"])


def test_power_without_variance_is_that_of_an_exact_sign_test_of_people() -> None:
    """One trial each: the sign flips are the binomial test, whose power can be summed."""
    effect = Effect(0.8, Behaviour(person_sd=0.0, photo_sd=0.0), Trials(1, 1))
    n = 14
    reject = [stats.binomtest(k, n).pvalue <= 0.05 for k in range(n + 1)]
    exact = sum(stats.binom.pmf(k, n, 0.8) for k in range(n + 1) if reject[k])
    found = power_of(effect, n, studies=4_000)
    assert found.power == pytest.approx(exact, abs=0.025)


def test_smaller_effects_and_more_comparisons_need_more_people() -> None:
    few = people_needed(Effect(0.7, QUIET, Trials(20, 20)), studies=100).promised.people
    assert people_needed(Effect(0.65, QUIET, Trials(20, 20)), studies=100).promised.people > few
    assert people_needed(Effect(0.7, QUIET, Trials(20, 20), comparisons=6), studies=100).promised.people > few
    mirrored = people_needed(Effect(0.3, QUIET, Trials(20, 20)), studies=100).promised.people
    assert mirrored == pytest.approx(few, abs=3)


@pytest.mark.parametrize("population", ["people", "people and photos"])
def test_right_answers_keep_the_level_and_their_power(population: str) -> None:
    behaviour = Behaviour(person_sd=0.6, photo_sd=0.6, drop_out=0.1)
    none = Effect(0.7, behaviour, Trials(24, 24, complete=0.5), against=0.7, population=population)  # type: ignore[arg-type]
    found = power_of(none, 24, studies=1_500, seed=4)
    assert 0.03 <= found.power <= 0.07
    assert found.mean == pytest.approx(0.0, abs=0.01)
    some = power_of(replace(none, share=0.85), 24, studies=200)
    assert some.power > 0.8
    assert some.mean == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Effect(0.6, QUIET, Trials(3, 1), against=0.5), "one with each arm"),
        (lambda: people_needed(Effect(0.7, QUIET, Trials(4, 4), against=0.7)), "expected an effect to find"),
        (lambda: people_needed(Effect(0.5, QUIET, Trials(5, 5))), "no number of people finds what is not there"),
        (lambda: Effect(1.2, QUIET, Trials(5, 5)), "expected a share between 0 and 1"),
        (lambda: Effect(0.6, QUIET, Trials(5, 5), alpha=0), "expected alpha between"),
        (lambda: Effect(0.6, QUIET, Trials(1, 1), population="people and photos"), "at least 2 photos"),
        (lambda: Trials(5, 6), "expected 1 to 5 trials a person"),
        (lambda: Trials(5, 5, catches=1, passes=2), "expected 0 to 1 catch trials"),
        (lambda: Behaviour(noise=2), "expected noise from 0 to 1"),
        (lambda: Behaviour(person_sd=-1), "expected person_sd"),
        (lambda: Behaviour((float("nan"),)), "expected finite strengths"),
        (lambda: Behaviour(seconds=0), "expected seconds above 0"),
        (lambda: power_of(Effect(0.6, QUIET, Trials(5, 5)), 1), "at least 2 people"),
        (lambda: people_needed(Effect(0.6, QUIET, Trials(5, 5)), 1.0), "expected a power between"),
        (
            lambda: people_needed(Effect(0.51, QUIET, Trials(2, 2)), most=32, studies=50),
            "expected an effect that at most 32 people can show",
        ),
    ],
)
def test_mistakes(call: object, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        call()  # type: ignore[operator]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["study", "power", "--share", "0.7", "--simulations", "100", "--photos", "20"]
    assert run_command([*few, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["simulated"] is True
    assert record["promised"]["power"] >= 0.8
    assert record["people"] == record["promised"]["people"]
    assert run_command(few) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Simulated: {record['people']} people give a power of ")
    assert "20 trials on each pair of arms out of 20 photos" in said
    assert run_command([*few, "--people", "12", "--population", "people and photos", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["people"] == 12
    assert record["settings"]["population"] == "people and photos"
    assert run_command([*few, "--arms", "3", "--people", "12"]) == 0
    assert "corrected for 3 pairs" in capsys.readouterr().out
    assert run_command(["study", "power", "--share", "0.5"]) == 2
    assert "no number of people finds what is not there" in capsys.readouterr().err
    assert run_command(["study", "power", "--photos", "2", "--arms", "4"]) == 2
    assert "a trial or more of each of 6 pairs" in capsys.readouterr().err
