"""A small study, made of nothing: what the tests of a study share."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bla.explanations.explanation import Explanation, Prediction
from bla.study.plan import Plan
from bla.study.preparing import Wishes, prepare

CLASSES = ("cat", "cup", "coin")
ARMS = ("bounded", "activation")  # too long to come up in random bytes
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def photo(name: str, arms: tuple[str, ...] = ("BLA", "CAM"), **more: Any) -> dict[str, Any]:
    def picture(part: str) -> dict[str, Any]:
        text = f"{name}{part}".encode().hex()
        return {"token": text.ljust(16, "0")[:40], "sha256": text.ljust(64, "0")[:64]}

    explained = {arm: picture(arm.lower()) | {"cells": 5} for arm in arms}
    return {
        "id": name, "name": f"{name}.jpg", "sha256": "0" * 64, "prediction": "cat", "truth": "cat",
        "options": ["cat", "dog"], "plain": picture("plain"), "explained": explained,
    } | more  # fmt: skip


def record(arms: tuple[str, ...] = ("BLA", "CAM"), count: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "title": "Cats", "question": "Which shows better why?", "task": "preference",
        "arms": [{"name": arm, "method": arm} for arm in arms], "photos": [photo(f"p{i}", arms) for i in range(count)],
        "trials": count, "people": 20, "width": 64, "height": 48, "file_size": 100, "created": NOON.isoformat(),
    } | more  # fmt: skip


def plan(**more: Any) -> Plan:
    return Plan.from_json(json.dumps(record(**more)))


def explained(folder: Path, arms: Sequence[str] = ARMS, *, each: int = 4, classes: Sequence[str] = CLASSES) -> None:
    """Photos and explanations by every arm, in FOLDER/photos/CLASS and FOLDER/ARM; the program errs on every fourth."""
    for index, name in enumerate(classes):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(each):
            rng = np.random.default_rng([index, number])
            pixels = rng.integers(0, 90, (96, 128, 3), np.uint8)
            pixels[20:80, 30:100, index % 3] += 140
            path = folder / "photos" / name / f"{name}-{number}.png"
            Image.fromarray(pixels).save(path)
            said = classes[(index + 1) % len(classes)] if number % 4 == 3 else name
            for arm, method in enumerate(arms):
                unbounded = np.round(rng.normal(size=(7, 7)), 4)
                selected = unbounded >= np.sort(unbounded.ravel())[-(5 + 3 * arm + number)]
                guess = Prediction(classes.index(said), said, 0.9)
                why = Explanation(
                    image=os.fspath(path), prediction=guess, top=(guess,), method=method, grid=(7, 7),
                    unbounded=unbounded, scores=np.minimum(unbounded, 0), soft=None, selected=selected,
                    region=(0, 0, 128, 96), model="secret-model", setup=f"setup-{method}",
                )  # fmt: skip
                (folder / method).mkdir(exist_ok=True)
                (folder / method / f"{name}-{number}.json").write_text(json.dumps(why.to_dict()))


def small_study(folder: Path, arms: Sequence[str] = ARMS, **wishes: Any) -> tuple[Path, str]:
    """A prepared study's folder, and its secret."""
    explained(folder, arms)
    values: dict[str, Any] = {"trials": 4, "repeats": 1, "catches": 1, "practice": 1, "title": "Cats and cups"}
    _, secret = prepare(folder / "study", [os.fspath(folder / arm) for arm in arms], Wishes(**values | wishes))
    return folder / "study", secret
