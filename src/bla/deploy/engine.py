"""An exported explainer, run by ONNX Runtime: photos to explanations without torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import platformdirs

from bla import BlaError
from bla.data.photo import DataError, Photo, PhotoSource, Transform
from bla.explanations.explanation import Explanation, Prediction, Unexplained

KEY = "bla"
"""Where a file keeps its card: an ONNX file's metadata under this key, a torch file's extra file ``bla.json``."""

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parents[1] / "runs" / "explainers"
Pixels = npt.NDArray[np.float32]


class EngineError(BlaError):
    """A file that is no exported explainer, or one that cannot do what it is asked for."""


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
    version: of bla, that wrote it.
    several_labels: whether an image may have several classes or none.
    """

    classes: tuple[str, ...]
    transform: Transform
    grid: tuple[int, int]
    method: str
    model: str
    setup: str
    entry: Literal["pixels", "photos"]
    sizes: bool
    targets: bool
    version: str
    schema_version: int = SCHEMA_VERSION
    several_labels: bool = False

    @property
    def cells(self) -> int:
        """H * W."""
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self) | {"transform": self.transform.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Card:
        """The inverse of :meth:`to_dict`, also after JSON.

        Raises
        ------
        EngineError
            If it is of another schema, or no card.
        """
        version = record.get("schema_version")
        if version != SCHEMA_VERSION:
            raise EngineError(
                f"expected a file of schema_version {SCHEMA_VERSION}, got {version}: export the run again"
            )
        try:
            values = dict(record)
            values["transform"] = Transform.from_dict(values["transform"])
            values["classes"], values["grid"] = tuple(values["classes"]), tuple(values["grid"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"expected the card of an exported explainer, got another: {error!r}") from error


class Outputs(NamedTuple):
    """What the graph says of B photos."""

    logits: Pixels
    """(B, K), from the selected cells alone."""
    scores: Pixels
    """z, (B, H, W)."""
    soft: Pixels
    """The relaxed weights, (B, H, W)."""
    selected: npt.NDArray[np.bool_]
    """The explanation, (B, H, W)."""
    unbounded: Pixels
    """-u, (B, H, W): ranks the cells."""
    answers: Pixels
    """(B, M, K): logits from the subsets that were asked about."""
    explained: npt.NDArray[np.int64]
    """The class that each explanation is about, (B,); -1 of a class-agnostic explainer."""


class Engine:
    """An exported file, opened.

    One may be called from several threads. It holds no torch, and one copy of the weights.

    Parameters
    ----------
    path: a file that ``bla export --to onnx`` wrote.
    threads: of the computation; by default all cores.

    Attributes
    ----------
    card, classes, transform, grid: what the file says about itself.

    Raises
    ------
    EngineError
        If there is no such file, or it is not ours.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        # A thread that spins while it waits takes the core from decoding.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.path = Path(path)
        if not self.path.is_file():
            raise EngineError(f"expected a file that `bla export` wrote, got {self.path}, which is no file")
        try:
            self._session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no class of their own
            reason = str(error).partition("\n")[0][:200]
            raise EngineError(f"expected an ONNX file that `bla export` wrote, got {self.path}: {reason}") from error
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise EngineError(f"expected a file that `bla export` wrote, got {self.path}, an ONNX file of another's")
        self.card = Card.from_dict(json.loads(text))
        self.classes, self.transform, self.grid = self.card.classes, self.card.transform, self.card.grid

    def pixels(self, photos: npt.NDArray[np.uint8]) -> Pixels:
        """Normalised pixels (B, 3, H, W) of photos' pixels (B, H, W, 3), as ``transform.read`` gives them."""
        mean, std = (np.array(values, np.float32) for values in (self.transform.mean, self.transform.std))
        scaled = np.ascontiguousarray(photos.transpose(0, 3, 1, 2), dtype=np.float32)
        scaled *= (1 / (255 * std))[:, None, None]
        scaled -= (mean / std)[:, None, None]
        return scaled

    def run(
        self,
        photos: npt.NDArray[np.uint8],
        *,
        sizes: npt.ArrayLike | None = None,
        targets: npt.ArrayLike | None = None,
        masks: npt.ArrayLike | None = None,
    ) -> Outputs:
        """Explain photos, uint8 (B, h, w, 3), resized as :attr:`transform` says.

        Parameters
        ----------
        sizes: cells to select: a number, or one a photo; 0 is the explainer's own choice.
        targets: classes to explain: an index, or one a photo; -1 is the predicted one.
        masks: (B, M, H, W) or (M, H, W): subsets of cells to ask the head about.

        Raises
        ------
        EngineError
            If the file does not take one of these, or a value is out of its range.
        """
        if photos.dtype != np.uint8 or photos.ndim != 4 or photos.shape[3] != 3:
            raise EngineError(f"expected photos of shape (B, h, w, 3), uint8, got {photos.shape}, {photos.dtype}")
        feeds: dict[str, npt.NDArray[Any]] = {
            self.card.entry: photos if self.card.entry == "photos" else self.pixels(photos)
        }
        if sizes is not None:
            feeds["size"] = self._whole_numbers("size", sizes, 0, self.card.cells)
        if targets is not None:
            feeds["target"] = self._whole_numbers("target", targets, -1, len(self.classes) - 1)
        if masks is not None:
            feeds["masks"] = self._masks(masks, len(photos))
        names = [name for name in Outputs._fields if name != "explained" or self.card.targets]
        outputs = self._session.run(names, feeds)
        if not self.card.targets:
            outputs.append(np.full(len(photos), -1))
        return Outputs(*outputs)

    def explanations(
        self,
        photos: Sequence[Photo],
        names: Sequence[str],
        *,
        sizes: npt.ArrayLike | None = None,
        targets: npt.ArrayLike | None = None,
    ) -> list[Explanation | Unexplained]:
        """Explain photos that :attr:`transform` has read, in one run; one that gives no numbers is unexplained."""
        outputs = self.run(np.stack([photo.pixels for photo in photos]), sizes=sizes, targets=targets)
        return [
            self.explanation(name, photo, Outputs(*(values[row] for values in outputs)))
            for row, (name, photo) in enumerate(zip(names, photos, strict=True))
        ]

    def explain_each(
        self, images: Iterable[PhotoSource], *, size: int | None = None, target: int | None = None, batch_size: int = 16
    ) -> Iterator[Explanation | Unexplained]:
        """Explain photos one by one, in order; one that cannot be read gives an :class:`Unexplained`."""
        batch: list[tuple[str, Photo | str]] = []
        for index, image in enumerate(images):
            name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"
            try:
                batch.append((name, self.transform.read(image)))
            except DataError as error:
                batch.append((name, str(error) if isinstance(image, (str, os.PathLike)) else f"{name}: {error}"))
            if len(batch) == batch_size:
                yield from self._explain_batch(batch, size, target)
                batch = []
        yield from self._explain_batch(batch, size, target)

    def _explain_batch(
        self, batch: Sequence[tuple[str, Photo | str]], size: int | None, target: int | None
    ) -> Iterator[Explanation | Unexplained]:
        readable = [(name, item) for name, item in batch if isinstance(item, Photo)]
        found: Iterator[Explanation | Unexplained] = iter(())
        if readable:
            names, photos = zip(*readable, strict=True)
            found = iter(self.explanations(photos, names, sizes=size, targets=target))
        for name, item in batch:
            yield Unexplained(name, item) if isinstance(item, str) else next(found)

    def top(self, logits: Pixels) -> tuple[Prediction, ...]:
        """The best five classes (all, where there are fewer; of several labels all above one half) of logits (K,)."""
        if self.card.several_labels:
            shown = max(5, int((logits > 0).sum()))
            probabilities = 0.5 * (1 + np.tanh(0.5 * logits))  # the sigmoid, which overflows nowhere
        else:
            shown = 5
            shifted = np.exp(logits - logits.max())
            probabilities = shifted / shifted.sum()
        best = np.argsort(-logits, kind="stable")[:shown]
        return tuple(
            Prediction(index, self.classes[index], min(float(probabilities[index]), 1.0)) for index in best.tolist()
        )

    def explanation(self, name: str, photo: Photo, outputs: Outputs) -> Explanation | Unexplained:
        """Of one photo, from its row of each output."""
        if not (np.isfinite(outputs.unbounded).all() and np.isfinite(outputs.logits).all()):
            return Unexplained(name, f"{name}: expected finite features, got NaN or infinity from {self.card.model}")
        top = self.top(outputs.logits)
        return Explanation(
            image=name,
            prediction=top[0],
            top=top,
            method=self.card.method,
            grid=self.grid,
            unbounded=outputs.unbounded,
            scores=outputs.scores,
            soft=outputs.soft,
            selected=outputs.selected,
            region=photo.region,
            target=int(outputs.explained) if self.card.targets else None,
            model=self.card.model,
            setup=self.card.setup,
        )

    def _whole_numbers(self, name: str, values: npt.ArrayLike, low: int, high: int) -> npt.NDArray[np.int64]:
        if not (self.card.sizes if name == "size" else self.card.targets):
            reason = "its size is fixed" if name == "size" else "it is not class-aware"
            raise EngineError(f"expected no {name} for {self.card.setup}, got {values!r}: {reason}")
        array = np.atleast_1d(np.asarray(values))
        if array.dtype.kind not in "iu" or array.ndim != 1 or array.min() < low or array.max() > high:
            raise EngineError(f"expected a {name} from {max(low, int(name == 'size'))} to {high}, got {values!r}")
        return array.astype(np.int64)

    def _masks(self, values: npt.ArrayLike, photos: int) -> Pixels:
        masks = np.asarray(values, np.float32)
        masks = masks[None].repeat(photos, axis=0) if masks.ndim == 3 else masks
        if masks.shape[0] != photos or masks.ndim != 4 or masks.shape[2:] != self.grid:
            raise EngineError(
                f"expected masks of shape ({photos}, any, {self.grid[0]}, {self.grid[1]}), got {masks.shape}"
            )
        if not np.isin(masks, (0, 1)).all() or not masks.any(axis=(2, 3)).all():
            raise EngineError("expected masks of 0 and 1, each with at least one cell to read")
        return masks


def open_engine(explainer: str | Path, *, threads: int | None = None) -> Engine:
    """The engine of an exported file, or of a run or shipped explainer, which is exported first and kept.

    Exporting is done by another process, so that this one stays without torch; its result is kept in the user's
    cache (``$BLA_CACHE``) as long as the run does not change.

    Raises
    ------
    EngineError
        If there is neither a file nor a run, or the run cannot be exported.
    """
    path = Path(explainer)
    if path.is_file():
        return Engine(path, threads=threads)
    folder = path if path.is_dir() else SHIPPED / str(explainer)
    if not folder.is_dir():
        raise EngineError(f"expected an exported file, a run folder or a shipped explainer, got {str(explainer)!r}")
    kept = kept_path(folder)
    if not kept.exists():
        command = [sys.executable, "-m", "bla", "export", str(folder), "--out", str(kept)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("bla: ")
            raise EngineError(f"{folder}: {reason}")
    return Engine(kept, threads=threads)


def kept_path(folder: Path) -> Path:
    """Where the export of a run is kept: a name made from the run's content and the version of bla."""
    import importlib.metadata

    digest = hashlib.sha256(importlib.metadata.version("bounded-logit-attention").encode())
    for name in ("run.json", "model.safetensors"):
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise EngineError(f"expected a complete run in {folder}, got none: {error}") from error
        digest.update(b"%d:" % len(content) + content)
    root = Path(os.environ.get("BLA_CACHE") or platformdirs.user_cache_path("bla"))
    return root / "exported" / f"{digest.hexdigest()}.onnx"
