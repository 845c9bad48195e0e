"""Pictures: geometry computed by hand, what is kept, dimmed, blanked and unseen, and text that stays in its place."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from bla.explanations import lettering
from bla.explanations.cells import Cells
from bla.explanations.explanation import Check, Explanation, Prediction, Votes
from bla.explanations.lettering import font, legible, length, percent, shorten
from bla.explanations.panel import layout, panel
from bla.explanations.render import cividis, cutout, overlay

TABBY = Prediction(281, "tabby", 0.923)
Pixels = npt.NDArray[np.uint8]


def make(
    grid: tuple[int, int] = (7, 7), region: tuple[float, ...] = (0, 0, 600, 400), **changes: object
) -> Explanation:
    selected = np.zeros(grid, bool)
    selected.flat[: min(8, selected.size)] = True
    values = {
        "image": "cat.jpg",
        "prediction": TABBY,
        "top": (TABBY, Prediction(282, "tiger cat", 0.05)),
        "method": "BLA",
        "setup": "BLA-T",
        "model": "tf_efficientnet_lite0",
        "grid": grid,
        "region": region,
        "unbounded": np.zeros(grid),
        "scores": np.where(selected, 0, -1),
        "soft": None,
        "selected": selected,
    } | changes
    return Explanation(**values)  # type: ignore[arg-type]


@pytest.fixture
def own_font_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a system without fonts."""
    monkeypatch.setattr(lettering, "_files", tuple)
    lettering._face.cache_clear()
    yield
    lettering._face.cache_clear()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def flat(width: int, height: int, grey: int = 100) -> Image.Image:
    return Image.new("RGB", (width, height), (grey,) * 3)


def pictures(photo: Image.Image, explanation: Explanation, height: int = 320) -> list[Pixels]:
    """The four pictures, cut out of the panel."""
    sheet, places = panel(photo, explanation, height=height), layout(photo.size, explanation, height)
    width, depth = places.picture
    return [np.asarray(sheet.crop((x, y, x + width, y + depth))) for x, y in places.corners]


def words(explanation: Explanation, photo: tuple[int, int] = (600, 400)) -> list[str]:
    return [text.words for text in layout(photo, explanation, 320).texts]


def test_overlay_of_six_by_four_pixels_by_hand() -> None:
    pixels = np.full((4, 6, 3), 200, np.uint8)
    pixels[0, 0] = (255, 0, 0)  # luma 76 (ITU-R 601: 0.299 * 255), 0.375 * 76 + 0.125 * 255 + 8 = 68
    pixels[0:2, 2:4] = (1, 2, 3)
    pixels[2:4, 4:6] = (250, 251, 252)
    explanation = make((2, 3), (0, 0, 6, 4), selected=[[0, 1, 0], [0, 0, 1]], scores=np.zeros((2, 3)))
    dark = 108  # 0.5 * 200 + 8
    expected = np.array(
        [
            [68, dark, 1, 1, dark, dark],
            [dark, dark, 1, 1, dark, dark],
            [dark, dark, dark, dark, 250, 250],
            [dark, dark, dark, dark, 250, 250],
        ]
    )
    got = np.asarray(overlay(Image.fromarray(pixels), explanation))
    assert np.array_equal(got[..., 0], expected)
    assert np.array_equal(got[0:2, 2:4], pixels[0:2, 2:4])
    assert np.array_equal(got[2:4, 4:6], pixels[2:4, 4:6])


def test_cutout_of_six_by_four_pixels_by_hand() -> None:
    explanation = make((2, 3), (0, 0, 6, 4), selected=[[0, 1, 0], [0, 0, 1]], scores=np.zeros((2, 3)))
    got = np.asarray(cutout(flat(6, 4, 7), explanation))
    assert np.array_equal(
        got[..., 1],
        [[216, 216, 7, 7, 216, 216]] * 2 + [[216, 216, 216, 216, 7, 7]] * 2,
    )


def test_votes_are_blue_for_and_orange_against() -> None:
    votes = Votes(1, 2, ("cat", "dog"), np.array([[2, -1, 0]], np.float32), 0.0, 1.0, "exact")
    explanation = make((1, 3), (0, 0, 60, 40), selected=[[1, 1, 0]], votes=votes)
    *_, last = pictures(flat(60, 40), explanation)
    middle, width = last.shape[0] // 2, last.shape[1]
    assert last[middle, width // 6].tolist() == [0, 90, 181]
    assert last[middle, width // 2].tolist() == [238, 178, 132]  # half as strong: half of white
    assert "for cat, not dog" in words(explanation, (60, 40))
    assert "blue for, orange against, at most 2" in words(explanation, (60, 40))


def test_what_the_model_did_not_see_is_dark_and_hatched_by_hand() -> None:
    explanation = make((2, 3), (2, 0, 8, 4), selected=[[1, 1, 1], [0, 0, 0]], scores=np.zeros((2, 3)))
    unseen, hatch, seen, dark = 33, 72, 100, 58  # 100 // 3, on every fifth diagonal a line, 0.5 * 100 + 8
    assert np.array_equal(
        np.asarray(overlay(flat(10, 4), explanation))[..., 0],
        [
            [hatch, unseen, *[seen] * 6, unseen, unseen],
            [unseen, unseen, *[seen] * 6, unseen, hatch],
            [unseen, unseen, *[dark] * 6, hatch, unseen],
            [unseen, unseen, *[dark] * 6, unseen, unseen],
        ],
    )


@pytest.mark.parametrize("grey", [0, 1, 127, 254, 255])
def test_no_grey_level_overflows(grey: int) -> None:
    explanation = make((1, 3), (0, 0, 8, 4), selected=[[1, 0, 0]], scores=np.zeros((1, 3)))
    got = np.asarray(overlay(flat(12, 4, grey), explanation))
    assert (got[0, 0] == grey).all()
    assert (got[0, 4] == round(0.5 * grey + 8)).all()
    assert (got[0, 9] == grey // 3).all()


sides = st.integers(1, 60)


@st.composite
def placed(draw: st.DrawFn) -> tuple[Explanation, tuple[int, int], tuple[int, int]]:
    """An explanation of a region, photo and picture of any size."""
    photo = draw(st.tuples(sides, sides))
    horizontal, vertical = (
        sorted(draw(st.lists(st.floats(0, side, width=32), min_size=2, max_size=2, unique=True))) for side in photo
    )
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    region = (horizontal[0], vertical[0], horizontal[1], vertical[1])
    return make(grid, region), photo, draw(st.tuples(sides, sides))


@settings(max_examples=40)
@given(placed())
def test_cells_tile_the_region_without_gap_or_overlap(
    case: tuple[Explanation, tuple[int, int], tuple[int, int]],
) -> None:
    explanation, photo, picture = case
    cells = Cells.of(explanation, photo, picture)
    times = np.zeros(picture[::-1], int)
    for row, column in np.ndindex(explanation.grid):
        times[cells.box(row, column)] += 1
    left, top, right, bottom = explanation.region
    x, y = ((np.arange(shown) + 0.5) * whole / shown for shown, whole in zip(picture, photo, strict=True))
    inside = np.outer((top < y) & (y < bottom), (left < x) & (x < right))
    distances = [np.abs(x - left)[None], np.abs(x - right)[None], np.abs(y - top)[:, None], np.abs(y - bottom)[:, None]]
    on_edge = np.logical_or.reduce(np.broadcast_arrays(*(distance < 1e-6 for distance in distances)))
    assert ((times == inside) | (on_edge & (times <= 1))).all()  # on the very edge either is right


def test_cells_of_a_grid_that_does_not_divide_the_photo() -> None:
    # 10 / 3 = 3.33, 6.67: edges at the nearest pixel; then half pixels, which go up
    cells = Cells.of(make((3, 4), (0, 0, 10, 10)), (10, 10), (10, 10))
    assert cells == Cells((0, 3, 7, 10), (0, 3, 5, 8, 10))
    # a grid finer than the photo leaves cells empty
    assert Cells.of(make((4, 1), (0, 0, 1, 2)), (1, 2), (1, 2)).rows == (0, 1, 1, 2, 2)
    # shown at half size, the region halves too
    assert Cells.of(make((1, 2), (20, 0, 60, 30)), (80, 30), (40, 15)).columns == (10, 20, 30)


@settings(max_examples=20)
@given(
    selected=hnp.arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 4))).filter(lambda cells: cells.any()),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    border=st.integers(0, 5),
)
def test_overlay_keeps_the_selected_cells_inside_of_the_outline(
    selected: npt.NDArray[np.bool_], size: tuple[int, int], border: int
) -> None:
    photo = noise(size[0] + 2 * border, size[1] + 2 * border)
    region = (border, border, border + size[0], border + size[1])
    explanation = make(selected.shape, region, selected=selected, scores=np.zeros(selected.shape))
    got, source = np.asarray(overlay(photo, explanation)), np.asarray(photo)

    cells = Cells.of(explanation, photo.size, photo.size)
    inside = np.zeros(source.shape[:2], bool)
    for row, column in np.argwhere(selected):
        inside[cells.box(row, column)] = True

    def deep(pixels: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        padded = np.pad(pixels, 1)
        height, width = pixels.shape
        around = [padded[y : y + height, x : x + width] for y, x in itertools.product(range(3), repeat=2)]
        return np.logical_and.reduce(around)

    stroke = min(1, cells.smallest_side // 5)  # photos this small have strokes of a pixel
    dark = inside & ~deep(inside) if stroke else np.zeros_like(inside)
    light = inside & ~dark & ~deep(deep(inside)) if stroke else np.zeros_like(inside)
    assert (got[dark] == 16).all()
    assert (got[light] == (255, 205, 0)).all()
    assert np.array_equal(got[inside & ~dark & ~light], source[inside & ~dark & ~light])
    assert np.array_equal(inside, cells.mask(selected, photo.size))
    grey = np.asarray(photo.convert("L"))[..., np.newaxis]
    seen = np.zeros_like(inside)
    seen[cells.region] = True
    assert np.array_equal(got[seen & ~inside], np.rint(0.375 * grey + 0.125 * source + 8)[seen & ~inside])
    assert (got[~seen] <= 85).all()


def test_outline_grows_with_the_photo() -> None:
    selected = np.zeros((3, 3), bool)
    selected[1, 1] = True
    explanation = make((3, 3), (0, 0, 1140, 1140), selected=selected, scores=np.zeros((3, 3)))
    row = np.asarray(overlay(flat(1140, 1140), explanation))[570, 370:400, 0]  # the cell begins at 380
    assert row.tolist() == [58] * 10 + [16] * 6 + [255] * 6 + [100] * 8


@pytest.mark.parametrize(("side", "corner"), [(4, 100), (5, 16)])
def test_cells_too_small_for_an_outline_have_none(side: int, corner: int) -> None:
    explanation = make((2, 2), (0, 0, 2 * side, 2 * side), selected=np.eye(2), scores=np.zeros((2, 2)))
    got = np.asarray(overlay(flat(2 * side, 2 * side), explanation))
    assert got[0, 0, 0] == corner
    assert got[2, 2, 0] == 100


def test_scores_take_the_colours_of_the_bar() -> None:
    scores = np.array([[0, -300, -300 * 191 / 255]])  # the highest, the lowest, and share 64 / 255
    heat = pictures(flat(600, 200), make((1, 3), (0, 0, 600, 200), selected=[[1, 0, 0]], scores=scores))[1]
    height, width = heat.shape[:2]
    at = [heat[height // 4, int(width * share)].tolist() for share in (1 / 6, 1 / 2, 5 / 6)]
    assert at == [[254, 232, 56], [0, 34, 78], [67, 78, 108]]
    assert {"z = -300", "0", "at the bound"} < set(words(make((1, 3), scores=scores)))


def test_the_photo_under_the_scores_keeps_each_cells_mean_colour() -> None:
    scores = -np.arange(35.0).reshape(5, 7)
    photo, explanation = noise(350, 250), make((5, 7), (0, 0, 350, 250), scores=scores - 1)
    textured, plain = pictures(photo, explanation)[1], pictures(flat(350, 250), explanation)[1]
    cells = Cells.of(explanation, photo.size, textured.shape[1::-1])
    assert not np.array_equal(textured, plain)
    for row, column in np.ndindex(scores.shape):
        box = cells.box(row, column)
        assert np.abs(textured[box].mean((0, 1)) - plain[box].mean((0, 1))).max() < 2.5


def test_the_colour_map_brightens_from_end_to_end() -> None:
    ramp = cividis(np.linspace(0, 1, 256)).astype(float)
    assert (np.diff(ramp @ [0.299, 0.587, 0.114]) > 0).sum() > 240
    assert (np.diff(ramp @ [0.299, 0.587, 0.114]) > -0.5).all()


def dots(heat: Pixels, grid: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The cells that are dark in their centre."""
    height, width = heat.shape[:2]
    downs = (np.arange(grid[0]) + 0.5) * height / grid[0]
    acrosses = (np.arange(grid[1]) + 0.5) * width / grid[1]
    return heat[np.ix_(downs.astype(int), acrosses.astype(int))].max(axis=-1) < 40


def test_dots_mark_the_cells_at_the_bound_and_no_others() -> None:
    scores = np.full((5, 9), -2.0)
    scores[1, 2] = scores[4, 8] = 0
    scores[0, 0] = -1e-6  # looks the same but for the dot
    # selected on purpose elsewhere: a dot is about scores
    explanation = make((5, 9), (0, 0, 90, 50), scores=scores, selected=np.eye(5, 9))
    heat = pictures(flat(90, 50), explanation)[1]
    assert np.array_equal(dots(heat, (5, 9)), scores == 0)


def test_equal_scores() -> None:
    explanation = make(scores=np.zeros((7, 7)), selected=np.ones((7, 7)))
    heat = pictures(flat(600, 400), explanation)[1]
    assert dots(heat, (7, 7)).all()
    assert heat[2, 2].tolist() == [254, 232, 56]
    assert "all cells at the bound" in words(explanation)
    assert not any(said.startswith("z =") for said in words(explanation))
    assert "all cells at 2.5" in words(make(scores=np.full((7, 7), 2.5)))
    assert {"z = -3", "0", "none at the bound"} < set(words(make(scores=np.full((7, 7), -3))))


def test_scores_of_a_method_without_a_bound() -> None:
    explanation = make((1, 2), (0, 0, 90, 50), scores=[[-0.0, 1.5]], selected=[[0, 1]])
    said = words(explanation, (90, 50))
    assert {"z = 0", "1.5"} < set(said)
    assert not any("bound" in text for text in said)
    assert not dots(pictures(flat(90, 50), explanation)[1], (1, 2)).any()


def test_huge_scores() -> None:
    scores = np.array([[-3e38, 3e38]])
    heat = pictures(flat(90, 50), make((1, 2), (0, 0, 90, 50), scores=scores, selected=[[0, 1]]))[1]
    assert heat[5, 5].tolist() == [0, 34, 78]
    assert heat[5, -5].tolist() == [254, 232, 56]


def test_panel_shows_the_photo_and_only_the_selected_cells() -> None:
    photo = Image.radial_gradient("L").resize((600, 400)).convert("RGB")
    selected = np.zeros((2, 3), bool)
    selected[0, 1] = True
    explanation = make((2, 3), selected=selected, scores=np.where(selected, 0, -1))
    shown, _, only, spot = pictures(photo, explanation)
    height, width = shown.shape[:2]
    assert np.array_equal(shown, np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)))
    for row, column in np.ndindex(2, 3):
        y, x = int((row + 0.5) * height / 2), int((column + 0.5) * width / 3)
        kept = bool(selected[row, column])
        assert only[y, x].tolist() == (shown[y, x].tolist() if kept else [216] * 3)
        assert spot[y, x].tolist() == (shown[y, x] if kept else np.rint(0.5 * shown[y, x] + 8)).tolist()
    assert "not seen by the model" not in words(explanation)


def test_every_picture_of_the_panel_says_what_was_not_seen() -> None:
    explanation = make(region=(100, 0, 500, 400))
    assert "not seen by the model" in words(explanation)
    for grey in (0, 255):
        grounds = ({72, grey // 3}, {128, 255}, {128, 255}, {72, grey // 3})
        for picture, ground in zip(pictures(flat(600, 400, grey), explanation), grounds, strict=True):
            sixth = picture.shape[1] // 6
            assert set(np.unique(picture[:, : sixth - 1])) == ground
            assert set(np.unique(picture[:, -sixth + 1 :])) == ground


def test_header() -> None:
    assert words(make())[:4] == ["tabby", "92.3%", "from 8 of 49 cells", "BLA  ·  BLA-T  ·  tf_efficientnet_lite0"]
    assert "chosen for: tiger cat" in words(make(target=282))
    assert "chosen for: class 7" in words(make(target=7))
    assert "BLA" in words(make(setup="BLA", model=""))
    long = words(make(prediction=Prediction(1, "very " * 200 + "long", 1.0), model="m" * 300, target=282))
    assert long[0].startswith("very very")
    assert long[0].endswith("very…")
    assert long[1:4] == ["100%", "from 8 of 49 cells", "chosen for: tiger cat"]
    assert long[4].endswith("mmm…")


LYNX = Prediction(287, "lynx", 0.4)
CHECK = Check(TABBY, TABBY, LYNX, 0.91, 0.12, "coarse")


def test_the_header_begins_with_the_classifiers_answer_and_reddens_where_the_cells_disagree() -> None:
    tabby = {"classifier": Prediction(281, "tabby", 0.69), "agrees": True, "target": 281}
    assert words(make(**tabby))[:3] == ["tabby", "69.0%", "from 8 of 49 cells: tabby 92.3%"]
    other = layout((600, 400), make(classifier=LYNX, agrees=False), 320).texts
    assert [text.words for text in other[:3]] == [
        "lynx",
        "40.0%",
        "DISAGREES with the classifier: 8 of 49 cells say tabby 92.3%",
    ]
    red, green, blue = other[2].ink
    assert red > 2 * max(green, blue)
    assert 0.299 * red + 0.587 * green + 0.114 * blue < 80  # dark also in grey
    asked = words(make(classifier=LYNX, agrees=False, target=281))
    assert asked[2:4] == ["from 8 of 49 cells: tabby 92.3%", "chosen for: tabby"]


def test_the_header_says_what_the_pixels_alone_say_in_letters_that_the_font_has() -> None:
    checked = words(make(check=CHECK))
    assert "from these pixels alone: tabby 91.0%" in checked
    assert "without them: tabby 12.0% (likeliest: lynx 40.0%)" in checked
    foreign = words(make(check=Check(Prediction(281, "\x00", 0.9), TABBY, LYNX, 0.91, 0.12, "coarse")))
    assert "from these pixels alone: class 281 91.0%" in foreign


@pytest.mark.parametrize(
    ("probability", "written"),
    [
        (0.0, "0%"),
        (0.0004, "<0.1%"),
        (0.0005, "0.1%"),
        (0.5, "50.0%"),
        (0.9994, "99.9%"),
        (0.9996, ">99.9%"),
        (1, "100%"),
    ],
)
def test_percent(probability: float, written: str) -> None:
    assert percent(probability) == written


@pytest.mark.parametrize(
    ("label", "written"),
    [
        ("Schäferhund, Łódź", "Schaferhund, Lodz"),
        ("crème brûlée \u2014 Straße 5 \u00d7 5", "creme brulee - Strasse 5 x 5"),
        ("smørrebrød  \n\t “ok”…", "smorrebrod “ok”..."),
        ("cat \U0001f408", "cat"),
        ("", "class 3"),
        ("\ud800\x00", "class 3"),
    ],
)
@pytest.mark.usefixtures("own_font_only")
def test_without_other_fonts_labels_are_written_in_english_letters(label: str, written: str) -> None:
    assert legible(label, "class 3") == written
    assert words(make(prediction=Prediction(3, label, 0.5)))[0] == written


@pytest.mark.usefixtures("own_font_only")
def test_a_script_without_a_font_is_spelled_by_its_code_points_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="expected a font with CJK letters on this system, found none"):
        assert legible("猫 cat", "class 3") == "U+732B cat"


def test_a_script_is_written_in_a_font_of_the_system() -> None:
    if not lettering._files():
        pytest.skip("needs a font besides Pillow's own")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert legible("Schäferhund, кот", "class 3") == "Schäferhund, кот"
    except UserWarning:
        pytest.skip("needs a font with Cyrillic letters")
    assert bytes(font(20, "к").getmask("к")) != bytes(font(20).getmask("к"))  # type: ignore[call-overload]


def test_shortening() -> None:
    whole = length("tabby cat", 14)
    assert shorten("tabby cat", 14, whole) == "tabby cat"
    assert shorten("tabby cat", 14, whole - 1) in {"tabby c…", "tabby…", "tabby ca…"}
    assert shorten("tabby cat", 14, 3) == ""
    assert shorten("tabby cat", 14, -50) == ""


SHAPES = [(1, 1), (30, 20), (600, 400), (300, 500), (1200, 900), (2000, 100), (100, 2000), (1, 3000), (3000, 1)]


@st.composite
def anything(draw: st.DrawFn) -> tuple[Explanation, tuple[int, int]]:
    """An explanation of a photo of any size, with any words in it."""
    size = draw(st.sampled_from(SHAPES) | st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
    scores = np.zeros((7, 7))
    scores[3:] = draw(st.sampled_from([0.0, -300.0, -1.234e-30, -1.234e30, 2.0]))
    part = draw(st.sampled_from([0.4, 1.0]))
    names = st.text(max_size=80) | st.text("Wim ", min_size=20, max_size=600)
    explanation = make(
        region=(0, 0, part * size[0], part * size[1]),
        scores=scores - draw(st.integers(0, 1)),
        model=draw(names),
        target=draw(st.sampled_from([None, 281, 282, 99999])),
        prediction=Prediction(281, draw(names), draw(st.floats(0, 1))),
        classifier=draw(st.sampled_from([None, TABBY, LYNX])),
        agrees=draw(st.sampled_from([None, True, False])),
        check=draw(st.sampled_from([None, CHECK])),
    )
    return explanation, size


@pytest.mark.filterwarnings("ignore:expected a font with")
@settings(max_examples=40)
@given(case=anything(), height=st.integers(160, 900))
@example(case=(make(region=(0, 0, 50, 400), scores=np.eye(7)), (100, 400)), height=320)
def test_nothing_runs_out_of_the_panel_or_over_anything_else(
    case: tuple[Explanation, tuple[int, int]], height: int
) -> None:
    explanation, photo = case
    places = layout(photo, explanation, height)
    boxes = [(x, y, x + places.picture[0], y + places.picture[1]) for x, y in places.corners]
    boxes += [(x, y, x + key.width, y + key.height) for key, (x, y) in places.keys]
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    for text in places.texts:
        if text.words:
            face = font(text.size, text.words)
            left, top, right, bottom = draw.textbbox((text.x, text.y), text.words, font=face, anchor="ls")
            # a pixel of what the letters overhang is no overlap
            boxes.append((int(left) + 1, int(top), int(right) - 1, int(bottom)))
    width, depth = places.size
    for left, top, right, bottom in boxes:
        assert left > 0
        assert top > 0
        assert right < width
        assert bottom < depth
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)
    assert width <= 5.1 * height
    assert depth <= 4 * height


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("grid", [(7, 7), (5, 9), (1, 1)])
def test_photos_of_any_shape(size: tuple[int, int], grid: tuple[int, int]) -> None:
    explanation = make(grid, (0, 0, *size))
    photo = flat(*size)
    places = layout(size, explanation, 320)
    assert panel(photo, explanation).size == places.size
    assert overlay(photo, explanation).size == size
    assert min(places.picture) >= 1
    ratio = places.picture[0] / places.picture[1] / (size[0] / size[1])
    assert 0.9 < ratio < 1.1 or min(places.picture) < 5


@pytest.mark.parametrize("size", [(600, 400), (500, 375), (300, 500), (400, 400), (30, 20)])
@pytest.mark.parametrize("height", [160, 320, 333, 640])
def test_ordinary_panels_have_the_height_asked_for(size: tuple[int, int], height: int) -> None:
    assert panel(flat(*size), make(region=(0, 0, *size)), height=height).height == height


def test_wide_photos_stand_two_by_two_in_a_panel_that_is_no_higher() -> None:
    for size, height in (((1000, 100), 320), ((2000, 100), 273)):
        places = layout(size, make(region=(0, 0, *size)), 320)
        assert len({x for x, _ in places.corners}) == len({y for _, y in places.corners}) == 2
        assert places.size[1] == pytest.approx(height, abs=1)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_photos_of_other_modes_are_taken_as_rgb(mode: str) -> None:
    photo, explanation = noise(60, 40).convert(mode), make(region=(0, 0, 60, 40))
    assert overlay(photo, explanation) == overlay(photo.convert("RGB"), explanation)
    assert panel(photo, explanation) == panel(photo.convert("RGB"), explanation)


def test_pictures_are_the_same_each_time_and_leave_the_photo_alone() -> None:
    photo, explanation = noise(60, 40), make(region=(10, 0, 50, 40))
    before = photo.tobytes()
    assert panel(photo, explanation).tobytes() == panel(photo, explanation).tobytes()
    assert overlay(photo, explanation).tobytes() == overlay(photo, explanation).tobytes()
    assert photo.tobytes() == before


def test_refusals() -> None:
    with pytest.raises(ValueError, match="height of at least 160 pixels for a panel, got 159"):
        panel(flat(600, 400), make(), height=159)
    for draw in (panel, overlay):
        with pytest.raises(ValueError, match=r"got one of 400 x 600 pixels: pass it at its own size and upright"):
            draw(flat(400, 600), make())
    overlay(flat(600, 400), make(region=(-0.3, 0, 600.4, 400)))  # rounding is no reason to refuse
