"""Data sets of Hugging Face's library ``datasets``, from local folders or the Hub, copied row by row into files.

Their name is ``hf:SOURCE``, a folder or a name on the Hub, with options as in
``hf:SOURCE?label=fine_label&test=validation``. By default ``image`` is the column of images, and ``label`` the one of
classes, else the first of :data:`LABELS`; ``train`` is the split of that name, and ``test`` the first of
:data:`HELD_OUT` in which images have a class. Without one, images are divided at random by the seed.

Files go undecoded into the cache, once, and are read like any image folder. Memory holds one row.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
from filelock import FileLock

from bla import needs_extra
from bla.data.image_sets import SUFFIXES, ImageSet, Splits
from bla.data.photo import DataError
from bla.files import reading, real, typed, write_atomically, write_json
from bla.progress import Progress

PREFIX = "hf:"
OPTIONS = ("image", "label", "config", "train", "test")
HELD_OUT = ("test", "validation", "val", "valid")
LABELS = ("label", "labels", "class", "target")


def read_dataset(name: str, *, seed: int, cache: Path, report: Progress) -> tuple[Splits, str]:
    """The splits of ``hf:SOURCE``, and what to read them by again, with an absolute path.

    A DataError says if the library is missing, the data set is neither here nor on the Hub, or lacks such columns.
    """
    source, _, query = name.removeprefix(PREFIX).partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else [])
    except ValueError as error:
        raise DataError(f"{name}: expected options as hf:SOURCE?label=COLUMN&test=SPLIT, got {error}") from error
    if not source or not set(options) <= set(OPTIONS):
        raise DataError(f"{name}: expected hf:SOURCE with options among {', '.join(OPTIONS)}, got {query or 'nothing'}")
    if Path(source).is_dir():
        source = str(real(source))
    canonical = f"{PREFIX}{source}" + (f"?{urlencode(options)}" if options else "")
    loaded = _loaded(canonical, source, options.get("config"))
    image, label = _columns(canonical, loaded, options)
    train, test = _chosen(canonical, loaded, label, options)
    chosen = {"train": loaded[train]} | ({"test": loaded[test]} if test else {})
    classes = _classes(chosen, label)
    fingerprints = {split: rows._fingerprint for split, rows in chosen.items()}
    key = hashlib.sha256(json.dumps([1, fingerprints, image, label, classes]).encode()).hexdigest()
    folder = cache / "datasets" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"expected a cache that can be written, got {folder.parent}: {error.strerror}") from error
    with FileLock(folder.with_name(f"{key}.lock")):
        if not folder.exists():
            _write(folder, chosen, image=image, label=label, classes=classes, name=canonical, report=report)
    sets = {}
    with reading("the record of a data set", folder / "manifest.json", DataError, remedy=f": remove {folder}"):
        listed = typed((folder / "manifest.json").read_bytes(), dict[str, list[tuple[str, int | None]]])
    for split, rows in listed.items():
        names, labels = zip(*sorted(rows), strict=True) if rows else ((), ())
        known = np.array(labels, np.int64) if classes else None
        sets[split] = ImageSet(folder / split, names, known, tuple(classes))
    if "test" in sets:
        return Splits(sets["train"], sets["test"], seeded=False), canonical
    return sets["train"].divided(0.2, seed), canonical


def _loaded(name: str, source: str, config: str | None) -> dict[str, Any]:
    """Splits by name, memory-mapped."""
    with needs_extra("datasets", DataError):
        import datasets
    folder = Path(source)
    saved = any((folder / file).exists() for file in ("dataset_dict.json", "state.json"))
    try:
        found: Any = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, config)
    except Exception as error:  # whatever the library, or the network under it, raises
        reason = " ".join(str(error).split())[:300].rstrip(".")
        remedy = "without internet, pass a folder: one of Dataset.save_to_disk, of Parquet files, or of images"
        remedy = "check what is in the folder" if folder.is_dir() else remedy
        raise DataError(f"{name}: expected a data set, got {type(error).__name__}: {reason}; {remedy}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _columns(name: str, loaded: dict[str, Any], options: dict[str, str]) -> tuple[str, str | None]:
    """The columns of images and of classes; None where there are no classes."""
    features = next(iter(loaded.values())).features
    kinds = {column: type(feature).__name__ for column, feature in features.items()}

    def one(kind: str, option: str, candidates: list[str]) -> str | None:
        asked = options.get(option)
        if asked is not None and asked not in kinds:
            raise DataError(f"{name}: expected a column of {kind}, got {asked!r}; there are {', '.join(kinds)}")
        if asked is None and len(candidates) > 1:
            raise DataError(
                f"{name}: expected one column of {kind}, got {', '.join(candidates)}: choose with ?{option}=COLUMN"
            )
        return asked or (candidates[0] if candidates else None)

    image = one("images", "image", [column for column, kind in kinds.items() if kind == "Image"])
    if image is None or kinds[image] != "Image":
        raise DataError(f"{name}: expected a column of type Image, got {kinds}")
    label = one("classes", "label", [column for column, kind in kinds.items() if kind == "ClassLabel"])
    return image, label or next((column for column in LABELS if kinds.get(column) == "Value"), None)


def _chosen(name: str, loaded: dict[str, Any], label: str | None, options: dict[str, str]) -> tuple[str, str | None]:
    """The splits to train on and to hold out; None where none is there to hold out."""
    missing = [options[key] for key in ("train", "test") if key in options and options[key] not in loaded]
    train = options.get("train", "train" if "train" in loaded else next(iter(loaded)))
    if missing:
        raise DataError(f"{name}: expected splits among {', '.join(loaded)}, got {', '.join(missing)}")
    if "test" in options:
        return train, options["test"]

    def has_classes(split: str) -> bool:
        first: dict[str, Any] = next(iter(loaded[split].select_columns([label] if label else [])), {})
        return label is None or first.get(label) not in (None, -1)

    others = [split for split in HELD_OUT if split in loaded and split != train]
    return train, next(filter(has_classes, others), None)


def _classes(chosen: dict[str, Any], label: str | None) -> list[str]:
    """Class names in the data set's own order; of plain values sorted."""
    if label is None:
        return []
    feature = chosen["train"].features[label]
    if hasattr(feature, "names"):
        return list(feature.names)
    return [str(value) for value in sorted(value for value in chosen["train"].unique(label) if value is not None)]


def _write(
    folder: Path, chosen: dict[str, Any], *, image: str, label: str | None, classes: list[str], name: str,
    report: Progress,
) -> None:  # fmt: skip
    """Every image as a file, all or nothing; an interrupted call is resumed by the next."""
    import datasets

    partial = folder.with_name(f".{folder.name}.partial")
    listed: dict[str, list[tuple[str, int]]] = {}
    index = {value: place for place, value in enumerate(classes)}
    safe = [f"{place:04}.{re.sub(r'[^0-9A-Za-z_.-]+', '_', value)}" for place, value in enumerate(classes)]
    for split, rows in chosen.items():
        columns = [image] + ([label] if label else [])
        undecoded = rows.select_columns(columns).cast_column(image, datasets.Image(decode=False))
        listed[split] = []
        for row, record in enumerate(undecoded):
            place = -1
            if label is not None:
                value = record[label]
                place = value if hasattr(rows.features[label], "names") else index.get(str(value), -1)
                if place is None or not 0 <= place < len(classes):
                    raise DataError(f"{name}: expected a class of {classes[:5]} in row {row} of {split}, got {value!r}")
            below = "images" if label is None else safe[place]
            file = _write_one(partial / split / below, row, record[image] or {})
            listed[split].append((f"{below}/{file}", place))
            if (row + 1) % 64 == 0 or row + 1 == len(rows):
                report(f"writing the images of {split}", row + 1, len(rows))
    write_json(partial / "manifest.json", listed)
    partial.rename(folder)


def _write_one(folder: Path, row: int, record: dict[str, Any]) -> str:
    """The file's name; one without content, which nobody can read, where the row has no image."""
    folder.mkdir(parents=True, exist_ok=True)
    content, path = record.get("bytes"), record.get("path")
    suffix = Path(path or "").suffix.lower()
    if suffix not in SUFFIXES:
        suffix = ".jpg" if (content or b"")[:2] == b"\xff\xd8" else ".png"
    target = folder / f"{row:08}{suffix}"
    if not target.exists():
        if content is None and path is not None and Path(path).is_file():
            content = Path(path).read_bytes()
        write_atomically(target, content or b"")
    return target.name
