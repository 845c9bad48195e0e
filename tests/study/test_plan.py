"""A study's plan and its records: frozen, consistent, the same after a round trip, told apart by a digest."""

from __future__ import annotations

import csv
import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bla.study.errors import StudyError
from bla.study.plan import Plan
from bla.study.responses import Collected, Participant, Response, codebook
from small_study import NOON, photo, plan


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    first = plan()
    first.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path)
    assert again == first
    assert again.digest() == first.digest()
    assert again.pairs == (("BLA", "CAM"),)


@pytest.mark.parametrize(
    "change", [{"question": "Which?"}, {"seed": 1}, {"people": 21}, {"analysis": {"alpha": 0.01}}, {"trials": 3}]
)
def test_any_change_changes_the_digest(change: dict[str, Any]) -> None:
    assert plan(**change).digest() != plan().digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 5}, "at most 4 trials"),
        ({"repeats": 5}, "at most 4 repeats"),
        ({"colour": "red"}, "colour"),
        ({"exclusions": {"catches_to_pass": 1}}, "at most 0 attention checks"),
        ({"photos": [photo("a"), photo("a")], "trials": 1}, "photos of different names"),
        ({"photos": [photo("a", ("BLA",))], "trials": 1}, "explained by every arm"),
        ({"task": "prediction", "photos": [photo("a", options=["dog", "cow"])], "trials": 1}, "two options"),
        ({"task": "agreement", "photos": [photo("a", truth=None)], "trials": 1}, "truth"),
        ({"catches": [{"photo": "p0", "arm": "BLA"}]}, "decoys"),
        ({"catches": [{"photo": "p9", "arm": "BLA", "decoy": "p1"}]}, "known photos"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        plan(**change)


def test_a_missing_plan_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="bla study init"):
        Plan.load(tmp_path / "none")


def person(**more: Any) -> Participant:
    return Participant(participant="a1", number=0, trials=4, started_at=NOON, **more)


def response(**more: Any) -> Response:
    values: dict[str, Any] = {
        "participant": "a1", "position": 1, "kind": "main", "task": "preference", "photo": "p0", "left": "CAM",
        "right": "BLA", "options": ("left", "right"), "choice": "right", "milliseconds": 1500, "clock": "browser",
        "shown_at": NOON, "answered_at": NOON + timedelta(seconds=2),
    }  # fmt: skip
    return Response.model_validate(values | more)


def test_what_was_chosen() -> None:
    assert response().chosen == "BLA"
    assert response(choice="left").chosen == "CAM"
    assert response().seconds == 1.5
    judged = response(task="agreement", left=None, right=None, arm="BLA", options=("yes", "no"), choice="no")
    assert judged.chosen is None
    assert judged.place == 1


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "middle"},
        {"left": None},
        {"arm": "BLA"},
        {"correct": True},
        {"expected": "left", "correct": True},
        {"task": "agreement"},
    ],
)
def test_a_response_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        response(**change)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00"), min_size=1, max_size=20)


def rows_of(table: bytes) -> list[dict[str, str | None]]:
    """A CSV file's rows as its codebook says: an empty field is nothing, an apostrophe in front is no part of it."""
    rows = csv.DictReader(io.StringIO(table.decode()))
    return [{column: cell.removeprefix("'") or None for column, cell in row.items()} for row in rows]


@given(
    labels=st.lists(texts, min_size=2, max_size=5, unique=True),
    arm=texts,
    milliseconds=st.integers(0, 10**7),
    simulated=st.booleans(),
)
def test_tables_and_json_come_back_as_they_were(
    labels: list[str], arm: str, milliseconds: int, simulated: bool
) -> None:
    answer = response(
        task="prediction", left=None, right=None, arm=arm, options=labels, choice=labels[-1], expected=labels[0],
        correct=False, milliseconds=milliseconds, simulated=simulated,
    )  # fmt: skip
    collected = Collected(
        plan="0" * 64,
        simulated=simulated,
        participants=(person(simulated=simulated, finished_at=NOON),),
        responses=(answer,),
    )
    assert Collected.model_validate_json(collected.to_json()) == collected
    files = collected.files()
    word = "simulated-" if simulated else ""
    (row,) = rows_of(files[f"{word}participants.csv"])
    assert Participant.model_validate(row) == collected.participants[0]
    (row,) = rows_of(files[f"{word}responses.csv"])
    assert Response.model_validate(row | {"options": json.loads(str(row["options"]))}) == answer
    assert all("simulated" in name for name in files if simulated and name != "codebook.csv")


def test_a_spreadsheet_runs_nothing() -> None:
    formula = response(photo="=1+1")
    assert "\n'=" not in Collected(plan="", simulated=False, participants=(person(),), responses=()).to_json()
    cells = Collected(plan="", simulated=False, participants=(person(),), responses=(formula,)).files()
    assert b",'=1+1," in cells["responses.csv"]


def test_the_codebook_says_what_every_column_means() -> None:
    for columns in codebook().values():
        assert all(columns.values())


def test_real_and_simulated_people_do_not_mix() -> None:
    with pytest.raises(ValueError, match="real or all simulated"):
        Collected(plan="", simulated=False, participants=(person(simulated=True),), responses=())
    with pytest.raises(ValueError, match="one response to a trial"):
        Collected(plan="", simulated=False, participants=(person(),), responses=(response(), response()))
