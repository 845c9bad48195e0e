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
from collections.abc import Iterator, Mapping, Sequence
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

CacheType = Literal["float16", "float32"]


class CacheError(BlaError):
    """A cache that cannot be built or is damaged."""


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

    An interrupted build resumes; of two that start at once, one builds and the other waits for it; each process of
    :mod:`bla.training.distributed` builds a part. ``failures`` lists the images that cannot be read.

    Parameters
    ----------
    kind: the type on disk. float16 halves the size and the reading.
    root: the folder of all caches, by default :func:`bla.files.cache_root`.

    Raises
    ------
    CacheError
        If no image can be read, features do not fit ``kind``, the root cannot be written, or the cache on disk is
        damaged.
    """
    if not len(images):
        raise CacheError("expected at least one image to cache features of, got none")
    folder = (root or cache_root()) / _key(classifier, images, kind)
    if distributed.agreed(not (folder / MANIFEST).exists()):
        with _only_builder(folder, report) if distributed.rank() == 0 else contextlib.nullcontext():
            if distributed.agreed(not (folder / MANIFEST).exists()):
                build = _build if distributed.world() == 1 else _build_together
                record = build(folder, classifier, images, kind, report)
                if distributed.rank() == 0:
                    _complete(folder, record)
                distributed.together()
    cache = _opened(folder)
    _probe(cache, classifier, images)
    return cache


def listed(root: Path | None = None) -> list[dict[str, Any]]:
    """The caches under ``root``: ``key``, ``bytes``, ``complete`` and the record of the build, one each."""
    root = root or cache_root()
    if root.exists() and not root.is_dir():
        raise CacheError(f"expected the folder of all caches, got the file {root}")
    return [entry for folder in _folders(root) if (entry := _entry(folder)) is not None]


def _entry(folder: Path) -> dict[str, Any] | None:
    for name in (MANIFEST, PROGRESS, MANIFEST):  # twice: a build may end meanwhile
        with contextlib.suppress(FileNotFoundError):
            size = sum(file.stat().st_size for file in folder.rglob("[!.]*") if file.is_file())
            entry = {"key": folder.name, "bytes": size, "complete": name == MANIFEST}
            try:
                return entry | _read(folder / name)
            except CacheError:
                return entry | {"complete": False} | _record("?", "?", 0, "float16") | {"created": "damaged"}
    return None


def _folders(root: Path) -> list[Path]:
    return [folder for folder in sorted(root.glob("*/")) if re.fullmatch("[0-9a-f]{64}", folder.name)]


def remove(keys: Sequence[str], root: Path | None = None) -> list[str]:
    """Remove caches by key or by the beginning of one; returns the keys removed.

    Raises
    ------
    CacheError
        If a key matches none, or a run is building the cache; nothing is removed then.
    """
    root = root or cache_root()
    present = [folder.name for folder in _folders(root)]
    chosen: list[str] = []
    for key in keys:
        matches = [known for known in present if key and known.startswith(key)]
        if not matches:
            raise CacheError(f"expected the key of a cache in {root}, got {key!r}: `bla cache list` shows them")
        chosen += [match for match in matches if match not in chosen]
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
    manifest = _read(folder / MANIFEST)
    bad = []
    for file, (dtype, shape) in _layout(manifest).items():
        whole = _size(folder / file) == _bytes(dtype, shape)
        rows = np.memmap(folder / file, dtype, "r", shape=shape) if whole else np.empty(0)
        if [_checksum(rows, start) for start in range(0, len(rows), CHUNK)] != manifest["checksums"][file]:
            bad.append(file)
    return bad


def _key(classifier: ExplainableClassifier, images: ImageSet, kind: CacheType) -> str:
    weights, transform = weights_digest(classifier.trunk), classifier.transform.to_dict()
    parts = [FORMAT, kind, classifier.name, weights, transform, images.digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _layout(record: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of the rows that are done, by file."""
    done, (height, width, channels) = record["done"], record["shape"] or (0, 0, 0)
    return {"features": (record["kind"], (done, height, width, channels)), "pooled": ("float32", (done, channels))}


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
) -> dict[str, Any]:
    """Write the rows of all images, and after every chunk how many are done; resumes after the last whole chunk."""
    folder.mkdir(exist_ok=True)
    record = _resumable(folder, _record(classifier.name, images.root.name, len(images), kind))
    write_json(folder / PROGRESS, record)
    title = f"caching features of {len(images)} images"
    report(title, record["done"], len(images))
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context((folder / file).open("ab")) for file in _layout(record)}
        # a core is left to the trunk, whose threads wait for one another
        pool = stack.enter_context(ThreadPoolExecutor(max(1, cores() - 1)))
        todo = range(record["done"], len(images))
        read = prefetch(pool, lambda row: try_read(images, row, classifier.transform), todo, ahead=4 * BATCH)
        while record["done"] < len(images):
            stop = min(record["done"] + CHUNK, len(images))
            sums = dict.fromkeys(files, 0)
            for start in range(record["done"], stop, BATCH):
                rows = range(start, min(start + BATCH, stop))
                photos = list(itertools.islice(read, len(rows)))
                arrays = _features(classifier, photos, kind)
                record["shape"] = list(arrays["features"].shape[1:])
                record["failures"] += [
                    [images.names[row], photo]
                    for row, photo in zip(rows, photos, strict=True)
                    if isinstance(photo, str)
                ]
                for file, array in arrays.items():
                    files[file].write(array.data)
                    sums[file] = zlib.crc32(array.data, sums[file])
                report(title, rows.stop, len(images))
            for file, handle in files.items():
                handle.flush()
                os.fsync(handle.fileno())
                record["checksums"][file].append(sums[file])
            record["done"] = stop  # which the record says only when the rows are on disk
            write_json(folder / PROGRESS, record)
    return record


def _build_together(
    folder: Path, classifier: ExplainableClassifier, images: ImageSet, kind: CacheType, report: Progress
) -> dict[str, Any]:
    """Each process builds a part, of whole chunks; the first one joins them.

    Another number of processes than those that were interrupted starts over.
    """
    parts = [folder / f"part-{index}-of-{distributed.world()}" for index in range(distributed.world())]
    record = _record(classifier.name, images.root.name, len(images), kind)
    if distributed.rank() == 0:
        folder.mkdir(exist_ok=True)
        for stale in set(folder.iterdir()) - set(parts):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        write_json(folder / PROGRESS, record)
    distributed.together()
    chunks = distributed.share(-(-len(images) // CHUNK))
    rows = np.arange(chunks.start * CHUNK, min(chunks.stop * CHUNK, len(images)))
    built = _build(parts[distributed.rank()], classifier, images.subset(rows), kind, report) if len(rows) else None
    records = [each for each in distributed.gathered(built) if each is not None]
    record |= {"done": len(images), "shape": records[0]["shape"]}
    record["failures"] = [failure for each in records for failure in each["failures"]]
    for file, checksums in record["checksums"].items():
        checksums += [checksum for each in records for checksum in each["checksums"][file]]
        if distributed.rank() == 0:
            with (folder / file).open("wb") as target:
                for part in filter(Path.exists, parts):
                    with (part / file).open("rb") as source:
                        shutil.copyfileobj(source, target, 1 << 22)
                target.flush()
                os.fsync(target.fileno())
    return record


def _complete(folder: Path, record: dict[str, Any]) -> None:
    """Let the folder be a cache, if any image could be read."""
    if len(record["failures"]) == record["images"]:
        shutil.rmtree(folder)
        reason = record["failures"][0][1]
        raise CacheError(f"expected images that can be read, got none of {record['images']}: {reason}")
    write_json(folder / MANIFEST, record, indent=1)
    (folder / PROGRESS).unlink()
    for part in folder.glob("part-*/"):
        shutil.rmtree(part)


def _resumable(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of an interrupted build, its files cut back to the last whole chunk; or the new record."""
    if (folder / PROGRESS).exists():
        record = _read(folder / PROGRESS)
    for stale in folder.glob(".*"):  # a record whose writer was killed
        stale.unlink()
    for part in folder.glob("part-*/"):  # of an interrupted build by several processes
        shutil.rmtree(part)
    for file, layout in _layout(record).items():
        path = folder / file
        path.touch()
        if _size(path) < _bytes(*layout):
            raise CacheError(f"expected {_bytes(*layout)} bytes in {path}, got {_size(path)}: {_remedy(folder)}")
        os.truncate(path, _bytes(*layout))
    return record


def _features(
    classifier: ExplainableClassifier, photos: list[Photo | str], kind: CacheType
) -> dict[str, npt.NDArray[Any]]:
    """Rows for the two files; zeros for a photo that could not be read or whose features are not finite."""
    readable = [index for index, photo in enumerate(photos) if not isinstance(photo, str)]
    pixels = [photo.pixels for photo in photos if not isinstance(photo, str)]
    # if all are broken, a grey photo tells the shape of the features
    pixels = pixels or [np.full((*classifier.transform.size, 3), 127, np.uint8)]
    with torch.inference_mode():
        features = classifier.trunk(classifier.pixels(np.stack(pixels))).float()
        largest = features.abs().amax(dim=(1, 2, 3)).tolist()
        pooled = features.mean(dim=(2, 3)).cpu().numpy()
        maps = features.permute(0, 2, 3, 1).to(getattr(torch, kind)).cpu().numpy()
    rows = {
        "features": np.zeros((len(photos), *maps.shape[1:]), kind),
        "pooled": np.zeros((len(photos), pooled.shape[1]), np.float32),
    }
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
    manifest = _read(folder / MANIFEST)
    if manifest["format"] != FORMAT:
        raise CacheError(
            f"expected a cache of format {FORMAT}, got {manifest['format']} in {folder}: {_remedy(folder)}"
        )
    maps = {}
    for file, (dtype, shape) in _layout(manifest).items():
        expected, size = _bytes(dtype, shape), _size(folder / file)
        if size != expected:
            raise CacheError(f"expected {expected} bytes in {folder / file}, got {size}: {_remedy(folder)}")
        maps[file] = np.memmap(folder / file, dtype, "r", shape=shape)
        checksums = manifest["checksums"][file]
        if any(_checksum(maps[file], chunk * CHUNK) != checksums[chunk] for chunk in (0, len(checksums) - 1)):
            raise CacheError(
                f"expected the features that were written, got a damaged {folder / file}: {_remedy(folder)}"
            )
    failures = tuple((image, reason) for image, reason in manifest["failures"])
    return FeatureCache(folder, maps["features"], maps["pooled"], failures)


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


def _checksum(rows: npt.NDArray[Any], start: int) -> int:
    return zlib.crc32(np.ascontiguousarray(rows[start : start + CHUNK]).data)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _record(classifier: str, data: str, images: int, kind: CacheType) -> dict[str, Any]:
    """The record of a cache at the start of its build."""
    return {
        "format": FORMAT,
        "created": timestamp(),
        "classifier": classifier,
        "data": data,
        "images": images,
        "kind": kind,
        "done": 0,
        "shape": None,
        "failures": [],
        "checksums": {"features": [], "pooled": []},
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = read_json(path)
        if not set(_record("", "", 0, "float16")) <= set(record):
            raise ValueError("keys are missing")
    except (ValueError, TypeError) as error:
        raise CacheError(
            f"expected the record of a cache in {path}, got another file: `bla cache remove {path.parent.name[:12]}`"
        ) from error
    return record
