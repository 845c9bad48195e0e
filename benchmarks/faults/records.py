"""Damage records at random, and read them: each is read, or refused by one line; nothing else may happen.

python -m benchmarks.faults.records --damages 1000
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import random
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bla import BlaError
from bla.data.photo import Transform
from bla.deploy.batch.location import Location
from bla.deploy.batch.plan import Task, make_plan, read_plan
from bla.deploy.engine import Card
from bla.explanations.explanation import Explanation, Prediction
from bla.runs.certificates import Certificate, digests, read_certificate
from bla.runs.record import SHIPPED, content_digest, read_record
from bla.study.keys import Keys
from bla.study.texts import Texts
from bla.training import cache
from bla.training.settings import Settings

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, -1e-308, float("nan"), float("inf"), "", "x", "\x1b[2J",
    "\udcff", "../..", "x" * 5000, [], {}, [[]], [None], {"": None}, [1, 2, 3, 4], [[0] * 9] * 9,
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """A record: how to write a whole one into a folder, and how it is read there."""

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], object]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The record with a wrong value, key or type somewhere, or with wrong bytes."""
    try:
        record = json.loads(content)
    except ValueError:
        record = None
    if record is None or rng.random() < 0.3:
        place, length = rng.randrange(len(content)), rng.randrange(1, 40)
        wrong = rng.choice(
            [b"", rng.randbytes(length), content[:length], b"\x00" * length, b"[" * 3000, b'"', b"9" * 50]
        )
        return content[:place] + wrong + content[place + rng.choice([0, 1, length, len(content)]) :]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        _spoil(record, rng)
    return json.dumps(record).encode()


def _spoil(record: Any, rng: random.Random) -> None:
    places = list(_places(record))
    if not places:
        return
    holder, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(["", "x", key + " ", "schema_version"])] = holder.pop(key)
        case 2 if isinstance(holder[key], int | float):
            holder[key] = rng.choice([-holder[key], holder[key] * 10**6, holder[key] + 1, str(holder[key])])
        case _:
            holder[key] = copy.deepcopy(rng.choice(JUNK))


def _places(record: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(record, dict | list):
        for key in list(record) if isinstance(record, dict) else range(len(record)):
            yield record, key
            yield from _places(record[key])


# --- the kinds


def _shipped(folder: Path) -> Path:
    shutil.copytree(SHIPPED / "tf_efficientnet_lite0", folder, dirs_exist_ok=True)
    return folder / "run.json"


def _read_run(folder: Path) -> object:
    record = read_record(folder)
    return Settings.from_record(record["settings"]), Transform.from_dict(record["transform"]), content_digest(folder)


def _certified(folder: Path) -> Path:
    record = read_record(_shipped(folder).parent)
    known = dict(zip(("model", "weights"), digests(folder, record), strict=True)) | {"images": "0" * 64}
    numbers = {"share": 0.9, "confidence": 0.95, "size": 8, "cells": 49, "rate": 0.95, "bound": 0.91, "photos": 100}
    others: dict[str, Any] = {"transform": record["transform"], "seed": 0, "versions": {}, "created": "now"}
    certificate = Certificate(quantity="kept", fill="coarse", **numbers, **known, **others)  # type: ignore[arg-type]
    (folder / "certificate.json").write_text(json.dumps(dataclasses.asdict(certificate)))
    return folder / "certificate.json"


def _cached(folder: Path) -> Path:
    place = folder / ("0" * 64)
    place.mkdir(parents=True)
    record = cache._Record("net", "photos", 3, "float16", shape=[2, 2, 4])
    record.done = 3
    rows = {"features": np.ones((3, 2, 2, 4), np.float16), "pooled": np.ones((3, 4), np.float32)}
    for file, array in rows.items():
        (place / file).write_bytes(array.tobytes())
        record.checksums[file] = [cache.zlib.crc32(array.data)]
    record.failures = [("a.png", "why")]
    (place / "manifest.json").write_text(json.dumps(dataclasses.asdict(record)))
    return place / "manifest.json"


def _read_cache(folder: Path) -> object:
    cache.listed(folder)
    return cache._opened(folder / ("0" * 64)), cache.damaged(folder / ("0" * 64))


def _building(folder: Path) -> Path:
    return _cached(folder).rename(folder / ("0" * 64) / "progress.json")


def _read_building(folder: Path) -> object:
    place = folder / ("0" * 64)
    for file, size in (("features", 96), ("pooled", 48)):
        (place / file).write_bytes(bytes(size))
    return cache._resumed(place, cache._Record("net", "photos", 3, "float16"), 3)


def _card(folder: Path) -> Path:
    view = Transform((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    card = Card(("a", "b"), view, (7, 7), "BLA", "net", "BLA", "pixels", sizes=True, targets=False, version="1")
    (folder / "card.json").write_text(json.dumps(dataclasses.asdict(card)))
    return folder / "card.json"


def _read_card(folder: Path) -> Card:
    return Card.from_json((folder / "card.json").read_text("utf-8", "replace"))  # as ONNX Runtime gives it


def _planned(folder: Path) -> Path:
    (folder / "photos").mkdir(parents=True)
    for name in "abc":
        (folder / "photos" / f"{name}.jpg").touch()
    make_plan(
        folder / "photos", Task(source=str(folder / "photos"), graph="0" * 64), Location.of(folder / "work"), shard=2
    )
    return folder / "work" / "plan.json"


def _read_plan(folder: Path) -> object:
    plan = read_plan(Location.of(folder / "work"))
    return plan and [*plan.shards()]


def _explained(folder: Path) -> Path:
    guess = Prediction(1, "cat", 0.9)
    maps = {"unbounded": -np.eye(3), "scores": -np.eye(3), "soft": None, "selected": np.eye(3) == 0}
    why = Explanation("a.jpg", guess, (guess,), "BLA", (3, 3), region=(0, 0, 9, 9), classifier=guess, **maps)  # type: ignore[arg-type]
    return why.save(folder / "why.json")


def _keys(folder: Path) -> Path:
    Keys.made(folder)
    return folder / "secrets.json"


def _texts(folder: Path) -> Path:
    (folder / "texts.toml").write_text(Texts.english().source)
    return folder / "texts.toml"


KINDS = [
    Kind("run.json", _shipped, _read_run),
    Kind("certificate.json", _certified, read_certificate),
    Kind("manifest.json of a cache", _cached, _read_cache),
    Kind("progress.json of a cache", _building, _read_building),
    Kind("the card of an ONNX file", _card, _read_card),
    Kind("plan.json of a batch", _planned, _read_plan),
    Kind("an explanation", _explained, lambda folder: str(Explanation.load(folder / "why.json"))),
    Kind("secrets.json of a study", _keys, Keys.load),
    Kind("texts.toml of a study", _texts, lambda folder: Texts.load(folder / "texts.toml")),
]


def outcomes(kind: Kind, damages: int, seed: int = 0) -> Counter[str]:
    """How often damaged records of a kind are read and refused; of any other outcome, its traceback."""
    found: Counter[str] = Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        path = kind.write(Path(temporary))
        whole = path.read_bytes()
        for _ in range(damages):
            path.write_bytes(damaged(whole, rng))
            try:
                with contextlib.redirect_stderr(None):
                    kind.read(Path(temporary))
                found["read"] += 1
            except BlaError:
                found["refused"] += 1
            except Exception:
                found[traceback.format_exc(limit=-4)] += 1
    return found


def main() -> None:
    """Damage records of every kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in KINDS:
        found = outcomes(kind, options.damages, options.seed)
        print(
            f"{kind.name}: {found.pop('refused', 0)} refused, {found.pop('read', 0)} read, {sum(found.values())} else"
        )
        for trace, count in found.most_common(3):
            print(f"--- {count} times\n{trace}")


if __name__ == "__main__":
    main()
