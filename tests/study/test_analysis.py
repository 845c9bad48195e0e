"""The registered analysis: hand-computed studies, symmetries, exclusions, what is said and drawn."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bla.study.analysis import analyse
from bla.study.behaviour import Behaviour
from bla.study.errors import AnalysisError
from bla.study.plan import Plan
from bla.study.responses import Collected, Participant, Response
from bla.study.results import as_json, cautions, methods, page, verdicts
from bla.study.simulation import Person, Reply, strengths_for

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def plan_of(arms: tuple[str, ...] = ("A", "B"), *, task: str = "preference", photos: int = 4, **more: Any) -> Plan:
    """A plan without pictures to it."""

    def picture(*name: object) -> dict[str, Any]:
        digest = hashlib.sha256(repr(name).encode()).hexdigest()
        return {"token": digest[:20], "sha256": digest}

    def photo(name: str) -> dict[str, Any]:
        explained = {arm: picture(name, arm) for arm in arms}
        known = {"prediction": "cat", "truth": "cat", "options": ["cat", "dog"]}
        return known | {
            "id": name, "name": name, "sha256": "0" * 64, "plain": picture(name), "explained": explained,
        }  # fmt: skip

    decoys = {"decoy": "s1"} if task == "preference" else {}
    record = {
        "title": "Which is better?", "question": "Which shows why?", "task": task,
        "arms": [{"name": arm, "method": arm} for arm in arms], "photos": [photo(f"f{k}") for k in range(photos)],
        "spare": [photo("s0"), photo("s1")], "catches": [{"photo": "s0", "arm": arms[0]} | decoys] * 3,
        "trials": photos, "people": 8, "width": 64, "height": 48, "file_size": 9, "created": "2026",
    }  # fmt: skip
    return Plan.from_json(json.dumps(record | more))


PLAN = plan_of()


def answer(who: str, position: int, choice: str, photo: str, *, seconds: float = 4.0, **of: Any) -> Response:
    known: dict[str, Any] = {"kind": "main", "task": "preference", "options": ("left", "right")} | of
    expected = known.get("expected")
    return Response(
        participant=who,
        position=position,
        choice=choice,
        photo=photo,
        correct=None if expected is None else choice == expected,
        milliseconds=round(1000 * seconds),
        clock="browser",
        shown_at=NOON,
        answered_at=NOON,
        **known,
    )


def choices(who: str, wins: str, arms: str = "AB", **of: Any) -> list[Response]:
    """Answers of a person, a letter a trial: the arm chosen; sides alternate."""
    given = []
    for number, arm in enumerate(wins):
        left, right = arms if number % 2 == 0 else arms[::-1]
        side = "left" if left == arm else "right"
        given.append(answer(who, number + 1, side, f"f{number}", left=left, right=right, **of))
    return given


def catches(who: str, passes: str) -> list[Response]:
    """P a letter for each passed, f for each failed."""
    return [
        answer(
            who, 90 + k, "left" if c == "p" else "right", "s0", kind="catch", left="A", right="decoy", expected="left"
        )
        for k, c in enumerate(passes)
    ]


def taker(who: str, number: int = 0, *, finished: bool = True, **more: Any) -> Participant:
    ended = NOON if finished else None
    return Participant(participant=who, number=number, trials=9, started_at=NOON, finished_at=ended, **more)


def collected(plan: Plan, people: Iterable[Participant], answers: Iterable[Response]) -> Collected:
    people = tuple(people)
    simulated = any(one.simulated for one in people)
    return Collected(plan=plan.digest(), simulated=simulated, participants=people, responses=tuple(answers))


def studied(wins: dict[str, str], plan: Plan = PLAN, more: tuple[Response, ...] = ()) -> dict[str, Any]:
    answers = [given for who, letters in wins.items() for given in choices(who, letters)]
    return analyse(plan, collected(plan, map(taker, wins), [*answers, *more]))


def simulated(plan: Plan, behaviour: Behaviour, people: int, seed: int) -> dict[str, Any]:
    """A study in memory: pairs and arms in turn, sides alternating."""
    names = plan.arm_names
    takers, answers = [], []
    for number in range(people):
        someone = Person(behaviour, seed, number, plan.trials)
        who = f"p{number}"
        for trial in range(plan.trials):
            if someone.leaves_before is not None and trial >= someone.leaves_before:
                break
            photo = (trial * 7 + number) % plan.trials
            reply: Reply
            if plan.task == "preference":
                pair = plan.pairs[(photo + number) % len(plan.pairs)]
                left, right = pair if (trial + number) % 2 else pair[::-1]
                reply = someone.choice(trial, left=names.index(left), right=names.index(right), photo=photo)
                side, of = ("left" if reply.yes else "right"), {"left": left, "right": right}
            else:
                arm = (photo + number) % len(names)
                reply = someone.judgement(trial, arm=arm, photo=photo)
                side = "yes" if reply.yes else "no"
                of = {"arm": names[arm], "task": plan.task, "expected": "yes", "options": ("yes", "no")}  # type: ignore[dict-item]
            answers.append(answer(who, trial + 1, side, f"f{photo}", seconds=reply.seconds, simulated=True, **of))
        takers.append(taker(who, number, finished=someone.leaves_before is None, simulated=True))
    return analyse(plan, collected(plan, takers, answers))


EIGHT = dict(zip("abcdefgh", ("AAAB", "AAAA", "AAAB", "BAAA", "AABA", "AAAB", "AABB", "AAAA"), strict=True))


def test_hand_computed() -> None:
    results = studied(EIGHT)
    entry = results["comparisons"][0]
    assert entry["values"] == [0.75, 1, 0.75, 0.75, 0.75, 0.75, 0.5, 1]
    assert entry["people"]["mean"] == pytest.approx(6.25 / 8)
    # seven deviate upwards and one not at all: both ways of flipping that one are as far out
    assert entry["people"]["p"] == pytest.approx(2 * 2 / 2**8)
    assert entry["people"]["p_corrected"] == entry["people"]["p"]
    assert results["decision"] == [{"first": "A", "second": "B", "tested": True, "p": 1 / 64, "better": "A"}]
    assert results["pooled"] == [{"first": "A", "second": "B", "count": 25, "of": 32, "share": 25 / 32}]
    assert results["people"]["analysed"] == 8
    assert not results["simulated"]
    assert verdicts(results)[0].startswith("A was preferred to B: 78.1% of a person's choices fell on A (95% interval ")
    assert "p = .016, 8 people" in verdicts(results)[0]


def test_each_person_counts_once_however_many_trials() -> None:
    results = studied({"a": "AAAAAAAA", "b": "B"}, plan_of(photos=8, exclusions={"share_to_complete": 0}))
    assert results["comparisons"][0]["people"]["mean"] == 0.5
    assert results["comparisons"][0]["people_and_photos"]["mean"] == 0.5
    assert results["pooled"][0]["share"] == pytest.approx(8 / 9)


@given(st.lists(st.text("AB", min_size=4, max_size=4), min_size=2, max_size=7), st.randoms())
@settings(max_examples=8, deadline=None)
def test_order_and_names_do_not_matter_and_arms_mirror(letters: list[str], random: Any) -> None:
    wins = {f"p{k}": word for k, word in enumerate(letters)}
    answers = [given for who, word in wins.items() for given in choices(who, word)]
    takers = [taker(who) for who in wins]
    results = analyse(PLAN, collected(PLAN, takers, answers))
    shuffled, people = list(answers), list(takers)
    random.shuffle(shuffled)
    random.shuffle(people)
    assert analyse(PLAN, collected(PLAN, people, shuffled)) == results
    other = plan_of(("B", "A"))
    mirrored = analyse(other, collected(other, takers, answers))
    for key in ("people", "people_and_photos"):
        ours, theirs = results["comparisons"][0][key], mirrored["comparisons"][0][key]
        assert theirs["mean"] == pytest.approx(1 - ours["mean"])
        assert theirs["p"] == pytest.approx(ours["p"])
        assert theirs["low"] == pytest.approx(1 - ours["high"])
    assert [d["better"] for d in mirrored["decision"]] == [d["better"] for d in results["decision"]]


def test_exclusions_follow_the_rules_and_say_why() -> None:
    rules = {"catches_to_pass": 2, "seconds_at_least": 1.0, "share_to_complete": 0.75}
    plan = plan_of(exclusions=rules, people=1)
    caught = {"good": "pp", "careless": "pf", "quick": "pp", "short": "pp", "nobody": "", "asked": ""}
    answers: list[Response] = []
    for who, checks in caught.items():
        answers += catches(who, checks)
        if checks:
            answers += choices(who, "AB" if who == "short" else "ABAB", seconds=0.4 if who == "quick" else 4.0)
    takers = [taker(who, finished=who != "short", withdrawn_at=NOON if who == "asked" else None) for who in caught]
    results = analyse(plan, collected(plan, takers, answers))
    assert results["people"] | {"excluded": None} == {
        "took_part": 6,
        "finished": 5,
        "analysed": 1,
        "planned": 1,
        "excluded": None,
        "reasons": {
            "withdrew": 1,
            "too few attention checks passed": 1,
            "no main trial answered": 1,
            "too fast": 1,
            "too few main trials answered": 1,
        },
    }
    reasons = {entry["participant"]: entry["reasons"] for entry in results["people"]["excluded"]}
    assert reasons["careless"] == ["too few attention checks passed: 1, 2 are needed"]
    assert reasons["quick"] == ["too fast: 0.4 s a trial, 1 are needed"]
    assert reasons["short"] == ["too few main trials answered: 2 of 4"]
    assert results["exploratory"]["without_exclusions"][0]["people"]["people"] == 4
    assert results["quality"]["catches"]["people"] == 4
    html = page(results)
    assert "too few main trials answered: 2 of 4" in html
    assert "1 for withdrew" in methods(results)


def test_repeats_and_sides_and_times() -> None:
    again = (
        answer("a", 11, "right", "f0", left="B", right="A", kind="repeat", repeats=1),  # A again, on the other side
        answer("a", 12, "left", "f1", left="B", right="A", kind="repeat", repeats=2),  # B, where it was A
        answer("b", 11, "left", "f9", left="B", right="A", kind="repeat", repeats=8),  # nothing to compare with
    )
    results = studied(EIGHT, more=again)
    assert results["quality"]["repeats"]["mean"] == 0.5
    assert results["quality"]["repeats"]["trials"] == 2
    assert results["quality"]["repeats"]["people"] == 1
    assert results["quality"]["side"]["people"] == 8
    lefts = {"AAAB": 0.75, "AAAA": 0.5, "BAAA": 0.25, "AABA": 0.25, "AABB": 0.5}
    assert results["quality"]["side"]["mean"] == pytest.approx(np.mean([lefts[word] for word in EIGHT.values()]))
    assert results["quality"]["seconds"]["median"] == 4.0
    assert results["comparisons"] == studied(EIGHT)["comparisons"], "repeats are not main trials"


def test_agreement_where_all_agree() -> None:
    alike = studied(dict.fromkeys("abcdefgh", "AAAA"))
    found = alike["exploratory"]["agreement"][0]
    assert (found["alpha"], found["pairs_agreeing"]) == (None, 1.0)
    assert alike["comparisons"][0]["people_and_photos"]["p"] == pytest.approx(2 / 2**4), "of 4 photos"
    assert "all answers are the same" in page(alike)


def several(people: int = 40) -> dict[str, Any]:
    behaviour = Behaviour((1.0, 0.4, -0.2), person_sd=0.5, photo_sd=0.2)
    return simulated(plan_of(("A", "B", "C"), photos=24, people=people), behaviour, people, seed=1)


def test_several_arms() -> None:
    results = several()
    pairs = [(entry["first"], entry["second"]) for entry in results["comparisons"]]
    assert pairs == [("A", "B"), ("A", "C"), ("B", "C")]
    raw = [entry["people"]["p"] for entry in results["comparisons"]]
    corrected = [entry["people"]["p_corrected"] for entry in results["comparisons"]]
    assert max(corrected) >= max(raw)
    assert min(corrected) == pytest.approx(3 * min(raw))
    assert all(entry["people"]["level"] == pytest.approx(1 - 0.05 / 3) for entry in results["comparisons"])
    strengths = {entry["arm"]: entry for entry in results["strengths"]["arms"]}
    for arm, truth in zip("ABC", (0.6, 0.0, -0.6), strict=True):
        assert strengths[arm]["strength"] == pytest.approx(truth * 0.95, abs=0.2)  # people differ, which blurs
        assert strengths[arm]["low"] < strengths[arm]["strength"] < strengths[arm]["high"]
    assert results["strengths"]["groups"] == [["A", "B", "C"]]
    assert results["simulated"]
    assert "Holm" in methods(results)
    assert "98.3% interval" in verdicts(results)[0]


def test_arms_that_nothing_connects() -> None:
    plan = plan_of(tuple("ABCD"), photos=8, exclusions={"share_to_complete": 0})
    extra = tuple(answer("a", k, "left", f"f{k}", left="C", right="D") for k in (5, 6, 7))
    results = studied(EIGHT, plan, extra)
    assert results["strengths"]["groups"] == [["A", "B"], ["C", "D"]]
    assert any("No chain of comparisons connects A and B with C and D" in text for text in cautions(results))
    untested = results["comparisons"][1]
    assert (untested["first"], untested["second"], untested["people"]) == ("A", "C", None)
    assert "A and C cannot be tested: nobody analysed compared them." in verdicts(results)
    page(results)


def test_right_answers_are_compared_within_people() -> None:
    behaviour = Behaviour(strengths_for([0.8, 0.6], 0.4, 0.4), person_sd=0.4, photo_sd=0.4)
    results = simulated(plan_of(task="prediction", photos=20), behaviour, 30, seed=0)
    entry = results["comparisons"][0]
    by_arm = {row["arm"]: row for row in results["accuracy"]}
    paired = np.subtract(by_arm["A"]["values"], by_arm["B"]["values"])
    assert entry["people"]["mean"] == pytest.approx(paired.mean())
    assert sorted(entry["values"]) == pytest.approx(sorted(paired))
    assert entry["people"]["p"] == pytest.approx(stats.ttest_1samp(paired, 0).pvalue, abs=0.01)
    assert entry["people"]["null"] == 0.0
    assert entry["people_and_photos"]["mean"] == pytest.approx(entry["people"]["mean"])
    assert results["strengths"] is None
    assert results["decision"][0]["better"] == "A"
    assert verdicts(results)[0].startswith("Simulated: A was more helpful than B: +")
    assert "right answers with each arm" in page(results).lower()


def test_who_saw_one_arm_alone_is_not_compared() -> None:
    plan = plan_of(task="agreement", exclusions={"share_to_complete": 0})
    of = {"task": "agreement", "options": ("yes", "no"), "expected": "yes"}
    answers = [answer("a", 1, "yes", "f0", arm="A", **of)]
    answers += [answer("b", k + 1, "yes" if k == 0 else "no", f"f{k}", arm="AB"[k], **of) for k in range(2)]
    results = analyse(plan, collected(plan, [taker("a"), taker("b")], answers))
    entry = results["comparisons"][0]
    assert entry["values"] == [1.0]
    assert entry["not_compared"] == 1
    assert [row["people"] for row in results["accuracy"]] == [2, 1]
    page(results)


def test_the_registered_population_decides() -> None:
    wins = dict.fromkeys("abcdefgh", "AAAB")  # all agree: sure about these photos, not about others
    assert studied(wins)["decision"][0]["better"] == "A"
    other = studied(wins, plan_of(analysis={"population": "people and photos"}))
    assert other["decision"][0]["better"] is None
    assert verdicts(other)[0].startswith("No preference between A and B was shown")
    assert "This test was the registered one." in methods(other)


def test_a_look_on_the_way_and_too_few_people_are_said() -> None:
    few = studied({"a": "AAAA", "b": "AAAA"})
    assert any("2 of 8 planned people" in text for text in cautions(few))
    assert any("the exact test cannot find anything: its smallest p-value is 0.50" in text for text in cautions(few))
    assert not cautions(studied(EIGHT))
    assert any("9 people are analysed where 8" in text for text in cautions(studied(EIGHT | {"i": "AAAA"})))


def test_nobody() -> None:
    empty = analyse(PLAN, collected(PLAN, [], []))
    assert "cannot be tested" in verdicts(empty)[0]
    page(empty)
    json.loads(as_json(empty))
    alone = studied({"a": "AAAB"})
    assert alone["comparisons"][0]["people_and_photos"] is None
    page(alone)


def test_answers_under_another_plan_are_refused() -> None:
    other = plan_of(question="Another?")
    with pytest.raises(AnalysisError, match="under this plan"):
        analyse(PLAN, collected(other, [], []))


def test_everything_simulated_says_so() -> None:
    results = several(people=12)
    html = page(results)
    assert "Simulated: no person answered any of this." in html
    for tag in ("title", "h1", "h2", "h3", "figcaption"):
        found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        assert found
        assert all(text.strip().startswith("Simulated") for text in found if text.strip()), tag
    assert all(text.startswith("Simulated") for text in verdicts(results))
    assert "simulated participants (no people)" in methods(results)
    record = json.loads(as_json(results))
    assert record["simulated"] is True
    assert all(text.startswith("Simulated") for text in record["verdicts"])
    assert "simulated" not in page(studied(EIGHT)).lower()


def test_the_page_is_self_contained_and_its_figures_have_words() -> None:
    html = page(several(people=12))
    assert not re.search(r"(src|href)=|@import|url\(", html)
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 5
    names = set()
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        assert tree.get("role") == "img"
        words = tree.get("aria-label", "")
        assert words.startswith("Simulated: ")
        assert len(words) > 60
        names.add(words)
        for circle in tree.iter("circle"):
            assert 0 <= float(circle.get("cx", "-1")) <= 440
    assert len(names) == 5


def test_names_are_escaped() -> None:
    assert "<script>" not in page(studied(EIGHT, plan_of(title="<script>alert(1)</script>")))
    plan = plan_of(("A<b>", "B<b>"))
    given = [
        answer("a", k + 1, "left", f"f{k}", left="A<b>" if k % 2 else "B<b>", right="B<b>" if k % 2 else "A<b>")
        for k in range(4)
    ]
    html = page(analyse(plan, collected(plan, [taker("a")], given)))
    assert "<b>" not in html
    assert "A&lt;b&gt;" in html


def test_what_was_put_in_is_recovered() -> None:
    """Preference, side bias, consistency and spread of people and photos, from 150 simulated people."""
    behaviour = Behaviour((*strengths_for([0.65], 1.0, 0.7), 0.0), person_sd=1.0, photo_sd=0.7, side=0.4, drop_out=0.1)
    plan = plan_of(photos=40, people=150, exclusions={"share_to_complete": 0.5})
    results = simulated(plan, behaviour, 150, seed=5)
    wide = results["comparisons"][0]["people_and_photos"]
    assert wide["low"] < 0.65 < wide["high"]
    assert results["exploratory"]["spread"]["person_sd"] == pytest.approx(1.0, abs=0.2)
    assert results["exploratory"]["spread"]["photo_sd"] == pytest.approx(0.7, abs=0.25)
    assert results["quality"]["side"]["low"] > 0.52
    assert results["people"]["finished"] / 150 == pytest.approx(0.9, abs=0.08)
    assert results["quality"]["seconds"]["median"] == pytest.approx(5.0, abs=0.5)
