"""Images in whatever users hold them, and classes to ask about, one for all or one for each."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bla
from bla.data.photo import DataError
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.model.images import as_photos
from bla.progress import silent
from small import Tiny, some_photos

PHOTOS = some_photos(6)
ARRAYS = [np.array(photo) for photo in PHOTOS]
LABELS = [0, 1, 2, 0, 1, 2]


class Pairs(Dataset[tuple[Any, int]]):
    """Photos and labels by number, without an iterator."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.images[row], LABELS[row]


def encoded(photo: Image.Image) -> bytes:
    photo.save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def wrapped() -> ExplainableClassifier:
    return explainable(Tiny())


@pytest.fixture(scope="module")
def pixels(wrapped: ExplainableClassifier) -> torch.Tensor:
    return wrapped.pixels(np.stack([wrapped.transform.read(photo).pixels for photo in PHOTOS]))


OF_PHOTOS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: [encoded(photo) for photo in PHOTOS],
    "open files": lambda: [io.BytesIO(encoded(photo)) for photo in PHOTOS],
    "an array": lambda: np.stack(ARRAYS),
    "a tensor of photos": lambda: torch.from_numpy(np.stack(ARRAYS)).permute(0, 3, 1, 2),
    "photos and labels": lambda: (PHOTOS, LABELS),
    "an array and labels": lambda: (np.stack(ARRAYS), np.array(LABELS)),
    "pairs": lambda: list(zip(PHOTOS, LABELS, strict=True)),
    "a data set": lambda: Pairs(PHOTOS),
    "a loader of photos": lambda: DataLoader(Pairs(ARRAYS), batch_size=4),
    "a loader of lists": lambda: DataLoader(Pairs(PHOTOS), 4, collate_fn=lambda rows: tuple(zip(*rows, strict=True))),
    "rows": lambda: [{"label": label, "image": photo} for photo, label in zip(PHOTOS, LABELS, strict=True)],
    "rows of another name": lambda: [{"label": 1, "text": "", "picture": photo} for photo in PHOTOS],
    "rows of bytes": lambda: [{"image": {"bytes": encoded(photo), "path": None}} for photo in PHOTOS],
    "batches by columns": lambda: [{"image": PHOTOS[rows], "label": LABELS[rows]} for rows in (slice(4), slice(4, 6))],
    "a generator": lambda: (photo for photo in PHOTOS),
    "names of classes": lambda: [(photo, "cat") for photo in PHOTOS],
    "lists of photos and names": lambda: (PHOTOS, ["cat"] * 6),
    "bytes that change": lambda: [memoryview(bytearray(encoded(photo))) for photo in PHOTOS],
    "an array of files' bytes": lambda: np.array([encoded(photo) for photo in PHOTOS], object),
    "a table": lambda: importlib.import_module("pandas").DataFrame({"image": PHOTOS, "label": LABELS}),
    "no label": lambda: [(photo, None) for photo in PHOTOS],
    "boxes": lambda: [(photo, {"boxes": torch.zeros(2, 4)}) for photo in PHOTOS],
    "masks": lambda: [(array, np.zeros(array.shape[:2])) for array in ARRAYS],
    "a share of each class": lambda: (ARRAYS, np.full((6, 4), 0.25)),
    "numbers in front": lambda: list(zip(range(6), PHOTOS, LABELS, strict=True)),
    "columns": lambda: {"label": LABELS, "picture": PHOTOS},
    "undecoded": lambda: [{"label": 1, "picture": {"bytes": encoded(photo), "path": None}} for photo in PHOTOS],
}  # fmt: skip


@pytest.mark.parametrize("make", OF_PHOTOS.values(), ids=OF_PHOTOS)
def test_photos_are_explained_wherever_they_come_from(make: Callable[[], Any], wrapped: ExplainableClassifier) -> None:
    for found, expected in zip(wrapped.explain(make()), wrapped.explain(PHOTOS), strict=True):
        np.testing.assert_allclose(found.unbounded, expected.unbounded, rtol=1e-5, atol=1e-5)


OF_PIXELS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a tensor": lambda pixels: pixels,
    "a list": list,
    "pixels and labels": lambda pixels: (pixels, torch.tensor(LABELS)),
    "a tensor data set": lambda pixels: TensorDataset(pixels, torch.tensor(LABELS)),
    "one without labels": TensorDataset,
    "shares of classes": lambda pixels: DataLoader(TensorDataset(pixels, torch.full((6, 4), 0.25)), batch_size=4),
    "numbers in front": lambda pixels: DataLoader(TensorDataset(torch.arange(6), pixels, torch.zeros(6)), batch_size=4),
    "names of classes": lambda pixels: [(pixels[:4], ("cat", "dog", "cat", "dog")), (pixels[4:], ("cat", "dog"))],
    "a loader": lambda pixels: DataLoader(TensorDataset(pixels, torch.tensor(LABELS)), batch_size=4),
    "a loader of rows": lambda pixels: DataLoader([{"pixel_values": row, "labels": 1} for row in pixels], batch_size=4),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("make", OF_PIXELS.values(), ids=OF_PIXELS)
def test_normalised_pixels_too(
    make: Callable[[torch.Tensor], Any], wrapped: ExplainableClassifier, pixels: torch.Tensor
) -> None:
    for found, expected in zip(wrapped.explain(make(pixels)), wrapped.explain(PHOTOS), strict=True):
        np.testing.assert_allclose(found.unbounded, expected.unbounded, rtol=1e-5, atol=1e-5)
    photos = as_photos(wrapped.transform, make(pixels))
    again = wrapped.pixels(np.stack([wrapped.transform.read(photo).pixels for photo in photos]))
    torch.testing.assert_close(again, pixels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "a column", "tensors", "arrays", "a stream", "undecoded", "another name"])
def test_a_data_set_of_hugging_faces(kind: str, wrapped: ExplainableClassifier) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"label": LABELS, "view": PHOTOS}).cast_column("view", datasets.Image())
    ways = {
        "rows": lambda: made, "a column": lambda: made["view"], "tensors": lambda: made.with_format("torch"),
        "arrays": lambda: made.with_format("numpy"), "a stream": made.to_iterable_dataset,
        "undecoded": lambda: made.cast_column("view", datasets.Image(decode=False)),
        "another name": lambda: made.rename_column("view", "img").add_column("text", ["a cat"] * 6),
    }  # fmt: skip
    for found, expected in zip(wrapped.explain(ways[kind]()), wrapped.explain(PHOTOS), strict=True):
        np.testing.assert_allclose(found.unbounded, expected.unbounded, rtol=1e-5, atol=1e-5)
    if kind == "rows":
        with pytest.raises(DataError, match=r"expected one split of a data set, got a, b: choose one, as data\['a'\]"):
            wrapped.explain(datasets.DatasetDict(a=made, b=made))
        with pytest.raises(DataError, match="expected one column of images, got 'left', 'right': pass that alone"):
            wrapped.explain([{"left": PHOTOS[0], "right": PHOTOS[1]}])


def test_what_is_no_image_is_refused(wrapped: ExplainableClassifier) -> None:
    with pytest.raises(DataError, match=r"image 0: expected normalised pixels \(3, 24, 40\), got \(3, 9, 9\)"):
        as_photos(wrapped.transform, [torch.zeros(3, 9, 9)])
    with pytest.raises(DataError, match="expected a column of images, such as 'image', got 'label', 'text'"):
        as_photos(wrapped.transform, [{"label": 1, "text": "a cat"}])


@pytest.mark.parametrize(
    "make",
    [OF_PHOTOS["bytes"], OF_PHOTOS["a data set"], OF_PHOTOS["rows"], OF_PHOTOS["a loader of photos"]],
    ids=["bytes", "data set", "rows", "loader"],
)
def test_they_are_learnt_from(make: Callable[[], Any], tmp_path: Path) -> None:
    wrapped = explainable(Tiny())
    assert bla.fit(wrapped, make(), epochs=1, masks=8, cache=tmp_path, report=silent)["images"] == 1
    assert wrapped.fitted


@pytest.mark.parametrize("two", [2, "class 2", np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)])
def test_a_class_is_asked_about_by_any_number(two: Any, wrapped: ExplainableClassifier) -> None:
    expected = wrapped.explain(PHOTOS[:2], target=2)
    assert wrapped.explain(PHOTOS[:2], target=two) == expected
    assert wrapped.explain(PHOTOS[:2], target=[two, two]) == expected


@pytest.mark.parametrize(
    "targets",
    [[2, None, 0, "class 1", None, 2], (2, None, 0, 1, None, 2), [torch.tensor(2), None, np.int32(0), 1, None, 2]],
    ids=["list", "tuple", "numbers"],
)
def test_each_image_has_its_own_class(targets: Any, wrapped: ExplainableClassifier) -> None:
    asked = [2, None, 0, 1, None, 2]
    for batch in (1, 4):
        found = wrapped.explain(PHOTOS, target=targets, batch_size=batch)
        for photo, target, why in zip(PHOTOS, asked, found, strict=True):
            (alone,) = wrapped.explain(photo, target=target)
            assert (why.target, why.votes is None) == (alone.target, target is None)
            assert why.votes is None or why.votes.target == target
            np.testing.assert_allclose(why.unbounded, alone.unbounded, rtol=1e-4, atol=1e-5)
    whole = wrapped.explain(PHOTOS, target=np.array([2, 1, 0, 1, 1, 2]), against=[0, None, 1, None, None, 0])
    assert [why.votes.against for why in whole if why.votes] == [0, None, 1, None, None, 0]


@pytest.mark.parametrize("wrong", [3, -1, True, np.bool_(True), 1.0, "class 9", torch.tensor(True), [0, 9]])
def test_what_is_no_class_is_refused(wrong: Any, wrapped: ExplainableClassifier) -> None:
    with pytest.raises(ClassifierError, match="expected a class of tiny by name, or by index from 0 to 2, got"):
        wrapped.explain(PHOTOS[:2], target=wrong)
    with pytest.raises(ClassifierError, match="expected a target for each image, or one for all, got fewer"):
        wrapped.explain(PHOTOS[:2], target=[1])
    with pytest.raises(ClassifierError, match="expected a target, to be held against another class, got none"):
        wrapped.explain(PHOTOS[:2], target=[1, None], against=0)


@pytest.mark.parametrize(
    ("channels", "dtype", "value_range"),
    [(1, np.uint16, (0, 4095)), (2, np.uint8, None), (4, np.float32, (0, 1)), (11, np.int16, (-100, 9000))],
)
def test_any_number_of_channels(
    channels: int, dtype: type[Any], value_range: tuple[float, float] | None, tmp_path: Path
) -> None:
    low, high = value_range or (0, 255)
    mean, std = (tuple(np.linspace(*ends, channels)) for ends in ((0.3, 0.6), (0.2, 0.4)))
    net = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 8, 4, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    ).eval()  # fmt: skip
    found = explainable(net, transform=bla.Transform((16, 24), mean, std, value_range=value_range))
    arrays = (low + (high - low) * np.random.default_rng(0).random((6, 16, 24, channels))).astype(dtype)
    pixels = torch.from_numpy((((arrays.astype(np.float64) - low) / (high - low)) - mean) / std).float().movedim(-1, 1)
    with torch.no_grad():
        expected = net(pixels).softmax(-1)
    integers = torch.from_numpy(arrays) if arrays.dtype.kind in "iu" else arrays  # float tensors are normalised
    for images in (arrays, np.moveaxis(arrays, -1, 1), integers, list(arrays), pixels):
        why = found.explain(images, size=5, check=True)
        said = [each.classifier.probability for each in why if each.classifier]
        np.testing.assert_allclose(said, expected.amax(1), atol=1e-5)
        assert why[0].upright().size == (24, 16)
        assert ("channel" in str(why[0].shown)) == (channels > 1)
    assert bla.fit(found, arrays, epochs=1, masks=8, cache=tmp_path, report=silent)["images"] == 1
    with pytest.raises(ClassifierError, match=f"trained with, whose mean and std have {channels} numbers"):
        explainable(net, transform=bla.Transform((16, 24), (0.5,) * 3, (0.5,) * 3))


HALF = (0.5, 0.5, 0.5)
LEVELS = torch.from_numpy(np.stack(ARRAYS)).movedim(-1, 1).float()
UNNORMALISED: dict[str, tuple[torch.Tensor, str]] = {
    "levels": (LEVELS, "expected normalised pixels"),
    "16 bits": (257 * LEVELS, "expected normalised pixels"),
    "shares": (LEVELS / 255, "doubtful"),
    "half precision": (LEVELS.half() / 255, "doubtful"),
    "from -1 to 1": (LEVELS / 127.5 - 1, ""),
    "flat": (torch.full_like(LEVELS, 0.5), "undecided"),
}


@pytest.mark.parametrize("name", UNNORMALISED)
def test_tensors_that_are_not_normalised_are_refused_or_marked(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, said = UNNORMALISED[name]
    transform = bla.Transform(ARRAYS[0].shape[:2], HALF, HALF)
    found = explainable(Tiny(), transform=transform)
    if said.startswith("expected"):
        for call in (found.explain, lambda images: as_photos(transform, images)):
            with pytest.raises(DataError, match=f"image 0: {said}, got .* -1 to 1: .* uint8"):
                call(tensors)  # type: ignore[operator]
        return
    assert all(str(why.note).startswith(said) if said else why.note is None for why in found.explain(tensors))
    assert len(as_photos(transform, tensors)) == len(tensors)
    assert ("6 of 6 images: image 0: doubtful" in capsys.readouterr().err) == (said == "doubtful")
    bytes_inside = bla.Transform(transform.size, (0, 0, 0), (1 / 255,) * 3)
    assert explainable(Tiny(), transform=bytes_inside).explain(LEVELS)[0].note is None


@pytest.mark.parametrize("images", [None, 3, object(), torch.nn.Linear(2, 2)])
def test_what_holds_no_images_is_refused(images: Any, wrapped: ExplainableClassifier) -> None:
    with pytest.raises(DataError, match=r"^expected images: .* got "):
        wrapped.explain(images)


def test_masked_pixels_are_refused(wrapped: ExplainableClassifier) -> None:
    with pytest.raises(DataError, match=r"without masked pixels, .* array.filled"):
        wrapped.explain(np.ma.masked_array(ARRAYS[0], ARRAYS[0] > 9))


def test_cells_that_say_the_same_are_not_passed_off_as_a_choice(wrapped: ExplainableClassifier) -> None:
    flat, photo = wrapped.explain([Image.new("RGB", (60, 40)), PHOTOS[0]], size=2)
    assert str(flat).endswith("undecided: all cells say the same, so that it means nothing which are selected")
    assert photo.note is None
