"""Who sees what where: balance of sides, arms and photos as properties of every plan."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bla.study.plan import Plan
from bla.study.schedule import Trial, block_size, trials_of
from small_study import photo, record

TASKS = ("preference", "prediction", "agreement")


@st.composite
def plans(draw: st.DrawFn, tasks: tuple[str, ...] = TASKS) -> Plan:
    task = draw(st.sampled_from(tasks))
    arms = tuple("ABCDE"[: draw(st.integers(2, 5))])
    photos = draw(st.integers(1, 16))
    trials = draw(st.integers(1, photos))
    spare = [photo(f"s{index}", arms) for index in range(draw(st.integers(0, 4)))]
    catches = [{"photo": item["id"], "arm": arms[0], "decoy": "p0" if task == "preference" else None} for item in spare]
    more: dict[str, Any] = {
        "task": task, "trials": trials, "repeats": draw(st.integers(0, trials)), "spare": spare, "catches": catches,
        "practice": [photo("t0", arms)], "seed": draw(st.integers(0, 99)),
    }  # fmt: skip
    return Plan.from_json(json.dumps(record(arms, photos, **more)))


def leanings(trials: list[Trial]) -> Counter[str | None]:
    """How much oftener each arm is on the left than on the right."""
    found: Counter[str | None] = Counter()
    for trial in trials:
        found[trial.left] += 1
        found[trial.right] -= 1
    return found


@given(plans(("preference",)), st.integers(0, 500))
def test_sides_are_balanced_within_one_for_each_person(plan: Plan, number: int) -> None:
    trials = trials_of(plan, number)
    main = [trial for trial in trials if trial.kind == "main"]
    assert all(abs(lead) <= 1 for lead in leanings(main).values())
    for pair in plan.pairs:
        shown = [trial for trial in main if {trial.left, trial.right} == set(pair)]
        assert abs(sum(1 if trial.left == pair[0] else -1 for trial in shown)) <= 1
    counts = Counter(frozenset((trial.left, trial.right)) for trial in main)
    assert max(counts.values()) - min(counts.get(frozenset(pair), 0) for pair in plan.pairs) <= 1
    if len(plan.arms) == 2:
        both = [trial for trial in trials if trial.kind in ("main", "repeat")]
        assert all(abs(lead) <= 1 for lead in leanings(both).values())
    expected = Counter(trial.expected for trial in trials if trial.kind == "catch")
    assert abs(expected["left"] - expected["right"]) <= 1


@given(plans(("prediction", "agreement")), st.integers(0, 500))
def test_arms_and_places_of_the_right_answer_are_balanced(plan: Plan, number: int) -> None:
    main = [trial for trial in trials_of(plan, number) if trial.kind == "main"]
    arms = Counter(trial.arm for trial in main)
    assert max(arms.values()) - min(arms.get(name, 0) for name in plan.arm_names) <= 1
    if plan.task == "prediction":
        places = Counter(trial.options.index(str(trial.expected)) for trial in main)
        assert max(places.values()) - min(places.get(place, 0) for place in range(len(main[0].options))) <= 1


@given(plans(), st.integers(0, 500))
def test_everyone_meets_what_the_plan_says(plan: Plan, number: int) -> None:
    trials = trials_of(plan, number)
    assert trials == trials_of(plan, number)
    assert Counter(trial.kind for trial in trials) == Counter(
        {
            kind: count
            for kind, count in {
                "practice": len(plan.practice), "main": plan.trials, "repeat": plan.repeats, "catch": len(plan.catches),
            }.items()
            if count
        }
    )  # fmt: skip
    main = [trial.photo for trial in trials if trial.kind == "main"]
    assert len(set(main)) == len(main)
    assert all(trial.kind == "practice" for trial in trials[: len(plan.practice)])
    for position, trial in enumerate(trials, 1):
        if trial.kind == "repeat":
            assert trial.repeats is not None
            assert trial.repeats < position
            first = trials[trial.repeats - 1]
            assert (first.kind, first.photo, first.arm) == ("main", trial.photo, trial.arm)
            assert (first.left, first.right) == (trial.right, trial.left)
        if trial.expected is not None:
            assert trial.expected in trial.options


@given(plans(), st.integers(0, 50))
def test_a_block_of_people_shows_each_photo_every_way(plan: Plan, block: int) -> None:
    size = block_size(plan)
    ways = Counter(
        (trial.photo, trial.left, trial.right, trial.arm)
        for number in range(block * size, (block + 1) * size)
        for trial in trials_of(plan, number)
        if trial.kind == "main"
    )
    photos = {way[0] for way in ways}
    assert len(photos) == plan.trials
    assert set(ways.values()) == {1}
    assert len(ways) == len(photos) * size


def test_order_and_sides_differ_from_person_to_person() -> None:
    plan = Plan.from_json(json.dumps(record(count=16)))
    orders = {tuple(trial.photo for trial in trials_of(plan, number)) for number in range(40)}
    assert len(orders) == 40
    first = Counter(trials_of(plan, number)[0].left for number in range(400))
    assert first["BLA"] == pytest.approx(200, abs=50)
