"""Sets of images: folders with and without classes, splits and folds, boxes and masks, lists of files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from bla.data.photo import Box, DataError
from bla.files import opened

Task = Literal["class", "labels", "value"]
"""What is predicted of an image: one class, several labels or none, or a number."""

_Edges = npt.NDArray[np.float64]

_DIGESTS: dict[bytes, str] = {}
"""Of sets of files, by what the file system says of them."""

PER_IMAGE = ("names", "labels", "ids", "boxes", "masks", "parts")
"""The fields of an :class:`ImageSet` with an entry for each image."""

SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif", ".heic", ".heif", ".npy", ".npz",
})  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """An ordered list of images below one folder.

    Fields that contradict one another raise a DataError; what is not known is None.

    Attributes
    ----------
    names: posix paths relative to the folder ``root``, sorted, each once.
    labels: int64 ``(N,)``, indices into ``classes``; or, where an image may have several or none, ``(N, K)``, 1 where
        it has the class and else 0.
    ids: int64 ``(N,)``, the numbers of the images in the published data set.
    boxes: for each image float64 ``(K, 4)``: left, top, right, bottom of each of its K objects, in pixels of the
        upright photo, as :attr:`bla.Explanation.region`; K may be 0.
    masks: for each image the file of its object's mask, relative to ``root``: as large as the photo, 0 off the object.
    parts: float64 ``(N, P, 3)``: x, y in pixels and whether visible (1) or not (0), of the P parts in ``part_names``.

    >>> pets = ImageSet(Path("pets"), ("cat/1.jpg", "dog/1.jpg", "dog/2.jpg"), [0, 1, 1], ("cat", "dog"))
    >>> pets.subset([2, 1]).names, pets.subset([2, 1]).labels.tolist()
    (('dog/1.jpg', 'dog/2.jpg'), [1, 1])
    """

    root: Path
    names: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    ids: npt.NDArray[np.int64] | None = None
    boxes: tuple[npt.NDArray[np.float64], ...] | None = None
    masks: tuple[str, ...] | None = None
    parts: npt.NDArray[np.float64] | None = None
    part_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if list(self.names) != sorted(set(self.names)):
            raise DataError("expected names sorted and each once, got another order or a name twice; sort them")
        for field, dtype in (("labels", np.int64), ("ids", np.int64), ("parts", np.float64)):
            if (values := getattr(self, field)) is not None:
                object.__setattr__(self, field, _frozen(values, dtype))
        if self.boxes is not None:
            object.__setattr__(self, "boxes", tuple(_frozen(each, np.float64).reshape(-1, 4) for each in self.boxes))
        for field in PER_IMAGE:
            if (values := getattr(self, field)) is not None and len(values) != len(self):
                raise DataError(f"expected {field} of {len(self)} images, as many as names, got of {len(values)}")
        if self.labels is not None:
            count, shape = len(self.classes), self.labels.shape[1:]
            kind = f"a row of 0 and 1 for {count}" if self.several else f"below {count}, the number of"
            allowed = np.isin(self.labels, (0, 1) if self.several else range(count)).all()
            if shape != ((count,) if self.several else ()) or not allowed:
                came = f"{self.labels.shape} with values {np.unique(self.labels).tolist()}"
                raise DataError(f"expected labels, {kind} classes, got {came}")
        if self.parts is not None and self.parts.shape[1:] != (len(self.part_names), 3):
            shape = (len(self), len(self.part_names), 3)
            raise DataError(f"expected parts of shape {shape}, x, y, visible, got {self.parts.shape}")
        for name, each in zip(self.names, self.boxes or (), strict=False):
            if not (np.isfinite(each).all() and (each[:, :2] <= each[:, 2:]).all()):
                raise DataError(f"{name}: expected boxes (left, top, right, bottom), got {each.tolist()}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def several(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels is not None and self.labels.ndim == 2

    def path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.root / self.names[index]

    def subset(self, indices: npt.ArrayLike) -> ImageSet:
        """The images at ``indices`` (integers or a boolean mask), sorted and each once, with the same classes."""
        every = np.arange(len(self))
        chosen = np.unique(every[np.asarray(indices)]) if np.size(indices) else every[:0]
        return dataclasses.replace(self, **{field: _taken(getattr(self, field), chosen) for field in PER_IMAGE})

    def divided(self, share: float, seed: int) -> Splits:
        """Hold out a share of each class by :func:`stratified_split`; a DataError if there is nothing to hold out."""
        kept, held_out = stratified_split(self.labels, len(self), share, seed)
        if not held_out.size:
            of_a_class, each = ("", "") if self.labels is None else (" of a class", ", one of each class")
            raise DataError(
                f"expected at least two images{of_a_class}, to train on one and measure on another, "
                f"got {len(self)}{each * (len(self) > 1)}; add some"
            )
        return Splits(self.subset(kept), self.subset(held_out), seeded=True)

    def coverage(self, index: int, region: Box, grid: tuple[int, int]) -> npt.NDArray[np.float64] | None:
        """The share, from 0 to 1, of each cell that lies on an object of image ``index``: by its mask, else its boxes.

        The grid of (rows, columns) covers ``region``, which is :attr:`bla.Explanation.region` or
        :meth:`bla.data.photo.Transform.region`. Returns None if neither mask nor box of the image is known.
        """
        if self.masks is not None:
            path = self.root / self.masks[index]
            try:
                with Image.open(path) as file:
                    mask = np.asarray(file.convert("L")) > 0
            except OSError as error:
                raise DataError(f"{path}: expected the mask of {self.names[index]}, got {error}") from error
            return mask_coverage(mask, region, grid)
        if self.boxes is None or not len(self.boxes[index]):
            return None
        return box_coverage(self.boxes[index], region, grid)

    def folds(self, count: int, seed: int = 0) -> tuple[Splits, ...]:
        """``count`` divisions of the images, each held out once; every class of :func:`strata` is dealt out evenly.

        The same arguments give the same folds under every version and on every system.
        """
        if not 2 <= count <= len(self):
            raise DataError(f"expected from 2 folds to {len(self)}, an image each, got {count}")
        order = np.concatenate(_shuffled(self.labels, len(self), seed))
        fold_of = np.empty(len(self), np.int64)
        fold_of[order] = np.arange(len(self)) % count  # each class continues where the last one stopped
        folds = [fold_of == fold for fold in range(count)]
        return tuple(Splits(self.subset(~held_out), self.subset(held_out), seeded=True) for held_out in folds)

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of names and contents: a copy of the folder elsewhere has the same.

        A file that cannot be read counts as such. Several labels an image count too, since names do not give them.
        Files are read again only if one has changed since, by its size, times or inode.
        """
        total = hashlib.sha256()
        if self.several and self.labels is not None:
            total.update(json.dumps([self.classes, self.labels.tolist()]).encode())
        state = total.copy()
        for index, name in enumerate(self.names):
            state.update(os.fsencode(name) + b"\0")
            with contextlib.suppress(OSError):
                file = self.path(index).stat()
                said = (file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns)
                state.update(repr(said).encode())
        if (known := _DIGESTS.get(state.digest())) is not None:
            return known
        for index, name in enumerate(self.names):
            try:
                with opened(self.path(index)) as content:
                    digest = hashlib.file_digest(content, "sha256").digest()
            except OSError:
                digest = bytes(hashlib.sha256().digest_size)
            total.update(os.fsencode(name) + b"\0" + digest)
        return _DIGESTS.setdefault(state.digest(), total.hexdigest())


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """Images to train on and images held out; ``seeded``: divided here, at random, rather than by the folder."""

    train: ImageSet
    test: ImageSet
    seeded: bool

    def whole(self) -> ImageSet:
        """All images, as they were before a seeded split, or of both folders."""
        train, test = self.train, self.test
        if train.root != test.root:
            root = Path(os.path.commonpath([train.root.absolute(), test.root.absolute()]))
            train, test = _seen_from(root, train), _seen_from(root, test)
        names = train.names + test.names
        order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)

        def both(field: str) -> Any:
            one, other = getattr(train, field), getattr(test, field)
            if one is None or other is None:
                return None
            return _taken(one + other if isinstance(one, tuple) else np.concatenate([one, other]), order)

        return dataclasses.replace(train, **{field: both(field) for field in PER_IMAGE})

    def folds(self, count: int, seed: int = 0) -> tuple[Splits, ...]:
        """:meth:`ImageSet.folds` of all images, whatever this division."""
        return self.whole().folds(count, seed)


def box_coverage(boxes: npt.ArrayLike, region: Box, grid: tuple[int, int]) -> npt.NDArray[np.float64]:
    """The share of each cell of a grid over ``region`` that lies in the union of boxes, exactly.

    Boxes ``(K, 4)`` and region are left, top, right, bottom in the same pixels.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    left, top, right, bottom = region
    # Between the edges of boxes and region lie rectangles that are covered in full or not at all.
    x = np.unique([left, right, *boxes[:, [0, 2]].ravel().clip(left, right)])
    y = np.unique([top, bottom, *boxes[:, [1, 3]].ravel().clip(top, bottom)])
    middle_x, middle_y = (x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2
    covered = np.zeros((len(middle_y), len(middle_x)), np.bool_)
    for a, b, c, d in boxes:
        covered |= np.outer((middle_y > b) & (middle_y < d), (middle_x > a) & (middle_x < c))
    return mask_coverage(covered, region, grid, edges=(x, y))


def mask_coverage(
    mask: npt.ArrayLike, region: Box, grid: tuple[int, int], *, edges: tuple[_Edges, _Edges] | None = None
) -> npt.NDArray[np.float64]:
    """The share of each cell of a grid over ``region`` that lies on a mask, exactly.

    The mask ``(height, width)`` is true on the object; the region is in its pixels. ``edges`` are the x and y between
    which the mask's columns and rows lie, by default whole pixels.
    """
    mask = np.asarray(mask, np.bool_)
    x, y = edges or (np.arange(mask.shape[1] + 1.0), np.arange(mask.shape[0] + 1.0))
    left, top, right, bottom = region
    if not (left < right and top < bottom) or min(grid) < 1:
        raise DataError(f"expected a region (left, top, right, bottom) and a grid of cells, got {region} and {grid}")
    columns, rows = np.linspace(left, right, grid[1] + 1), np.linspace(top, bottom, grid[0] + 1)
    # The integral is linear between the edges, so it can be read anywhere.
    areas = mask * np.outer(np.diff(y), np.diff(x))
    integral = np.pad(areas, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    by_row = np.stack([np.interp(rows, y, column) for column in integral.T], axis=1)
    by_cell = np.stack([np.interp(columns, x, row) for row in by_row])
    share: npt.NDArray[np.float64] = np.diff(np.diff(by_cell, axis=0), axis=1)
    return (share / np.outer(np.diff(rows), np.diff(columns))).clip(0, 1)


def image_folder(root: str | os.PathLike[str], *, seed: int = 0, test_share: float = 0.2) -> Splits:
    """Find the images of a folder, in one of three layouts.

    - ``root/train/CLASS/...`` and ``root/test/CLASS/...`` (else ``val`` or ``validation``), divided as they are;
      without any of the three, the images of ``train`` are divided by :func:`stratified_split`.
    - ``root/CLASS/...``: divided by :func:`stratified_split`; the only image of a class goes to train.
    - images without class folders: unlabelled, and divided alike.

    An image is a file with one of :data:`SUFFIXES`, in upper or lower case, at any depth below its class folder.
    Hidden files and folders, other suffixes, images beside class folders and folders beside ``train`` are ignored.
    Symbolic links are followed, each folder once. Classes are sorted by name, and the test set may lack some.
    A DataError says if there is no such folder, no image, an empty class folder, one class only, a class in test that
    train lacks, or nothing to hold out.
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
    return _image_set(root).divided(test_share, seed)


def strata(labels: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The class by which an image is divided: its only one, or the rarest of several; K if it has none.

    >>> strata([[1, 0], [1, 1], [0, 0], [1, 0]]).tolist()
    [0, 1, 2, 0]
    """
    labels = np.asarray(labels, np.int64)
    if labels.ndim == 1:
        return labels
    uses = labels.sum(axis=0)
    rarest: npt.NDArray[np.int64] = np.where(labels > 0, uses, len(labels) + 1).argmin(axis=1)
    return np.where(labels.any(axis=1), rarest, labels.shape[1])


def stratified_split(
    labels: npt.ArrayLike | None, n: int, share: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Divide ``n`` images at random, each class by itself, into the indices kept and those held out.

    Of a class of m >= 2 images, m * share are held out, rounded half up, at least 1 and at most m - 1; an only
    image is kept. The same arguments give the same split under every version and on every system. Without labels, all
    images are of one class. A DataError unless 0 < share < 1, 0 <= seed < 2**32 and there are n labels.
    """
    if not 0 < share < 1:
        raise DataError(f"expected a share to hold out with 0 < share < 1, got {share}")
    held_out = np.zeros(n, np.bool_)
    for members in _shuffled(labels, n, seed):
        count = min(max(math.floor(len(members) * share + 0.5), 1), len(members) - 1)
        held_out[members[:count]] = True
    return np.nonzero(~held_out)[0], np.nonzero(held_out)[0]


def _shuffled(labels: npt.ArrayLike | None, n: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """The images of each class of :func:`strata`, in random order."""
    if not 0 <= seed < 2**32:
        raise DataError(f"expected a seed with 0 <= seed < 2**32, got {seed}")
    classes = np.zeros(n, np.int64) if labels is None else strata(labels)
    if classes.shape != (n,):
        raise DataError(f"expected {n} labels, an image each, got shape {classes.shape}")
    members = [np.nonzero(classes == label)[0] for label in np.unique(classes)]
    # RandomState's stream is frozen; default_rng's may change with NumPy
    return [each[np.random.RandomState([seed, place]).permutation(len(each))] for place, each in enumerate(members)]


def list_images(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Expand folders, at any depth, to the images in them, sorted; keep the files, and their order, as given.

    A path that does not exist is kept too: opening it reports it, and the others are not lost. A folder without images
    raises a DataError.
    """
    paths: list[Path] = []
    for source in map(Path, sources):
        found = _images_below(source) if source.is_dir() else [source]
        if not found:
            raise DataError(f"{source}: expected images ({' '.join(sorted(SUFFIXES))}), got none; check the path")
        paths += found
    return paths


def _frozen(values: npt.ArrayLike, dtype: type) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array


def _taken(values: Any, order: npt.NDArray[np.int64]) -> Any:
    """The entries of a field in this order; None if the field is."""
    if isinstance(values, tuple):
        return tuple(values[place] for place in order)
    return None if values is None else values[order]


def _seen_from(root: Path, images: ImageSet) -> ImageSet:
    """The same images with names relative to a folder above theirs."""
    below = images.root.absolute().relative_to(root).as_posix()
    names = tuple(f"{below}/{name}" for name in images.names)
    masks = None if images.masks is None else tuple(f"{below}/{name}" for name in images.masks)
    return dataclasses.replace(images, root=root, names=names, masks=masks)


def _image_set(root: Path, train_classes: tuple[str, ...] | None = None) -> ImageSet:
    members = {folder.name: _images_below(folder) for folder in _folders(root)}
    if not any(members.values()):
        loose = list_images([root])
        if train_classes:
            raise DataError(f"{root}: expected class folders as in train/, got images without; sort them into some")
        return ImageSet(root, tuple(path.relative_to(root).as_posix() for path in loose))
    if empty := [name for name, paths in members.items() if not paths]:
        raise DataError(f"{root}: expected images in every class folder, got none in {empty}; add some or remove it")
    classes = tuple(members) if train_classes is None else train_classes
    if train_classes is None and len(classes) == 1:
        raise DataError(f"{root}: expected at least two class folders, got {classes[0]!r} only; are the classes in it?")
    if unknown := [name for name in members if name not in classes]:
        raise DataError(f"{root}: expected train's classes {list(classes)}, got also {unknown}; add them to train")
    index = {name: place for place, name in enumerate(classes)}
    labelled = sorted((path.relative_to(root).as_posix(), index[name]) for name in members for path in members[name])
    names, labels = zip(*labelled, strict=True)
    return ImageSet(root, names, np.array(labels, np.int64), classes)


def _folders(root: Path) -> list[Path]:
    _, names, _ = next(os.walk(root, onerror=_refuse))
    return [root / name for name in sorted(names) if not name.startswith(".")]


def files_below(folder: Path) -> Iterator[str]:
    """The paths of the files in a folder, at any depth, folder by folder and sorted in each; hidden ones are left out.

    Links are followed, and each folder is read once.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))  # noqa: PTH118
        seen.add(real)


def _images_below(folder: Path) -> list[Path]:
    found = (path for path in map(Path, files_below(folder)) if path.suffix.lower() in SUFFIXES)
    return sorted(found, key=Path.as_posix)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: expected a readable folder, got {error.strerror}") from error
