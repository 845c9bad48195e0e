"""Image folders, splits and lists of images."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bla.data.image_sets
from bla.data.image_sets import ImageSet, box_coverage, image_folder, list_images, mask_coverage, stratified_split
from bla.data.photo import DataError, Transform

# --- ImageSet


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def test_image_sets_refuse_contradictions() -> None:
    for names, labels, classes, message in [
        (("b", "a"), None, (), "sorted"),
        (("a", "a"), None, (), "sorted"),
        (("a", "b"), [0], ("x",), "expected labels of 2 images, as many as names, got of 1"),
        (("a", "b"), [0, 1], ("x",), "below 1"),
        (("a", "b"), [0, -1], ("x", "y"), r"got \(2,\) with values \[-1, 0\]"),
    ]:
        with pytest.raises(DataError, match=message):
            ImageSet(Path(), names, labels, classes)  # type: ignore[arg-type]


def test_image_sets_are_frozen_and_subset() -> None:
    labels = np.array([0, 1, 1])
    images = ImageSet(Path("root"), ("a/1.jpg", "b/1.jpg", "b/2.jpg"), labels, ("a", "b"))
    labels[0] = 1
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.root = Path()  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        images.labels[0] = 1
    for indices in ([2, 0, 0], np.array([True, False, True]), [-1, 0]):
        part = images.subset(indices)
        assert (part.names, part.labels.tolist(), len(part)) == (("a/1.jpg", "b/2.jpg"), [0, 1], 2)
        assert (part.path(1), part.classes) == (Path("root/b/2.jpg"), ("a", "b"))
    assert len(images.subset([])) == 0
    assert ImageSet(Path(), ("a",)).subset([0]).labels is None
    with pytest.raises(IndexError):
        images.subset([3])


def test_digests_follow_names_and_contents_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a.jpg", "b.jpg")
    images = ImageSet(touch(tmp_path / "one", *names), names)
    digest = images.digest()
    with monkeypatch.context() as patch:
        patch.setattr(bla.data.image_sets, "opened", None)
        assert images.digest() == digest, "without reading the files again"
    copy = ImageSet(shutil.copytree(tmp_path / "one", tmp_path / "two"), names)
    os.utime(copy.path(0), (1, 1))
    assert copy.digest() == digest
    renamed = tmp_path / "two" / "c.jpg"
    copy.path(1).rename(renamed)
    assert ImageSet(copy.root, ("a.jpg", "c.jpg")).digest() != digest
    lost = copy.digest()
    assert lost != digest, "a file that cannot be read counts"
    renamed.rename(copy.path(1))
    assert copy.digest() == digest
    copy.path(0).write_bytes(b"b.jpg")
    copy.path(1).write_bytes(b"a.jpg")
    assert copy.digest() not in (digest, lost)
    assert images.subset([0]).digest() != digest


# --- image_folder

PETS = [f"{pet}/{number}.jpg" for pet in ("cat", "dog") for number in range(10)]


def test_layout_divided_by_the_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/dog/1.jpg", "train/cat/1.jpg", "train/cat-big/1.jpg", "test/dog/2.jpg", "masks/dog/1.png")
    touch(tmp_path, "val/cat/9.jpg", "stray.jpg")
    splits = image_folder(tmp_path)
    assert not splits.seeded
    assert splits.train.classes == splits.test.classes == ("cat", "cat-big", "dog")
    assert splits.train.names == ("cat-big/1.jpg", "cat/1.jpg", "dog/1.jpg")
    assert splits.train.labels.tolist() == [1, 0, 2]
    assert (splits.test.names, splits.test.labels.tolist()) == (("dog/2.jpg",), [2])
    assert splits.test.path(0).read_bytes() == b"test/dog/2.jpg"


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_names_of_the_held_out_folder(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{name}/a/2.jpg")
    assert image_folder(tmp_path).test.names == ("a/2.jpg",)


def test_layout_of_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *PETS, "bird/only.jpg", "dog/deep/down/1.TIFF")
    touch(tmp_path, ".hidden/1.jpg", "cat/.2.jpg", "cat/.thumbs/1.jpg", "cat/notes.txt")
    splits = image_folder(tmp_path, seed=3)
    train, test = splits.train, splits.test
    assert splits.seeded
    assert train.classes == test.classes == ("bird", "cat", "dog")
    assert sorted(train.names + test.names) == sorted([*PETS, "bird/only.jpg", "dog/deep/down/1.TIFF"])
    assert np.bincount(test.labels).tolist() == [0, 2, 2]
    assert "bird/only.jpg" in train.names
    for images in (train, test):
        assert [images.classes[label] for label in images.labels] == [name.split("/")[0] for name in images.names]
    assert image_folder(tmp_path, seed=4).test.names != test.names

    walk = os.walk

    def backwards(*arguments: Any, **options: Any) -> Iterator[Any]:
        for place, folders, files in walk(*arguments, **options):
            folders.reverse()
            yield place, folders, files[::-1]

    monkeypatch.setattr("os.walk", backwards)
    again = image_folder(str(tmp_path), seed=3)
    assert (again.train.names, again.test.names) == (train.names, test.names)
    assert again.test.digest() == test.digest()


def test_layout_without_classes(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.{'JPG' if number % 2 else 'png'}" for number in range(10)), "notes/read.me")
    splits = image_folder(tmp_path, test_share=0.3)
    assert (len(splits.train), len(splits.test), splits.seeded) == (7, 3, True)
    assert splits.train.labels is None
    assert splits.train.classes == ()


def test_every_suffix_counts_in_either_case(tmp_path: Path) -> None:
    suffixes = ["jpg", "jpeg", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"]
    touch(tmp_path, *(f"a.{suffix}" for suffix in suffixes), *(f"B.{suffix.upper()}" for suffix in suffixes))
    touch(tmp_path, "c.txt", "jpg", ".jpg", "d.jpg.bak")
    assert len(list_images([tmp_path])) == 2 * len(suffixes)


def test_train_alone_is_divided(tmp_path: Path) -> None:
    touch(tmp_path / "train", *PETS)
    splits = image_folder(tmp_path)
    assert (splits.seeded, splits.train.root, len(splits.test)) == (True, tmp_path / "train", 4)


def test_train_alone_without_classes_is_divided(tmp_path: Path) -> None:
    touch(tmp_path / "train", *(f"{number}.jpg" for number in range(5)))
    splits = image_folder(tmp_path)
    assert (splits.train.labels, splits.train.root, len(splits.test)) == (None, tmp_path / "train", 1)


def test_train_may_be_a_class(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{number}.jpg" for name in ("train", "bus") for number in range(3)))
    assert image_folder(tmp_path).train.classes == ("bus", "train")


def test_unlabelled_images_divided_by_the_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "train/2.jpg", "test/1.jpg")
    splits = image_folder(tmp_path)
    assert (splits.train.names, splits.test.names) == (("1.jpg", "2.jpg"), ("1.jpg",))
    assert splits.test.labels is None


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "cat/1.jpg", "cat/2.jpg", "cat/in/3.jpg")
    touch(tmp_path / "elsewhere", "1.jpg", "2.jpg")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "in" / "loop").symlink_to(root / "cat")
    (root / "cat" / "self.jpg").symlink_to(root / "cat" / "self.jpg")
    splits = image_folder(root)
    names = sorted(splits.train.names + splits.test.names)
    found = {"cat": ["1.jpg", "2.jpg", "in/3.jpg", "more/1.jpg", "more/2.jpg", "self.jpg"], "dog": ["1.jpg", "2.jpg"]}
    assert names == [f"{pet}/{name}" for pet, images in found.items() for name in images]
    assert len(splits.train.digest()) == 64


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected images .* got none; check the path"),
        (["a/notes.txt", "b/.hidden.jpg"], "expected images .* got none"),
        (["a/1.jpg", "b/notes.txt", "c/1.jpg"], r"every class folder, got none in \['b'\]; add some or remove"),
        (["pets/cat/1.jpg", "pets/dog/1.jpg"], "at least two class folders, got 'pets' only; are the classes in it"),
        (["train/a/1.jpg", "test/a/1.jpg"], "at least two class folders, got 'a' only"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg"], r"test: expected train's classes .* got also \['c'\]"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg"], "test: expected class folders as in train/"),
        (["train/1.jpg", "test/c/1.jpg"], r"expected train's classes \[\], got also \['c'\]"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/notes.txt"], "test: expected images"),
        (["test/a/1.jpg", "val/a/1.jpg"], "expected train/ beside test/"),
        (["a/1.jpg", "b/1.jpg"], "two images of a class, .* got 2, one of each class; add some"),
        (["1.jpg"], "two images, to train on one and measure on another, got 1; add some"),
    ],
)
def test_folders_that_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        image_folder(touch(tmp_path, *names))


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: expected a folder of images, got no such folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="got a file; name the folder it is in"):
        image_folder(touch(tmp_path, "1.jpg") / "1.jpg")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *PETS)

    def refuse(place: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match="expected a readable folder, got Permission denied"):
        image_folder(tmp_path)


# --- stratified_split and list_images


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_splits_are_stratified(labels: list[int], share: float, seed: int) -> None:
    kept, held_out = stratified_split(labels, len(labels), share, seed)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    assert list(kept) == sorted(kept)
    assert list(held_out) == sorted(held_out)
    for label in set(labels):
        count = labels.count(label)
        out = sum(labels[index] == label for index in held_out)
        if count == 1:
            assert out == 0
        else:
            assert 1 <= out <= count - 1
            assert out in (1, count - 1) or abs(out - count * share) <= 0.5
    assert np.array_equal(stratified_split(np.array(labels, int), len(labels), share, seed)[1], held_out)


def test_splits_stay_as_they_were() -> None:
    assert stratified_split(None, 10, 0.3, seed=0)[1].tolist() == [3, 6, 7]
    assert stratified_split([0, 1] * 5, 10, 0.4, seed=7)[1].tolist() == [2, 5, 7, 8]


def test_splits_differ_by_seed_and_hold_out_everything_in_turn() -> None:
    held_out = {index for seed in range(40) for index in stratified_split(None, 10, 0.2, seed)[1].tolist()}
    assert held_out == set(range(10))


@pytest.mark.parametrize("folder", ["", "cat"])
def test_the_whole_of_a_split_is_what_was_split(folder: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{index}.png" for name in ("cat", "dog") for index in range(7)))
    splits = image_folder(tmp_path / folder)
    whole = splits.whole()
    assert len(whole) == len(splits.train) + len(splits.test)
    assert whole.classes == splits.train.classes
    for split in (splits.train, splits.test):
        places = [whole.names.index(name) for name in split.names]
        assert whole.subset(places).names == split.names
        if split.labels is not None:
            np.testing.assert_array_equal(whole.subset(places).labels, split.labels)


def test_splits_out_of_range_are_refused() -> None:
    for arguments, message in [
        ((None, 4, 0.0, 0), "0 < share < 1, got 0.0"),
        ((None, 4, 1.0, 0), "0 < share < 1"),
        ((None, 4, 0.5, -1), "got -1"),
        (([0, 1], 4, 0.5, 0), "expected 4 labels"),
    ]:
        with pytest.raises(DataError, match=message):
            stratified_split(*arguments)  # type: ignore[arg-type]


def test_lists_keep_files_as_given_and_expand_folders(tmp_path: Path) -> None:
    root = touch(tmp_path, "z.jpg", "folder/b.png", "folder/a/c.jpg", "folder/notes.txt", "empty/notes.txt")
    sources = [root / "z.jpg", str(root / "folder"), root / "missing.jpg", root / "folder/notes.txt"]
    found = [path.relative_to(root).as_posix() for path in list_images(sources)]
    assert found == ["z.jpg", "folder/a/c.jpg", "folder/b.png", "missing.jpg", "folder/notes.txt"]
    with pytest.raises(DataError, match="empty: expected images"):
        list_images([root / "empty"])


# --- boxes, masks, folds


def slow_coverage(covered: np.ndarray, region: tuple[float, ...], grid: tuple[int, int], fine: int) -> np.ndarray:
    """By sampling: points at the centres of a fine raster in each cell, as many right as lie on the object."""
    left, top, right, bottom = region
    rows, columns = grid
    y = top + (np.arange(rows * fine) + 0.5) * (bottom - top) / (rows * fine)
    x = left + (np.arange(columns * fine) + 0.5) * (right - left) / (columns * fine)
    inside = (y[:, None] >= 0) & (y[:, None] < covered.shape[0]) & (x >= 0) & (x < covered.shape[1])
    hit = covered[y.astype(int).clip(0, covered.shape[0] - 1)[:, None], x.astype(int).clip(0, covered.shape[1] - 1)]
    share: np.ndarray = (hit & inside).reshape(rows, fine, columns, fine).mean(axis=(1, 3))
    return share


corners = st.tuples(*[st.integers(0, 20)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)


@settings(max_examples=40)
@given(st.lists(corners, max_size=3), st.integers(1, 4), st.integers(1, 4), st.integers(-2, 4), st.integers(1, 5))
def test_coverage_by_boxes_and_by_their_mask_agree(
    boxes: list[tuple[int, int, int, int]], rows: int, columns: int, left: int, width: int
) -> None:
    mask = np.zeros((20, 20), np.bool_)
    for a, b, c, d in boxes:
        mask[b:d, a:c] = True
    region = (left, 1, left + width * columns, 1 + 4 * rows)  # cells of whole pixels: the slow way is exact
    grid = (rows, columns)
    by_box = box_coverage(boxes, region, grid)
    slow = slow_coverage(mask, region, grid, fine=60)
    np.testing.assert_allclose(mask_coverage(mask, region, grid), slow, atol=1e-9)
    np.testing.assert_allclose(by_box, slow, atol=1e-9)


def test_coverage_of_fractions_of_cells_and_pixels() -> None:
    share = box_coverage([(0.5, 0, 1.5, 0.5)], (0, 0, 3, 1), (1, 3))
    np.testing.assert_allclose(share, [[0.25, 0.25, 0]])
    np.testing.assert_allclose(mask_coverage([[1, 0]], (0.5, 0, 1.75, 1), (1, 1)), [[0.4]])
    assert box_coverage([], (0, 0, 1, 1), (2, 2)).sum() == 0
    assert box_coverage([(-50, -50, 50, 50)], (0, 0, 1, 1), (2, 2)).min() == 1
    with pytest.raises(DataError, match="expected a region"):
        box_coverage([], (1, 0, 1, 1), (2, 2))


def test_coverage_follows_what_the_model_sees() -> None:
    """A photo of 100 x 50 with an object in its right half: a squash shows all of it, a crop of the centre less."""
    images = ImageSet(Path(), ("a",), boxes=(np.array([(50, 0, 100, 50)]),))
    half = (0.5, 0.5, 0.5)
    squash, crop = Transform((20, 20), half, half), Transform((20, 20), half, half, mode="crop", crop_fraction=1.0)
    seen = images.coverage(0, squash.region((100, 50)), (2, 4))
    np.testing.assert_allclose(seen, [[0, 0, 1, 1]] * 2)
    assert crop.region((100, 50)) == (25, 0, 75, 50)
    np.testing.assert_allclose(images.coverage(0, crop.region((100, 50)), (2, 4)), [[0, 0, 1, 1]] * 2)  # type: ignore[arg-type]
    left = ImageSet(Path(), ("a",), boxes=(np.array([(0, 0, 30, 50)]),))
    np.testing.assert_allclose(left.coverage(0, crop.region((100, 50)), (1, 5)), [[0.5, 0, 0, 0, 0]])  # type: ignore[arg-type]
    assert ImageSet(Path(), ("a",)).coverage(0, (0, 0, 1, 1), (1, 1)) is None
    assert ImageSet(Path(), ("a",), boxes=([],)).coverage(0, (0, 0, 1, 1), (1, 1)) is None  # type: ignore[arg-type]


def test_a_mask_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mask\.png: expected the mask of a\.jpg"):
        ImageSet(tmp_path, ("a.jpg",), masks=("mask.png",)).coverage(0, (0, 0, 1, 1), (1, 1))


def test_annotations_follow_their_images() -> None:
    images = ImageSet(
        Path("root"), ("a", "b", "c"), [0, 1, 0], ("x", "y"), ids=[30, 10, 20],  # type: ignore[arg-type]
        boxes=([(0, 0, 1, 1)], [], [(0, 0, 2, 2), (1, 1, 3, 3)]), masks=("am", "bm", "cm"),  # type: ignore[arg-type]
        parts=np.arange(9).reshape(3, 1, 3), part_names=("beak",),
    )  # fmt: skip
    part = images.subset([2, 0])
    assert part.ids is not None
    assert part.boxes is not None
    assert part.parts is not None
    assert (part.ids.tolist(), part.masks) == ([30, 20], ("am", "cm"))
    assert [len(boxes) for boxes in part.boxes] == [1, 2]
    assert part.parts[1, 0].tolist() == [6, 7, 8]
    whole = bla.data.image_sets.Splits(images.subset([1]), part, seeded=True).whole()
    for field in ("ids", "labels", "parts"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(images, field))
    assert (whole.names, whole.masks) == (images.names, images.masks)
    assert [boxes.tolist() for boxes in whole.boxes or ()] == [boxes.tolist() for boxes in images.boxes or ()]
    for wrong, message in [
        ({"ids": [1]}, "ids of 3 images"),
        ({"boxes": ([],)}, "boxes of 3 images"),
        ({"boxes": ([], [], [(1, 0, 0, 1)])}, "c: expected boxes"),
        ({"masks": ("a",)}, "masks of 3 images"),
        ({"parts": np.zeros((3, 2, 3))}, r"parts of shape \(3, 1, 3\)"),
    ]:
        with pytest.raises(DataError, match=message):
            dataclasses.replace(images, **wrong)


def test_two_folders_become_one_set(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "test/cat/3.jpg")
    whole = image_folder(tmp_path).whole()
    assert whole.names == ("test/cat/3.jpg", "train/cat/1.jpg", "train/dog/2.jpg")
    assert whole.labels is not None
    assert whole.labels.tolist() == [0, 0, 1]
    assert all(whole.path(index).exists() for index in range(3))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(2, 6), st.integers(0, 5))
def test_folds_hold_each_image_out_once_and_deal_classes_evenly(labels: list[int], count: int, seed: int) -> None:
    images = ImageSet(Path(), tuple(f"{i:02}" for i in range(len(labels))), labels, tuple("abcd"))  # type: ignore[arg-type]
    if count > len(images):
        with pytest.raises(DataError, match="an image each"):
            images.folds(count, seed)
        return
    folds = images.folds(count, seed)
    assert sorted(name for fold in folds for name in fold.test.names) == list(images.names)
    assert all(sorted(fold.train.names + fold.test.names) == list(images.names) for fold in folds)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for label in range(4):
        dealt = [int((fold.test.labels == label).sum()) for fold in folds]
        assert max(dealt) - min(dealt) <= 1
    assert [fold.test.names for fold in images.folds(count, seed)] == [fold.test.names for fold in folds]


def test_folds_over_all_cats_and_dogs(shared_data: Path) -> None:
    folds = image_folder(shared_data / "catdog").folds(5)
    assert sorted(len(fold.test) for fold in folds) == [279, 280, 280, 280, 280]
    assert all(fold.seeded and 139 <= int((fold.test.labels == 0).sum()) <= 141 for fold in folds)
