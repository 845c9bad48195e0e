"""Hugging Face's data sets, from local folders alone, and what is told where the Hub is out of reach."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # the library reads them once, when imported
import datasets

from bla import files
from bla.data import hugging_face as huggingface
from bla.data.image_sets import Splits
from bla.data.photo import DataError
from bla.data.published import read_images
from bla.progress import silent
from bla.runs import run
from bla.training.settings import Settings

CLASSES = ["zebra", "a/b: ant"]


def encoded(index: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), 10 * index, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def rows(labels: list[Any], feature: Any, start: int = 0, **columns: Any) -> Any:
    images = [{"bytes": encoded(start + i, "PNG" if i % 2 else "JPEG"), "path": None} for i in range(len(labels))]
    features = {"picture": datasets.Image(), "kind": feature} | {name: datasets.Value("int64") for name in columns}
    return datasets.Dataset.from_dict(
        {"picture": images, "kind": labels, **columns}, features=datasets.Features(features)
    )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def read(name: str, tmp_path: Path, **options: Any) -> tuple[Splits, str]:
    return read_images(name, cache=tmp_path / "cache", report=options.pop("report", silent), **options)


def test_a_saved_dataset_with_splits(tmp_path: Path) -> None:
    feature = datasets.ClassLabel(names=CLASSES)
    train, test = rows([1, 0, 1, 0, 1], feature), rows([0, 1], feature, start=10)
    datasets.DatasetDict(train=train, validation=test).save_to_disk(tmp_path / "saved")
    splits, source = read(f"hf:{tmp_path / 'saved'}", tmp_path)
    assert (source, splits.seeded) == (f"hf:{tmp_path / 'saved'}", False)
    assert splits.train.classes == splits.test.classes == tuple(CLASSES), "in the data set's own order"
    assert splits.train.labels is not None
    assert sorted(splits.train.labels.tolist()) == [0, 0, 1, 1, 1]
    assert splits.test.names == ("0000.zebra/00000000.jpg", "0001.a_b_ant/00000001.png")
    for images, source_rows in ((splits.train, train), (splits.test, test)):
        stored = source_rows.cast_column("picture", datasets.Image(decode=False))
        for index, name in enumerate(images.names):
            row = int(Path(name).stem)
            assert images.path(index).read_bytes() == stored[row]["picture"]["bytes"], "as it is, undecoded"
            assert images.labels is not None
            assert images.labels[index] == stored[row]["kind"]
    assert read(f"hf:{tmp_path / 'saved'}", tmp_path)[0].train.root == splits.train.root


def test_one_table_is_divided_by_the_seed(tmp_path: Path) -> None:
    for feature, labels, classes in [
        (datasets.Value("string"), ["b", "a"] * 5, ("a", "b")),
        (datasets.Value("int64"), [10, 9] * 5, ("9", "10")),
    ]:
        folder = tmp_path / f"saved {classes[0]}"
        rows(labels, feature).rename_column("kind", "label").save_to_disk(folder)
        splits, _ = read(f"hf:{folder}", tmp_path, seed=1)
        assert splits.seeded
        assert splits.train.classes == classes
        assert (len(splits.train), len(splits.test)) == (8, 2)
        other, _ = read(f"hf:{folder}", tmp_path, seed=2)
        assert other.train.root == splits.train.root, "written once"


def test_columns_and_splits_by_name(tmp_path: Path) -> None:
    feature = datasets.ClassLabel(names=CLASSES)
    two = rows([0, 1], feature).add_column("coarse", [1, 0])
    two = two.cast_column("coarse", datasets.ClassLabel(names=["x", "y"]))
    unlabelled = two.map(lambda _: {"coarse": -1})
    datasets.DatasetDict(big=two, test=unlabelled, validation=two).save_to_disk(tmp_path / "saved")
    name = f"hf:{tmp_path / 'saved'}"
    with pytest.raises(DataError, match=r"expected one column of classes, got kind, coarse: choose with \?label="):
        read(name, tmp_path)
    splits, source = read(f"{name}?label=coarse&train=big", tmp_path)
    assert source == f"{name}?label=coarse&train=big"
    assert splits.train.classes == ("x", "y")
    assert splits.test.labels is not None
    assert splits.test.labels.tolist() == [0, 1], "a test split without classes is passed over"
    for query, message in [
        ("?label=colour", "expected a column of classes, got 'colour'; there are picture, kind, coarse"),
        ("?image=kind&label=kind", "expected a column of type Image"),
        ("?label=kind&test=dev", "expected splits among big, test, validation, got dev"),
        ("?lable=kind", "options among image, label, config, train, test"),
        ("?label=coarse&train=big&test=test", "expected a class of .* in row 0 of test, got -1"),
    ]:
        with pytest.raises(DataError, match=message):
            read(name + query, tmp_path)


def test_image_folders_and_rows_without_classes(tmp_path: Path) -> None:
    for kind, label in (("cat", 0), ("dog", 1)):
        (tmp_path / "photos" / "train" / kind).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "photos" / "train" / kind / f"{index}.jpg").write_bytes(encoded(index + 5 * label))
    splits, _ = read(f"hf:{tmp_path / 'photos'}", tmp_path)
    assert splits.train.classes == ("cat", "dog")
    assert splits.whole().path(0).read_bytes() == encoded(0)
    rows([0, 0], datasets.Value("int64")).remove_columns("kind").save_to_disk(tmp_path / "bare")
    bare, _ = read(f"hf:{tmp_path / 'bare'}", tmp_path)
    assert (bare.train.labels, len(bare.whole())) == (None, 2)


def test_interrupted_it_goes_on_and_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows([0, 1] * 4, datasets.ClassLabel(names=CLASSES)).save_to_disk(tmp_path / "saved")
    written: list[str] = []
    write = huggingface.write_atomically

    def killed(path: Path, content: bytes) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            read(f"hf:{tmp_path / 'saved'}", tmp_path)
    assert not [path for path in (tmp_path / "cache" / "datasets").iterdir() if len(path.name) == 64]
    rest: list[str] = []
    for place in (huggingface, files):  # the images, and the manifest
        monkeypatch.setattr(place, "write_atomically", lambda *a: (rest.append(a[0].name), write(*a)))
    assert len(read(f"hf:{tmp_path / 'saved'}", tmp_path)[0].whole()) == 8
    assert len(rest) == 3 + 1, "what was there is kept"
    assert rest[-1] == "manifest.json"


def test_a_row_without_an_image_is_reported_and_the_rest_trained(tmp_path: Path) -> None:
    feature = datasets.ClassLabel(names=CLASSES)
    table = rows([0, 1] * 6, feature).to_list()
    table[3]["picture"] = None
    table[4]["picture"] = {"bytes": b"no photo", "path": None}
    features = datasets.Features({"picture": datasets.Image(), "kind": feature})
    datasets.Dataset.from_list(table, features=features).save_to_disk(tmp_path / "saved")
    net = nn.Sequential(nn.Conv2d(3, 4, 32, stride=32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    name = f"hf:{tmp_path / 'saved'}"
    trained = run.train(name, tmp_path / "run", Settings(epochs=1), model=net, cache=tmp_path / "cache", report=silent)
    assert sorted(Path(entry["image"]).name for entry in trained.record["skipped"]) == ["00000003.png", "00000004.png"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["root"] == name
    metrics, _ = run.evaluate(tmp_path / "run", model=net, cache=tmp_path / "cache")
    assert metrics == record["metrics"]


def test_the_hub_out_of_reach_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"hf:someone/some-set: expected a data set, got .*; without internet, pass a"):
        read("hf:someone/some-set", tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"expected a data set, got .*; check what is in the folder"):
        read(f"hf:{tmp_path / 'nothing'}", tmp_path)
    for name in ("hf:", "hf:x?label"):
        with pytest.raises(DataError, match="expected"):
            read(name, tmp_path)
