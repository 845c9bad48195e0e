"""`bla study`: the human study, from plan to results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from bla.cli.sharing import DONE, Json

if TYPE_CHECKING:
    from bla.study.plan import Plan
    from bla.study.responses import Collected

studies = App(name="study", help="Ask people: a blind study of explanations.", help_format="plaintext")

Database = Annotated[
    str | None, Parameter(name="--db", help="A database's URL, sqlite:/// or postgresql://. By default STUDY/study.db.")
]


@studies.command
def init(
    folder: Path,
    /,
    *,
    arms: Annotated[list[str], Parameter(consume_multiple=True)],
    task: Literal["preference", "prediction", "agreement"] = "preference",
    title: str = "",
    question: str = "",
    trials: int = 20,
    photos: int | None = None,
    repeats: int = 2,
    catches: int = 2,
    practice: int = 2,
    people: int = 30,
    places: int | None = None,
    rule: Literal["all", "correct", "wrong", "half"] | None = None,
    area: Literal["equal", "own"] = "equal",
    cells: int | None = None,
    options: int = 4,
    population: Literal["people", "people and photos"] = "people",
    alpha: float = 0.05,
    catches_to_pass: int | None = None,
    seconds_at_least: float = 1.0,
    share_to_complete: float = 1.0,
    seed: int = 0,
    truth: Path | None = None,
    texts: Path | None = None,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Make a study from saved explanations of the same photos: draw photos, render pictures, freeze the plan.

    Work in the folder in which the explanations were made. The researcher's secret is printed once and kept nowhere.

    Parameters
    ----------
    folder
        The study's folder to make.
    arms
        Folders of explanations, as bla explain --out writes them, or .jsonl files, as bla compare writes them; or
        NAME=FOLDER. The first is what results tell of.
    task
        preference between two explanations; prediction of what the program says; agreement that it is right.
    title
        As participants see it. By default the folder's name.
    question
        Put in each trial; {prediction} is what the program says. By default the texts' question.
    trials
        Main trials of a person, each of another photo.
    photos
        Photos to draw them from. By default as many as trials.
    repeats
        Main trials that come again, sides exchanged.
    catches
        Attention checks.
    practice
        Practice trials, which do not count.
    people
        People planned to be analysed.
    places
        People who may begin. By default there is no limit.
    rule
        Which photos: all; those that the program gets right or wrong; half of each. By default half for agreement.
    area
        Cut all explanations of a photo to one size by their ranks, or show each at its own size.
    cells
        The one size, in cells of the first arm's grid. By default each photo's, as the first arm chose it.
    options
        Answers to choose from in the task of prediction.
    population
        What the registered test speaks of: people on these photos, or also photos like these.
    alpha
        Level of the registered test.
    catches_to_pass
        Attention checks that a person must pass to be analysed. By default all.
    seconds_at_least
        A person whose median trial is faster is not analysed.
    share_to_complete
        Share of the main trials that a person must have answered to be analysed.
    seed
        Of photos, sides and order.
    truth
        A CSV file, image and label. By default a photo's class is its folder's name.
    texts
        A file of all texts, for another language. By default English.
    """
    from bla.study.preparing import Wishes, prepare

    wishes = Wishes(
        task=task,
        title=title,
        question=question,
        trials=trials,
        photos=photos,
        repeats=repeats,
        catches=catches,
        practice=practice,
        people=people,
        places=places,
        rule=rule,
        area=area,
        cells=cells,
        options=options,
        population=population,
        alpha=alpha,
        catches_to_pass=catches_to_pass,
        seconds_at_least=seconds_at_least,
        share_to_complete=share_to_complete,
        seed=seed,
    )
    plan, secret = prepare(folder, arms, wishes, truth=truth, texts=texts)
    if json_:
        print(json.dumps({"study": str(folder), "digest": plan.digest(), "secret": secret, "left_out": plan.left_out}))
        return DONE
    left = ", ".join(f"{count} because {reason}" for reason, count in plan.left_out.items())
    print(f"{folder}: {len(plan.photos)} photos by {len(plan.arms)} arms ({', '.join(plan.arm_names)}), {plan.task}.")
    if left:
        print(f"Left out of {plan.considered + sum(plan.left_out.values())} photos: {left}.")
    print(f"The plan's digest, to register: {plan.digest()}")
    print(f"The researcher's secret, shown only now: {secret}")
    print(
        f"Write your consent text into {folder / 'texts.toml'}; then: bla study rehearse {folder}, "
        f"bla study serve {folder}"
    )
    return DONE


@studies.command
def serve(
    folder: Path,
    /,
    *,
    db: Database = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    proxy: str | None = None,
    joins_a_minute: float = 60.0,
    requests_a_second: float = 20.0,
    timing: bool = False,
) -> int:
    """Serve a study's pages until interrupted. Answers are stored at once; a server that is started again goes on.

    Parameters
    ----------
    folder
        The study's folder.
    host
        Where to listen; 0.0.0.0 for everyone.
    port
        The port; 0 takes a free one.
    proxy
        The address of your reverse proxy (which brings HTTPS), so that rates are limited by its clients.
    joins_a_minute
        New participants a minute from one address.
    requests_a_second
        Requests of one participant; an address without one may make five times as many.
    timing
        Tell the server's own time with each answer, in the header Server-Timing.
    """
    from bla.study.app import create_app
    from bla.study.serving import listening, serve
    from bla.study.store import Store
    from bla.study.texts import Texts

    store = Store.of(folder, db)
    try:
        app = create_app(
            folder, store, joins_a_minute=joins_a_minute, requests_a_second=requests_a_second, timing=timing
        )
        if Texts.load(folder / "texts.toml")["consent.text"] == Texts.english()["consent.text"]:
            print(f"The consent text in {folder / 'texts.toml'} is still the template: put yours in.", file=sys.stderr)
        server = listening(host, port)
        address = f"http://{host}:{server.getsockname()[1]}"
        print(f"The study is at {address}, what it collected at {address}/researcher. Stop it with Ctrl-C.", flush=True)
        serve(app, server, proxy=proxy)
    finally:
        store.close()
    return DONE


@studies.command
def rehearse(
    folder: Path,
    /,
    *,
    people: int | None = None,
    share: float = 0.6,
    against: float | None = None,
    person_sd: float = 1.0,
    photo_sd: float = 0.5,
    noise: float = 0.0,
    side: float = 0.0,
    drop_out: float = 0.05,
    careless: float = 0.05,
    seed: int = 0,
    db: Database = None,
    keep: bool = False,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Let simulated people walk the real pages over HTTP, into a store of their own: all of it is marked simulated.

    Parameters
    ----------
    folder
        The study's folder.
    people
        How many. By default as many as the plan says.
    share
        Mean share of choices that fall on the first arm; in tasks with right answers, of right answers with it.
    against
        In tasks with right answers, their share with the other arms. By default the same.
    person_sd
        How much people differ, in logits.
    photo_sd
        How much photos differ, in logits.
    noise
        Share of answers given at random.
    side
        Logits by which people favour the left.
    drop_out
        Share of people who leave before the end.
    careless
        Share of people who answer everything at random, attention checks too.
    seed
        Of everything random.
    db
        A database's URL for the simulated answers. By default STUDY/rehearsal.db, which is made anew.
    keep
        Do not remove an earlier rehearsal: it is an error if there is one.
    """
    from bla.progress import shown_progress
    from bla.study.plan import Plan
    from bla.study.rehearsal import behaviour_for, rehearse
    from bla.study.simulation import Behaviour
    from bla.study.store import Store

    plan = Plan.load(folder)
    plain = Behaviour(
        strengths=(0.0,) * len(plan.arms),
        person_sd=person_sd,
        photo_sd=photo_sd,
        noise=noise,
        side=side,
        drop_out=drop_out,
        careless=careless,
    )
    behaviour = behaviour_for(plan, share, against, plain, seed)
    if db is None and not keep:
        for path in folder.glob("rehearsal.db*"):
            path.unlink()
    store = Store.of(folder, db, rehearsal=True)
    try:
        with shown_progress() as report:
            collected = rehearse(folder, behaviour, people or plan.people, store=store, seed=seed, report=report)
    finally:
        store.close()
    finished = sum(person.finished for person in collected.participants)
    if json_:
        counts = {"people": len(collected.participants), "finished": finished, "responses": len(collected.responses)}
        print(json.dumps({"simulated": True, "plan": plan.digest()} | counts))
        return DONE
    print(
        f"Simulated: {len(collected.participants)} people took part, {finished} to the end, "
        f"{len(collected.responses)} responses. Next: bla study results {folder} --rehearsal"
    )
    return DONE


@studies.command
def secret(folder: Path, /) -> int:
    """Make a new secret for the researcher; the old one opens nothing any more.

    Parameters
    ----------
    folder
        The study's folder.
    """
    from bla.study.keys import Keys

    print(f"The researcher's secret, shown only now: {Keys.renewed(folder)}")
    return DONE


def _collected(plan: Plan, folder: Path, db: str | None, rehearsal: bool) -> Collected:
    from bla.study.store import Store

    store = Store.of(folder, db, rehearsal=rehearsal, new=False)
    try:
        return store.collected(plan)
    finally:
        store.close()


@studies.command
def export(
    folder: Path,
    /,
    *,
    out: Path,
    db: Database = None,
    rehearsal: bool = False,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Write everything a study has collected: two tables (CSV), all of it as JSON, and a codebook.

    Parameters
    ----------
    folder
        The study's folder.
    out
        The folder to write into.
    rehearsal
        The simulated answers of the rehearsal.
    """
    from bla.study.plan import Plan

    collected = _collected(Plan.load(folder), folder, db, rehearsal)
    if json_:
        print(collected.to_json())
    written = collected.save(out)
    if not json_:
        word = "simulated " if collected.simulated else ""
        people, given = len(collected.participants), len(collected.responses)
        print(f"{given} {word}responses of {people} {word}participants: {', '.join(map(str, written))}")
    return DONE


@studies.command
def results(
    folder: Path,
    /,
    *,
    rehearsal: bool = False,
    out: Path | None = None,
    db: Database = None,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Analyse a study as registered: a page with figures and a methods paragraph, and all numbers as JSON.

    Parameters
    ----------
    folder
        The study's folder.
    rehearsal
        The simulated answers of the rehearsal.
    out
        The page to write, its numbers beside it as JSON. By default STUDY/results.html, or
        STUDY/simulated-results.html.
    """
    from bla.files import write_atomically
    from bla.study.analysis import analyse
    from bla.study.plan import Plan
    from bla.study.results import as_json, cautions, page, verdicts

    plan = Plan.load(folder)
    collected = _collected(plan, folder, db, rehearsal)
    found = analyse(plan, collected)
    word = "simulated-" if collected.simulated else ""
    target = out or folder / f"{word}results.html"
    write_atomically(target, page(found).encode())
    write_atomically(target.with_suffix(".json"), as_json(found).encode())
    if json_:
        print(as_json(found))
        return DONE
    for text in (*verdicts(found), *cautions(found)):
        print(text)
    print(f"The page is {target}, its numbers are in {target.with_suffix('.json')}.")
    return DONE


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
