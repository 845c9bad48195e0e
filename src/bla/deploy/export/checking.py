"""The graph against the module: random, tied and clipped maps; every size, other subsets, other targets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bla import BlaError
from bla.deploy.engine import Card
from bla.deploy.export.graph import MAPS, OUTPUTS, parted
from bla.model.attention import Attention, Selection
from bla.model.classifier import ExplainableClassifier
from bla.model.compiled import session
from bla.model.evidence import from_all
from bla.model.heads import grid_of

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-4  # the largest miss of an output, relative to that output's largest value, in float32
LOOSE = 0.05  # the same where torch resizes the photos: their pixels then differ from Pillow's
PHOTO_TOLERANCE = 0.5  # the mean distance of the graph's pixels of a photo from Pillow's, in levels of 255

Outputs = dict[str, npt.NDArray[Any]]
Question = dict[str, Tensor]
"""Some of the inputs ``size`` (B,), ``target`` (B,) and ``masks`` (B, M, H, W)."""


class ExportError(BlaError):
    """An explainer that cannot be exported, or a graph that differs from its module."""


def check_onnx(wrapped: ExplainableClassifier, model: onnx.ModelProto, card: Card) -> Mapping[str, float]:
    """The largest miss of each output, over whole images and over maps put in place of the trunk's."""
    found = _Misses(wrapped)
    pixels = _noise(3, wrapped)
    images = pixels.numpy()
    with torch.inference_mode():
        if card.entry == "photos":
            images = _photos(3, wrapped)
            prepared = _part(model, ["photos"], ["pixels"])(photos=images)["pixels"]
            own = np.stack([card.transform.read(photo).pixels for photo in images]).astype(np.float64)
            levels = 255 * (prepared.transpose(0, 2, 3, 1) * card.transform.std + card.transform.mean)
            found.note("photos", float(np.abs(levels - own).mean()), PHOTO_TOLERANCE)
            pixels = torch.from_numpy(prepared)
        inputs = [value.name for value in model.graph.input]
        found.compare(wrapped.trunk(pixels), _part(model, inputs, OUTPUTS)(**{card.entry: images}))
        names = MAPS[: 1 + bool(wrapped.attention.earlier)]
        tail = _part(model, [*inputs, *names], OUTPUTS)
        for features in maps_to_check(wrapped, pixels):
            repeated = images[:1].repeat(len(features), axis=0)
            for question in _questions(card, len(features)):
                maps = parted(features, wrapped.attention.earlier)
                feeds = {card.entry: repeated} | {n: each.numpy() for n, each in zip(names, maps, strict=True)}
                feeds |= {name: value.numpy() for name, value in question.items()}
                found.compare(features, tail(**feeds), question)
    return found.within_tolerance()


def check_torch(
    wrapped: ExplainableClassifier, loaded: Callable[[Tensor], Mapping[str, Tensor]], card: Card
) -> Mapping[str, float]:
    """As :func:`check_onnx`, over whole images: a torch file has no other inputs."""
    found = _Misses(wrapped)
    for rows in (1, 3):
        pixels = images = _noise(rows, wrapped)
        if card.entry == "photos":
            photos = _photos(rows, wrapped)
            images = torch.from_numpy(photos)
            pixels = wrapped.pixels(np.stack([card.transform.read(photo).pixels for photo in photos]))
        with torch.inference_mode():
            outputs = {name: value.numpy() for name, value in loaded(images).items()}
            found.compare(wrapped.trunk(pixels), outputs, limit=LOOSE if card.entry == "photos" else TOLERANCE)
    return found.within_tolerance()


def _questions(card: Card, rows: int) -> Iterator[Question]:
    yield {}
    masks = (torch.rand(rows, 4, *card.grid, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    masks.flatten(2)[..., 0] = 1
    yield {"masks": masks}
    target: Question = {"target": torch.arange(rows) % len(card.classes)} if card.targets else {}
    if target:
        yield target
    for cells in sorted({1, 2, card.cells // 2, card.cells}) if card.sizes else ():
        size = torch.full((rows,), cells)
        size[-1] = 1 + cells % card.cells  # sizes differ within a batch
        yield target | {"size": size}


class _Misses:
    """The largest miss of each output so far."""

    def __init__(self, wrapped: ExplainableClassifier) -> None:
        self.wrapped = wrapped
        self.exact = copy.deepcopy(wrapped.attention).double()
        self.worst: dict[str, float] = {}
        self.limits: dict[str, float] = {}

    def compare(
        self, features: Tensor, outputs: Outputs, question: Question | None = None, *, limit: float = TOLERANCE
    ) -> None:
        """Compare what the graph gives for features with what the module gives."""
        question = question or {}
        own = _selection(self.wrapped.attention, features, question)
        exact = _selection(self.exact, features.double(), question)
        got = {name: torch.from_numpy(np.array(value)) for name, value in outputs.items()}
        # The graph may differ by as much as single precision is noise to the module itself (class-aware scores of
        # cells that are all alike): a few times the module's distance from itself in double precision, also for
        # features that differ by rounding, since a single map may happen to be rounded right.
        draws = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
        nudged = _selection(self.wrapped.attention, features * (1 + torch.finfo(features.dtype).eps * draws), question)
        noise = {
            name: 4 * torch.maximum(*(_distance(getattr(one, name), getattr(exact, name)) for one in (own, nudged)))
            for name in ("unbounded", "scores", "soft")
        }
        for name, slack in noise.items():
            scale = (own.soft if name == "soft" else own.unbounded).abs().amax(dim=grid_of(own.soft, 1), keepdim=True)
            miss = (_distance(got[name], getattr(own, name)) - slack) / scale.clamp(min=1e-6)
            self.note(name, float(miss.clamp(min=0).nan_to_num(torch.inf).max()), limit)
        # A cell within rounding of the bound may fall on either side of it. Every other cell must be where the module
        # has it, and the logits must be those of the cells that the graph says it selected.
        bound = own.unbounded.where(own.hard > 0, torch.inf).flatten(1).amin(-1).reshape(-1, *[1] * (own.hard.ndim - 1))
        if "size" not in question:
            bound = bound.clamp(max=0)
        margin = limit * own.unbounded.abs().amax(dim=grid_of(own.unbounded, 1), keepdim=True) + noise["unbounded"]
        wrong = (got["selected"] != (own.hard > 0)) & ((own.unbounded - bound).abs() > margin)
        self.note("selected", wrong.sum().item(), 0.0)
        self.note("logits", self._miss(got["logits"], features, got["selected"]), limit)
        whole = from_all(self.wrapped.head, features)
        self.note("classifier_logits", self._off(got["classifier_logits"], whole), limit)
        for index, mask in enumerate(question["masks"].unbind(1) if "masks" in question else ()):
            self.note("answers", self._miss(got["answers"][:, index], features, mask), limit)

    def within_tolerance(self) -> Mapping[str, float]:
        """The misses, if none exceeds its limit."""
        bad = [name for name, miss in self.worst.items() if not miss <= self.limits[name]]
        if bad:
            figures = ", ".join(f"{name} by {self.worst[name]:.3g} (at most {self.limits[name]:g})" for name in bad)
            raise ExportError(
                f"{self.wrapped.name}: expected a graph that says what the module says, got one that misses {figures}; "
                "it was not written"
            )
        return self.worst

    def _miss(self, logits: Tensor, features: Tensor, selected: Tensor) -> float:
        """How far logits lie from those that the head gives for these cells."""
        weights = selected.float()
        if not self.wrapped.attention.gate:
            weights = weights / weights.sum(dim=grid_of(weights, 1), keepdim=True)
        return self._off(logits, self.wrapped.classify(features, weights))

    def _off(self, logits: Tensor, own: Tensor) -> float:
        return float((logits.double() - own.double()).abs().max() / own.abs().max().clamp(min=1e-6))

    def note(self, output: str, miss: float, limit: float) -> None:
        """Keep the largest miss of an output, and its limit."""
        worst = self.worst.get(output, 0.0)
        self.worst[output] = worst if miss <= worst else miss  # a NaN is no small miss
        self.limits[output] = limit


def _distance(got: Tensor, own: Tensor) -> Tensor:
    """The largest difference in each map, (B, 1, 1)."""
    return (got.double() - own.double()).abs().amax(dim=grid_of(own, 1), keepdim=True)


def _selection(attention: Attention, features: Tensor, question: Question) -> Selection:
    selection: Selection = attention(features, target=question.get("target"))
    return attention.weigh(selection.unbounded, question["size"][:, None]) if "size" in question else selection


def maps_to_check(wrapped: ExplainableClassifier, pixels: Tensor) -> Iterator[Tensor]:
    """Feature maps (B, C, H, W): the trunk's own and noise, tied cells, all cells clipped, none clipped."""
    generator = torch.Generator().manual_seed(0)
    own = wrapped.trunk(pixels)
    noise = own.std() * torch.randn(own.shape, generator=generator) + own.mean()
    yield torch.cat([own, noise])
    cells = own.flatten(2)
    alike = cells[:, :, :1].expand_as(cells).reshape(own.shape)
    pairs = cells[:, :, torch.arange(cells.shape[-1]) // 2 * 2].reshape(own.shape)
    yield torch.cat([alike, pairs])
    # Search for cells on either side of the bound at growing distances, then fill a map with them.
    for clipped in (True, False):
        for scale in (1.0, 4.0, 16.0, 64.0):
            drawn = own.mean() + scale * own.std() * torch.randn(own.shape, generator=generator)
            drawn = torch.cat([own * scale, drawn, -own * scale])
            fitting = (wrapped.attention(drawn).unbounded >= 0) == clipped
            vectors = drawn.movedim(1, -1)[fitting]
            if not len(vectors):
                continue
            chosen = torch.randint(len(vectors), (2 * cells.shape[-1],), generator=generator)
            maps = vectors[chosen].reshape(2, *own.shape[2:], -1).movedim(-1, 1).contiguous()
            if ((wrapped.attention(maps).unbounded >= 0) == clipped).all():
                yield maps
                break


def _noise(rows: int, wrapped: ExplainableClassifier) -> Tensor:
    return torch.randn(rows, *wrapped.transform.shape, generator=torch.Generator().manual_seed(2))


def _photos(rows: int, wrapped: ExplainableClassifier) -> npt.NDArray[np.uint8]:
    """Coarse and fine structure, at one and a half times the input's height, as photos have it."""
    height, width = wrapped.transform.size
    generator, size = torch.Generator().manual_seed(0), (height * 3 // 2, width * 2)
    photos = torch.full((rows, 3, *size), 128.0)
    for cells in (4, 16, 64):
        waves = 30 * torch.randn(rows, 3, cells, cells, generator=generator)
        photos += torch.nn.functional.interpolate(waves, size, mode="bicubic")
    return photos.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _part(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> Callable[..., Outputs]:
    """The part of a graph between some of its tensors, as a function."""
    import onnx

    part = onnx.utils.Extractor(model).extract_model([*inputs], [*outputs])
    run = session(part.SerializeToString()).run
    return lambda **feeds: dict(zip(outputs, run([*outputs], feeds), strict=True))
