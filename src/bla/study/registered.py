"""What is registered: who is analysed, what is tested, and how.

Of person i and two arms a, b let x_i be the share of i's main trials with both in which a was chosen; in a task with
right answers, i's share of right answers with a minus that with b. The registered estimate is the mean of x_i over
people, each counting once; its test and interval flip signs (`bla.metrics.statistics.mean_by_sign_flips`). Trials are
not pooled: thirty answers of one person are not thirty people, and a binomial test of 20 people's 600 answers finds
something in 43 of 100 studies in which there is nothing, where people differ by 1 logit. `crossed` tests the same mean
for photos like these, too; the plan says which of the two decides. For several pairs of arms the p-values are
corrected by Holm's method, the intervals by Bonferroni's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from bla.metrics.statistics import holm, mean_by_sign_flips
from bla.study import bradley_terry
from bla.study.crossed import mean_over_people_and_photos
from bla.study.plan import Plan
from bla.study.responses import Participant, Response


class Outcome(NamedTuple):
    """A main trial in the comparison of two arms."""

    answer: Response
    value: float
    """1 if the first arm was chosen, or the answer is right; else 0."""
    second: bool = False
    """In tasks with right answers: whether the second arm was shown."""


def outcomes(plan: Plan, first: str, second: str, main: Sequence[Response]) -> list[Outcome]:
    """The main trials by which a pair of arms is compared."""
    if plan.task == "preference":
        return [Outcome(a, float(a.chosen == first)) for a in main if {a.left, a.right} == {first, second}]
    return [Outcome(a, float(bool(a.correct)), a.arm == second) for a in main if a.arm in (first, second)]


def shares(kept: Mapping[str, Sequence[Response]], judged: Callable[[Response], bool | None]) -> list[float]:
    """Each person's share of answers judged True, of those that are not judged None, in the order of their names."""
    verdicts = [[v for v in map(judged, kept[person]) if v is not None] for person in sorted(kept)]
    return [float(np.mean(values)) for values in verdicts if values]


def exclusions(
    plan: Plan, participants: Sequence[Participant], by_person: Mapping[str, Sequence[Response]]
) -> dict[str, list[str]]:
    """Who is left out by the registered rules, with all the reasons."""
    rules = plan.exclusions
    found: dict[str, list[str]] = {}
    for someone in sorted(participants, key=lambda one: one.participant):
        given = by_person.get(someone.participant, ())
        main = [answer for answer in given if answer.kind == "main"]
        passed = sum(bool(answer.correct) for answer in given if answer.kind == "catch")
        median = float(np.median([answer.seconds for answer in main])) if main else 0.0
        reasons = []
        if someone.withdrawn:
            reasons.append("withdrew")
        elif not main:
            reasons.append("no main trial answered")
        else:
            if len(main) < rules.share_to_complete * plan.trials:
                reasons.append(f"too few main trials answered: {len(main)} of {plan.trials}")
            if passed < rules.catches_to_pass:
                reasons.append(f"too few attention checks passed: {passed}, {rules.catches_to_pass} are needed")
            if median < rules.seconds_at_least:
                reasons.append(f"too fast: {median:.1f} s a trial, {rules.seconds_at_least:g} are needed")
        if reasons:
            found[someone.participant] = reasons
    return found


def comparisons(plan: Plan, main: Sequence[Response]) -> list[dict[str, Any]]:
    """Each pair of arms: the mean over people and its test, and over people and photos; corrected for their number."""
    level = 1 - plan.analysis.alpha / len(plan.pairs)
    found = [_comparison(plan, first, second, main, level) for first, second in plan.pairs]
    for test in ("people", "people_and_photos"):
        corrected = holm([1.0 if entry[test] is None else entry[test]["p"] for entry in found])
        for entry, p in zip(found, corrected, strict=True):
            if entry[test] is not None:
                entry[test] |= {"p_corrected": p, "significant": p <= plan.analysis.alpha}
    return found


def _comparison(plan: Plan, first: str, second: str, main: Sequence[Response], level: float) -> dict[str, Any]:
    choice = plan.task == "preference"
    compared = outcomes(plan, first, second, main)
    of_person = _values(compared, choice)
    used = [outcome for outcome in compared if outcome.answer.participant in of_person]
    entry: dict[str, Any] = {
        "first": first,
        "second": second,
        "measure": f"share of choices of {first}" if choice else f"right answers with {first} less those with {second}",
        "trials": len(used),
        "not_compared": len({answer.participant for answer in main}) - len(of_person),
        "values": [of_person[person] for person in sorted(of_person)],
        "people": None,
        "people_and_photos": None,
    }
    test: dict[str, Any] = {"null": 0.5 if choice else 0.0, "bounds": (0.0 if choice else -1.0, 1.0)}
    test |= {"level": level, "seed": plan.analysis.seed}
    if of_person:
        entry["people"] = asdict(mean_by_sign_flips(entry["values"], **test))
    if len(of_person) > 1 and len({outcome.answer.photo for outcome in used}) > 1:
        trials = Counter((outcome.answer.participant, outcome.second) for outcome in used)
        crossed = mean_over_people_and_photos(
            [outcome.value for outcome in used],
            [outcome.answer.participant for outcome in used],
            [outcome.answer.photo for outcome in used],
            [1 / trials[outcome.answer.participant, outcome.second] for outcome in used],
            against=None if choice else [outcome.second for outcome in used],
            **test,
        )
        entry["people_and_photos"] = asdict(crossed)
    return entry


def _values(compared: Sequence[Outcome], choice: bool) -> dict[str, float]:
    """x_i of each person who answered about both arms."""
    arms: tuple[dict[str, list[float]], dict[str, list[float]]] = (defaultdict(list), defaultdict(list))
    for answer, value, second in compared:
        arms[second][answer.participant].append(value)
    if choice:
        return {person: float(np.mean(values)) for person, values in arms[0].items()}
    both = arms[0].keys() & arms[1].keys()
    return {person: float(np.mean(arms[0][person]) - np.mean(arms[1][person])) for person in both}


def decisions(plan: Plan, comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the registered test, over the registered population, says of each pair."""
    key = plan.analysis.population.replace(" ", "_")
    decided = []
    for entry in comparisons:
        result = entry[key] or {"p_corrected": None, "significant": False}
        better = None
        if result["significant"]:
            better = entry["first"] if result["mean"] > result["null"] else entry["second"]
        pair = {"first": entry["first"], "second": entry["second"], "tested": entry[key] is not None}
        decided.append(pair | {"p": result["p_corrected"], "better": better})
    return decided


def strengths(plan: Plan, kept: Mapping[str, Sequence[Response]]) -> dict[str, Any]:
    """Bradley and Terry's strengths, their interval by bootstrap of people."""
    index = {arm: k for k, arm in enumerate(plan.arm_names)}
    wins = np.zeros((len(kept), len(index), len(index)))  # of each person, of the row's arm over the column's
    for i, person in enumerate(sorted(kept)):
        for answer in kept[person]:
            if answer.kind == "main":
                lost = answer.right if answer.chosen == answer.left else answer.left
                wins[i, index[str(answer.chosen)], index[str(lost)]] += 1
    found: dict[str, Any] = {"arms": [], "groups": [], "prior_sd": bradley_terry.PRIOR}
    if len(wins):
        centre = bradley_terry.strengths(wins.sum(axis=0))
        drawn = bradley_terry.bootstrapped(wins, seed=plan.analysis.seed)
        low, high = np.quantile(drawn, [plan.analysis.alpha / 2, 1 - plan.analysis.alpha / 2], axis=0)
        for arm, *numbers in zip(plan.arm_names, centre.tolist(), low.tolist(), high.tolist(), strict=True):
            found["arms"].append({"arm": arm} | dict(zip(("strength", "low", "high"), numbers, strict=True)))
        for group in bradley_terry.connected(wins.sum(axis=0)):
            found["groups"].append([plan.arm_names[k] for k in group])
    return found


def accuracies(plan: Plan, kept: Mapping[str, Sequence[Response]]) -> list[dict[str, Any]]:
    """Right answers with each arm, people as units."""
    found = []
    for arm in plan.arm_names:
        right = shares(kept, lambda a, arm=arm: bool(a.correct) if a.kind == "main" and a.arm == arm else None)  # type: ignore[misc]
        found.append({"arm": arm, "people": len(right), "values": right} | mean(right, plan))
    return found


def mean(values: Sequence[float], plan: Plan) -> dict[str, Any]:
    """The mean share over people with its interval, uncorrected."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    level, seed = 1 - plan.analysis.alpha, plan.analysis.seed
    found = mean_by_sign_flips(values, null=0.5, level=level, bounds=(0.0, 1.0), draws=9_999, seed=seed)
    return {"mean": found.mean, "low": found.low, "high": found.high}
