"""Planted evidence on real features: a poisoned classifier's shortcut is what its explanations show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_shortcut_of_a_biased_classifier_is_exposed(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ["--classes", "3", "--photos", "18", "--kinds", "biased", "--settings", "BLA", "--seeds", "1", "--json"]
    command = [sys.executable, "-m", "benchmarks.faithfulness.planted", shared_data / "birds100", "--out", tmp_path]
    done = subprocess.run([*command, *small], cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)["biased, BLA"]
    # bounds for a small training; the figures at full size are in docs/background/evidence.md
    assert found["first_if_marked"] > found["first_if_plain"] + 0.5  # biased, else there is nothing to expose
    assert found["explanations"] > 20
    covered = {name: share["mean"] for name, share in found["covered"].items()}
    assert covered["bla"] > 0.9
    assert covered["bla"] > covered["centre"] + 0.2
    assert covered["bla"] > covered["random"] + 0.5
