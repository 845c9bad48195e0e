"""Feature cache on disk: the trunk runs once, training reads. Keyed by weights, transform and data."""

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from bla import BlaError
from bla.data.image_sets import ImageSet
from bla.data.photo import Photo
from bla.data.prefetching import cores, prefetch
from bla.files import cache_root, read_json, timestamp, write_json
from bla.model.backbones import weights_digest
from bla.model.classifier import ExplainableClassifier
from bla.progress import Progress, silent
from bla.training import distributed
from bla.training.photos import try_read

FORMAT = 1
BATCH = 16
CHUNK = 128
"""Rows between two checkpoints of a build, and under one checksum."""
MANIFEST, PROGRESS = "manifest.json", "progress.json"
"""The record of a complete cache, and of one that is being built."""

FILES = ("features", "pooled")

CacheType = Literal["float16", "float32"]


class CacheError(BlaError):
    """A cache that cannot be built or is damaged."""


@dataclasses.dataclass
class _Record:
    """The content of manifest.json and progress.json."""

    classifier: str
    data: str
    images: int
    kind: CacheType
    format: int = FORMAT
    created: str = dataclasses.field(default_factory=timestamp)
    done: int = 0
    """Rows that are on disk."""
    shape: list[int] | None = None
    """(H, W, C), known after the first batch."""
    failures: list[list[str]] = dataclasses.field(default_factory=list)
    checksums: dict[str, list[int]] = dataclasses.field(default_factory=lambda: {file: [] for file in FILES})
    """CRC-32 of every chunk, by file."""

    @classmethod
    def read(cls, path: Path) -> _Record:
        try:
            return cls(**read_json(path))
        except (ValueError, TypeError) as error:
            raise CacheError(
                f"expected the record of a cache in {path}, got another file: {_remedy(path.parent)}"
            ) from error

    def layout(self, file: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
        """Type, shape and bytes of the rows that are done."""
        height, width, channels = self.shape or (0, 0, 0)
        shape = (self.done, height, width, channels) if file == "features" else (self.done, channels)
        dtype = np.dtype(self.kind if file == "features" else "float32")
        return dtype, shape, dtype.itemsize * math.prod(shape)

    def rows(self, folder: Path, file: str, *, every: bool) -> npt.NDArray[Any] | None:
        """A file, memory-mapped; None if its size, or the checksum of its first, last or ``every`` chunk is wrong."""
        dtype, shape, size = self.layout(file)
        if not (folder / file).exists() or (folder / file).stat().st_size != size:
            return None
        rows, starts = np.memmap(folder / file, dtype, "r", shape=shape), range(0, self.done, CHUNK)
        for start in starts if every else (starts[0], starts[-1]):
            if zlib.crc32(rows[start : start + CHUNK].data) != self.checksums[file][start // CHUNK]:
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
        return torch.from_numpy(self.features[rows]).float().permute(0, 3, 1, 2)

    def pooled_batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Average-pooled features (B, C) of these rows, float32."""
        return torch.from_numpy(self.pooled[rows])


def cached_features(
    classifier: ExplainableClassifier,
    images: ImageSet,
    *,
    root: Path | None = None,
    kind: CacheType = "float16",
    report: Progress = silent,
) -> FeatureCache:
    """The features that the classifier's trunk gives for every image, computed where the cache lacks them.

    An interrupted build resumes; of two that start at once, one builds and the other waits for it. ``kind`` is the
    type on disk: float16 halves the size and the reading. ``root`` is the folder of all caches, by default
    :func:`bla.files.cache_root`. A CacheError says that no image can be read, that features do not fit ``kind``, that
    the root cannot be written, or that the cache on disk is damaged.
    """
    if not len(images):
        raise CacheError("expected at least one image to cache features of, got none")
    weights, transform = weights_digest(classifier.trunk), classifier.transform.to_dict()
    key = json.dumps([FORMAT, kind, classifier.name, weights, transform, images.digest()], sort_keys=True)
    folder = (root or cache_root()) / hashlib.sha256(key.encode()).hexdigest()
    if distributed.agreed(not (folder / MANIFEST).exists()):
        with _only_builder(folder, report) if distributed.rank() == 0 else contextlib.nullcontext():
            if distributed.agreed(not (folder / MANIFEST).exists()):
                _build(folder, classifier, images, kind, report)
    cache = _opened(folder)
    _probe(cache, classifier, images)
    return cache


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


def damaged(folder: Path) -> list[str]:
    """The files of a complete cache that differ from their checksums; reads all of them."""
    record = _Record.read(folder / MANIFEST)
    return [file for file in FILES if record.rows(folder, file, every=True) is None]


@contextlib.contextmanager
def _only_builder(folder: Path, report: Progress) -> Iterator[None]:
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
        report("waiting for another run that is caching the same features", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(
    folder: Path, classifier: ExplainableClassifier, images: ImageSet, kind: CacheType, report: Progress
) -> None:
    """Let each process cache a share; the first one, which writes to ``folder`` itself, appends those of the others."""
    first, world = distributed.rank() == 0, distributed.world()
    parts = [folder, *(folder / f"part-{index}-of-{world}" for index in range(1, world))]
    share = _build_share(parts[distributed.rank()], classifier, images, kind, report)
    record, *others = distributed.gathered(share)
    for part, other in zip(parts[1:], others, strict=True):
        record.done += other.done
        record.shape = record.shape or other.shape
        record.failures += other.failures
        for file in FILES:
            record.checksums[file] += other.checksums[file]
            if first:
                with (folder / file).open("ab") as target, (part / file).open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 22)
                    target.flush()
                    os.fsync(target.fileno())
    if len(record.failures) == len(images):
        if first:
            shutil.rmtree(folder)
        reason = record.failures[0][1]
        raise CacheError(f"expected images that can be read, got none of {len(images)}: {reason}")
    if first:
        write_json(folder / MANIFEST, dataclasses.asdict(record), indent=1)
        (folder / PROGRESS).unlink()
        for part in folder.glob("part-*/"):  # also those of another number of processes
            shutil.rmtree(part)
    distributed.together()


def _build_share(
    folder: Path, classifier: ExplainableClassifier, images: ImageSet, kind: CacheType, report: Progress
) -> _Record:
    """Write this process's share of whole chunks, and the record after each; resumes after the last whole one."""
    chunks = distributed.share(-(-len(images) // CHUNK))
    rows = range(len(images))[chunks.start * CHUNK : chunks.stop * CHUNK]
    record = _resumed(folder, _Record(classifier.name, images.root.name, len(images), kind), len(rows))
    title = f"caching features of {len(rows)} images"
    if rows:
        report(title, record.done, len(rows))
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context((folder / file).open("ab")) for file in FILES}
        # a core is left to the trunk, whose threads wait for one another
        pool = stack.enter_context(ThreadPoolExecutor(max(1, cores() - 1)))
        todo = rows[record.done :]
        read = prefetch(pool, lambda row: try_read(images, row, classifier.transform), todo, ahead=4 * BATCH)
        while record.done < len(rows):
            chunk = rows[record.done : record.done + CHUNK]
            sums = dict.fromkeys(FILES, 0)
            for start in range(0, len(chunk), BATCH):
                batch = chunk[start : start + BATCH]
                photos = list(itertools.islice(read, len(batch)))
                arrays = _features(classifier, photos, record.kind)
                record.shape = list(arrays["features"].shape[1:])
                read_rows = zip(batch, photos, strict=True)
                record.failures += [[images.names[row], photo] for row, photo in read_rows if isinstance(photo, str)]
                for file, array in arrays.items():
                    files[file].write(array.data)
                    sums[file] = zlib.crc32(array.data, sums[file])
                report(title, batch.stop - rows.start, len(rows))
            for file, handle in files.items():
                handle.flush()
                os.fsync(handle.fileno())
                record.checksums[file].append(sums[file])
            record.done += len(chunk)  # which the record says only when the rows are on disk
            write_json(folder / PROGRESS, dataclasses.asdict(record))
    return record


def _resumed(folder: Path, record: _Record, rows: int) -> _Record:
    """The record of an interrupted build, with the files cut back to the last whole chunk; or else the new record."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PROGRESS).exists():
        saved = _Record.read(folder / PROGRESS)
        record = saved if saved.done <= rows else record  # else fewer processes wrote it, and this share is smaller
    write_json(folder / PROGRESS, dataclasses.asdict(record))
    for stale in folder.glob(".*"):  # a record whose writer was killed
        stale.unlink()
    for file in FILES:
        path, (_, _, size) = folder / file, record.layout(file)
        path.touch()
        if path.stat().st_size < size:
            raise CacheError(f"expected {size} bytes in {path}, got {path.stat().st_size}: {_remedy(folder)}")
        os.truncate(path, size)
    return record


def _features(
    classifier: ExplainableClassifier, photos: list[Photo | str], kind: CacheType
) -> dict[str, npt.NDArray[Any]]:
    """Rows for the two files; zeros for a photo that could not be read or whose features are not finite."""
    readable = {index: photo.pixels for index, photo in enumerate(photos) if not isinstance(photo, str)}
    # if all are broken, a grey photo tells the shape of the features
    pixels = list(readable.values()) or [np.full((*classifier.transform.size, 3), 127, np.uint8)]
    with torch.inference_mode():
        features = classifier.trunk(classifier.pixels(np.stack(pixels))).float()
        largest = features.abs().amax(dim=(1, 2, 3)).tolist()
        pooled = features.mean(dim=(2, 3)).cpu().numpy()
        maps = features.permute(0, 2, 3, 1).to(getattr(torch, kind)).cpu().numpy()
    made = {"features": maps, "pooled": pooled}
    rows = {file: np.zeros((len(photos), *array.shape[1:]), array.dtype) for file, array in made.items()}
    limit = float(np.finfo(kind).max)
    for index, value, cells, mean in zip(readable, largest, maps, pooled, strict=False):
        if not np.isfinite(value):
            photos[index] = "expected finite features, got NaN or infinity from the classifier"
        elif value > limit:
            raise CacheError(f"expected features of at most {limit:g} for {kind}, got {value:.3g}: cache float32")
        else:
            rows["features"][index], rows["pooled"][index] = cells, mean
    return rows


def _opened(folder: Path) -> FeatureCache:
    record = _Record.read(folder / MANIFEST)
    if record.format != FORMAT:
        raise CacheError(f"expected a cache of format {FORMAT}, got {record.format} in {folder}: {_remedy(folder)}")
    maps = []
    for file in FILES:
        rows = record.rows(folder, file, every=False)
        if rows is None:
            damage = f"got a damaged {folder / file}: {_remedy(folder)}"
            raise CacheError(f"expected the features that were written, {damage}")
        maps.append(rows)
    features, pooled = maps
    return FeatureCache(folder, features, pooled, tuple((image, reason) for image, reason in record.failures))


def _probe(cache: FeatureCache, classifier: ExplainableClassifier, images: ImageSet) -> None:
    """Run the trunk on one image: code can change where weights do not."""
    failed = {image for image, _ in cache.failures}
    row = next(index for index, image in enumerate(images.names) if image not in failed)
    pixels = classifier.pixels(classifier.transform.read(images.path(row)).pixels[None])
    with torch.inference_mode():
        fresh = classifier.trunk(pixels).float().cpu()
    stored = cache.batch(np.array([row]))
    if fresh.shape != stored.shape or not (fresh - stored).abs().max() <= 0.02 * stored.abs().max():
        raise CacheError(
            f"expected the cached features of {images.names[row]} from this classifier, got others; its code has "
            f"changed since: `bla cache remove {cache.folder.name[:12]}` and run again"
        )


def _remedy(folder: Path) -> str:
    return f"remove it with `bla cache remove {folder.name[:12]}` and run again"
