"""The feature cache: what it holds, what its key covers, resuming after any interruption, damage, two builders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

import bla.training.cache
from bla.data.image_sets import ImageSet
from bla.data.photo import Transform
from bla.files import cache_root
from bla.model.backbones import weights_digest
from bla.model.classifier import ExplainableClassifier, explainable
from bla.training.cache import (
    CacheError,
    FeatureCache,
    cached_features,
    damaged,
    listed,
    remove,
    trim,
)
from forked import Starter

HALF = (0.5, 0.5, 0.5)
TRANSFORM = Transform((24, 40), HALF, HALF, interpolation="bilinear")
GRID = (3, 5)
CHANNELS = 6
COUNT = 22
BATCH, CHUNK = 4, 8  # 22 images: chunks of 8, 8 and 6, the last batch of 2
FILES = ("features", "pooled")


class Refusing(nn.Module):
    """NaN for a photo that is white all over."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels + 0 * torch.log(0.99 - pixels.mean(dim=(1, 2, 3), keepdim=True))


def tiny(seed: int = 0, *, scale: float = 1.0, activation: nn.Module | None = None) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        convolution = nn.Conv2d(3, CHANNELS, 8, stride=8)
        head = nn.Linear(CHANNELS, 3)
    with torch.no_grad():
        convolution.weight.mul_(scale)
    stem = nn.Sequential(Refusing(), convolution, activation or nn.ReLU())
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def wrapped(model: nn.Module | None = None, transform: Transform = TRANSFORM) -> ExplainableClassifier:
    return explainable(tiny() if model is None else model, transform=transform, name="tiny")


def write_photos(folder: Path, count: int = COUNT) -> ImageSet:
    """Noise with a patch in the class's colour; half of them JPEG, all 50 x 30."""
    folder.mkdir(parents=True)
    names, labels = [], []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 120, (30, 50, 3), dtype=np.uint8)
        pixels[5:20, 30:45, index % 3] = 250
        names.append(f"{index:03}.{'jpg' if index % 2 else 'png'}")
        labels.append(index % 3)
        Image.fromarray(pixels).save(folder / names[-1])
    return ImageSet(folder, tuple(names), np.array(labels), ("red", "green", "blue"))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bla.training.cache, "BATCH", BATCH)
    monkeypatch.setattr(bla.training.cache, "CHUNK", CHUNK)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def classifier() -> ExplainableClassifier:
    return wrapped()


@contextlib.contextmanager
def counted(classifier: ExplainableClassifier) -> Iterator[list[int]]:
    """How many photos went through the trunk, call by call."""
    calls: list[int] = []
    hook = classifier.trunk.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    try:
        yield calls
    finally:
        hook.remove()


def content(folder: Path) -> dict[str, Any]:
    """All that a complete cache holds, without the date."""
    assert sorted(path.name for path in folder.iterdir()) == ["features", "manifest.json", "pooled"]
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["created"]
    return {file: (folder / file).read_bytes() for file in FILES} | {"manifest": manifest}


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def interrupting(after: int) -> Callable[[str, int, int], None]:
    """A progress callback that is interrupted at its call number ``after``, counted from 0."""
    calls = 0

    def report(title: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt

    return report


# --- what it holds


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_row_is_what_the_trunk_gives_for_the_photo(
    kind: Any, images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    cache = cached_features(classifier, images, root=tmp_path / "caches", kind=kind)
    model = tiny().eval()
    expected = []
    with torch.inference_mode():  # photo by photo, without our wrapper; mean and std are 0.5
        for row in range(len(images)):
            pixels = torch.from_numpy(TRANSFORM.read(images.path(row)).pixels)
            expected.append(model[0]((pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5)[0])
    maps = torch.stack(expected)
    assert maps.shape == (COUNT, CHANNELS, *GRID)
    assert cache.failures == ()
    assert cache.features.shape == (COUNT, *GRID, CHANNELS)
    assert cache.features.dtype == np.dtype(kind)
    assert cache.pooled.dtype == np.float32

    rows = np.array([20, 3, 3, 0])
    batch, pooled = cache.batch(rows), cache.pooled_batch(rows)
    assert (batch.dtype, batch.shape) == (torch.float32, (4, CHANNELS, *GRID))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    rounding = 2.0**-11 if kind == "float16" else 1e-6  # half a unit in the last place
    torch.testing.assert_close(batch, maps[rows], rtol=1.01 * rounding, atol=2e-6)
    # the average is taken before the rounding
    torch.testing.assert_close(pooled, maps[rows].mean(dim=(2, 3)), rtol=1e-6, atol=1e-6)

    with torch.inference_mode():  # and to the bit, in the same batches
        for start in range(0, COUNT, CHUNK):
            for first in range(start, min(start + CHUNK, COUNT), BATCH):
                batched = np.arange(first, min(first + BATCH, start + CHUNK, COUNT))
                photos = np.stack([TRANSFORM.read(images.path(row)).pixels for row in batched])
                features = classifier.trunk(classifier.pixels(photos))
                assert torch.equal(cache.batch(batched), features.to(getattr(torch, kind)).float())
                assert torch.equal(cache.pooled_batch(batched), features.mean(dim=(2, 3)))


def test_a_build_runs_what_is_quickest(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, seen = [], []

    def quickest(network: nn.Module, pixels: Tensor, photos: int) -> tuple[Callable[[Tensor], Tensor], float]:
        asked.append((network, pixels.shape[1:], photos))
        return lambda pixels: [network(pixels), seen.append(len(pixels))][0], 0.0

    monkeypatch.setattr(bla.training.cache, "quickest", quickest)
    monkeypatch.setattr(bla.training.cache, "_MANY", COUNT)
    cached_features(classifier, images, root=tmp_path / "many")
    assert (asked, sum(seen)) == ([(classifier.trunk, (3, *TRANSFORM.size), COUNT)], COUNT)
    monkeypatch.setattr(bla.training.cache, "_MANY", COUNT + 1)
    cached_features(classifier, images, root=tmp_path / "few")
    assert (len(asked), sum(seen)) == (1, COUNT), "a few photos are not worth the timing"


@pytest.mark.parametrize("broken", [[5], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [18, 19, 20, 21], [0, 9, 21]])
def test_broken_photos_are_listed_and_move_no_row(
    broken: list[int], images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    whole = cached_features(classifier, images, root=tmp_path / "whole")
    for row in broken:
        images.path(row).write_bytes(b"" if row % 2 else images.path(row).read_bytes()[:200])
    cache = cached_features(classifier, images, root=tmp_path / "caches")
    assert [name for name, _ in cache.failures] == [images.names[row] for row in broken]
    assert all(str(images.path(row)) in reason for row, (_, reason) in zip(broken, cache.failures, strict=True))
    assert not cache.features[broken].any()
    assert not cache.pooled[broken].any()
    good = np.setdiff1d(np.arange(COUNT), broken)
    # another batch may round another way, not more than that
    np.testing.assert_allclose(cache.pooled[good], whole.pooled[good], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cache.features[good], whole.features[good], rtol=2e-3, atol=1e-5)


def test_no_readable_photo_is_an_error_every_time(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    for row in range(COUNT):
        images.path(row).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CacheError, match=r"expected images that can be read, got none of 22: .*000\.png"):
            cached_features(classifier, images, root=tmp_path / "caches")
        assert listed(tmp_path / "caches") == []


def test_no_photo_at_all(images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="expected at least one image"):
        cached_features(classifier, images.subset([]), root=tmp_path)


def test_features_that_are_not_finite_are_a_failure_of_that_photo(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    for row in (0, 6):
        Image.new("RGB", (50, 30), "white").save(images.path(row), "PNG")
    cache = cached_features(classifier, images, root=tmp_path)
    assert [name for name, _ in cache.failures] == [images.names[0], images.names[6]]
    assert all("finite" in reason for _, reason in cache.failures)
    assert not cache.features[[0, 6]].any()
    assert np.isfinite(cache.features).all()
    assert cache.features[[1, 5, 7]].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("scale", [1e6, 1e-9, 1e-12])
def test_features_that_float16_does_not_hold_are_cached_in_float32(
    scale: float, images: ImageSet, tmp_path: Path
) -> None:
    said: list[str] = []
    model = tiny(scale=scale)
    with torch.no_grad():
        model[0][1].bias.zero_()  # type: ignore[index,union-attr]
        model[3].weight.div_(scale)  # type: ignore[operator]
    classifier = wrapped(model)
    cache = cached_features(classifier, images, root=tmp_path, report=lambda what, *_: said.append(what))
    assert cache.features.dtype == np.float32
    assert any(what.startswith("features are cached in float32: float16 does not hold ") for what in said)
    assert [entry["kind"] for entry in listed(tmp_path)] == ["float32"]
    assert cached_features(wrapped(tiny()), images, root=tmp_path).features.dtype == np.float16


def test_a_channel_next_to_nothing_in_an_image_needs_no_float32(images: ImageSet, tmp_path: Path) -> None:
    classifier = wrapped(tiny())

    def nearly(_module: nn.Module, _inputs: object, features: Tensor) -> Tensor:
        return torch.cat([features.repeat(1, 8, 1, 1), torch.full_like(features[:, :1], 1e-9)], dim=1)

    classifier.trunk.register_forward_hook(nearly)
    assert cached_features(classifier, images, root=tmp_path).features.dtype == np.float16


# --- running the trunk once


def test_a_second_call_runs_the_trunk_on_one_photo_only(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    with counted(classifier) as calls:
        first = cached_features(classifier, images, root=tmp_path)
        assert calls == [4, 4, 4, 4, 4, 2, 1]
        second = cached_features(classifier, images, root=tmp_path)
        assert calls == [4, 4, 4, 4, 4, 2, 1, 1]
    assert first.folder == second.folder
    assert np.array_equal(first.features, second.features)


def test_progress_rises_from_nothing_to_all(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    cached_features(classifier, images, root=tmp_path, report=lambda *call: seen.append(call))
    assert seen == [("caching features of 22 images", done, 22) for done in (0, 4, 8, 12, 16, 20, 22)]


def test_the_key_covers_weights_transform_content_and_kind(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    def key(classifier: ExplainableClassifier = classifier, images: ImageSet = images, **options: Any) -> str:
        return cached_features(classifier, images, root=tmp_path / "caches", **options).folder.name

    changed = shutil.copytree(images.root, tmp_path / "changed")
    with Image.open(changed / "004.png") as photo:
        photo.putpixel((0, 0), (1, 2, 3))
        photo.save(changed / "004.png")
    renamed = shutil.copytree(images.root, tmp_path / "renamed")
    (renamed / "004.png").rename(renamed / "004a.png")
    names = tuple(sorted(path.name for path in renamed.iterdir()))
    keys = [
        key(),
        key(kind="float32"),
        key(wrapped(tiny(1))),
        key(wrapped(transform=Transform((24, 40), HALF, HALF, interpolation="bilinear", mode="crop"))),
        key(wrapped(transform=Transform((24, 40), HALF, (0.4, 0.5, 0.5), interpolation="bilinear"))),
        key(images=ImageSet(changed, images.names)),
        key(images=ImageSet(renamed, names)),
        key(images=images.subset(range(COUNT - 1))),
    ]
    assert len(set(keys)) == len(keys)


def test_caches_written_by_earlier_versions_are_found_and_read(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    folder = cached_features(classifier, images, root=tmp_path).folder
    depends = [1, "float16", "tiny", weights_digest(classifier.trunk), TRANSFORM.to_dict(), images.digest()]
    assert folder.name == hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    record = json.loads((folder / "manifest.json").read_text())
    del record["created"], record["checksums"]
    assert record == {
        "classifier": "tiny", "data": "photos", "images": COUNT, "kind": "float16", "format": 1, "done": COUNT,
        "shape": [*GRID, CHANNELS], "failures": [],
    }  # fmt: skip


def test_the_key_ignores_dates_the_folders_place_labels_and_what_follows_the_trunk(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    first = cached_features(classifier, images, root=tmp_path / "caches")
    elsewhere = ImageSet(Path(shutil.copytree(images.root, tmp_path / "elsewhere" / "moved")), images.names)
    os.utime(images.path(3), (1, 1))
    other = tiny()
    with torch.no_grad():
        other[3].weight.add_(1)
    for again in (wrapped(), wrapped(other)):
        for same in (images, elsewhere):
            with counted(again) as calls:
                assert cached_features(again, same, root=tmp_path / "caches").folder == first.folder
            assert calls == [1]


def test_the_weights_digest_covers_names_types_shapes_and_values() -> None:
    def digest(**tensors: Tensor) -> str:
        module = nn.Module()
        for name, value in tensors.items():
            module.register_buffer(name, value)
        return weights_digest(module)

    zero = torch.zeros(2, 3)
    digests = [
        digest(a=zero),
        digest(b=zero),
        digest(a=zero, b=zero),
        digest(a=zero.T.contiguous()),
        digest(a=zero.double()),
        digest(a=zero.int()),
        digest(a=torch.eye(3)[:2]),
        digest(a=torch.tensor(0.0)),
        digest(a=torch.tensor(True)),
        digest(a=zero.bfloat16()),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(a=zero, b=torch.eye(3)) == digest(b=torch.eye(3), a=zero)  # whatever the order
    assert digest(a=torch.eye(3)[:2].T) == digest(a=torch.eye(3)[:2].T.contiguous())  # whatever the strides


def test_other_code_with_the_same_weights_is_found_out(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    Image.new("RGB", (50, 30), "white").save(images.path(0), "PNG")  # the probe takes a row that did not fail
    folder = cached_features(classifier, images, root=tmp_path).folder
    changed = wrapped(tiny(activation=nn.Softplus()))
    with pytest.raises(CacheError, match=rf"001\.jpg .*code has changed.*bla cache remove {folder.name[:12]}"):
        cached_features(changed, images, root=tmp_path)


# --- interruptions


@pytest.fixture
def uninterrupted(images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path) -> dict[str, Any]:
    """With a broken photo in the second chunk, and a spoilt one in the third."""
    images.path(9).write_bytes(b"no photo")
    Image.new("RGB", (50, 30), "white").save(images.path(20), "PNG")
    return content(cached_features(classifier, images, root=tmp_path / "uninterrupted").folder)


@pytest.mark.parametrize("calls", range(7))
def test_an_interrupted_build_resumes_after_its_last_whole_chunk(
    calls: int, images: ImageSet, classifier: ExplainableClassifier, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    left = (22, 22, 22, 14, 14, 6, 6)[calls]
    root = tmp_path / "caches"
    # The exception lives on, as it does in a notebook: nothing that it refers to may hold the cache.
    with pytest.raises(KeyboardInterrupt) as stopped:
        cached_features(classifier, images, root=root, report=interrupting(calls))
    (entry,) = listed(root)
    assert not entry["complete"]
    assert entry["done"] == COUNT - left
    with counted(classifier) as trunk:
        cache = cached_features(classifier, images, root=root)
    assert stopped.value is not None
    # one row less for the broken photo where it had to be read again, one more for the probe
    assert sum(trunk) == left - (left > 12) + 1
    assert content(cache.folder) == uninterrupted
    assert [name for name, _ in cache.failures] == [images.names[9], images.names[20]]


@pytest.mark.parametrize("call", range(6))
def test_an_error_inside_the_trunk_loses_no_whole_chunk(
    call: int,
    images: ImageSet,
    classifier: ExplainableClassifier,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
) -> None:
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > call:
            raise MemoryError("out of memory")

    hook = classifier.trunk.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        cached_features(classifier, images, root=tmp_path / "caches")
    hook.remove()
    with counted(classifier) as trunk:
        cache = cached_features(classifier, images, root=tmp_path / "caches")
    assert sum(trunk[:-1]) == 21 - (0, 8, 15)[call // 2]
    assert content(cache.folder) == uninterrupted


def test_several_interruptions_and_a_torn_append(
    images: ImageSet, classifier: ExplainableClassifier, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "caches"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cached_features(classifier, images, root=root, report=interrupting(3))
        (entry,) = listed(root)
        for file in FILES:
            with (root / entry["key"] / file).open("ab") as handle:
                handle.write(b"torn" * 33)
    assert entry["done"] == 16
    assert content(cached_features(classifier, images, root=root).folder) == uninterrupted


def test_a_kill_between_the_last_two_steps_of_a_build(
    images: ImageSet,
    classifier: ExplainableClassifier,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = bla.training.cache.write_json
    root = tmp_path / "caches"

    def before_the_manifest(path: Path, record: Any, **options: Any) -> Path:
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        return written(path, record, **options)

    with monkeypatch.context() as patch:
        patch.setattr(bla.training.cache, "write_json", before_the_manifest)
        with pytest.raises(KeyboardInterrupt):
            cached_features(classifier, images, root=root)
    assert [(entry["done"], entry["complete"]) for entry in listed(root)] == [(COUNT, False)]
    with counted(classifier) as trunk:
        cache = cached_features(classifier, images, root=root)
    assert trunk == [1]
    assert content(cache.folder) == uninterrupted
    # killed after the manifest: what is left of the build does no harm
    (cache.folder / "progress.json").write_bytes((cache.folder / "manifest.json").read_bytes())
    assert cached_features(classifier, images, root=root).folder == cache.folder
    assert [entry["complete"] for entry in listed(root)] == [True]


def test_a_build_that_lost_bytes_says_so(images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached_features(classifier, images, root=tmp_path / "caches", report=interrupting(5))
    (entry,) = listed(tmp_path / "caches")
    os.truncate(tmp_path / "caches" / entry["key"] / "features", 100)
    with pytest.raises(
        CacheError, match=r"expected 2880 bytes in .*features, got 100: remove it with `bla cache remove"
    ):
        cached_features(classifier, images, root=tmp_path / "caches")
    remove([entry["key"][:8]], tmp_path / "caches")
    assert damaged(cached_features(classifier, images, root=tmp_path / "caches").folder) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and forks as POSIX does")
def test_a_killed_process_is_resumed(
    images: ImageSet,
    classifier: ExplainableClassifier,
    uninterrupted: dict[str, Any],
    start: Starter,
    tmp_path: Path,
) -> None:
    in_another_process(start, "kill", images.root, tmp_path)
    for calls, safe in KILLS.items():
        root = tmp_path / f"killed-{calls}"
        (entry,) = listed(root)
        done = entry["done"]
        assert not entry["complete"]
        assert done in (safe, safe - CHUNK)  # the last chunk's commit may have been under way
        with counted(classifier) as trunk:
            cache = cached_features(classifier, images, root=root)
        assert sum(trunk[:-1]) == 21 - max(0, done - (done > 9))
        assert content(cache.folder) == uninterrupted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and forks as POSIX does")
def test_of_two_builders_one_builds_and_the_other_waits(
    images: ImageSet, uninterrupted: dict[str, Any], start: Starter, tmp_path: Path
) -> None:
    in_another_process(start, "race", images.root, tmp_path)
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("builder-*.json"))]
    assert len(results) == 2
    assert sum(sum(result["rows"]) for result in results) == 21 + 2  # the readable photos once, and two probes
    assert sorted(len(result["rows"]) for result in results) == [1, 7]
    assert sorted("waiting" in " ".join(result["titles"]) for result in results) == [False, True]
    assert results[0]["sum"] == results[1]["sum"] == np.frombuffer(uninterrupted["pooled"], np.float32).sum()
    (folder,) = (tmp_path / "raced").glob("*/")
    assert content(folder) == uninterrupted


def test_the_one_that_waits_builds_where_the_builder_gave_up(
    images: ImageSet, classifier: ExplainableClassifier, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    (finished,) = (tmp_path / "uninterrupted").glob("*/")
    folder = tmp_path / "caches" / finished.name
    folder.mkdir(parents=True)
    builder = FileLock(f"{folder}.lock")
    builder.acquire()

    def report(title: str, done: int, total: int) -> None:
        if title.startswith("waiting"):
            shutil.rmtree(folder)
            builder.release()

    assert content(cached_features(classifier, images, root=folder.parent, report=report).folder) == uninterrupted


# --- damage


@pytest.fixture
def built(images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path) -> Path:
    return cached_features(classifier, images, root=tmp_path / "caches").folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 3),
        lambda path: flip(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(path.read_bytes() + b"1"),
        lambda path: path.unlink(),
    ],
    ids=["first-chunk", "last-chunk", "short", "long", "missing"],
)
def test_damage_is_refused_with_the_remedy_which_works(
    damage: Callable[[Path], None],
    file: str,
    built: Path,
    images: ImageSet,
    classifier: ExplainableClassifier,
) -> None:
    damage(built / file)
    key = built.name[:12]
    with pytest.raises(CacheError, match=rf"{file}.*: remove it with `bla cache remove {key}` and run again"):
        cached_features(classifier, images, root=built.parent)
    assert damaged(built) == [file]
    assert remove([key], built.parent) == [built.name]
    assert damaged(cached_features(classifier, images, root=built.parent).folder) == []


@pytest.mark.parametrize("file", FILES)
def test_damage_in_the_middle_is_found_when_it_is_opened_and_by_a_check(
    file: str, built: Path, images: ImageSet, classifier: ExplainableClassifier
) -> None:
    assert damaged(built) == []
    flip(built / file, (built / file).stat().st_size // 2)
    with pytest.raises(CacheError, match=f"expected .*{file} as it was written, got a damaged file: remove it with"):
        cached_features(classifier, images, root=built.parent)
    assert damaged(built) == [file]


def test_another_format_is_refused(built: Path, images: ImageSet, classifier: ExplainableClassifier) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    (built / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CacheError, match=r"format 1, got 99 .*bla cache remove"):
        cached_features(classifier, images, root=built.parent)


def test_a_root_that_cannot_be_written_is_named(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "caches"):
        with pytest.raises(CacheError, match=r"expected a folder for caches that can be written, got .*BLA_CACHE"):
            cached_features(classifier, images, root=root)

    def refuse(path: Path, *_: Any, **__: Any) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CacheError, match=r"locked.*Permission denied.*BLA_CACHE"):
        cached_features(classifier, images, root=tmp_path / "locked")


# --- reading, listing, removing


def test_reading_is_memory_mapped(built: Path, images: ImageSet, classifier: ExplainableClassifier) -> None:
    cache = cached_features(classifier, images, root=built.parent)
    assert isinstance(cache.features, np.memmap)
    assert isinstance(cache.pooled, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        cache.features[0] = 0
    batch = cache.batch(np.array([1]))
    batch.fill_(7)  # a copy, which may be written to
    assert not (cache.batch(np.array([1])) == 7).any()


def test_reading_all_takes_the_memory_of_a_batch(tmp_path: Path) -> None:
    shape = (2000, 7, 7, 256)  # 50 MB, a hole on disk
    features = np.memmap(tmp_path / "features", np.float16, "w+", shape=shape)
    cache = FeatureCache(tmp_path, features, np.zeros((shape[0], shape[-1]), np.float32), ())
    cache.batch(np.arange(20))
    tracemalloc.start()
    for start in range(0, shape[0], 20):
        cache.batch(np.arange(start, start + 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * features[:20].nbytes


def test_listing_says_what_is_there(images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path) -> None:
    root = tmp_path / "caches"
    assert listed(root) == []  # there is no such folder yet
    folder = cached_features(classifier, images, root=root).folder
    with pytest.raises(KeyboardInterrupt):
        cached_features(wrapped(tiny(1)), images, root=root, report=interrupting(3))
    (root / "other").mkdir()  # not ours
    (root / "other" / "photo.jpg").touch()
    entries = {entry["complete"]: entry for entry in listed(root)}
    assert len(entries) == 2
    whole, part = entries[True], entries[False]
    assert whole["key"] == folder.name
    assert whole["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert whole["bytes"] > COUNT * CHANNELS * (2 * GRID[0] * GRID[1] + 4)
    assert (whole["classifier"], whole["data"], whole["images"], whole["kind"]) == ("tiny", "photos", 22, "float16")
    assert (part["done"], part["images"]) == (8, 22)


def test_listing_while_a_build_ends(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, manifest = built / "progress.json", built / "manifest.json"
    manifest.rename(progress)
    read = Path.read_bytes

    def end_the_build(path: Path) -> bytes:
        if path == progress:
            progress.rename(manifest)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", end_the_build)
    assert [(entry["key"], entry["complete"]) for entry in listed(built.parent)] == [(built.name, True)]


@pytest.mark.parametrize("content", [b"\xff{", b"{}", b"[1]", b"7"])
def test_a_damaged_record_is_named_and_can_be_removed(
    content: bytes, built: Path, images: ImageSet, classifier: ExplainableClassifier
) -> None:
    (built / "manifest.json").write_bytes(content)
    with pytest.raises(CacheError, match=rf"expected the record of a cache .*`bla cache remove {built.name[:12]}`"):
        cached_features(classifier, images, root=built.parent)
    (built.parent / "another program's").mkdir()
    (built.parent / "another program's" / "manifest.json").write_text("{}")
    ((entry),) = listed(built.parent)
    assert (entry["key"], entry["complete"], entry["created"]) == (built.name, False, "damaged")
    assert remove([built.name[:12]], built.parent) == [built.name]
    assert listed(built.parent) == []


def test_removing_takes_keys_and_their_beginnings(images: ImageSet, tmp_path: Path) -> None:
    root = tmp_path / "caches"
    keys = sorted(cached_features(wrapped(tiny(seed)), images, root=root).folder.name for seed in range(3))
    for unknown in ("none", "", "../photos", keys[0] + "0"):
        with pytest.raises(CacheError, match=r"expected the key of a cache .*`bla cache list` shows them"):
            remove([keys[1], unknown], root)
    assert [entry["key"] for entry in listed(root)] == keys  # nothing was removed
    assert remove([keys[2][:10], keys[2]], root) == [keys[2]]
    assert remove([keys[0], keys[1][:20]], root) == keys[:2]
    assert list(root.iterdir()) == []
    assert images.path(0).exists()


def test_the_least_recently_used_caches_go_first(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = (cached_features(wrapped(tiny(seed)), images, root=tmp_path).folder.name for seed in range(2))
    cached_features(wrapped(tiny(0)), images, root=tmp_path)
    monkeypatch.setenv("BLA_CACHE_GB", str(2.1e-9 * listed(tmp_path)[0]["bytes"]))
    third = cached_features(wrapped(tiny(2)), images, root=tmp_path).folder.name
    assert {entry["key"] for entry in listed(tmp_path)} == {first, third}
    for none in (-1.0, math.nan):
        with pytest.raises(CacheError, match="expected a number of bytes, 0 or more"):
            trim(none, tmp_path)
    assert trim(0, tmp_path) == [first]
    monkeypatch.setenv("BLA_CACHE_GB", "much")
    with pytest.raises(CacheError, match="expected a number of gigabytes in"):
        cached_features(wrapped(tiny(2)), images, root=tmp_path)


def test_a_cache_that_is_being_built_is_not_removed(
    images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    other = cached_features(wrapped(tiny(1)), images, root=tmp_path).folder.name
    refused = []

    def report(title: str, done: int, total: int) -> None:
        for entry in listed(tmp_path):
            if entry["complete"]:
                continue
            with pytest.raises(CacheError, match="is building it"):
                remove([other, entry["key"]], tmp_path)
            refused.append(done)

    cached_features(classifier, images, root=tmp_path, report=report)
    assert refused == [0, 4, 8, 12, 16, 20, 22]
    assert len(listed(tmp_path)) == 2


def test_the_default_root_is_the_environments_or_the_users(
    monkeypatch: pytest.MonkeyPatch, images: ImageSet, classifier: ExplainableClassifier, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLA_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    assert cached_features(classifier, images).folder.parent == tmp_path / "mine"
    assert len(listed()) == 1
    assert remove([listed()[0]["key"]])
    monkeypatch.delenv("BLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_root().name == "bla"


# --- other processes

KILLS = {0: 0, 2: 0, 3: 8, 6: 16}
"""Number of the progress call at which a process kills itself, and the rows that are safe by then."""


def in_another_process(start: Starter, command: str, photos: Path, folder: Path) -> None:
    program = f"import runpy; runpy.run_path({__file__!r})['main']({command!r}, {str(photos)!r}, {str(folder)!r})"
    assert start(1, program) == [0]


def forked(*tasks: Callable[[], None]) -> list[int]:
    """Run the tasks at once, in processes of their own; their exit statuses, negative for a signal."""
    processes = []
    for task in tasks:
        process = os.fork()
        if process == 0:
            status = 1
            try:
                task()
                status = 0
            finally:
                os._exit(status)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def kill_at(photos: ImageSet, root: Path, after: int) -> None:
    calls = 0

    def report(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)

    cached_features(wrapped(), photos, root=root, report=report)


def race(photos: ImageSet, folder: Path, number: int) -> None:
    classifier = wrapped()
    titles: list[str] = []
    (folder / f"ready-{number}").touch()
    while len(list(folder.glob("ready-*"))) < 2:
        time.sleep(0.001)

    def report(title: str, done: int, total: int) -> None:
        titles.append(title)
        time.sleep(0.06)

    with counted(classifier) as rows:
        cache = cached_features(classifier, photos, root=folder / "raced", report=report)
    result = {"rows": rows, "titles": titles, "sum": float(cache.pooled[:].sum())}
    (folder / f"builder-{number}.json").write_text(json.dumps(result))


def main(command: str, photos: str, place: str) -> None:
    bla.training.cache.BATCH, bla.training.cache.CHUNK = BATCH, CHUNK
    folder = Path(place)
    images = ImageSet(Path(photos), tuple(sorted(path.name for path in Path(photos).iterdir())))
    if command == "kill":
        for after in KILLS:
            (status,) = forked(lambda after=after: kill_at(images, folder / f"killed-{after}", after))
            assert status == -signal.SIGKILL, status
    else:
        assert forked(lambda: race(images, folder, 1), lambda: race(images, folder, 2)) == [0, 0]
