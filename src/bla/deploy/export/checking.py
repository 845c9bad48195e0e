"""The graph against the module: random, tied and all-clipped maps, every size, other subsets, other targets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bla import BlaError
from bla.deploy.engine import Card
from bla.deploy.export.graph import FEATURES, OUTPUTS
from bla.model.attention import Selection
from bla.model.classifier import ExplainableClassifier

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-4
"""How far an output may miss the module's, of that output's largest value; both are float32."""
PHOTO_TOLERANCE = 0.5
"""How far the pixels that the graph makes of a photo may lie from Pillow's, on average, in levels of 255."""

Outputs = dict[str, npt.NDArray[Any]]


class ExportError(BlaError):
    """An explainer that cannot be exported, or whose graph does not say what the module says."""


def check_onnx(wrapped: ExplainableClassifier, model: onnx.ModelProto, card: Card) -> Mapping[str, float]:
    """The largest miss of each output, over whole images and over maps put in place of the trunk's.

    Raises
    ------
    ExportError
        With the figures, if a miss exceeds its tolerance.
    """
    found = _Misses(wrapped)
    pixels = _noise(3, wrapped)
    photos = _photos(3, wrapped)
    images = pixels.numpy() if card.entry == "pixels" else photos
    with torch.inference_mode():
        if card.entry == "photos":
            prepared = _session(model, shown=["pixels"])(photos=photos)["pixels"]
            found.photos(prepared, photos, card)
            pixels = torch.from_numpy(prepared)
        run = _session(model)
        found.compare(wrapped.trunk(pixels), run(**{card.entry: images}))
        tail = _session(_fed_with_features(model))
        for features in _maps(wrapped, pixels):
            rows = len(features)
            feeds: Outputs = {
                card.entry: images[:1].repeat(rows, axis=0),
                FEATURES: features.numpy(),
            }
            found.compare(features, tail(**feeds))
            masks = torch.rand(rows, 4, *card.grid, generator=torch.Generator().manual_seed(1)) < 0.3
            masks[:, :, 0, 0] = True
            found.compare(features, tail(**feeds, masks=masks.float().numpy()), masks=masks)
            targets = torch.arange(rows) % len(card.classes) if card.targets else None
            if targets is not None:
                found.compare(features, tail(**feeds, target=targets.numpy()), targets=targets)
            if card.sizes:
                for size in sorted({1, 2, card.cells // 2, card.cells}):
                    sizes = torch.full((rows,), size)
                    sizes[-1] = 1 + size % card.cells  # a size each
                    asked = feeds if targets is None else feeds | {"target": targets.numpy()}
                    found.compare(features, tail(**asked, size=sizes.numpy()), sizes=sizes, targets=targets)
    return found.within_tolerance()


def check_torch(
    wrapped: ExplainableClassifier, loaded: Callable[[Tensor], Mapping[str, Tensor]], card: Card
) -> Mapping[str, float]:
    """As :func:`check_onnx`, of whole images: a torch file has no other inputs."""
    found = _Misses(wrapped)
    for rows in (1, 3):
        pixels = images = _noise(rows, wrapped)
        if card.entry == "photos":
            photos = _photos(rows, wrapped)
            images = torch.from_numpy(photos)
            pixels = wrapped.pixels(np.stack([card.transform.read(photo).pixels for photo in photos]))
        with torch.inference_mode():
            outputs = {name: value.numpy() for name, value in loaded(images).items()}
            found.compare(wrapped.trunk(pixels), outputs, loose=card.entry == "photos")
    return found.within_tolerance()


class _Misses:
    """The largest miss of each output so far."""

    def __init__(self, wrapped: ExplainableClassifier) -> None:
        self.name = wrapped.name
        self.wrapped = wrapped
        self.exact = copy.deepcopy(wrapped.attention).double()
        self.worst: dict[str, float] = {}
        self.limits: dict[str, float] = {}

    def compare(
        self,
        features: Tensor,
        outputs: Outputs,
        *,
        sizes: Tensor | None = None,
        masks: Tensor | None = None,
        targets: Tensor | None = None,
        loose: bool = False,
    ) -> None:
        wrapped = self.wrapped
        own = _selected(wrapped.attention, features, sizes, targets)
        exact = _selected(self.exact, features.double(), sizes, targets)
        got = {name: torch.from_numpy(np.array(value)) for name, value in outputs.items()}
        limit = 0.05 if loose else TOLERANCE
        # Where single precision is noise to the module itself (class-aware scores of cells that are all alike), the
        # graph may differ by as much: a few times what the module in double precision says otherwise, or the module
        # of features that differ by rounding, as a single map may be rounded right by luck.
        draws = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
        rounding = torch.finfo(features.dtype).eps * draws
        nudged = _selected(wrapped.attention, features * (1 + rounding), sizes, targets)
        noise = {
            name: 4 * torch.maximum(*(_worst(getattr(one, name), getattr(exact, name)) for one in (own, nudged)))
            for name in ("unbounded", "scores", "soft")
        }
        for name, slack in noise.items():
            largest = _worst(own.soft if name == "soft" else own.unbounded, torch.zeros(1, 1, 1)).clamp(min=1e-6)
            miss = ((_worst(got[name], getattr(own, name)) - slack) / largest).clamp(min=0).nan_to_num(torch.inf)
            self._note(name, float(miss.max()), limit)
        # A cell as near to the bound as rounding is may fall on either side of it: any other must be as the module has
        # it, and the logits those of the cells that the graph says it selected.
        bound = own.unbounded.where(own.hard > 0, torch.inf).flatten(1).amin(-1)[:, None, None]
        if sizes is None:
            bound = bound.clamp(max=0)
        margin = limit * own.unbounded.abs().amax(dim=(1, 2), keepdim=True) + noise["unbounded"]
        wrong = (got["selected"] != (own.hard > 0)) & ((own.unbounded - bound).abs() > margin)
        self._note("selected", wrong.sum().item(), 0.0)
        weights = _weights(wrapped, got["selected"])
        self._note("logits", _miss(got["logits"], wrapped.classify(features, weights)), limit)
        if masks is not None:
            for index in range(masks.shape[1]):
                reference = wrapped.classify(features, _weights(wrapped, masks[:, index]))
                self._note("answers", _miss(got["answers"][:, index], reference), limit)

    def photos(self, prepared: npt.NDArray[np.float32], photos: npt.NDArray[np.uint8], card: Card) -> None:
        own = np.stack([card.transform.read(photo).pixels for photo in photos]).astype(np.float64)
        std, mean = (np.array(values)[:, None, None] for values in (card.transform.std, card.transform.mean))
        levels = ((prepared * std + mean) * 255).transpose(0, 2, 3, 1)
        self._note("photos", float(np.abs(levels - own).mean()), PHOTO_TOLERANCE)

    def within_tolerance(self) -> Mapping[str, float]:
        bad = [name for name, miss in self.worst.items() if not miss <= self.limits[name]]
        if bad:
            figures = ", ".join(f"{name} by {self.worst[name]:.3g} (at most {self.limits[name]:g})" for name in bad)
            raise ExportError(
                f"{self.name}: expected a graph that says what the module says, got one that misses {figures}; "
                "it was not written"
            )
        return self.worst

    def _note(self, output: str, miss: float, limit: float) -> None:
        # a NaN must not pass for a small one
        self.worst[output] = miss if not miss <= self.worst.get(output, 0.0) else self.worst.get(output, 0.0)
        self.limits[output] = limit


def _miss(got: Tensor, own: Tensor) -> float:
    return float((got.double() - own.double()).abs().max() / own.abs().max().clamp(min=1e-6))


def _worst(got: Tensor, own: Tensor) -> Tensor:
    """The largest difference in each map, (B, 1, 1)."""
    return (got.double() - own.double()).abs().amax(dim=(1, 2), keepdim=True)


def _weights(wrapped: ExplainableClassifier, selected: Tensor) -> Tensor:
    chosen = selected.float()
    return chosen if getattr(wrapped.attention, "gate", False) else chosen / chosen.sum(dim=(1, 2), keepdim=True)


def _selected(
    attention: Callable[..., Selection], features: Tensor, sizes: Tensor | None, targets: Tensor | None
) -> Selection:
    asked = {} if targets is None else {"target": targets}
    if sizes is None:
        return attention(features, **asked)
    rows = []
    for row, size in enumerate(sizes):
        only = slice(row, row + 1)
        rows.append(attention(features[only], size=int(size), **{key: value[only] for key, value in asked.items()}))
    return Selection(*(torch.cat(maps) for maps in zip(*rows, strict=True)))


def _maps(wrapped: ExplainableClassifier, pixels: Tensor) -> Iterator[Tensor]:
    """Feature maps (B, C, H, W): the trunk's own and noise, tied cells, all cells clipped, none clipped."""
    generator = torch.Generator().manual_seed(0)
    own = wrapped.trunk(pixels)
    noise = own.std() * torch.randn(own.shape, generator=generator) + own.mean()
    yield torch.cat([own, noise])
    cells = own.flatten(2)
    alike = cells[:, :, :1].expand_as(cells).reshape(own.shape)
    pairs = cells[:, :, torch.arange(cells.shape[-1]) // 2 * 2].reshape(own.shape)
    yield torch.cat([alike, pairs])
    # Cells on either side of the bound are searched for at growing distances, then repeated over a map of their own.
    for clipped in (True, False):
        for scale in (1.0, 4.0, 16.0, 64.0):
            drawn = own.mean() + scale * own.std() * torch.randn(own.shape, generator=generator)
            drawn = torch.cat([own * scale, drawn, -own * scale])
            fitting = (wrapped.attention(drawn).unbounded >= 0) == clipped
            vectors = drawn.permute(0, 2, 3, 1)[fitting]
            if not len(vectors):
                continue
            chosen = torch.randint(len(vectors), (2 * cells.shape[-1],), generator=generator)
            maps = vectors[chosen].reshape(2, *own.shape[2:], -1).permute(0, 3, 1, 2).contiguous()
            if ((wrapped.attention(maps).unbounded >= 0) == clipped).all():
                yield maps
                break


def _noise(rows: int, wrapped: ExplainableClassifier) -> Tensor:
    return torch.randn(rows, 3, *wrapped.transform.size, generator=torch.Generator().manual_seed(2))


def _photos(rows: int, wrapped: ExplainableClassifier) -> npt.NDArray[np.uint8]:
    """Waves of many lengths and some noise, at one and a half times the input's height: a photo's mixture."""
    height, width = (wrapped.transform.size[0] * 3 // 2, wrapped.transform.size[1] * 2)
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    photos = random.normal(0, 8, (rows, height, width, 3))
    for length in (5, 20, 80, 300):
        angle, phase = random.uniform(0, 2 * np.pi, (2, rows, 3))
        photos += 25 * np.sin(
            2 * np.pi / length * (np.multiply.outer(y, np.cos(angle)) + np.multiply.outer(x, np.sin(angle))) + phase
        ).transpose(2, 0, 1, 3)
    return np.clip(photos + 128, 0, 255).astype(np.uint8)


def _session(model: onnx.ModelProto, shown: list[str] | None = None) -> Callable[..., Outputs]:
    import onnx
    import onnxruntime

    if shown is not None:
        model = _copied(model)
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in shown)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = shown or list(OUTPUTS)

    def run(**feeds: npt.NDArray[Any]) -> Outputs:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def _fed_with_features(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph, with the trunk's map as a further input: what follows it reads that one."""
    import onnx

    model = _copied(model)
    for node in model.graph.node:
        node.output[:] = [f"{name}/of the trunk" if name == FEATURES else name for name in node.output]
    kept = [value for value in model.graph.value_info if value.name != FEATURES]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    shape = ["batch", None, None, None]
    model.graph.input.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, shape))
    return model


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    other = onnx.ModelProto()
    other.CopyFrom(model)
    return other
