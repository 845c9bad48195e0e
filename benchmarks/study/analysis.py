"""Whether the study's registered test keeps its level and its promise, and the analysis finds what was put in.

    python -m benchmarks.study.analysis [--studies 500] [--study STUDY --rehearsals 20] [--json]

Null studies and studies with an effect are answered by simulated people in memory, by the plan's own schedule, and
analysed as `bla study results` does; people and photos differ (1 and .5 logits), people favour a side, 5% leave, 5% do
not look. With --study the simulated people of so many rehearsals walk that study's pages over HTTP as well, and must
leave the same answers and results as in memory. Prints a table in Markdown, or JSON; everything in it is simulated.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.results import parser_of
from benchmarks.study.memory import without_pages
from bla.progress import Progress, shown_progress
from bla.study.analysis import analyse
from bla.study.behaviour import Behaviour
from bla.study.effect import Effect, Trials
from bla.study.plan import Plan, Population
from bla.study.power import people_needed, power_of
from bla.study.rehearsal import behaviour_for, rehearse
from bla.study.responses import Collected
from bla.study.simulation import strengths_for
from bla.study.store import Store

PEOPLE = Behaviour(person_sd=1.0, photo_sd=0.5, noise=0.05, side=0.3, drop_out=0.05, careless=0.05)
POPULATIONS: tuple[Population, ...] = ("people", "people and photos")


def plan_without_pictures(photos: int, population: Population, people: int) -> Plan:
    """Two arms side by side, 2 repeats, 3 attention checks of which 2 are to be passed, half of the trials enough."""

    def photo(name: str) -> dict[str, Any]:
        def picture(part: str) -> dict[str, Any]:
            return {"token": hashlib.sha256(f"{name}{part}".encode()).hexdigest()[:20], "sha256": "0" * 64}

        known = {"id": name, "name": name, "sha256": "0" * 64, "prediction": "cat", "plain": picture("")}
        return known | {"explained": {arm: picture(arm) for arm in "AB"}}

    record = {
        "title": "Simulated", "question": "Which?", "task": "preference",
        "arms": [{"name": arm, "method": arm} for arm in "AB"], "photos": [photo(f"f{k}") for k in range(photos)],
        "spare": [photo("s0"), photo("s1")], "catches": [{"photo": "s0", "arm": "A", "decoy": "s1"}] * 3,
        "trials": photos, "repeats": 2, "people": people, "width": 64, "height": 64, "file_size": 1, "created": "",
        "exclusions": {"catches_to_pass": 2, "share_to_complete": 0.5}, "analysis": {"population": population},
    }  # fmt: skip
    return Plan.from_json(json.dumps(record))


def studied(plan: Plan, share: float, people: int, seed: int) -> dict[str, Any]:
    """One study in memory, on its own photos: the share holds on them, or over all photos, as registered."""
    if plan.analysis.population == "people":
        behaviour = behaviour_for(plan, share, None, PEOPLE, seed)
    else:
        behaviour = replace(PEOPLE, strengths=(*strengths_for([share], PEOPLE.person_sd, PEOPLE.photo_sd), 0.0))
    return analyse(plan, without_pages(plan, behaviour, people, seed=seed))


def found(
    population: Population, share: float, *, people: int, photos: int, studies: int, seed: int, report: Progress
) -> dict[str, Any]:
    """How often the registered test, and a test of pooled trials, finds something; and what the estimate is."""
    plan = plan_without_pictures(photos, population, people)
    careless = PEOPLE.careless / 2  # who tosses coins passes 2 of 3 checks half the time, and stays
    coins = PEOPLE.noise + (1 - PEOPLE.noise) * careless / (careless + 1 - PEOPLE.careless)
    expected = coins / 2 + (1 - coins) * share
    key = population.replace(" ", "_")
    hits, pooled, means, covered = 0, 0, [], 0
    spreads: dict[str, list[float]] = {"person_sd": [], "photo_sd": []}
    lefts, finished, excluded = [], [], []
    for number in range(studies):
        results = studied(plan, share, people, seed + number)
        (entry,), (decision,) = results["comparisons"], results["decision"]
        hits += decision["better"] is not None
        total = results["pooled"][0]
        pooled += bool(stats.binomtest(total["count"], total["of"]).pvalue <= plan.analysis.alpha)
        means.append(entry[key]["mean"])
        covered += entry[key]["low"] <= expected <= entry[key]["high"]
        for name, values in spreads.items():
            values.append(results["exploratory"]["spread"][name])
        lefts.append(results["quality"]["side"]["mean"])
        finished.append(results["people"]["finished"] / people)
        excluded.append(len(results["people"]["excluded"]) / people)
        report(f"{population}: studies of {people} people, share {share:g}", number + 1, studies)
    return {
        "population": population,
        "share": share,
        "people": people,
        "photos": photos,
        "studies": studies,
        "found": hits / studies,
        "found_interval": tuple(stats.binomtest(hits, studies).proportion_ci(method="wilson")),
        "found_pooled": pooled / studies,
        "expected_share": expected,
        "mean_share": float(np.mean(means)),
        "coverage": covered / studies,
        "person_sd": float(np.median(spreads["person_sd"])),
        "photo_sd": float(np.median(spreads["photo_sd"])),
        "left": float(np.mean(lefts)),
        "finished": float(np.mean(finished)),
        "excluded": float(np.mean(excluded)),
    }


def promised(population: Population, share: float, photos: int, studies: int, report: Progress) -> dict[str, Any]:
    """What `bla study power` promises for the same people."""
    trials = Trials(photos, photos, catches=3, passes=2, complete=0.5)
    effect = Effect(share, PEOPLE, trials, population=population)
    needed = people_needed(effect, 0.8, studies=studies, report=report)
    return {"people": needed.promised.people, "power": needed.promised.power}


def levels(population: Population, people: int, photos: int, studies: int, report: Progress) -> dict[str, Any]:
    """The level on ten times as many studies, by arrays."""
    trials = Trials(photos, photos, catches=3, passes=2, complete=0.5)
    effect = Effect(0.5, PEOPLE, trials, population=population)
    result = power_of(effect, people, studies=10 * studies, seed=99, report=report)
    return {"found": result.power, "interval": (result.low, result.high), "studies": 10 * studies}


def told(collected: Collected) -> list[tuple[Any, ...]]:
    """Answers by the number of who gave them, whatever their random name."""
    number = {one.participant: one.number for one in collected.participants}
    return sorted(
        (number[r.participant], r.position, r.kind, r.photo, str(r.left), str(r.right), str(r.arm), r.choice)
        for r in collected.responses
    )


def rehearsed(study: Path, rehearsals: int, people: int, report: Progress) -> dict[str, Any]:
    """Rehearsals over HTTP beside the same in memory."""
    plan = Plan.load(study)
    share, against = (0.6, None) if plan.task == "preference" else (0.75, 0.6)
    same_answers = same_results = answers = 0
    p_values, means = [], []
    for seed in range(rehearsals):
        behaviour = behaviour_for(plan, share, against, PEOPLE if len(plan.arms) == 2 else _for(plan), seed)
        with tempfile.TemporaryDirectory() as folder:
            store = Store(f"sqlite:///{folder}/rehearsal.db")
            try:
                walked = rehearse(study, behaviour, people, store=store, seed=seed)
            finally:
                store.close()
        memory = without_pages(plan, behaviour, people, seed=seed)
        same_answers += told(walked) == told(memory)
        answers += len(walked.responses)
        over_http, in_memory = analyse(plan, walked)["comparisons"], analyse(plan, memory)["comparisons"]
        same_results += all(
            np.allclose(
                [a[k][n] for n in ("mean", "low", "high", "p")], [b[k][n] for n in ("mean", "low", "high", "p")]
            )
            for a, b in zip(over_http, in_memory, strict=True)
            for k in ("people", "people_and_photos")
            if a[k] is not None
        )
        p_values.append(over_http[0]["people"]["p"])
        means.append(over_http[0]["people"]["mean"])
        report("rehearsals over HTTP", seed + 1, rehearsals)
    return {
        "rehearsals": rehearsals,
        "people": people,
        "answers": answers,
        "same_answers": same_answers,
        "same_results": same_results,
        "found": float(np.mean(np.array(p_values) <= plan.analysis.alpha)),
        "mean": float(np.mean(means)),
    }


def _for(plan: Plan) -> Behaviour:
    return replace(PEOPLE, strengths=(0.0,) * len(plan.arms))


def main() -> None:
    """Simulate, analyse, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--people", type=int, default=20, help="of a null study")
    parser.add_argument("--photos", type=int, default=30, help="as many trials a person")
    parser.add_argument("--share", type=float, default=0.6, help="the effect")
    parser.add_argument("--study", type=Path, help="a study's folder to rehearse in")
    parser.add_argument("--rehearsals", type=int, default=20)
    parser.add_argument("--rehearsing", type=int, default=20, help="people of a rehearsal")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    table: dict[str, Any] = {"simulated": True, "null": [], "effect": [], "rehearsals": None}
    with shown_progress() as report:
        for population in POPULATIONS:
            size: dict[str, Any] = {"photos": arguments.photos, "studies": arguments.studies, "report": report}
            null = found(population, 0.5, people=arguments.people, seed=10_000, **size)
            null["by_arrays"] = levels(population, arguments.people, arguments.photos, arguments.studies, report)
            table["null"].append(null)
            promise = promised(population, arguments.share, arguments.photos, 4 * arguments.studies, report)
            held = found(population, arguments.share, people=promise["people"], seed=20_000, **size)
            table["effect"].append(held | {"promised": promise["power"]})
        if arguments.study is not None:
            table["rehearsals"] = rehearsed(arguments.study, arguments.rehearsals, arguments.rehearsing, report)
    if arguments.json:
        print(json.dumps(table, indent=1))
        return
    print("Simulated studies; registered test at alpha = .05.\n")
    columns = "population", "share put in", "people", "found", "promised", "pooled trials find", "mean share (expected)"
    print(f"| {' | '.join(columns)} | coverage |\n|{' --- |' * (len(columns) + 1)}")
    for row in (*table["null"], *table["effect"]):
        promise = f"{row['promised']:.3f}" if "promised" in row else ".05"
        low, high = row["found_interval"]
        print(
            f"| {row['population']} | {row['share']:g} | {row['people']} "
            f"| {row['found']:.3f} ({low:.3f} to {high:.3f}) | {promise} | {row['found_pooled']:.3f} "
            f"| {row['mean_share']:.3f} ({row['expected_share']:.3f}) | {row['coverage']:.3f} |"
        )
    for row in table["null"]:
        by_arrays = row["by_arrays"]
        print(f"\nNull, {row['population']}, {by_arrays['studies']} studies by arrays: {by_arrays['found']:.4f}.")
    last = table["effect"][-1]
    print(
        f"\nPut in and found: people differ by {PEOPLE.person_sd:g} and {last['person_sd']:.2f} logits, photos by "
        f"{PEOPLE.photo_sd:g} and {last['photo_sd']:.2f} (noise and carelessness blur both); side bias "
        f"{PEOPLE.side:g} logits and {last['left']:.3f} on the left; {1 - PEOPLE.drop_out:g} and "
        f"{last['finished']:.3f} finish."
    )
    if table["rehearsals"] is not None:
        r = table["rehearsals"]
        print(
            f"\n{r['rehearsals']} rehearsals of {r['people']} people over HTTP, {r['answers']} answers: "
            f"{r['same_answers']} with the same answers as in memory, {r['same_results']} with the same results."
        )


if __name__ == "__main__":
    main()
