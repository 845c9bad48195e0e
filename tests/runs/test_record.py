"""The record of a run: records written before still load, and reading one loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bla.model.backbones import weights_digest
from bla.model.classifier import explainable
from bla.runs.record import SHIPPED, Record, RunError, content_digest, new_record, read_record, run_folder, write_run
from bla.runs.run import open_run
from small import CHANNELS, CLASSES, Tiny, photo

OLD = """
{
 "schema_version": 1, "setup": "BLA-T", "model": "tiny",
 "backbone": {"name": null, "weights": null, "digest": "DIGEST"},
 "transform": {"size": [24, 40], "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.4, 0.5], "interpolation": "bilinear",
  "mode": "squash", "crop_fraction": 0.8, "source": "timm"},
 "data": {"train": "1f5f", "test": "d10a", "root": "/somewhere/photos", "images": {"train": 24, "test": 12}},
 "classes": ["class 0", "class 1", "class 2"], "seed": 3,
 "settings": {"setup": "bla-t", "head": "new", "targets": "labels", "epochs": 2, "head_epochs": 1, "batch_size": 32,
  "learning_rate": 0.001, "dropout": 0.2, "seed": 3, "temperature": 0.1, "threshold": null, "hidden": [],
  "context": false, "gate": false, "class_aware": false, "straight_through": 0.0, "final_temperature": null,
  "mean_size": null, "dial": 0.0, "size": 8, "variant": "official", "trunk_rate": null, "augment": false,
  "precision": "float32", "validation": 0.0, "patience": null, "several_labels": false, "maps": 1},
 "dead": false, "epochs": {"head": 1, "module": 2, "continued": 2}, "skipped": [],
 "versions": {"python": "3.11.7", "bounded-logit-attention": "0.1.0", "torch": "2.14.1"},
 "created": "2026-11-27T17:14:52+00:00", "seconds": 2.0, "metrics": {"images": 12}
}
"""
"""The record of an early version, its settings in one flat object."""


def old_run(folder: Path, setup: str, **settings: Any) -> dict[str, Tensor]:
    """A run folder as the early version wrote it, and its weights."""
    record = json.loads(OLD.replace("DIGEST", weights_digest(explainable(Tiny()).trunk)))
    record["settings"] |= {"setup": setup, **settings}
    hidden, clues = settings.get("hidden", []), 3 if settings.get("class_aware") else CHANNELS
    torch.manual_seed(1)
    tensors = {}
    for layer, (channels, width) in enumerate(zip([clues, *hidden], [*hidden, 1], strict=True)):
        name = f"attention.score.{2 * layer}" if hidden else "attention.score"
        tensors |= {f"{name}.weight": torch.randn(width, channels, 1, 1), f"{name}.bias": torch.randn(width)}
    if record["settings"]["head"] == "new":
        for head in ("baseline", "head", "continued"):
            tensors |= {f"{head}.1.weight": torch.randn(len(CLASSES), CHANNELS), f"{head}.1.bias": torch.randn(3)}
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record, indent=1))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_an_old_record_loads_and_predicts_as_it_did(tmp_path: Path) -> None:
    """Written out by the definition: u, z, the cells at the maximum, their mean, the head."""
    tensors = old_run(tmp_path / "run", "bla-t")
    opened = open_run(tmp_path / "run", model=Tiny(), device="cpu")
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["settings"].pop("maps") == 1  # there was a choice once
    assert opened.record == written
    settings = opened.settings
    assert (settings.name, settings.seed, settings.stages.epochs, settings.stages.head_epochs) == ("BLA-T", 3, 2, 1)
    pixels = torch.randn(5, 3, 24, 40)
    with torch.no_grad():
        features = Tiny().forward_features(pixels).flatten(2)
        scores = -(tensors["attention.score.weight"][0, :, 0, 0] @ features + tensors["attention.score.bias"]).relu()
        chosen = (scores == scores.amax(1, keepdim=True)).float()
        pooled = (features @ (chosen / chosen.sum(1, keepdim=True))[..., None])[..., 0]
        logits = pooled @ tensors["head.1.weight"].T + tensors["head.1.bias"]
        torch.testing.assert_close(opened.classifier(pixels), logits)


@pytest.mark.parametrize(
    ("setup", "settings", "name"),
    [
        ("bla", {"hidden": [4], "mean_size": 8.0, "straight_through": 0.5}, "BLA"),
        (
            "bla-ph",
            {"head": "own", "targets": "predictions", "class_aware": True, "hidden": [4]},
            "BLA-PH, class-aware",
        ),
        ("l2x-f", {"size": 4, "variant": "corrected"}, "L2X-F"),
        ("bla", {"validation": 0.1, "patience": 2, "final_temperature": 1.0, "dial": 0.5}, "BLA"),
        ("bla", {"several_labels": True, "threshold": 0.01}, "BLA, threshold 0.01"),
    ],
)
def test_old_settings_of_every_kind_load(setup: str, settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    tensors = old_run(tmp_path / "run", setup, **settings)
    opened = open_run(tmp_path / "run", model=Tiny(), device="cpu")
    assert opened.settings.name == opened.classifier.setup == name
    saved = opened.networks.saved()
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], value) for key, value in tensors.items())
    assert opened.classifier.explain(photo(0, 0))[0].cells == 15


def record_of_today() -> tuple[Record, dict[str, Any]]:
    fields = {key: value for key, value in json.loads(OLD).items() if key not in ("versions", "created")}
    fields["settings"].pop("maps")
    return new_record(**fields), fields


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record, fields = record_of_today()
    write_run(tmp_path / "run", record, {"model.safetensors": b"weights"})
    assert read_record(tmp_path / "run") == record
    assert (record["epochs"], record["seed"], record["seconds"]) == (fields["epochs"], 3, 2.0)
    digest = content_digest(tmp_path / "run")
    assert digest != content_digest(tmp_path / "run", "another version")
    write_run(tmp_path / "run", record, {"model.safetensors": b"others"})
    assert digest != content_digest(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(RunError, match="expected a complete run"):
        content_digest(tmp_path / "run")


def test_a_write_that_fails_leaves_no_complete_run(tmp_path: Path) -> None:
    record, _ = record_of_today()
    write_run(tmp_path, record, {"model.safetensors": b"weights"})
    with pytest.raises(TypeError):
        write_run(tmp_path, record, {"model.safetensors": "no bytes"})  # type: ignore[dict-item]
    with pytest.raises(RunError, match=r"got no run\.json"):
        read_record(tmp_path)


@pytest.mark.parametrize("folder", sorted(SHIPPED.iterdir()), ids=lambda folder: folder.name)
def test_the_shipped_records_are_read_by_name(folder: Path) -> None:
    assert run_folder(folder.name) == folder
    record = read_record(run_folder(folder.name))
    assert record["model"] == folder.name
    assert len(record["classes"]) == 1000


def test_reading_a_record_loads_no_torch() -> None:
    program = "import sys; from bla.runs.record import *; read_record(run_folder('tf_efficientnet_lite0'))"
    program += "; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
