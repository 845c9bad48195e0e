"""Sets of images: folders with and without classes, splits, lists of files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bla.photo import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """An ordered list of images below one folder.

    Attributes
    ----------
    root: the folder.
    names: posix paths relative to ``root``, sorted, each once.
    labels: int64 ``(N,)``, indices into ``classes``; None when unlabelled.
    classes: the class names; empty when unlabelled.

    Raises
    ------
    DataError
        If the fields contradict one another.

    Examples
    --------
    >>> pets = ImageSet(Path("pets"), ("cat/1.jpg", "dog/1.jpg", "dog/2.jpg"), [0, 1, 1], ("cat", "dog"))
    >>> pets.subset([2, 1]).names, pets.subset([2, 1]).labels.tolist()
    (('dog/1.jpg', 'dog/2.jpg'), [1, 1])
    """

    root: Path
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if list(self.names) != sorted(set(self.names)):
            raise DataError("expected names sorted and each once, got another order or a name twice; sort them")
        if self.labels is None:
            return
        labels = np.array(self.labels, dtype=np.int64)
        if labels.shape != (len(self),) or not ((labels >= 0) & (labels < len(self.classes))).all():
            raise DataError(
                f"expected {len(self)} labels, a name each, below {len(self.classes)}, the number of classes, "
                f"got {labels.shape} with values {np.unique(labels).tolist()}"
            )
        labels.setflags(write=False)
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.root / self.names[index]

    def subset(self, indices: npt.ArrayLike) -> ImageSet:
        """The images at ``indices`` (integers or a boolean mask), sorted and each once, with the same classes."""
        every = np.arange(len(self))
        chosen = np.unique(every[np.asarray(indices)]) if np.size(indices) else every[:0]
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(self, names=tuple(self.names[index] for index in chosen), labels=labels)

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of names and contents: a copy of the folder elsewhere has the same.

        A file that cannot be read counts as such.
        """
        total = hashlib.sha256()
        for index, name in enumerate(self.names):
            try:
                with self.path(index).open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
            except OSError:
                content = bytes(hashlib.sha256().digest_size)
            total.update(os.fsencode(name) + b"\0" + content)
        return total.hexdigest()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """Images to train on and images held out; ``seeded``: divided here, at random, rather than by the folder."""

    train: ImageSet
    test: ImageSet
    seeded: bool

    def whole(self) -> ImageSet:
        """All images of a seeded split, as they were before it."""
        names = self.train.names + self.test.names
        order = sorted(range(len(names)), key=names.__getitem__)
        labels = None
        if self.train.labels is not None and self.test.labels is not None:
            labels = np.concatenate([self.train.labels, self.test.labels])[order]
        return dataclasses.replace(self.train, names=tuple(names[index] for index in order), labels=labels)


def image_folder(root: str | os.PathLike[str], *, seed: int = 0, test_share: float = 0.2) -> Splits:
    """Find the images of a folder, in one of three layouts.

    - ``root/train/CLASS/...`` and ``root/test/CLASS/...`` (else ``val`` or ``validation``), divided as they are;
      without any of the three, the images of ``train`` are divided by :func:`stratified_split`.
    - ``root/CLASS/...``: divided by :func:`stratified_split`; the only image of a class goes to train.
    - images without class folders: unlabelled, and divided alike.

    An image is a file with one of :data:`SUFFIXES`, in upper or lower case, at any depth below its class folder.
    Hidden files and folders, other suffixes, images beside class folders and folders beside ``train`` are ignored.
    Symbolic links are followed, each folder once. Classes are sorted by name, and the test set may lack some.

    Raises
    ------
    DataError
        If there is no such folder, no image, an empty class folder, one class only, a class in test that train
        lacks, or nothing to hold out.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("cat/1.jpg", "cat/2.JPG", "dog/1.png", "dog/2.png", "dog/read.me"):
    ...         Path(root, name).parent.mkdir(exist_ok=True)
    ...         Path(root, name).touch()
    ...     pets = image_folder(root, test_share=0.5)
    >>> pets.train.classes, pets.train.labels.tolist(), pets.test.labels.tolist(), pets.seeded
    (('cat', 'dog'), [0, 1], [0, 1], True)
    """
    root = Path(root)
    if not root.is_dir():
        got = "a file; name the folder it is in" if root.exists() else "no such folder; check the path"
        raise DataError(f"{root}: expected a folder of images, got {got}")
    folders = {folder.name: folder for folder in _folders(root)}
    train = folders.get("train")
    tests = [folders[name] for name in ("test", "val", "validation") if name in folders]
    if tests and len(tests) == len(folders):
        raise DataError(f"{root}: expected train/ beside {tests[0].name}/, got none; add it")
    # A class may be called train: it has brothers that are not splits, and images rather than folders in it.
    if train is not None and (tests or _folders(train) or len(folders) == 1):
        root = train
        if tests:
            training = _image_set(train)
            return Splits(training, _image_set(tests[0], training.classes), seeded=False)
    whole = _image_set(root)
    kept, held_out = stratified_split(whole.labels, len(whole), test_share, seed)
    if not held_out.size:
        raise DataError(f"{root}: expected two images of a class to hold one out, got one of each; add some")
    return Splits(whole.subset(kept), whole.subset(held_out), seeded=True)


def stratified_split(
    labels: npt.ArrayLike | None, n: int, share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Divide ``n`` images at random, each class by itself, into the indices kept and those held out.

    Of a class of m >= 2 images, m * share are held out, rounded half up, at least 1 and at most m - 1; an only
    image is kept. The same arguments give the same split under every version and on every system.

    Parameters
    ----------
    labels: the class of each image; None: all are of one class.
    share: of the images to hold out, 0 < share < 1.
    seed: 0 <= seed < 2**32.

    Raises
    ------
    DataError
        If share or seed is outside its range, or there are not n labels.

    Examples
    --------
    >>> kept, held_out = stratified_split([0, 0, 0, 0, 1], 5, 0.25, seed=0)
    >>> kept.tolist(), held_out.tolist()
    ([1, 2, 3, 4], [0])
    """
    if not 0 < share < 1:
        raise DataError(f"expected a share to hold out with 0 < share < 1, got {share}")
    if not 0 <= seed < 2**32:
        raise DataError(f"expected a seed with 0 <= seed < 2**32, got {seed}")
    classes = np.zeros(n, np.int64) if labels is None else np.asarray(labels)
    if classes.shape != (n,):
        raise DataError(f"expected {n} labels, an image each, got shape {classes.shape}")
    held_out = np.zeros(n, np.bool_)
    for place, label in enumerate(np.unique(classes)):
        (members,) = np.nonzero(classes == label)
        count = min(max(math.floor(len(members) * share + 0.5), 1), len(members) - 1)
        # RandomState's stream is frozen; default_rng's may change with NumPy
        order = np.random.RandomState([seed, place]).permutation(len(members))
        held_out[members[order[:count]]] = True
    return np.nonzero(~held_out)[0], np.nonzero(held_out)[0]


def list_images(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Expand folders, at any depth, to the images in them, sorted; keep the files, and their order, as given.

    A path that does not exist is kept too: opening it reports it, and the others are not lost.

    Raises
    ------
    DataError
        If a folder has no image in it.
    """
    paths: list[Path] = []
    for source in map(Path, sources):
        found = _images_below(source) if source.is_dir() else [source]
        if not found:
            raise _no_image(source)
        paths += found
    return paths


def _image_set(root: Path, train_classes: tuple[str, ...] | None = None) -> ImageSet:
    members = {folder.name: _images_below(folder) for folder in _folders(root)}
    if not any(members.values()):
        loose = _images_below(root)
        if not loose:
            raise _no_image(root)
        if train_classes:
            raise DataError(f"{root}: expected class folders as in train/, got images without; sort them into some")
        return ImageSet(root, tuple(path.relative_to(root).as_posix() for path in loose))
    empty = [name for name, paths in members.items() if not paths]
    if empty:
        raise DataError(f"{root}: expected images in every class folder, got none in {empty}; add some or remove it")
    classes = tuple(members) if train_classes is None else train_classes
    if train_classes is None and len(classes) == 1:
        raise DataError(f"{root}: expected at least two class folders, got {classes[0]!r} only; are the classes in it?")
    unknown = [name for name in members if name not in classes]
    if unknown:
        raise DataError(f"{root}: expected train's classes {list(classes)}, got also {unknown}; add them to train")
    index = {name: place for place, name in enumerate(classes)}
    labelled = sorted((path.relative_to(root).as_posix(), index[name]) for name in members for path in members[name])
    names, labels = zip(*labelled, strict=True)
    return ImageSet(root, names, np.array(labels, np.int64), classes)


def _folders(root: Path) -> list[Path]:
    _, names, _ = next(os.walk(root, onerror=_refuse))
    return [root / name for name in sorted(names) if not name.startswith(".")]


def _images_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            found += [Path(place, name) for name in files if _is_image(name)]
        seen.add(real)
    return sorted(found, key=Path.as_posix)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: expected a readable folder, got {error.strerror}") from error


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _no_image(folder: Path) -> DataError:
    return DataError(f"{folder}: expected images ({' '.join(sorted(SUFFIXES))}), got none; check the path")
