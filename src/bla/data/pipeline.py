r"""Preprocessing that is code, understood by what it does to a few photos.

Constant photos tell the scale of each channel, :math:`v = (x / 255 - \mathrm{mean}) / \mathrm{std}`, and two ramps tell
which part of a photo the input shows: of a crop, however it is made, level and place are linear in one another. Where a
:class:`bla.data.photo.Transform` gives the same pixels, it takes the code's place; else the code is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from bla.data.arrays import DataError, Levels, picture
from bla.data.photo import MAX_INPUT, Box, Interpolation, Mode, Photo, PhotoSource, Transform, open_photo, open_upright

Code = Callable[..., Any]
Given = npt.NDArray[np.float32]

SHOWN = "the input that the classifier saw"
"""What a picture shows where the code's geometry is not known."""
_WIDE, _TALL, _SQUARE = (300, 450), (450, 300), (360, 360)  # rows, columns
_SHAPES = ((300, 231), (187, 400), (90, 61))
_SAME = 0.02
"""By how many of 255 levels the same pixels may differ."""


class Kind(NamedTuple):
    """What code takes: ``sample`` makes one of a shape, (rows, columns)."""

    sample: Callable[[tuple[int, int]], Any]
    goal: Transform | None = None
    """How a photo is opened for it, if not in RGB."""
    colours: bool = False

    def prepared(self, photo: Image.Image | npt.NDArray[Any]) -> Image.Image | npt.NDArray[Any]:
        """A photo, or an array, as the code takes it."""
        if self.goal is not None and isinstance(photo, Image.Image) and photo.mode == "RGB":
            photo = photo.convert("L")
        return photo if isinstance(self.sample((2, 2)), Image.Image) else np.asarray(photo)


def _noise(shape: tuple[int, int]) -> Image.Image:
    rows, columns = shape
    return Image.fromarray(np.random.RandomState(rows).randint(0, 256, (rows, columns, 3), np.uint8))


GREY = Transform((1, 1), (0.5,), (0.5,), "nearest")
PHOTO = Kind(_noise, colours=True)


def _kinds(channels: int | None, rank: int) -> Iterator[Kind]:
    """What the code of a classifier of so many channels may take: photos, grey ones, arrays."""
    if rank == 2:
        yield PHOTO
    if rank == 2 and channels == 1:
        yield Kind(lambda shape: Image.fromarray(_values(*shape)), GREY)
        yield Kind(lambda shape: _noise(shape).convert("L"), GREY)
    if rank == 2 and channels in (None, 3):
        return
    depth, many = (16,) * (rank - 2), channels or 1
    layouts: list[Callable[[tuple[int, int]], Any]] = [
        lambda shape: _values(*depth, *shape, many),
        lambda shape: _values(many, *depth, *shape),
    ]
    if many == 1:
        layouts.insert(0, lambda shape: _values(*depth, *shape))
    for make in layouts:
        goal = GREY if rank == 2 and channels == 1 else None
        yield Kind(make, goal)
        yield Kind(functools.partial(_floats, make), goal)


def _floats(make: Callable[[tuple[int, int]], Any], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The same from 0 to 1."""
    return np.asarray(make(shape) / 4096, np.float32)


def _values(*shape: int) -> npt.NDArray[np.uint16]:
    """Noise of 12 bits."""
    return np.random.RandomState(shape[0]).randint(0, 4096, shape).astype(np.uint16)


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline(Transform):
    """A preprocessing that code does.

    Attributes
    ----------
    code: takes a photo and gives the input (C, height, width), by the calling convention that ``give`` knows.
    near: a transform that does nearly the same, which a run or an exported file keeps; None if there is none.
    """

    code: Any = dataclasses.field(default=None, repr=False)
    give: Callable[[Image.Image | npt.NDArray[Any]], Given] = dataclasses.field(default=np.asarray, repr=False)
    near: Transform | None = None
    kind: Kind = PHOTO
    linear: bool = False
    """Whether constant photos have told ``mean`` and ``std``."""
    others: tuple[tuple[int, ...], ...] = ()
    """Sizes of a tall photo's input and a square one's where they depend on the photo; ``size`` is a wide one's."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of inputs of a wide photo, and of a tall and a square one if they differ."""
        return (self.shape, *((self.channels, *size) for size in self.others))

    def _read(
        self, source: PhotoSource, held: contextlib.ExitStack, name: str | None, most_pixels: int | None
    ) -> Photo:
        photo: Any = source
        if isinstance(source, str | os.PathLike) and os.fspath(source).endswith((".npy", ".npz")):
            photo = self._stored(source)
            if isinstance(photo, Photo):
                return photo
        if not isinstance(photo, np.ndarray):
            photo = open_upright(photo, held, self.kind.goal, name, most_pixels).photo
        elif self.kind.goal is not None or self.kind.colours:
            with contextlib.suppress(DataError, TypeError):  # what is no picture stays an array
                grey = Image.fromarray(photo) if self.kind.goal is not None and photo.ndim == 2 else photo
                photo = open_upright(grey, held, self.kind.goal, name, most_pixels).photo
        try:
            given = self.give(photo)
        except DataError as error:
            raise DataError(f"{name}: {error}" if name else str(error)) from error
        levels = self._levels(given)
        size = photo.size if isinstance(photo, Image.Image) else photo.shape[1::-1]
        with contextlib.suppress(DataError):
            if isinstance(photo, Image.Image):
                kept = None if isinstance(source, str | os.PathLike | bytes) else photo
                return Photo(levels, size, self.region(size), kept)
        shown = levels if levels.ndim == 4 else picture(levels)[0]
        whole = levels.shape[-2::-1]
        return Photo(levels, whole, (0,) * len(whole) + whole, shown, SHOWN)

    def _levels(self, given: Given) -> Levels:
        if not self.admits(given.shape):
            raise DataError(f"expected an input {self.shape} from {_name_of(self.code)}, got {given.shape}")
        return (255 * (np.moveaxis(given, 0, -1).astype(np.float64) * self.std + self.mean)).astype(np.float32)

    def region(self, photo_size: tuple[int, ...]) -> Box:
        """As of any transform, where it can be found by two ramps; else a DataError."""
        if self.near is not None:
            return self.near.region(photo_size)
        known = self.__dict__.setdefault("_regions", {})
        if photo_size not in known:
            known[photo_size] = self._measured(photo_size) if self.linear else None
        if known[photo_size] is None:
            raise DataError(f"expected a crop of the photo, got {_name_of(self.code)}, which does something else to it")
        found: Box = known[photo_size]
        return found

    def _measured(self, photo_size: tuple[int, ...]) -> Box | None:
        """Where the input begins and ends in a photo, by ramps over its width and its height; None if it is no crop."""
        ends = []
        for axis, side in enumerate(photo_size):
            ramp = np.rint(np.linspace(0, 255, side)).astype(np.uint8)
            along = ramp[None, :, None] if axis == 0 else ramp[:, None, None]
            photo = Image.fromarray(np.ascontiguousarray(np.broadcast_to(along, (*photo_size[::-1], 3))))
            levels = self._levels(self.give(photo)).mean(axis=-1, dtype=np.float64)
            levels = levels if axis == 0 else levels.T
            place = levels / 255 * (side - 1) + 0.5
            middle = np.arange(levels.shape[1]) + 0.5
            inner = slice(len(middle) // 8, len(middle) - len(middle) // 8)
            if len(middle[inner]) < 2:
                return None
            slope, start = np.polyfit(middle[inner], place.mean(axis=0)[inner], 1)
            slack = max(1.5, 0.01 * side)
            if slope <= 0 or np.abs(place[:, inner] - (start + slope * middle[inner])).max() > slack:
                return None
            stop = start + slope * len(middle)
            if start < -slack or stop > side + slack:
                return None  # it pads
            ends.append((0.0 if start < slack / 2 else start, float(side) if stop > side - slack / 2 else stop))
        return (*(float(start) for start, _ in ends), *(float(stop) for _, stop in ends))

    def framed(self, photos: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Nothing gives back an input from code."""
        raise DataError(f"expected a bla.Transform, got {_name_of(self.code)}, which is code")

    def in_words(self) -> str:
        shown = "" if self.linear else f"; pictures show {SHOWN}"
        size = "a size that depends on the photo" if self.others else " x ".join(map(str, self.size[::-1]))
        return f"preprocessing: {_name_of(self.code)}, as it is, to {size}{shown}"

    def plain(self) -> Transform:
        """The transform that is nearly the same, with a warning that it is no more; a DataError if there is none."""
        if self.near is None:
            raise DataError(
                f"expected preprocessing that can be written down, got {_name_of(self.code)}, which is code: pass "
                "transform=bla.Transform(...) that does nearly the same"
            )
        warnings.warn(
            f"{_name_of(self.code)} is code, which is not saved: {self.near.mode} to "
            f"{' x '.join(map(str, self.size[::-1]))} takes its place, whose pixels differ a little, and with them "
            "what an unsure classifier says; pass transform=bla.Transform(...) for the same everywhere",
            stacklevel=3,
        )
        return self.near

    def identity(self) -> Any:
        """What it does to a photo of noise, as a digest."""
        return {"code": hashlib.sha256(np.ascontiguousarray(self.give(self.kind.sample(_WIDE))).tobytes()).hexdigest()}


def understood(code: Code, channels: int | None = None, rank: int = 2) -> Transform:
    """The preprocessing that code does to a Pillow image, an array or a tensor, as a transform.

    It may be called as torchvision's and timm's are, with the image alone; as albumentations' are, with ``image=``;
    or as an image processor of transformers. ``channels`` and ``rank`` are of the classifier's input, if they are
    known: code that makes no such input of a photo may take grey photos, or arrays. A DataError says why it is no
    preprocessing of a classifier.
    """
    name = _name_of(code)
    give, wide, kind = _calling(code, channels, rank)
    tall = give(kind.sample(_TALL))
    if any(not np.array_equal(wide, give(kind.sample(_WIDE)), equal_nan=True) for _ in range(4)):
        raise DataError(
            f"expected the preprocessing of evaluation, got {name}, which makes another input of the same photo each "
            "time: pass the transform that you validate with"
        )
    made, *size = wide.shape
    mean, std, linear = (0.5,) * made, (0.25,) * made, False
    if getattr(kind.sample((2, 2)), "mode", "") in ("RGB", "L"):
        mean, std, linear = _scale(give, made)
    found = Pipeline(tuple(size), mean, std, "bilinear", source=name, code=code, give=give, kind=kind, linear=linear)
    if wide.shape != tall.shape:
        square = give(kind.sample(_SQUARE))
        return dataclasses.replace(found, others=(tall.shape[1:], square.shape[1:]))
    best, miss = None, math.inf
    with contextlib.suppress(DataError):  # of code that cannot read small photos
        for candidate in _candidates(found):
            missed = [_missed(candidate, found, _noise(shape)) for shape in _SHAPES]
            if max(each.max() for each in missed) < _SAME and _rounds_alike(candidate, found):
                return candidate
            if (least := min(each.mean() for each in missed)) < miss and _is_near(candidate, found):
                best, miss = candidate, least  # the centre of some shapes may lie a pixel off
    return dataclasses.replace(found, near=best and dataclasses.replace(best, source=f"{name}, nearly"))


def _missed(transform: Transform, pipeline: Pipeline, photo: Image.Image) -> npt.NDArray[np.float64]:
    """By how many levels a transform misses code."""
    return np.abs(pipeline._levels(pipeline.give(photo)).astype(np.float64) - transform.read(photo).pixels)


def _rounds_alike(transform: Transform, pipeline: Pipeline) -> bool:
    """Whether a transform gives the pixels of code whichever way a side, or the place of the centre, is rounded."""
    side = min(transform._whole((999, 999)))
    wide = [*((side, side + more) for more in range(1, 5)), *((3 * side, 3 * side + more) for more in (1, 2))]
    shapes = [*wide, *((columns, rows) for rows, columns in wide)]
    return all(_missed(transform, pipeline, _noise(shape)).max() < _SAME for shape in shapes)


def _is_near(transform: Transform, pipeline: Pipeline) -> bool:
    """Whether a transform misses code on smooth photos by less than a shift by one pixel would."""
    for shape in _SHAPES:
        photo = _noise((6, 8)).resize(shape[::-1], Image.Resampling.BICUBIC)
        levels = transform.read(photo).pixels.astype(np.float64)
        shift = max(np.abs(np.diff(levels, axis=axis)).mean() for axis in (0, 1))
        if _missed(transform, pipeline, photo).mean() > 0.5 + shift:
            return False
    return True


def _candidates(pipeline: Pipeline) -> Iterator[Transform]:
    """Transforms that show the same part of a wide photo."""
    try:
        left, top, right, bottom = pipeline.region(_WIDE[::-1])
    except DataError:
        return
    if pipeline.channels not in (1, 3):
        return
    (height, width), (rows, columns) = pipeline.size, _WIDE
    whole = (left, top, right, bottom) == (0, 0, columns, rows)
    short = round(rows * height / (bottom - top))
    kinds: list[tuple[Mode, float]] = [("squash", 0.875)] if whole else []
    for offset, mode in itertools.product((0, 1, -1), get_args(Mode)[1:]):
        side = short + offset if height <= width else round((short + offset) * width / height)
        if min(height, width) <= side <= 100 * min(height, width):
            kinds.append((mode, fraction(min(height, width), side)))
    for (mode, share), kind in itertools.product(kinds, get_args(Interpolation)):
        yield Transform(pipeline.size, pipeline.mean, pipeline.std, kind, mode, share, pipeline.source)


def fraction(side: int, whole: int) -> float:
    """The crop fraction by which ``floor(side / fraction)`` is ``whole``."""
    found = side / whole
    return found if math.floor(side / found) == whole else math.nextafter(found, 0)


def _scale(give: Callable[[Image.Image], Given], channels: int) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean and std of each channel by constant photos, and whether these tell them."""
    with np.errstate(all="ignore"):
        black, grey, white = (
            give(Image.new("RGB", _WIDE[::-1], (level,) * 3)).astype(float) for level in (0, 128, 255)
        )
        low, middle, high = (each.mean(axis=(1, 2)) for each in (black, grey, white))
        slope = high - low
        flat = all(np.ptp(each, axis=(1, 2)).max() <= 1e-3 * np.abs(slope).max() for each in (black, grey, white))
        straight = (np.abs(middle - low - slope * 128 / 255) <= 1e-3 * np.abs(slope)).all()
        if not (flat and straight and (slope > 1e-6).all() and np.isfinite([low, high]).all()):
            return (0.5,) * channels, (0.25,) * channels, False
        return tuple(map(_short, -low / slope)), tuple(map(_short, 1 / slope)), True


def _short(number: float) -> float:
    """The shorter decimal that a number in single precision was."""
    for digits in (3, 4, 6):
        if abs(number - round(number, digits)) < 1e-6 * max(abs(number), 0.1):
            return round(float(number), digits)
    return float(number)


def _calling(code: Code, channels: int | None, rank: int) -> tuple[Callable[[Any], Given], Given, Kind]:
    """How the code is called, what it makes of a wide photo, and what it takes."""
    code = getattr(code, "image_processor", code)  # of a processor of several kinds of input

    def tensor(photo: Any) -> Any:
        import torch

        return code(torch.from_numpy(np.asarray(photo).copy()).movedim(-1, 0))

    ways: list[Callable[[Any], Any]] = [
        lambda photo: code(photo if isinstance(photo, Image.Image) else _as_image(photo)),
        lambda photo: code(image=np.asarray(photo)),
        lambda photo: code(np.asarray(photo)),
        tensor,
    ]
    batched = hasattr(code, "model_input_names")
    if batched:  # transformers'
        ways = [lambda photo: code(images=photo, return_tensors="pt")]
    elif type(code).__module__.startswith("albument"):
        ways = ways[1:2]
    said: list[DataError] = []
    others: list[tuple[Callable[[Any], Given], Given, Kind]] = []
    for kind, way in itertools.product(_kinds(channels, rank), ways):

        def give(photo: Any, way: Callable[[Any], Any] = way, kind: Kind = kind) -> Given:
            try:
                returned = way(kind.prepared(photo))
            except Exception as error:  # whatever code of the user's raises
                first = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
                raise DataError(
                    f"expected an input from {_name_of(code)}, got {first}; pass a function that makes it of a photo"
                ) from error
            return _as_input(returned, code, rank, batched=batched)

        try:
            found = give(kind.sample(_WIDE))
        except DataError as error:
            said.append(error)
            continue
        if channels in (None, len(found)):
            return give, found, kind
        others.append((give, found, kind))
    if others:
        return others[0]
    raise said[0]


def _as_image(photo: npt.NDArray[Any]) -> Any:
    return open_photo(photo) if photo.dtype == np.uint8 and photo.ndim in (2, 3) else photo


def _as_input(returned: Any, code: Code, rank: int, *, batched: bool) -> Given:
    """The input (C, height, width) in what code returned, if need be as a batch of one."""
    if isinstance(returned, Mapping) or hasattr(returned, "keys"):
        named = [key for key in returned if key in ("image", "images", "pixels") or "pixel_values" in key]
        returned = returned[named[0] if named else next(iter(returned))]
    if isinstance(returned, (list, tuple)) and len(returned) == 1:
        (returned,) = returned
    if isinstance(returned, Image.Image):
        raise DataError(f"expected floats from {_name_of(code)}, got a Pillow image: add ToTensor() and Normalize(...)")
    tensor = hasattr(returned, "detach")
    values = np.asarray(returned.detach().cpu().float() if tensor and returned.is_floating_point() else returned)
    shape, one = values.shape, not batched or len(values) == 1
    values = values[0] if batched and one else values
    while values.ndim > rank + 1 and len(values) == 1:
        values = values[0]
    if values.dtype.kind != "f":
        raise DataError(
            f"expected floats from {_name_of(code)}, got {values.dtype}: add a conversion to float32 and Normalize(...)"
        )
    if values.ndim == rank + 1 == 3 and not tensor and values.shape[-1] in (1, 3, 4) and len(values) not in (1, 3, 4):
        values = np.moveaxis(values, -1, 0)
    if not one or values.ndim != rank + 1 or len(values) > min(values.shape[-2:]) or max(values.shape) > MAX_INPUT:
        remedy = (
            "patches: let a module that holds the classifier cut them from a picture, and pass what makes that"
            if values.ndim < rank + 1 or max(shape) > MAX_INPUT
            else "several pictures: switch off what cuts the photo, or pass a function that makes one picture of it"
        )
        raise DataError(
            f"expected one input (C, height, width) from {_name_of(code)}, got shape {shape}, which holds {remedy}"
        )
    return values.astype(np.float32)


def _name_of(code: Any) -> str:
    return str(getattr(code, "__name__", type(code).__name__))
