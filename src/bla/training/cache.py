"""Feature cache on disk: the trunk runs once, training reads. Keyed by weights, transform and data."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from bla import BlaError
from bla.data.image_sets import ImageSet
from bla.data.photo import DataError, Photo, Transform
from bla.data.prefetching import cores, prefetch
from bla.files import cache_root, read_json, write_json
from bla.model.classifier import ExplainableClassifier
from bla.progress import Progress, silent
from bla.training import processes

FORMAT = 1
BATCH = 16
CHUNK = 128
"""Rows between two checkpoints of a build, and under one checksum."""

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

    def batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Features (B, C, H, W) of these rows, float32, channels last."""
        return torch.from_numpy(self.features[rows]).float().permute(0, 3, 1, 2)

    def pooled_batch(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Average-pooled features (B, C) of these rows, float32."""
        return torch.from_numpy(self.pooled[rows])


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over a module's state: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}\n".encode())
        digest.update(memoryview(array.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def cached_features(
    classifier: ExplainableClassifier,
    images: ImageSet,
    *,
    root: Path | None = None,
    kind: CacheType = "float16",
    report: Progress = silent,
) -> FeatureCache:
    """The features that the classifier's trunk gives for every image, computed where the cache lacks them.

    A build that was interrupted goes on where it stopped; of two that start at once, one builds and the other
    waits for it; the processes of :mod:`bla.training.processes` build a part each. An image that cannot be read is
    listed in
    ``failures`` and takes no part.

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
    root = cache_root() if root is None else root
    folder = root / _key(classifier, images, kind)
    if processes.agreed(not (folder / "manifest.json").exists()):
        with _only_builder(folder, report) if processes.rank() == 0 else contextlib.nullcontext():
            if processes.agreed(not (folder / "manifest.json").exists()):
                if processes.world() == 1:
                    _build(folder, classifier, images, kind, report)
                else:
                    _build_together(folder, classifier, images, kind, report)
    cache = _opened(folder)
    _probe(cache, classifier, images)
    return cache


def listed(root: Path | None = None) -> list[dict[str, Any]]:
    """What is cached under ``root``: ``key``, ``bytes``, ``complete`` and what the build noted, one each."""
    root = cache_root() if root is None else root
    if root.exists() and not root.is_dir():
        raise CacheError(f"expected the folder of all caches, got the file {root}")
    found = []
    for folder in _folders(root):
        # a build may end meanwhile: what was not there at first takes the place of what no longer is
        for name in ("manifest.json", "progress.json", "manifest.json"):
            with contextlib.suppress(FileNotFoundError):
                size = sum(file.stat().st_size for file in folder.rglob("[!.]*") if file.is_file())
                entry = {"key": folder.name, "bytes": size, "complete": name == "manifest.json"}
                try:
                    found.append(entry | _read(folder / name))
                except CacheError:
                    found.append(entry | {"complete": False} | _record("?", "?", 0, "float16") | {"created": "damaged"})
                break
    return found


def _folders(root: Path) -> list[Path]:
    """Those that are named by a key."""
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
    manifest = _read(folder / "manifest.json")
    bad = []
    for file, (dtype, shape) in _layout(manifest).items():
        if _bytes_of(folder / file) != _bytes(dtype, shape):
            bad.append(file)
            continue
        rows = np.memmap(folder / file, dtype, "r", shape=shape)
        chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        if [_checksum(chunk) for chunk in chunks] != manifest["checksums"][file]:
            bad.append(file)
    return bad


def _key(classifier: ExplainableClassifier, images: ImageSet, kind: CacheType) -> str:
    weights, transform = weights_digest(classifier.trunk), classifier.transform.to_dict()
    parts = [FORMAT, kind, classifier.name, weights, transform, images.digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _layout(manifest: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    images, (height, width, channels) = manifest["images"], manifest["shape"]
    return {
        "features": (manifest["kind"], (images, height, width, channels)),
        "pooled": ("float32", (images, channels)),
    }


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
    folder: Path,
    classifier: ExplainableClassifier,
    images: ImageSet,
    kind: CacheType,
    report: Progress,
    *,
    whole: bool = True,
) -> None:
    folder.mkdir(exist_ok=True)  # the run that we waited for may have removed it
    state = _resumable(folder, images, classifier.name, kind)
    write_json(folder / "progress.json", state)
    title = f"caching features of {len(images)} images"
    report(title, state["done"], len(images))
    files: dict[str, BinaryIO] = {file: (folder / file).open("ab") for file in ("features", "pooled")}
    with contextlib.ExitStack() as stack:
        for handle in files.values():
            stack.enter_context(handle)
        # a core is left to the trunk, whose threads wait for one another
        pool = stack.enter_context(ThreadPoolExecutor(max(1, cores() - 1)))
        # One thread waits for the disk while the trunk goes on; leaving this block waits for that thread.
        committer = stack.enter_context(ThreadPoolExecutor(1))
        commit: Future[None] | None = None
        todo = range(state["done"], len(images))
        read = prefetch(pool, lambda row: _try_read(images, row, classifier.transform), todo, ahead=4 * BATCH)
        while state["done"] < len(images):
            chunk = range(state["done"], min(state["done"] + CHUNK, len(images)))
            sums = dict.fromkeys(files, 0)
            for start in range(chunk.start, chunk.stop, BATCH):
                rows = range(start, min(start + BATCH, chunk.stop))
                photos = list(itertools.islice(read, len(rows)))
                arrays = _features(classifier, photos, kind, state)
                state["failures"] += [
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
                state["checksums"][file].append(sums[file])
            state["done"] = chunk.stop
            if commit is not None:
                commit.result()
            commit = committer.submit(_commit, folder, [*files.values()], copy.deepcopy(state))
        if commit is not None:
            commit.result()
    if whole and len(state["failures"]) == len(images):
        shutil.rmtree(folder)
        raise CacheError(f"expected images that can be read, got none of {len(images)}: {state['failures'][0][1]}")
    write_json(folder / "manifest.json", state, indent=1)
    (folder / "progress.json").unlink()


def _build_together(
    folder: Path, classifier: ExplainableClassifier, images: ImageSet, kind: CacheType, report: Progress
) -> None:
    """Each process builds whole chunks of its own beside one another; the first joins them.

    Another number of processes than those that were interrupted begins anew.
    """
    parts = [folder / f"part-{index}-of-{processes.world()}" for index in range(processes.world())]
    if processes.rank() == 0:
        folder.mkdir(exist_ok=True)
        for stale in set(folder.iterdir()) - set(parts):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        state = _record(classifier.name, images.root.name, len(images), kind)
        write_json(folder / "progress.json", state)
    processes.together()
    chunks = processes.share(-(-len(images) // CHUNK))
    rows = range(chunks.start * CHUNK, min(chunks.stop * CHUNK, len(images)))
    part = parts[processes.rank()]
    if rows and not (part / "manifest.json").exists():
        _build(part, classifier, images.subset(np.array(rows)), kind, report, whole=False)
    processes.together()
    if processes.rank() == 0:
        _join(folder, [part for part in parts if (part / "manifest.json").exists()], len(images))
    processes.together()


def _join(folder: Path, parts: Sequence[Path], images: int) -> None:
    """One cache of whole parts, in their order."""
    manifests = [_read(part / "manifest.json") for part in parts]
    whole = manifests[0] | {"images": images, "done": images, "failures": [], "checksums": {}}
    for manifest in manifests:
        whole["failures"] += manifest["failures"]
    for file in ("features", "pooled"):
        whole["checksums"][file] = [checksum for manifest in manifests for checksum in manifest["checksums"][file]]
        with (folder / file).open("wb") as target:
            for part in parts:
                with (part / file).open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 22)
            target.flush()
            os.fsync(target.fileno())
    if len(whole["failures"]) == images:
        reason = whole["failures"][0][1]
        shutil.rmtree(folder)
        raise CacheError(f"expected images that can be read, got none of {images}: {reason}")
    write_json(folder / "manifest.json", whole, indent=1)
    for part in parts:
        shutil.rmtree(part)
    (folder / "progress.json").unlink()


def _commit(folder: Path, files: list[BinaryIO], state: dict[str, Any]) -> None:
    """Let the state say that rows are there only when they are."""
    for file in files:
        os.fsync(file.fileno())
    write_json(folder / "progress.json", state)


def _resumable(folder: Path, images: ImageSet, name: str, kind: CacheType) -> dict[str, Any]:
    """The state of a build that stopped, its files cut back to the last whole chunk; or a new state."""
    state = _record(name, images.root.name, len(images), kind)
    if (folder / "progress.json").exists():
        state = _read(folder / "progress.json")
    for stale in folder.glob(".*"):  # a record whose writer was killed
        stale.unlink()
    for part in folder.glob("part-*/"):  # of a build by several processes that was interrupted
        shutil.rmtree(part)
    for file in ("features", "pooled"):
        whole = 0
        if state["shape"]:
            dtype, shape = _layout(state)[file]
            whole = _bytes(dtype, (state["done"], *shape[1:]))
        path = folder / file
        path.touch()
        if _bytes_of(path) < whole:
            raise CacheError(
                f"expected {whole} bytes in {path}, got {_bytes_of(path)}: remove it with `bla cache remove "
                f"{folder.name[:12]}` and run again"
            )
        os.truncate(path, whole)
    return state


def _features(
    classifier: ExplainableClassifier, photos: list[Photo | str], kind: CacheType, state: dict[str, Any]
) -> dict[str, npt.NDArray[Any]]:
    """Rows for the two files; zeros for a photo that could not be read or whose features are not finite."""
    readable = [index for index, photo in enumerate(photos) if not isinstance(photo, str)]
    if readable or state["shape"] is None:
        pixels = [photo.pixels for photo in photos if not isinstance(photo, str)]
        # where a first batch is all broken, a grey photo tells the shape of the features
        grey = np.full((1, *classifier.transform.size, 3), 127, np.uint8)
        with torch.inference_mode():
            features = classifier.trunk(classifier.pixels(np.stack(pixels) if pixels else grey)).float()
            largest = features.abs().amax(dim=(1, 2, 3)).tolist()
            pooled = features.mean(dim=(2, 3)).cpu().numpy()
            maps = features.permute(0, 2, 3, 1).to(getattr(torch, kind)).cpu().numpy()
        state["shape"] = list(maps.shape[1:])
    height, width, channels = state["shape"]
    limit = float(np.finfo(kind).max)
    if len(readable) == len(photos) and all(value <= limit for value in largest):  # no NaN is
        return {"features": np.ascontiguousarray(maps), "pooled": pooled}
    rows = {
        "features": np.zeros((len(photos), height, width, channels), kind),
        "pooled": np.zeros((len(photos), channels), np.float32),
    }
    for source, index in enumerate(readable):
        if not np.isfinite(largest[source]):
            photos[index] = "expected finite features, got NaN or infinity from the classifier"
        elif largest[source] > limit:
            raise CacheError(
                f"expected features of at most {limit:g} for {kind}, got {largest[source]:.3g}: cache float32"
            )
        else:
            rows["features"][index], rows["pooled"][index] = maps[source], pooled[source]
    return rows


def _try_read(images: ImageSet, row: int, transform: Transform) -> Photo | str:
    try:
        return transform.read(images.path(row))
    except DataError as error:
        return str(error)


def _opened(folder: Path) -> FeatureCache:
    manifest = _read(folder / "manifest.json")
    remedy = f"remove it with `bla cache remove {folder.name[:12]}` and run again"
    if manifest["format"] != FORMAT:
        raise CacheError(f"expected a cache of format {FORMAT}, got {manifest['format']} in {folder}: {remedy}")
    maps = {}
    for file, (dtype, shape) in _layout(manifest).items():
        expected, size = _bytes(dtype, shape), _bytes_of(folder / file)
        if size != expected:
            raise CacheError(f"expected {expected} bytes in {folder / file}, got {size}: {remedy}")
        maps[file] = np.memmap(folder / file, dtype, "r", shape=shape)
        last = len(manifest["checksums"][file]) - 1
        for chunk in {0, last}:
            if _checksum(maps[file][chunk * CHUNK : (chunk + 1) * CHUNK]) != manifest["checksums"][file][chunk]:
                raise CacheError(f"expected the features that were written, got a damaged {folder / file}: {remedy}")
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


def _checksum(rows: npt.NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).data)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _record(classifier: str, data: str, images: int, kind: CacheType) -> dict[str, Any]:
    """What is noted of a cache, at its start."""
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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
