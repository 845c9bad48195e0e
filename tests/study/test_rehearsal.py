"""Simulated people on the real pages: the same answers as in memory, one by one, all of them said to be simulated."""

from __future__ import annotations

import http.client
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.memory import without_pages
from bla.cli import run_command
from bla.study.analysis import analyse
from bla.study.behaviour import Behaviour
from bla.study.errors import StudyError
from bla.study.plan import Plan
from bla.study.rehearsal import behaviour_for, rehearse
from bla.study.responses import Collected
from bla.study.store import Store
from small_study import small_study

Prepared = Callable[[str], tuple[Path, str]]
BEHAVIOUR = Behaviour(side=0.5, noise=0.1, drop_out=0.3, careless=0.2, seconds=4.0)


def answers(collected: Collected) -> list[tuple[Any, ...]]:
    number = {person.participant: person.number for person in collected.participants}
    return sorted(
        (number[r.participant], r.position, r.kind, r.photo, r.left, r.right, r.arm, r.choice, r.correct, r.seconds)
        for r in collected.responses
    )  # fmt: skip


@pytest.mark.parametrize("task", ["preference", "prediction", "agreement"])
def test_pages_and_memory_agree_answer_by_answer(task: str, tmp_path: Path, prepared: Prepared) -> None:
    study = shutil.copytree(prepared(task)[0], tmp_path / "study")
    plan = Plan.load(study)
    behaviour = behaviour_for(plan, 0.8, None, BEHAVIOUR, seed=3)
    store = Store.of(study, rehearsal=True)
    collected = rehearse(study, behaviour, 6, store=store, seed=3)
    assert answers(collected) == answers(without_pages(plan, behaviour, 6, seed=3))
    assert collected.simulated
    assert 6 > sum(person.finished for person in collected.participants) > 0
    assert all("simulated" in name for name in collected.files() if name != "codebook.csv")
    with pytest.raises(StudyError, match="empty store"):
        rehearse(study, behaviour, 1, store=store)
    store.close()


def test_a_lost_connection_loses_and_doubles_nothing(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth response to a simulated person is lost on its way: the simulated people ask again."""
    study = shutil.copytree(prepared("preference")[0], tmp_path / "study")
    plan = Plan.load(study)
    given: Counter[int] = Counter()
    getresponse = http.client.HTTPConnection.getresponse

    def losing(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        response = getresponse(connection)
        given[threading.get_ident()] += 1
        if given[threading.get_ident()] % 5 == 0:
            raise http.client.RemoteDisconnected("lost")
        return response

    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", losing)
    store = Store.of(study, rehearsal=True)
    collected = rehearse(study, BEHAVIOUR, 4, store=store, seed=2)
    store.close()
    assert answers(collected) == answers(without_pages(plan, BEHAVIOUR, 4, seed=2))


def test_the_analysis_recovers_what_was_put_in(tmp_path: Path) -> None:
    study, _ = small_study(tmp_path, trials=8, repeats=2)
    plan = Plan.load(study)
    plain = Behaviour(person_sd=0.5, photo_sd=0.5, seconds=4.0)
    found = analyse(plan, without_pages(plan, behaviour_for(plan, 0.7, None, plain, seed=1), 150, seed=1))
    (entry,) = found["comparisons"]
    assert found["simulated"]
    assert entry["people"]["low"] < 0.7 < entry["people"]["high"]
    assert entry["people"]["mean"] == pytest.approx(0.7, abs=0.04)
    assert found["people"]["excluded"] == []

    careless = Behaviour(careless=0.5, side=1.0, seconds=4.0)
    found = analyse(plan, without_pages(plan, careless, 60, seed=1))
    assert 0 < sum(number for reason, number in found["people"]["reasons"].items() if "attention" in reason) < 30
    assert found["quality"]["side"]["mean"] > 0.55


def test_from_the_command_line(tmp_path: Path, prepared: Prepared, capsys: pytest.CaptureFixture[str]) -> None:
    study = shutil.copytree(prepared("preference")[0], tmp_path / "study")
    for _ in range(2):
        assert run_command(["study", "rehearse", str(study), "--people", "3", "--drop-out", "0"]) == 0
    assert "Simulated: 3 people took part, 3 to the end, 21 responses" in capsys.readouterr().out
    assert run_command(["study", "rehearse", str(study), "--keep"]) == 2
    capsys.readouterr()
    assert run_command(["study", "results", str(study), "--rehearsal"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Simulated: ")
    page = (study / "simulated-results.html").read_text()
    assert "no person answered any of this" in page
    assert run_command(["study", "export", str(study), "--rehearsal", "--out", str(tmp_path / "data")]) == 0
    assert "21 simulated responses" in capsys.readouterr().out
    assert Collected.model_validate_json((tmp_path / "data" / "simulated-responses.json").read_bytes()).simulated
    assert run_command(["study", "results", str(study)]) == 2
    assert "serve it first" in capsys.readouterr().err
    assert not (study / "study.db").exists(), "asking made no store"
    assert run_command(["study", "secret", str(study)]) == 0
