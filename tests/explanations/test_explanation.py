"""Explanations: round trips, refusals, all-or-nothing saving."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bla.explanations.explanation import Check, Explanation, ExplanationError, Prediction, Sizes

CAT = Prediction(281, "tabby", 0.75)


def make(**changes: object) -> Explanation:
    values = {
        "image": "cat.jpg",
        "prediction": CAT,
        "top": (CAT, Prediction(282, "tiger cat", 0.2)),
        "method": "BLA",
        "grid": (2, 3),
        "unbounded": [[0.5, -1, 2], [0, -3, 0.1]],
        "scores": [[0, -1, 0], [0, -3, 0]],
        "soft": None,
        "selected": [[1, 0, 1], [1, 0, 1]],
        "region": (0, 0, 640, 480),
    } | changes
    return Explanation(**values)  # type: ignore[arg-type]


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=30)
@given(
    data=st.data(),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    label=st.text(),
    probability=st.floats(0, 1),
    target=st.none() | st.integers(0, 999),
)
def test_json_round_trip_is_exact(
    data: st.DataObject, grid: tuple[int, int], label: str, probability: float, target: int | None
) -> None:
    maps = hnp.arrays(np.float32, grid, elements=finite)
    selected = data.draw(hnp.arrays(np.bool_, grid).filter(lambda cells: bool(cells.any())))
    guess = Prediction(3, label, probability)
    explanation = make(
        prediction=guess, top=(guess,), grid=grid, target=target, selected=selected,
        unbounded=data.draw(maps), scores=data.draw(maps), soft=data.draw(st.none() | maps),
    )  # fmt: skip
    again = Explanation.from_dict(json.loads(json.dumps(explanation.to_dict(), allow_nan=False)))
    assert again == explanation
    assert np.array_equal(again.unbounded, explanation.unbounded)


def test_file_round_trip(tmp_path: Path) -> None:
    explanation = make()
    assert Explanation.load(explanation.save(tmp_path / "deep" / "why.json")) == explanation


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make().save(tmp_path / "why.json")
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        make(image="other.jpg").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_is_frozen_down_to_the_maps() -> None:
    source = np.zeros((2, 3), np.float32)
    explanation = make(unbounded=source)
    source[0, 0] = 7
    assert explanation.unbounded[0, 0] == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        explanation.image = "dog.jpg"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        explanation.scores[0, 0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selected": np.zeros((2, 3))}, "at least one selected cell"),
        ({"scores": np.zeros((3, 2))}, r"scores of shape \(2, 3\)"),
        ({"unbounded": np.full((2, 3), np.nan)}, "finite unbounded"),
        ({"region": (5, 0, 5, 9)}, "left < right"),
        ({"prediction": Prediction(0, "x", 1.5)}, r"probability in \[0, 1\]"),
        ({"schema_version": 99}, "expected schema_version 2, got 99"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ExplanationError, match=message):
        make(**changes)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "why.json"
    for content, message in [
        (b"\xff\xfe", "got another file"),
        (b"{", "got another file"),
        (b"[]", "got another file"),
        (b'{"a": 1}', r"unknown \['a'\]"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ExplanationError, match=message):
            Explanation.load(path)
    record = make().to_dict()
    with pytest.raises(ExplanationError, match="expected size 4"):
        Explanation.from_dict(record | {"size": 5})
    with pytest.raises(ExplanationError, match=r"got a selection over several, .* train again with a larger"):
        Explanation.from_dict(record | {"maps": []})
    with pytest.raises(ExplanationError, match="malformed"):
        Explanation.from_dict(record | {"prediction": {"index": 1}})


def test_the_classifiers_own_answer_sizes_and_check_are_kept_and_older_records_have_none(tmp_path: Path) -> None:
    dog = Prediction(7, "dog", 0.6)
    check = Check(dog, CAT, dog, 0.5, 0.25, "coarse")
    why = make(classifier=dog, agrees=False, sizes=Sizes(3, 5, 4), check=check)
    record = json.loads(why.save(tmp_path / "why.json").read_text())
    assert record["classifier"] == {"index": 7, "label": "dog", "probability": 0.6}
    assert record["sizes"] == {"sufficient": 3, "decisive": 5, "bound": 4}
    assert record["check"]["removed"]["label"] == "dog"
    assert record["check"]["words"] == str(check)
    assert Explanation.load(tmp_path / "why.json") == why
    old = {key: value for key, value in record.items() if key not in ("classifier", "agrees", "sizes", "check")}
    read = Explanation.from_dict(old | {"schema_version": 1})
    assert (read.classifier, read.agrees, read.sizes, read.check) == (None, None, None, None)


@pytest.mark.parametrize(("all_cells", "agrees"), [([0.2, 0.8, 0.6], True), ([0.6, 0.8, 0.6], False)])
def test_of_several_labels_the_same_ones_must_be_present_to_agree(all_cells: list[float], agrees: bool) -> None:
    maps = {"unbounded": [[1.0]], "scores": [[0.0]], "soft": None, "selected": np.ones((1, 1), bool)}
    options = {"several_labels": True, "method": "BLA", "region": (0, 0, 1, 1)}
    selected = np.array([0.1, 0.7, 0.9])
    why = Explanation.from_arrays("x", selected, list("abc"), from_all=np.array(all_cells), **options, **maps)  # type: ignore[arg-type]
    assert why.agrees == agrees


def test_in_words_the_classifier_comes_first_and_a_disagreement_before_it() -> None:
    cat, dog = Prediction(281, "tabby", 0.69), Prediction(7, "dog", 0.6)
    assert str(make()) == "tabby 75.0% (from 4 of 6 cells)"
    assert str(make(classifier=cat, agrees=True, target=281)) == "tabby 69.0% (from 4 of 6 cells: tabby 75.0%)"
    other = make(classifier=dog, agrees=False)
    assert str(other) == "DISAGREES: the classifier says dog 60.0%, the selected 4 of 6 cells say tabby 75.0%"
    assert other.disagrees
    asked = make(classifier=dog, agrees=False, target=281)
    assert str(asked) == "dog 60.0% (from 4 of 6 cells chosen for tabby: tabby 75.0%)"
    agreeing = make(classifier=cat, agrees=True, target=967)
    assert str(agreeing) == "tabby 69.0% (from 4 of 6 cells chosen for class 967: tabby 75.0%)"
    assert not asked.disagrees


@pytest.mark.parametrize(
    ("asked", "about", "words"),
    [
        ({}, "a", "from these pixels alone: a 60.0%; without them: a 10.0% (likeliest: c 70.0%)"),
        ({"target": 2}, "c", "from these pixels alone: c 10.0% (likeliest: a 60.0%); without them: c 70.0%"),
    ],
)
def test_the_check_is_about_the_class_that_is_explained(asked: dict[str, int], about: str, words: str) -> None:
    maps = {"unbounded": [[1.0]], "scores": [[0.0]], "soft": None, "selected": np.ones((1, 1), bool)}
    whole, masked = np.array([0.5, 0.3, 0.2]), [np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.2, 0.7])]
    options = {"from_all": whole, "masked": masked, "fill": "grey", "method": "BLA", "region": (0, 0, 1, 1)}
    check = Explanation.from_arrays("x", whole, list("abc"), **options, **maps, **asked).check  # type: ignore[arg-type]
    assert check is not None
    assert (check.about.label, check.fill, str(check)) == (about, "grey", words)
