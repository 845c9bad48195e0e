"""The table of what the whole classifier says from the best cells' pixels: its figures by hand, and resumed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.faithfulness import bounds, classifiers, evaluators, mosaics, own_prediction, sizes
from bla.comparison.methods import PooledClassifier
from bla.metrics import top_cells
from bla.metrics.pixels import kept_and_removed
from bla.model.classifier import explainable
from small import Tiny, photo


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["image,class,left,top,right,bottom"]
    for index in range(5):
        photo(index, index % 3).save(folder / f"{index}.png")
        lines += [f"{index}.png,3,0,0,25,15", f"{index}.png,3,25,15,50,30"] if index else []
    (folder / "boxes.csv").write_text("\n".join(lines))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    monkeypatch.setattr("sys.argv", ["own_prediction", "small:Tiny", *map(str, arguments), "--untrained"])
    monkeypatch.setattr(own_prediction, "fastest", lambda pooled, _: pooled)  # an export takes seconds
    own_prediction.main()
    return capsys.readouterr().out


def test_it_measures_every_ranking_and_resumes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [photos, "--out", tmp_path / "out", "--costly", "4", "--protocols", "3", "--road", "2"]
    found = json.loads(run(monkeypatch, capsys, *arguments, "--json"))
    assert found["photos"] == 5
    assert found["sizes"] == [2, 4, 6], "12%, 25% and 40% of 15 cells"
    assert list(found["methods"]) == [
        "random", "centre", "norm", "cam", "cam-3x3", "grad-cam++", "layer-cam", "finer-cam", "refine-cam", "c-e",
        "c-e-3x3", "score-cam", "integrated-gradients", "occlusion", "rise", "kernel-shap", "bla",
    ]  # fmt: skip
    for means in found["methods"].values():
        assert all(0 <= value <= 1 for key, value in means.items() if key != "idsds")
    gained = found["methods"]["bla"]["kept 4"] - found["methods"]["c-e"]["kept 4"]
    assert found["differences"]["kept 4"]["c-e"]["mean"] == pytest.approx(gained)

    classifier = explainable(Tiny())
    pooled = PooledClassifier(classifier.trunk, classifier.head)
    images = own_prediction.read_set(photos, None)
    pixels = classifier.pixels(np.stack([classifier.transform.read(images.path(row)).pixels for row in range(5)]))
    norms = torch.linalg.vector_norm(pooled.trunk(pixels), dim=1)
    by_hand = kept_and_removed(pooled, pixels, top_cells(norms, 4), pooled(pixels).argmax(dim=1))
    for name, values in by_hand.items():
        assert found["methods"]["norm"][f"{name} 4"] == pytest.approx(values.mean().item())

    monkeypatch.setattr(own_prediction, "measure", lambda *_: 1 / 0)  # nothing is measured again
    text = run(monkeypatch, capsys, *arguments)
    assert "| random cells |" in text
    assert "| kept 2, against CAM: at least +0.08 |" in text
    assert "5 photos, fill coarse;" in text
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, capsys, *arguments, "--fill", "grey")

    out = [str(tmp_path / "out")] * 2
    monkeypatch.setattr("sys.argv", ["classifiers", *out, "--names", "one", "two", "--csv", str(tmp_path)])
    classifiers.main()
    apart = found["differences"]["kept 4"]["c-e"]
    half = (apart["high"] - apart["low"]) / 2 / 2**0.5
    assert f"| {apart['mean']:+.3f} ± {half:.3f} |" in capsys.readouterr().out
    with (tmp_path / "protocols.csv").open(encoding="utf-8") as file:
        random, *_, ours = csv.DictReader(file)
    drops = [found["methods"][name]["average_drop_100"] for name in found["methods"]]
    assert (random["ranked by"], ours["ranked by"]) == ("random cells", "ours")
    assert random["AD 100%"].strip("*") == f"{drops[0]:.3f}"
    assert random["AD 100%"].startswith("*") == (f"{drops[0]:.3f}" == f"{min(drops):.3f}"), "the least is the best"


def test_masks_and_boxes_are_read(photos: Path, tmp_path: Path) -> None:
    boxes = own_prediction.read_set(photos, 3).boxes
    assert boxes is not None
    assert [len(each) for each in boxes] == [0, 2, 2]
    (tmp_path / "horses").mkdir()
    for folder in ("images", "masks"):
        (tmp_path / "horses" / folder).mkdir()
        photo(0, 0).save(tmp_path / "horses" / folder / "a.png")
    images = own_prediction.read_set(tmp_path / "horses", None)
    covered = own_prediction.coverage(explainable(Tiny()), images, (3, 5))
    assert covered is not None
    assert covered.shape == (1, 3, 5)
    assert covered.max() > 0.9


def test_mosaics_ask_about_each_quarter(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes, sure = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([0.6, 0.5, 0.9, 0.4, 0.7])
    assert all(sorted(drawn) == [0, 1, 2, 4] for drawn in mosaics.draw(classes, sure, 3, 0))
    with pytest.raises(SystemExit, match="expected photos of at least 4 classes"):
        next(mosaics.draw(classes, sure * 0.9, 3, 0))
    monkeypatch.setattr(mosaics, "draw", lambda *_: iter([[0, 1, 2, 3], [4, 3, 2, 1]]))  # it knows three classes alone
    monkeypatch.setattr("sys.argv", ["mosaics", "small:Tiny", str(photos), "--out", str(tmp_path), "--untrained"])
    mosaics.main()
    text = capsys.readouterr().out
    assert "| centre disc | 0.250 | 0.250 | 0.250 |" in text
    assert "2 mosaics; 95% intervals, paired." in text


def test_a_bound_set_on_other_photos_by_hand(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = torch.tensor([[[3.0, 1.0, -1.0]], [[-2.0, -3.0, -4.0]]])
    assert bounds.at_bound(scores, 2.0, 1).tolist() == [[[True, True, True]], [[True, False, False]]]
    assert bounds.at_bound(scores, -2.0, 2).tolist() == [[[True, True, False]]] * 2, "the two best, whatever they score"
    arguments = [str(photos), "--out", str(tmp_path), "--training", str(photos), "--draw", "4", "--untrained"]
    monkeypatch.setattr("sys.argv", ["bounds", "small:Tiny", *arguments])
    bounds.main()
    text = capsys.readouterr().out
    assert (tmp_path / "bounds.md").read_text() in text
    assert "| agreement, all (5) |" in text
    assert "Set on 4 photos; 95% intervals." in text


def test_sizes_by_hand(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rising = torch.tensor([[0.1, 0.7, 0.85, 0.7], [0.99, 0.5, 0.9, 1.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    kept = (rising > 0.6).double()
    unbounded = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 3).double()
    curves = {"kept": kept, "removed": 1 - kept, "head": rising, "classifier": rising, "unbounded": unbounded}
    found = {(rule, level): found.tolist() for rule, level, found in sizes.chosen(curves, 1)}
    assert found["bound", "25%"] == [1, 1, 1]
    assert (found["head", "0.8"], found["classifier", "0.9"]) == ([3, 1, 4], [4, 1, 4]), "all where no size is enough"
    # 8/3 cells: between 2 and 3 for all, which keeps (1 + 2/3 + 0) / 3
    assert "| head | 0.8 | 2.7 | 1, 4 | 0.667 | +0.111 " in sizes.table(curves, 1)
    monkeypatch.setattr(sizes, "fastest", lambda pooled, _: pooled)
    monkeypatch.setattr("sys.argv", ["sizes", "small:Tiny", str(photos), "--out", str(tmp_path), "--untrained"])
    sizes.main()
    assert "5 photos; 95% intervals, paired." in capsys.readouterr().out
    (kept_,) = [json.loads(path.read_text()) for path in tmp_path.glob("curves-*.json")]
    assert [each[-1] for each in kept_["kept"]] == [1.0] * 5, "the whole photo is its own class"


def test_evaluators_judge_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 6), ("test", 4)):
        for kind in range(3):
            (tmp_path / "data" / split / str(kind)).mkdir(parents=True)
            for index in range(count):
                photo(index, kind).save(tmp_path / "data" / split / str(kind) / f"{index}.png")
    monkeypatch.setattr(evaluators, "compiled", lambda *_: None)
    monkeypatch.setattr("bla.metrics.leakage.STEPS", 20)
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["evaluators", "small:Tiny", data, "--out", out, "--untrained", "--limit", "5"])
    evaluators.main()
    text = capsys.readouterr().out
    assert [f"| {title} | {size} |" in text for title in evaluators.TITLES.values() for size in (2, 4)] == [True] * 12
    assert "Photos: 12, for pixels 5, for probe and encoding 6; 95% intervals, paired." in text
    (found,) = [json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()]
    assert set(found["cam 4"]["cells kept"]) <= {0.0, 1.0}
