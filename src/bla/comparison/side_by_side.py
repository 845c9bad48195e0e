"""Methods beside one another on a classifier in memory: pictures, and what each one's cells are worth."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from bla import meant
from bla.comparison.catalogue import METHODS, UNTRAINED, Subject
from bla.comparison.explanations import cut, wait
from bla.comparison.methods import Batch, ComparisonError, Method
from bla.comparison.methods.given import given
from bla.data.masking import FILLS
from bla.data.photo import DataError
from bla.explanations.explanation import Explanation, Unexplained, picture_format
from bla.explanations.picture import heading, tiled
from bla.explanations.render import embedded, encoded
from bla.files import write_atomically, write_json
from bla.model.attention import Selection
from bla.model.classifier import ExplainableClassifier
from bla.model.evidence import from_all
from bla.model.heads import reads_maps
from bla.model.images import ImageLike, Input, alike, each, read_image
from bla.model.whole import Whole

_BATCH = 8
_SHOWN = 6
"""Photos in the picture that a notebook shows."""
_HEADS = ("agreement ↑", "kept ↑", "removed ↓", "ms per photo ↓")
_LEGEND = (
    "Agreement: the regions alone give the classifier's answer. Kept: the whole classifier does, shown their pixels "
    "alone. Removed: it still does without them."
)
_STYLE = "<style>body{font:16px system-ui;margin:2em;max-width:90em}td{text-align:right;padding:.2em 1em}</style>"


class Figures(NamedTuple):
    """Of one method, over the photos.

    ``agreement``: how often the head, reading the selected cells alone, gives the classifier's class. ``kept``: how
    often the whole classifier does, shown their pixels alone; ``removed``: how often it still does without them.
    ``milliseconds``: for a photo, beyond the features.
    """

    agreement: float
    kept: float
    removed: float
    milliseconds: float

    def written(self) -> list[str]:
        """For a table, under :data:`_HEADS`."""
        return [*(f"{value:.2f}" for value in self[:3]), f"{self.milliseconds:.1f}"]


@dataclasses.dataclass(frozen=True, slots=True)
class SideBySide:
    """What :func:`bla.compare` found: each method's explanations of the same photos, at equal area, and its figures.

    Attributes
    ----------
    explanations: by method, one for each photo, in order. The classifier's own explainer comes first.
    figures: by method.
    failures: photos that could not be read.
    """

    explanations: Mapping[str, Sequence[Explanation]]
    figures: Mapping[str, Figures]
    failures: Sequence[Unexplained] = ()

    def __repr__(self) -> str:
        width = max(map(len, self._rows))
        lines = (f"{name:<{width}}" + "".join(f"{part:>16}" for part in parts) for name, parts in self._rows.items())
        return "\n".join([self._title, *lines, _LEGEND])

    @property
    def _rows(self) -> dict[str, Sequence[str]]:
        """Of the table: the heads, then a method each."""
        return {"": _HEADS, **{name: each.written() for name, each in self.figures.items()}}

    @property
    def _title(self) -> str:
        count = len(next(iter(self.explanations.values())))
        return f"{count} photo{'s' * (count != 1)}, each method cut to the same number of regions"

    def picture(self, *, photos: int | None = _SHOWN, width: int = 260) -> Image.Image:
        """A row for each photo, a column for each method."""
        columns = [each[:photos] for each in self.explanations.values()]
        drawn = [heading(name, width) for name in self.explanations]
        drawn += [one.picture(width=width) for row in zip(*columns, strict=True) for one in row]
        return tiled(drawn, len(columns))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a report in one file (``.html``), figures and explanations (``.json``), or the picture (``.png``)."""
        path = Path(path)
        if path.suffix == ".json":
            return write_json(path, self.to_dict(), indent=1)
        if path.suffix in (".html", ".htm"):
            head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Methods compared</title>'
            return write_atomically(path, f"{head}{_STYLE}{self._html(None)}".encode())
        kind = picture_format(path, ".html, .json")
        return write_atomically(path, encoded(self.picture(photos=None), kind))

    def to_dict(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        return {
            "figures": {name: each._asdict() for name, each in self.figures.items()},
            "explanations": {name: [one.to_dict() for one in each] for name, each in self.explanations.items()},
            "failures": [failure.to_dict() for failure in self.failures],
        }

    def _repr_html_(self) -> str:
        return self._html(_SHOWN)

    def _html(self, photos: int | None) -> str:
        table = "".join(
            f"<tr><th>{escape(name)}</th>{''.join(f'<td>{part}</td>' for part in parts)}</tr>"
            for name, parts in self._rows.items()
        )
        source = embedded(self.picture(photos=photos), "jpeg", quality=85)
        names = escape(" | ".join(self.explanations))
        return (
            f"<h2>{self._title}</h2><table>{table}</table><p>{_LEGEND} "
            f'Columns of the picture: {names}.</p><img src="{source}" alt="{names}" style="max-width:100%">'
        )


def compare(
    wrapped: ExplainableClassifier,
    photos: ImageLike | Iterable[ImageLike],
    methods: Any = None,
    *,
    size: int | None = None,
    fill: str = FILLS[0],
    seed: int = 0,
) -> SideBySide:
    """Compare a wrapped classifier's explanations with other methods' on the same photos, at equal area.

    Every method explains the class that the classifier predicts, and is cut, photo by photo, to as many cells as the
    wrapped classifier's own explainer selects there. :func:`bla.comparison.compare` measures a run in more ways.

    Parameters
    ----------
    photos: a folder, or photos as ``explain`` takes them.
    methods: one or several: names in :data:`bla.comparison.ALL` that need no training images; functions ``(model,
        pixels, target) -> map``, of the classifier, a photo's normalised pixels (1, 3, h, w), and a class, to a map
        (h, w) of any size, larger is more relevant; objects of captum (with ``attribute``) and of pytorch-grad-cam, on
        this or the original classifier. A mapping gives them names. By default Grad-CAM, and two controls: a centre
        disc and random cells.
    size: exactly so many cells for every method.
    fill: what replaces pixels: :data:`bla.data.masking.FILLS`.

    A ComparisonError says which method is not known or gives no map; a DataError that no photo could be read.

    >>> import numpy as np, bla
    >>> stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 9, stride=16), torch.nn.ReLU())
    >>> net = torch.nn.Sequential(stem, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    >>> photos = [np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8) for i in range(2)]
    >>> def brightness(model, pixels, target):
    ...     return pixels[0].mean(0)
    >>> list(bla.compare(bla.explainable(net), photos, ["centre", brightness]).figures)
    ['BLA', 'centre disc', 'brightness']
    """
    if not isinstance(wrapped, ExplainableClassifier):
        raise ComparisonError(f"expected a wrapped classifier, got {type(wrapped).__name__}: bla.explainable wraps it")
    if wrapped.several_labels:
        raise ComparisonError("expected a classifier of one class for each photo, got one of several labels")
    if len(wrapped.transform.size) == 3:
        raise ComparisonError("expected a classifier of photos, got one of volumes: wrapped.explain explains these")
    whole = Whole(wrapped.trunk, wrapped.head)
    rivals = _methods(Subject(wrapped, seed), whole, methods)
    read = [read_image(wrapped.transform, *numbered) for numbered in enumerate(each(photos, wrapped.transform.shape))]
    inputs = [item for item in read if isinstance(item, Input)]
    if not inputs:
        raise DataError(f"expected photos that can be read, got none of {len(read)}")
    found: dict[str, list[Explanation]] = {name: [] for name in (wrapped.attention.method, *rivals)}
    seconds = dict.fromkeys(found, 0.0)
    parts = [run[start : start + _BATCH] for run in alike(inputs) for start in range(0, len(run), _BATCH)]
    for start, part in zip(itertools.accumulate(map(len, parts), initial=0), parts, strict=False):
        pixels = wrapped.batch(part)
        with torch.no_grad():
            features = wrapped.trunk(pixels)
            targets = from_all(wrapped.head, features).argmax(-1)
        batch, sizes = Batch(features, targets, torch.arange(start, start + len(part)), pixels), torch.empty(0)
        for name in found:
            begun = time.perf_counter()
            if name in rivals:
                selection = _selected(rivals[name].maps(batch).float(), sizes)
            else:
                asked = targets if wrapped.attention.class_conditional else None
                with torch.no_grad():
                    selection = wrapped.attention(features, size=size, target=asked)
                sizes = (selection.hard > 0).sum(dim=(1, 2))
            wait(features.device)
            seconds[name] += time.perf_counter() - begun
            explained = wrapped.explained(part, pixels, features, selection._replace(target=targets), fill=fill)
            found[name] += [dataclasses.replace(one, method=name) for one in explained if isinstance(one, Explanation)]
    failures = [item for item in read if isinstance(item, Unexplained)]
    return SideBySide(found, {name: _figures(found[name], seconds[name]) for name in found}, failures)


def _selected(maps: Tensor, sizes: Tensor) -> Selection:
    cells = cut(maps, sizes)
    hard = cells.selected / sizes.to(maps.device)[:, None, None]
    return Selection(cells.unbounded, cells.scores, hard, hard)


def _figures(explanations: Sequence[Explanation], seconds: float) -> Figures:
    count = max(len(explanations), 1)
    checks = [one.check for one in explanations if one.check is not None]
    kept = sum(check.kept.index == check.about.index for check in checks)
    removed = sum(check.removed.index == check.about.index for check in checks)
    agreement = sum(bool(one.agrees) for one in explanations)
    return Figures(agreement / count, kept / count, removed / count, 1000 * seconds / count)


def _methods(subject: Subject, whole: Whole, methods: Any) -> dict[str, Method]:
    """The methods by their titles."""
    if methods is None:  # a head that reads maps has no pooled features, which Grad-CAM here reads
        methods = (*(("norm",) if reads_maps(subject.classifier.head) else ("grad-cam",)), "centre", "random")
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        methods = [methods]
    named = methods.items() if isinstance(methods, Mapping) else [(None, what) for what in methods]
    found: dict[str, Method] = {}
    for name, what in named:
        if isinstance(what, str):
            if what not in UNTRAINED:
                known = ", ".join(UNTRAINED)
                near = meant(what, UNTRAINED)
                raise ComparisonError(f"expected methods among {known}, or functions, got {what!r}{near}")
            method = METHODS[what].build(subject)
        else:
            method = given(what, whole, getattr(what, "__name__", type(what).__name__))
        title = name or method.title
        while title in found or title == subject.classifier.attention.method:
            title += "'"
        found[title] = method
    return found
