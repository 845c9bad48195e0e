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
from bla.data.photo import DataError, open_photo
from bla.files import cache_root
from bla.progress import Progress, silent

EMBEDDED = "embedded"
"""The name of the data set that comes with the package: :mod:`bla.data.embedded`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """A data set of others', as its authors packed it.

    Attributes
    ----------
    archives: where it is to be had, and the SHA-256 of each file.
    inside: the folder that holds it in its archive; "" for none.
    marks: files and folders by which the layout is known.
    read: the folder and a seed to the splits.
    """

    archives: tuple[Archive, ...]
    inside: str
    marks: tuple[str, ...]
    read: Callable[[Path, int], Splits]

    def found_in(self, folder: Path) -> Path | None:
        """The folder that has the layout: this one, or the one that the archive would have made in it."""
        for place in (folder, folder / self.inside) if self.inside else (folder,):
            if all((place / mark).exists() for mark in self.marks):
                return place
        return None


def cats_vs_dogs(root: Path, seed: int = 0) -> Splits:
    """Kaggle's cats and dogs as Microsoft gives them away: ``PetImages/{Cat,Dog}/N.jpg``, broken files among them.

    There is no official division: a fifth of each class is held out by the seed.
    """
    return image_folder(root / "PetImages", seed=seed)


def caltech_birds2011(root: Path, _: int = 0) -> Splits:
    """Caltech-UCSD Birds 200-2011: original ids, official division, boxes and parts, classes in their own order."""
    names = {int(key): value for key, value in _table(root / "images.txt", 2)}
    classes = [(int(key), value) for key, value in _table(root / "classes.txt", 2)]
    index = {key: place for place, (key, _) in enumerate(classes)}
    labels = {int(key): int(value) for key, value in _table(root / "image_class_labels.txt", 2)}
    trained = {int(key): value == "1" for key, value in _table(root / "train_test_split.txt", 2)}
    for file, keys in (("image_class_labels.txt", labels), ("train_test_split.txt", trained)):
        missing = sorted(set(names) - set(keys))
        if missing:
            raise DataError(f"{root / file}: expected a line for every image of images.txt, got none for {missing[:5]}")
    unknown = sorted({label for label in labels.values() if label not in index})
    if unknown:
        raise DataError(f"{root / 'image_class_labels.txt'}: expected classes of classes.txt, got also {unknown[:5]}")
    ids = sorted(names, key=names.__getitem__)
    boxes = None
    if (root / "bounding_boxes.txt").exists():
        sides = {int(key): tuple(map(float, box)) for key, *box in _table(root / "bounding_boxes.txt", 5)}
        boxes = tuple(
            np.array([(x, y, x + width, y + height) for x, y, width, height in (sides[key],)] if key in sides else [])
            for key in ids
        )
    part_names: tuple[str, ...] = ()
    parts = None
    if (root / "parts" / "part_locs.txt").exists():
        listed = [(int(key), value) for key, value in _table(root / "parts" / "parts.txt", 2)]
        part_names = tuple(value for _, value in listed)
        place = {key: position for position, (key, _) in enumerate(listed)}
        row = {key: position for position, key in enumerate(ids)}
        parts = np.zeros((len(ids), len(listed), 3))
        for key, part, *location in _table(root / "parts" / "part_locs.txt", 5):
            if int(key) in row:
                parts[row[int(key)], place[int(part)]] = [float(value) for value in location]
    whole = ImageSet(
        root / "images",
        tuple(names[key] for key in ids),
        np.array([index[labels[key]] for key in ids], np.int64),
        tuple(name for _, name in classes),
        ids=np.array(ids, np.int64),
        boxes=boxes,
        parts=parts,
        part_names=part_names,
    )
    train = np.array([trained[key] for key in ids], np.bool_)
    return Splits(whole.subset(train), whole.subset(~train), seeded=False)


def stanford_dogs(root: Path, _: int = 0) -> Splits:
    """Stanford Dogs: the official lists, classes in the order of their numbers, boxes from ``Annotation``.

    An image has a box for each dog annotated in it.
    """
    train, test = (_dogs_list(root / f"{split}_list.mat") for split in ("train", "test"))
    classes: dict[int, str] = {}
    for name, label in train + test:
        folder = name.partition("/")[0]
        if classes.setdefault(label, folder) != folder:
            raise DataError(
                f"{root}: expected a folder a class, got {folder} and {classes[label]} under number {label}"
            )
    order = sorted(classes)
    index = {label: place for place, label in enumerate(order)}
    annotated = (root / "Annotation").is_dir()

    def images(listed: list[tuple[str, int]]) -> ImageSet:
        listed = sorted(listed)
        return ImageSet(
            root / "Images",
            tuple(name for name, _ in listed),
            np.array([index[label] for _, label in listed], np.int64),
            tuple(classes[label] for label in order),
            boxes=tuple(_dogs_boxes(root / "Annotation" / Path(name).with_suffix("")) for name, _ in listed)
            if annotated
            else None,
        )

    return Splits(images(train), images(test), seeded=False)


PUBLISHED = {
    "cats_vs_dogs": Published(
        # SHA-256 as the examples of the project GoMLX check it
        (
            Archive(
                "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/kagglecatsanddogs_5340.zip",
                "b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9",
            ),
        ),
        "",
        ("PetImages/Cat", "PetImages/Dog"),
        cats_vs_dogs,
    ),
    "stanford_dogs": Published(
        # SHA-256 as TensorFlow Datasets checks them (url_checksums/stanford_dogs.txt)
        (
            Archive(
                "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar",
                "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
            ),
            Archive(
                "http://vision.stanford.edu/aditya86/ImageNetDogs/annotation.tar",
                "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd",
            ),
            Archive(
                "http://vision.stanford.edu/aditya86/ImageNetDogs/lists.tar",
                "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c",
            ),
        ),
        "",
        ("train_list.mat", "test_list.mat", "Images"),
        stanford_dogs,
    ),
    "caltech_birds2011": Published(
        # SHA-256 as TensorFlow Datasets checks it (url_checksums/caltech_birds2011.txt)
        (
            Archive(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
            ),
        ),
        "CUB_200_2011",
        ("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt", "images"),
        caltech_birds2011,
    ),
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

    Returns
    -------
    The splits, and a name or an absolute path; "" for splits that came as an object.

    Raises
    ------
    DataError
        If there is no such data; for a name that cannot be downloaded it tells the address and the layout expected.
    """
    if isinstance(data, Splits):
        return data, ""
    name, cache = str(data), cache or cache_root()
    if name == EMBEDDED:
        return _embedded(cache / EMBEDDED, report), EMBEDDED
    if name.startswith(PREFIX):
        return read_dataset(name, seed=seed, cache=cache, report=report)
    if name in PUBLISHED:
        published = PUBLISHED[name]
        kept = data_root or default_data_root()
        for place in (kept, kept / name, Path(name)):
            if (root := published.found_in(place)) is not None:
                return published.read(root, seed), str(root.resolve())
        made = downloaded(name, published.archives, kept / name, layout(name), report)
        root = published.found_in(made)
        if root is None:
            raise DataError(f"{made}: expected {layout(name)} from the archives of {name}, got others; remove it")
        return published.read(root, seed), str(root.resolve())
    for published in PUBLISHED.values():
        if (root := published.found_in(Path(name))) is not None:
            return published.read(root, seed), str(root.resolve())
    if Path(name).suffix.lower() in tables.SUFFIXES and not Path(name).is_dir():
        return tables.read_table(Path(name), seed=seed), str(Path(name).resolve())
    if not Path(name).exists() and Path(name).name == name:
        raise DataError(
            f"{name}: expected a folder of images or one of {EMBEDDED}, {', '.join(PUBLISHED)}, got no such"
        )
    return image_folder(name, seed=seed), str(Path(name).resolve())


@contextmanager
def photo_splits(
    images: str | Path | ImageSet | Sequence[Any], *, seed: int, cache: Path | None, report: Progress
) -> Iterator[Splits]:
    """Splits of whatever holds photos; those in memory lie in a temporary folder meanwhile.

    Parameters
    ----------
    images: as :func:`read_images` takes them, an image set, or photos: paths, Pillow images or uint8 arrays.
    """
    if isinstance(images, (str, Path)):
        yield read_images(images, seed=seed, cache=cache, report=report)[0]
        return
    if not isinstance(images, ImageSet):
        images = list(images)
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(images, ImageSet) and all(isinstance(image, (str, os.PathLike)) for image in images):
            paths = [Path(str(image)).absolute() for image in images]
            root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
            images = ImageSet(root, tuple(sorted({path.relative_to(root).as_posix() for path in paths})))
        elif not isinstance(images, ImageSet):
            width = len(str(len(images)))
            for index, image in enumerate(images):
                if type(image).__module__.partition(".")[0] == "torch":
                    raise DataError("expected paths, PIL images or uint8 arrays to fit on, got a tensor: pass photos")
                target = Path(folder) / f"{index:0{width}}.png"
                if isinstance(image, (str, os.PathLike)):
                    target.symlink_to(Path(image).resolve())
                else:
                    open_photo(image).save(target)
            images = ImageSet(Path(folder), tuple(sorted(path.name for path in Path(folder).iterdir())))
        yield images.divided(0.2, seed)


def named(source: str) -> bool:
    """Whether what :func:`read_images` returned to read by again is a name rather than a path."""
    return source == EMBEDDED or source.startswith(PREFIX)


def layout(name: str) -> str:
    """What a folder must hold to be read as this data set."""
    published = PUBLISHED[name]
    inside = f"{published.inside}/" if published.inside else ""
    return ", ".join(f"{inside}{mark}" for mark in published.marks)


def _embedded(folder: Path, report: Progress) -> Splits:
    """The embedded data set with its masks, made where it is not there yet."""
    splits = image_folder(embedded.write(folder, report=report))

    def masked(images: ImageSet) -> ImageSet:
        place = f"../masks/{images.root.name}"
        masks = tuple(f"{place}/{Path(name).with_suffix('.png').as_posix()}" for name in images.names)
        return dataclasses.replace(images, masks=masks)

    return Splits(masked(splits.train), masked(splits.test), seeded=False)


def _table(path: Path, columns: int) -> list[list[str]]:
    """The lines of a table of Caltech's: a number first, and whatever remains in the last column."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a table of the data set, got {error}") from error
    rows = [line.split(maxsplit=columns - 1) for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != columns or not row[0].isdecimal():
            raise DataError(
                f"{path}: expected {columns} columns, a number first, got {' '.join(row)!r} in row {number}"
            )
    return rows


def _dogs_list(path: Path) -> list[tuple[str, int]]:
    """(image, number of its class) of one of Stanford's lists."""
    with needs_extra("datasets", DataError):
        from scipy.io import loadmat
    try:
        table = loadmat(path, squeeze_me=True, chars_as_strings=True, variable_names=("file_list", "labels"))
        names, labels = np.atleast_1d(table["file_list"]), np.atleast_1d(table["labels"])
        listed = [(str(name), int(label)) for name, label in zip(names, labels, strict=True)]
    except Exception as error:  # a broken file makes the reader raise nearly anything
        raise DataError(
            f"{path}: expected Stanford's list with file_list and labels, got {type(error).__name__}: {error}"
        ) from error
    return listed


def _dogs_boxes(path: Path) -> npt.NDArray[np.float64]:
    """Of every dog annotated; none where the file is missing."""
    try:
        tree = ElementTree.parse(path)
        sides = ("xmin", "ymin", "xmax", "ymax")
        boxes = [[float(box.findtext(side, "")) for side in sides] for box in tree.iterfind("object/bndbox")]
    except FileNotFoundError:
        boxes = []
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise DataError(f"{path}: expected an annotation in XML with bndbox of four numbers, got {error}") from error
    return np.array(boxes, np.float64).reshape(-1, 4)
