"""What an explanation shows of itself: words, pictures, arrays and boxes of the photo's size, files, notebooks."""

from __future__ import annotations

import builtins
import dataclasses
import io
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import bla
from bla.data.photo import DataError
from bla.explanations import picture as pictures
from bla.explanations.cells import Cells
from bla.explanations.explanation import Check, Explanation, ExplanationError, Prediction, Unexplained, Votes
from bla.explanations.lettering import length, wrapped
from bla.explanations.picture import words
from bla.explanations.render import cividis

TABBY, LYNX = Prediction(281, "tabby", 0.923), Prediction(287, "lynx", 0.4)
Answers = dict[str, Any]


def photo_of(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make(**changes: Any) -> Explanation:
    """On 2 x 3 cells in the right two thirds of a photo of 90 x 40."""
    values: Answers = {
        "image": "image 0",
        "prediction": TABBY,
        "top": (TABBY, Prediction(282, "tiger cat", 0.05)),
        "method": "BLA",
        "model": "net",
        "setup": "BLA-T",
        "grid": (2, 3),
        "unbounded": [[4, 0, 1], [3, 2, 4]],
        "scores": np.zeros((2, 3)),
        "soft": None,
        "selected": [[1, 0, 0], [1, 0, 1]],
        "region": (30, 0, 90, 40),
        "photo": photo_of(90, 40),
        "classifier": Prediction(281, "tabby", 0.69),
        "agrees": True,
    } | changes
    return Explanation(**values)


def test_the_words_are_plain_and_the_regions_answer_is_part_of_them() -> None:
    said = words(make())
    assert (said.answer, said.share, said.small) == ("tabby", "69.0%", "net · BLA")
    assert said.regions == "Outlined: 3 of 6 regions. Alone they say the same (92.3%)."
    assert not said.alarming
    assert not said.check
    one = words(make(selected=[[0, 0, 0], [0, 1, 0]]))
    assert one.regions == "Outlined: 1 of 6 regions. Alone it says the same (92.3%)."
    assert words(make(classifier=None, agrees=None)).regions.endswith("The answer is made from them alone.")
    checked = words(make(check=Check(TABBY, TABBY, LYNX, 0.91, 0.12, "coarse"))).check
    assert (
        checked
        == "Shown only these pixels, the classifier still says tabby (92.3%); shown all but these, lynx (40.0%)."
    )
    whole = " ".join(str(part) for part in words(make(check=Check(TABBY, LYNX, TABBY, 0.1, 0.9, "coarse"))))
    assert "the classifier says lynx (40.0%); shown all but these, still tabby (92.3%)" in whole
    assert not [riddle for riddle in ("z =", "bound", "BLA-T", "cells") if riddle in whole]


def test_disagreement_is_said_and_alarms_in_picture_and_notebook() -> None:
    apart = make(prediction=LYNX, agrees=False)
    said = words(apart)
    assert said.alarming
    assert said.regions == "Outlined: 3 of 6 regions. Alone they say something else: lynx (40.0%)!"
    calm, alarming = (np.asarray(each.picture(width=300)) for each in (make(), apart))
    red = (alarming == (190, 0, 30)).all(axis=-1)
    assert red.mean() > 0.05
    assert not (calm == (190, 0, 30)).all(axis=-1).any()
    assert "background:#be001e" in apart._repr_html_()
    assert "⚠" not in make()._repr_html_()
    asked = words(make(prediction=LYNX, agrees=False, target=287))
    assert not asked.alarming
    assert asked.regions == "Outlined: 3 of 6 regions, chosen for lynx. Alone they say lynx (40.0%)."
    same = words(make(target=9)).regions
    assert same == "Outlined: 3 of 6 regions, chosen for class 9. Alone they say tabby (92.3%)."


def test_votes_and_several_labels_are_said() -> None:
    votes = Votes(281, 287, ("tabby", "lynx"), np.zeros((2, 3), np.float32), 0.0, 1.0, "exact")
    assert words(make(votes=votes)).regions.endswith("Blue speaks for tabby, orange for lynx.")
    alone = dataclasses.replace(votes, against=None, labels=("tabby",))
    both = words(make(present=(alone,)))
    assert (both.answer, both.share) == ("tabby (92.3%)", "")
    assert words(make(present=())).answer == "no label above 50%"
    assert words(make(present=(), agrees=False)).regions.endswith("other labels from all regions!")


def test_mask_boxes_and_heatmap_of_the_photos_size_by_hand() -> None:
    why = make()
    expected = np.zeros((40, 90), bool)
    expected[:, 30:50] = expected[20:, 70:90] = True
    assert np.array_equal(why.mask(), expected)
    assert why.boxes() == [(30, 0, 50, 40), (70, 20, 90, 40)]
    assert why.mask(size=(9, 4)).sum() == 4 * 2 + 2 * 2
    by_cell = why.heatmap(smooth=False)
    assert by_cell.shape == (40, 90)
    assert not by_cell[:, :30].any()
    assert by_cell[5, 35] == 1
    assert by_cell[25, 55] == 0.5
    smooth = why.heatmap()
    assert smooth.dtype == np.float32
    assert 0 <= smooth.min() <= smooth.max() <= 1
    assert len(np.unique(smooth[:, 30:])) > 50
    assert not smooth[:, :30].any()
    assert (make(unbounded=np.full((2, 3), 7)).heatmap()[:, 30:] == 1).all()


@settings(max_examples=50)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_boxes_are_the_connected_parts(rows: int, columns: int, seed: int) -> None:
    selected = np.random.default_rng(seed).random((rows, columns)) < 0.5
    selected[0, 0] = True
    cells = Cells(tuple(range(rows + 1)), tuple(range(columns + 1)))
    label = np.where(selected, np.arange(selected.size).reshape(selected.shape), -1)
    for _ in range(selected.size):  # the smallest number spreads to all that are connected
        for (a, b), (down, across) in itertools.product(np.argwhere(selected), ((0, 1), (1, 0), (0, -1), (-1, 0))):
            i, j = a + down, b + across
            if 0 <= i < rows and 0 <= j < columns and selected[i, j]:
                label[a, b] = min(label[a, b], label[i, j])
    slow = []
    for number in set(label[selected].tolist()):
        place = np.argwhere(label == number)
        (top, left), (bottom, right) = place.min(axis=0), place.max(axis=0) + 1
        slow.append((-len(place), (left, top, right, bottom)))
    assert cells.boxes(selected) == [box for _, box in sorted(slow)]


def test_a_heat_overlay_is_warm_where_the_heat_is_and_still_outlines_the_selection() -> None:
    why = make(photo=Image.new("RGB", (90, 40), (128, 128, 128)))
    got = np.asarray(why.overlay(heat="cells")).astype(int)
    hot, cold = (np.rint((1 - share) * 128 + share * cividis(np.array(at))) for at, share in ((1.0, 0.75), (0.0, 0.45)))
    assert got[10, 40].tolist() == hot.tolist()
    assert got[10, 60].tolist() == cold.tolist()
    assert (got[0, 30:50] == 16).all()
    assert not np.array_equal(got, np.asarray(why.overlay(heat="smooth")))


def test_a_picture_has_the_width_asked_for_and_its_overlay_the_photos_shape() -> None:
    for size in ((90, 40), (40, 90), (3, 200), (900, 30), (1, 1), (2500, 1700)):
        why = make(region=(0, 0, *size), photo=photo_of(*size))
        assert why.picture(width=200).width == 200
        drawn = why.picture()
        assert max(pictures.SMALLEST, min(max(size), pictures.LARGEST)) <= max(drawn.size)
    assert np.array_equal(
        np.asarray(make(photo=photo_of(900, 400), region=(300, 0, 900, 400)).picture())[:400],
        np.asarray(make(photo=photo_of(900, 400), region=(300, 0, 900, 400)).overlay()),
    )
    with pytest.raises(ValueError, match="at least 120 pixels"):
        make().picture(width=100)


def test_text_is_wrapped_at_spaces_and_within_words_too_long() -> None:
    lines = wrapped("black-and-gold garden spider", 20, 160, 3)
    assert " ".join(lines) == "black-and-gold garden spider"
    assert max(length(line, 20) for line in lines) <= 160
    assert "".join(wrapped("w" * 40, 20, 160, 9)) == "w" * 40
    assert wrapped("one two three four five six", 20, 60, 2)[-1].endswith("…")


def test_a_photo_is_read_from_its_path_or_asked_for(tmp_path: Path) -> None:
    photo_of(90, 40).save(tmp_path / "cat.png")
    read = make(image=str(tmp_path / "cat.png"), photo=None)
    assert np.array_equal(np.asarray(read.upright()), np.asarray(photo_of(90, 40)))
    again = Explanation.load(make().save(tmp_path / "why.json"))
    assert again == make()
    with pytest.raises(DataError, match=r"no such file.*dataclasses.replace\(explanation, photo=image\)"):
        again.show()
    assert again._repr_png_() is again._repr_html_() is None  # a notebook then shows the text


def test_show_displays_in_a_notebook_and_else_opens_a_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(Image.Image, "show", lambda picture, title: shown.append((picture.size, title)))
    notebook = SimpleNamespace(
        get_ipython=lambda: SimpleNamespace(kernel=1), display=SimpleNamespace(display=shown.append)
    )
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    why = make()
    why.show()
    assert shown == [why]
    monkeypatch.delitem(sys.modules, "IPython")
    why.show()
    assert shown[1] == (why.picture().size, "image 0")


def test_it_saves_pictures_by_their_suffix(tmp_path: Path) -> None:
    for name, kind in (("why.png", "PNG"), ("why.jpg", "JPEG"), ("why.webp", "WEBP")):
        with Image.open(make().save(tmp_path / name)) as saved:
            assert saved.format == kind
    with Image.open(make().save(tmp_path / "paper.png", panel="paper")) as paper:
        assert paper.width > 4 * paper.height
    for name in ("why.svg", "why", "why.psd"):
        with pytest.raises(ExplanationError, match=rf"ends in \.json, \.png, .*, got '{name}'"):
            make().save(tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(ExplanationError, match="expected a panel among plain, paper, got 'nice'"):
        make().save(tmp_path / "why.png", panel="nice")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a heat among smooth, cells, or None, got 'smoth'"):
        make().overlay(heat="smoth")  # type: ignore[arg-type]


def test_a_notebook_shows_a_small_picture_with_a_sentence_in_any_script() -> None:
    why = make(classifier=Prediction(281, "猫 <b>", 0.69))
    assert "<strong>猫 &lt;b&gt;</strong> 69.0%" in why._repr_html_()
    assert len(why._repr_html_()) < 60_000
    with Image.open(io.BytesIO(make()._repr_png_())) as shown:
        assert shown.width == 420
    assert repr(make()) == "<Explanation of image 0: tabby 69.0% (from 3 of 6 cells: tabby 92.3%)>"


def test_it_plots_on_matplotlib_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2)
    assert make().plot(ax=axes[1], heat="smooth") is axes[1]
    assert axes[1].get_title() == "tabby 69.0%"
    assert axes[1].get_images()[0].get_array().shape == (40, 90, 3)
    plt.close("all")
    imports = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imports(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExplanationError, match="pip install matplotlib"):
        make().plot()


def test_a_gallery_is_a_sheet_of_pictures() -> None:
    tall = make(photo=photo_of(90, 400), region=(0, 0, 90, 400))
    sheet = bla.gallery([make(), tall, make()], columns=2, width=200)
    assert sheet.width == 3 * 16 + 2 * 200
    rows = [max(make().picture(width=200).height, tall.picture(width=200).height), make().picture(width=200).height]
    assert sheet.height == 3 * 16 + sum(rows)
    with pytest.raises(ExplanationError, match="expected explanations for a gallery, got none"):
        bla.gallery([])
    assert bla.gallery(make(), width=200).width == 232
    failed = Unexplained("gone.jpg", "gone.jpg: no such file")
    with pytest.raises(ExplanationError, match=r"for a gallery, got Unexplained\(image='gone.jpg'.*leave it out"):
        bla.gallery([make(), failed])  # type: ignore[list-item]
