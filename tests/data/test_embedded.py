"""The embedded data set: pure in seed and index, exact masks, scenery blind to the class, all-or-nothing writing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from bla.data import embedded
from bla.data.embedded import CLASSES, Patch, Scene, make, scene, write
from bla.data.photo import DataError

SMALL = (128, 96)


def digest(index: int, seed: int = 0, size: tuple[int, int] = SMALL) -> str:
    image, mask, label = make(index, seed=seed, size=size)
    return hashlib.sha256(image.tobytes() + mask.tobytes() + bytes([label])).hexdigest()


def flat(size: tuple[int, int], colour: tuple[int, int, int], alpha: int) -> Image.Image:
    return Image.new("RGBA", size, (*colour, alpha))


def unlit(composed: Scene, subject: Patch) -> npt.NDArray[np.int16]:
    height, width = composed.ground.height, composed.ground.width
    light, noise = np.ones((height, width, 1), np.float32), np.zeros((height, width, 1), np.float32)
    bare = dataclasses.replace(composed, subject=subject, light=light, noise=noise)
    return np.asarray(bare.image()).astype(np.int16)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """The first 240 of the set, 64 x 64."""
    return [scene(index, size=(64, 64)) for index in range(240)]


def test_is_a_pure_function_of_seed_and_index() -> None:
    digests = {(seed, index): digest(index, seed, (64, 64)) for seed in range(3) for index in range(8)}
    assert len(set(digests.values())) == 24
    assert all(digests[0, index] == digest(index, 0, (64, 64)) for index in reversed(range(8)))


def test_kinds_and_sizes() -> None:
    image, mask, label = make(11)
    assert (image.mode, mask.mode, CLASSES[label]) == ("RGB", "L", CLASSES[3])
    assert image.size == mask.size == (320, 256)
    assert set(np.unique(np.asarray(mask))) == {0, 255}
    tall, mask, _ = make(11, size=(100, 250))
    assert tall.size == mask.size == (100, 250)


def test_mask_by_hand() -> None:
    size = (64, 48)
    level = np.zeros((48, 64, 1), np.float32)
    subject = Patch(flat((20, 20), (9, 9, 9), 255), 10, 10)
    hides = Patch(flat((10, 10), (0, 0, 0), 255), 20, 20)
    half_hides = Patch(flat((5, 5), (0, 0, 0), 128), 10, 10)
    barely_hides = Patch(flat((5, 5), (0, 0, 0), 126), 25, 10)
    underneath = Patch(flat((64, 48), (0, 0, 0), 255), 0, 0)
    above = (hides, half_hides, barely_hides)
    composed = Scene(Image.new("RGB", size), (underneath,), subject, above, level + 1, level)
    expected = np.zeros((48, 64), bool)
    expected[10:30, 10:30] = True
    expected[20:30, 20:30] = False
    expected[10:15, 10:15] = False
    assert np.array_equal(np.asarray(composed.mask()) == 255, expected)
    ghost = Patch(flat((20, 20), (9, 9, 9), 127), 10, 10)
    assert not np.asarray(dataclasses.replace(composed, subject=ghost).mask()).any()


@pytest.mark.parametrize("index", range(24))
def test_mask_is_where_the_object_shows(index: int) -> None:
    # A white and a black object differ, in the picture itself, by their visible opacity.
    composed = scene(index, seed=3, size=SMALL)
    alpha = composed.subject.image.getchannel("A")
    pictures = []
    for level in (0, 255):
        painted = flat(alpha.size, (level, level, level), 0)
        painted.putalpha(alpha)
        pictures.append(unlit(composed, dataclasses.replace(composed.subject, image=painted)))
    opacity = (pictures[1] - pictures[0])[..., 0]
    inside = np.asarray(make(index, seed=3, size=SMALL)[1]) == 255
    assert opacity[inside].min() >= 126  # 127.5, less the rounding of each layer
    assert opacity[~inside].max() <= 129


def test_the_object_shows_in_every_image(scenes: list[Scene]) -> None:
    for index, composed in enumerate(scenes):
        seen = np.asarray(composed.mask()) == 255
        whole = np.asarray(composed.subject.alpha((64, 64))) > 127
        assert seen.mean() >= 0.01, index
        assert seen.sum() >= 0.6 * whole.sum(), index


def test_an_object_that_would_be_hidden_comes_to_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    lid = Patch(flat(SMALL, (0, 0, 0), 255), 0, 0)
    monkeypatch.setattr(embedded, "distractor", lambda rng, size: lid)
    for index in range(8):
        composed = scene(index, seed=0, size=SMALL)
        assert composed.above == ()
        assert composed.below[-1] is lid


def test_scenery_is_drawn_without_a_look_at_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    for index in (0, 5, 9):
        composed = scene(index, seed=0, size=SMALL)
        monkeypatch.setattr(embedded, "CLASSES", CLASSES[::-1])
        other = scene(index, seed=0, size=SMALL)
        monkeypatch.undo()
        assert composed.subject.image.tobytes() != other.subject.image.tobytes()
        assert composed.ground.tobytes() == other.ground.tobytes()
        assert np.array_equal(composed.light, other.light)
        assert np.array_equal(composed.noise, other.noise)
        patches, others = [
            {(patch.image.tobytes(), patch.left, patch.top) for patch in (*each.below, *each.above)}
            for each in (composed, other)
        ]
        assert patches == others


def test_colours_outside_the_mask_do_not_give_the_class_away(scenes: list[Scene]) -> None:
    x = np.array([np.asarray(each.image())[np.asarray(each.mask()) == 0].mean(axis=0) for each in scenes])
    y = np.arange(len(scenes)) % len(CLASSES)
    centroids = np.stack([x[:120][y[:120] == label].mean(axis=0) for label in range(len(CLASSES))])
    guess = np.linalg.norm(x[120:, None] - centroids, axis=-1).argmin(axis=1)
    assert (guess == y[120:]).mean() < 0.22  # chance is 0.125, and 0.22 lies 3.1 standard deviations off


def test_photographs_are_opened_and_cut_once() -> None:
    """What the speed of composing rests on: work is counted, since seconds depend on the machine."""

    def pieces_cut() -> list[int]:
        for index in range(20):
            make(index, size=SMALL)
        kept = (embedded._photo, embedded._region, embedded._cutouts, embedded._cut)
        return [pieces.cache_info().misses for pieces in kept]

    assert pieces_cut() == pieces_cut()


def test_needs_neither_torch_nor_a_download() -> None:
    program = (
        "import sys; sys.modules.update(torch=None, pooch=None)\n"
        "import hashlib\n"
        "from bla.data.embedded import make\n"
        "for index in range(8):\n"
        "    image, mask, label = make(index, size=(128, 96))\n"
        "print(hashlib.sha256(image.tobytes() + mask.tobytes() + bytes([label])).hexdigest())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest(7)


def test_written_and_read_back(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    place = tmp_path / "deep" / "set"
    folder = write(place, train=19, test=8, seed=4, size=SMALL, report=lambda *call: calls.append(call))
    assert calls == [("making the embedded data set", done, 27) for done in range(1, 28)]
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "masks", "test", "train"]
    assert list(folder.parent.iterdir()) == [folder]
    for split, count, first in (("train", 19, 0), ("test", 8, 1_000_000)):
        photos = sorted((folder / split).glob("*/*.jpg"), key=lambda path: path.name)
        assert [path.stem for path in photos] == [f"{position:04d}" for position in range(count)]
        counts = [len(list((folder / split / name).iterdir())) for name in CLASSES]
        assert max(counts) - min(counts) <= 1
        for position, photo in enumerate(photos):
            image, mask, label = make(first + position, seed=4, size=SMALL)
            assert photo.parent.name == CLASSES[label]
            with Image.open(photo) as stored:
                assert np.abs(np.asarray(stored, np.float64) - np.asarray(image)).mean() < 8
            with Image.open(folder / "masks" / split / CLASSES[label] / f"{photo.stem}.png") as stored:
                assert stored.mode == "L"
                assert stored.tobytes() == mask.tobytes()
    record = json.loads((folder / "dataset.json").read_text())
    assert set(record.pop("versions")) == {"numpy", "pillow", "scikit-image"}
    assert record == {
        "schema_version": 1, "dataset": "embedded", "classes": list(CLASSES),
        "train": 19, "test": 8, "seed": 4, "size": list(SMALL),
    }  # fmt: skip


def test_test_images_do_not_depend_on_the_number_of_train_images(tmp_path: Path) -> None:
    sets = [write(tmp_path / str(train), train=train, test=8, size=(64, 64)) for train in (8, 16)]
    few, many = ({path.relative_to(each): path.read_bytes() for path in each.glob("test/*/*")} for each in sets)
    assert few == many
    assert len(few) == 8


def test_the_same_set_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, train=8, test=8, size=(64, 64))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write(folder, train=8, test=8, size=(64, 64), report=lambda *_: pytest.fail("wrote again")) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def stop(title: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", train=16, test=8, size=(64, 64), report=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("same", [True, False])
def test_a_race_is_settled_by_the_first_to_finish(tmp_path: Path, same: bool) -> None:
    folder = tmp_path / "set"

    def overtake(title: str, done: int, total: int) -> None:
        if done == total:
            write(folder, train=8, test=8, seed=0 if same else 1, size=(64, 64))

    if same:
        assert write(folder, train=8, test=8, size=(64, 64), report=overtake) == folder
    else:
        with pytest.raises(DataError, match="another set"):
            write(folder, train=8, test=8, size=(64, 64), report=overtake)
    assert list(tmp_path.iterdir()) == [folder]


def test_foreign_folders_are_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.write_text("a file")
    with pytest.raises(DataError, match="something else"):
        write(folder, train=8, test=8, size=(64, 64))
    folder.unlink()
    folder.mkdir()
    for content in ("photos", "[]", "3", '{"train": 8}', '{"versions": {}}'):
        (folder / "dataset.json").write_text(content)
        with pytest.raises(DataError, match=r"holds (something else|another set)"):
            write(folder, train=8, test=8, size=(64, 64))
        assert (folder / "dataset.json").read_text() == content
    (folder / "dataset.json").unlink()
    write(folder, train=8, test=8, size=(64, 64))
    with pytest.raises(DataError, match=r'another set: .*"seed": 0'):
        write(folder, train=8, test=8, size=(64, 64), seed=1)
    (folder / "masks" / "test" / "cat" / "0001.png").unlink()
    with pytest.raises(DataError, match=r"without masks.test.cat.0001\.png"):
        write(folder, train=8, test=8, size=(64, 64))


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got index -1, seed 0"):
        make(-1)
    with pytest.raises(DataError, match="seed -2"):
        make(0, seed=-2)
    with pytest.raises(DataError, match=r"at least 64 pixels, got \(320, 63\)"):
        make(0, size=(320, 63))
    with pytest.raises(DataError, match="got 7 and 8"):
        write(tmp_path / "set", train=7, test=8)
    with pytest.raises(DataError, match="1000000 images in train and in test, got 8 and 1000001"):
        write(tmp_path / "set", train=8, test=1_000_001)
    assert list(tmp_path.iterdir()) == []
