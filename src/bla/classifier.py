"""Any classifier split as trunk | attention | head. Layouts are normalised here and only here."""

from __future__ import annotations

import copy
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from bla.attention import Attention, BoundedLogitAttention, Selection, signed, weighted_sum
from bla.explanation import Explanation, Prediction, Unexplained
from bla.photo import DataError, Photo, Transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SELF_CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far uniform weights may miss the classifier's logits at wrap time, of the largest logit; half precision: 2e-2."""

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class ClassifierError(ValueError):
    """A classifier that cannot be split, or is used before it can explain."""


class ExplainableClassifier(nn.Module):
    """A classifier whose prediction is made from a selected subset of its feature map alone.

    ``logits = head(sum_n g_n trunk(pixels)_n)`` with g the hard selection in evaluation mode and the soft one in
    training mode. Made by :func:`explainable`; trained by :func:`bla.fit`, or in any loop of your own (then set
    ``fitted = True``). The trunk is frozen and stays in evaluation mode; so does the head while ``frozen_head``.

    Attributes
    ----------
    trunk: pixels (B, 3, h, w) to features (B, C, H, W), whatever the classifier's own layout.
    attention: the trainable module.
    head: pooled features (B, C) to logits (B, K).
    transform, classes, name, setup: preprocessing, class names, and what explanations are signed with.
    """

    def __init__(
        self,
        trunk: nn.Module,
        attention: Attention,
        head: nn.Module,
        *,
        transform: Transform,
        classes: Sequence[str],
        name: str,
        setup: str = "BLA",
        frozen_head: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(head, TimmHead) and not frozen_head:
            raise ClassifierError(
                f"{name}: expected a head of its own to train, got one that shares the trunk's module"
            )
        self.trunk = trunk.eval()
        self.attention = attention
        self.head = head.requires_grad_(not frozen_head)
        self.trunk.requires_grad_(False)
        self.transform = transform
        self.classes = tuple(classes)
        self.name = name
        self.setup = setup
        self.frozen_head = frozen_head
        self.register_buffer("_fitted", torch.tensor(False))
        self.train(False)

    @property
    def fitted(self) -> bool:
        """Whether the attention has been trained; part of the state dict."""
        return bool(self._fitted)

    @fitted.setter
    def fitted(self, value: bool) -> None:
        cast(Tensor, self._fitted).fill_(value)

    def train(self, mode: bool = True) -> ExplainableClassifier:
        """Set the mode of the attention, and of a head that is being trained; what is frozen stays in evaluation."""
        super().train(mode)
        self.trunk.eval()
        if self.frozen_head:
            self.head.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of normalised pixels (B, 3, h, w)."""
        features = self.trunk(pixels)
        selection = self.attention(features)
        return self.classify(features, selection.soft if self.training else selection.hard)

    def pixels(self, photos: npt.NDArray[np.uint8]) -> Tensor:
        """Normalised pixels (B, 3, h, w), channels last, of photos' pixels (B, h, w, 3), where the weights are."""
        like = next(self.attention.parameters())
        mean, std = (
            like.new_tensor(values, dtype=torch.float32) for values in (self.transform.mean, self.transform.std)
        )
        values = torch.from_numpy(photos).to(like.device).float()
        return ((values - 255 * mean) / (255 * std)).permute(0, 3, 1, 2).to(like.dtype)

    def classify(self, features: Tensor, weights: Tensor) -> Tensor:
        """Logits (B, K) that the head gives for features (B, C, H, W) under weights (B, H, W)."""
        logits: Tensor = self.head(weighted_sum(features, weights))
        return logits

    def select(self, pixels: Tensor, *, size: int | None = None) -> Selection:
        """The selection for normalised pixels (B, 3, h, w); with ``size`` exactly that many cells."""
        selection: Selection = self.attention(self.trunk(pixels), size=size)
        return selection

    def explain(
        self, images: ImageLike | Sequence[ImageLike], *, size: int | None = None, batch_size: int = 16
    ) -> list[Explanation]:
        """Explain photos: paths, PIL images, arrays or tensors, one or many.

        An array is a photo, uint8 (h, w, 3). A tensor of uint8 is a photo (3, h, w) or (h, w, 3); a tensor of
        floats is normalised pixels as :meth:`select` takes them, (3, h, w) or a batch. ``size`` asks for exactly
        that many cells.

        Raises
        ------
        ClassifierError
            If the attention was never trained.
        DataError
            If a photo cannot be read, naming it. :meth:`explain_each` goes on instead.
        """
        found = list(self.explain_each(images, size=size, batch_size=batch_size))
        for result in found:
            if isinstance(result, Unexplained):
                raise DataError(result.error)
        return cast("list[Explanation]", found)

    def explain_each(
        self, images: ImageLike | Iterable[ImageLike], *, size: int | None = None, batch_size: int = 16
    ) -> Iterator[Explanation | Unexplained]:
        """As :meth:`explain`, one by one in order, with an :class:`Unexplained` for a photo that cannot be read."""
        if not self.fitted:
            raise ClassifierError(
                f"expected a trained attention, got {self.name} with one that was never fitted: "
                "call bla.fit(wrapped, images) first"
            )
        if size is not None and size < 1:
            raise ClassifierError(f"expected a size of at least 1, got {size}")
        if batch_size < 1:
            raise ClassifierError(f"expected a batch_size of at least 1, got {batch_size}")
        if self.training:
            raise ClassifierError("expected evaluation mode, got training mode: call .eval() before .explain()")
        yield from self._explain_each(images, size, batch_size)

    @torch.inference_mode()
    def _explain_each(
        self, images: ImageLike | Iterable[ImageLike], size: int | None, batch_size: int
    ) -> Iterator[Explanation | Unexplained]:
        with ThreadPoolExecutor(2) as pool:
            loaded = prefetch(pool, self._load, enumerate(_each(images)), ahead=2 * batch_size)
            for batch in _batched(loaded, batch_size):
                yield from self._explain_batch(batch, size)

    def _load(self, item: tuple[int, ImageLike]) -> tuple[str, Photo | Tensor | str]:
        """A name and what was read: a photo, normalised pixels, or why neither."""
        index, image = item
        name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"
        if isinstance(image, Tensor) and image.is_floating_point():
            height, width = self.transform.size
            if image.shape != (3, height, width):
                return name, f"{name}: expected normalised pixels (3, {height}, {width}), got {tuple(image.shape)}"
            return name, image
        if isinstance(image, Tensor):
            array = image.cpu().numpy()
            image = array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] == 3 else array
        try:
            return name, self.transform.read(image)
        except DataError as error:
            return name, str(error) if isinstance(image, (str, os.PathLike)) else f"{name}: {error}"

    def _explain_batch(
        self, batch: Sequence[tuple[str, Photo | Tensor | str]], size: int | None
    ) -> Iterator[Explanation | Unexplained]:
        readable = [item for _, item in batch if not isinstance(item, str)]
        rows: Iterator[tuple[Any, ...]] = iter(())
        if readable:
            like = next(self.attention.parameters())
            pixels = torch.cat(
                [
                    item[None].to(like) if isinstance(item, Tensor) else self.pixels(item.pixels[None])
                    for item in readable
                ]
            )
            features = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
            cells = features.shape[2] * features.shape[3]
            if size is not None and size > cells:
                raise ClassifierError(f"expected a size from 1 to {cells}, the cells of {self.name}, got {size}")
            selection = self.attention(features, size=size)
            probabilities = self.classify(features, selection.hard).float().softmax(-1)
            best = probabilities.topk(min(5, probabilities.shape[-1]))
            maps = [values.float().cpu().numpy() for values in selection]
            rows = zip(best.values.tolist(), best.indices.tolist(), *maps, strict=True)
        for name, item in batch:
            if isinstance(item, str):
                yield Unexplained(name, item)
                continue
            values, indices, unbounded, scores, soft, hard = next(rows)
            if not (np.isfinite(unbounded).all() and np.isfinite(values).all()):
                yield Unexplained(name, f"{name}: expected finite features, got NaN or infinity from {self.name}")
                continue
            height, width = self.transform.size
            yield Explanation(
                image=name,
                prediction=self._prediction(indices[0], values[0]),
                top=tuple(map(self._prediction, indices, values)),
                method="BLA" if isinstance(self.attention, BoundedLogitAttention) else "L2X",
                grid=(hard.shape[0], hard.shape[1]),
                unbounded=unbounded,
                scores=scores,
                soft=soft,
                selected=hard > 0,
                region=(0, 0, width, height) if isinstance(item, Tensor) else item.region,
                model=self.name,
                setup=self.setup,
            )

    def _prediction(self, index: int, probability: float) -> Prediction:
        return Prediction(index, self.classes[index], min(probability, 1.0))


@torch.inference_mode(False)  # what is made here can be trained, wherever it is called
def explainable(
    model: nn.Module,
    *,
    attention: Attention | None = None,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> ExplainableClassifier:
    """Wrap a classifier: split it before its global average pooling and put an attention there.

    The classifier is copied, never edited; hooks of yours stay with the original (torch's own, as for weight
    normalisation, are part of the copy). Layer, grid and preprocessing are found: by timm's
    ``forward_features`` / ``forward_head``, or, for torchvision's models and any traceable module, at the last
    operation that averages a map over its grid. The split is checked on random input before it is returned:
    uniform weights give the classifier's own logits, and moving the weight to one cell changes them.

    Parameters
    ----------
    model: takes pixels (B, 3, h, w), returns logits (B, K).
    attention: the module to insert; by default ``BoundedLogitAttention(C)``.
    transform: the preprocessing; by default timm's for the model, else ImageNet's at 224 x 224
        (``transform.source`` then says "assumed"). The whole photo is squashed to the input size.
    classes: K names; by default ImageNet's for 1,000 classes, else "class 0", ...

    Raises
    ------
    ClassifierError
        Naming the classifier and what about it cannot be split.

    Examples
    --------
    >>> stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=16), nn.ReLU())
    >>> net = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> wrapped = explainable(net, classes=["cat", "dog"])
    >>> wrapped(torch.rand(4, 3, 224, 224)).shape, wrapped.select(torch.rand(4, 3, 224, 224)).hard.shape
    (torch.Size([4, 2]), torch.Size([4, 14, 14]))
    """
    if not isinstance(model, nn.Module) or isinstance(model, ExplainableClassifier):
        raise ClassifierError(f"expected a classifier, a torch.nn.Module not wrapped yet, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    name = name or _name_of(model)
    transform = transform or transform_of(model)
    try:
        own = copy.deepcopy(model)
    except Exception as error:
        raise ClassifierError(f"{name}: expected a module that can be copied, got {error}") from error
    _drop_hooks(own)
    own = own.eval().requires_grad_(False)
    trunk, head, channels, outputs = _checked_split(own, transform, name)
    if classes is None:
        classes = imagenet_classes() if outputs == 1000 else [f"class {index}" for index in range(outputs)]
    if len(classes) != outputs:
        raise ClassifierError(f"{name}: expected {outputs} class names, as many as logits, got {len(classes)}")
    if attention is None:
        like = next((parameter for parameter in own.parameters()), torch.empty(0))
        attention = BoundedLogitAttention(channels).to(like.device, like.dtype)
    elif attention.in_channels != channels:
        raise ClassifierError(
            f"{name}: expected an attention for {channels} channels, got one for {attention.in_channels}"
        )
    setup = "L2X-F"
    if isinstance(attention, BoundedLogitAttention):
        setup = signed("BLA-PH", attention.threshold, "auto")
    return ExplainableClassifier(trunk, attention, head, transform=transform, classes=classes, name=name, setup=setup)


def transform_of(model: nn.Module) -> Transform:
    """The preprocessing that a classifier was trained with, where it says so; ImageNet's at 224 x 224 otherwise.

    A classifier of yours says so by an attribute ``transform`` that holds a :class:`bla.photo.Transform`.
    """
    own = getattr(model, "transform", None)
    if isinstance(own, Transform):
        return own
    if _speaks_timm(model):
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        return Transform(
            size=tuple(config["input_size"][1:]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_fraction=config["crop_pct"],
            source="timm",
        )
    return Transform(size=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear", source="assumed")


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1,000 classes: the first synonym, with the synset where two share it."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = [info.index_to_description(index).split(",")[0] for index in range(1000)]
    # two are cranes, and two are maillots
    return [
        name if names.count(name) == 1 else f"{name} ({info.index_to_label_name(index)})"
        for index, name in enumerate(names)
    ]


def prefetch(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Results of ``function`` in order, computed at most ``ahead`` items before they are asked for."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class TimmTrunk(nn.Module):
    """A timm classifier's unpooled features, as (B, C, H, W)."""

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to features (B, C, H, W)."""
        features: Tensor = self.model.forward_features(pixels)  # type: ignore[operator]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


class TimmHead(nn.Module):
    """What follows a timm classifier's pooling, whatever it is, for one pooled vector.

    The vector is handed over as a map of one cell, on which the pooling is the identity.
    """

    def __init__(self, model: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.model = model
        self.channels_last = channels_last

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, C) to logits (B, K)."""
        one_cell = pooled[:, None, None, :] if self.channels_last else pooled[:, :, None, None]
        logits: Tensor = self.model.forward_head(one_cell)  # type: ignore[operator]
        return logits


class TracedTrunk(nn.Module):
    """The part of a traced classifier up to the map that is averaged, as (B, C, H, W)."""

    def __init__(self, graph: fx.GraphModule, channels_last: bool) -> None:
        super().__init__()
        self.graph = graph
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to features (B, C, H, W)."""
        features: Tensor = self.graph(pixels)
        return features.permute(0, 3, 1, 2) if self.channels_last else features


class TracedHead(nn.Module):
    """The part of a traced classifier after its average, for one pooled vector."""

    def __init__(self, graph: fx.GraphModule, pooled_shape: Sequence[int]) -> None:
        super().__init__()
        self.graph = graph
        self.pooled_shape = tuple(pooled_shape)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, C) to logits (B, K)."""
        logits: Tensor = self.graph(pooled.reshape(-1, *self.pooled_shape))
        return logits


def _drop_hooks(own: nn.Module) -> None:
    """Hooks that observe the original are not for the copy to call; torch's own ones compute weights."""
    for module in own.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.")]:
                del hooks[key]


def _checked_split(own: nn.Module, transform: Transform, name: str) -> tuple[nn.Module, nn.Module, int, int]:
    """Trunk, head, channels and classes of our copy, after the self-check."""
    like = next((parameter for parameter in own.parameters()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, *transform.size, generator=generator).to(like)
    with torch.inference_mode():
        try:
            logits = own(pixels)
        except Exception as error:
            raise ClassifierError(
                f"{name}: expected a classifier of pixels {tuple(pixels.shape)}, got {type(error).__name__}: {error}; "
                "pass the transform= that it was trained with"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ClassifierError(f"{name}: expected logits of shape (batch, classes), got {came}")
        split = _split_timm if _speaks_timm(own) else _split_traced
        trunk, head = split(own, pixels, name)
        try:
            features = trunk(pixels)
            cells = features.shape[2] * features.shape[3]
            if cells == 1:
                raise ClassifierError(
                    f"{name}: expected a feature map of several cells, got one of 1x1 at input size "
                    f"{transform.size}: there is nothing to select; use a larger input"
                )
            uniform = features.new_full((2, *features.shape[2:]), 1 / cells)
            same = head(weighted_sum(features, uniform))
            first, last = torch.zeros_like(uniform), torch.zeros_like(uniform)
            first[:, 0, 0] = last[:, -1, -1] = 1
            moved = (head(weighted_sum(features, first)) - head(weighted_sum(features, last))).abs().max()
        except ClassifierError:
            raise
        except Exception as error:
            raise ClassifierError(
                f"{name}: expected a head that reads the average of the last feature map, got one that fails on "
                f"a pooled vector ({type(error).__name__}: {error}); it needs a new head"
            ) from error
    miss = (same - logits).abs().max() / logits.abs().max().clamp(min=1e-12)
    tolerance = SELF_CHECK_TOLERANCE.get(logits.dtype, 2e-2)
    if not miss <= tolerance:
        raise ClassifierError(
            f"{name}: expected a head that reads the average of the last feature map, got one whose logits differ "
            f"by {miss.item():.1e} of the largest when the average is put in its place; it needs a new head"
        )
    if not moved > 0:
        raise ClassifierError(
            f"{name}: expected logits that depend on the cells of the feature map, got the same from any cell "
            "(a class token that pools by itself, or a head that is all zero); it needs a new or a trained head"
        )
    return trunk, head, features.shape[1], logits.shape[1]


def _speaks_timm(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_features", "pretrained_cfg"))


def _split_timm(own: nn.Module, pixels: Tensor, name: str) -> tuple[nn.Module, nn.Module]:
    features = own.forward_features(pixels)  # type: ignore[operator]
    if not isinstance(features, Tensor) or features.ndim != 4:
        came = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ClassifierError(f"{name}: expected a feature map (batch, channels, height, width), got {came}")
    channels_last = getattr(own, "output_fmt", "NCHW") == "NHWC"
    return TimmTrunk(own, channels_last), TimmHead(own, channels_last)


def _split_traced(own: nn.Module, pixels: Tensor, name: str) -> tuple[nn.Module, nn.Module]:
    """Cut the traced graph at the last operation that takes a map (B, C, H, W) to (B, C) or (B, C, 1, 1)."""
    try:
        traced = fx.symbolic_trace(own)
        ShapeProp(traced).propagate(pixels)
    except Exception as error:
        raise ClassifierError(
            f"{name}: expected a timm or torchvision classifier or a module that torch.fx can trace, got "
            f"{type(error).__name__}: {error}"
        ) from error
    for node in reversed(traced.graph.nodes):
        sources = node.all_input_nodes
        before, after = _shape(sources[0]) if len(sources) == 1 else (), _shape(node)
        lengths = [length for length in after[1:] if length != 1]
        if len(before) != 4 or len(lengths) != 1 or lengths[0] not in (before[1], before[3]):
            continue
        if before[1] * before[2] * before[3] == lengths[0]:  # a flattening of one cell, after the average
            continue
        channels_last = lengths[0] != before[1]
        trunk = TracedTrunk(_graph_until(traced, sources[0]), channels_last)
        return trunk, TracedHead(_graph_after(traced, node, name), after[1:])
    raise ClassifierError(
        f"{name}: expected an average over a feature map of several cells before the head, found none at input size "
        f"{tuple(pixels.shape[2:])} (VGG and AlexNet flatten the map instead; a small input leaves one cell); "
        "it needs a new head or a larger input"
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _graph_until(traced: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node is last:
            break
    graph.output(copies[last])
    part = fx.GraphModule(traced, graph)
    part.graph.eliminate_dead_code()  # what served the head alone
    part.recompile()
    return part


def _graph_after(traced: fx.GraphModule, pool: fx.Node, name: str) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {pool: graph.placeholder("pooled")}
    nodes = list(traced.graph.nodes)
    for node in nodes[nodes.index(pool) + 1 :]:
        missing = [source for source in node.all_input_nodes if source not in copies]
        if node.op != "get_attr" and missing:
            raise ClassifierError(
                f"{name}: expected a head that reads the average of one feature map alone, got one that also reads "
                f"{', '.join(source.name for source in missing)}; it needs a new head"
            )
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(traced, graph)


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    return (config or {}).get("architecture") or type(model).__name__


def _each(images: ImageLike | Iterable[ImageLike]) -> Iterator[ImageLike]:
    if isinstance(images, (str, os.PathLike, Image.Image)):
        yield images
    elif isinstance(images, (Tensor, np.ndarray)):
        yield from images if images.ndim == 4 else [images]
    else:
        yield from images


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
