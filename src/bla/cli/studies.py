"""`bla study`: the human study, from plan to results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from bla.cli.sharing import DONE, Json

studies = App(name="study", help="Ask people: a blind study of explanations.", help_format="plaintext")
for _name in ("init", "rehearse", "serve", "results", "export", "secret"):
    studies.command(f"bla.cli.studying:{_name}")


@studies.command
def power(
    study: Path | None = None,
    /,
    *,
    share: float = 0.6,
    against: float | None = None,
    people: int | None = None,
    wanted: Annotated[float, Parameter(name="--power")] = 0.8,
    person_sd: float = 1.0,
    photo_sd: float = 0.5,
    noise: float = 0.0,
    drop_out: float = 0.0,
    careless: float = 0.0,
    photos: int | None = None,
    trials: int | None = None,
    arms: int | None = None,
    alpha: float | None = None,
    population: Literal["people", "people and photos"] | None = None,
    simulations: int = 2_000,
    seed: int = 0,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """How many people a study needs, or what power so many have: the registered test on simulated studies.

    Parameters
    ----------
    study
        A study's folder, whose plan gives photos, trials, arms, alpha, population and exclusions. Without one 30
        photos, each shown to everyone, and 2 arms.
    share
        The effect: the mean share of a person's choices that fall on the better arm; with --against the share of right
        answers with it.
    against
        The share of right answers with the other arm, in tasks that have right answers.
    people
        Say what power so many recruited people have, in place of how many are needed.
    wanted
        The power to reach.
    person_sd
        How much people differ in what they prefer: a standard deviation, in logits.
    photo_sd
        How much photos differ in which arm they favour, in logits.
    noise
        Share of answers given at random.
    drop_out
        Share of people who leave before the end.
    careless
        Share of people who answer everything at random, attention checks too.
    photos
        Photos of the study.
    trials
        Main trials of a person, each of another photo; by default all photos.
    arms
        Explanations that are compared, two at a time: every pair is tested, corrected for their number.
    alpha
        Of the test.
    population
        Whom the test speaks for: people, on these photos; or people and photos like these, too.
    simulations
        Simulated studies for each number of people tried.
    seed
        Of everything random.
    """
    from bla.progress import shown_progress
    from bla.study.power import effect_of, people_needed, power_of
    from bla.study.simulation import Behaviour

    behaviour = Behaviour(person_sd=person_sd, photo_sd=photo_sd, noise=noise, drop_out=drop_out, careless=careless)
    plan = None
    if study is not None:
        from bla.study.plan import Plan

        plan = Plan.load(study)
    effect = effect_of(
        share,
        behaviour,
        plan,
        against=against,
        photos=photos,
        trials=trials,
        arms=arms,
        alpha=alpha,
        population=population,
    )
    with shown_progress() as report:
        if people is None:
            needed = people_needed(effect, wanted, studies=simulations, seed=seed, report=report)
            record, found = needed.to_dict(), needed.promised
        else:
            found = power_of(effect, people, studies=simulations, seed=seed, report=report)
            record = found.to_dict(effect, seed)
    if json_:
        print(json.dumps(record))
        return DONE
    print(
        f"Simulated: {found.people} people give a power of {found.power:.3f} "
        f"(95% interval {found.low:.3f} to {found.high:.3f} from {found.studies} simulated studies)."
    )
    _print_assumptions(record["settings"], found.analysed)
    if people is None:
        tried = ", ".join(f"{entry['people']}: {entry['power']:.2f}" for entry in record["tried"])
        print(
            f"Chosen as the smallest number tried with no number above it below {wanted:g} (power goes up and down "
            f"with single people), then measured on new studies. Tried: {tried}."
        )
    return DONE


def _print_assumptions(settings: dict[str, Any], analysed: float) -> None:
    trials, behaviour = settings["trials"], settings["behaviour"]
    what = (
        f"{settings['share']:.0%} of a person's choices fall on the better arm"
        if settings["against"] is None
        else f"{settings['share']:.0%} right answers with one arm, {settings['against']:.0%} with the other"
    )
    tests = f", corrected for {settings['comparisons']} pairs" if settings["comparisons"] > 1 else ""
    print(
        f"If {what}; people differ by {behaviour['person_sd']:g} logits, photos by {behaviour['photo_sd']:g}; "
        f"{trials['each']} trials on each pair of arms out of {trials['photos']} photos; {analysed:.1f} people left "
        f"after exclusions; two-sided test of {settings['population']} at alpha = {settings['alpha']:g}{tests}."
    )
