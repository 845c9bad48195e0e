"""Tables of images and their labels, of which an image may have several or none: CSV, or TSV."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from bla.data.image_sets import ImageSet, Splits
from bla.data.photo import DataError

SUFFIXES = {".csv": ",", ".tsv": "\t"}
"""The suffixes of tables, with their separators."""

SPLIT = "split"
"""The optional column that assigns an image to training or testing."""

_TRAIN, _TEST = ("train", "training"), ("test", "val", "valid", "validation")


def read_table(path: Path, *, seed: int = 0, test_share: float = 0.2) -> Splits:
    """Images and labels from a table with a line of column names.

    The first column holds the image's path, relative to the table. Then comes one column of labels, separated by ``;``,
    ``|`` or a comma and empty for an image without any; or a column of 0 and 1 for each label, named after it. A column
    ``split`` anywhere says train or test (or validation); without one, :func:`bla.data.image_sets.stratified_split`
    holds out a share. Labels written in cells are sorted by name; labels with a column each keep their order.
    A DataError says if there is no such table, or which line is not as expected.
    """
    header, rows = _lines(path)
    division = header.index(SPLIT) if SPLIT in header[1:] else None
    columns = [place for place in range(1, len(header)) if place != division]
    if not columns:
        raise DataError(f"{path}: expected a column of labels after the images, or one for each label, got {header}")
    names = [Path(row[0]).as_posix() for _, row in rows]
    first = {name: line for (line, _), name in zip(reversed(rows), reversed(names), strict=True)}
    for (line, _), name in zip(rows, names, strict=True):
        if line != first[name]:
            raise DataError(f"{path}, line {line}: expected each image once, got {name} again; put its labels together")
    if len(columns) == 1:
        said = [[part.strip() for part in re.split("[;|,]", row[columns[0]]) if part.strip()] for _, row in rows]
        classes = tuple(sorted({label for labels in said for label in labels}))
        labels = np.array([[label in labels for label in classes] for labels in said], np.int64)
    else:
        classes = tuple(header[place] for place in columns)
        labels = np.zeros((len(rows), len(columns)), np.int64)
        for number, (line, row) in enumerate(rows):
            for place, column in enumerate(columns):
                if (cell := row[column].strip()) not in ("0", "1"):
                    raise DataError(
                        f"{path}, line {line}: expected 0 or 1 in column {header[column]}, got {cell!r}; or write all "
                        "labels of an image in one column, as cat;dog"
                    )
                labels[number, place] = int(cell)
    if len(classes) < 2:
        raise DataError(f"{path}: expected at least two different labels, got {list(classes)}")
    order = sorted(range(len(names)), key=names.__getitem__)
    whole = ImageSet(path.parent, tuple(names[number] for number in order), labels[order], classes)
    if not any(whole.path(number).exists() for number in range(len(whole))):
        raise DataError(f"{path}: expected images by their paths from {path.parent}, got none there: {whole.names[0]}")
    if division is None:
        return whole.divided(test_share, seed)
    kinds = [rows[number][1][division].strip().lower() for number in order]
    for number, kind in zip(order, kinds, strict=True):
        if kind not in (*_TRAIN, *_TEST):
            raise DataError(f"{path}, line {rows[number][0]}: expected split train or test, got {kind!r}")
    train = np.array([kind in _TRAIN for kind in kinds], np.bool_)
    if train.all() or not train.any():
        raise DataError(f"{path}: expected images to train on and to test on, got {train.sum()} and {(~train).sum()}")
    return Splits(whole.subset(train), whole.subset(~train), seeded=False)


def _lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns, and each line that is not empty with its number."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=SUFFIXES[path.suffix.lower()], strict=True)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a table of images and labels, got {error}") from error
    if len(rows) < 2:
        raise DataError(f"{path}: expected a line of column names and a line for each image, got {len(rows)} lines")
    header = [cell.strip() for cell in rows[0][1]]
    if len(set(header)) < len(header) or "" in header:
        raise DataError(f"{path}: expected a first line of column names, each once, got {header}")
    if Path(header[0]).suffix and (path.parent / header[0]).exists():
        raise DataError(f"{path}: expected a first line of column names, image,labels say, got an image: {header[0]}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: expected {len(header)} cells, {header}, got {len(row)}: {row}")
        if not row[0].strip():
            raise DataError(f"{path}, line {line}: expected the path of an image first, got an empty cell")
    return header, rows[1:]
