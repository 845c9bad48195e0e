"""From explanations to a study: which photos, how large, alike to the byte, refusals that name the remedy."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bla.cli import run_command
from bla.explanations.explanation import Explanation, Prediction
from bla.study.errors import StudyError
from bla.study.pictures import cut_to, encoded, filled_up
from bla.study.plan import Plan
from bla.study.preparing import Wishes, prepare
from small_study import ARMS, explained

GUESS = Prediction(0, "cat", 0.5)


def made(folder: Path, name: str = "study", **wishes: Any) -> Plan:
    arms = [os.fspath(folder / arm) for arm in ARMS]
    values = {"trials": 4, "repeats": 1, "catches": 1, "practice": 1} | wishes
    return prepare(folder / name, arms, Wishes(**values))[0]


def test_every_file_is_alike(prepared: Callable[[str], tuple[Path, str]]) -> None:
    study, _ = prepared("preference")
    plan = Plan.load(study)
    files = sorted((study / "pictures").iterdir())
    assert len(files) == 6 * 3
    assert {path.stem for path in files} == set(plan.every_picture)
    assert {path.stat().st_size for path in files} == {plan.file_size}
    for path in files:
        with Image.open(path) as picture:
            picture.load()
            assert picture.size == (plan.width, plan.height)
            assert not picture.getexif()
    names = [part for photo in plan.every_photo.values() for part in (photo.name, photo.sha256)]
    content = b"".join(path.read_bytes() for path in files)
    assert not any(name.encode() in content for name in names)


@given(st.integers(4, 300_000))
def test_files_are_filled_up_to_any_length(extra: int) -> None:
    jpeg = encoded(Image.new("RGB", (16, 16), "tan"))
    longer = filled_up(jpeg, len(jpeg) + extra)
    assert len(longer) == len(jpeg) + extra
    with Image.open(io.BytesIO(longer)) as picture, Image.open(io.BytesIO(jpeg)) as before:
        assert picture.tobytes() == before.tobytes()


@given(st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6), st.integers(1, 6))
def test_equal_area_takes_the_best_by_rank(scores: list[float], count: int) -> None:
    maps = {"unbounded": np.reshape(scores, (2, 3)), "scores": np.zeros((2, 3)), "soft": None}
    why = Explanation("x", GUESS, (GUESS,), "m", (2, 3), **maps, selected=np.ones((2, 3)), region=(0, 0, 9, 9))
    cut = cut_to(why, count / 6)
    assert cut.size == count
    if count < 6:
        assert why.unbounded[cut.selected].min() >= why.unbounded[~cut.selected].max()


def test_area_as_registered(tmp_path: Path) -> None:
    explained(tmp_path)
    equal, own, fixed = (
        made(tmp_path, name, **wishes)
        for name, wishes in (("equal", {}), ("own", {"area": "own"}), ("fixed", {"cells": 9}))
    )
    for photo in equal.photos:
        assert photo.explained[ARMS[0]].cells == photo.explained[ARMS[1]].cells
    for photo in own.photos:
        first, second = (photo.explained[arm].cells or 0 for arm in ARMS)
        assert second == first + 3
    assert {picture.cells for photo in fixed.photos for picture in photo.explained.values()} == {9}


def test_photos_by_rule_and_seed(tmp_path: Path) -> None:
    explained(tmp_path)
    first = made(tmp_path, "a", seed=5)
    assert [p.name for p in made(tmp_path, "b", seed=5).photos] == [p.name for p in first.photos]
    assert [p.name for p in made(tmp_path, "c", seed=6).photos] != [p.name for p in first.photos]
    assert set(first.every_picture).isdisjoint(made(tmp_path, "d", seed=5).every_picture), "names are random"
    correct = made(tmp_path, "e", rule="correct", trials=7)
    assert all(photo.program_is_right for photo in correct.every_photo.values())
    assert correct.left_out == {"the program is wrong": 3}
    assert max(Counter(photo.truth for photo in correct.every_photo.values()).values()) == 3, "from each class by turns"
    wrong = made(tmp_path, "f", rule="wrong", trials=1, repeats=0, task="prediction")
    assert not any(photo.program_is_right for photo in wrong.every_photo.values())
    half = made(tmp_path, "g", task="agreement")
    assert sum(bool(photo.program_is_right) for photo in half.every_photo.values()) == 3
    mains = {photo.id for photo in first.photos}
    for catch in first.catches:
        assert catch.decoy not in mains
        assert first.every_photo[str(catch.decoy)].prediction != first.every_photo[catch.photo].prediction


def test_arms_from_lines_and_truth_from_a_table(tmp_path: Path) -> None:
    explained(tmp_path)
    arms = []
    for arm in ARMS:
        lines = [path.read_text().replace("\n", "") for path in sorted((tmp_path / arm).glob("*.json"))]
        (tmp_path / f"{arm}.jsonl").write_text("\n".join(lines))
        arms.append(os.fspath(tmp_path / f"{arm}.jsonl"))
    truth = tmp_path / "truth.csv"
    rows = [f"{path.name},cat" for path in (tmp_path / "photos").rglob("*.png")]
    truth.write_text("\n".join(["image,label", *rows]))
    wishes = Wishes(trials=2, practice=0, catches=0, repeats=0, rule="correct")
    plan, _ = prepare(tmp_path / "study", [f"ours={arms[0]}", arms[1]], wishes, truth=truth)
    assert plan.arm_names == ("ours", ARMS[1])
    assert {photo.prediction for photo in plan.photos} == {"cat"}


def test_mistakes_name_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explained(tmp_path)
    arms = [os.fspath(tmp_path / arm) for arm in ARMS]

    def said(*arguments: str) -> str:
        assert run_command(["study", "init", os.fspath(tmp_path / "study"), *arguments]) == 2
        assert not (tmp_path / "study").exists()
        assert not list(tmp_path.glob(".study*")), "nothing half made is left"
        return capsys.readouterr().err

    assert "explain more photos" in said("--arms", *arms, "--trials", "20")
    assert "two folders" in said("--arms", arms[0])
    assert "NAME=FOLDER" in said("--arms", arms[0], arms[0])
    assert "folder of explanations" in said("--arms", arms[0], "nowhere")
    assert "at most 2 attention checks" in said("--arms", *arms, "--trials", "3", "--catches-to-pass", "3")
    assert "none in" in said("--arms", arms[0], os.fspath(tmp_path / "photos"))
    (tmp_path / ARMS[1] / "broken.json").write_text("{}")
    assert "expected an explanation in" in said("--arms", *arms)
    (tmp_path / ARMS[1] / "broken.json").unlink()
    next((tmp_path / "photos").rglob("*.png")).unlink()
    assert "work in the folder where bla explain worked" in said("--arms", *arms)


def test_photos_on_which_arms_disagree_are_left_out(tmp_path: Path) -> None:
    explained(tmp_path)
    path = next((tmp_path / ARMS[1]).glob("*.json"))
    path.write_text(path.read_text().replace('"label": "', '"label": "another '))
    path, other = sorted((tmp_path / ARMS[0]).glob("*.json"))[-2:]
    path.unlink()
    other.write_text(other.read_text().replace("128.0", "100.0"))
    plan = made(tmp_path)
    assert plan.considered == 9
    reasons = {"not explained by every arm": 1, "the arms' predictions differ": 1, "the arms' regions differ": 1}
    assert plan.left_out == reasons


def test_photos_that_look_alike_are_left_out_or_asked(tmp_path: Path) -> None:
    explained(tmp_path)
    alike = {"cat-0", "cup-1", "coin-2", "coin-3"}
    for name in alike:
        first, second = (json.loads((tmp_path / arm / f"{name}.json").read_text()) for arm in ARMS)
        (tmp_path / ARMS[1] / f"{name}.json").write_text(json.dumps(second | {"unbounded": first["unbounded"]}))
    plan = made(tmp_path, "a", trials=5, practice=2, catches=1)
    assert plan.identical == "left out"
    assert plan.left_out == {"two arms show the same picture": 4}
    assert plan.identical_photos == 0
    assert not {photo.name.removesuffix(".png") for photo in plan.every_photo.values()} & alike
    asked = made(tmp_path, "b", trials=5, practice=1, catches=1, identical="asked", seed=1)
    assert not asked.left_out
    same = [photo for photo in asked.photos if photo.name.removesuffix(".png") in alike]
    assert asked.identical_photos == len(same) > 0
    for photo in (*asked.practice, *asked.spare):
        assert len({picture.sha256 for picture in photo.explained.values()}) == 2
    record = asked.model_dump(mode="json")
    assert Plan.model_validate({**record, "identical": None}).digest() != asked.digest()
    record.pop("identical")
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert Plan.model_validate(record).digest() == hashlib.sha256(text.encode()).hexdigest(), "as before the rule"
    assert made(tmp_path, "c", task="prediction", trials=5, options=2).identical is None


def test_a_study_opens_only_with_a_consent_text_of_its_own(
    prepared: Callable[[str], tuple[Path, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = prepared("preference")
    assert run_command(["study", "serve", os.fspath(study), "--port", "0"]) == 2
    assert "the template's paragraph in brackets" in capsys.readouterr().err


def test_participants_read_no_arms_name(tmp_path: Path) -> None:
    explained(tmp_path)
    assert made(tmp_path, "bounded-or-activation").title == "What did the program look at?"
    for wish in ({"title": "Bounded or not?"}, {"question": "Is activation better?"}):
        with pytest.raises(StudyError, match=r"names no arm, since participants see it, got (bounded|activation) in"):
            made(tmp_path, "x", **wish)


def test_init_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explained(tmp_path)
    arms = [os.fspath(tmp_path / arm) for arm in ARMS]
    study = tmp_path / "study"
    command = ["study", "init", os.fspath(study), "--trials", "4", "--catches", "1", "--practice", "1", "--arms", *arms]
    assert run_command(command) == 0
    said = capsys.readouterr().out
    assert Plan.load(study).digest() in said
    assert run_command(command) == 2
    assert "a plan is not changed" in capsys.readouterr().err
