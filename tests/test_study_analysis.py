"""The registered analysis: hand-computed studies, symmetries, exclusions, what is said and drawn."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bla.study.analysis import Answer, Registered, Taker, analyse
from bla.study.errors import AnalysisError
from bla.study.results import as_json, cautions, methods, page, verdicts
from bla.study.simulation import Behaviour, person, strengths_for, strengths_for_accuracy

PLAN = Registered("Which is better?", "Which shows why?", "preference", ("A", "B"), people=8, trials=4)


def choices(who: str, wins: str, **of: Any) -> list[Answer]:
    """Answers of a person, a letter a trial: the arm chosen; sides alternate."""
    given = []
    for number, arm in enumerate(wins):
        left, right = ("A", "B") if number % 2 == 0 else ("B", "A")
        side = "left" if left == arm else "right"
        given.append(Answer(who, f"photo{number}", "main", side, 4.0, left=left, right=right, **of))  # type: ignore[arg-type]
    return given


def studied(wins: dict[str, str], plan: Registered = PLAN, more: tuple[Answer, ...] = ()) -> dict[str, Any]:
    answers = [answer for who, letters in wins.items() for answer in choices(who, letters)]
    return analyse(plan, [Taker(who, True) for who in wins], [*answers, *more])


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
    results = studied({"a": "AAAAAAAA", "b": "B"}, replace(PLAN, share_to_complete=0))
    assert results["comparisons"][0]["people"]["mean"] == 0.5
    assert results["comparisons"][0]["people_and_photos"]["mean"] == 0.5
    assert results["pooled"][0]["share"] == pytest.approx(8 / 9)


@given(st.lists(st.text("AB", min_size=4, max_size=4), min_size=2, max_size=7), st.randoms())
@settings(max_examples=8, deadline=None)
def test_order_and_names_do_not_matter_and_arms_mirror(letters: list[str], random: Any) -> None:
    wins = {f"p{k}": word for k, word in enumerate(letters)}
    answers = [answer for who, word in wins.items() for answer in choices(who, word)]
    takers = [Taker(who, True) for who in wins]
    results = analyse(PLAN, takers, answers)
    shuffled, people = list(answers), list(takers)
    random.shuffle(shuffled)
    random.shuffle(people)
    assert analyse(PLAN, people, shuffled) == results
    mirrored = analyse(replace(PLAN, arms=("B", "A")), takers, answers)
    for key in ("people", "people_and_photos"):
        ours, theirs = results["comparisons"][0][key], mirrored["comparisons"][0][key]
        assert theirs["mean"] == pytest.approx(1 - ours["mean"])
        assert theirs["p"] == pytest.approx(ours["p"])
        assert theirs["low"] == pytest.approx(1 - ours["high"])
    assert [d["better"] for d in mirrored["decision"]] == [d["better"] for d in results["decision"]]


def test_exclusions_follow_the_rules_and_say_why() -> None:
    plan = replace(PLAN, catches_to_pass=2, seconds_at_least=1.0, share_to_complete=0.75, people=1)
    caught = {"good": "pp", "careless": "pf", "quick": "pp", "short": "pp", "nobody": "", "asked": "pp"}
    answers: list[Answer] = []
    for who, checks in caught.items():
        answers += [Answer(who, f"c{k}", "catch", "left", 2.0, correct=c == "p") for k, c in enumerate(checks)]
        if who != "nobody":
            answers += choices(who, "AB" if who == "short" else "ABAB")
    answers = [replace(a, seconds=0.4) if a.person == "quick" else a for a in answers]
    takers = [Taker(who, who != "short", notes=("withdrew",) if who == "asked" else ()) for who in caught]
    results = analyse(plan, takers, answers)
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
    reasons = {entry["person"]: entry["reasons"] for entry in results["people"]["excluded"]}
    assert reasons["careless"] == ["too few attention checks passed: 1, 2 are needed"]
    assert reasons["quick"] == ["too fast: 0.4 s a trial, 1 are needed"]
    assert reasons["short"] == ["too few main trials answered: 2 of 4"]
    assert results["exploratory"]["without_exclusions"][0]["people"]["people"] == 5
    assert results["quality"]["catches"]["people"] == 5
    html = page(results)
    assert "too few main trials answered: 2 of 4" in html
    assert "1 for withdrew" in methods(results)


def test_repeats_and_sides_and_times() -> None:
    again = (
        Answer("a", "photo0", "repeat", "right", 3.0, left="B", right="A"),  # A again, on the other side
        Answer("a", "photo1", "repeat", "left", 3.0, left="B", right="A"),  # B, where it was A
        Answer("b", "photo9", "repeat", "left", 3.0, left="B", right="A"),  # nothing to compare with
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


def several(people: int = 40, seed: int = 1, arms: tuple[str, ...] = ("A", "B", "C")) -> dict[str, Any]:
    behaviour = Behaviour(tuple(1.0 - 0.6 * k for k in range(len(arms))), person_sd=0.5, photo_sd=0.2)
    pairs = list(itertools.combinations(range(len(arms)), 2))
    answers = []
    for number in range(people):
        someone = person(behaviour, seed, number, 24)
        for trial in range(24):
            left, right = pairs[trial % len(pairs)] if trial % 2 else pairs[trial % len(pairs)][::-1]
            reply = someone.choice(trial, left=left, right=right, photo=trial)
            side = "left" if reply.left else "right"
            answers.append(
                Answer(f"p{number}", f"f{trial}", "main", side, reply.seconds, left=arms[left], right=arms[right])  # type: ignore[arg-type]
            )
    plan = replace(PLAN, arms=arms, people=people, trials=24)
    return analyse(plan, [Taker(f"p{number}", True, simulated=True) for number in range(people)], answers)


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
        assert strengths[arm]["low"] < truth * 0.95 < strengths[arm]["high"]
    assert results["strengths"]["groups"] == [["A", "B", "C"]]
    assert results["simulated"]
    assert "Holm" in methods(results)
    assert "98.3% interval" in verdicts(results)[0]


def test_arms_that_nothing_connects() -> None:
    plan = replace(PLAN, arms=("A", "B", "C", "D"), share_to_complete=0)
    extra = [Answer("a", f"x{k}", "main", "left", 3.0, left="C", right="D") for k in range(3)]
    results = studied(EIGHT, plan, tuple(extra))
    assert results["strengths"]["groups"] == [["A", "B"], ["C", "D"]]
    assert any("No chain of comparisons connects A and B with C and D" in text for text in cautions(results))
    untested = results["comparisons"][1]
    assert (untested["first"], untested["second"], untested["people"]) == ("A", "C", None)
    assert "A and C cannot be tested: nobody analysed compared them." in verdicts(results)
    page(results)


def judged(right: dict[str, tuple[float, float]], people: int = 30, seed: int = 0) -> dict[str, Any]:
    (first, second), arms = right["shares"], ("A", "B")
    behaviour = Behaviour(strengths_for_accuracy([first, second], 0.4, 0.4), person_sd=0.4, photo_sd=0.4)
    answers = []
    for number in range(people):
        someone = person(behaviour, seed, number, 20)
        for trial in range(20):
            arm = (trial + number) % 2
            reply = someone.judgement(trial, arm=arm, photo=trial)
            side = "left" if trial % 3 else "right"
            answers.append(
                Answer(f"p{number}", f"f{trial}", "main", side, 5.0, arm=arms[arm], correct=reply.right_answer)  # type: ignore[arg-type]
            )
    plan = replace(PLAN, task="prediction", people=people, trials=20)
    return analyse(plan, [Taker(f"p{number}", True) for number in range(people)], answers)


def test_right_answers_are_compared_within_people() -> None:
    results = judged({"shares": (0.8, 0.6)})
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
    assert verdicts(results)[0].startswith("A was more helpful than B: +")
    assert "right answers with each arm" in page(results).lower()


def test_who_saw_one_arm_alone_is_not_compared() -> None:
    plan = replace(PLAN, task="agreement", share_to_complete=0)
    answers = [Answer("a", "f0", "main", "left", 3.0, arm="A", correct=True)]
    answers += [Answer("b", f"f{k}", "main", "left", 3.0, arm="AB"[k], correct=k == 0) for k in range(2)]
    results = analyse(plan, [Taker("a", True), Taker("b", True)], answers)
    entry = results["comparisons"][0]
    assert entry["values"] == [1.0]
    assert entry["not_compared"] == 1
    assert [row["people"] for row in results["accuracy"]] == [2, 1]
    page(results)


def test_the_registered_population_decides() -> None:
    wins = dict.fromkeys("abcdefgh", "AAAB")  # all agree: sure about these photos, not about others
    assert studied(wins)["decision"][0]["better"] == "A"
    other = studied(wins, replace(PLAN, population="people and photos"))
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
    empty = analyse(PLAN, [], [])
    assert "cannot be tested" in verdicts(empty)[0]
    page(empty)
    json.loads(as_json(empty))
    alone = studied({"a": "AAAB"})
    assert alone["comparisons"][0]["people_and_photos"] is None
    page(alone)


def test_mistakes() -> None:
    with pytest.raises(AnalysisError, match="all real or all simulated"):
        analyse(PLAN, [Taker("a", True), Taker("b", True, simulated=True)], [])
    with pytest.raises(AnalysisError, match="of the study's people"):
        analyse(PLAN, [], choices("a", "A"))


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
        title, text = tree[0], tree[1]
        assert tree.get("aria-labelledby") == f"{title.get('id')} {text.get('id')}"
        assert title.text
        assert len(text.text or "") > 60
        names.add(title.get("id"))
        for circle in tree.iter("circle"):
            assert 0 <= float(circle.get("cx", "-1")) <= 440
    assert len(names) == 5


def test_names_of_arms_are_escaped() -> None:
    plan = replace(PLAN, title="<script>alert(1)</script>", arms=("A", "B"))
    assert "<script>" not in page(studied(EIGHT, plan))
    wins = [replace(a, left=a.left and a.left + "<b>", right=a.right and a.right + "<b>") for a in choices("a", "AAAB")]
    html = page(analyse(replace(PLAN, arms=("A<b>", "B<b>")), [Taker("a", True)], wins))
    assert "<b>" not in html
    assert "A&lt;b&gt;" in html


def test_what_was_put_in_is_recovered() -> None:
    """Preference, side bias, consistency and spread of people and photos, from 150 simulated people."""
    behaviour = Behaviour(strengths_for([0.65], 1.0, 0.7), person_sd=1.0, photo_sd=0.7, side=0.4, drop_out=0.1)
    answers: list[Answer] = []
    takers = []
    for number in range(150):
        someone = person(behaviour, 5, number, 40)
        for trial in range(40):
            if someone.leaves_before is not None and trial >= someone.leaves_before:
                break
            left, right = ("A", "B") if (trial + number) % 2 else ("B", "A")
            reply = someone.choice(trial, left="AB".index(left), right="AB".index(right), photo=trial)
            side = "left" if reply.left else "right"
            answers.append(Answer(f"p{number}", f"f{trial}", "main", side, reply.seconds, left=left, right=right))  # type: ignore[arg-type]
        takers.append(Taker(f"p{number}", someone.leaves_before is None, simulated=True))
    results = analyse(replace(PLAN, people=150, trials=40, share_to_complete=0.5), takers, answers)
    wide = results["comparisons"][0]["people_and_photos"]
    assert wide["low"] < 0.65 < wide["high"]
    assert results["exploratory"]["spread"]["person_sd"] == pytest.approx(1.0, abs=0.2)
    assert results["exploratory"]["spread"]["photo_sd"] == pytest.approx(0.7, abs=0.25)
    assert results["quality"]["side"]["low"] > 0.52
    assert results["people"]["finished"] / 150 == pytest.approx(0.9, abs=0.08)
    assert results["quality"]["seconds"]["median"] == pytest.approx(5.0, abs=0.5)
