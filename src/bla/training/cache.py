"""What a classifier makes of the photos of a set, computed once, on disk: :class:`Rows` says what; features here."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from bla import BlaError
from bla.data.image_sets import ImageSet
from bla.data.photo import Photo, Transform
from bla.data.prefetching import cores, prefetch
from bla.files import cache_root, timestamp, typed, write_json
from bla.model.backbones import weights_digest
from bla.model.classifier import ExplainableClassifier
from bla.model.compiled import quickest
from bla.model.finite import unfinite
from bla.model.heads import grid_of
from bla.progress import Progress, silent
from bla.training import distributed
from bla.training.photos import try_read

FORMAT = 1
BATCH = 16
CHUNK = 128
"""Rows of features between two checkpoints of a build, and under one checksum; rows that take longer are fewer."""
_MANY = 200
"""Images for which it pays to time the trunk first."""
MOST = "BLA_CACHE_GB"
"""The environment's bound on all caches together."""
MANIFEST, PROGRESS = "manifest.json", "progress.json"
"""The record of a complete cache, and of one that is being built."""

CacheType = Literal["float16", "float32"]
Kind = CacheType | Literal["answers"]
"""Features of a type, or :mod:`bla.training.masked` answers."""


class CacheError(BlaError):
    """A cache that cannot be built or is damaged."""


class _UnfitError(CacheError):
    """Features that float16 does not hold."""


class Computed(NamedTuple):
    """Rows of a cache."""

    shape: tuple[int, ...]
    """(H, W, C) of features, (M, H, W) of masks: what the record needs to know the files' layout."""
    arrays: dict[str, npt.NDArray[Any]]
    """By file; the first axis is the photos'."""
    refused: dict[int, str]
    """Why a photo of these has no row."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a cache holds of an image set, an array or several for each image, and how it is computed.

    ``compute`` takes the rows' numbers and their photos' pixels (B, h, w, 3), ``batch`` at most; ``begin`` is called
    before, with the number of rows that are still to be computed.
    """

    what: str
    kind: Kind
    classifier: ExplainableClassifier
    images: ImageSet
    key: Sequence[Any]
    """What the rows depend on, besides the images' content."""
    compute: Callable[[Sequence[int], npt.NDArray[np.uint8]], Computed]
    batch: int
    begin: Callable[[int], None] = lambda count: None


class Stored(NamedTuple):
    """A complete cache, memory-mapped."""

    folder: Path
    arrays: dict[str, npt.NDArray[Any]]
    """By file; row i belongs to image i of the set, and is zero for an image in ``failures``."""
    shape: tuple[int, ...]
    failures: tuple[tuple[str, str], ...]


def _layout(kind: Kind, shape: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of a row, by file."""
    if kind == "answers":
        count, *grid = shape
        packed = -(-math.prod(grid) // 8)
        return {"targets": ("int64", ()), "masks": ("uint8", (count, packed)), "answers": ("float32", (count,))}
    return {"features": (kind, tuple(shape)), "pooled": ("float32", (shape[-1],))}


@dataclasses.dataclass
class _Record:
    """The content of manifest.json and progress.json."""

    classifier: str
    data: str
    images: int
    kind: Kind
    format: int = FORMAT
    created: str = dataclasses.field(default_factory=timestamp)
    done: int = 0
    """Rows that are on disk."""
    shape: list[int] | None = None
    """:attr:`Computed.shape`, known after the first batch."""
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    checksums: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """CRC-32 of every chunk, by file."""

    def __post_init__(self) -> None:
        self.checksums = self.checksums or {file: [] for file in self.files}
        chunks = dict.fromkeys(self.files, -(-self.done // self.chunk))
        if not 0 <= self.done <= self.images or {file: len(sums) for file, sums in self.checksums.items()} != chunks:
            raise ValueError(f"{self.done} rows of {self.images}, with checksums of others")
        if self.shape is not None and (len(self.shape) not in (3, 4) or min(self.shape) < 1):
            raise ValueError(f"a shape of {self.shape}")

    @classmethod
    def read(cls, path: Path) -> _Record:
        try:
            return typed(path.read_bytes(), cls)
        except ValueError as error:
            raise CacheError(
                f"expected the record of a cache in {path}, got another file ({error}): {_remedy(path.parent)}"
            ) from error

    @property
    def files(self) -> list[str]:
        """The names of the files."""
        return list(_layout(self.kind, self.shape or (0, 0, 0)))

    @property
    def chunk(self) -> int:
        """Rows between two checkpoints."""
        return max(1, CHUNK // 8) if self.kind == "answers" else CHUNK

    def layout(self, file: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
        """Type, shape and bytes of the rows that are done."""
        kind, row = _layout(self.kind, self.shape or (0, 0, 0))[file]
        dtype, shape = np.dtype(kind), (self.done, *row)
        return dtype, shape, dtype.itemsize * math.prod(shape)

    def rows(self, folder: Path, file: str) -> npt.NDArray[Any] | None:
        """A file, memory-mapped; None if its size or a chunk's checksum is wrong: 4 GB are checked in a second."""
        dtype, shape, size = self.layout(file)
        if not (folder / file).exists() or (folder / file).stat().st_size != size:
            return None
        rows = np.memmap(folder / file, dtype, "r", shape=shape)
        for start in range(0, self.done, self.chunk):
            if zlib.crc32(rows[start : start + self.chunk].data) != self.checksums[file][start // self.chunk]:
                return None
        return rows


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureCache:
    """The features of an image set, on disk, memory-mapped: reading takes no memory that grows with the set.

    Row i belongs to image i of the set; it is zero for an image in ``failures``.
    """

    folder: Path
    features: npt.NDArray[np.floating[Any]]
    """(N, H, W, C), memory-mapped."""
    pooled: npt.NDArray[np.float32]
    """(N, C): the average over the cells, before any rounding; memory-mapped."""
    failures: tuple[tuple[str, str], ...]
    """(image, reason) for each that could not be read."""
    at_hand: ClassVar[bool] = True

    def batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Features (B, C, H, W) of these rows, float32, channels last."""
        return torch.from_numpy(self.features[rows]).float().movedim(-1, 1)

    def pooled_batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Average-pooled features (B, C) of these rows, float32."""
        return torch.from_numpy(self.pooled[rows])


def cached_features(
    classifier: ExplainableClassifier,
    images: ImageSet,
    *,
    root: Path | None = None,
    kind: CacheType = "float16",
    digest: str | None = None,
    report: Progress = silent,
) -> FeatureCache:
    """The features that the classifier's trunk gives for every image, computed where the cache lacks them.

    An interrupted build resumes; of two that start at once, one builds and the other waits for it. ``kind`` is the
    type on disk: float16 halves the size and the reading. ``root`` is the folder of all caches, by default
    :func:`bla.files.cache_root`. ``digest`` is that of the trunk's weights, where it is known. Features that do not fit
    float16 are cached in float32. A CacheError says that no image can be read, that the root cannot be written, or
    that the cache on disk is damaged.
    """
    digest = digest or weights_digest(classifier.trunk)
    key = [kind, classifier.name, digest, classifier.transform.identity()]
    computing = _Features(classifier, kind)
    rows = Rows("features", kind, classifier, images, key, computing.compute, BATCH, computing.begin)
    try:
        stored = cached(rows, root, report)
    except _UnfitError as error:
        remove([_folder(rows, root).name], root)
        report(str(error), 0, 0)
        return cached_features(classifier, images, root=root, kind="float32", digest=digest, report=report)
    cache = FeatureCache(stored.folder, stored.arrays["features"], stored.arrays["pooled"], stored.failures)
    row, pixels = readable(rows, stored)
    with torch.inference_mode():
        check_code(rows, stored, row, classifier.trunk(pixels).float().cpu(), cache.batch(np.array([row])))
    return cache


def cached(rows: Rows, root: Path | None = None, report: Progress = silent) -> Stored:
    """Open a cache; what it lacks is computed, by all processes (:mod:`bla.training.distributed`).

    Errors as those of :func:`cached_features`.
    """
    if not len(rows.images):
        raise CacheError(f"expected at least one image to cache {rows.what} of, got none")
    folder, most = _folder(rows, root), _bound()
    if distributed.agreed(not (folder / MANIFEST).exists()):
        with _only_builder(folder, rows, report) if distributed.rank() == 0 else contextlib.nullcontext():
            if distributed.agreed(not (folder / MANIFEST).exists()):
                _build(folder, rows, report)
                if distributed.rank() == 0 and most < math.inf:
                    for key in trim(most, root):
                        report(f"removed cache {key[:12]}, the least recently used", 0, 0)
    return _opened(folder)


def _folder(rows: Rows, root: Path | None) -> Path:
    key = json.dumps([FORMAT, *rows.key, rows.images.digest()], sort_keys=True)
    return (root or cache_root()) / hashlib.sha256(key.encode()).hexdigest()


def readable(rows: Rows, stored: Stored) -> tuple[int, Tensor]:
    """The first image without failure: its row, and its normalised pixels (1, 3, h, w)."""
    failed = {image for image, _ in stored.failures}
    row = next(index for index, image in enumerate(rows.images.names) if image not in failed)
    return row, rows.classifier.pixels(rows.classifier.transform.read(rows.images.path(row)).pixels[None])


def check_code(rows: Rows, stored: Stored, row: int, fresh: Tensor, was: Tensor) -> None:
    """A CacheError if a row that is computed again differs: code can change where weights do not."""
    if fresh.shape != was.shape or not (fresh - was).abs().max() <= 0.02 * was.abs().max():
        raise CacheError(
            f"expected the cached {rows.what} of {rows.images.names[row]} from this classifier, got others; its code "
            f"has changed since: `bla cache remove {stored.folder.name[:12]}` and run again"
        )


def listed(root: Path | None = None) -> list[dict[str, Any]]:
    """The caches under ``root``: ``key``, ``bytes``, ``complete`` and the record of the build, one each."""
    root = root or cache_root()
    if root.exists() and not root.is_dir():
        raise CacheError(f"expected the folder of all caches, got the file {root}")
    entries = [_entry(folder) for folder in sorted(root.glob("*/")) if re.fullmatch("[0-9a-f]{64}", folder.name)]
    return [entry for entry in entries if entry is not None]


def _entry(folder: Path) -> dict[str, Any] | None:
    for name in (MANIFEST, PROGRESS, MANIFEST):  # twice: a build may end meanwhile
        with contextlib.suppress(FileNotFoundError):
            size = sum(file.stat().st_size for file in folder.rglob("[!.]*") if file.is_file())
            entry = {"key": folder.name, "bytes": size, "complete": name == MANIFEST}
            try:
                return entry | dataclasses.asdict(_Record.read(folder / name))
            except CacheError:
                unknown = _Record("?", "?", 0, "float16", created="damaged")
                return entry | {"complete": False} | dataclasses.asdict(unknown)
    return None


def remove(keys: Sequence[str], root: Path | None = None) -> list[str]:
    """Remove caches by key or by the beginning of one; returns the keys removed.

    A CacheError says that a key matches none, or that a run is building the cache; nothing is removed then.
    """
    root = root or cache_root()
    present = [entry["key"] for entry in listed(root)]
    for key in keys:
        if not key or not any(known.startswith(key) for known in present):
            raise CacheError(f"expected the key of a cache in {root}, got {key!r}: `bla cache list` shows them")
    chosen = list(dict.fromkeys(known for key in keys for known in present if known.startswith(key)))
    with contextlib.ExitStack() as locks:
        for key in chosen:
            try:
                locks.enter_context(FileLock(root / f"{key}.lock", timeout=0))
            except Timeout as error:
                raise CacheError(f"expected cache {key[:12]} to be idle, but a run is building it") from error
        for key in chosen:
            shutil.rmtree(root / key)
            (root / f"{key}.lock").unlink(missing_ok=True)
    return chosen


def trim(most: float, root: Path | None = None) -> list[str]:
    """Remove complete caches, the least recently used first, until all take ``most`` bytes; returns the keys removed.

    The last one used stays. Who has a removed cache open can read it until the end.
    """
    root = root or cache_root()
    if not most >= 0:
        raise CacheError(f"expected a number of bytes, 0 or more, that caches may take, got {most}")
    entries = listed(root)
    excess, removed = sum(entry["bytes"] for entry in entries) - most, list[str]()
    complete = [entry for entry in entries if entry["complete"]]
    for entry in sorted(complete, key=lambda entry: (root / entry["key"] / MANIFEST).stat().st_mtime_ns)[:-1]:
        if excess > 0:
            removed += remove([entry["key"]], root)
            excess -= entry["bytes"]
    return removed


def _bound() -> float:
    """The bytes that all caches may take together."""
    text = os.environ.get(MOST, "inf")
    with contextlib.suppress(ValueError):
        if (number := float(text)) >= 0:
            return 1e9 * number
    raise CacheError(f"expected a number of gigabytes in ${MOST}, got {text!r}")


def damaged(folder: Path) -> list[str]:
    """The files of a complete cache that differ from their checksums; reads all of them."""
    record = _Record.read(folder / MANIFEST)
    return [file for file in record.files if record.rows(folder, file) is None]


@contextlib.contextmanager
def _only_builder(folder: Path, rows: Rows, report: Progress) -> Iterator[None]:
    """Hold the lock of a build; wait while another run holds it."""
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0.1)
    except OSError as error:
        raise CacheError(
            f"expected a folder for caches that can be written, got {folder.parent}: {error.strerror}; choose another "
            "with the environment variable BLA_CACHE"
        ) from error
    if not lock.is_locked:
        report(f"waiting for another run that is caching the same {rows.what}", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, rows: Rows, report: Progress) -> None:
    """Let each process cache a share; the first one, which writes to ``folder`` itself, appends those of the others."""
    first, world = distributed.rank() == 0, distributed.world()
    parts = [folder, *(folder / f"part-{index}-of-{world}" for index in range(1, world))]
    share = _build_share(parts[distributed.rank()], rows, report)
    record, *others = distributed.gathered(share)
    for part, other in zip(parts[1:], others, strict=True):
        record.done += other.done
        record.shape = record.shape or other.shape
        record.failures += other.failures
        for file in record.files:
            record.checksums[file] += other.checksums[file]
            if first:
                with (folder / file).open("ab") as target, (part / file).open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 22)
                    target.flush()
                    os.fsync(target.fileno())
    if len(record.failures) == len(rows.images):
        if first:
            shutil.rmtree(folder)
        reason = record.failures[0][1]
        raise CacheError(f"expected images that can be read, got none of {len(rows.images)}: {reason}")
    if first:
        write_json(folder / MANIFEST, dataclasses.asdict(record), indent=1)
        (folder / PROGRESS).unlink()
        for part in folder.glob("part-*/"):  # also those of another number of processes
            shutil.rmtree(part)
    distributed.together()


def _build_share(folder: Path, rows: Rows, report: Progress) -> _Record:
    """Write this process's share of whole chunks, and the record after each; resumes after the last whole one."""
    images, transform = rows.images, rows.classifier.transform
    new = _Record(rows.classifier.name, images.root.name, len(images), rows.kind)
    chunks = distributed.share(-(-len(images) // new.chunk))
    mine = range(len(images))[chunks.start * new.chunk : chunks.stop * new.chunk]
    record = _resumed(folder, new, len(mine))
    todo = mine[record.done :]
    title = f"caching {rows.what} of {len(mine)} images"
    if todo:
        rows.begin(len(todo))
    if mine:
        report(title, record.done, len(mine))
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context((folder / file).open("ab")) for file in record.files}
        # a core is left to the trunk, whose threads wait for one another
        pool = stack.enter_context(ThreadPoolExecutor(max(1, cores() - 1)))
        read = prefetch(pool, lambda row: try_read(images, row, transform), todo, ahead=4 * BATCH)
        while record.done < len(mine):
            chunk = mine[record.done : record.done + record.chunk]
            sums = dict.fromkeys(files, 0)
            for start in range(0, len(chunk), rows.batch):
                batch = chunk[start : start + rows.batch]
                photos = list(itertools.islice(read, len(batch)))
                computed = _computed(rows, batch, photos)
                record.shape = list(computed.shape)
                record.failures += [(images.names[batch[place]], why) for place, why in computed.refused.items()]
                for file, array in computed.arrays.items():
                    files[file].write(array.data)
                    sums[file] = zlib.crc32(array.data, sums[file])
                report(title, batch.stop - mine.start, len(mine))
            for file, handle in files.items():
                handle.flush()
                os.fsync(handle.fileno())
                record.checksums[file].append(sums[file])
            record.done += len(chunk)  # which the record says only when the rows are on disk
            write_json(folder / PROGRESS, dataclasses.asdict(record))
    return record


def _computed(rows: Rows, batch: Sequence[int], photos: Sequence[Photo | str]) -> Computed:
    """The rows of a batch, with zeros for a photo that could not be read or is refused."""
    refused = {place: photo for place, photo in enumerate(photos) if isinstance(photo, str)}
    pixels = {place: photo.pixels for place, photo in enumerate(photos) if not isinstance(photo, str)}
    if not pixels:  # a grey photo tells the shape
        shape, arrays, _ = rows.compute(batch[:1], grey(rows.classifier.transform, 1))
    else:
        shape, arrays, found = rows.compute([batch[place] for place in pixels], np.stack(list(pixels.values())))
        refused |= {place: found[index] for index, place in enumerate(pixels) if index in found}
    filled = {file: np.zeros((len(photos), *array.shape[1:]), array.dtype) for file, array in arrays.items()}
    for index, place in enumerate(pixels):
        for file, array in arrays.items():
            filled[file][place] = 0 if place in refused else array[index]
    return Computed(shape, filled, dict(sorted(refused.items())))


def _resumed(folder: Path, record: _Record, rows: int) -> _Record:
    """The record of an interrupted build, with the files cut back to the last whole chunk; or else the new record."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PROGRESS).exists():
        saved = _Record.read(folder / PROGRESS)
        record = saved if saved.done <= rows else record  # else fewer processes wrote it, and this share is smaller
    write_json(folder / PROGRESS, dataclasses.asdict(record))
    for stale in folder.glob(".*"):  # a record whose writer was killed
        stale.unlink()
    for file in record.files:
        path, (_, _, size) = folder / file, record.layout(file)
        path.touch()
        if path.stat().st_size < size:
            raise CacheError(f"expected {size} bytes in {path}, got {path.stat().st_size}: {_remedy(folder)}")
        os.truncate(path, size)
    return record


def grey(transform: Transform, count: int) -> npt.NDArray[np.uint8]:
    """Photos (count, h, w, 3) without anything to see."""
    return np.full((count, *transform.size, transform.channels), 127, np.uint8)


class _Features:
    """The trunk's maps of photos and their averages."""

    def __init__(self, classifier: ExplainableClassifier, kind: CacheType) -> None:
        self.classifier, self.kind = classifier, kind
        self.trunk: Callable[[Tensor], Tensor] = classifier.trunk

    def begin(self, photos: int) -> None:
        if photos >= _MANY:
            pixels = self.classifier.pixels(grey(self.classifier.transform, 2))
            self.trunk, _ = quickest(self.classifier.trunk, pixels, photos)

    def compute(self, rows: Sequence[int], photos: npt.NDArray[np.uint8]) -> Computed:
        with torch.inference_mode():
            pixels = self.classifier.pixels(photos)
            features = self.trunk(pixels).float()
            finite = torch.isfinite(features).flatten(1).all(dim=1)
            pooled = features.mean(dim=grid_of(features))
            maps = features.movedim(1, -1).to(getattr(torch, self.kind))
            values, held = features[finite].flatten(2).abs(), maps.movedim(-1, 1)[finite].flatten(2).float().abs()
            # rounding alone costs an image at most 2^-11 of its largest feature; a channel or so may vanish in an image
            lost = (held - values).flatten(1).amax(dim=1) > values.flatten(1).amax(dim=1) / 1024
            vanished = (held.amax(dim=2) == 0) & (values.amax(dim=2) > 0)
            if self.kind == "float16" and len(values) and (lost.any() or vanished.float().mean() > 0.05):
                raise _UnfitError(
                    f"features are cached in float32: float16 does not hold {values.min():.1g} to {values.max():.1g}"
                )
            refused = {
                place: f"expected finite features, got {unfinite(self.classifier, pixels[place])}"
                for place in (~finite).nonzero()[:, 0].tolist()
            }
        return Computed(maps.shape[1:], {"features": maps.cpu().numpy(), "pooled": pooled.cpu().numpy()}, refused)


def _opened(folder: Path) -> Stored:
    record = _Record.read(folder / MANIFEST)
    if record.format != FORMAT:
        raise CacheError(f"expected a cache of format {FORMAT}, got {record.format} in {folder}: {_remedy(folder)}")
    arrays = {}
    for file in record.files:
        rows = record.rows(folder, file)
        if rows is None:
            raise CacheError(f"expected {folder / file} as it was written, got a damaged file: {_remedy(folder)}")
        arrays[file] = rows
    with contextlib.suppress(OSError):  # where others may write
        os.utime(folder / MANIFEST)  # used last now, for trim
    return Stored(folder, arrays, tuple(record.shape or ()), tuple(record.failures))


def _remedy(folder: Path) -> str:
    return f"remove it with `bla cache remove {folder.name[:12]}` and run again"
