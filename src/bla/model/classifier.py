"""Any classifier split as trunk | attention | head. Layouts are normalised here and only here."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from bla.data.photo import DataError, Interpolation, Photo, Transform
from bla.data.prefetching import prefetch
from bla.explanations.explanation import Explanation, Prediction, Unexplained, Votes
from bla.model.attention import (
    Attention,
    BoundedLogitAttention,
    Selection,
    signed,
)
from bla.model.heads import TimmHead, read, shares_trunk
from bla.model.parts import Part
from bla.model.splitting import (
    ClassifierError,
    TimmTrunk,
    checked_split,
    checked_trunk,
    drop_hooks,
    given_head,
    speaks_timm,
)
from bla.model.votes import votes

__all__ = [
    "ClassifierError",
    "ExplainableClassifier",
    "ImageLike",
    "TimmHead",
    "TimmTrunk",
    "explainable",
    "imagenet_classes",
    "prefetch",
    "transform_of",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor

Item = TypeVar("Item")


class _Question(NamedTuple):
    """What an explanation is asked for."""

    size: int | None
    target: int | None
    against: int | None


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
    several_labels: whether an image may have several classes or none: each has a probability of its own.
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
        several_labels: bool = False,
    ) -> None:
        super().__init__()
        if shares_trunk(head) and not frozen_head:
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
        self.several_labels = several_labels
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
        return read(self.head, features, weights)

    def select(self, pixels: Tensor, *, size: int | None = None, target: Tensor | None = None) -> Selection:
        """The selection for normalised pixels (B, 3, h, w); with ``size`` exactly that many cells.

        With a class-aware attention ``target``, class indices (B,), says which classes to explain.
        """
        return self._select(self.trunk(pixels), size, target)

    def _select(self, features: Tensor, size: int | None, target: Tensor | None) -> Selection:
        if target is not None and not self.attention.class_conditional:
            raise ClassifierError(
                f"{self.name}: expected a class-aware explainer to ask about a class, got a class-agnostic one "
                f"({self.setup}): train with class_aware=True, or leave target out"
            )
        selection: Selection = self.attention(features, size=size, target=target)
        return selection

    def explain(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        size: int | None = None,
        target: int | str | None = None,
        against: int | str | None = None,
        batch_size: int = 16,
    ) -> list[Explanation]:
        """Explain photos: paths, PIL images, arrays or tensors, one or many.

        An array is a photo, uint8 (h, w, 3). A tensor of uint8 is a photo (3, h, w) or (h, w, 3); a tensor of
        floats is normalised pixels as :meth:`select` takes them, (3, h, w) or a batch. ``size`` asks for exactly
        that many cells. ``target``, a class by index or name, asks what each selected cell says for that class, and
        ``against`` for it rather than that other one: ``explanation.votes``. A class-aware explainer selects its cells
        for the target, too; by default for the class that it predicts from all cells.

        Raises
        ------
        ClassifierError
            If the attention was never trained, or there is no such target.
        DataError
            If a photo cannot be read, naming it. :meth:`explain_each` goes on instead.
        """
        found = list(self.explain_each(images, size=size, target=target, against=against, batch_size=batch_size))
        for result in found:
            if isinstance(result, Unexplained):
                raise DataError(result.error)
        return cast("list[Explanation]", found)

    def explain_each(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        size: int | None = None,
        target: int | str | None = None,
        against: int | str | None = None,
        batch_size: int = 16,
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
        if against is not None and target is None:
            raise ClassifierError("expected a target, to be held against another class, got none")
        question = _Question(size, self._class_index(target), self._class_index(against))
        if question.target is not None and question.target == question.against:
            raise ClassifierError(f"expected two classes, got {target!r} against itself")
        yield from self._explain_each(images, question, batch_size)

    def _class_index(self, target: int | str | None) -> int | None:
        if target is None:
            return None
        if isinstance(target, str) and target in self.classes:
            return self.classes.index(target)
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(self.classes):
            return target
        raise ClassifierError(
            f"expected a class of {self.name} by name, or by index from 0 to {len(self.classes) - 1}, got {target!r}; "
            f"it knows {list(self.classes[:5])}, ..."
        )

    @torch.inference_mode()
    def _explain_each(
        self, images: ImageLike | Iterable[ImageLike], question: _Question, batch_size: int
    ) -> Iterator[Explanation | Unexplained]:
        with ThreadPoolExecutor(2) as pool:
            loaded = prefetch(pool, self._load, enumerate(_each(images)), ahead=2 * batch_size)
            for batch in _batched(loaded, batch_size):
                yield from self._explain_batch(batch, question)

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
        self, batch: Sequence[tuple[str, Photo | Tensor | str]], question: _Question
    ) -> Iterator[Explanation | Unexplained]:
        size, target = question.size, question.target
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
            targets = self.attention.predicted(features)
            if targets is not None and target is not None:
                targets = torch.full_like(targets, target)
            selection = self._select(features, size, targets)
            logits = self.classify(features, selection.hard).float()
            probabilities = logits.sigmoid() if self.several_labels else logits.softmax(-1)
            shown = max(5, int((logits > 0).sum(dim=1).max())) if self.several_labels else 5
            best = probabilities.topk(min(shown, probabilities.shape[-1]))
            maps = [values.float().cpu().numpy() for values in selection]
            asked = [None] * len(readable) if targets is None else targets.tolist()
            said = self._votes(features, selection.hard, question)
            present = self._present(features, selection.hard, logits)
            rows = zip(asked, said, present, best.values.tolist(), best.indices.tolist(), *maps, strict=True)
        for name, item in batch:
            if isinstance(item, str):
                yield Unexplained(name, item)
                continue
            about, vote, labels, values, indices, unbounded, scores, soft, hard = next(rows)
            if not (np.isfinite(unbounded).all() and np.isfinite(values).all()):
                yield Unexplained(name, f"{name}: expected finite features, got NaN or infinity from {self.name}")
                continue
            height, width = self.transform.size
            yield Explanation(
                image=name,
                prediction=self._prediction(indices[0], values[0]),
                top=tuple(map(self._prediction, indices, values)),
                method=self.attention.method,
                grid=hard.shape,
                unbounded=unbounded,
                scores=scores,
                soft=soft,
                selected=hard > 0,
                region=(0, 0, width, height) if isinstance(item, Tensor) else item.region,
                target=about,
                model=self.name,
                setup=self.setup,
                votes=vote,
                present=labels,
            )

    def _votes(self, features: Tensor, weights: Tensor, question: _Question) -> list[Votes | None]:
        """For each image what its cells say about the class in question."""
        target, against = question.target, question.against
        if target is None:
            return [None] * len(features)
        asked = [index for index in (target, against) if index is not None]
        indices = [torch.full((len(features),), index, device=features.device) for index in asked]
        found = votes(self.head, features, weights, *indices)
        labels = tuple(self.classes[index] for index in asked)
        each = zip(found.cells.float().cpu().numpy(), found.offset.tolist(), found.logit.tolist(), strict=True)
        return [Votes(target, against, labels, cells, offset, logit, found.method) for cells, offset, logit in each]

    def _present(self, features: Tensor, weights: Tensor, logits: Tensor) -> list[tuple[Votes, ...] | None]:
        """For each image the votes for every label above one half, the likeliest first; None where it has one class."""
        if not self.several_labels:
            return [None] * len(features)
        found: list[list[Votes]] = [[] for _ in features]
        for label in (logits > 0).any(dim=0).nonzero()[:, 0].tolist():
            (has,) = torch.where(logits[:, label] > 0)
            said = self._votes(features[has], weights[has], _Question(None, label, None))
            for image, votes_of in zip(has.tolist(), said, strict=True):
                found[image] += [votes_of] if votes_of is not None else []
        return [tuple(sorted(each, key=lambda vote: -vote.logit)) for each in found]

    def _prediction(self, index: int, probability: float) -> Prediction:
        return Prediction(index, self.classes[index], min(probability, 1.0))


@torch.inference_mode(False)  # what is made here can be trained, wherever it is called
def explainable(
    model: nn.Module,
    *,
    attention: Attention | None = None,
    head: nn.Module | int | None = None,
    parts: tuple[Part, Part] | None = None,
    transform: Transform | Any = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    several_labels: bool = False,
) -> ExplainableClassifier:
    """Wrap a classifier: split it before its global average pooling and put an attention there.

    The classifier is copied, never edited; hooks of yours stay with the original (torch's own, as for weight
    normalisation, are part of the copy). Layer, grid and preprocessing are found: by timm's
    ``forward_features`` / ``forward_head``, or, for any module that torch.fx or torch.export can trace (torchvision's,
    those of Hugging Face transformers, yours), at the last operation that averages a map, or patch tokens, over the
    grid. Where a class token reads the patch tokens (ViT), the cut is where it joins them: :mod:`bla.model.joining`;
    where
    the map is flattened (VGG, AlexNet), the head reads it with the cells left out at zero. The split is checked on
    random input before it is returned: uniform weights give the classifier's own logits, moving the weight to one cell
    changes them, and of cells left out nothing is read.

    Parameters
    ----------
    model: takes pixels (B, 3, h, w), returns logits (B, K), alone, as ``.logits`` or first in a tuple.
    attention: the module to insert; by default ``BoundedLogitAttention(C)``. A :class:`ClassAwareAttention` without
        a judge gets the classifier's head.
    head: in place of the classifier's own: a module for pooled features (B, C), taken as it is, or K for a new linear
        one of K classes, to be trained. Any classifier with a last map of several cells serves then.
    parts: (trunk, head), where no cut is found: of each a submodule's name, or a callable of the classifier and a
        tensor, as in ``(lambda model, pixels: model.body(pixels)[-1], "fc")``. The trunk gives a map (B, C, H, W) or
        patch tokens (B, H*W, C), the head takes their mean (B, C). Checked as any other cut.
    transform: the preprocessing, or an image processor of Hugging Face transformers; by default timm's for the
        model, else ImageNet's at 224 x 224 (``transform.source`` then says "assumed"). The whole photo is squashed to
        the input size.
    classes: K names; by default those of a transformers model's ``config.id2label``, ImageNet's for 1,000 classes, or
        "class 0", ...
    several_labels: whether an image may have several classes or none, each told by the sigmoid of its logit.

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
    if transform is None:
        transform = transform_of(model)
    elif not isinstance(transform, Transform):
        transform = transform_of_processor(transform)
    if parts is not None and head is not None:
        raise ClassifierError(f"{name}: expected parts=, which name a head, or head=, got both")
    try:
        own = copy.deepcopy(model)
    except Exception as error:
        raise ClassifierError(f"{name}: expected a module that can be copied, got {error}") from error
    drop_hooks(own)
    own = own.eval().requires_grad_(False)
    frozen = not isinstance(head, int)
    if head is None:
        trunk, head, channels, outputs = checked_split(own, transform, name, parts)
    else:
        trunk, channels = checked_trunk(own, transform, name)
        head, outputs = given_head(head, channels, own, name)
    if classes is None:
        classes = _own_classes(model, outputs)
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
    if attention.class_conditional:
        if several_labels:
            raise ClassifierError(
                f"{name}: expected a class-agnostic attention with several_labels, got a class-aware one, whose score "
                "asks about one class: an image has one selection for all; explanation.present has each label's votes"
            )
        attention.default_judge(head)
    setup = "L2X-F"
    if attention.bounded:
        setup = signed("BLA-PH", attention.threshold, "auto", class_aware=attention.class_conditional)
    return ExplainableClassifier(
        trunk,
        attention,
        head,
        transform=transform,
        classes=classes,
        name=name,
        setup=setup,
        frozen_head=frozen,
        several_labels=several_labels,
    )


def transform_of(model: nn.Module) -> Transform:
    """The preprocessing that a classifier was trained with, where it says so; ImageNet's at 224 x 224 otherwise.

    A classifier of yours says so by an attribute ``transform`` that holds a :class:`bla.data.photo.Transform`.
    """
    own = getattr(model, "transform", None)
    if isinstance(own, Transform):
        return own
    if speaks_timm(model):
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


_RESAMPLING: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which image processors use."""


def transform_of_processor(processor: Any) -> Transform:
    """The preprocessing of an image processor of Hugging Face transformers: size, colours, interpolation, crop.

    As everywhere the whole photo is squashed, unless ``mode="crop"`` is set; the crop is then the processor's.
    """
    try:
        settings = processor.to_dict()
        size, crop = settings["size"], settings.get("crop_size")
        short = size.get("shortest_edge")
        if crop and settings.get("do_center_crop"):
            height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        else:
            height, width = (short, short) if short else (size["height"], size["width"])
        share = min(height, width) / short if short and crop else settings.get("crop_pct") or 1.0
        plain = settings.get("do_normalize", True)
        return Transform(
            size=(height, width),
            mean=tuple(settings["image_mean"]) if plain else (0.0, 0.0, 0.0),
            std=tuple(settings["image_std"]) if plain else (1.0, 1.0, 1.0),
            interpolation=_RESAMPLING[int(settings.get("resample", 2))],
            crop_fraction=share,
            source="transformers",
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ClassifierError(
            f"expected a bla.Transform or an image processor of transformers, got {type(processor).__name__} "
            f"({type(error).__name__}: {error})"
        ) from error


def _own_classes(model: nn.Module, outputs: int) -> list[str] | None:
    """The names that a transformers model has for its classes; None where they are numbered only, or two are alike."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, dict) or sorted(labels) != list(range(outputs)):
        return None
    names = [str(labels[index]) for index in range(outputs)]
    return names if len({*names}) == outputs and names[0] != "LABEL_0" else None


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


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    kept = getattr(getattr(model, "config", None), "name_or_path", None)  # of transformers
    return (config or {}).get("architecture") or (isinstance(kept, str) and kept) or type(model).__name__


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
