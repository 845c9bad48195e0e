"""What is not registered: counts of all trials, the answers' quality, and what is only explored.

Nothing here decides anything. Means over people are given with the interval of the registered test.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bla.study.agreement import agreement
from bla.study.plan import Plan
from bla.study.registered import Outcome, comparisons, mean, outcomes, shares
from bla.study.responses import Response
from bla.study.simulation import logit_sd

Kept = Mapping[str, Sequence[Response]]
Group = tuple[dict[str, Any], list[Outcome]]


def groups(plan: Plan, main: Sequence[Response]) -> list[Group]:
    """The units of description: each pair of arms side by side, or each arm that was shown alone."""
    if plan.task == "preference":
        return [({"first": a, "second": b}, outcomes(plan, a, b, main)) for a, b in plan.pairs]
    return [({"arm": arm}, outcomes(plan, arm, arm, main)) for arm in plan.arm_names]


def pooled(plan: Plan, main: Sequence[Response]) -> list[dict[str, Any]]:
    """Counts of all trials. Trials are no units, so there is neither interval nor test."""
    found = []
    for name, compared in groups(plan, main):
        count, of = int(sum(outcome.value for outcome in compared)), len(compared)
        found.append(name | {"count": count, "of": of, "share": count / of if of else None})
    return found


def catches(by_person: Kept) -> dict[str, Any] | None:
    """How many attention checks were passed, before exclusions."""
    passed = shares(by_person, lambda answer: bool(answer.correct) if answer.kind == "catch" else None)
    if not passed:
        return None
    return {
        "people": len(passed),
        "answers": sum(answer.kind == "catch" for given in by_person.values() for answer in given),
        "mean_passed": float(np.mean(passed)),
        "passed_all": sum(share == 1 for share in passed),
    }


def repeats(plan: Plan, kept: Kept) -> dict[str, Any] | None:
    """How often people answered the same when a trial came again; 1/2 is the share of random answers."""
    firsts = {(answer.participant, answer.position): _said(answer) for given in kept.values() for answer in given}

    def same(answer: Response) -> bool | None:
        first = firsts.get((answer.participant, answer.repeats or 0))
        return None if answer.kind != "repeat" or first is None else _said(answer) == first

    found = shares(kept, same)
    trials = sum(same(answer) is not None for given in kept.values() for answer in given)
    return {"people": len(found), "trials": trials} | mean(found, plan) if found else None


def _said(answer: Response) -> str | None:
    return answer.chosen if answer.task == "preference" else answer.choice


def seconds(kept: Kept) -> dict[str, Any] | None:
    """Response times of main trials: each person's median, and its quartiles over people."""
    times = [[answer.seconds for answer in kept[person] if answer.kind == "main"] for person in sorted(kept)]
    medians = [float(np.median(own)) for own in times if own]
    if not medians:
        return None
    names = ("least", "lower_quartile", "median", "upper_quartile", "most")
    return {"medians": medians} | dict(zip(names, np.quantile(medians, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True))


def side(plan: Plan, kept: Kept) -> dict[str, Any] | None:
    """The share of answers in the first place, people as units, where there are two: left, or yes."""
    found = shares(kept, lambda a: a.place == 0 if a.kind == "main" and len(a.options) == 2 else None)
    if not found:
        return None
    always = sum(share in (0.0, 1.0) for share in found)
    return {"people": len(found), "values": found, "always_one_side": always} | mean(found, plan)


def agreements(plan: Plan, main: Sequence[Response]) -> list[dict[str, Any]]:
    """Krippendorff's alpha between people on the same photos: which arm was chosen, or whether the answer was right."""
    found = []
    for name, compared in groups(plan, main):
        counts = [[of.count(0.0), of.count(1.0)] for of in _values_by(compared, "photo").values()]
        table = np.array(counts, float).reshape(-1, 2)
        found.append(name | asdict(agreement(table, level=1 - plan.analysis.alpha, seed=plan.analysis.seed)))
    return found


def photos(plan: Plan, main: Sequence[Response]) -> list[dict[str, Any]]:
    """Of each photo and pair, how many chose the first arm; in other tasks, of photo and arm, how many were right."""
    found = []
    for name, compared in groups(plan, main):
        pair = {"first": name.get("first", name.get("arm")), "second": name.get("second")}
        for photo, values in _values_by(compared, "photo").items():
            found.append({"photo": photo} | pair | {"answers": len(values), "share": float(np.mean(values))})
    return sorted(found, key=lambda entry: (entry["photo"], entry["first"], str(entry["second"])))


def spread(plan: Plan, kept: Kept) -> dict[str, Any] | None:
    """How much people and photos differ, in logits, by moments: what `bla study power` needs. Two arms alone."""
    if plan.task != "preference" or len(plan.arm_names) != 2:
        return None
    main = [answer for given in kept.values() for answer in given if answer.kind == "main"]
    compared = outcomes(plan, *plan.arm_names, main)
    person, photo = (_sd_of_units(_values_by(compared, unit)) for unit in ("participant", "photo"))
    return {"person_sd": person, "photo_sd": photo}


def _values_by(compared: Sequence[Outcome], unit: str) -> dict[str, list[float]]:
    """The values of each photo or participant, in the order of their names."""
    found: dict[str, list[float]] = defaultdict(list)
    for outcome in compared:
        found[getattr(outcome.answer, unit)].append(outcome.value)
    return dict(sorted(found.items()))


def _sd_of_units(units: Mapping[str, Sequence[float]]) -> float | None:
    """The variance of the units' shares minus the sampling variance, as a standard deviation in logits."""
    several = [values for values in units.values() if len(values) > 1]
    if len(several) < 3:
        return None
    means = np.array([np.mean(values) for values in several])
    sampling = np.mean([s * (1 - s) / (len(values) - 1) for s, values in zip(means, several, strict=True)])
    return logit_sd(float(means.mean()), float(max(means.var(ddof=1) - sampling, 0.0)))


def without_exclusions(plan: Plan, by_person: Kept) -> list[dict[str, Any]]:
    """The registered test on everyone who answered, whatever the rules say."""
    main = [answer for given in by_person.values() for answer in given if answer.kind == "main"]
    return [{k: v for k, v in entry.items() if k != "values"} for entry in comparisons(plan, main)]
