"""Certificates: sizes counted by hand, the order of testing, what is stored, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bla.data.image_sets import Splits, image_folder
from bla.data.masking import masked
from bla.data.photo import DataError
from bla.metrics.statistics import lower_bound
from bla.model.classifier import ExplainableClassifier
from bla.model.evidence import from_all
from bla.runs.calibration import _too_many, calibrate, smallest_size
from bla.runs.certificates import Certificate, Quantity, read_certificate
from bla.runs.hub import save_pretrained
from bla.runs.record import RunError
from bla.runs.run import load
from small import GRID, Tiny, write_classes

CELLS = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_classes(tmp_path_factory.mktemp("held-out") / "photos", 20)
    for photo in folder.glob("*/1*"):  # others than the run has seen
        photo.rename(photo.with_stem(f"later-{photo.stem}"))
    return folder


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def certified(run: Path, photos: Path | Splits, **options: Any) -> Certificate:
    return calibrate(run, photos, model=Tiny(), device="cpu", **options)[0]


@torch.no_grad()
def passed(classifier: ExplainableClassifier, paths: list[Path], size: int) -> dict[str, list[bool]]:
    """Of each photo, by its explanation and other code."""
    explanations = classifier.explain(paths, size=size)
    masks = torch.tensor(np.stack([explanation.selected for explanation in explanations])).float()
    pixels = classifier.pixels(np.stack([classifier.transform.read(path).pixels for path in paths]))
    photos = (pixels, masked(pixels, masks, "grey"), masked(pixels, 1 - masks, "grey"))
    whole, alone, without = (from_all(classifier.head, classifier.trunk(each)).argmax(1) for each in photos)
    agreement = [explanation.agrees for explanation in explanations]
    return {"agreement": agreement, "kept": (alone == whole).tolist(), "removed": (without != whole).tolist()}


def test_sizes_are_those_of_a_slow_count(run: Path, held_out: Path) -> None:
    images = image_folder(held_out).whole()
    classifier = load(run, model=Tiny(), device="cpu")
    paths = [images.path(row) for row in range(len(images))]
    each = [passed(classifier, paths, size) for size in range(1, CELLS + 1)]
    shares: dict[Quantity, float] = {"agreement": 0.475, "kept": 0.87, "removed": 0.02}
    for quantity, share in shares.items():
        counts = [sum(found[quantity]) for found in each]
        bounds = [lower_bound(count, len(paths)) for count in counts]
        expected = 1 + max(size for size, bound in enumerate(bounds, start=1) if bound < share)
        found = certified(run, held_out, quantity=quantity, share=share, fill="grey")
        assert 1 < expected < CELLS
        assert (found.size, found.cells, found.photos) == (expected, CELLS, len(paths))
        assert found.rate == counts[expected - 1] / len(paths)
        assert found.bound == bounds[expected - 1]
        if quantity == "agreement":
            assert bounds[0] > share, "the smallest size is not tested after a larger one failed"


def test_testing_stops_at_the_first_size_that_fails() -> None:
    assert smallest_size({4: 0, 3: 0, 2: 0, 1: 0}, 1) == 1
    assert smallest_size({4: 0, 3: 0, 2: 9, 1: 0}, 1) == 3  # size 1 passes, but is never tested
    assert smallest_size({4: 9, 3: 0, 2: 0, 1: 0}, 1) is None
    assert smallest_size({7: 2, 5: 3, 3: 4, 1: 5}, 4) == 5


def test_choosing_the_size_keeps_the_level() -> None:
    """Of 2,000 calibrations fewer than 5% certify a size whose share is lower, here .895 and below."""
    rng = np.random.default_rng(0)
    limit = _too_many(200, 0.9, 0.95)
    shares = {6: 1.0, 5: 0.98, 4: 0.895, 3: 0.89, 2: 0.893, 1: 0.88}
    misses = rng.binomial(200, 1 - np.array([*shares.values()]), (2000, len(shares)))
    chosen = [smallest_size(dict(zip(shares, row, strict=True)), limit) for row in misses.tolist()]
    assert 0 < sum(size is not None and shares[size] < 0.9 for size in chosen) < 0.05 * len(chosen)
    assert limit == 1 + max(k for k in range(200) if stats.binom.sf(199 - k, 200, 0.9) <= 0.05)


def test_the_certificate_is_stored_and_read_back(run: Path, held_out: Path, tmp_path: Path) -> None:
    found = certified(run, held_out, quantity="agreement", share=0.6)
    assert read_certificate(run) == found
    record = json.loads((run / "run.json").read_text())
    assert found.model == record["backbone"]["digest"]
    assert found.transform == record["transform"]
    assert found.images == image_folder(held_out).whole().digest()
    assert found.fill is None
    assert found.rate >= found.bound >= found.share == 0.6
    elsewhere = certified(run, held_out, share=0.3, out=tmp_path / "c.json")
    assert read_certificate(run) == found
    assert read_certificate(run, tmp_path / "c.json") == elsewhere
    save_pretrained(run, tmp_path / "shared")
    assert read_certificate(tmp_path / "shared") == found
    assert f"{found}." in (tmp_path / "shared" / "README.md").read_text()
    (run / "certificate.json").unlink()
    save_pretrained(run, tmp_path / "shared")
    assert read_certificate(tmp_path / "shared") is None


def test_it_says_what_it_certifies() -> None:
    claim = dict(share=0.9, confidence=0.95, cells=49, rate=0.94, bound=0.92, photos=1500, images="", seed=0)  # noqa: C408
    made = {"transform": {}, "model": "", "weights": "", "versions": {}, "created": ""}
    kept = Certificate(quantity="kept", size=9, fill="coarse", **claim, **made)  # type: ignore[arg-type]
    assert str(kept) == (
        "certificate: from the pixels of the 9 best cells alone the classifier keeps its class in at least 90% of "
        "photos like those 1,500 (95% confidence; fill coarse)"
    )
    agreement = dataclasses.replace(kept, quantity="agreement", size=1, fill=None)
    assert "from the best cell alone the head says" in str(agreement)
    assert "(95% confidence)" in str(agreement)


def test_photos_that_cannot_be_read_do_not_count(run: Path, held_out: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(held_out, tmp_path / "photos"))
    next(photos.glob("*/*.png")).write_bytes(b"no photo")
    found, failures = calibrate(run, photos, quantity="agreement", share=0.5, model=Tiny(), device="cpu")
    assert len(failures) == 1
    assert found.photos == 59


def test_without_a_size_nothing_is_stored(run: Path, held_out: Path, colours: Path) -> None:
    expected = {
        "expected at least 59 photos for a share of 0.95 with confidence 0.95, got 6": {"share": 0.95},
        "expected a share between 0 and 1, got 90": {"share": 90},
        "expected a confidence between 0 and 1": {"confidence": 1},
        "expected a quantity among agreement, kept, removed": {"quantity": "lost"},
    }
    for message, options in expected.items():
        with pytest.raises(RunError, match=message):
            certified(run, colours, **options)
    with pytest.raises(RunError, match=r"removed reaches 0.9 with confidence 0.95, got none: all 15 cells fail"):
        certified(run, held_out, quantity="removed", share=0.9, fill="coarse")
    with pytest.raises(DataError, match="expected a fill among"):
        certified(run, held_out, share=0.5, fill="snow")
    assert not (run / "certificate.json").exists()


def test_photos_that_were_trained_on_are_refused(run: Path, colours: Path) -> None:
    splits = image_folder(colours)
    with pytest.raises(RunError, match="expected held-out photos"):
        certified(run, Splits(splits.test, splits.train, seeded=False))
    assert certified(run, colours, quantity="agreement", share=0.2).photos == len(splits.test)


def test_certificates_of_others_are_refused(run: Path, held_out: Path) -> None:
    path = run / "certificate.json"
    certified(run, held_out, quantity="agreement", share=0.3)
    known = json.loads(path.read_text())
    remarks: list[str] = []
    for field, value, message in (
        ("model", "0", "expected a certificate of this classifier, got one of another"),
        ("weights", "0", "expected a certificate of this explainer, got one of another"),
        ("size", 99, "expected a certificate in .*: `bla calibrate` writes one"),
        ("schema_version", 9, "expected a certificate in .*schema_version 9"),
        ("more", 1, "expected a certificate in"),
    ):
        path.write_text(json.dumps({**known, field: value}))
        with pytest.raises(RunError, match=message):
            read_certificate(run)
    path.write_text(json.dumps({**known, "transform": {**known["transform"], "mode": "crop"}}))
    read_certificate(run, report=lambda text, done, total: remarks.append(text))
    assert "other preprocessing" in remarks[0]
    with pytest.raises(RunError, match="which comes with the package"):
        calibrate("tf_efficientnet_lite0", held_out)
