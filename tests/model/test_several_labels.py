"""Several labels an image: tables, figures against scikit-learn's, and from a table to explanations and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import bla
from bla.cli import run_command
from bla.comparison import compare
from bla.comparison.methods import ComparisonError
from bla.data.image_sets import ImageSet, strata
from bla.data.photo import DataError
from bla.data.tables import read_table
from bla.explanations.explanation import Explanation
from bla.metrics.several import SeveralLabels, separation
from bla.model.attention import ClassAwareAttention
from bla.model.classifier import ClassifierError
from bla.progress import silent
from bla.runs import run
from bla.training.settings import Settings, TrainingError
from small import Tiny

COLOURS = ("blue", "green", "red")
CODE = "small:Tiny"
TRUSTED = ("--trust-code", CODE)


def picture(rng: np.random.Generator, labels: list[int]) -> Image.Image:
    """Noise, with a patch of each colour that it is labelled with, side by side."""
    pixels = rng.integers(0, 90, (64, 96, 3), dtype=np.uint8)
    for label, has in enumerate(labels):
        if has:
            left = 32 * label + rng.integers(0, 8)
            pixels[16:48, left : left + 24, 2 - label] = 250
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pictures of none to three colours."""
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    lines = ["image,labels,split"]
    for index in range(96):
        labels = [int(has) for has in rng.random(3) < 0.5]
        picture(rng, labels).save(folder / "photos" / f"{index:02}.png")
        names = ";".join(name for name, has in zip(COLOURS, labels, strict=True) if has)
        lines.append(f"photos/{index:02}.png,{names},{'test' if index % 4 == 0 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> run.Run:
    settings = Settings(
        head_epochs=40, epochs=15, batch_size=8, learning_rate=3e-2, dropout=0, validation=0.1, mean_size=0.4
    )
    out = tmp_path_factory.mktemp("runs") / "run"
    return run.train(table, out, settings, model=CODE, report=silent)


@pytest.fixture(scope="module")
def folder(trained: run.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(tmp_path_factory.getbasetemp().glob("runs*/run"))


# Tables.


def test_both_forms_of_a_table_say_the_same(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "one.csv").write_text(
        'photo,labels,split\nb.jpg,x | y,train\na.jpg,,test\nc.jpg,"y,z",Train\nd.jpg,z,val\n'
    )
    columns = "photo\tsplit\tx\ty\tz\na.jpg\ttest\t0\t0\t0\nb.jpg\ttrain\t1\t1\t0\n"
    columns += "c.jpg\ttrain\t0\t1\t1\nd.jpg\tval\t0\t0\t1\n"
    (tmp_path / "many.TSV").write_text("\ufeff" + columns)
    for table in ("one.csv", "many.TSV"):
        splits = read_table(tmp_path / table)
        assert splits.train.classes == ("x", "y", "z")
        assert splits.train.names == ("b.jpg", "c.jpg")
        assert splits.test.names == ("a.jpg", "d.jpg")
        assert splits.train.labels is not None
        assert splits.train.labels.tolist() == [[1, 1, 0], [0, 1, 1]]
        assert not splits.seeded
        assert splits.train.several


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a line for each image, got 0 lines"),
        ("image,labels\n", "a line for each image, got 1 lines"),
        ("image\na.jpg\n", "expected a column of labels"),
        ("a.jpg,x\nb.jpg,y\n", "first line of column names, image,labels say, got an image: a.jpg"),
        ("image,x,x\na.jpg,1,0\n", "column names, each once"),
        ("image,labels\na.jpg,x\nb.jpg\n", "line 3: expected 2 cells"),
        ("image,labels\na.jpg,x\n,y\n", "line 3: expected the path of an image first"),
        ("image,labels\na.jpg,x\nb.jpg,y\na.jpg,y\n", "line 4: expected each image once, got a.jpg again"),
        ("image,x,y\na.jpg,1,0\nb.jpg,yes,1\n", "line 3: expected 0 or 1 in column x, got 'yes'"),
        ("image,labels\na.jpg,x\nb.jpg,x\n", r"at least two different labels, got \['x'\]"),
        ("image,labels,split\na.jpg,x,train\nb.jpg,y,later\n", "line 3: expected split train or test, got 'later'"),
        ("image,labels,split\na.jpg,x,train\nb.jpg,y,train\n", "to train on and to test on, got 2 and 0"),
        ("image,labels\nno.jpg,x\nnot.jpg,y\n", "by their paths from .*, got none there: no.jpg"),
    ],
)
def test_bad_tables_are_refused_with_the_line(text: str, message: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "labels.csv")


def test_a_missing_table_is_a_mistake_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", str(tmp_path / "no.csv"), "--out", str(tmp_path / "run")]) == 2
    assert "expected a table of images and labels" in capsys.readouterr().err


def test_images_are_divided_by_their_rarest_label(tmp_path: Path) -> None:
    labels = np.zeros((40, 3), np.int64)
    labels[:, 0] = 1
    labels[::4, 1] = 1  # 10
    labels[:4, 2] = 1
    assert np.bincount(strata(labels)).tolist() == [27, 9, 4]
    images = ImageSet(tmp_path, tuple(f"{index:02}" for index in range(40)), labels, ("a", "b", "c"))
    for fold in images.folds(4):
        assert fold.test.labels is not None
        assert fold.test.labels[:, 2].sum() == 1
    assert images.digest() != ImageSet(tmp_path, images.names, 1 - labels, images.classes).digest()
    with pytest.raises(DataError, match=r"expected labels, a row of 0 and 1 for 3 classes, got \(40, 3\)"):
        ImageSet(tmp_path, images.names, 2 * labels, images.classes)


# Figures.


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=30))
def test_figures_of_one_label_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    scores, labels = np.array([pair[0] for pair in pairs], float), np.array([pair[1] for pair in pairs])
    found = separation(scores, labels)
    if len(set(labels.tolist())) < 2:
        assert found == (None, None)
        return
    from sklearn.metrics import average_precision_score, roc_auc_score

    assert found == pytest.approx((average_precision_score(labels, scores), roc_auc_score(labels, scores)))


def test_batches_add_up_to_the_macro_average() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 2, (50, 4))
    labels[:, 3] = 1  # which has no answer
    counted = SeveralLabels()
    for rows in (slice(0, 20), slice(20, 50)):
        counted.update(torch.from_numpy(logits[rows]), torch.from_numpy(labels[rows]))
    found = counted.result()
    from sklearn.metrics import average_precision_score, roc_auc_score

    assert found["auc"] == pytest.approx(roc_auc_score(labels[:, :3], logits[:, :3]))
    assert found["average_precision"] == pytest.approx(average_precision_score(labels[:, :3], logits[:, :3]))
    assert found["by_label"]["auc"][3] is None
    likely = 1 / (1 + np.exp(-logits))
    assert found["loss"] == pytest.approx(-np.log(np.where(labels, likely, 1 - likely)).mean())
    assert found["exact"] == ((logits > 0) == labels).all(axis=1).mean()


# From a table to explanations.


def test_the_run_says_so_and_tells_the_labels_apart(trained: run.Run, folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["several_labels"] is True
    assert record["classes"] == list(COLOURS)
    metrics = record["metrics"]
    for name in ("baseline", "soft", "hard"):
        assert metrics[name]["auc"] > 0.85  # chance is .5
        assert len(metrics[name]["by_label"]["auc"]) == 3
    assert metrics["label_agreement"] >= metrics["agreement"] > 0
    assert metrics["size"]["mean"] < metrics["size"]["cells"]
    again, failures = run.evaluate(folder, model=CODE)
    assert again == metrics
    assert not failures


def test_every_label_above_one_half_is_explained_by_the_cells(trained: run.Run, folder: Path, table: Path) -> None:
    splits = read_table(table)
    loaded = bla.load(folder, model=CODE)
    assert loaded.several_labels
    found = loaded.explain([splits.test.path(index) for index in range(len(splits.test))])
    assert {len(each.present or ()) for each in found} >= {1, 2}
    with torch.inference_mode():
        for index, each in enumerate(found):
            assert each.present is not None
            pixels = loaded.pixels(loaded.transform.read(splits.test.path(index)).pixels[None])
            logits = loaded(pixels)[0]
            assert {votes.target for votes in each.present} == set((logits > 0).nonzero()[:, 0].tolist())
            likely = {guess.index: guess.probability for guess in each.top}
            for votes in each.present:
                assert votes.method == "exact"
                assert votes.offset + votes.cells.sum() == pytest.approx(float(logits[votes.target]), abs=1e-3)
                assert likely[votes.target] == pytest.approx(float(logits[votes.target].sigmoid()), abs=1e-5)
                assert not votes.cells[~each.selected].any()
            assert Explanation.from_dict(json.loads(json.dumps(each.to_dict()))) == each


def test_the_commands_show_every_label(
    trained: run.Run, folder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["evaluate", str(folder), *TRUSTED]) == 0
    shown = capsys.readouterr().out
    assert "mean AP" in shown
    assert "Labels on which hard and baseline agree" in shown
    photos = [str(path) for path in sorted((table.parent / "photos").glob("*.png"))[:12]]
    assert run_command(["explain", *photos, "--run", str(folder), "--out", str(tmp_path / "why"), *TRUSTED]) == 0
    lines = capsys.readouterr().out.splitlines()[:12]
    heights: dict[int, set[int]] = {}
    for photo, line in zip(photos, lines, strict=True):
        labels = sum(f"{colour} " in line for colour in COLOURS)
        assert labels or "no label above 50%" in line
        record = Explanation.load(tmp_path / "why" / f"{Path(photo).stem}.json")
        assert record.present is not None
        assert len(record.present) == labels
        with Image.open(tmp_path / "why" / f"{Path(photo).stem}.png") as panel:
            heights.setdefault(max(labels, 1), set()).add(panel.height)
    assert heights[2] <= {one + other for one in heights[1] for other in heights[1]}


def test_a_run_is_shared_and_comes_back(trained: run.Run, folder: Path, table: Path, tmp_path: Path) -> None:
    shared = bla.save_pretrained(folder, tmp_path / "shared", model=CODE)
    loaded = bla.from_pretrained(shared, model=Tiny())
    assert loaded.several_labels
    photos = sorted((table.parent / "photos").glob("*.png"))[:6]
    assert loaded.explain(photos) == trained.classifier.explain(photos)
    assert "mean average precision" in (shared / "README.md").read_text()


# What is refused.


def test_what_cannot_be_is_refused(trained: run.Run, folder: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no class_aware with several labels"):
        run.train(table, tmp_path / "aware", Settings(class_aware=True), report=silent)
    with pytest.raises(
        ClassifierError, match=r"class-agnostic attention with several_labels.*present has each label's"
    ):
        bla.explainable(_small(), attention=ClassAwareAttention(8), several_labels=True)
    with pytest.raises(ComparisonError, match=r"one class each, got one of .* whose photos may have several labels"):
        compare(folder, out=tmp_path / "compared", model=CODE)
    classes = tmp_path / "classes"
    for index, name in enumerate(COLOURS):
        (classes / name).mkdir(parents=True)
        for number in range(2):
            picture(np.random.default_rng(number), [int(index == each) for each in range(3)]).save(
                classes / name / f"{number}.png"
            )
    with pytest.raises(DataError, match="expected a table of several labels an image, got one class"):
        run.evaluate(folder, classes, model=CODE)


def test_a_classifier_of_several_labels_is_fitted_to_its_own_decisions(table: Path) -> None:
    images = read_table(table).train
    wrapped = bla.explainable(_small(), several_labels=True, classes=COLOURS)
    metrics: dict[str, Any] = bla.fit(wrapped, images, epochs=2, report=silent)
    assert metrics["baseline"]["exact"] == 1.0  # its own decisions count as true
    assert wrapped.explain(images.path(0))[0].present is not None


def _small() -> torch.nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, stride=32), torch.nn.ReLU())
        return torch.nn.Sequential(
            stem, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, len(COLOURS))
        )
