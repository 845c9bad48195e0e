"""The embedded data set: objects cut out of scikit-image's photographs, placed among distractors, with exact masks.

Every photograph ships inside the scikit-image wheel, so nothing is downloaded and nothing is copied here. Most are
CC0, public domain or without known restrictions, as the docstrings of :mod:`skimage.data` say one by one; those of
``logo``, ``moon``, ``page`` and ``stereo_motorcycle`` (the Middlebury 2014 stereo benchmark) name no terms.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from bla import needs_extra
from bla.data.photo import DataError
from bla.data.prefetching import cores, prefetch
from bla.files import read_json, whole_folder, write_json
from bla.progress import Progress, silent

SCHEMA_VERSION = 1
CLASSES: tuple[str, ...] = ("astronaut", "cat", "coin", "cup", "horse", "motorcycle", "photographer", "rocket")
SIZE = (320, 256)

_FIRST_TEST_INDEX = 1_000_000  # so that the test images stay the same however many train images there are

# The geometric mean of an object's sides, as a share of the image's: this sets the difficulty.
_SUBJECT_SIDE = (0.26, 0.5)
_DISTRACTOR_SIDE = (0.2, 0.42)

# embedded.json holds, in pixels of the photographs:
#   objects       what is cut out of which photo for which class: an outline as in SVG, points x,y, "/" before a hole
#                 (even-odd rule), or an ellipse, its centre and radii
#   textures      boxes (left, top, right, bottom) for grounds and fragments
#   surroundings  boxes for fragments alone
#   others        whole things of no class, above all round ones, so that a round outline alone does not mean a coin
_PIECES: dict[str, list[dict[str, Any]]] = read_json(Path(__file__).with_name("embedded.json"))
_REGIONS = _PIECES["textures"] + _PIECES["surroundings"]

_Polygons = Sequence[Sequence[Sequence[float]]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """An RGBA picture and the place of its upper left corner; it may reach over the frame."""

    image: Image.Image
    left: int
    top: int

    def alpha(self, size: tuple[int, int]) -> Image.Image:
        """Its opacity within a frame of that size."""
        plane = Image.new("L", size)
        plane.paste(self.image.getchannel("A"), (self.left, self.top))
        return plane


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """The layers from the ground up, and the light and noise that fall on all of them, (height, width, 1) each."""

    ground: Image.Image
    below: tuple[Patch, ...]
    subject: Patch
    above: tuple[Patch, ...]
    light: npt.NDArray[np.float32]
    noise: npt.NDArray[np.float32]

    def image(self) -> Image.Image:
        """The picture."""
        image = self.ground.copy()
        for patch in (*self.below, self.subject, *self.above):
            image.paste(patch.image, (patch.left, patch.top), patch.image)
        pixels = np.asarray(image) * self.light
        pixels += self.noise
        return Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8))

    def mask(self) -> Image.Image:
        """255 where the subject shows with more than half of its opacity, otherwise 0."""
        alpha = self.subject.alpha(self.ground.size)
        for patch in self.above:
            alpha = ImageChops.multiply(alpha, ImageChops.invert(patch.alpha(self.ground.size)))
        return alpha.point([255 * (level > 127) for level in range(256)])

    def shows(self) -> bool:
        """Whether at least 60% of the subject is in sight."""
        whole = dataclasses.replace(self, above=())
        return self.mask().histogram()[255] >= 0.6 * whole.mask().histogram()[255]


def make(index: int, *, seed: int = 0, size: tuple[int, int] = SIZE) -> tuple[Image.Image, Image.Image, int]:
    """One image of the data set, its mask and its class: a pure function of ``seed``, ``index`` and ``size``.

    On a texture lie two to four distractors (fragments of photos, and whole things of no class) and one object
    of class ``index % len(CLASSES)``, at random position, scale, rotation and tint. Ground and distractors come
    from a random stream that never sees the class, so they do not give it away; distractors hide at most 40% of
    the object.

    The image is RGB; the mask (mode L) is 255 where the object shows with more than half of its opacity, otherwise 0.
    Another seed is another data set of the same difficulty; ``size`` is ``(width, height)``, each 64 or more.
    A DataError says if an argument is out of its range, or scikit-image is missing.

    >>> image, mask, label = make(1, size=(160, 128))
    >>> image.size, mask.getextrema(), CLASSES[label]
    ((160, 128), (0, 255), 'cat')
    """
    composed = scene(index, seed=seed, size=size)
    return composed.image(), composed.mask(), index % len(CLASSES)


def scene(index: int, *, seed: int = 0, size: tuple[int, int] = SIZE) -> Scene:
    """The layers of the image that :func:`make` makes, with the same arguments and errors."""
    if index < 0 or seed < 0:
        raise DataError(f"expected an index and a seed of 0 or larger, got index {index}, seed {seed}")
    if min(size) < 64:
        raise DataError(f"expected a width and a height of at least 64 pixels, got {size}")
    scenery, rng = np.random.default_rng((seed, index)).spawn(2)
    ground = _ground(scenery, size)
    distractors = [distractor(scenery, size) for _ in range(scenery.integers(2, 5))]
    on_top = scenery.random(len(distractors)) < 0.5
    below, above = (tuple(itertools.compress(distractors, chosen)) for chosen in (~on_top, on_top))
    slope = scenery.uniform(-0.4, 0.4, 2)
    x, y = (np.linspace(-0.5, 0.5, side) for side in size)
    light = (1 + slope[0] * x + slope[1] * y[:, None]).astype(np.float32)[..., None]
    noise = scenery.standard_normal((size[1], size[0], 1), np.float32) * np.float32(scenery.uniform(0, 6))

    cutouts = _cutouts(CLASSES[index % len(CLASSES)])
    image = _posed(rng, cutouts[rng.integers(len(cutouts))], size, _SUBJECT_SIDE)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for _ in range(20):
        left, top = (int(rng.integers(max(frame - side, 0) + 1)) for frame, side in zip(size, image.size, strict=True))
        composed = Scene(ground, below, Patch(image, left, top), above, light, noise)
        if composed.shows():
            return composed
    return dataclasses.replace(composed, below=below + above, above=())


def write(
    folder: str | os.PathLike[str],
    *,
    train: int = 800,
    test: int = 400,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
    report: Progress = silent,
) -> Path:
    """Write the data set as an image folder, all or nothing.

    The layout is ``folder/{train,test}/CLASS/NNNN.jpg`` with ``folder/masks/{train,test}/CLASS/NNNN.png`` (255 on
    the object, otherwise 0) and ``folder/dataset.json``. Train image ``i`` is ``make(i)`` and test image ``i`` is
    ``make(1_000_000 + i)``, so the test images do not depend on the number of train images. The classes are equally
    frequent, to within one image; there is at least one of each in train and in test.

    A folder that already holds the same set is kept and returned; one that holds something else raises a DataError, and
    so do arguments out of their range, and a missing scikit-image.
    """
    if not len(CLASSES) <= min(train, test) <= max(train, test) <= _FIRST_TEST_INDEX:
        raise DataError(
            f"expected from {len(CLASSES)} (one a class) to {_FIRST_TEST_INDEX} images in train and in test, "
            f"got {train} and {test}"
        )
    folder = Path(folder)
    record = {
        "schema_version": SCHEMA_VERSION, "dataset": "embedded", "classes": list(CLASSES),
        "train": train, "test": test, "seed": seed, "size": list(size),
    }  # fmt: skip
    places = {}  # the files of each image, by its index
    for split, count, first in (("train", train, 0), ("test", test, _FIRST_TEST_INDEX)):
        for position in range(count):
            place = Path(split, CLASSES[(first + position) % len(CLASSES)], f"{position:04d}")
            places[first + position] = place.with_suffix(".jpg"), "masks" / place.with_suffix(".png")
    files = [file for pair in places.values() for file in pair]
    if not folder.is_file() and not (folder.is_dir() and any(folder.iterdir())):

        def write_one(index: int) -> None:
            image, mask, _ = make(index, seed=seed, size=size)
            photo, annotation = places[index]
            image.save(partial / photo, quality=92)
            mask.save(partial / annotation)

        try:
            with whole_folder(folder) as partial, ThreadPoolExecutor(min(cores(), 8)) as pool:
                for parent in {file.parent for file in files}:
                    (partial / parent).mkdir(parents=True)
                for done, _ in enumerate(prefetch(pool, write_one, places, 16), 1):
                    report("making the embedded data set", done, len(places))
                versions = {name: version(name) for name in ("numpy", "pillow", "scikit-image")}
                write_json(partial / "dataset.json", record | {"versions": versions}, indent=1)
        except OSError:
            if not folder.is_dir():
                raise  # otherwise another process has finished its set in the meantime
    _check(folder, record, files)
    return folder


def _check(folder: Path, record: dict[str, Any], files: list[Path]) -> None:
    """Raise DataError unless the folder holds the whole set that the record describes."""
    try:
        found = read_json(folder / "dataset.json")
        found.pop("versions")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        found = None
    if found != record:
        content = "something else" if found is None else f"another set: {json.dumps(found)}"
        raise DataError(
            f"expected {folder} to be new, empty or to hold the set {json.dumps(record)}; it holds {content}; "
            "choose another folder or remove this one"
        )
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise DataError(
            f"expected the whole data set in {folder}, got one without {missing[0]}; remove the folder and write again"
        )


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    texture = _region(rng.integers(len(_PIECES["textures"])))
    scale = min(has / wants for has, wants in zip(texture.size, size, strict=True)) / rng.uniform(1, 1.8)
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, texture.width - width), rng.uniform(0, texture.height - height)
    box = (left, top, left + width, top + height)
    return _recoloured(rng, texture.resize(size, Image.Resampling.BICUBIC, box))


def distractor(rng: np.random.Generator, size: tuple[int, int]) -> Patch:
    """A fragment of a photo, or a whole thing of no class, somewhere in a frame of ``size``."""
    image = _cut("others", rng.integers(len(_PIECES["others"]))) if rng.random() < 0.25 else _fragment(rng)
    image = _posed(rng, image, size, _DISTRACTOR_SIDE)
    left, top = rng.integers(size) - np.array(image.size) // 2
    return Patch(image, int(left), int(top))


def _fragment(rng: np.random.Generator) -> Image.Image:
    region = _region(rng.integers(len(_REGIONS)))
    width, height = (max(round(side * rng.uniform(0.4, 0.9)), 1) for side in region.size)
    left, top = int(rng.integers(region.width - width + 1)), int(rng.integers(region.height - height + 1))
    image = region.crop((left, top, left + width, top + height))
    image.thumbnail((192, 192), Image.Resampling.BICUBIC)
    corners = int(rng.integers(4, 11))
    angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    radii = rng.uniform(0.55, 1, corners)
    points = (0.5 + 0.5 * radii * (np.cos(angles), np.sin(angles))).T * image.size
    image.putalpha(_filled(image.size, [points.tolist()]))
    return image


def _posed(
    rng: np.random.Generator, image: Image.Image, size: tuple[int, int], sides: tuple[float, float]
) -> Image.Image:
    """Scaled to a share of the frame's side (both sides as geometric means), tinted, rotated, slightly blurred."""
    scale = rng.uniform(*sides) * math.sqrt(size[0] * size[1] / (image.width * image.height))
    scale = min(scale, 0.75 * min(size) / max(image.size))
    width, height = (max(round(side * scale), 1) for side in image.size)
    image = _recoloured(rng, image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2))
    image = ImageOps.expand(image, 1)  # a transparent rim, so that an edge cut by the photo's frame is smooth too
    image = image.rotate(rng.uniform(-60, 60), Image.Resampling.BILINEAR, expand=True)
    blur = ImageFilter.BoxBlur(rng.uniform(0, 0.8))
    return image.convert("RGBa").filter(blur).convert("RGBA")  # RGBa: the transparent surroundings do not bleed in


def _recoloured(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    hue, saturation = rng.uniform(-0.4, 0.4), rng.uniform(0.2, 1.2)
    contrast, brightness, tint = rng.uniform(0.6, 1.1), rng.uniform(-30, 30), rng.uniform(0.8, 1.15, 3)
    # A turn about the grey axis, after a step towards grey or away from it.
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(hue) * np.eye(3) + (1 - math.cos(hue)) / 3 + math.sin(hue) * cross
    grey = np.tile((0.299, 0.587, 0.114), (3, 1))
    matrix = contrast * tint[:, None] * (turn @ (saturation * np.eye(3) + (1 - saturation) * grey))
    rows = np.column_stack((matrix, np.full(3, 128 * (1 - contrast) + brightness)))
    recoloured = image.convert("RGB").convert("RGB", tuple(rows.ravel().tolist()))
    if image.mode == "RGBA":
        recoloured.putalpha(image.getchannel("A"))
    return recoloured


@functools.cache
def _photo(name: str) -> Image.Image:
    """A photograph of scikit-image's."""
    with needs_extra("demo", DataError):
        import skimage.data
    pixels = getattr(skimage.data, name)()
    return Image.fromarray(pixels[0] if name == "stereo_motorcycle" else pixels).convert("RGB")


@functools.cache
def _region(number: int) -> Image.Image:
    """One of the textures and surroundings."""
    region = _photo(_REGIONS[number]["photo"]).crop(_REGIONS[number]["box"])
    region.thumbnail((512, 512), Image.Resampling.LANCZOS)
    return region


@functools.cache
def _cutouts(name: str) -> tuple[Image.Image, ...]:
    """The objects of a class."""
    if name == "horse":
        # The photo is a silhouette: one horse in plain brown, one of wood (the table under the coffee), one of stone.
        alpha = ImageOps.invert(_photo("horse").convert("L"))
        wood, stone = (_region(number).resize(alpha.size) for number in (len(_PIECES["textures"]) - 1, 3))
        return tuple(_trimmed(fill, alpha) for fill in (Image.new("RGB", alpha.size, "#463228"), wood, stone))
    return tuple(_cut("objects", at) for at, piece in enumerate(_PIECES["objects"]) if piece["class"] == name)


@functools.cache
def _cut(kind: str, number: int) -> Image.Image:
    piece = _PIECES[kind][number]
    photo = _photo(piece["photo"])
    # A soft edge, drawn in by about a pixel so that no rim of the photo's own ground comes along.
    alpha = _filled(photo.size, _outline(piece)).filter(ImageFilter.GaussianBlur(1.2))
    return _trimmed(photo, alpha.point([min(max(3 * level - 434, 0), 255) for level in range(256)]))


def _trimmed(photo: Image.Image, alpha: Image.Image) -> Image.Image:
    cut = photo.copy()
    cut.putalpha(alpha)
    cut = cut.crop(alpha.getbbox())
    cut.thumbnail((256, 256), Image.Resampling.LANCZOS)
    return cut


def _outline(piece: dict[str, Any]) -> _Polygons:
    if "ellipse" in piece:
        x, y, a, b = piece["ellipse"]
        turns = (2 * math.pi * step / 90 for step in range(90))
        return [[(x + a * math.cos(turn), y + b * math.sin(turn)) for turn in turns]]
    parts = " ".join(piece["points"]).split("/")
    return [[[float(number) for number in point.split(",")] for point in part.split()] for part in parts]


def _filled(size: tuple[int, int], polygons: _Polygons) -> Image.Image:
    """Opacity by the even-odd rule, antialiased."""
    whole = Image.new("1", (3 * size[0], 3 * size[1]))
    for points in polygons:
        part = Image.new("1", whole.size)
        ImageDraw.Draw(part).polygon([(3 * x, 3 * y) for x, y in points], fill=1)
        whole = ImageChops.logical_xor(whole, part)
    return whole.convert("L").reduce(3)
