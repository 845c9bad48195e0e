"""Photos on disk to panels on disk: names that never collide, and the shipped explainer on real photographs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import bla
import bla.runs.run
from bla.data.image_sets import image_folder, list_images
from bla.deploy.pictures import explain_files, output_names
from bla.explanations.explanation import Explanation, ExplanationError, Unexplained
from bla.model.classifier import ClassifierError
from bla.runs.record import SHIPPED

parts = st.lists(
    st.sampled_from(["a", "b", "A", "x.jpg", "x.png", "X.jpg", "explain.json", "a_x.jpg", ".."]), min_size=1
)


@given(st.lists(parts, max_size=8))
@example([["contact-sheet.jpg"], ["a", "contact-sheet-2.png"]])
def test_names_never_collide(paths: list[list[str]]) -> None:
    photos = [Path(*path) for path in paths]
    names = output_names(photos)
    assert set(names) == set(photos)
    folded = [name.casefold() for name in names.values()]
    assert len(set(folded)) == len(folded)
    assert all("/" not in name and name not in ("", ".", "..", "contact-sheet", "contact-sheet-2") for name in folded)


def test_names_are_short_where_they_can_be() -> None:
    assert list(output_names([Path("some/folder/cat.jpg"), Path("/tmp/dog.png")]).values()) == ["cat", "dog"]


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Every test reads the same classifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bla.runs.run, "load", functools.cache(bla.runs.run.load))
        yield


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    paths = []
    for name in ("chelsea", "coffee", "camera"):
        paths.append(folder / f"{name}.jpg")
        Image.fromarray(getattr(skimage.data, name)()).save(paths[-1])
    return paths


def test_the_shipped_explainer_on_photographs(photographs: list[Path], tmp_path: Path) -> None:
    results = list(
        explain_files([*photographs, tmp_path / "none.jpg"], run="tf_efficientnet_lite0", out=tmp_path / "why")
    )
    explained = [result for result in results if isinstance(result, Explanation)]
    assert [result.classifier.label for result in explained if result.classifier] == ["tiger cat", "espresso", "tripod"]
    assert all(result.agrees for result in explained)
    assert isinstance(results[3], Unexplained)
    assert all(1 <= result.size <= 30 for result in explained)
    for result, path in zip(explained, photographs, strict=True):
        with Image.open(path) as photo:
            width, height = photo.size
        side = 0.875 * min(width, height)
        middle = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        assert result.region == pytest.approx(middle, abs=2)
        assert Explanation.load(tmp_path / "why" / f"{path.stem}.json") == result
        with Image.open(tmp_path / "why" / f"{path.stem}.png") as picture:
            assert picture.width == width
            assert np.abs(np.asarray(picture)[:height] - np.asarray(result.overlay()).astype(float)).max() == 0
    with Image.open(tmp_path / "why" / "contact-sheet.png") as sheet:
        assert sheet.width == 3 * 320 + 4 * 16


def test_files_of_the_users_are_never_written_over(photographs: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    with Image.open(photographs[0]) as photo:
        photo.save(place / "cat.png")
    (tmp_path / "why").mkdir()
    (tmp_path / "why" / "chelsea.json").write_text('{"mine": 1}')
    before = (place / "cat.png").read_bytes()
    for photo_path, out in ((place / "cat.png", place), (photographs[0], tmp_path / "why")):
        with pytest.raises(ExplanationError, match="a file there that is yours"):
            list(explain_files([photo_path], run="tf_efficientnet_lite0", out=out))
    assert (place / "cat.png").read_bytes() == before
    assert [path.name for path in (tmp_path / "why").iterdir()] == ["chelsea.json"]
    (tmp_path / "why" / "chelsea.json").unlink()
    (tmp_path / "why" / "contact-sheet.png").write_text("mine")
    with pytest.raises(ExplanationError, match=r"expected to write .*sheet.png, got a file there that is yours"):
        list(explain_files(photographs, run="tf_efficientnet_lite0", out=tmp_path / "why"))
    (tmp_path / "file").touch()
    with pytest.raises(ExplanationError, match="expected a folder for the pictures, got the file"):
        list(explain_files(photographs, run="tf_efficientnet_lite0", out=tmp_path / "file"))


def test_what_is_kept_was_made_alike(photographs: list[Path], tmp_path: Path) -> None:
    def sizes(photos: list[Path], size: int | None) -> list[int]:
        results = explain_files(photos, run="tf_efficientnet_lite0", size=size, out=tmp_path)
        return [result.size for result in results if isinstance(result, Explanation)]

    own = sizes(photographs, None)
    assert sizes(photographs[:1], 8) == [8]
    assert sizes(photographs, 8) == [8, 8, 8]
    with pytest.raises(ClassifierError, match="expected a size from 1 to 49"):
        sizes(photographs, 99)
    assert [Explanation.load(tmp_path / f"{path.stem}.json").size for path in photographs] == [8, 8, 8]
    (tmp_path / "coffee.json").write_text("no longer JSON")
    with pytest.raises(ExplanationError, match="yours"):
        sizes(photographs, 8)
    (tmp_path / "coffee.json").unlink()
    assert sizes(photographs, None) == own


def test_photos_of_one_name_in_two_calls_have_two_explanations(photographs: list[Path], tmp_path: Path) -> None:
    photos = []
    for folder, source in zip(("a", "b"), photographs, strict=False):
        photos.append(tmp_path / folder / "photo.jpg")
        photos[-1].parent.mkdir()
        photos[-1].write_bytes(source.read_bytes())
        list(explain_files(photos[-1:], run="tf_efficientnet_lite0", out=tmp_path / "why"))
    explained = {Explanation.load(path).image for path in (tmp_path / "why").glob("*.json")}
    assert explained == {str(photo) for photo in photos}


def test_the_size_dial_nests(photographs: list[Path]) -> None:
    classifier = bla.runs.run.load("tf_efficientnet_lite0", device="auto")
    smaller = np.zeros((7, 7), bool)
    for size in (1, 4, 12, 49):
        explanation = classifier.explain(photographs[0], size=size)[0]
        assert explanation.size == size
        assert explanation.selected[smaller].all()
        assert (explanation.scores[explanation.selected] == 0).all()
        smaller = explanation.selected


@pytest.mark.parametrize(
    ("name", "cells"), [("tf_efficientnet_lite0", 49), ("tf_efficientnet_lite1", 64), ("tf_efficientnet_lite2", 81)]
)
def test_the_shipped_explainers_on_photos_that_they_never_saw(name: str, cells: int, shared_data: Path) -> None:
    held_out = image_folder(shared_data / "imagenet500").test
    photos = [held_out.path(index) for index in range(0, 100, 8)]
    if cells == 49:
        photos = list_images([shared_data / "imagenet_val"])[:40]
    classifier = bla.load(name)
    with torch.inference_mode():
        pixels = torch.cat([classifier.pixels(classifier.transform.read(photo).pixels[None]) for photo in photos])
        features = classifier.trunk(pixels.contiguous(memory_format=torch.channels_last))

        def said(weights: torch.Tensor) -> torch.Tensor:
            return classifier.classify(features, weights).argmax(-1)

        selected = classifier.attention(features).hard
        plain = said(torch.full_like(selected, 1 / cells))
        assert torch.equal(said(selected), plain)
        if cells == 49:
            classifier.attention.agreeing = False
            assert (said(classifier.attention(features).hard) == plain).float().mean() >= 0.95
        else:
            right = [int(photo.name[:4]) for photo in photos] == plain.numpy()
            assert right.mean() >= 0.7  # the weights are the classifier's
    assert selected[0].numel() == cells
    assert (selected > 0).sum() / len(photos) <= cells / 3
    assert sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) < 250_000
