"""Photos from any source, and how they become a classifier's input."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from bla.data.arrays import TWELVE_BITS, DataError, Levels, as_levels, picture, range_wanted, resized
from bla.data.decoding import BYTES, FORMATS, MAX_SCANS, Bounded, formats_of, scans_of, webp_size
from bla.data.sharing import PILLOW_QUIET, Room
from bla.files import opened, typed

__all__ = ["Box", "DataError", "Photo", "PhotoSource", "Transform", "open_photo"]

PhotoSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[Any]
Box = tuple[float, ...]
"""Left, top, right, bottom; of volumes left, top, front, right, bottom, back."""
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
Mode = Literal["squash", "crop", "squash-crop"]

# Twice Pillow's default limit, where Pillow refuses by itself: 0.7 GB decoded. The longest side is the most
# that a JPEG can declare: a photo of 1 x 100,000,000 would be small, and its resizing would not.
MAX_PIXELS = 178_956_970
MAX_SIDE = 65_535
STRIP = 2**20
MAX_INPUT = 8192
"""The longest side of a classifier's input."""
DEEP = ("F", "I", "I;16", "I;16B", "I;16L")
"""Pillow's modes of grey with more than 8 bits."""
DECODING = Room(2**31)
"""The memory in which a process decodes photos, however many at once."""
Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]  # larger than what malloc keeps for itself when an image is freed


def open_photo(source: PhotoSource) -> Image.Image:
    """Open a photo upright and in RGB, as a new image without metadata: opening it again changes nothing.

    The EXIF orientation is applied. Transparency is composited on white. Of an animation the first frame counts.
    16-bit grey is scaled by 255/65535; wider integers and floats by the smallest of the ranges [0, 1] (floats
    only), [0, 255] (floats only), [0, 65535] that holds all values, else from their minimum to their maximum.
    Colour profiles are not applied: classifiers are trained without.

    Parameters
    ----------
    source: a path, a file's content, an open binary file (read from its start, left open), a Pillow image (left
        as it is), or a uint8 array of shape ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)`` or ``(H, W, 4)``.

    A DataError if there is no whole photo in one of :data:`FORMATS`, or one of more than :data:`MAX_PIXELS` pixels or
    :data:`MAX_SIDE` a side.

    >>> photo = open_photo(np.full((2, 3), 7, np.uint8))
    >>> photo.mode, photo.size, photo.getpixel((2, 1))
    ('RGB', (3, 2), (7, 7, 7))
    """
    with contextlib.ExitStack() as held:
        return open_upright(source, held).photo


class _Upright(NamedTuple):
    photo: Image.Image  # perhaps reduced: pixel (x, y) of the whole lies at origin + (x, y) / scale
    size: tuple[int, int]  # (width, height) of the whole photo
    scale: int = 1
    origin: tuple[float, float] = (0.0, 0.0)


def open_upright(
    source: PhotoSource,
    held: contextlib.ExitStack,
    goal: Transform | None = None,
    name: str | None = None,
    most_pixels: int | None = None,
) -> _Upright:
    """Open a photo in RGB, or as a goal takes it; its share of :data:`DECODING` is taken until ``held`` is closed."""
    name = name or _name(source)
    try:
        with PILLOW_QUIET, contextlib.ExitStack() as files:
            if isinstance(source, np.ndarray):
                source = _from_array(source)
            if isinstance(source, Image.Image):
                source = source.copy()  # loading would change the caller's image
                return _decode(name, source, held, goal, most_pixels)
            if isinstance(source, str | os.PathLike):
                source = files.enter_context(opened(source))
            elif not isinstance(source, bytes) and not source.seekable():
                source = source.read()
            file = Bounded(io.BytesIO(source) if isinstance(source, bytes) else source, name)
            file.seek(0)
            if not (head := file.read(30)):
                raise DataError(f"{name}: expected a photo, got an empty file; fetch it again")
            if (size := webp_size(head)) is not None:  # opening allocates already
                _take(name, size, "WEBP", held, most_pixels)
            photo = Image.open(file, formats=formats_of(head))
            if photo.format in ("BMP", "PPM"):  # which Pillow reads byte by byte, some of them
                file.unbounded()
            return _decode(name, photo, held, goal, most_pixels)
    except DataError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        what = "a file" if isinstance(error, FileNotFoundError) else f"a whole photo ({', '.join(FORMATS)})"
        raise DataError(f"{name}: expected {what}, got {_got(error)}") from error


def _got(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "no such file; check the path"
        case IsADirectoryError():
            return "a folder; name a file in it"
        case UnidentifiedImageError():
            return "another or a damaged file; convert it to PNG, replace it, or, for HEIC, register pillow-heif first"
        case Image.DecompressionBombError():
            return f"one of more than {MAX_PIXELS:,} pixels ({error}); scale it down"
    return f"one that cannot be read ({type(error).__name__}: {error}); replace it"


def _check_size(name: str, size: tuple[int, int], most_pixels: int | None) -> None:
    width, height = size
    if min(size) < 1:
        raise DataError(f"{name}: expected a photo, got an image of {width} x {height} pixels; replace it")
    most_pixels = min(most_pixels or MAX_PIXELS, MAX_PIXELS)
    if width * height > most_pixels or max(size) > MAX_SIDE:
        raise DataError(
            f"{name}: expected at most {most_pixels:,} pixels, {MAX_SIDE:,} a side, "
            f"got {width} x {height}; scale it down"
        )


def _take(name: str, size: tuple[int, int], kind: str, held: contextlib.ExitStack, most_pixels: int | None) -> None:
    """Wait for the memory to decode a photo of a size, and hold it."""
    _check_size(name, size, most_pixels)
    needed = BYTES.get(kind, 12) * size[0] * size[1]
    if needed > DECODING.most:
        raise DataError(
            f"{name}: expected a photo that is decoded in {DECODING.most // 2**20:,} MiB, got one of {size[0]} x "
            f"{size[1]} as {kind}, which takes {needed // 2**20:,}; scale it down, or convert it to JPEG"
        )
    held.enter_context(DECODING.taken(needed))


def _decode(
    name: str, photo: Image.Image, held: contextlib.ExitStack, goal: Transform | None, most_pixels: int | None
) -> _Upright:
    whole = width, height = photo.size
    _check_size(name, whole, most_pixels)
    if (scans := scans_of(photo)) > MAX_SCANS:
        raise DataError(f"{name}: expected a JPEG of at most {MAX_SCANS} scans, got {scans}; save it anew")
    drafted = None
    if goal is not None and goal.interpolation != "nearest" and photo.format in ("JPEG", "MPO"):
        turned = _orientation(photo) >= 5
        wanted = goal._whole((height, width) if turned else (width, height))
        # libjpeg reduces by 2, 4 or 8 while it decodes; the other half is left to the antialiased resize
        drafted = photo.draft("RGB", (2 * wanted[turned], 2 * wanted[not turned]))
    if photo.format != "WEBP":
        # of a draft, which is smaller, unless libjpeg keeps the whole until the last scan
        _take(name, photo.size if scans == 1 else whole, str(photo.format), held, most_pixels)
    photo.load()
    orientation = _orientation(photo)  # some formats know it only now; TIFF has been turned while loading
    if orientation != 1:
        photo = photo.transpose(_TURNS[orientation])
    rgb = photo.copy() if goal is not None and goal._takes_deep(photo) else _to_rgb(name, photo, goal is not None)
    if goal is not None and rgb.mode == "RGB":
        rgb = goal._coloured(name, photo, rgb)
    rgb.info = {}  # else a second opening would turn it again
    if drafted is None:
        return _Upright(rgb, rgb.size)
    scale = round(width / drafted[1][2])
    if orientation >= 5:
        width, height = height, width
    # Where scale does not divide the size, the last row and column hold less than a pixel; turning moves them.
    left = rgb.width - width / scale if orientation in (2, 3, 6, 7) else 0.0
    top = rgb.height - height / scale if orientation in (3, 4, 7, 8) else 0.0
    return _Upright(rgb, (width, height), scale, (left, top))


_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), start=2))  # fmt: skip


def _orientation(photo: Image.Image) -> int:
    with contextlib.suppress(Exception):  # broken metadata is no reason to refuse whole pixels
        value = photo.getexif().get(ExifTags.Base.Orientation)
        return int(value) if value in _TURNS else 1
    return 1


def _to_rgb(name: str, photo: Image.Image, classified: bool) -> Image.Image:
    """In 8 bits, as :func:`open_photo` says; of a range that is a guess, a classifier gets none."""
    if photo.mode in DEEP:  # Pillow would clip them
        extremes = [_extremes(name, strip) for strip, _ in _strips(photo)]
        low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
        limits = (1.0, 255.0, 65535.0) if photo.mode == "F" else (65535.0,)
        limit = next((limit for limit in limits if low >= 0 and high <= limit), None)
        if classified and (limit is None or (limit == 65535 and 0 < high <= TWELVE_BITS)):
            raise DataError(f"{name}: {range_wanted(f'mode {photo.mode} from {low:g} to {high:g}')}")
        if limit is not None:
            low, high = 0.0, limit

        def changed(strip: Image.Image) -> Image.Image:
            scaled = (np.asarray(strip).astype(np.float64) - low) * (255.0 / (high - low or 1.0))
            return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")

    elif photo.has_transparency_data:

        def changed(strip: Image.Image) -> Image.Image:
            white = Image.new("RGBA", strip.size, "white")
            return Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB")

    else:
        return photo if photo.mode == "RGB" else photo.convert("RGB")
    rgb = Image.new("RGB", photo.size)
    for strip, top in _strips(photo):
        rgb.paste(changed(strip), (0, top))
    return rgb


def _strips(photo: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Strips of at most :data:`STRIP` pixels, or a row, and where they begin: work on them takes little memory."""
    rows = max(1, STRIP // photo.width)
    for top in range(0, photo.height, rows):
        yield photo.crop((0, top, photo.width, min(photo.height, top + rows))), top


def _extremes(name: str, strip: Image.Image) -> tuple[float, float]:
    values = np.asarray(strip).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{name}: expected finite pixels, got NaN or infinity; replace them")
    return values.min(), values.max()


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    depth = array.shape[2:]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or depth not in ((), (1,), (3,), (4,)):
        raise DataError(
            "expected a uint8 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {array.dtype} {array.shape}; scale to 0..255, convert with astype('uint8'), colours last"
        )
    return Image.fromarray(array[:, :, 0] if depth == (1,) else array)


def _name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return str(os.fspath(source))
    if isinstance(source, bytes):
        return f"a file of {len(source)} bytes"
    if isinstance(source, Image.Image | np.ndarray):
        return "an image in memory"
    if not hasattr(source, "read"):
        raise DataError(
            f"expected a path, bytes, an open file, a Pillow image or a NumPy array, got {type(source).__name__}"
        )
    return str(getattr(source, "name", "an open file"))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Photo:
    """A photo as the classifier's input, before normalisation: the levels of its ``pixels`` ``(*sides, C)``, 0 to 255.

    They cover the ``region`` (left, top, right, bottom) of the upright photo of ``size`` (width, height), which is
    kept as ``upright`` if it came as an image in memory; of a volume its levels. ``shown``: what that shows where it is
    not the photo itself.
    """

    pixels: Levels
    size: tuple[int, ...]
    region: Box
    upright: Image.Image | Levels | None = None
    shown: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Transform:
    """How a photo becomes a classifier's input: resized with antialiasing, then ``(x / 255 - mean) / std``.

    ``squash`` resizes the whole photo to ``size``: nothing goes unseen, the aspect ratio is lost. ``crop`` keeps
    the aspect ratio, resizes the short side to ``floor(size / crop_fraction)`` and takes the centre, to the pixel
    where timm takes it. ``squash-crop`` resizes the whole photo to ``floor(size / crop_fraction)`` and takes the
    centre. A field outside its range raises a DataError.

    Attributes
    ----------
    size: ``(height, width)`` of the input; of volumes ``(depth, height, width)``, which come as arrays.
    mean, std: of each channel, which runs from 0 to 1: of the colours red, green, blue; of one, grey; or of as many
        as an array has.
    source: where the fields came from, such as "timm" or "assumed".
    value_range: the values of arrays, other than uint8, that count as 0 and 1; (0, 65535) of uint16 by default.

    >>> half = (0.5, 0.5, 0.5)
    >>> crop = Transform((224, 224), half, half, mode="crop")
    >>> crop.region((512, 256))
    (144.0, 16.0, 368.0, 240.0)
    >>> crop.read(np.full((256, 512, 3), 255, np.uint8)).pixels.shape
    (224, 224, 3)
    >>> Transform.from_dict(crop.to_dict()) == crop
    True
    >>> xray = Transform((64, 64), (0.5,), (0.5,), value_range=(0, 4095))
    >>> xray.read(np.full((300, 200), 4095, np.uint16)).pixels[0, 0]
    array([255.], dtype=float32)
    """

    size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    mode: Mode = "squash"
    crop_fraction: float = 0.875
    source: str = ""
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        volume = isinstance(self.size, Sequence) and len(self.size) == 3
        size = _numbers("size", self.size, 3 if volume else 2)
        if not all(1 <= side <= MAX_INPUT and side == int(side) for side in size):
            raise DataError(f"expected size as two integers (height, width) from 1 to {MAX_INPUT}, got {self.size}")
        if volume and self.mode != "squash":
            raise DataError(f"expected mode squash for volumes, got {self.mode!r}: cut the arrays yourself")
        object.__setattr__(self, "size", tuple(map(int, size)))
        channels = len(self.mean) if isinstance(self.mean, Sequence) else 3
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), channels))
        if not channels or min(self.std) <= 0:
            raise DataError(f"expected a positive std, got {self.std}")
        for name, allowed in (("interpolation", get_args(Interpolation)), ("mode", get_args(Mode))):
            if getattr(self, name) not in allowed:
                raise DataError(f"expected {name} one of {allowed}, got {getattr(self, name)!r}")
        (fraction,) = _numbers("crop_fraction", (self.crop_fraction,), 1)
        if not 0.01 <= fraction <= 1:
            raise DataError(f"expected 0.01 <= crop_fraction <= 1, got {fraction}")
        if self.value_range is not None:
            low, high = _numbers("value_range", self.value_range, 2)
            if not low < high:
                raise DataError(f"expected value_range as (lowest, highest), got {self.value_range}")
            object.__setattr__(self, "value_range", (low, high))

    @property
    def channels(self) -> int:
        """C, of the input."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, height, width), of a normalised input."""
        return (self.channels, *self.size)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of some inputs: of one, as they are all alike, unless code makes them as large as the photo is."""
        return (self.shape,)

    def admits(self, shape: Sequence[int]) -> bool:
        """Whether a normalised input may have this shape."""
        alike = len(self.shapes) == 1
        return tuple(shape) == self.shape if alike else (len(shape), shape[0]) == (len(self.shape), self.channels)

    def pixels(self, photo: Image.Image) -> npt.NDArray[np.uint8]:
        """The input's pixels, uint8 ``(H, W, 3)``, of an upright RGB photo as :func:`open_photo` gives it."""
        if photo.mode != "RGB" or self.channels != 3:
            raise DataError(
                f"expected a photo of mode RGB and an input of 3 channels, got {photo.mode} and {self.channels}; pass "
                "it through open_photo"
            )
        return self._resized(_Upright(photo, photo.size))

    def read(self, source: PhotoSource | Photo, *, name: str | None = None, most_pixels: int | None = None) -> Photo:
        """Open and resize in one go.

        Like ``pixels(open_photo(source))``, but a large JPEG file is decoded at a half, a quarter or an eighth, at
        least twice as large as needed: many times faster, and nearly the same pixels. ``nearest`` reads in full.
        Arrays may have their channels first or last, as many as ``mean``; so may those in a ``.npy`` file.
        Errors, those of :func:`open_photo`, begin with ``name``, by default the path or the kind of the source.
        ``most_pixels``, below :data:`MAX_PIXELS`, is checked before any pixel is decoded.
        """
        if isinstance(source, Photo):
            return source
        if np.ma.is_masked(source):
            raise DataError("expected an array without masked pixels, got one with some; fill them: array.filled(0)")
        with contextlib.ExitStack() as held:
            return self._read(source, held, name, most_pixels)

    def _read(
        self, source: PhotoSource, held: contextlib.ExitStack, name: str | None, most_pixels: int | None
    ) -> Photo:
        if isinstance(source, str | os.PathLike) and os.fspath(source).endswith((".npy", ".npz")):
            name = name or os.fspath(source)
            stored = self._stored(source)
            if isinstance(stored, Photo):
                return stored
            source = stored
        if not isinstance(source, np.ndarray) or self._is_photo(source):
            upright = open_upright(source, held, self, name, most_pixels)
            if upright.photo.mode in ("RGB", "L"):
                kept = upright.photo if isinstance(source, Image.Image | np.ndarray) else None
                return Photo(self._resized(upright), upright.size, self.region(upright.size), kept)
            name, source = name or _name(source), np.asarray(upright.photo)
        return self._of_array(name, source, most_pixels)

    def _stored(self, path: str | os.PathLike[str]) -> npt.NDArray[Any] | Photo:
        """The array of a file, or the input that :func:`keep` wrote."""
        try:
            with opened(path) as file:
                found = np.load(file, allow_pickle=False)
                return found if isinstance(found, np.ndarray) else _kept(found["pixels"])
        except Exception as error:  # a broken file makes NumPy raise nearly anything
            raise DataError(f"{os.fspath(path)}: expected an array that NumPy saved, got {_got(error)}") from error

    def _is_photo(self, array: npt.NDArray[Any]) -> bool:
        """Whether an array is what Pillow holds: 8 bits, grey or colours last."""
        photo = array.dtype == np.uint8 and array.ndim in (2, 3) and array.shape[2:] in ((), (1,), (3,), (4,))
        return photo and self.channels in (1, 3) and len(self.size) == 2 and array.shape[:1] != (self.channels,)

    def _takes_deep(self, photo: Image.Image) -> bool:
        """Whether grey of more than 8 bits stays as it is."""
        return photo.mode in DEEP and (self.channels != 3 or self.value_range is not None)

    def _coloured(self, name: str, photo: Image.Image, rgb: Image.Image) -> Image.Image:
        """The photo in the colours of the input, of its own or of what they are in RGB."""
        if self.channels in (1, 3) and len(self.size) == 2:
            return rgb.convert("L") if self.channels == 1 else rgb
        if self.channels > 4 or len(self.size) == 3:
            what = "a volume" if len(self.size) == 3 else f"{self.channels} channels"
            raise DataError(f"{name}: expected an array of {what}, got a photo; pass a NumPy array, or .npy")
        return photo.convert("LA" if self.channels == 2 else "RGBA")

    def _of_array(self, name: str | None, array: npt.NDArray[Any], most_pixels: int | None) -> Photo:
        try:
            levels = as_levels(array, len(self.size), self.channels, self.value_range)
        except DataError as error:
            raise DataError(f"{name}: {error}" if name else str(error)) from error
        size = levels.shape[-2::-1]
        _check_size(name or "an array", (size[0], size[1]), most_pixels)
        whole = self._whole(size)
        seen = resized(levels, whole[::-1], Image.Resampling[self.interpolation.upper()])
        inside = tuple(map(slice, *(edge[::-1] for edge in self._centre(whole))))
        shown, said = (levels, "") if len(size) == 3 else picture(levels)
        return Photo(np.array(seen[inside], order="C"), size, self.region(size), shown, said)

    def framed(self, photos: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Inputs (B, H, W, 3) in a black frame of the width that this transform crops: it gives them back unchanged."""
        if self.mode == "squash":
            return photos
        (rows, columns), (height, width) = self._enlarged, self.size
        (left, top), _ = self._centre((columns, rows))
        return np.pad(photos, ((0, 0), (top, rows - top - height), (left, columns - left - width), (0, 0)))

    def region(self, photo_size: tuple[int, ...]) -> Box:
        """The part of a photo of ``(width, height)`` that the input covers: left, top, right, bottom in its pixels."""
        whole = self._whole(photo_size)
        scale = [photo / side for photo, side in zip(photo_size, whole, strict=True)]
        return tuple(place * each for edge in self._centre(whole) for place, each in zip(edge, scale, strict=True))

    def in_words(self) -> str:
        """One line for people.

        >>> Transform((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), mode="crop", source="timm").in_words()
        'preprocessing: short side to 256 (bicubic), centre crop 224 x 224, from timm'
        """
        *depth, height, width = self.size
        if self.mode == "squash":
            what = "volume" if depth else "photo"
            sides = " x ".join(map(str, self.size[::-1]))
            words = f"whole {what} squashed to {sides} ({self.interpolation})"
        else:
            rows, columns = self._enlarged
            squashed = f"whole photo squashed to {columns} x {rows}"
            kept = f"short side to {rows}" if rows == columns else f"resized to cover {columns} x {rows}"
            resized = squashed if self.mode == "squash-crop" else kept
            words = f"{resized} ({self.interpolation}), centre crop {width} x {height}"
        part = "mean and std from" if self.mode == "squash" else "from"
        known = "" if not self.source else f", {part} {self.source}"
        if self.is_assumed:
            known = f", {self.source}: the classifier states none"
        return f"preprocessing: {words}{known}"

    @property
    def is_assumed(self) -> bool:
        """Whether the classifier did not say what it was trained with."""
        return self.source.startswith("assumed")

    def _whole(self, photo_size: tuple[int, ...]) -> tuple[int, ...]:
        """The size, (width, height), to which the whole photo is resized, of which the input is the centre."""
        if self.mode == "squash":
            return self.size[::-1]
        rows, columns = self._enlarged
        if self.mode == "squash-crop":
            return columns, rows
        photo_width, photo_height = photo_size
        if rows == columns:  # timm rounds down here, and to the nearest for oblong inputs
            short = min(photo_size)
            return columns * photo_width // short, rows * photo_height // short
        ratio = min(photo_height / rows, photo_width / columns)
        return round(photo_width / ratio), round(photo_height / ratio)

    @property
    def _enlarged(self) -> tuple[int, int]:
        """Rows and columns of which the input is the centre."""
        return math.floor(self.size[0] / self.crop_fraction), math.floor(self.size[1] / self.crop_fraction)

    def _centre(self, whole: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Left and top, right and bottom of the input in the resized photo of ``(width, height)``."""
        start = tuple(round((side - part) / 2) for side, part in zip(whole, self.size[::-1], strict=True))
        return start, tuple(first + part for first, part in zip(start, self.size[::-1], strict=True))

    def _resized(self, upright: _Upright) -> npt.NDArray[np.uint8]:
        kind, whole, (height, width) = self.interpolation.upper(), self._whole(upright.size), self.size
        if upright.scale == 1 and whole[0] * whole[1] <= 16 * width * height:
            whole_photo = upright.photo.resize((whole[0], whole[1]), Image.Resampling[kind])
            start, stop = self._centre(whole)
            return _channelled(whole_photo.crop((start[0], start[1], stop[0], stop[1])))
        # A box makes nearly the same pixels without the rest; Pillow may change the order of its two passes.
        x, y = upright.origin
        left, top, right, bottom = (side / upright.scale for side in self.region(upright.size))
        box = (x + left, y + top, x + right, y + bottom)
        return _channelled(upright.photo.resize((width, height), Image.Resampling[kind], box))

    def plain(self) -> Transform:
        """What can be written down: this."""
        return self

    def identity(self) -> Any:
        """What tells it from others, as JSON."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; of code, what does nearly the same."""
        record = dataclasses.asdict(self.plain())
        if record["value_range"] is None:
            del record["value_range"]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Transform:
        """The inverse of :meth:`to_dict`, also after JSON; a DataError names wrong keys or the wrong value."""
        try:
            return typed(json.dumps(record), cls)
        except ValueError as error:
            raise DataError(f"expected a transform, got another record: {error}") from error


def _numbers(name: str, values: Sequence[float], count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise DataError(f"expected {name} as {count} finite number(s), got {values!r}")
    return numbers


def _channelled(photo: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels (h, w, C) of a photo."""
    pixels = np.array(photo)
    return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]


def keep(photo: Photo, path: str | os.PathLike[str]) -> None:
    """Write an input, ``.npz``, so that :meth:`Transform.read` gives the same levels."""
    np.savez(path, pixels=photo.pixels)


def _kept(pixels: Levels) -> Photo:
    size = pixels.shape[-2::-1]
    shown, said = (pixels, "") if len(size) == 3 else picture(pixels)
    return Photo(pixels, size, (0,) * len(size) + size, shown, said)
