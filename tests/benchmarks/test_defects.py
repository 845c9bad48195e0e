"""Defects with masks, and backgrounds that mislead: the measures by hand, and each command on a tiny network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.faithfulness import backgrounds, defects
from bla.comparison.methods import centre_disc, random_cells
from bla.data.image_sets import ImageSet
from small import CHANNELS, Tiny, photo


class Tuned(Tiny):
    """As timm's, with a head that can be replaced."""

    def reset_classifier(self, count: int) -> None:
        self.fc = nn.Linear(CHANNELS, count)

    def get_classifier(self) -> nn.Linear:
        return self.fc


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (defects, backgrounds):
        monkeypatch.setattr(module, "load_backbone", lambda _: Tuned())
    monkeypatch.setattr(defects, "halves", lambda model: (model.stem, nn.ReLU()))
    monkeypatch.setattr(backgrounds, "fastest", lambda pooled, _: pooled)
    monkeypatch.setattr("bla.fit", lambda classifier, *_, **__: setattr(classifier, "fitted", True))


def test_the_measures_of_a_defect_by_hand() -> None:
    ranking = torch.tensor([[[3.0, 2.0, 1.0]], [[1.0, 3.0, 2.0]]])
    covered = torch.tensor([[[0.0, 0.2, 0.6]], [[0.5, 0.5, 0.0]]])
    found = defects.judged(ranking, covered, {"one": 1, "own": torch.tensor([2, 3])})
    assert found["best"] == [0, 1]
    assert found["hit one"] == [0, 1]
    assert found["on one"] == pytest.approx([0, 0.5])
    assert found["hit own"] == [1, 1]
    assert found["on own"] == pytest.approx([0.1, 1 / 3])
    assert found["found own"] == pytest.approx([0.25, 1])


def test_tiles_with_and_without_a_defect_are_read_and_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("crack", "free"):
        for index in range(6):
            for part in ("images", "masks") if kind == "crack" else ("images",):
                (tmp_path / part / kind).mkdir(parents=True, exist_ok=True)
                suffix = "jpg" if part == "images" else "png"
                photo(index, kind == "free").save(tmp_path / part / kind / f"{index}.{suffix}")
    tiles = defects.read_tiles(tmp_path)
    assert tiles.classes == ("crack", "free")
    assert defects.defective(tiles).tolist() == [True] * 6 + [False] * 6
    assert tiles.coverage(0, (0, 0, 50, 30), (3, 5)) is not None

    # all of them are in the test of backgrounds
    monkeypatch.setattr(defects, "rivals", lambda *_: [random_cells(0), centre_disc()])
    monkeypatch.setattr(defects, "draw", lambda *drawn: pages.append(drawn))
    pages: list[Any] = []
    arguments = ["--out", tmp_path / "out", "--sides", 24, 48, "--masks", 2, 0, "--folds", 2, "--epochs", 1]
    picture = tmp_path / "page.png"
    monkeypatch.setattr("sys.argv", ["defects", *map(str, [tmp_path, *arguments, "--picture", picture])])
    defects.main()
    text = capsys.readouterr().out
    assert "of the 6 defects" in text
    assert "| random cells |" in text
    assert "defects hit, 48 less 24" in text
    assert [page[3].name for page in pages] == ["page.24.png"] * 2 + ["page.48.png"] * 2
    monkeypatch.setattr(defects, "measured", pytest.fail)  # nothing is measured again
    defects.main()
    assert capsys.readouterr().out == text


def test_birds_are_pasted_on_photos_of_the_right_colour(tmp_path: Path) -> None:
    colours = {"blue": (0, 0, 200), "green": (0, 200, 0), "grey": (99, 99, 99), "white": (250, 250, 250)}
    paths = []
    for name, colour in colours.items():
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (20, 10), colour).save(paths[-1])
    assert backgrounds.kinds_of(paths, 1) == [[paths[0]], [paths[1]]]
    bird = Image.new("RGB", (40, 40), (0, 0, 0))
    bird.paste((255, 0, 0), (10, 10, 30, 20))
    found = backgrounds.composed(bird, np.array([10, 10, 30, 20]), Image.new("RGB", (9, 9), (0, 0, 200)), (0.0, 1.0))
    assert found.bird.mean() == pytest.approx(backgrounds.BIRD, abs=0.01)
    assert (found.pixels[found.bird] == (255, 0, 0)).all()
    assert (found.pixels[~found.bird] == (0, 0, 200)).all()
    assert found.bird[-60:, :180].any(), "at the lower left"
    assert not found.bird[0].any()
    classes = ("001.Laysan_Albatross", "002.Groove_billed_Ani")
    assert backgrounds.groups_of(ImageSet(tmp_path, ("a", "b"), np.array([1, 0]), classes)).tolist() == [1, 0]


def test_a_background_is_exposed_by_area_and_by_cause() -> None:
    pixels, twins = torch.zeros(2, 1, 1, 3), torch.tensor([[[[0.0, 0.0, 4.0]]]]).expand(2, 1, 1, 3)

    def network(shown: torch.Tensor) -> torch.Tensor:  # class 1 where the last column is bright
        return torch.stack([torch.ones(2), shown[:, 0, 0, 2]], dim=1)

    birds = torch.tensor([[[1.0, 0.5, 0.0]]]).expand(2, 1, 3)
    selected = torch.tensor([[[True, True, False]], [[False, True, True]]])
    found = backgrounds.exposed(network, (pixels, twins), selected, birds, torch.tensor([1, 1]))
    assert found["off"].tolist() == [0.25, 0.75]
    assert found["area"].tolist() == [0, 1], "half of the photo is no bird"
    assert found["cause"].tolist() == [0, 1]


def test_the_misled_photos_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    for index in range(8):
        shade = np.zeros((8, 8, 3), np.uint8)
        shade[..., 2 if index % 2 else 1] = rng.integers(150, 250)
        Image.fromarray(shade).save(tmp_path / f"{index}.png")
        photo(index, 0).save(tmp_path / f"bird-{index}.png")
    names = tuple(f"bird-{index}.png" for index in range(8))
    birds = ImageSet(
        tmp_path, names, np.arange(8) % 2, ("Auklet", "Ani"), boxes=tuple(np.array([[5, 5, 45, 25]]) for _ in names)
    )
    monkeypatch.setattr(backgrounds, "read_images", lambda _: (SimpleNamespace(train=birds, test=birds), ""))
    monkeypatch.setattr(backgrounds, "list_images", lambda _: [tmp_path / f"{index}.png" for index in range(8)])
    monkeypatch.setattr(
        "sys.argv", ["backgrounds", "birds", "photos", "--out", str(tmp_path), "--backgrounds", "4", "--seeds", "1"]
    )
    backgrounds.main()
    text = capsys.readouterr().out
    assert "1 trainings; right on a twin" in text
    assert text.count("| CAM |") == 3


def test_a_page_shows_the_defect_and_both_selections(tmp_path: Path) -> None:
    photo(0, 0).save(tmp_path / "tile.png")
    mask = Image.new("L", (50, 30))
    mask.paste(255, (25, 15, 35, 20))
    mask.save(tmp_path / "mask.png")
    tiles = ImageSet(tmp_path, ("tile.png",), np.array([0]), ("crack",), masks=("mask.png",))
    rankings = {name: torch.eye(2)[None] for name in ("cam", defects.UNTRAINED)}
    defects.draw(tiles, rankings, 1, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as page:
        assert page.getpixel((100, 118)) == (255, 0, 0), "the defect's corner"
        assert page.getpixel((50, 19)) == page.getpixel((258, 19)) == (255, 220, 0), "the first of 2 x 2 cells"
