"""What is registered: who is analysed, what is tested, and how.

Of person i and two arms a, b let x_i be the share of i's main trials with both in which a was chosen; in a task with
right answers, i's share of right answers with a less that with b. The registered estimate is the mean of x_i over
people, each counting once; its test and interval are those of `signflip`. Trials are not pooled: thirty answers of one
person are not thirty people, and a binomial test of 20 people's 600 answers finds something in 43 of 100 studies in
which there is nothing, where people differ by 1 logit. The same mean for photos like these, too, is that of `crossed`;
the plan says which of the two decides. Several pairs of arms are corrected by Holm, their intervals by Bonferroni.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from bla.study import bradley_terry
from bla.study.crossed import mean_over_people_and_photos
from bla.study.plan import Plan
from bla.study.responses import Participant, Response
from bla.study.signflip import holm, mean_over_people

Floats = npt.NDArray[np.float64]

PREFERENCE = "preference"
"""The task in which two arms stand side by side; in the others one is shown, and answers are right or wrong."""


def exclusions(
    plan: Plan, participants: Sequence[Participant], by_person: Mapping[str, Sequence[Response]]
) -> dict[str, list[str]]:
    """Who is left out by the registered rules, and all the reasons."""
    found: dict[str, list[str]] = {}
    for someone in sorted(participants, key=lambda one: one.participant):
        if someone.withdrawn:
            found[someone.participant] = ["withdrew"]
            continue
        given = by_person.get(someone.participant, ())
        main = [answer for answer in given if answer.kind == "main"]
        catches = [answer for answer in given if answer.kind == "catch"]
        passed = sum(bool(answer.correct) for answer in catches)
        reasons = []
        if not main:
            reasons.append("no main trial answered")
        elif len(main) < plan.exclusions.share_to_complete * plan.trials:
            reasons.append(f"too few main trials answered: {len(main)} of {plan.trials}")
        if main and passed < plan.exclusions.catches_to_pass:
            reasons.append(f"too few attention checks passed: {passed}, {plan.exclusions.catches_to_pass} are needed")
        median = float(np.median([answer.seconds for answer in main])) if main else 0.0
        if main and median < plan.exclusions.seconds_at_least:
            reasons.append(f"too fast: {median:.1f} s a trial, {plan.exclusions.seconds_at_least:g} are needed")
        if reasons:
            found[someone.participant] = reasons
    return found


def comparisons(plan: Plan, main: Sequence[Response]) -> list[dict[str, Any]]:
    """Each pair of arms: the mean over people and its test, and over people and photos; corrected for their number."""
    pairs = plan.pairs
    level = 1 - plan.analysis.alpha / len(pairs)
    found = [_comparison(plan, first, second, main, level) for first, second in pairs]
    for test in ("people", "people_and_photos"):
        corrected = holm([1.0 if entry[test] is None else entry[test]["p"] for entry in found])
        for entry, p in zip(found, corrected, strict=True):
            if entry[test] is not None:
                entry[test] |= {"p_corrected": float(p), "significant": bool(p <= plan.analysis.alpha)}
    return found


def _comparison(plan: Plan, first: str, second: str, main: Sequence[Response], level: float) -> dict[str, Any]:
    of_person = values(plan, first, second, main)
    choice = plan.task == PREFERENCE
    null, bounds = (0.5, (0.0, 1.0)) if choice else (0.0, (-1.0, 1.0))
    used = [answer for answer in about(plan, first, second, main) if answer.participant in of_person]
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
    if not of_person:
        return entry
    mean = mean_over_people(list(of_person.values()), null=null, level=level, bounds=bounds, seed=plan.analysis.seed)
    entry["people"] = asdict(mean)
    photos = {answer.photo for answer in used}
    if len(of_person) > 1 and len(photos) > 1:
        what, against = outcomes(plan, first, used)
        asked = Counter((answer.participant, against[k]) for k, answer in enumerate(used))
        crossed = mean_over_people_and_photos(
            what,
            [answer.participant for answer in used],
            [answer.photo for answer in used],
            [1 / asked[answer.participant, against[k]] for k, answer in enumerate(used)],
            against=None if choice else against,
            null=null,
            level=level,
            bounds=bounds,
            seed=plan.analysis.seed,
        )
        entry["people_and_photos"] = asdict(crossed)
    return entry


def about(plan: Plan, first: str, second: str, main: Sequence[Response]) -> list[Response]:
    """The main trials that a pair of arms is compared by."""
    if plan.task == PREFERENCE:
        return [answer for answer in main if {answer.left, answer.right} == {first, second}]
    return [answer for answer in main if answer.arm in (first, second)]


def outcomes(plan: Plan, first: str, used: Sequence[Response]) -> tuple[list[float], list[bool]]:
    """Of each trial, whether the first arm was chosen or the answer is right; and whether the second arm was shown."""
    if plan.task == PREFERENCE:
        return [float(answer.chosen == first) for answer in used], [False] * len(used)
    return [float(bool(answer.correct)) for answer in used], [answer.arm != first for answer in used]


def values(plan: Plan, first: str, second: str, main: Sequence[Response]) -> dict[str, float]:
    """x_i of each person who answered about both arms."""
    used = about(plan, first, second, main)
    what, against = outcomes(plan, first, used)
    of_first: dict[str, list[float]] = defaultdict(list)
    of_second: dict[str, list[float]] = defaultdict(list)
    for answer, outcome, other in zip(used, what, against, strict=True):
        (of_second if other else of_first)[answer.participant].append(outcome)
    if plan.task == PREFERENCE:
        return {person: float(np.mean(values)) for person, values in of_first.items()}
    return {
        person: float(np.mean(values) - np.mean(of_second[person]))
        for person, values in of_first.items()
        if person in of_second
    }


def decisions(plan: Plan, comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the registered test, over the registered population, says of each pair."""
    key = "people" if plan.analysis.population == "people" else "people_and_photos"
    decided = []
    for entry in comparisons:
        result = entry[key]
        better = None
        if result is not None and result["significant"]:
            better = entry["first"] if result["mean"] > result["null"] else entry["second"]
        decided.append(
            {
                "first": entry["first"],
                "second": entry["second"],
                "tested": result is not None,
                "p": None if result is None else result["p_corrected"],
                "better": better,
            }
        )
    return decided


def strengths(plan: Plan, kept: Mapping[str, Sequence[Response]]) -> dict[str, Any]:
    """Bradley and Terry's strengths, their interval by bootstrap of people."""
    wins = _wins(plan, kept)
    if not len(wins):
        return {"arms": [], "groups": [], "prior_sd": bradley_terry.PRIOR}
    centre = bradley_terry.strengths(wins.sum(axis=0))
    drawn = bradley_terry.bootstrapped(wins, seed=plan.analysis.seed)
    low, high = np.quantile(drawn, [plan.analysis.alpha / 2, 1 - plan.analysis.alpha / 2], axis=0)
    groups = bradley_terry.connected(wins.sum(axis=0))
    return {
        "arms": [
            {"arm": arm, "strength": float(centre[k]), "low": float(low[k]), "high": float(high[k])}
            for k, arm in enumerate(plan.arm_names)
        ],
        "groups": [[plan.arm_names[k] for k in group] for group in groups],
        "prior_sd": bradley_terry.PRIOR,
    }


def _wins(plan: Plan, kept: Mapping[str, Sequence[Response]]) -> Floats:
    """(I, K, K) how often each person chose the row's arm over the column's."""
    index = {arm: k for k, arm in enumerate(plan.arm_names)}
    wins = np.zeros((len(kept), len(index), len(index)))
    for i, person in enumerate(sorted(kept)):
        for answer in kept[person]:
            if answer.kind == "main" and answer.left is not None and answer.right is not None:
                lost = answer.right if answer.chosen == answer.left else answer.left
                wins[i, index[str(answer.chosen)], index[lost]] += 1
    return wins


def accuracies(plan: Plan, kept: Mapping[str, Sequence[Response]]) -> list[dict[str, Any]]:
    """Right answers with each arm, people as units."""
    found = []
    for arm in plan.arm_names:
        shares = [
            float(np.mean(right))
            for person in sorted(kept)
            if (right := [bool(a.correct) for a in kept[person] if a.kind == "main" and a.arm == arm])
        ]
        found.append({"arm": arm, "people": len(shares), "values": shares} | mean(shares, plan))
    return found


def mean(values: Sequence[float], plan: Plan, null: float = 0.5) -> dict[str, Any]:
    """Mean over people with its interval, by itself."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    found = mean_over_people(
        values, null=null, level=1 - plan.analysis.alpha, bounds=(0.0, 1.0), draws=9_999, seed=plan.analysis.seed
    )
    return {"mean": found.mean, "low": found.low, "high": found.high}
