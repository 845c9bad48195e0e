"""The registered analysis of a study: who is analysed, what is tested, what is only described.

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
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bla.study import bradley_terry
from bla.study.agreement import agreement
from bla.study.crossed import mean_over_people_and_photos
from bla.study.errors import AnalysisError
from bla.study.signflip import holm, mean_over_people
from bla.study.simulation import Population, logit_sd

Floats = npt.NDArray[np.float64]

SCHEMA_VERSION = 1
PREFERENCE = "preference"
"""The task in which two arms stand side by side; in the others one is shown, and answers are right or wrong."""


@dataclass(frozen=True)
class Registered:
    """What a study's plan fixes about its analysis."""

    title: str
    question: str
    task: Literal["preference", "prediction", "agreement"]
    arms: tuple[str, ...]
    people: int
    """Planned."""
    trials: int
    """Main trials of a person."""
    population: Population = "people"
    alpha: float = 0.05
    catches_to_pass: int = 0
    seconds_at_least: float = 0.0
    """Of a person's median main trial."""
    share_to_complete: float = 1.0
    """Of the main trials."""
    seed: int = 0
    plan: str = ""
    """The plan's digest."""


@dataclass(frozen=True)
class Answer:
    """One answered trial. `left` and `right` are arms side by side; `arm` is the one shown alone."""

    person: str
    photo: str
    kind: Literal["main", "repeat", "catch"]
    side: Literal["left", "right"]
    seconds: float
    left: str | None = None
    right: str | None = None
    arm: str | None = None
    correct: bool | None = None

    @property
    def chosen(self) -> str | None:
        """The arm that was chosen, of two."""
        return self.left if self.side == "left" else self.right


@dataclass(frozen=True)
class Taker:
    """A person who took part, whether or not they answered anything."""

    person: str
    finished: bool
    simulated: bool = False
    notes: tuple[str, ...] = field(default=())
    """Reasons to exclude that the answers do not show, as the person's wish."""


def analyse(registered: Registered, takers: Sequence[Taker], answers: Sequence[Answer]) -> dict[str, Any]:
    """All results, as JSON has them: registered, description only, quality, exploratory."""
    simulated = {taker.simulated for taker in takers}
    if len(simulated) > 1:
        raise AnalysisError(
            "expected people who are all real or all simulated, got both: rehearse in a copy of the study"
        )
    known = {taker.person for taker in takers}
    strangers = {answer.person for answer in answers} - known
    if strangers:
        raise AnalysisError(f"expected answers of the study's people, got some of {len(strangers)} others")
    answers = sorted(answers, key=lambda a: (a.person, a.photo, a.kind, a.left or "", a.right or "", a.arm or ""))
    by_person: dict[str, list[Answer]] = {person: [] for person in sorted(known)}
    for answer in answers:
        by_person[answer.person].append(answer)
    excluded = exclusions(registered, takers, by_person)
    kept = {person: given for person, given in by_person.items() if person not in excluded}
    main = [answer for given in kept.values() for answer in given if answer.kind == "main"]
    comparisons = _comparisons(registered, main)
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "simulated": simulated == {True},
        "registered": asdict(registered),
        "people": {
            "took_part": len(takers),
            "finished": sum(taker.finished for taker in takers),
            "analysed": len(kept),
            "planned": registered.people,
            "excluded": [{"person": person, "reasons": reasons} for person, reasons in excluded.items()],
            "reasons": dict(Counter(_kind(reason) for reasons in excluded.values() for reason in reasons)),
        },
        "trials": len(main),
        "comparisons": comparisons,
        "decision": _decisions(registered, comparisons),
        "strengths": _strengths(registered, kept) if _many(registered) else None,
        "accuracy": None if registered.task == PREFERENCE else _accuracies(registered, kept),
        "pooled": _pooled(registered, main),
        "quality": {
            "catches": _catches(by_person),
            "repeats": _repeats(registered, kept),
            "seconds": _seconds(kept),
            "side": _side(registered, kept),
        },
        "exploratory": {
            "agreement": _agreements(registered, main),
            "photos": _photos(registered, main),
            "spread": _spread(registered, kept),
            "without_exclusions": _unexcluded(registered, by_person) if excluded else None,
        },
    }
    return results


def exclusions(
    registered: Registered, takers: Sequence[Taker], by_person: Mapping[str, Sequence[Answer]]
) -> dict[str, list[str]]:
    """Who is left out by the registered rules, and all the reasons."""
    found: dict[str, list[str]] = {}
    for taker in sorted(takers, key=lambda taker: taker.person):
        given = by_person.get(taker.person, ())
        main = [answer for answer in given if answer.kind == "main"]
        catches = [answer for answer in given if answer.kind == "catch"]
        passed = sum(bool(answer.correct) for answer in catches)
        reasons = list(taker.notes)
        if not main:
            reasons.append("no main trial answered")
        elif len(main) < registered.share_to_complete * registered.trials:
            reasons.append(f"too few main trials answered: {len(main)} of {registered.trials}")
        if main and passed < registered.catches_to_pass:
            reasons.append(f"too few attention checks passed: {passed}, {registered.catches_to_pass} are needed")
        if main and (median := float(np.median([answer.seconds for answer in main]))) < registered.seconds_at_least:
            reasons.append(f"too fast: {median:.1f} s a trial, {registered.seconds_at_least:g} are needed")
        if reasons:
            found[taker.person] = reasons
    return found


def _kind(reason: str) -> str:
    return reason.partition(":")[0]


def _many(registered: Registered) -> bool:
    return registered.task == PREFERENCE and len(registered.arms) > 2


def _pairs(registered: Registered) -> list[tuple[str, str]]:
    return list(combinations(registered.arms, 2))


# --- registered ---------------------------------------------------------------------------------------------------


def _comparisons(registered: Registered, main: Sequence[Answer]) -> list[dict[str, Any]]:
    """Each pair of arms: the mean over people and its test, and over people and photos; corrected for their number."""
    pairs = _pairs(registered)
    level = 1 - registered.alpha / len(pairs)
    found = [_comparison(registered, first, second, main, level) for first, second in pairs]
    for test in ("people", "people_and_photos"):
        corrected = holm([1.0 if entry[test] is None else entry[test]["p"] for entry in found])
        for entry, p in zip(found, corrected, strict=True):
            if entry[test] is not None:
                entry[test] |= {"p_corrected": float(p), "significant": bool(p <= registered.alpha)}
    return found


def _comparison(
    registered: Registered, first: str, second: str, main: Sequence[Answer], level: float
) -> dict[str, Any]:
    values = _values(registered, first, second, main)
    choice = registered.task == PREFERENCE
    null, bounds = (0.5, (0.0, 1.0)) if choice else (0.0, (-1.0, 1.0))
    used = [answer for answer in _about(registered, first, second, main) if answer.person in values]
    entry: dict[str, Any] = {
        "first": first,
        "second": second,
        "measure": f"share of choices of {first}" if choice else f"right answers with {first} less those with {second}",
        "trials": len(used),
        "not_compared": len({answer.person for answer in main}) - len(values),
        "values": [values[person] for person in sorted(values)],
        "people": None,
        "people_and_photos": None,
    }
    if not values:
        return entry
    mean = mean_over_people(list(values.values()), null=null, level=level, bounds=bounds, seed=registered.seed)
    entry["people"] = asdict(mean)
    photos = {answer.photo for answer in used}
    if len(values) > 1 and len(photos) > 1:
        outcomes, against = _outcomes(registered, first, used)
        asked = Counter((answer.person, against[k]) for k, answer in enumerate(used))
        crossed = mean_over_people_and_photos(
            outcomes,
            [answer.person for answer in used],
            [answer.photo for answer in used],
            [1 / asked[answer.person, against[k]] for k, answer in enumerate(used)],
            against=None if choice else against,
            null=null,
            level=level,
            bounds=bounds,
            seed=registered.seed,
        )
        entry["people_and_photos"] = asdict(crossed)
    return entry


def _about(registered: Registered, first: str, second: str, main: Sequence[Answer]) -> list[Answer]:
    """The main trials that a pair of arms is compared by."""
    if registered.task == PREFERENCE:
        return [answer for answer in main if {answer.left, answer.right} == {first, second}]
    return [answer for answer in main if answer.arm in (first, second)]


def _outcomes(registered: Registered, first: str, used: Sequence[Answer]) -> tuple[list[float], list[bool]]:
    if registered.task == PREFERENCE:
        return [float(answer.chosen == first) for answer in used], [False] * len(used)
    return [float(bool(answer.correct)) for answer in used], [answer.arm != first for answer in used]


def _values(registered: Registered, first: str, second: str, main: Sequence[Answer]) -> dict[str, float]:
    """x_i of each person who answered about both arms."""
    used = _about(registered, first, second, main)
    outcomes, against = _outcomes(registered, first, used)
    of_first: dict[str, list[float]] = defaultdict(list)
    of_second: dict[str, list[float]] = defaultdict(list)
    for answer, outcome, other in zip(used, outcomes, against, strict=True):
        (of_second if other else of_first)[answer.person].append(outcome)
    if registered.task == PREFERENCE:
        return {person: float(np.mean(values)) for person, values in of_first.items()}
    return {
        person: float(np.mean(values) - np.mean(of_second[person]))
        for person, values in of_first.items()
        if person in of_second
    }


def _decisions(registered: Registered, comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the registered test, over the registered population, says of each pair."""
    key = "people" if registered.population == "people" else "people_and_photos"
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


def _strengths(registered: Registered, kept: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Bradley and Terry's strengths, their interval by bootstrap of people."""
    wins = _wins(registered, kept)
    if not len(wins):
        return {"arms": [], "groups": [], "prior_sd": bradley_terry.PRIOR}
    centre = bradley_terry.strengths(wins.sum(axis=0))
    drawn = bradley_terry.bootstrapped(wins, seed=registered.seed)
    low, high = np.quantile(drawn, [registered.alpha / 2, 1 - registered.alpha / 2], axis=0)
    groups = bradley_terry.connected(wins.sum(axis=0))
    return {
        "arms": [
            {"arm": arm, "strength": float(centre[k]), "low": float(low[k]), "high": float(high[k])}
            for k, arm in enumerate(registered.arms)
        ],
        "groups": [[registered.arms[k] for k in group] for group in groups],
        "prior_sd": bradley_terry.PRIOR,
    }


def _wins(registered: Registered, kept: Mapping[str, Sequence[Answer]]) -> Floats:
    """(I, K, K) how often each person chose the row's arm over the column's."""
    place = {arm: k for k, arm in enumerate(registered.arms)}
    wins = np.zeros((len(kept), len(place), len(place)))
    for i, person in enumerate(sorted(kept)):
        for answer in kept[person]:
            if answer.kind == "main" and answer.left is not None and answer.right is not None:
                won, lost = (answer.left, answer.right) if answer.side == "left" else (answer.right, answer.left)
                wins[i, place[won], place[lost]] += 1
    return wins


def _accuracies(registered: Registered, kept: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """Right answers with each arm, people as units."""
    found = []
    for arm in registered.arms:
        shares = [
            float(np.mean(right))
            for person in sorted(kept)
            if (right := [bool(a.correct) for a in kept[person] if a.kind == "main" and a.arm == arm])
        ]
        found.append({"arm": arm, "people": len(shares), "values": shares} | _mean(shares, registered))
    return found


def _mean(values: Sequence[float], registered: Registered, null: float = 0.5) -> dict[str, Any]:
    """Mean over people with its interval, by itself."""
    if not values:
        return {"mean": None, "low": None, "high": None}
    found = mean_over_people(
        values, null=null, level=1 - registered.alpha, bounds=(0.0, 1.0), draws=9_999, seed=registered.seed
    )
    return {"mean": found.mean, "low": found.low, "high": found.high}


# --- description only, quality ------------------------------------------------------------------------------------


def _pooled(registered: Registered, main: Sequence[Answer]) -> list[dict[str, Any]]:
    """Counts of all trials. Trials are no units, so there is neither interval nor test."""
    found = []
    if registered.task == PREFERENCE:
        for first, second in _pairs(registered):
            used = _about(registered, first, second, main)
            won = sum(answer.chosen == first for answer in used)
            found.append({"first": first, "second": second} | _share(won, len(used)))
    else:
        for arm in registered.arms:
            right = [bool(answer.correct) for answer in main if answer.arm == arm]
            found.append({"arm": arm} | _share(sum(right), len(right)))
    return found


def _share(part: int, whole: int) -> dict[str, Any]:
    return {"count": part, "of": whole, "share": part / whole if whole else None}


def _catches(by_person: Mapping[str, Sequence[Answer]]) -> dict[str, Any] | None:
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


def _repeats(registered: Registered, kept: Mapping[str, Sequence[Answer]]) -> dict[str, Any] | None:
    """How often people answered the same when a trial came again: 1/2 is what coins do."""
    shares, trials = [], 0
    for person in sorted(kept):
        first = {_what(answer): answer for answer in kept[person] if answer.kind == "main"}
        same = [
            _said(registered, answer) == _said(registered, first[_what(answer)])
            for answer in kept[person]
            if answer.kind == "repeat" and _what(answer) in first
        ]
        trials += len(same)
        if same:
            shares.append(float(np.mean(same)))
    return {"people": len(shares), "trials": trials} | _mean(shares, registered) if shares else None


def _what(answer: Answer) -> tuple[str, frozenset[str | None]]:
    return answer.photo, frozenset((answer.left, answer.right, answer.arm))


def _said(registered: Registered, answer: Answer) -> object:
    return answer.chosen if registered.task == PREFERENCE else bool(answer.correct)


def _seconds(kept: Mapping[str, Sequence[Answer]]) -> dict[str, Any] | None:
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


def _side(registered: Registered, kept: Mapping[str, Sequence[Answer]]) -> dict[str, Any] | None:
    """The share of answers on the left, people as units. Sides are balanced, so 1/2 is no bias."""
    shares = [
        float(np.mean(sides))
        for person in sorted(kept)
        if (sides := [answer.side == "left" for answer in kept[person] if answer.kind == "main"])
    ]
    if not shares:
        return None
    return {"people": len(shares), "values": shares, "always_one_side": sum(s in (0.0, 1.0) for s in shares)} | _mean(
        shares, registered
    )


# --- exploratory --------------------------------------------------------------------------------------------------


def _agreements(registered: Registered, main: Sequence[Answer]) -> list[dict[str, Any]]:
    """Krippendorff's alpha between people on the same photos: which arm was chosen, or whether the answer was right."""
    found = []
    groups: list[tuple[dict[str, Any], list[Answer], list[float]]] = []
    if registered.task == PREFERENCE:
        for first, second in _pairs(registered):
            used = _about(registered, first, second, main)
            groups.append(({"first": first, "second": second}, used, _outcomes(registered, first, used)[0]))
    else:
        for arm in registered.arms:
            used = [answer for answer in main if answer.arm == arm]
            groups.append(({"arm": arm}, used, [float(bool(answer.correct)) for answer in used]))
    for name, used, outcomes in groups:
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for answer, outcome in zip(used, outcomes, strict=True):
            counts[answer.photo][int(outcome)] += 1
        table = np.array([counts[photo] for photo in sorted(counts)], float).reshape(-1, 2)
        found.append(name | asdict(agreement(table, level=1 - registered.alpha, seed=registered.seed)))
    return found


def _photos(registered: Registered, main: Sequence[Answer]) -> list[dict[str, Any]]:
    """Of each photo and pair, how many chose the first arm; in other tasks, of photo and arm, how many were right."""
    counts: dict[tuple[str, str, str | None], list[float]] = defaultdict(list)
    if registered.task == PREFERENCE:
        for first, second in _pairs(registered):
            for answer in _about(registered, first, second, main):
                counts[answer.photo, first, second].append(float(answer.chosen == first))
    else:
        for answer in main:
            if answer.arm is not None:
                counts[answer.photo, answer.arm, None].append(float(bool(answer.correct)))
    return [
        {"photo": photo, "first": first, "second": second, "answers": len(given), "share": float(np.mean(given))}
        for (photo, first, second), given in sorted(counts.items(), key=lambda item: tuple(map(str, item[0])))
    ]


def _spread(registered: Registered, kept: Mapping[str, Sequence[Answer]]) -> dict[str, Any] | None:
    """How much people and photos differ, in logits, by moments: what `bla study power` asks for. Two arms alone."""
    if registered.task != PREFERENCE or len(registered.arms) != 2:
        return None
    first, second = registered.arms
    main = [answer for given in kept.values() for answer in given if answer.kind == "main"]
    return {
        "person_sd": _sd_of_units(_grouped(main, first, second, registered, by="person")),
        "photo_sd": _sd_of_units(_grouped(main, first, second, registered, by="photo")),
    }


def _grouped(
    main: Sequence[Answer], first: str, second: str, registered: Registered, *, by: Literal["person", "photo"]
) -> list[list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for answer in _about(registered, first, second, main):
        groups[getattr(answer, by)].append(float(answer.chosen == first))
    return [group for group in groups.values() if len(group) > 1]


def _sd_of_units(groups: Sequence[Sequence[float]]) -> float | None:
    """Variance of the units' shares less what counting alone gives, as a standard deviation of logits."""
    if len(groups) < 3:
        return None
    shares = np.array([np.mean(group) for group in groups])
    counting = np.mean([s * (1 - s) / (len(group) - 1) for s, group in zip(shares, groups, strict=True)])
    return logit_sd(float(shares.mean()), float(max(shares.var(ddof=1) - counting, 0.0)))


def _unexcluded(registered: Registered, by_person: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """The registered test on everyone who answered, whatever the rules say."""
    main = [answer for given in by_person.values() for answer in given if answer.kind == "main"]
    entries = _comparisons(registered, main)
    for entry in entries:
        del entry["values"]
    return entries
