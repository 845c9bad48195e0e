"""Photos of every kind, and the transform's geometry."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import socket
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageSequence, JpegImagePlugin

import bla.data.photo
from bla.data.decoding import decoding_bytes
from bla.data.image_sets import ImageSet
from bla.data.photo import DataError, Transform, open_photo
from bla.data.sharing import Room
from bla.files import real

HALF = (0.5, 0.5, 0.5)
FLIPS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # the EXIF standard: from the sensor's rows to upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
INVERSE = {orientation: orientation for orientation in FLIPS} | {6: 8, 8: 6}


@functools.cache
def chelsea() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()).resize((90, 60))


def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, format, **options)
    return file.getvalue()


def turned(upright: np.ndarray, orientation: int, kind: str, **options: Any) -> bytes:
    """A file whose sensor lay as ``orientation`` says, and that shows ``upright``."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    sensor = np.ascontiguousarray(FLIPS[INVERSE[orientation]](upright))
    return encoded(sensor, kind, exif=exif, **options)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size, and holds a hundred bytes."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100)))):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def rgb(photo: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(photo).reshape(-1, 3).tolist()]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


# --- open_photo: kinds of files


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind, modes in {
        "PNG": "1 L LA P RGB RGBA I;16",
        "JPEG": "L RGB CMYK YCbCr",
        "GIF": "L P RGB",
        "BMP": "1 L P RGB",
        "TIFF": "1 L LA P RGB RGBA CMYK I;16 F",
        "WEBP": "RGB RGBA",
        "PPM": "1 L RGB I",
        "MPO": "RGB",
    }.items() for mode in modes.split()],
)  # fmt: skip
def test_every_mode_of_every_format_shows_the_photo(kind: str, mode: str, tmp_path: Path) -> None:
    expected = chelsea()
    if mode in ("I;16", "I", "F"):
        grey = np.asarray(expected.convert("L"))
        deep = {"I;16": grey.astype(np.uint16) * 257, "I": grey.astype(np.int32) * 257, "F": np.float32(grey / 255)}
        stored = Image.fromarray(deep[mode])
    else:
        stored = expected.convert(mode)
    if mode in ("1", "P"):  # what the fewer colours made of it
        expected = stored
    elif mode in ("L", "LA", "I;16", "I", "F"):
        expected = expected.convert("L")
    path = tmp_path / "photo"  # the content tells, not the suffix
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind in ("JPEG", "MPO") else {}
    path.write_bytes(encoded(stored, kind, **options))
    photo = open_photo(path)
    assert (photo.mode, photo.size) == ("RGB", (90, 60))
    lossy = kind in ("JPEG", "MPO") or (kind, mode) == ("GIF", "RGB")
    assert distance(np.asarray(photo), np.asarray(expected.convert("RGB"))) <= (3 if lossy else 0)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX", "RGBa", "PA"])
def test_modes_that_only_live_in_memory(mode: str) -> None:
    expected = chelsea()
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        stored = ImageCms.profileToProfile(expected, srgb, lab, outputMode="LAB")
    else:
        stored = expected.convert({"RGBa": "RGBA", "PA": "P"}.get(mode, mode)).convert(mode)
    found = np.asarray(open_photo(stored))
    assert distance(found, np.asarray(stored.convert("RGBA").convert("RGB") if mode == "PA" else expected)) < 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 32768, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 257, 32768, 65535]], np.int32), [0, 1, 128, 255]),
        (np.array([[-10, 0, 10, 90]], np.int32), [0, 26, 51, 255]),  # no nominal range holds it: stretched
        (np.array([[0, 2**31 - 1]], np.int32), [0, 255]),
        (np.array([[0, 0.2, 1]], np.float32), [0, 51, 255]),
        (np.array([[0, 51.4, 255]], np.float32), [0, 51, 255]),
        (np.array([[0, 257, 65535]], np.float32), [0, 1, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[-3, -3]], np.float32), [0, 0]),
    ],
)
def test_deep_grey_is_scaled_not_clipped(values: np.ndarray, expected: list[int]) -> None:
    for source in (Image.fromarray(values), encoded(values, "TIFF")):
        assert [red for red, _, _ in rgb(open_photo(source))] == expected


def test_pixels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="finite pixels"):
        open_photo(Image.fromarray(np.array([[0, np.nan]], np.float32)))


def test_transparency_shows_white() -> None:
    half_red, clear = (255, 127, 127), (255, 255, 255)
    rgba = np.array([[[255, 0, 0, 128], [9, 9, 9, 0], [1, 2, 3, 255]]], np.uint8)
    for source in (rgba, Image.fromarray(rgba), encoded(rgba), encoded(rgba, "WEBP", lossless=True, exact=True)):
        assert rgb(open_photo(source)) == [half_red, clear, (1, 2, 3)]
    grey = Image.new("LA", (2, 1), (0, 128))
    grey.putpixel((1, 0), (9, 0))
    assert rgb(open_photo(encoded(grey))) == [(127, 127, 127), clear]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    assert rgb(open_photo(encoded(palette, transparency=bytes([128, 0])))) == [half_red, clear]
    assert rgb(open_photo(encoded(palette, "GIF", transparency=1))) == [(255, 0, 0), clear]
    keyed = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8))
    assert rgb(open_photo(encoded(keyed, transparency=(9, 8, 7)))) == [clear, (1, 2, 3)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ("red", "blue"))
    content = encoded(first, kind, save_all=True, append_images=[second])
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(content))))) == 2
    assert distance(np.asarray(open_photo(content)), np.asarray(first)) < 3
    assert distance(Transform((8, 8), HALF, HALF).read(content).pixels, np.asarray(first)[:, :8]) < 3


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3), (2, 3, 4), (1, 1), (1, 1, 3)])
def test_arrays(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 255, np.uint8)
    array[0, 0] = 7 if len(shape) == 2 or shape[2] != 4 else (7, 7, 7, 255)
    photo = open_photo(array[:, ::-1])
    assert photo.size == (shape[1], shape[0])
    assert photo.getpixel((shape[1] - 1, 0)) == (7, 7, 7)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 3)), np.zeros((2, 3), bool), np.zeros((2, 3), np.uint16), np.zeros((3, 2, 2), np.uint8),
        np.zeros(5, np.uint8), np.zeros((1, 2, 3, 3), np.uint8), np.zeros((0, 3, 3), np.uint8),
    ],
)  # fmt: skip
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected a"):
        open_photo(array)


# --- open_photo: orientation


@pytest.mark.parametrize("orientation", FLIPS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_photos_are_upright(orientation: int, kind: str) -> None:
    upright = np.asarray(chelsea())
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    content = turned(upright, orientation, kind, **options)
    photo = open_photo(content)
    assert distance(np.asarray(photo), upright) <= (3 if kind == "JPEG" else 0)
    assert np.array_equal(np.asarray(open_photo(photo)), np.asarray(photo)), "a second opening turned it again"
    lazy = Image.open(io.BytesIO(content))
    assert np.array_equal(np.asarray(open_photo(lazy)), np.asarray(photo))
    assert np.array_equal(np.asarray(open_photo(lazy)), np.asarray(photo)), "the caller's image was changed"


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"x"])
def test_broken_metadata_leaves_the_photo_as_it_lies(exif: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        content = encoded(chelsea(), kind, exif=exif)
        assert open_photo(content).size == (90, 60)
        assert Transform((8, 8), HALF, HALF).read(content).size == (90, 60)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientations_are_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_photo(encoded(chelsea(), "JPEG", exif=exif)).size == (90, 60)


# --- open_photo: sources and refusals


class Pipe(io.RawIOBase):
    """A binary stream that cannot seek."""

    def __init__(self, content: bytes) -> None:
        self.rest = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.rest.readinto(buffer)


def test_one_photo_from_every_source(tmp_path: Path) -> None:
    content = encoded(chelsea())
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    transform = Transform((32, 32), HALF, HALF)
    expected = transform.pixels(chelsea())
    stream = io.BytesIO(content)
    stream.seek(0, os.SEEK_END)  # read by someone else before
    sources = [path, str(path), content, stream, Pipe(content), chelsea(), np.asarray(chelsea())]
    for source in sources:
        photo = transform.read(source)
        assert np.array_equal(photo.pixels, expected)
        assert (photo.size, photo.region) == ((90, 60), (0, 0, 90, 60))
    assert not stream.closed


def test_refusals_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    jpeg, png = encoded(chelsea(), "JPEG"), encoded(chelsea())
    refused: dict[str, tuple[bytes | None, str]] = {
        "missing.jpg": (None, "a file, got no such file; check the path"),
        "empty.jpg": (b"", "got an empty file"),
        "text.jpg": (b"not a photo at all", "another or a damaged file; convert"),
        "picture.eps": (encoded(chelsea(), "EPS"), "another or a damaged file"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "cannot be read .*truncated.*; replace it"),
        "half.png": (png[: len(png) // 2], "cannot be read .*; replace it"),
        "bomb.png": (png_header(60_000, 60_000), r"more than 178,956,970 pixels .*3600000000.*; scale it down"),
        "long.png": (png_header(70_000, 10), r"at most 178,956,970 pixels, 65,535 a side, got 70000 x 10; scale"),
        "large.png": (png_header(10_000, 10_000), "cannot be read"),  # within the limit, beyond Pillow's warning
    }
    for name, (content, message) in refused.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        for read in (open_photo, Transform((8, 8), HALF, HALF).read):
            with pytest.raises(DataError, match=rf"{name}: expected .*{message}"):
                read(path)
    with pytest.raises(DataError, match="got a folder; name a file in it"):
        open_photo(tmp_path)
    for source in (None, 3, ["a.jpg"]):
        with pytest.raises(DataError, match=f"expected a path, .* got {type(source).__name__}"):
            open_photo(source)  # type: ignore[arg-type]
    for source in (Image.new("RGB", (0, 5)), "nul\0.jpg", io.StringIO("text")):
        with pytest.raises(DataError, match="expected a"):
            open_photo(source)  # type: ignore[arg-type]
    closed = Image.open(tmp_path / "half.jpg")
    closed.close()
    with pytest.raises(DataError, match="cannot be read"):
        open_photo(closed)


def test_the_limit_holds_without_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match="got 60000 x 60000"):
        open_photo(png_header(60_000, 60_000))
    monkeypatch.setattr(bla.data.photo, "MAX_PIXELS", 90 * 60)
    assert open_photo(encoded(chelsea())).size == (90, 60)
    with pytest.raises(DataError, match="got 91 x 60"):
        open_photo(chelsea().resize((91, 60)))


def test_the_limit_is_where_pillow_refuses() -> None:
    assert bla.data.photo.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_pillows_warnings_stay_inside() -> None:
    palette = encoded(Image.new("P", (2, 1)), "PNG", transparency=b"\x80")
    with pytest.warns(UserWarning, match="Transparency"):
        Image.open(io.BytesIO(palette)).convert("RGB")
    metadata = encoded(chelsea(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(metadata)).getexif()
    large = png_header(10_000, 10_000)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(large))
    for content in (palette, metadata, large):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _rgb_or_data_error(content)
        assert caught == []


def test_threads_leave_the_warnings_as_they_were() -> None:
    before = list(warnings.filters)
    content = [encoded(Image.new("P", (300, 200)), "PNG", transparency=b"\x80"), encoded(chelsea(), "JPEG"), b"II*\0"]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(_rgb_or_data_error, content * 60))
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before


def _rgb_or_data_error(content: bytes) -> Image.Image | None:
    """Open and read; anything else than a photo or a DataError fails the test."""
    try:
        photo = open_photo(content)
        assert photo.mode == "RGB"
        assert Transform((4, 6), HALF, HALF).read(content).pixels.shape == (4, 6, 3)
    except DataError:
        return None
    return photo


@functools.cache
def samples() -> list[bytes]:
    small = chelsea().resize((24, 16))
    return [
        encoded(small, kind, **options)
        for kind, options in [
            ("JPEG", {"exif": turned_exif()}), ("PNG", {"exif": turned_exif()}), ("GIF", {}), ("BMP", {}),
            ("WEBP", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"exif": turned_exif()}), ("PPM", {}),
        ]
    ]  # fmt: skip


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


MAGIC = [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0", b"MM\0*", b"P6 "]


@settings(max_examples=60)
@given(st.sampled_from([b"", *MAGIC]), st.binary(max_size=200))
def test_random_bytes_open_or_are_refused(magic: bytes, rest: bytes) -> None:
    _rgb_or_data_error(magic + rest)


@settings(max_examples=60)
@given(st.data(), st.integers(0, 7))
def test_damaged_photos_open_or_are_refused(data: st.DataObject, which: int) -> None:
    content = bytearray(samples()[which])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(content), 400) - 1) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    _rgb_or_data_error(bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]))


@pytest.mark.parametrize("which", range(8))
def test_photos_cut_short_open_or_are_refused(which: int) -> None:
    content = samples()[which]
    assert _rgb_or_data_error(content)
    opened = [_rgb_or_data_error(content[:length]) for length in range(0, len(content) * 3 // 4, 7)]
    assert not any(opened), "part of the pixels passed for the photo"


# --- Transform


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (0, 224)}, r"expected size as two integers .* got \(0, 224\)"),
        ({"size": (224.5, 224)}, "expected size as two integers"),
        ({"size": 224}, "expected size as 2 finite"),
        ({"mean": (0.5, 0.5)}, "expected std as 2 finite"),
        ({"mean": (0.5, 0.5, float("nan"))}, "expected mean as 3 finite"),
        ({"std": (0.5, 0.0, 0.5)}, "expected a positive std"),
        ({"std": None}, "expected std as 3 finite"),
        ({"interpolation": "box"}, "expected interpolation one of .* got 'box'"),
        ({"mode": "pad"}, "expected mode one of .* got 'pad'"),
        ({"crop_fraction": 0}, "expected 0.01 <= crop_fraction <= 1"),
        ({"crop_fraction": 1.01}, "expected 0.01 <= crop_fraction <= 1"),
        ({"crop_fraction": "all"}, "expected crop_fraction as 1 finite"),
    ],
)
def test_transforms_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Transform(**({"size": (224, 224), "mean": HALF, "std": HALF} | changes))


transforms = st.builds(
    Transform,
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)) | st.integers(1, 70).map(lambda side: (side, side)),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 1)] * 3),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest", "lanczos"]),
    mode=st.sampled_from(["squash", "crop", "squash-crop"]),
    crop_fraction=st.floats(0.3, 1),
    source=st.text(max_size=5),
)
photo_sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=40)
@given(transforms)
def test_transforms_survive_json(transform: Transform) -> None:
    assert Transform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform


def test_foreign_dictionaries_are_refused() -> None:
    record = Transform((8, 8), HALF, HALF).to_dict()
    with pytest.raises(DataError, match=r"expected a transform, got another record: .*missing required field `std`"):
        Transform.from_dict({"sdt" if key == "std" else key: value for key, value in record.items()})
    with pytest.raises(DataError, match=r"expected a transform, got another record: .*mode"):
        Transform.from_dict(record | {"mode": ["squash"]})


def test_squash_sees_every_quadrant_and_crop_the_centre() -> None:
    quadrants = np.zeros((100, 300, 3), np.uint8)
    quadrants[:50, :150], quadrants[:50, 150:] = (255, 0, 0), (0, 255, 0)
    quadrants[50:, :150], quadrants[50:, 150:] = (0, 0, 255), (255, 255, 0)
    photo = Image.fromarray(quadrants)
    small = Transform((40, 40), HALF, HALF).pixels(photo)
    for rows in (slice(0, 18), slice(22, 40)):
        for columns in (slice(0, 18), slice(22, 40)):
            seen = small[rows, columns].reshape(-1, 3)
            assert (seen == quadrants[rows.start * 5 // 2, columns.start * 15 // 2]).all()
    marked = quadrants.copy()
    marked[:, :90], marked[:, 210:] = 255, 255  # beyond the centre square's reach
    crop = Transform((40, 40), HALF, HALF, mode="crop", crop_fraction=1)
    assert crop.region(photo.size) == (100, 0, 200, 100)
    assert np.array_equal(crop.pixels(photo), crop.pixels(Image.fromarray(marked)))
    assert crop.pixels(photo)[:18, :18].reshape(-1, 3).tolist() == [[255, 0, 0]] * 18**2


@pytest.mark.parametrize(
    ("size", "photo_size", "region"),
    [
        # 640 x 480 -> short side floor(224 / 0.875) = 256, long side floor(341.33) = 341, cut at round(58.5) = 58
        ((224, 224), (640, 480), (58 * 640 / 341, 30.0, 282 * 640 / 341, 450.0)),
        ((224, 224), (480, 640), (30.0, 58 * 640 / 341, 450.0, 282 * 640 / 341)),
        # the long side 426.67 is 426, as in timm
        ((224, 224), (500, 300), (101 * 500 / 426, 18.75, 325 * 500 / 426, 281.25)),
        # an oblong input, 70 x 140 of 80 x 160: 400 x 400 is too wide by half: 160 x 160, rows 45 to 115
        ((70, 140), (400, 400), (25.0, 112.5, 375.0, 287.5)),
    ],
)
def test_regions_by_hand(size: tuple[int, int], photo_size: tuple[int, int], region: tuple[float, ...]) -> None:
    assert Transform(size, HALF, HALF, mode="crop").region(photo_size) == pytest.approx(region, rel=1e-12)
    assert Transform(size, HALF, HALF).region(photo_size) == (0, 0, *photo_size)


def test_a_squash_and_crop_keeps_the_same_share_of_both_sides() -> None:
    """70 x 140 of 80 x 160: rows 5 to 75 of 80, columns 10 to 150 of 160, of a photo of 200 rows and 80 columns."""
    transform = Transform((70, 140), HALF, HALF, mode="squash-crop")
    assert transform.region((80, 200)) == (5.0, 12.5, 75.0, 187.5)


@settings(max_examples=40)
@given(transforms, photo_sizes)
def test_regions_lie_in_the_photo(transform: Transform, photo_size: tuple[int, int]) -> None:
    left, top, right, bottom = transform.region(photo_size)
    assert 0 <= left < right <= photo_size[0]
    assert 0 <= top < bottom <= photo_size[1]
    assert transform.pixels(Image.new("RGB", photo_size)).shape == (*transform.size, 3)


@settings(max_examples=40)
@given(transforms, photo_sizes, st.integers(0, 2**32 - 1))
def test_pixels_are_those_of_resizing_everything_and_cropping(
    transform: Transform, photo_size: tuple[int, int], seed: int
) -> None:
    """As timm does: torchvision's Resize and CenterCrop, step by step, on a smooth photo."""
    corners = np.random.default_rng(seed).integers(60, 190, (2, 2, 3)).astype(np.uint8)
    photo = Image.fromarray(corners).resize(photo_size, Image.Resampling.BILINEAR)
    height, width = transform.size
    if transform.mode == "squash":
        whole = (width, height)
    elif transform.mode == "squash-crop":
        whole = (int(width / transform.crop_fraction), int(height / transform.crop_fraction))
    elif height == width:
        short, scaled = min(photo_size), int(height / transform.crop_fraction)
        whole = tuple(scaled if side == short else int(scaled * side / short) for side in photo_size)
    else:
        ratio = min(
            photo_size[0] / int(width / transform.crop_fraction), photo_size[1] / int(height / transform.crop_fraction)
        )
        whole = tuple(round(side / ratio) for side in photo_size)
    left, top = round((whole[0] - width) / 2), round((whole[1] - height) / 2)
    resized = photo.resize(whole, Image.Resampling[transform.interpolation.upper()])
    expected = np.asarray(resized.crop((left, top, left + width, top + height)))
    found = transform.pixels(photo)
    if transform.interpolation == "nearest":  # a tie between two pixels may go either way
        assert (np.abs(found.astype(int) - expected) > 1).mean() <= 0.5
    else:
        assert np.abs(found.astype(int) - expected).max() <= 2


def test_pixels_takes_only_what_open_photo_gives() -> None:
    with pytest.raises(DataError, match="mode RGB and an input of 3 channels, got L"):
        Transform((8, 8), HALF, HALF).pixels(Image.new("L", (9, 9)))


# --- Transform.read: reduced decoding


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes at which JPEGs are decoded."""
    sizes: list[tuple[int, int]] = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(self: Any, mode: str, size: tuple[int, int]) -> Any:
        result = draft(self, mode, size)
        sizes.append(self.size)
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    return sizes


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("orientation", FLIPS)
def test_reduced_decoding_keeps_place_and_orientation(
    orientation: int, mode: Any, tmp_path: Path, decoded: list[tuple[int, int]]
) -> None:
    upright = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((401, 265)))
    content = turned(upright, orientation, "JPEG", quality=95)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    transform = Transform((16, 24), HALF, HALF, mode=mode)
    photo = transform.read(path)
    reduced = (51, 34) if mode == "squash" else (101, 67)  # an eighth; a quarter, as less of the photo is used
    assert decoded == [reduced if orientation < 5 else reduced[::-1]]
    assert photo.size == (401, 265)
    assert photo.region == transform.region((401, 265))
    assert distance(photo.pixels, transform.pixels(open_photo(path))) < 1.5
    assert np.array_equal(photo.pixels, transform.read(content).pixels)


@pytest.mark.parametrize("orientation", FLIPS)
def test_reduced_decoding_keeps_the_last_part_of_a_pixel(orientation: int) -> None:
    """65 x 73 at an eighth is 8.125 x 9.125, stored in 9 x 10: taken for whole, the ramps shift by a tenth."""
    down, across = np.mgrid[0:73, 0:65]
    ramps = np.stack([across * 3, down * 3, 0 * down], axis=-1).astype(np.uint8)
    transform = Transform((4, 4), HALF, HALF, "bilinear")
    for upright in (ramps, ramps.swapaxes(0, 1)):
        content = turned(np.ascontiguousarray(upright), orientation, "JPEG", quality=100, subsampling=0)
        found, full = transform.read(content), transform.pixels(open_photo(content))
        assert np.abs(found.pixels.astype(int) - full).max() <= 6


@given(transforms, st.tuples(st.integers(1, 700), st.integers(1, 700)), st.sampled_from([1, 6]))
@settings(max_examples=25)
def test_reduced_decoding_leaves_twice_what_is_needed(
    transform: Transform, photo_size: tuple[int, int], orientation: int
) -> None:
    content = turned(np.zeros((photo_size[1], photo_size[0], 3), np.uint8), orientation, "JPEG")
    with pytest.MonkeyPatch.context() as patch:
        seen: list[tuple[int, int]] = []
        load = JpegImagePlugin.JpegImageFile.load_prepare
        patch.setattr(JpegImagePlugin.JpegImageFile, "load_prepare", lambda self: (seen.append(self.size), load(self)))
        found = transform.read(content)
    width, height = seen[0] if orientation == 1 else seen[0][::-1]
    left, top, right, bottom = found.region
    if (width, height) != photo_size:
        assert width * (right - left) / photo_size[0] >= 2 * transform.size[1] - 1e-9
        assert height * (bottom - top) / photo_size[1] >= 2 * transform.size[0] - 1e-9
        assert transform.interpolation != "nearest"


def test_nearest_reads_in_full(decoded: list[tuple[int, int]]) -> None:
    content = encoded(chelsea().resize((720, 480)), "JPEG")
    transform = Transform((24, 24), HALF, HALF, "nearest")
    assert np.array_equal(transform.read(content).pixels, transform.pixels(open_photo(content)))
    assert decoded == []


def test_a_large_photo(decoded: list[tuple[int, int]]) -> None:
    large = Image.fromarray(skimage.data.coffee()).resize((3000, 2000), Image.Resampling.BILINEAR)
    content = encoded(large, "JPEG")
    transform = Transform((112, 112), HALF, HALF, mode="crop")
    photo = transform.read(content)
    assert decoded == [(750, 500)]
    assert (photo.size, photo.region) == ((3000, 2000), (625, 125, 2375, 1875))
    assert distance(photo.pixels, transform.pixels(large)) < 1


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("photo_size", [(1, 1), (1, 4000), (4000, 1), (2, 3)])
def test_tiny_and_narrow_photos(mode: Any, photo_size: tuple[int, int]) -> None:
    for kind in ("PNG", "JPEG"):
        content = encoded(Image.new("RGB", photo_size, (8, 8, 8)), kind)
        assert (Transform((16, 16), HALF, HALF, mode=mode).read(content).pixels == 8).all()


def test_every_kind_of_jpeg_is_reduced(decoded: list[tuple[int, int]]) -> None:
    photo = chelsea().resize((720, 480))
    transform = Transform((24, 24), HALF, HALF)
    pair = {"format": "MPO", "save_all": True, "append_images": [photo]}
    for mode, options in (("CMYK", {}), ("L", {}), ("RGB", pair)):
        found = transform.read(encoded(photo.convert(mode), **{"format": "JPEG", "quality": 95} | options))
        assert distance(found.pixels, transform.pixels(photo.convert(mode).convert("RGB"))) < 3
    assert decoded == [(90, 60)] * 3


@pytest.mark.parametrize("mode", ["squash", "crop", "squash-crop"])
@pytest.mark.parametrize("size", [(12, 12), (9, 14)])
def test_a_framed_input_comes_back_unchanged(mode: Any, size: tuple[int, int]) -> None:
    transform = Transform(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), mode=mode, crop_fraction=0.7)
    photos = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    framed = transform.framed(photos)
    assert (framed.shape == photos.shape) == (mode == "squash")
    for photo, inside in zip(photos, framed, strict=True):
        assert np.array_equal(transform.pixels(Image.fromarray(inside)), photo)


@pytest.mark.parametrize("kind", ["pipe.jpg", "/dev/zero", "/dev/null", "socket.png", "loop.png"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "pipe.jpg":
        os.mkfifo(path)
    elif kind == "socket.png":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "loop.png":
        path.symlink_to(path)
    with pytest.raises(DataError, match=r"got one that cannot be read \(OSError: .*(pipe or a device|symbolic links)"):
        open_photo(path)
    assert ImageSet(tmp_path, (kind,), None, ()).digest() == ImageSet(tmp_path, (kind,), None, ()).digest()
    assert real(path).name == path.name


BOMB = base64.b64decode("UklGRhoAAABXRUJQVlA4TA0AAAAvnpvnFgcQERGIiP4HAA==")  # 34 bytes, 50 million pixels


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "I;16", {}), ("TIFF", "F", {}), ("GIF", "P", {}),
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("BMP", "L", {}), ("JPEG", "CMYK", {}),
    ],
)  # fmt: skip
def test_photos_decoded_at_once_share_the_memory(
    form: str, mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    Image.new(mode, (300, 200)).save(file, form, **options)
    room = Room(3_000_000)
    monkeypatch.setattr(bla.data.photo, "DECODING", room)
    free: list[int] = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: free.append(room.free) or load(image))
    transform = Transform((8, 8), HALF, HALF, "nearest")
    with ThreadPoolExecutor(8) as pool:
        photos = list(pool.map(lambda _: transform.read(file.getvalue()).size, range(16)))
    assert photos == [(300, 200)] * 16
    assert 0 <= min(free) < room.free == room.most
    monkeypatch.setattr(bla.data.photo, "DECODING", Room(500_000))
    with pytest.raises(DataError, match=r"expected a photo that is decoded in 0 MiB, got one of 300 x 200 as"):
        open_photo(file.getvalue())


def test_a_bomb_is_weighed_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(DataError, match="got 7071 x 7071; scale it down"):
        Transform((8, 8), HALF, HALF).read(BOMB, most_pixels=10_000_000)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "I;16", "I", "F"])
def test_strips_give_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (37, 29, 4), np.uint8)
    photo = Image.fromarray(values[:, :, 0]) if mode in ("I", "F") else Image.fromarray(values)
    photo = Image.fromarray(values[:, :, 0].astype(np.uint16) * 200) if mode == "I;16" else photo.convert(
        {"PA": "LA"}.get(mode, mode)).convert(mode)  # fmt: skip
    whole = np.asarray(open_photo(photo))
    monkeypatch.setattr(bla.data.photo, "STRIP", 29 * 5)
    assert np.array_equal(np.asarray(open_photo(photo)), whole)


def scanned(times: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    file = io.BytesIO()
    Image.new("L", (64, 48), 90).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * times + b"\xff\xd9"


PARTS = {
    "empty parts of a PNG": b"\x89PNG\r\n\x1a\n" + (b"\0\0\0\0teSt" + struct.pack(">I", zlib.crc32(b"teSt"))) * 9_000,
    "parts of a JPEG": b"\xff\xd8" + b"\xff\xfe\0\2" * 9_000,
    "comments of a GIF": b"GIF89a\1\0\1\0\0\0\0\x21\xfe" + (b"\x64" + b"c" * 100) * 9_000,
    "comments of a PGM": b"P5\n" + b"#\n" * 9_000 + b"1 1\n255\n0",
    "white space of a PBM": b"P4 " + b" " * 19_000 + b"1 1\n0",
}


@pytest.mark.parametrize("content", PARTS.values(), ids=PARTS)
def test_a_file_of_thousands_of_tiny_parts_is_refused_at_once(content: bytes) -> None:
    assert decoding_bytes(content) == 0
    with pytest.raises(DataError, match="thousands of tiny parts"):
        open_photo(content)


def test_a_jpeg_has_few_scans_and_takes_the_memory_of_all_its_pixels() -> None:
    file = io.BytesIO()
    Image.new("L", (64, 48)).save(file, "JPEG")
    assert decoding_bytes(file.getvalue()) * 16 == decoding_bytes(file.getvalue(), whole=True) == 12 * 64 * 48
    assert decoding_bytes(scanned(0)) == 12 * 64 * 48, "libjpeg keeps them until the last scan"
    assert open_photo(scanned(50)).getpixel((1, 1)) == (90, 90, 90)
    assert decoding_bytes(scanned(100)) == 0
    with pytest.raises(DataError, match="at most 100 scans, got 106"):
        open_photo(scanned(100))


def test_files_that_pillow_reads_byte_by_byte_are_read() -> None:
    deep = b"P6\n100 100\n65535\n" + bytes(range(60)) * 1000
    assert open_photo(deep).size == (100, 100)
    runs = (b"\1\7" * 100 + b"\0\0") * 80
    head = struct.pack("<IiiHHIIiiII", 40, 100, 80, 1, 8, 1, len(runs), 0, 0, 256, 0) + bytes(range(8)) * 128
    packed = b"BM" + struct.pack("<IHHI", 14 + len(head) + len(runs), 0, 0, 14 + len(head)) + head + runs
    assert open_photo(packed).size == (100, 80)


@pytest.mark.parametrize(("kind", "highest"), [("u2", 4080), ("i4", 4080), ("f4", 4080), ("i4", 70_000), ("f4", 5e5)])
def test_deep_photos_whose_range_would_be_a_guess_are_not_classified(kind: str, highest: float, tmp_path: Path) -> None:
    values = np.linspace(0, highest, 48).reshape(6, 8).astype(kind)
    Image.fromarray(values).save(tmp_path / "x.tif")
    half = (0.5, 0.5, 0.5)
    with pytest.raises(DataError, match=f"x.tif: expected a stated range .* from 0 to {highest:g}: .*value_range"):
        Transform((3, 4), half, half).read(tmp_path / "x.tif")
    ranged = Transform((3, 4), half, half, value_range=(0, highest))
    assert ranged.read(tmp_path / "x.tif").pixels.mean() == pytest.approx(127.5, abs=1)
