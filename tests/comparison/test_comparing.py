"""The comparison end to end, on a small classifier: equal area, resuming, odd data, and what the result says."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bla.cli import run_command
from bla.comparison import ALL, CHEAP, RUN, compare
from bla.comparison.catalogue import METHODS
from bla.comparison.lines import JsonLines
from bla.data.image_sets import Splits, image_folder
from bla.explanations.explanation import Explanation
from bla.metrics import top_cells
from bla.metrics.statistics import holm

NET = """
import torch
from torch import nn
from bla.data.photo import Transform

def build():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=8, padding=4), nn.ReLU())
    net = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    net.transform = Transform((32, 40), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # a grid of 4 x 5
    return net
"""


def photo(seed: int, colour: int) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 120, (40, 60, 3), np.uint8)
    pixels[10:30, 20:50, colour] += 130
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two classes and a run trained on them."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "comparednet.py").write_text(NET)
    for split, count in (("train", 12), ("test", 6)):
        for colour, name in enumerate(("blue", "red")):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                picture = photo(index + 100 * colour + (split == "test") * 1000, 2 * (1 - colour))
                picture.save(folder / "data" / split / name / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_command(["train", "data", "--model", "comparednet:build", "--epochs", "2", "--out", "run"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("BLA_TRUST_CODE", "comparednet:build")
    monkeypatch.setattr("bla.metrics.leakage.STEPS", 20)


def compared(*arguments: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict:
    assert run_command(["compare", "run", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_all_methods_and_leakage(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bla.comparison.pixels.COSTLY", 2)
    result = compared("--methods", "all", "--leakage", "--sanity", "--pixels", "3", "--out", "all", capsys=capsys)
    assert json.loads((place / "all/compare.json").read_text()) == result
    assert list(result["methods"]) == list(ALL)
    assert result["data"]["images"] == 12 == len(result["images"])
    sizes = [image["size"] for image in result["images"]]
    for name, record in result["methods"].items():
        lines = (place / "all/explanations" / f"{name}.jsonl").read_text().splitlines()
        found = [Explanation.from_dict(json.loads(line)) for line in lines]
        assert [entry.size for entry in found] == sizes, "equal area"
        assert [entry.image for entry in found] == [image["image"] for image in result["images"]]
        assert all((entry.target is not None) == record["class_specific"] for entry in found)
        for entry in found:
            worst = entry.unbounded[entry.selected].min()
            assert (entry.unbounded[~entry.selected] <= worst).all()
        assert record["explains"] in result["explains"]
        assert record["cost"]["ms_per_image"] > 0
        assert set(record["values"]) == set(record["each"]) <= set(result["metrics"])
        assert {"accuracy", "loss", "agreement", "sufficiency", "comprehensiveness", "evaluator", "area"} <= set(
            record["values"]
        )
        for metric, value in record["values"].items():
            each = [number for number in record["each"][metric] if number is not None]
            assert value["mean"] == pytest.approx(np.mean(each), abs=1e-5)
            assert value["low"] <= value["mean"] <= value["high"]
        assert ("mask_only" in record["values"]) != record["needs_pixels"]
    for name, metric in result["metrics"].items():
        assert metric["formula"]
        assert metric["source"]
        assert metric["better"] in ("higher", "lower", None)
        assert metric["version"] == (2 if name.startswith("road") else 1)
    assert result["judge"] == "evaluator"
    assert result["leakage"]["chance"] == 0.5
    sample = result["pixels"]["images"]
    assert len(sample) == 3
    for name, record in result["methods"].items():
        for metric in ("deletion", "insertion", "average_drop", "road_most", "kept", "removed_area", "infidelity"):
            known = [index for index, value in enumerate(record["each"][metric]) if value is not None]
            cheap = metric in ("kept", "removed_area")
            assert known == (sample if cheap else [sample[0], sample[2]]), "only the sample has pixel-level figures"
        assert ("max_sensitivity" in record["each"]) == (not record["needs_pixels"] and name != "shuffled")
    sane = result["sanity"]["methods"]
    assert list(sane["bla"]["cascade"]) == ["heads", "module", "trunk, top third", "trunk, two thirds", "trunk"]
    assert (
        sane["centre"]["stability"]["flip"]
        == sane["centre"]["stability"]["noise"]
        == 1
        > sane["centre"]["stability"]["shift"]
    )
    assert sane["norm"]["cascade"]["heads"] == pytest.approx(1), "what the trunk alone decides does not hear of heads"
    assert sane["norm"]["cascade"]["trunk"] < 0.9
    assert sane["bla"]["cascade"]["module"] < 0.99
    # cells, hires and unrectified gradients agree at the last map: same cells, same figures
    own, other = (result["methods"][name] for name in ("cam", "grad-cam"))
    assert own["each"]["accuracy"] == other["each"]["accuracy"]
    assert own["curve"]["kept"] == other["curve"]["kept"]
    for metric in result["metrics"]:
        rows = [row for row in result["comparisons"] if row["metric"] == metric]
        assert holm([row["p"] for row in rows]) == [row["p_holm"] for row in rows]
        assert all(row["method"] == RUN for row in rows)


def test_it_goes_on_by_method_and_photo(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--methods", "cam", "norm", "--out", "resumed"]
    monkeypatch.setattr("bla.comparison.explanations._BATCH", 4)
    whole = compared(*arguments[:-1], "straight", capsys=capsys)
    written = 0
    append = JsonLines.append

    def interrupted(self: JsonLines, *rest: object, **state: object) -> None:
        nonlocal written
        if written == 5:
            raise KeyboardInterrupt
        written += 1
        append(self, *rest, **state)  # type: ignore[arg-type]

    monkeypatch.setattr("bla.comparison.lines.JsonLines.append", interrupted)
    assert run_command(["compare", "run", *arguments]) == 130
    monkeypatch.setattr("bla.comparison.lines.JsonLines.append", append)
    with (place / "resumed/explanations/cam.jsonl").open("a") as file:
        file.write('{"half a li')  # killed while writing
    asked = []
    monkeypatch.setattr(
        "bla.comparison.explanations.top_cells", lambda maps, sizes: asked.append(len(maps)) or top_cells(maps, sizes)
    )
    again = compared(*arguments, capsys=capsys)
    assert asked == [4, 4, 4, 4], "the last batch of cam and the three of norm"
    changing = {"created", "seconds", "methods", "baseline"}
    assert {key: value for key, value in again.items() if key not in changing} == {
        key: value for key, value in whole.items() if key not in changing
    }
    for name in ("bla", "cam", "norm"):
        assert again["methods"][name]["each"] == whole["methods"][name]["each"]
        one, other = (place / folder / "explanations" / f"{name}.jsonl" for folder in ("straight", "resumed"))
        assert one.read_bytes() == other.read_bytes()


def test_one_photo_one_class_no_classes_and_a_broken_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "loose").mkdir()
    photo(7, 0).save(place / "loose/a.png")
    photo(8, 2).save(place / "loose/b.png")
    (place / "loose/c.png").write_bytes(b"")
    one = compared("data/test/red/0.png", "--methods", "cam", "--out", "one", capsys=capsys)
    assert one["data"]["images"] == 1
    assert one["data"]["labels"] == "the data's", "the photo's folder names its class"
    assert one["images"][0]["label"] == "red"
    group = compared("data/test/red", "--methods", "cam", "shuffled", "--out", "group", capsys=capsys)
    assert {image["label"] for image in group["images"]} == {"red"}
    loose = compared("loose", "--out", "loose-out", capsys=capsys, code=3)
    assert loose["data"]["images"] == 2
    assert loose["data"]["labels"].startswith("predictions")
    assert loose["baseline"]["accuracy"] is None
    assert loose["skipped"][0]["image"].endswith("c.png")
    assert set(loose["methods"]) == set(CHEAP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bla.comparison.comparison.training_source", lambda run: "")
        lone = compared("data/test/red/0.png", "--out", "lone", capsys=capsys)
    assert set(lone["methods"]) == {name for name in CHEAP if not METHODS[name].trained}
    few = compared("--methods", "norm", "--limit", "3", "--out", "few", capsys=capsys)
    assert few["data"]["images"] == 3
    assert few["data"]["objects"] == 0
    assert "on_object" not in few["metrics"]


def test_it_prints_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["compare", "run", "--methods", "cam", "--limit", "4", "--out", "table"]) == 0
    out = capsys.readouterr().out
    assert "agreement ↑" in out
    assert "4 photos, equal area" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "run", "--methods", "gradcam"], "expected methods among random, centre, norm, cam, bla"),
        (["compare", "nowhere"], "expected a run folder"),
        (["compare", "run", "nowhere"], "expected a folder of images"),
        (["compare", "run", "--limit", "0"], "Must be >= 1"),
        (["compare", "run", "--out", "comparednet.py"], "expected a folder for the comparison"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_moved_training_set_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((place / "run/run.json").read_text())
    (place / "moved").mkdir(exist_ok=True)
    (place / "moved/model.safetensors").write_bytes((place / "run/model.safetensors").read_bytes())
    record["data"]["root"] = str(place / "gone")
    (place / "moved/run.json").write_text(json.dumps(record))
    assert run_command(["compare", "moved", "data", "--leakage"]) == 2
    assert "leave out --leakage" in capsys.readouterr().err
    assert run_command(["compare", "moved", "data", "--methods", "cam", "--out", "moved-out"]) == 0
    assert not math.isnan(json.loads((place / "moved-out/compare.json").read_text())["seconds"])
    sys.modules.pop("comparednet", None)


def splits_with_boxes(place: Path) -> Splits:
    """The test photos, with the box of the coloured patch; the first photo's object is not known."""
    images = image_folder(place / "data").test
    boxes = [np.array([[20.0, 10.0, 50.0, 30.0]])] * len(images)
    boxes[0] = np.empty((0, 4))
    images = dataclasses.replace(images, boxes=tuple(boxes))
    return Splits(images, images, seeded=False)


def splits_with_masks(place: Path) -> Splits:
    """The same objects, each drawn into a file as large as its photo."""
    images = image_folder(place / "data").test
    (place / "masks").mkdir()
    for index in range(len(images)):
        mask = np.zeros((40, 60), np.uint8)
        mask[10:30, 20:50] = 255 * (index > 0)
        Image.fromarray(mask).save(place / "masks" / f"{index}.png")
    images = dataclasses.replace(images, masks=tuple(f"../../masks/{index}.png" for index in range(len(images))))
    return Splits(images, images, seeded=False)


@pytest.mark.parametrize("known", [splits_with_boxes, splits_with_masks])
def test_objects_are_compared_with_where_they_are_known(place: Path, known: Callable[[Path], Splits]) -> None:
    options = {"methods": ["centre", "norm"], "leakage": True, "model": "comparednet:build"}
    result = compare("run", known(place), out=place / known.__name__, **options)
    assert result["data"]["objects"] == 11
    # photos of 60 x 40 pixels, cells of 12 x 10: the box covers rows 1 and 2 in full, and 4, 12, 12 and 2 of 12 columns
    covered = np.zeros((4, 5))
    covered[1:3] = [0, 4 / 12, 1, 1, 2 / 12]
    for name, record in result["methods"].items():
        assert record["each"]["on_object"][0] is None
        assert record["values"]["on_object"]["images"] == 11
        lines = (place / known.__name__ / "explanations" / f"{name}.jsonl").read_text().splitlines()
        for line, share, recall in zip(
            lines[1:], record["each"]["on_object"][1:], record["each"]["recall"][1:], strict=True
        ):
            chosen = np.array(json.loads(line)["selected"], bool)
            assert share == pytest.approx(covered[chosen].sum() / chosen.sum(), abs=1e-5)
            assert recall == pytest.approx(covered[chosen].sum() / covered.sum(), abs=1e-5)
        assert "off_object" in record["each"]
        assert len(record["curve"]["on_object"]) == 12
    assert -1 <= result["size"]["object_correlation"]["mean"] <= 1
    assert result["images"][1]["object_share"] == pytest.approx(covered.mean())


def test_a_class_aware_run_is_asked_about_the_class_that_cam_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "data", "--model", "comparednet:build", "--epochs", "2", "--class-aware", "--out", "aware"]
    assert run_command(train) == 0
    capsys.readouterr()
    assert run_command(["compare", "aware", "--methods", "cam", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["methods"]["bla"]["class_specific"]
    own, cams = (
        [
            json.loads(line)["target"]
            for line in (place / f"aware/comparison/explanations/{name}.jsonl").read_text().splitlines()
        ]
        for name in ("bla", "cam")
    )
    assert own == cams == [["blue", "red"].index(image["predicted"]) for image in result["images"]]
