"""The embedded data set: objects cut out of scikit-image's photographs, placed among distractors, with exact masks.

Every photograph ships inside the scikit-image wheel, so nothing is downloaded and nothing is copied here. Most are
CC0, public domain or without known restrictions, as the docstrings of :mod:`skimage.data` say one by one; those of
``logo``, ``moon``, ``page`` and ``stereo_motorcycle`` (the Middlebury 2014 stereo benchmark) name no terms.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from bla import needs_extra
from bla.data.photo import DataError

SCHEMA_VERSION = 1
CLASSES: tuple[str, ...] = (
    "astronaut", "cat", "coin", "cup", "horse", "motorcycle", "photographer", "rocket",
)  # fmt: skip
SIZE = (320, 256)

_Box = tuple[int, int, int, int]
_Polygon = tuple[tuple[float, ...], ...]

# The geometric mean of an object's sides, as a share of the image's: what sets how hard the set is.
_SUBJECT_SIDE = (0.26, 0.5)
_DISTRACTOR_SIDE = (0.2, 0.42)

# The test images take their indices from here on: they stay the same however many train images there are.
_FIRST_TEST_INDEX = 1_000_000

# Outlines as in SVG: points x,y in pixels of the photo; "/" starts a hole (even-odd rule).
_ASTRONAUT = """
113,207 113,195 117,185 125,172 137,160 152,151 170,148 184,149 183,141 179,133 173,129 169,120 163,117 156,106
153,92 153,76 157,63 165,53 188,38 200,27 215,19 235,16 255,18 272,26 285,39 294,54 299,72 301,88 296,106 290,118
275,136 267,137 258,160 256,174 276,190 289,206 299,223 305,238"""
_PHOTOGRAPHER = """
52,182 75,147 95,132 117,125 132,125 140,114 152,106 161,106 164,99 180,78 189,72 201,67 212,67 234,74 243,79
251,88 260,95 270,113 269,123 266,131 263,129 258,131 257,139 299,142 310,141 311,139 324,140 325,145 323,155
320,156 320,167 325,168 329,172 331,179 331,193 325,208 307,233 307,240 303,248 299,249 305,272 297,281"""
_GAPS = """
/ 256,150 257,158 256,167 247,174 246,178 244,182 241,196 243,205 282,203 282,200 273,198 273,188 275,186 260,177
260,152 / 244,210 243,218 248,246 262,229 262,218 266,211 270,208"""
# Class, photo, outline.
_OUTLINES: tuple[tuple[str, str, str], ...] = (
    ("astronaut", "astronaut", _ASTRONAUT + """
320,244 335,257 345,275 352,295 358,320 362,346 400,344 425,349 450,362 470,380 485,405 494,435 497,455 503,460
509,475 511,492 511,511 46,511 30,492 24,470 20,430 19,400 27,335 33,310 43,285 47,268 60,250 80,232"""),
    ("astronaut", "astronaut", _ASTRONAUT + """
318,243 329,251 335,262 330,278 315,294 290,307 262,314 235,315 200,312 165,305 130,292 100,274 80,256 76,240
83,230"""),
    ("cat", "chelsea", """
62,0 46,13 37,30 33,52 33,80 41,140 50,165 62,190 78,212 98,228 150,262 185,275 225,281 250,283 280,279 300,270
310,256 318,222 325,210 338,195 350,176 358,158 362,140 361,120 354,85 360,70 371,50 401,0"""),
    ("cup", "coffee", """
290,18 320,21 350,31 375,47 397,69 403,67 416,67 424,76 416,109 430,120 443,134 458,155 468,176 476,198 480,222
479,250 470,276 460,297 447,314 433,328 396,356 374,368 352,377 302,388 275,390 225,385 190,376 172,366 140,345
114,319 102,303 92,285 79,245 77,222 79,195 90,152 98,136 117,112 139,94 160,80 183,69 205,47 230,31 260,21"""),
    ("cup", "coffee", """
290,18 320,21 350,31 375,47 393,67 404,87 408,109 407,134 397,172 382,207 367,226 354,240 333,257 309,281 290,286
270,286 261,283 262,266 257,247 240,270 229,302 221,308 209,305 199,297 197,284 204,264 215,240 206,221 190,195
181,165 173,109 177,88 188,67 206,47 231,31 261,21"""),
    ("motorcycle", "stereo_motorcycle", """
92,218 94,201 114,195 130,195 132,200 150,205 149,198 144,188 140,171 140,154 149,147 159,145 167,148 170,158
208,167 248,168 268,186 282,192 299,195 322,193 349,188 357,191 391,173 397,163 382,163 362,175 356,167 376,151
385,142 388,134 419,121 433,132 458,144 467,134 471,127 488,116 497,114 493,84 501,80 516,82 522,91 540,97 544,101
531,101 537,112 539,123 550,126 558,132 565,123 573,118 581,121 582,132 578,141 561,141 559,161 555,172 546,183
550,189 552,197 546,203 580,259 580,265 599,270 622,280 637,293 643,302 663,338 674,361 682,383 683,402 678,425
667,440 648,449 629,450 610,444 584,432 565,419 546,398 531,376 520,353 514,330 507,330 505,317 510,304 520,291
527,287 504,229 495,227 470,234 465,246 475,251 480,259 478,274 473,281 476,293 475,312 469,334 456,353 433,372
410,379 384,379 335,372 335,423 329,436 324,434 327,431 329,406 327,379 322,368 315,364 282,356 268,376 251,388
231,398 211,403 188,401 164,395 144,380 130,363 124,343 121,319 124,292 135,265 152,247 149,242 137,232 120,240
112,247 111,244 118,232 113,221 / 516,224 543,206 567,260 561,265 546,268 538,274"""),
    ("photographer", "camera", _PHOTOGRAPHER + """
297,316 311,318 312,330 304,345 300,346 300,485 288,485 288,346 281,330 278,329 278,317 288,315 288,287 262,306
249,312 243,312 232,308 207,294 190,320 142,381 147,415 150,450 150,511 138,511 128,480 101,450 92,511 0,511 0,257
38,210""" + _GAPS),
    ("photographer", "camera", _PHOTOGRAPHER + """
262,306 249,312 243,312 232,308 207,294 194,312 170,325 140,330 110,325 85,310 68,288 58,255 54,225""" + _GAPS),
    ("rocket", "rocket", """
322.5,127 317,133 313,141 311,149 310.5,173 314,181 314,335 313,406 331.5,406 331,240 331.5,181 333.5,173 333.5,149
332,141 328,132"""),
    ("rocket", "astronaut", """
408,0 402,10 398.5,22 397,36 396.5,60 394,58 387,42 383,54 381.5,64 380.5,104 377.5,130 378,170 379,182 365,196
357,208 354.5,218 355,225 371,230 379,234 367,260 366.5,268 369,272 375,266 388,250 392,239 395,242 405,243 409,250
412,236 438,235 435,264 440,264 445,268 454,268 455,264 459,260 456,254 455,234 454.5,66 449,49 445,40 442,41
438,50 437.5,36 435,22 429,10 419,0"""),
)  # fmt: skip
# Centre and radii of the twelve best kept coins.
_COINS = (
    (155, 50.5, 23, 22.5), (215.5, 51, 23.5, 22), (335, 43.5, 29.5, 28), (270.5, 119, 25, 23.5),
    (102, 196, 21.5, 21), (212, 193, 23.5, 23), (347, 187, 32, 31), (46, 260, 28, 28),
    (113.5, 265.5, 21, 21.5), (172, 262, 29, 26), (244, 263.5, 24, 24), (301, 263.5, 25, 24.5),
)  # fmt: skip
# Parts of photos as left, top, right, bottom: the grounds, and what fragments are cut from besides.
_TEXTURES: tuple[tuple[str, _Box], ...] = (
    ("brick", (0, 0, 512, 512)), ("grass", (0, 0, 512, 512)), ("gravel", (0, 0, 512, 512)),
    ("moon", (0, 0, 512, 512)), ("immunohistochemistry", (0, 0, 512, 512)), ("page", (0, 0, 384, 191)),
    ("hubble_deep_field", (0, 0, 1000, 872)), ("retina", (330, 200, 1230, 920)), ("coffee", (440, 0, 600, 128)),
)  # fmt: skip
_SURROUNDINGS: tuple[tuple[str, _Box], ...] = (
    ("astronaut", (0, 0, 78, 230)), ("camera", (335, 90, 512, 235)), ("rocket", (0, 0, 88, 340)),
    ("rocket", (130, 340, 250, 427)), ("stereo_motorcycle", (345, 45, 500, 95)), ("text", (0, 0, 448, 172)),
    ("stereo_motorcycle", (530, 28, 597, 100)), ("stereo_motorcycle", (60, 100, 140, 190)),
)  # fmt: skip
# Whole things of no class, round ones above all, so that a round outline alone does not tell a coin.
_OTHERS: tuple[tuple[str, tuple[float, float, float, float]], ...] = (
    ("retina", (705, 705, 690, 690)), ("astronaut", (171, 385, 37, 37)), ("logo", (249, 249, 240, 240)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Patch:
    """An RGBA picture and where its left upper corner goes; it may reach over the frame."""

    image: Image.Image
    left: int
    top: int

    def alpha(self, size: tuple[int, int]) -> Image.Image:
        plane = Image.new("L", size)
        plane.paste(self.image.getchannel("A"), (self.left, self.top))
        return plane


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """The layers from the ground up, and the light and noise that fall on all of them."""

    ground: Image.Image
    below: tuple[_Patch, ...]
    subject: _Patch
    above: tuple[_Patch, ...]
    light: npt.NDArray[np.float32]
    noise: npt.NDArray[np.float32]

    def image(self) -> Image.Image:
        image = self.ground.copy()
        for patch in (*self.below, self.subject, *self.above):
            image.paste(patch.image, (patch.left, patch.top), patch.image)
        pixels = np.asarray(image) * self.light
        pixels += self.noise
        return Image.fromarray(pixels.clip(0, 255, out=pixels).astype(np.uint8))

    def mask(self) -> Image.Image:
        return _visible(self.subject, self.above, self.ground.size)


def make(index: int, *, seed: int = 0, size: tuple[int, int] = SIZE) -> tuple[Image.Image, Image.Image, int]:
    """One image of the data set, its mask and its class: a pure function of ``seed``, ``index`` and ``size``.

    On a texture lie two to four distractors (fragments of photos, and whole things of no class) and one object
    of class ``index % len(CLASSES)``, at random position, scale, rotation and tint. Ground and distractors come
    from a random stream that never sees the class, so they do not tell it; a distractor may hide up to 40% of
    the object.

    Parameters
    ----------
    index: which image, 0 or larger; consecutive indices take the classes in turn.
    seed: 0 or larger; another seed is another data set of the same difficulty.
    size: ``(width, height)`` in pixels, each at least 64.

    Returns
    -------
    The RGB image; the mask (mode L: 255 where the object shows with more than half of its opacity, otherwise 0);
    the index of the class in ``CLASSES``.

    Raises
    ------
    DataError
        If an argument is out of its range.

    Examples
    --------
    >>> image, mask, label = make(1, size=(160, 128))
    >>> image.size, mask.getextrema(), CLASSES[label]
    ((160, 128), (0, 255), 'cat')
    """
    if index < 0 or seed < 0:
        raise DataError(f"expected an index and a seed of 0 or larger, got index {index}, seed {seed}")
    if min(size) < 64:
        raise DataError(f"expected a width and a height of at least 64 pixels, got {size}")
    scene = _scene(index, seed, size)
    return scene.image(), scene.mask(), index % len(CLASSES)


def write(
    folder: str | os.PathLike[str],
    *,
    train: int = 800,
    test: int = 400,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set as an image folder, all or nothing.

    The layout is ``folder/{train,test}/CLASS/NNNN.jpg`` with ``folder/masks/{train,test}/CLASS/NNNN.png`` (255 on
    the object, otherwise 0) and ``folder/dataset.json``. Train image ``i`` is ``make(i)`` and test image ``i`` is
    ``make(1_000_000 + i)``, so the test images do not depend on the number of train images. The classes are equally
    frequent, to within one image.

    Parameters
    ----------
    folder: where the set goes; one that already holds the same set is kept and returned.
    train, test: how many images, each at least one a class.
    seed, size: as in :func:`make`.
    progress: called with the number of images done and the number of all, from the calling thread.

    Raises
    ------
    DataError
        If the folder holds something else, or an argument is out of its range.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     folder = write(Path(parent) / "embedded", train=8, test=8, size=(64, 64))
    ...     sorted(path.name for path in folder.iterdir())
    ['dataset.json', 'masks', 'test', 'train']
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
    plan = [("train", i, i) for i in range(train)] + [("test", i, _FIRST_TEST_INDEX + i) for i in range(test)]
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        return _kept(folder, record, plan)

    def write_one(entry: tuple[str, int, int]) -> None:
        image, mask, _ = make(entry[2], seed=seed, size=size)
        photo, annotation = _paths(partial, entry)
        image.save(photo, quality=92)
        mask.save(annotation)

    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 8))
    try:
        for parent in {path.parent for entry in plan for path in _paths(partial, entry)}:
            parent.mkdir(parents=True)
        for done, _ in enumerate(pool.map(write_one, plan), 1):
            if progress is not None:
                progress(done, len(plan))
        versions = {name: version(name) for name in ("numpy", "pillow", "scikit-image")}
        (partial / "dataset.json").write_text(json.dumps(record | {"versions": versions}, indent=1) + "\n")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process has finished its set in the meantime.
            return _kept(folder, record, plan)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _paths(folder: Path, entry: tuple[str, int, int]) -> tuple[Path, Path]:
    split, position, index = entry
    place = Path(split, CLASSES[index % len(CLASSES)], f"{position:04d}")
    return folder / place.with_suffix(".jpg"), folder / "masks" / place.with_suffix(".png")


def _kept(folder: Path, record: dict[str, Any], plan: list[tuple[str, int, int]]) -> Path:
    try:
        found = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        found.pop("versions")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        found = None
    if found != record:
        what = "something else" if found is None else f"another set: {json.dumps(found)}"
        raise DataError(
            f"expected {folder} to be new, empty or to hold the set {json.dumps(record)}; it holds {what}; "
            "choose another folder or remove this one"
        )
    missing = [path for entry in plan for path in _paths(folder, entry) if not path.is_file()]
    if missing:
        raise DataError(
            f"expected the whole data set in {folder}, got one without {missing[0].relative_to(folder)}; "
            "remove the folder and write it again"
        )
    return folder


def _scene(index: int, seed: int, size: tuple[int, int]) -> _Scene:
    scenery, subject = np.random.default_rng((seed, index)).spawn(2)
    ground = _ground(scenery, size)
    distractors = [_distractor(scenery, size) for _ in range(scenery.integers(2, 5))]
    on_top = scenery.random(len(distractors)) < 0.5
    slope = scenery.uniform(-0.4, 0.4, 2)
    x, y = (np.linspace(-0.5, 0.5, side) for side in size)
    light = (1 + slope[0] * x + slope[1] * y[:, None]).astype(np.float32)[..., None]
    noise = scenery.standard_normal((size[1], size[0], 1), np.float32) * np.float32(scenery.uniform(0, 6))

    sources = _cutouts(CLASSES[index % len(CLASSES)])
    image = _posed(subject, sources[subject.integers(len(sources))], size, _SUBJECT_SIDE)
    if subject.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    below = tuple(patch for patch, top in zip(distractors, on_top, strict=True) if not top)
    above = tuple(patch for patch, top in zip(distractors, on_top, strict=True) if top)
    for _ in range(20):
        patch = _Patch(
            image,
            int(subject.integers(max(size[0] - image.width, 0) + 1)),
            int(subject.integers(max(size[1] - image.height, 0) + 1)),
        )
        if _area(_visible(patch, above, size)) >= 0.6 * _area(_visible(patch, (), size)):
            return _Scene(ground, below, patch, above, light, noise)
    return _Scene(ground, below + above, patch, (), light, noise)


def _visible(subject: _Patch, above: tuple[_Patch, ...], size: tuple[int, int]) -> Image.Image:
    alpha = subject.alpha(size)
    for patch in above:
        alpha = ImageChops.multiply(alpha, ImageChops.invert(patch.alpha(size)))
    return alpha.point([255 * (level > 127) for level in range(256)])


def _area(mask: Image.Image) -> int:
    return mask.histogram()[255]


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    texture = _region(*_TEXTURES[rng.integers(len(_TEXTURES))])
    scale = min(has / wants for has, wants in zip(texture.size, size, strict=True)) / rng.uniform(1, 1.8)
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, texture.width - width), rng.uniform(0, texture.height - height)
    box = (left, top, left + width, top + height)
    return _recoloured(rng, texture.resize(size, Image.Resampling.BICUBIC, box))


def _distractor(rng: np.random.Generator, size: tuple[int, int]) -> _Patch:
    if rng.random() < 0.25:
        photo, ellipse = _OTHERS[rng.integers(len(_OTHERS))]
        image = _cut(photo, (_ellipse(*ellipse),))
    else:
        image = _fragment(rng)
    image = _posed(rng, image, size, _DISTRACTOR_SIDE)
    left, top = rng.integers(size) - np.array(image.size) // 2
    return _Patch(image, int(left), int(top))


def _fragment(rng: np.random.Generator) -> Image.Image:
    regions = _TEXTURES + _SURROUNDINGS
    region = _region(*regions[rng.integers(len(regions))])
    width, height = (max(round(side * rng.uniform(0.4, 0.9)), 1) for side in region.size)
    left, top = int(rng.integers(region.width - width + 1)), int(rng.integers(region.height - height + 1))
    image = region.crop((left, top, left + width, top + height))
    image.thumbnail((192, 192), Image.Resampling.BICUBIC)
    corners = int(rng.integers(4, 11))
    angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    radii = rng.uniform(0.55, 1, corners)
    points = (0.5 + 0.5 * radii * (np.cos(angles), np.sin(angles))).T * image.size
    image.putalpha(_filled(image.size, (tuple(map(tuple, points.tolist())),)))
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


def _pixels(name: str) -> npt.NDArray[np.uint8]:
    """A photograph of scikit-image's."""
    with needs_extra("demo", DataError):
        import skimage.data
    pixels: npt.NDArray[np.uint8] = getattr(skimage.data, name)()
    return pixels


@functools.cache
def _photo(name: str) -> Image.Image:
    pixels = _pixels(name)
    return Image.fromarray(pixels[0] if name == "stereo_motorcycle" else pixels).convert("RGB")


@functools.cache
def _region(name: str, box: _Box) -> Image.Image:
    region = _photo(name).crop(box)
    region.thumbnail((512, 512), Image.Resampling.LANCZOS)
    return region


@functools.cache
def _cutouts(name: str) -> tuple[Image.Image, ...]:
    if name == "coin":
        return tuple(_cut("coins", (_ellipse(*coin),)) for coin in _COINS)
    if name == "horse":
        # The photo is a silhouette: one horse in plain brown, one of wood, one of stone.
        alpha = Image.fromarray(~_pixels("horse")).convert("L")
        wood, stone = (_region(*_TEXTURES[i]).resize(alpha.size) for i in (-1, 3))
        return tuple(_trimmed(fill, alpha) for fill in (Image.new("RGB", alpha.size, "#463228"), wood, stone))
    return tuple(_cut(photo, _polygons(outline)) for owner, photo, outline in _OUTLINES if owner == name)


@functools.cache
def _cut(name: str, polygons: tuple[_Polygon, ...]) -> Image.Image:
    photo = _photo(name)
    # A soft edge, drawn in by about a pixel so that no rim of the photo's own ground comes along.
    alpha = _filled(photo.size, polygons).filter(ImageFilter.GaussianBlur(1.2))
    return _trimmed(photo, alpha.point([min(max(3 * level - 434, 0), 255) for level in range(256)]))


def _trimmed(photo: Image.Image, alpha: Image.Image) -> Image.Image:
    cut = photo.copy()
    cut.putalpha(alpha)
    cut = cut.crop(alpha.getbbox())
    cut.thumbnail((256, 256), Image.Resampling.LANCZOS)
    return cut


def _filled(size: tuple[int, int], polygons: tuple[_Polygon, ...]) -> Image.Image:
    """Opacity by the even-odd rule, antialiased."""
    whole = Image.new("1", (3 * size[0], 3 * size[1]))
    for points in polygons:
        part = Image.new("1", whole.size)
        ImageDraw.Draw(part).polygon([(3 * x, 3 * y) for x, y in points], fill=1)
        whole = ImageChops.logical_xor(whole, part)
    return whole.convert("L").resize(size, Image.Resampling.BOX)


def _polygons(outline: str) -> tuple[_Polygon, ...]:
    parts = [part.split() for part in outline.split("/")]
    return tuple(tuple(tuple(map(float, point.split(","))) for point in part) for part in parts)


def _ellipse(x: float, y: float, a: float, b: float) -> _Polygon:
    turns = (2 * math.pi * step / 90 for step in range(90))
    return tuple((x + a * math.cos(turn), y + b * math.sin(turn)) for turn in turns)
