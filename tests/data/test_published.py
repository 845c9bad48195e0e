"""The paper's data sets in their original layout: small ones made here, and the real excerpt of the birds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torch import nn

from bla.data import published as datasets
from bla.data.image_sets import Splits
from bla.data.photo import DataError
from bla.data.published import PUBLISHED, layout, read_images
from bla.model.classifier import explainable
from bla.progress import silent
from bla.runs import run
from bla.runs.record import RunError
from bla.training.cache import cached_features
from bla.training.settings import Settings
from small import Tiny

DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog")


def photo(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, "JPEG")


def write_cats_vs_dogs(root: Path, count: int = 10) -> Path:
    """PetImages as it is: zero bytes, half a file, another format under .jpg, CMYK, and Windows' thumbnails."""
    for place, kind in enumerate(("Cat", "Dog")):
        folder = root / "PetImages" / kind
        for number in range(count):
            photo(folder / f"{number}.jpg", 100 * place + number, "CMYK" if number == 3 else "RGB")
        (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0 not a photo")
        (folder / "666.jpg").touch()
        (folder / "11702.jpg").write_bytes((folder / "0.jpg").read_bytes()[:200])
        (folder / "10404.jpg").write_bytes(b"<html>not a photo</html>")
    (root / "readme[1].txt").write_text("Microsoft's readme")
    return root


def write_stanford_dogs(root: Path) -> Path:
    """Images, Annotation in XML without a suffix, and MATLAB's lists, numbered from 1."""
    listed: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, folder in enumerate(DOGS, 1):
        synset = folder.partition("-")[0]
        for number in (9, 11, 100, 3):
            name = f"{folder}/{synset}_{number}.jpg"
            photo(root / "Images" / name, 10 * label + number, size=(60, 50))
            listed["test" if number == 3 else "train"].append((name, label))
            dogs = [(5, 6, 25, 36), (30, 10, 55, 45)][: 1 + (number == 11)]
            objects = "".join(
                f"<object><name>dog</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
                "</bndbox></object>"
                for a, b, c, d in dogs
            )
            annotation = root / "Annotation" / name.removesuffix(".jpg")
            annotation.parent.mkdir(parents=True, exist_ok=True)
            annotation.write_text(f"<annotation><folder>{synset}</folder>{objects}</annotation>")
    for split, rows in listed.items():
        cells = np.empty((len(rows), 1), object)
        cells[:, 0] = [name for name, _ in rows]
        savemat(root / f"{split}_list.mat", {"file_list": cells, "labels": np.array([[label] for _, label in rows])})
    return root


def write_birds(root: Path) -> Path:
    """Caltech's tables; ids with gaps, not in the order of names; a class of which no image is there."""
    root.mkdir(parents=True)
    images = {
        7: ("002.Laysan_Albatross/b.jpg", 2, 1), 12: ("001.Black_footed_Albatross/z.jpg", 1, 0),
        3: ("002.Laysan_Albatross/a.jpg", 2, 0), 40: ("001.Black_footed_Albatross/y.jpg", 1, 1),
    }  # fmt: skip
    for key, (name, _, _) in images.items():
        photo(root / "images" / name, key, size=(100, 80))
    tables = {
        "classes.txt": ["1 001.Black_footed_Albatross", "2 002.Laysan_Albatross", "3 003.Sooty Albatross"],
        "images.txt": [f"{key} {name}" for key, (name, _, _) in images.items()],
        "image_class_labels.txt": [f"{key} {label}" for key, (_, label, _) in images.items()],
        "train_test_split.txt": [f"{key} {train}" for key, (_, _, train) in images.items()],
        "bounding_boxes.txt": [f"{key} {key}.0 2.0 30.5 40.0" for key in images],
        "parts/parts.txt": ["1 back", "2 left eye"],
        "parts/part_locs.txt": [f"{key} {part} {key}.5 {part}.0 {part % 2}" for key in images for part in (1, 2)],
    }
    (root / "parts").mkdir()
    for file, lines in tables.items():
        (root / file).write_text("\n".join(lines) + "\n")
    return root


def read(data: str | Path | Splits, tmp_path: Path, **options: object) -> tuple[Splits, str]:
    return read_images(data, cache=tmp_path / "cache", report=silent, **options)  # type: ignore[arg-type]


# --- layouts


def test_cats_and_dogs_with_what_is_broken_in_it(tmp_path: Path) -> None:
    root = write_cats_vs_dogs(tmp_path / "pets")
    splits, source = read(root, tmp_path, seed=3)
    assert source == str(root)
    assert splits.seeded
    assert splits.train.classes == splits.test.classes == ("Cat", "Dog")
    assert (len(splits.train), len(splits.test)) == (20, 6), "80/20 of 13 a class"
    whole = splits.whole()
    assert not [name for name in whole.names if "Thumbs" in name]
    assert "Cat/666.jpg" in whole.names, "broken files are listed, and reported when read"
    again, _ = read(root, tmp_path, seed=3)
    other, _ = read(root, tmp_path, seed=4)
    assert again.test.names == splits.test.names != other.test.names
    features = cached_features(explainable(Tiny()), whole, root=tmp_path / "features")
    assert sorted(image for image, _ in features.failures) == [
        f"{kind}/{number}.jpg" for kind in ("Cat", "Dog") for number in (10404, 11702, 666)
    ], "CMYK is read, the others are told"


def test_stanford_dogs(tmp_path: Path) -> None:
    root = write_stanford_dogs(tmp_path / "dogs")
    splits, source = read(root, tmp_path)
    assert (source, splits.seeded) == (str(root), False)
    assert splits.train.classes == splits.test.classes == DOGS
    assert splits.test.names == tuple(f"{folder}/{folder.partition('-')[0]}_3.jpg" for folder in DOGS)
    assert splits.test.labels is not None
    assert splits.test.labels.tolist() == [0, 1, 2]
    assert len(splits.train) == 9
    assert splits.train.boxes is not None
    two = splits.train.names.index(f"{DOGS[1]}/n02085782_11.jpg")
    assert splits.train.boxes[two].tolist() == [[5, 6, 25, 36], [30, 10, 55, 45]]
    assert all(path.exists() for path in map(splits.train.path, range(9)))
    (root / "Annotation" / DOGS[0] / "n02085620_3").unlink()
    unknown = read(root, tmp_path)[0].test
    assert unknown.boxes is not None
    assert unknown.boxes[0].shape == (0, 4)
    shutil.rmtree(root / "Annotation")
    assert read(root, tmp_path)[0].train.boxes is None


def test_birds_by_their_tables(tmp_path: Path) -> None:
    root = write_birds(tmp_path / "any name")
    splits, _ = read(root, tmp_path)
    train, test = splits.train, splits.test
    assert train.names == ("001.Black_footed_Albatross/y.jpg", "002.Laysan_Albatross/b.jpg")
    assert (train.ids is not None and train.ids.tolist(), test.ids is not None and test.ids.tolist()) == (
        [40, 7],
        [12, 3],
    )
    assert train.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty Albatross")
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1]
    assert train.boxes is not None
    assert train.boxes[1].tolist() == [[7, 2, 37.5, 42]]
    assert train.part_names == ("back", "left eye")
    assert train.parts is not None
    assert train.parts[0].tolist() == [[40.5, 1, 1], [40.5, 2, 0]]
    whole = splits.whole()
    assert whole.ids is not None
    assert whole.ids.tolist() == [40, 12, 3, 7]
    assert whole.boxes is not None
    assert whole.boxes[2][0, 0] == 3
    for file in ("bounding_boxes.txt", "parts/part_locs.txt"):
        (root / file).unlink()
    bare = read(root, tmp_path)[0].train
    assert (bare.boxes, bare.parts, bare.part_names) == (None, None, ())


def test_the_real_excerpt_of_the_birds(shared_data: Path, tmp_path: Path) -> None:
    by_path, source = read(shared_data / "CUB_200_2011", tmp_path)
    by_name, same = read("caltech_birds2011", tmp_path, data_root=shared_data)
    assert source == same == str((shared_data / "CUB_200_2011").resolve())
    for splits in (by_path, by_name):
        assert (len(splits.train), len(splits.test), len(splits.whole())) == (300, 243, 543)
    whole = by_path.whole()
    assert whole.ids is not None
    assert sorted(whole.ids.tolist()) == list(range(1, 544))
    assert whole.classes[0] == "001.Black_footed_Albatross"
    assert len(whole.classes) == 10
    assert whole.names[int(np.nonzero(whole.ids == 1)[0][0])].endswith("Black_Footed_Albatross_0046_18.jpg")
    assert whole.boxes is not None
    assert whole.parts is not None
    assert whole.parts.shape == (543, 15, 3)
    shares, visible = [], []
    for index in range(0, 543, 20):
        with Image.open(whole.path(index)) as file:
            width, height = file.size
        left, top, right, bottom = whole.boxes[index][0]
        assert -1 <= left < right <= width + 1
        assert -1 <= top < bottom <= height + 1
        x, y, seen = whole.parts[index].T
        visible += ((x > left - 2) & (x < right + 2) & (y > top - 2) & (y < bottom + 2))[seen > 0].tolist()
        share = whole.coverage(index, (0, 0, width, height), (7, 7))
        assert share is not None
        assert share.mean() == pytest.approx((right - left) * (bottom - top) / (width * height), abs=0.02)
        shares.append(share.mean())
    assert np.mean(visible) > 0.97, "parts lie on the bird"
    assert 0.2 < np.mean(shares) < 0.6


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "image_class_labels.txt").write_text("7 2\n"), r"a line for every image.*none for \[3"),
        (lambda root: (root / "classes.txt").write_text("1 only\n"), r"got also \[2\]"),
        (lambda root: (root / "images.txt").write_text("a.jpg\n"), "expected 2 columns, a number first, got 'a.jpg'"),
        (lambda root: (root / "bounding_boxes.txt").write_text("7 1 2 -5 4\n"), "left, top, right, bottom"),
    ],
)
def test_broken_tables_are_told(tmp_path: Path, break_it: Callable[[Path], object], message: str) -> None:
    root = write_birds(tmp_path / "birds")
    break_it(root)
    with pytest.raises(DataError, match=message):
        read(root, tmp_path)


def test_broken_dogs_are_told(tmp_path: Path) -> None:
    root = write_stanford_dogs(tmp_path / "dogs")
    (root / "Annotation" / DOGS[0] / "n02085620_3").write_text("<annotation><object><bndbox>")
    with pytest.raises(DataError, match=r"n02085620_3: expected an annotation in XML"):
        read(root, tmp_path)
    (root / "test_list.mat").write_bytes(b"not MATLAB's")
    with pytest.raises(DataError, match=r"test_list.mat: expected Stanford's list"):
        read(root, tmp_path)


# --- names


@pytest.mark.parametrize(
    ("name", "write", "inside"),
    [
        ("cats_vs_dogs", write_cats_vs_dogs, ""),
        ("stanford_dogs", write_stanford_dogs, ""),
        ("caltech_birds2011", write_birds, "CUB_200_2011"),
    ],
)
def test_names_find_the_layout_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path], Path], inside: str
) -> None:
    root = write(tmp_path / "kept" / name / inside)
    expected = read(root, tmp_path)[0]
    assert read(name, tmp_path, data_root=tmp_path / "kept")[0].test.names == expected.test.names
    assert read(name, tmp_path, data_root=root)[1] == str(root), "the folder itself"
    assert read(tmp_path / "kept" / name, tmp_path)[1] == str(root), "by its layout"
    monkeypatch.setenv("BLA_DATA", str(tmp_path / "kept"))
    assert read(name, tmp_path)[1] == str(root)
    monkeypatch.setenv("BLA_DATA", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path / "kept")
    assert read(name, tmp_path)[1] == str(root)


def test_other_names_and_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cats_v_dogs: expected a folder of images or one of embedded, cats_vs_dogs, "):
        read("cats_v_dogs", tmp_path)
    splits, _ = read(write_cats_vs_dogs(tmp_path / "pets"), tmp_path)
    assert read(splits, tmp_path) == (splits, "")
    assert layout("caltech_birds2011").startswith("CUB_200_2011/images.txt, CUB_200_2011/classes.txt")
    assert set(PUBLISHED) == {"cats_vs_dogs", "stanford_dogs", "caltech_birds2011"}


def test_the_embedded_set_has_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_set = datasets.embedded.write
    monkeypatch.setattr(
        datasets.embedded, "write", lambda folder, **_: whole_set(folder, train=8, test=8, size=(96, 64))
    )
    splits, source = read("embedded", tmp_path)
    assert source == "embedded"
    for images in (splits.train, splits.test, splits.whole()):
        for index in range(len(images)):
            share = images.coverage(index, (0, 0, 96, 64), (4, 6))
            assert images.masks is not None
            assert share is not None
            with Image.open(images.root / images.masks[index]) as file:
                mask = np.asarray(file) > 0
            slow = mask.reshape(4, 16, 6, 16).mean(axis=(1, 3))
            np.testing.assert_allclose(share, slow)


def test_training_and_measuring_on_splits(tmp_path: Path) -> None:
    root = write_birds(tmp_path / "birds")
    fold = read(root, tmp_path)[0].folds(2, seed=1)[0]
    stem = nn.Sequential(nn.Conv2d(3, 4, 32, stride=32), nn.ReLU())
    net = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    trained = run.train(fold, tmp_path / "run", Settings(epochs=1), model=net, cache=tmp_path / "cache")
    assert trained.record["data"]["root"] == ""
    assert trained.record["data"]["test"] == fold.test.digest()
    metrics, failures = run.evaluate(tmp_path / "run", fold, model=net, cache=tmp_path / "cache")
    assert (metrics, failures) == (trained.record["metrics"], ())
    with pytest.raises(RunError, match="as splits made by a program: pass --data"):
        run.evaluate(tmp_path / "run", model=net, cache=tmp_path / "cache")
