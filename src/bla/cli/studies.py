"""`bla study`: the human study, from plan to results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bla import needs_extra
from bla.cli.sharing import Command, Flag, Host, Json, Port, Seed, flat, listening, require, say, within
from bla.progress import shown_progress

with needs_extra("study"):
    require("study")  # all of its packages, before any work
    from bla.study.behaviour import Behaviour, RehearsalBehaviour
    from bla.study.effect import EffectSize
    from bla.study.errors import StudyError
    from bla.study.guard import Limits
    from bla.study.keys import Keys
    from bla.study.plan import Plan
    from bla.study.preparing import Wishes, prepare

studies = Command(name="study", help_format="plaintext")

Folder = Annotated[Path, Parameter(help="The study's folder.")]
Url = Annotated[
    str | None, Parameter(name="--db", help="A URL, sqlite:/// or postgresql://. By default a file in the folder.")
]
Rehearsal = Annotated[Flag, Parameter(help="Read the rehearsal's simulated answers.")]


@studies.command
def init(
    folder: Path,
    /,
    *,
    arms: Annotated[list[str], Parameter(consume_multiple=True, negative=())],
    wishes: Annotated[Wishes | None, flat("The design")] = None,
    truth: Path | None = None,
    texts: Path | None = None,
    json_: Json = False,
) -> None:
    """Make a study from saved explanations of the same photos: draw photos, render pictures, freeze the plan.

    Run it where the explanations were made. The researcher's secret is printed once and not stored.

    Example: `bla study init look --arms why-bla why-cam --trials 20 --people 30`

    :param folder: The folder to make.
    :param arms: Folders of bla explain --out, or .jsonl files of bla compare, each perhaps as NAME=PATH. Results are
        stated for the first.
    :param truth: A CSV file with columns image and label. By default a photo's folder names its class.
    :param texts: A file of all texts. By default English.
    """
    plan, secret = prepare(folder, arms, wishes, truth=truth, texts=texts)
    if json_:
        print(json.dumps({"study": str(folder), "digest": plan.digest(), "secret": secret, "left_out": plan.left_out}))
        return
    say(f"{folder}: {len(plan.photos)} photos by {len(plan.arms)} arms ({', '.join(plan.arm_names)}), {plan.task}.")
    if plan.left_out:
        left = ", ".join(f"{count} because {reason}" for reason, count in plan.left_out.items())
        say(f"Left out of {plan.considered + sum(plan.left_out.values())} photos: {left}.")
    say(f"The plan's digest, to register: {plan.digest()}")
    say(f"The researcher's secret, shown only now: {secret}")
    say(
        f"Write your consent text into {folder / 'texts.toml'}; then: bla study rehearse {folder}, "
        f"bla study serve {folder}"
    )


@studies.command
def serve(
    folder: Folder,
    /,
    *,
    db: Url = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    proxy: str | None = None,
    url: str | None = None,
    limits: Annotated[Limits | None, flat()] = None,
) -> None:
    """Serve a study until interrupted. Answers are stored at once; after a restart participants continue.

    Example: `bla study serve look --port 8000`

    :param proxy: Your HTTPS reverse proxy's address, so that rate limits apply to its clients.
    :param url: The address in personal links, https://study.example.org say. Needed with --proxy or --host 0.0.0.0.
    """
    from bla.study.app import create_app
    from bla.study.serving import serve as run
    from bla.study.store import Store
    from bla.study.texts import Texts

    if url is not None and not re.fullmatch(r"https?://[^/?#@\s]+/?", url):
        raise StudyError(f"expected --url as https://study.example.org, got {url!r}")
    if url is None and (proxy is not None or host in ("", "::", "0.0.0.0")):
        raise StudyError("expected --url https://study.example.org, the address in personal links, got none: add it")
    words = folder / "texts.toml"
    if any(text.startswith("[") for text in Texts.load(words).paragraphs("consent.text")):
        raise StudyError(
            f"expected a consent text that says who asks, got the template's paragraph in brackets in {words}: "
            "replace it"
        )
    with Store.of(folder, db) as store, listening(host, port) as server:
        address = f"http://{f'[{host}]' if ':' in host else host}:{server.getsockname()[1]}"
        app = create_app(folder, store, limits=limits, address=url or address)
        say(f"The study is at {address}, what it collected at {address}/researcher. Stop it with Ctrl-C.", flush=True)
        run(app, server, proxy=proxy)


@studies.command
def rehearse(
    folder: Folder,
    /,
    *,
    people: Annotated[int | None, within(1, 100_000)] = None,
    share: Annotated[float, within(0, 1)] = 0.6,
    against: Annotated[float | None, within(0, 1)] = None,
    behaviour: Annotated[RehearsalBehaviour | None, flat()] = None,
    seed: Seed = 0,
    db: Url = None,
    keep: Flag = False,
    json_: Json = False,
) -> None:
    """Let simulated people take part over HTTP; their answers, marked simulated, go to FOLDER/rehearsal.db.

    Example: `bla study rehearse look --people 30 --share 0.6`

    :param people: How many. By default the plan's number.
    :param share: Mean share of choices of the first arm; in tasks with right answers, of right answers with it.
    :param against: In tasks with right answers, their share with the other arms. By default the same.
    :param keep: Refuse to replace an earlier rehearsal.
    """
    from bla.study.rehearsal import behaviour_for, rehearse
    from bla.study.store import Store

    plan = Plan.load(folder)
    people = plan.people if people is None else people
    behaves = behaviour_for(plan, share, against, behaviour or RehearsalBehaviour(), seed)
    with Store.of(folder, db, rehearsal=True, replace=not keep) as store, shown_progress() as report:
        collected = rehearse(folder, behaves, people, store=store, seed=seed, report=report)
    finished, responses = sum(person.finished for person in collected.participants), len(collected.responses)
    if json_:
        counts = {"people": people, "finished": finished, "responses": responses}
        print(json.dumps({"simulated": True, "plan": plan.digest()} | counts))
        return
    say(
        f"Simulated: {people} people took part, {finished} to the end, {responses} responses. "
        f"Next: bla study results {folder} --rehearsal"
    )


@studies.command
def secret(folder: Folder, /) -> None:
    """Replace the researcher's secret; the old one stops working.

    Example: `bla study secret look`
    """
    say(f"The researcher's secret, shown only now: {Keys.renewed(folder)}")


@studies.command
def export(folder: Folder, /, *, out: Path, db: Url = None, rehearsal: Rehearsal = False, json_: Json = False) -> None:
    """Write what a study has collected: two CSV tables, JSON, and a codebook.

    Example: `bla study export look --out tables`

    :param out: The folder to write.
    """
    from bla.study.store import Store

    with Store.of(folder, db, rehearsal=rehearsal, new=False) as store:
        collected = store.collected(Plan.load(folder))
    written = collected.save(out)
    if json_:
        print(collected.to_json())
        return
    word = "simulated " if collected.simulated else ""
    people, given = len(collected.participants), len(collected.responses)
    say(f"{given} {word}responses of {people} {word}participants: {', '.join(map(str, written))}")


@studies.command
def results(
    folder: Folder, /, *, rehearsal: Rehearsal = False, out: Path | None = None, db: Url = None, json_: Json = False
) -> None:
    """Analyse a study as registered: a page with figures and a methods paragraph, and the numbers as JSON.

    Example: `bla study results look --rehearsal`

    :param out: The page to write, the JSON beside it. By default FOLDER/results.html or simulated-results.html.
    """
    from bla.study.analysis import analyse
    from bla.study.results import as_json, cautions, save, verdicts
    from bla.study.store import Store

    plan = Plan.load(folder)
    with Store.of(folder, db, rehearsal=rehearsal, new=False) as store:
        found = analyse(plan, store.collected(plan))
    page, numbers = save(found, out or folder / f"{'simulated-' if found['simulated'] else ''}results.html")
    if json_:
        print(as_json(found))
        return
    for text in (*verdicts(found), *cautions(found)):
        say(text)
    say(f"The page is {page}, its numbers are in {numbers}.")


@studies.command
def power(
    study: Path | None = None,
    /,
    *,
    effect: Annotated[EffectSize | None, flat()] = None,
    people: Annotated[int | None, within(1, 1_000_000)] = None,
    wanted: Annotated[float, Parameter(name="--power"), within(0.01, 0.999)] = 0.8,
    behaviour: Annotated[Behaviour | None, flat()] = None,
    simulations: Annotated[int, within(1, 1_000_000)] = 2_000,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """How many people a study needs, or the power of a number of people, by simulation of the registered test.

    Example: `bla study power --share 0.6 --people 40`

    :param study: A study's folder, whose plan gives photos, trials, arms, alpha, population and exclusions. Without
        one: 30 photos, each shown to everyone, and 2 arms.
    :param people: Report the power of this many recruited people.
    :param wanted: The power to reach.
    :param simulations: Simulated studies per number of people.
    """
    from bla.study.power import people_needed, power_of

    plan = None if study is None else Plan.load(study)
    wished = (effect or EffectSize()).between_two_arms(behaviour or Behaviour(), plan)
    record: dict[str, Any]
    with shown_progress() as report:
        if people is None:
            needed = people_needed(wished, wanted, studies=simulations, seed=seed, report=report)
            record, found = needed.to_dict(), needed.promised
        else:
            found = power_of(wished, people, studies=simulations, seed=seed, report=report)
            record = found.to_dict(wished, seed)
    if json_:
        print(json.dumps(record))
        return
    say(
        f"Simulated: {found.people} people give a power of {found.power:.3f} "
        f"(95% interval {found.low:.3f} to {found.high:.3f} from {found.studies} simulated studies)."
    )
    say(f"Assumed: {wished.assumptions()}; {found.analysed:.1f} people left after exclusions.")
    if people is None:
        tried = ", ".join(f"{entry['people']}: {entry['power']:.2f}" for entry in record["tried"])
        say(
            f"This is the smallest number tried above all that stayed below a power of {wanted:g}, measured again on "
            f"new studies (power rises and falls with single people). Tried: {tried}."
        )
