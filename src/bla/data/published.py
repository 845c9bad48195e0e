"""The paper's data sets, by name and in their original layout, and whatever else names images to train on."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import platformdirs

from bla import needs_extra
from bla.data import embedded, tables
from bla.data.download import Archive, downloaded
from bla.data.hugging_face import PREFIX, read_dataset
from bla.data.image_sets import ImageSet, Splits, image_folder
from bla.data.photo import DEEP, DataError, Photo, keep, open_photo
from bla.files import cache_root, read_json, reading, real
from bla.progress import Progress, silent

EMBEDDED = "embedded"
"""The name of the data set that comes with the package: :mod:`bla.data.embedded`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """A published data set in its original layout.

    ``inside`` is the folder that the archives make ("" for none), ``marks`` are files and folders that identify the
    layout, and ``read`` makes the splits from the folder and a seed.
    """

    archives: tuple[Archive, ...]
    inside: str
    marks: tuple[str, ...]
    read: Callable[[Path, int], Splits]

    def found_in(self, folder: Path) -> Path | None:
        """The folder with this layout: ``folder`` itself, or the one that the archive makes in it."""
        places = (folder, folder / self.inside)
        return next((place for place in places if all((place / mark).exists() for mark in self.marks)), None)


def cats_vs_dogs(root: Path, seed: int = 0) -> Splits:
    """Kaggle's cats and dogs as Microsoft gives them away: ``PetImages/{Cat,Dog}/N.jpg``, broken files among them.

    There is no official division: a fifth of each class is held out by the seed.
    """
    return image_folder(root / "PetImages", seed=seed)


def caltech_birds2011(root: Path, _: int = 0) -> Splits:
    """Caltech-UCSD Birds 200-2011: original ids, official division, boxes and parts, classes in their own order."""
    names, classes = dict(_table(root / "images.txt", 2)), dict(_table(root / "classes.txt", 2))
    labels, trained = (dict(_table(root / f"{file}.txt", 2)) for file in ("image_class_labels", "train_test_split"))
    for file, keys in (("image_class_labels.txt", labels), ("train_test_split.txt", trained)):
        if missing := sorted(names.keys() - keys.keys()):
            raise DataError(f"{root / file}: expected a line for every image of images.txt, got none for {missing[:5]}")
    index = {str(key): place for place, key in enumerate(classes)}
    if unknown := sorted(map(int, set(labels.values()) - index.keys())):
        raise DataError(f"{root / 'image_class_labels.txt'}: expected classes of classes.txt, got also {unknown[:5]}")
    ids = sorted(names, key=names.__getitem__)
    boxes = parts = None
    part_names: tuple[str, ...] = ()
    if (root / "bounding_boxes.txt").exists():
        sides = {key: [float(side) for side in line.split()] for key, line in _table(root / "bounding_boxes.txt", 5)}
        corners = {key: [(x, y, x + width, y + height)] for key, (x, y, width, height) in sides.items()}
        boxes = tuple(np.array(corners.get(key, [])) for key in ids)
    if (root / "parts" / "part_locs.txt").exists():
        parted = dict(_table(root / "parts" / "parts.txt", 2))
        part_names = tuple(parted.values())
        row, column = ({key: place for place, key in enumerate(keys)} for keys in (ids, parted))
        parts = np.zeros((len(ids), len(parted), 3))
        for key, line in _table(root / "parts" / "part_locs.txt", 5):
            part, *location = line.split()
            if key in row:
                parts[row[key], column[int(part)]] = [float(value) for value in location]
    whole = ImageSet(
        root / "images", tuple(names[key] for key in ids), np.array([index[labels[key]] for key in ids], np.int64),
        tuple(classes.values()), ids=np.array(ids, np.int64), boxes=boxes, parts=parts, part_names=part_names,
    )  # fmt: skip
    train = np.array([trained[key] == "1" for key in ids], np.bool_)
    return Splits(whole.subset(train), whole.subset(~train), seeded=False)


def stanford_dogs(root: Path, _: int = 0) -> Splits:
    """Stanford Dogs: the official lists, classes in the order of their numbers, a box for each annotated dog."""
    train, test = (_dogs_list(root / f"{split}_list.mat") for split in ("train", "test"))
    classes: dict[int, str] = {}
    for name, label in sorted(train + test, key=lambda entry: entry[1]):
        folder = name.partition("/")[0]
        if (other := classes.setdefault(label, folder)) != folder:
            raise DataError(f"{root}: expected a folder a class, got {folder} and {other} under number {label}")
    index = {label: place for place, label in enumerate(classes)}

    def images(listed: list[tuple[str, int]]) -> ImageSet:
        names = tuple(name for name, _ in sorted(listed))
        labels = np.array([index[label] for _, label in sorted(listed)], np.int64)
        annotations, boxes = root / "Annotation", None
        if annotations.is_dir():
            boxes = tuple(_dogs_boxes(annotations / Path(name).with_suffix("")) for name in names)
        return ImageSet(root / "Images", names, labels, tuple(classes.values()), boxes=boxes)

    return Splits(images(train), images(test), seeded=False)


PUBLISHED = {
    read.__name__: Published(
        tuple(Archive(*archive) for archive in known["archives"]), known["inside"], tuple(known["marks"]), read
    )
    for read in (cats_vs_dogs, stanford_dogs, caltech_birds2011)
    for known in [read_json(Path(__file__).with_name("published.json"))[read.__name__]]
}
"""The paper's data sets."""


def default_data_root() -> Path:
    """Where data sets are kept: ``$BLA_DATA``, else the user's data folder."""
    return Path(os.environ.get("BLA_DATA") or platformdirs.user_data_path("bla") / "data")


def read_images(
    data: str | os.PathLike[str] | Splits,
    *,
    seed: int = 0,
    data_root: Path | None = None,
    cache: Path | None = None,
    report: Progress = silent,
) -> tuple[Splits, str]:
    """Images to train and to test on, from whatever names them, and what to read them by again.

    The latter is a name or an absolute path; "" for splits that came as an object.

    Parameters
    ----------
    data: in this order: splits, as they are; ``"embedded"``; ``hf:SOURCE``, of Hugging Face's library
        (:mod:`bla.data.hugging_face`); a name of :data:`PUBLISHED`, looked for in
        ``data_root``, in its folder of that name and in the working folder's, else downloaded; a folder in the
        layout of one of these; a table of images and labels, CSV or TSV (:mod:`bla.data.tables`); any other folder as
        :func:`bla.data.image_sets.image_folder` reads it.
    seed: of the division, where the data set has none.
    data_root: by default :func:`default_data_root`.
    cache: where what is made here is kept, by default :func:`bla.files.cache_root`.

    A DataError if there is no such data; if a download fails, with the address and the layout expected.
    """
    if isinstance(data, Splits):
        return data, ""
    name, place, cache = str(data), Path(data), cache or cache_root()
    if name == EMBEDDED:
        splits = image_folder(embedded.write(cache / EMBEDDED, report=report))
        return Splits(_masked(splits.train), _masked(splits.test), seeded=False), EMBEDDED
    if name.startswith(PREFIX):
        return read_dataset(name, seed=seed, cache=cache, report=report)
    if name in PUBLISHED:
        published, kept = PUBLISHED[name], data_root or default_data_root()
        root = next(filter(None, map(published.found_in, (kept, kept / name, place))), None)
        if root is None:
            made = downloaded(name, published.archives, kept / name, layout(name), report)
            root = published.found_in(made)
        if root is None:
            raise DataError(f"{made}: expected {layout(name)} from the archives of {name}, got others; remove it")
        return published.read(root, seed), str(real(root))
    for published in PUBLISHED.values():
        if (root := published.found_in(place)) is not None:
            return published.read(root, seed), str(real(root))
    if place.suffix.lower() in tables.SUFFIXES and not place.is_dir():
        return tables.read_table(place, seed=seed), str(real(place))
    if not place.exists() and place.name == name:
        raise DataError(f"{name}: expected a folder of images or one of {EMBEDDED}, {', '.join(PUBLISHED)}, got none")
    return image_folder(name, seed=seed), str(real(place))


@contextmanager
def photo_splits(
    images: str | Path | ImageSet | Sequence[Any], *, seed: int, cache: Path | None, report: Progress
) -> Iterator[Splits]:
    """Splits of what :func:`read_images` reads, an image set, or photos: paths, Pillow images or uint8 arrays.

    Photos in memory lie in a temporary folder until the end of the block.
    """
    if isinstance(images, (str, Path)):
        yield read_images(images, seed=seed, cache=cache, report=report)[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        gathered = images if isinstance(images, ImageSet) else _gathered(list(images), Path(folder))
        yield gathered.divided(0.2, seed)


def _gathered(photos: list[Any], folder: Path) -> ImageSet:
    """The photos where they are; in ``folder`` if some are in memory."""
    on_disk = [isinstance(photo, (str, os.PathLike)) for photo in photos]
    if photos and all(on_disk):
        paths = [Path(photo).absolute() for photo in photos]
        root = Path(os.path.commonpath([path.parent for path in paths]))
        return ImageSet(root, tuple(sorted({path.relative_to(root).as_posix() for path in paths})))
    digits = len(str(len(photos)))
    return ImageSet(folder, tuple(_filed(photo, folder, f"{index:0{digits}}") for index, photo in enumerate(photos)))


def _filed(photo: Any, folder: Path, stem: str) -> str:
    """The name of a file in the folder that is read as the photo is."""
    if type(photo).__module__.partition(".")[0] == "torch":
        raise DataError("expected paths, PIL images or arrays to fit on, got a tensor: pass photos")
    if isinstance(photo, (str, os.PathLike)):
        name = stem + Path(photo).suffix
        (folder / name).symlink_to(real(photo))
    elif isinstance(photo, Photo):
        name = f"{stem}.npz"
        keep(photo, folder / name)
    elif isinstance(photo, np.ndarray) or getattr(photo, "mode", "") in (*DEEP, "RGBA"):
        name = f"{stem}.npy"
        np.save(folder / name, np.asarray(photo))
    elif isinstance(photo, bytes) or hasattr(photo, "read"):
        name = f"{stem}.png"  # whatever it is: the content tells
        (folder / name).write_bytes(photo if isinstance(photo, bytes) else photo.read())
    else:
        name = f"{stem}.png"
        open_photo(photo).save(folder / name)
    return name


def named(source: str) -> bool:
    """Whether what :func:`read_images` returned to read by again is a name rather than a path."""
    return source == EMBEDDED or source.startswith(PREFIX)


def layout(name: str) -> str:
    """What a folder must hold to be read as this data set."""
    published = PUBLISHED[name]
    return ", ".join(Path(published.inside, mark).as_posix() for mark in published.marks)


def _masked(images: ImageSet) -> ImageSet:
    """Part of the embedded data set with its masks."""
    names = (Path("../masks", images.root.name, name).with_suffix(".png").as_posix() for name in images.names)
    return dataclasses.replace(images, masks=tuple(names))


def _table(path: Path, columns: int) -> list[tuple[int, str]]:
    """The lines of one of Caltech's tables: the number in the first column, and the other columns."""
    with reading("a table of the data set", path, DataError):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        row = line.split(maxsplit=columns - 1)
        if len(row) != columns or not row[0].isdecimal():
            raise DataError(f"{path}: expected {columns} columns, a number first, got {line.strip()!r} in row {number}")
    return [(int(key), rest.strip()) for key, rest in (line.split(maxsplit=1) for line in lines)]


def _dogs_list(path: Path) -> list[tuple[str, int]]:
    """(image, number of its class) of one of Stanford's lists."""
    with needs_extra("datasets", DataError):
        from scipy.io import loadmat
    try:
        table = loadmat(path, squeeze_me=True, chars_as_strings=True, variable_names=("file_list", "labels"))
        names, labels = np.atleast_1d(table["file_list"]), np.atleast_1d(table["labels"])
        return [(str(name), int(label)) for name, label in zip(names, labels, strict=True)]
    except Exception as error:  # a broken file makes the reader raise nearly anything
        raise DataError(f"{path}: expected Stanford's list with file_list and labels, got {error!r}") from error


def _dogs_boxes(path: Path) -> npt.NDArray[np.float64]:
    """The box of each annotated dog; none if the file is missing."""
    try:
        tree = ElementTree.parse(path)
        sides = ("xmin", "ymin", "xmax", "ymax")
        boxes = [[float(box.findtext(side, "")) for side in sides] for box in tree.iterfind("object/bndbox")]
    except FileNotFoundError:
        boxes = []
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise DataError(f"{path}: expected an annotation in XML with bndbox of four numbers, got {error}") from error
    return np.array(boxes, np.float64).reshape(-1, 4)
