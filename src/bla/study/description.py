"""What is not registered: counts of all trials, the answers' quality, and what is only explored.

Nothing here decides anything. Means over people are given with the interval of the registered test.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from bla.study.agreement import agreement
from bla.study.plan import Plan
from bla.study.registered import PREFERENCE, about, comparisons, mean, outcomes
from bla.study.responses import Response
from bla.study.simulation import logit_sd


def pooled(plan: Plan, main: Sequence[Response]) -> list[dict[str, Any]]:
    """Counts of all trials. Trials are no units, so there is neither interval nor test."""
    found = []
    if plan.task == PREFERENCE:
        for first, second in plan.pairs:
            used = about(plan, first, second, main)
            won = sum(answer.chosen == first for answer in used)
            found.append({"first": first, "second": second} | _share(won, len(used)))
    else:
        for arm in plan.arm_names:
            right = [bool(answer.correct) for answer in main if answer.arm == arm]
            found.append({"arm": arm} | _share(sum(right), len(right)))
    return found


def _share(part: int, whole: int) -> dict[str, Any]:
    return {"count": part, "of": whole, "share": part / whole if whole else None}


def catches(by_person: Mapping[str, Sequence[Response]]) -> dict[str, Any] | None:
    given = {person: [a for a in answers if a.kind == "catch"] for person, answers in by_person.items()}
    shares = [float(np.mean([bool(a.correct) for a in catches])) for catches in given.values() if catches]
    if not shares:
        return None
    return {
        "people": len(shares),
        "answers": sum(map(len, given.values())),
        "mean_passed": float(np.mean(shares)),
        "passed_all": sum(share == 1 for share in shares),
    }


def repeats(plan: Plan, kept: Mapping[str, Sequence[Response]]) -> dict[str, Any] | None:
    """How often people answered the same when a trial came again: 1/2 is what coins do."""
    shares, trials = [], 0
    for who in sorted(kept):
        at = {answer.position: answer for answer in kept[who]}
        same = [
            _said(answer) == _said(at[answer.repeats])
            for answer in kept[who]
            if answer.kind == "repeat" and answer.repeats in at
        ]
        trials += len(same)
        if same:
            shares.append(float(np.mean(same)))
    return {"people": len(shares), "trials": trials} | mean(shares, plan) if shares else None


def _said(answer: Response) -> str | None:
    return answer.chosen if answer.task == PREFERENCE else answer.choice


def seconds(kept: Mapping[str, Sequence[Response]]) -> dict[str, Any] | None:
    """Response times of main trials: each person's median, and its quartiles over people."""
    medians = [
        float(np.median(times))
        for person in sorted(kept)
        if (times := [answer.seconds for answer in kept[person] if answer.kind == "main"])
    ]
    if not medians:
        return None
    quartiles = np.quantile(medians, [0, 0.25, 0.5, 0.75, 1])
    return {"medians": medians} | dict(
        zip(("least", "lower_quartile", "median", "upper_quartile", "most"), map(float, quartiles), strict=True)
    )


def side(plan: Plan, kept: Mapping[str, Sequence[Response]]) -> dict[str, Any] | None:
    """The share of answers in the first place, people as units, where there are two: left, or yes."""
    shares = [
        float(np.mean(sides))
        for person in sorted(kept)
        if (sides := [a.place == 0 for a in kept[person] if a.kind == "main" and len(a.options) == 2])
    ]
    if not shares:
        return None
    told = {"people": len(shares), "values": shares, "always_one_side": sum(share in (0.0, 1.0) for share in shares)}
    return told | mean(shares, plan)


def agreements(plan: Plan, main: Sequence[Response]) -> list[dict[str, Any]]:
    """Krippendorff's alpha between people on the same photos: which arm was chosen, or whether the answer was right."""
    found = []
    groups: list[tuple[dict[str, Any], list[Response], list[float]]] = []
    if plan.task == PREFERENCE:
        for first, second in plan.pairs:
            used = about(plan, first, second, main)
            groups.append(({"first": first, "second": second}, used, outcomes(plan, first, used)[0]))
    else:
        for arm in plan.arm_names:
            used = [answer for answer in main if answer.arm == arm]
            groups.append(({"arm": arm}, used, [float(bool(answer.correct)) for answer in used]))
    for name, used, what in groups:
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for answer, outcome in zip(used, what, strict=True):
            counts[answer.photo][int(outcome)] += 1
        table = np.array([counts[photo] for photo in sorted(counts)], float).reshape(-1, 2)
        found.append(name | asdict(agreement(table, level=1 - plan.analysis.alpha, seed=plan.analysis.seed)))
    return found


def photos(plan: Plan, main: Sequence[Response]) -> list[dict[str, Any]]:
    """Of each photo and pair, how many chose the first arm; in other tasks, of photo and arm, how many were right."""
    counts: dict[tuple[str, str, str | None], list[float]] = defaultdict(list)
    if plan.task == PREFERENCE:
        for first, second in plan.pairs:
            for answer in about(plan, first, second, main):
                counts[answer.photo, first, second].append(float(answer.chosen == first))
    else:
        for answer in main:
            if answer.arm is not None:
                counts[answer.photo, answer.arm, None].append(float(bool(answer.correct)))
    return [
        {"photo": photo, "first": first, "second": second, "answers": len(given), "share": float(np.mean(given))}
        for (photo, first, second), given in sorted(counts.items(), key=lambda item: tuple(map(str, item[0])))
    ]


def spread(plan: Plan, kept: Mapping[str, Sequence[Response]]) -> dict[str, Any] | None:
    """How much people and photos differ, in logits, by moments: what `bla study power` asks for. Two arms alone."""
    if plan.task != PREFERENCE or len(plan.arm_names) != 2:
        return None
    first, second = plan.arm_names
    main = [answer for given in kept.values() for answer in given if answer.kind == "main"]
    return {
        "person_sd": _sd_of_units(_grouped(main, first, second, plan, by="participant")),
        "photo_sd": _sd_of_units(_grouped(main, first, second, plan, by="photo")),
    }


def _grouped(
    main: Sequence[Response], first: str, second: str, plan: Plan, *, by: Literal["participant", "photo"]
) -> list[list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for answer in about(plan, first, second, main):
        groups[getattr(answer, by)].append(float(answer.chosen == first))
    return [group for group in groups.values() if len(group) > 1]


def _sd_of_units(groups: Sequence[Sequence[float]]) -> float | None:
    """Variance of the units' shares less what counting alone gives, as a standard deviation of logits."""
    if len(groups) < 3:
        return None
    shares = np.array([np.mean(group) for group in groups])
    counting = np.mean([s * (1 - s) / (len(group) - 1) for s, group in zip(shares, groups, strict=True)])
    return logit_sd(float(shares.mean()), float(max(shares.var(ddof=1) - counting, 0.0)))


def without_exclusions(plan: Plan, by_person: Mapping[str, Sequence[Response]]) -> list[dict[str, Any]]:
    """The registered test on everyone who answered, whatever the rules say."""
    main = [answer for given in by_person.values() for answer in given if answer.kind == "main"]
    entries = comparisons(plan, main)
    for entry in entries:
        del entry["values"]
    return entries
