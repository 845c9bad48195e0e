"""Arrays of any number of channels: where those lie, what range their values have, and what a picture shows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bla.data.arrays import is_one, picture
from bla.data.photo import DataError, Photo, Transform, keep

RANDOM = np.random.default_rng(0)


def transform(channels: int, **options: Any) -> Transform:
    return Transform((12, 20), (0.4,) * channels, (0.2,) * channels, "bilinear", **options)


def encoded(photo: Image.Image, kind: str = "PNG") -> bytes:
    photo.save(stream := io.BytesIO(), kind)
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 11])
@pytest.mark.parametrize(
    ("dtype", "value_range"),
    [(np.uint8, None), (np.uint16, None), (np.uint16, (0, 4095)), (np.int16, (-1000, 3000)), (np.float32, (0, 1)),
     (np.float64, (-1, 1)), (np.float16, (0, 4))],
)  # fmt: skip
def test_levels_are_exact_wherever_the_channels_lie(
    channels: int, dtype: type[Any], value_range: tuple[float, float] | None
) -> None:
    view = transform(channels, value_range=value_range)
    low, high = value_range or (0, np.iinfo(dtype).max)
    array = (low + (high - low) * RANDOM.random((12, 20, channels))).astype(dtype)
    expected = 255 * (array.astype(np.float64) - low) / (high - low)
    found = view.read(array)
    assert (found.size, found.region, found.pixels.shape) == ((20, 12), (0, 0, 20, 12), (12, 20, channels))
    np.testing.assert_allclose(found.pixels, expected, atol=1e-4)
    np.testing.assert_array_equal(view.read(np.moveaxis(array, -1, 0)).pixels, found.pixels)
    if channels == 1:
        np.testing.assert_array_equal(view.read(array[..., 0]).pixels, found.pixels)


def test_an_array_is_resized_and_cropped_as_a_photo_is(tmp_path: Path) -> None:
    photo = RANDOM.integers(0, 256, (61, 47, 3), np.uint8)
    for mode in ("squash", "crop", "squash-crop"):
        three = transform(3, mode=mode, value_range=(0, 255))
        six = Transform(three.size, three.mean * 2, three.std * 2, "bilinear", mode=mode)
        expected = three.read(photo)
        found = six.read(np.concatenate([photo, photo[:, :, ::-1]], axis=-1))
        np.testing.assert_array_equal(found.pixels[..., :3], expected.pixels)
        np.testing.assert_array_equal(found.pixels[..., 3:], expected.pixels[..., ::-1])
        assert found.region == expected.region
        fine = three.read(photo.astype(np.float32)).pixels
        assert 0 < np.abs(fine - expected.pixels).max() <= 1, "floats are not rounded"
    np.save(tmp_path / "a.npy", photo)
    np.testing.assert_array_equal(three.read(tmp_path / "a.npy").pixels, expected.pixels)
    keep(Photo(fine, (20, 12), (0, 0, 20, 12)), tmp_path / "kept.npz")
    np.testing.assert_array_equal(three.read(tmp_path / "kept.npz").pixels, fine)


def test_grey_photos_keep_their_depth() -> None:
    deep = RANDOM.integers(0, 4096, (12, 20), np.uint16)
    one = transform(1, value_range=(0, 4095))
    for source in (Image.fromarray(deep), encoded(Image.fromarray(deep)), encoded(Image.fromarray(deep), "TIFF"), deep):
        np.testing.assert_allclose(one.read(source).pixels[..., 0], deep / 4095 * 255, atol=1e-4)
    colours = Image.fromarray(RANDOM.integers(0, 256, (12, 20, 3), np.uint8))
    for colour in (colours, encoded(colours), np.asarray(colours)):
        np.testing.assert_array_equal(one.read(colour).pixels[..., 0], np.asarray(colours.convert("L")))
    assert np.ptp(transform(3, value_range=(0, 4095)).read(deep).pixels, axis=-1).max() == 0
    clear = Image.fromarray(RANDOM.integers(0, 256, (12, 20, 4), np.uint8))
    np.testing.assert_array_equal(transform(4).read(clear).pixels, np.asarray(clear))


@pytest.mark.parametrize(
    ("array", "channels", "value_range", "message"),
    [
        (np.zeros((9, 9)), 3, None, r"expected a stated range .* float64 from 0 to 0: bla.Transform\(..., value_range"),
        (np.full((9, 9), 4000, np.uint16), 1, None, r"stated range .* uint16 from 4000 to 4000: .* for 12 bits"),
        (np.full((9, 9), -2.0), 1, (0, 1), r"expected values from 0 to 1, got float64 from -2 to -2: clip them"),
        (np.full((9, 9), np.nan), 1, (0, 1), "expected finite pixels, got NaN"),
        (np.zeros((9, 9, 5)), 4, (0, 1), r"shape \(h, w, 4\) or \(4, h, w\), got \(9, 9, 5\); transpose it, or pick"),
        (np.zeros((9, 9, 3), np.float32), 1, (0, 1), r"of shape \(h, w\) or \(h, w, 1\) or \(1, h, w\), got"),
        (np.zeros((9, 9), bool), 1, None, "expected numbers as pixels, got bool"),
        (Image.new("RGB", (9, 9)), 11, None, "expected an array of 11 channels, got a photo; pass a NumPy array"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(array: Any, channels: int, value_range: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        transform(channels, value_range=value_range).read(array)


def test_one_image_or_several() -> None:
    assert is_one((28, 28, 1), 2, 1)
    assert is_one((28, 28, 3), 2, 1), "colours, which become grey"
    assert not is_one((7, 3, 12, 20), 2, 3)
    assert not is_one((2, 12, 20), 2, 1)


def test_a_picture_says_what_it_shows() -> None:
    photo = RANDOM.integers(0, 256, (9, 9, 3), np.uint8)
    assert picture(photo)[1] == ""
    np.testing.assert_array_equal(picture(photo)[0], photo)
    shown, said = picture(np.concatenate([photo, photo], axis=-1).astype(np.float32) / 50)
    assert (shown.mode, said) == ("RGB", "channels 1 to 3 of 6, contrast stretched")
    assert np.asarray(shown).max() == 255
    assert picture(photo[..., :2])[1] == "channel 1 of 2"


def test_a_range_is_lowest_first() -> None:
    with pytest.raises(DataError, match=r"expected value_range as \(lowest, highest\), got \(1, 0\)"):
        transform(1, value_range=(1, 0))
    stated = transform(1, value_range=(0, 4095))
    assert Transform.from_dict(stated.to_dict()) == stated


@pytest.mark.parametrize("kind", ["AVIF"])
def test_photos_of_phones_are_read_where_pillow_reads_them(kind: str) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    found = transform(3).read(encoded(photo, kind)).pixels
    assert np.abs(found.astype(int) - transform(3).read(photo).pixels).max() < 8
    with pytest.raises(DataError, match="for HEIC, register pillow-heif first"):
        transform(3).read(b"\0\0\0\x18ftypheic" + bytes(90))
