"""An exported explainer, run by ONNX Runtime: photos to explanations without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from bla import BlaError, __version__, meant
from bla.data.masking import FILLS, masked_photos
from bla.data.photo import DataError, Photo, PhotoSource, Transform
from bla.explanations.explanation import Explanation, Sizes, Unexplained
from bla.files import cache_root, typed, write_atomically
from bla.model.compiled import session
from bla.progress import Progress, silent
from bla.runs.record import content_digest, run_folder

KEY = "bla"
"""Where a file keeps its card: an ONNX file's metadata under this key, a torch file's extra file ``bla.json``."""

SCHEMA_VERSION = 2
STEP = "export: "
"""What a line on the progress of an export begins with."""
Pixels = npt.NDArray[np.float32]


class EngineError(BlaError):
    """A file that is no exported explainer, or a question that the explainer cannot answer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Card:
    """What an exported file says about itself.

    Attributes
    ----------
    classes: their names, in the order of the logits.
    transform: how a photo becomes ``pixels``.
    grid: ``(H, W)``, the cells.
    method, model, setup: what its explanations are signed with.
    entry: ``pixels``, normalised, or ``photos``, uint8 of any size.
    sizes, targets: whether it takes the optional inputs ``size`` and ``target``.
    version: the version of bla that wrote it.
    several_labels: whether an image may have several classes or none.
    regression: whether the one logit is a value.
    note: how explanations are approximate; empty where they are not.
    """

    classes: tuple[str, ...]
    transform: Transform
    grid: tuple[int, ...]
    method: str
    model: str
    setup: str
    entry: Literal["pixels", "photos"]
    sizes: bool
    targets: bool
    version: str
    schema_version: int = SCHEMA_VERSION
    several_labels: bool = False
    regression: bool = False
    note: str = ""

    @property
    def cells(self) -> int:
        """H * W."""
        return math.prod(self.grid)

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or not self.classes:
            raise EngineError(f"expected cells and classes, got a grid of {self.grid} and {len(self.classes)} classes")

    @classmethod
    def from_json(cls, text: str) -> Card:
        """The card in a file's metadata."""
        try:
            version = typed(text, dict[str, Any]).get("schema_version")
            if version == SCHEMA_VERSION:
                return typed(text, cls)
        except ValueError as error:
            raise EngineError(f"expected the card of an exported explainer, got another: {error}") from error
        raise EngineError(f"expected schema_version {SCHEMA_VERSION}, got {version}: export the run again")

    def checked_size(self, size: int) -> int:
        """The size, if the explainer can select that many cells."""
        if not self.sizes:
            raise EngineError(f"expected no size for {self.setup}, got {size}: its size is fixed")
        if not 1 <= size <= self.cells:
            raise EngineError(f"expected a size from 1 to {self.cells}, got {size}")
        return size

    def class_index(self, target: int | str) -> int:
        """The index of a class to explain, given by name or by index, if the explainer is class-aware and has it."""
        if not self.targets:
            raise EngineError(f"expected no target for {self.setup}, got {str(target)[:80]!r}: it is not class-aware")
        return self.index_of(target)

    def index_of(self, target: int | str) -> int:
        """The index of a class, given by name or by index."""
        names = [*self.classes, *map(str, range(len(self.classes)))]
        if str(target) not in names:
            count, near = len(self.classes), meant(str(target)[:80], self.classes)
            raise EngineError(f"expected the name or index of one of {count} classes, got {str(target)[:80]!r}{near}")
        return names.index(str(target)) % len(self.classes)

    def checked_masks(self, masks: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Subsets of cells, (M, H, W) or (B, M, H, W), if they are of 0 and 1 on the grid and none is empty."""
        array = np.asarray(masks)
        rank = len(self.grid)
        if array.ndim - rank not in (1, 2) or array.shape[-rank:] != self.grid:
            raise EngineError(f"expected masks of shape (any, {', '.join(map(str, self.grid))}), got {array.shape}")
        if not np.isin(array, (0, 1)).all() or not array.any(axis=tuple(range(-rank, 0))).all():
            raise EngineError("expected masks of 0 and 1, each with at least one cell to read")
        return array.astype(np.bool_)


class Outputs(NamedTuple):
    """What the graph says of B photos, or, without their first dimension, of one."""

    logits: Pixels  # (B, K), from the selected cells alone
    classifier_logits: Pixels  # (B, K), from all cells
    scores: Pixels  # z, (B, H, W)
    soft: Pixels  # the relaxed weights, (B, H, W)
    selected: npt.NDArray[np.bool_]  # the explanation, (B, H, W)
    unbounded: Pixels  # -u, (B, H, W): ranks the cells
    sizes: npt.NDArray[np.int64]  # (B, 3): as in an explanation's sizes, 0 where there is none
    answers: Pixels  # (B, M, K): the logits from each subset in ``masks``
    explained: npt.NDArray[np.int64]  # the class of each explanation, (B,); -1 where the explainer is class-agnostic

    def rows(self) -> list[Outputs]:
        """What the graph says of each photo."""
        return [Outputs(*row) for row in zip(*self, strict=True)]


class Engine:
    """An exported file, opened.

    Several threads may call one engine. It loads no torch, and holds the weights once.

    Parameters
    ----------
    path: a file that ``bla export --to onnx`` wrote.
    threads: of the computation; by default all cores.
    gpu: compute on a GPU if there is one and onnxruntime-gpu is installed instead of onnxruntime.

    Attributes
    ----------
    card, classes, transform, grid: what the file says about itself.
    device: ``CPU`` or ``GPU``: where it computes.

    An EngineError if there is no such file, or bla did not export it.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, gpu: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise EngineError(f"expected a file that `bla export` wrote, got {self.path}, which is no file")
        try:
            self._session = session(self.path, threads=threads, gpu=gpu)
        except Exception as error:  # ONNX Runtime's errors share no class
            reason = str(error).partition("\n")[0][:200]
            raise EngineError(f"expected an ONNX file that `bla export` wrote, got {self.path}: {reason}") from error
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise EngineError(f"expected a file that `bla export` wrote, got {self.path}, an ONNX file of another's")
        self.device = "GPU" if "CUDAExecutionProvider" in self._session.get_providers() else "CPU"
        self.card = Card.from_json(text)
        self.classes, self.transform, self.grid = self.card.classes, self.card.transform, self.card.grid

    def run(
        self,
        photos: npt.NDArray[Any],
        *,
        sizes: npt.ArrayLike | None = None,
        targets: npt.ArrayLike | None = None,
        masks: npt.ArrayLike | None = None,
    ) -> Outputs:
        """Explain photos, uint8 (B, h, w, 3), as :attr:`transform` resizes them; or their levels as float32.

        Parameters
        ----------
        sizes: numbers of cells to select, one for all photos or one each; 0 leaves the size to the explainer.
        targets: classes to explain, one index for all photos or one each; -1 is the predicted class.
        masks: (B, M, H, W) or (M, H, W): subsets of cells from which the head is to predict.

        An EngineError if the file does not take one of these, or a value is out of its range.
        """
        channels, rank = self.transform.channels, 2 + len(self.transform.size)
        if photos.dtype not in (np.uint8, np.float32) or photos.ndim != rank or photos.shape[-1] != channels:
            raise EngineError(
                f"expected photos of shape (B, h, w, {channels}), uint8, got {photos.shape}, {photos.dtype}"
            )
        feeds: dict[str, npt.NDArray[Any]] = {}
        if self.card.entry == "pixels":
            feeds["pixels"] = self.normalised(photos)
        else:
            feeds["photos"] = self.transform.framed(np.rint(photos).astype(np.uint8))  # the graph crops them once more
        if sizes is not None:
            feeds["size"] = _whole_numbers("size", sizes)
            for size in np.unique(feeds["size"]).tolist():
                self.card.checked_size(size or self.card.cells)
        if targets is not None:
            feeds["target"] = _whole_numbers("target", targets)
            for target in np.unique(feeds["target"]).tolist():
                self.card.class_index(0 if target == -1 else target)
        if masks is not None:
            subsets = self.card.checked_masks(masks).astype(np.float32)
            subsets = subsets[None].repeat(len(photos), axis=0) if subsets.ndim == 1 + len(self.grid) else subsets
            if len(subsets) != len(photos):
                raise EngineError(f"expected masks for {len(photos)} photos, got them for {len(subsets)}")
            feeds["masks"] = subsets
        names = [name for name in Outputs._fields if name != "explained" or self.card.targets]
        outputs = self._session.run(names, feeds)
        if not self.card.targets:
            outputs.append(np.full(len(photos), -1))
        return Outputs(*outputs)

    def normalised(self, photos: npt.NDArray[Any]) -> Pixels:
        """What the entry ``pixels`` takes, (B, C, ...), of photos' levels (B, ..., C)."""
        shape = (2, self.transform.channels, *[1] * len(self.transform.size))
        mean, std = np.array([self.transform.mean, self.transform.std], np.float32).reshape(shape)
        pixels = np.ascontiguousarray(np.moveaxis(photos, -1, 1), dtype=np.float32)
        pixels *= 1 / (255 * std)
        pixels -= mean / std
        return pixels

    def read(self, name: str, source: PhotoSource) -> Photo | Unexplained:
        """A photo as the classifier sees it, or why it cannot be read."""
        try:
            return self.transform.read(source, name=name)
        except DataError as error:
            return Unexplained(name, str(error))

    def explanations(
        self,
        names: Sequence[str],
        photos: Sequence[Photo | Unexplained],
        *,
        fill: str | None = None,
        **question: int | None,
    ) -> list[Explanation | Unexplained]:
        """Explain photos that :meth:`read` gave, in one :meth:`run`; one that could not be read stays unexplained.

        With a ``fill``, two more runs check the explanations.
        """
        readable = np.array([photo.pixels for photo in photos if isinstance(photo, Photo)])
        rows: list[list[Outputs]] = []
        if len(readable):
            found = self.run(readable, **question)
            checks = self.masked_photos(readable, found.selected, fill) if fill else ()
            rows = [found.rows(), *(self.run(each).rows() for each in checks)]
        each = zip(*rows, strict=True)
        return [
            self.explanation(name, photo, *next(each), fill=fill) if isinstance(photo, Photo) else photo
            for name, photo in zip(names, photos, strict=True)
        ]

    def masked_photos(
        self, photos: npt.NDArray[np.uint8], selected: npt.NDArray[np.bool_], fill: str
    ) -> list[npt.NDArray[Any]]:
        """Photos (B, h, w, 3) with only, and without, the pixels of the selected cells (B, H, W)."""
        return [masked_photos(photos, masks, self.transform.mean, fill) for masks in (selected, ~selected)]

    def explain_each(
        self,
        images: Iterable[PhotoSource],
        *,
        size: int | None = None,
        target: int | str | None = None,
        against: int | str | None = None,
        check: bool = False,
        fill: str = FILLS[0],
        batch_size: int = 16,
    ) -> Iterator[Explanation | Unexplained]:
        """Explain photos one by one, in order; one that cannot be read gives an :class:`Unexplained`.

        The options are those of :meth:`bla.model.classifier.ExplainableClassifier.explain`; a graph has no votes, so
        that ``against`` is refused. A graph that takes ``photos`` gets masked ones rounded to 8 bits, which moved
        probabilities by .01 on average, by .1 at most.
        """
        if against is not None:
            raise EngineError(f"expected no class to hold against another, got {against!r}: only a run has votes")
        about = None if target is None else self.card.class_index(target)
        if size is not None:
            self.card.checked_size(size)
        named = (
            (os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}", image)
            for index, image in enumerate(images)
        )
        while batch := list(itertools.islice(named, batch_size)):
            names = [name for name, _ in batch]
            photos = list(itertools.starmap(self.read, batch))
            yield from self.explanations(names, photos, fill=fill if check else None, sizes=size, targets=about)

    def probabilities(self, logits: Pixels) -> Pixels:
        """Probabilities by logits (K,): the softmax, of several labels their sigmoids; of a regression the value."""
        if self.card.regression:
            return logits
        if self.card.several_labels:
            return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))  # the sigmoid, which overflows nowhere
        shifted = np.exp(logits - logits.max())
        return np.asarray(shifted / shifted.sum())

    def explanation(
        self, name: str, photo: Photo, outputs: Outputs, *masked: Outputs, fill: str | None = None
    ) -> Explanation | Unexplained:
        """The explanation of one photo, from its row of each output; checked by those of its :meth:`masked_photos`."""
        card = self.card
        numbers = (outputs.unbounded, outputs.logits, outputs.classifier_logits)
        if not all(np.isfinite(values).all() for values in numbers):
            return Unexplained(name, f"{name}: expected finite features, got NaN or infinity from {card.model}")
        return Explanation.from_arrays(
            name,
            self.probabilities(outputs.logits),
            self.classes,
            from_all=self.probabilities(outputs.classifier_logits),
            several_labels=card.several_labels,
            regression=card.regression,
            note=card.note,
            shown=photo.shown or None,
            masked=[self.probabilities(each.classifier_logits) for each in masked],
            fill=fill,
            **{name: getattr(outputs, name) for name in ("unbounded", "scores", "soft", "selected")},
            method=card.method,
            region=photo.region,
            photo=photo.upright,
            target=int(outputs.explained) if card.targets else None,
            model=card.model,
            setup=card.setup,
            sizes=Sizes(*outputs.sizes.tolist()) if outputs.sizes.all() else None,
        )


def _whole_numbers(name: str, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    array = np.atleast_1d(np.asarray(values))
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise EngineError(f"expected a {name} that is a whole number, or one for each photo, got {values!r}")
    return array.astype(np.int64)


def graph_of(run: str | Path) -> Path:
    """Where the graph of a run or shipped explainer is kept: in the user's cache (``$BLA_CACHE``), until it changes."""
    digest = content_digest(run_folder(run), f"{__version__} {SCHEMA_VERSION}")
    return cache_root() / "exported" / f"{digest}.onnx"


def seal(graph: Path) -> None:
    """Write a kept graph's checksum beside it: :func:`kept_graph` takes no other."""
    write_atomically(graph.with_suffix(".sha256"), _digest(graph).encode())


def kept_graph(run: str | Path) -> Path | None:
    """The kept graph of a run or shipped explainer; None if there is none, or a damaged one."""
    graph = graph_of(run)
    checksum = graph.with_suffix(".sha256")
    whole = graph.exists() and checksum.exists() and checksum.read_text() == _digest(graph)
    return graph if whole else None


def open_engine(
    explainer: str | Path, *, model: str | None = None, threads: int | None = None, report: Progress = silent
) -> Engine:
    """The engine of an exported file, or of a run or shipped explainer, which is exported first and kept.

    Another process does the export, so that this one loads no torch. ``model`` is as :func:`bla.load` takes it.

    A RunError if there is neither a file nor a complete run; an EngineError if the run cannot be exported.
    """
    if Path(explainer).is_file():
        return Engine(explainer, threads=threads)
    folder = run_folder(explainer)
    if (kept := kept_graph(folder)) is None:
        report(f"exporting {explainer}, which takes up to a minute, once", 0, 0)
        # -P: a module in the working folder is not taken for one of ours
        command = [sys.executable, "-P", "-m", "bla", "export", str(folder)]
        command += [] if model is None else ["--trust-code", model]
        said = "no reason given"
        with subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as exporting:
            for line in filter(None, map(str.strip, exporting.stderr or ())):
                said = line
                if line.startswith(STEP):
                    report(line, 0, 0)
        if exporting.returncode:
            raise EngineError(f"{folder}: {said.removeprefix('bla: ')}")
        kept = graph_of(folder)
    return Engine(kept, threads=threads)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
