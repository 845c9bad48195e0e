"""Any classifier as trunk | attention | head: ``explainable`` wraps one, ``ExplainableClassifier`` explains by it."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, SupportsIndex, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bla import meant
from bla.data.image_sets import Task
from bla.data.masking import FILLS, masked
from bla.data.photo import DataError, Transform
from bla.data.prefetching import prefetch
from bla.explanations.explanation import Explanation, Sizes, Unexplained, Votes
from bla.model.attention import Attention, BoundedLogitAttention, Selection
from bla.model.earlier import with_earlier
from bla.model.evidence import ask, from_all, linear_layer, sufficiency
from bla.model.finite import unfinite
from bla.model.heads import grid_of, read
from bla.model.images import ImageLike, Images, Input, alike, each, read_image
from bla.model.outputs import Meaning, Output, Reading
from bla.model.own_prediction import OwnPredictionAttention
from bla.model.parts import Part
from bla.model.preprocessing import classes_of, name_of, transform_of, transform_of_code
from bla.model.splitting import CHANNELS_LAST, ClassifierError, Split, split, split_for
from bla.model.tracing import said as raised
from bla.model.untouched import copied
from bla.model.votes import votes
from bla.progress import show

__all__ = ["ClassifierError", "ExplainableClassifier", "ImageLike", "explainable"]

Target = int | str | SupportsIndex | None
"""A class by index, also as NumPy and torch have them, or by name; None where no class is asked about."""
Question = tuple[int | None, int | None]
"""A class that is asked about, and another that it is held against."""


class Answer(NamedTuple):
    """``logits`` (B, K) from the selection, ``classifier_logits`` from all cells, and ``sizes`` (B, 3).

    These are of :class:`bla.explanations.explanation.Sizes`, for the class that the classifier predicts; 0 if unknown.
    """

    logits: Tensor
    classifier_logits: Tensor
    sizes: Tensor


class ExplainableClassifier(nn.Module):
    """A classifier whose prediction is made from a selected subset of its feature map alone.

    ``logits = head(sum_n g_n trunk(pixels)_n)`` with g the hard selection in evaluation mode and the soft one in
    training mode. Made by :func:`explainable`; trained by :func:`bla.fit`, or in your training loop (then set
    ``fitted = True``). The trunk is frozen and stays in evaluation mode; so does the head while ``frozen_head``.

    Attributes
    ----------
    trunk: pixels (B, 3, h, w) to features (B, C, H, W), whatever the classifier's own layout.
    attention: the trainable module.
    head: pooled features (B, C) to logits (B, K); or a :class:`bla.model.heads.MapHead`.
    transform, classes, name, setup: preprocessing, class names, and what explanations are signed with.
    several_labels: whether an image may have several classes or none: each has a probability of its own.
    regression: whether the one output is a value, and not the evidence for a class.
    note: how explanations are approximate, in words; empty where they are not.
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
        regression: bool = False,
        note: str = "",
    ) -> None:
        super().__init__()
        if getattr(head, "shares_trunk", False) and not frozen_head:
            raise ClassifierError(f"{name}: expected a separate head to train, got one that shares the trunk's module")
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
        self.regression = regression
        self.note = note
        self._linear = (linear_layer(head, attention.in_channels),)  # in a tuple: it is the head's already
        self.register_buffer("_fitted", torch.tensor(False))
        self.train(False)

    @property
    def task(self) -> Task:
        """What it predicts."""
        return "value" if self.regression else "labels" if self.several_labels else "class"

    @property
    def fitted(self) -> bool:
        """Whether the attention has been trained; part of the state dict."""
        return bool(self._fitted)

    @fitted.setter
    def fitted(self, value: bool) -> None:
        cast(Tensor, self._fitted).fill_(value)

    @property
    def explains(self) -> bool:
        """Whether it can explain: its attention is trained, or of a kind that explains untrained."""
        return self.fitted or not self.attention.needs_training

    def train(self, mode: bool = True) -> ExplainableClassifier:
        """Set the mode of the attention, and of a head that is being trained; what is frozen stays in evaluation."""
        super().train(mode)
        self.trunk.eval()
        if self.frozen_head:
            self.head.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of normalised pixels (B, 3, h, w)."""
        if torch.is_grad_enabled() and not (self.training or pixels.requires_grad or pixels.is_inference()):
            # the trunk is frozen: without this, libraries that hook it (Grad-CAM) would find no gradient
            pixels = pixels.clone().requires_grad_()
        features = self.trunk(pixels)
        selection = self.attention(features)
        return self.classify(features, selection.soft) if self.training else self._selected(features, selection)

    def pixels(self, photos: npt.NDArray[Any]) -> Tensor:
        """Normalised pixels (B, C, h, w), channels last, of photos' levels (B, h, w, C), where the weights are."""
        like = next(self.attention.parameters())
        mean, std = (like.new_tensor(of, dtype=torch.float32) for of in (self.transform.mean, self.transform.std))
        values = torch.from_numpy(photos).to(like.device).float()
        return ((values - 255 * mean) / (255 * std)).movedim(-1, 1).to(like.dtype)

    def classify(self, features: Tensor, weights: Tensor) -> Tensor:
        """Logits (B, K) that the head gives for features (B, C, H, W) under weights (B, H, W)."""
        return read(self.head, features, weights)

    def select(self, pixels: Tensor, *, size: int | None = None, target: Tensor | None = None) -> Selection:
        """The selection for normalised pixels (B, 3, h, w); with ``size`` exactly that many cells.

        With a class-conditional attention ``target``, class indices (B,), says which classes to explain.
        """
        if target is not None and not self.attention.class_conditional:
            raise ClassifierError(
                f"{self.name}: expected a class-aware explainer to ask about a class, got a class-agnostic one "
                f"({self.setup}): train with class_aware=True, or leave target out"
            )
        selection: Selection = self.attention(self.trunk(pixels), size=size, target=target)
        return selection

    def explain(
        self,
        images: Images,
        *,
        size: int | None = None,
        target: Target | Iterable[Target] = None,
        against: Target | Iterable[Target] = None,
        check: bool = False,
        fill: str = FILLS[0],
        batch_size: int = 16,
    ) -> list[Explanation]:
        """Explain photos: paths, folders, bytes, PIL images, arrays or tensors, one or many, or a data set or loader.

        Parameters
        ----------
        images: labels beside them are left out. An array is a photo, uint8 (h, w, 3). A
            tensor of uint8 is a photo (3, h, w) or (h, w, 3); a tensor of floats is normalised pixels as :meth:`select`
            takes them, (3, h, w) or a batch.
        size: select exactly this many cells.
        target: a class by index or name, or one for each image, None among them. ``explanation.votes`` is then what
            each selected cell says for it; a class-conditional explainer also selects its cells for it, by default for
            the class that it predicts.
        against: another class: votes are for ``target`` rather than this one.
        check: ask the whole classifier, in two more passes, about the selected pixels alone and the photo without them.
        fill: what replaces the other pixels then: :data:`bla.data.masking.FILLS`.

        A class-agnostic attention that was never trained, or an unknown class, is a ClassifierError; a photo that
        cannot be read a DataError that names it. :meth:`explain_each` continues with the others.
        """
        asked = {"size": size, "target": target, "against": against, "check": check, "fill": fill}
        found = list(self.explain_each(images, **asked, batch_size=batch_size))  # type: ignore[arg-type]
        for result in found:
            if isinstance(result, Unexplained):
                raise DataError(result.error)
        return cast("list[Explanation]", found)

    def explain_each(
        self,
        images: Images,
        *,
        size: int | None = None,
        target: Target | Iterable[Target] = None,
        against: Target | Iterable[Target] = None,
        check: bool = False,
        fill: str = FILLS[0],
        batch_size: int = 16,
    ) -> Iterator[Explanation | Unexplained]:
        """As :meth:`explain`, one by one in order, with an :class:`Unexplained` for a photo that cannot be read."""
        if not self.explains:
            raise ClassifierError(
                f"expected a trained attention, got {self.name} with one that was never fitted: "
                "call bla.fit(wrapped, images) first"
            )
        for what, number in (("size", size), ("batch_size", batch_size)):
            if number is not None and (not hasattr(number, "__index__") or number < 1):
                raise ClassifierError(f"expected a {what} of at least 1, a whole number, got {number!r}")
        size = None if size is None else operator.index(size)
        if self.training:
            raise ClassifierError("expected evaluation mode, got training mode: call .eval() before .explain()")
        if fill not in FILLS:
            raise ClassifierError(f"expected a fill among {', '.join(FILLS)}, got {fill!r}")
        asked = self._questions(target, against)
        if not isinstance(target, Iterable) or isinstance(target, str):
            asked = itertools.chain([next(asked)], asked)  # a class that there is not is an error without images, too
        with ThreadPoolExecutor(2) as pool:
            numbered = enumerate(each(images, self.transform.shape))
            loaded = prefetch(pool, lambda item: read_image(self.transform, *item), numbered, ahead=2 * batch_size)
            while batch := list(itertools.islice(loaded, batch_size)):
                questions = list(itertools.islice(asked, len(batch)))
                if len(questions) < len(batch):
                    raise ClassifierError("expected a target for each image, or one for all, got fewer than images")
                readable = [item for item in batch if isinstance(item, Input)]
                about = [question for item, question in zip(batch, questions, strict=True) if isinstance(item, Input)]
                explained = iter(self._explanations(readable, size, about, fill if check else None))
                for item in batch:
                    yield next(explained) if isinstance(item, Input) else item

    def _questions(self, target: Target | Iterable[Target], against: Target | Iterable[Target]) -> Iterator[Question]:
        """For each image the class that is asked about, and the other."""
        for about, other in zip(self._class_indices(target), self._class_indices(against), strict=False):
            if other is not None and about is None:
                raise ClassifierError("expected a target, to be held against another class, got none")
            if about is not None and about == other:
                raise ClassifierError(f"expected two classes, got {self.classes[about]!r} against itself")
            yield about, other

    def _class_indices(self, target: Target | Iterable[Target]) -> Iterator[int | None]:
        """The index of a class again and again, or of each of several."""
        if not isinstance(target, Iterable) or isinstance(target, str) or getattr(target, "ndim", None) == 0:
            return itertools.repeat(self._class_index(cast("Target", target)))
        return map(self._class_index, target)

    def _class_index(self, target: Target) -> int | None:
        if target is None:
            return None
        if isinstance(target, str) and target in self.classes:
            return self.classes.index(target)
        if not isinstance(target, (bool, np.bool_, str)) and getattr(target, "dtype", None) != torch.bool:
            with contextlib.suppress(TypeError, ValueError):  # of what is no whole number
                index = operator.index(target)
                if 0 <= index < len(self.classes):
                    return index
        raise ClassifierError(
            f"expected a class of {self.name} by name, or by index from 0 to {len(self.classes) - 1}, got {target!r}"
            + (meant(str(target), self.classes) or f"; it knows {list(self.classes[:5])}, ...")
        )

    @torch.inference_mode()
    def _explanations(
        self, inputs: Sequence[Input], size: int | None, asked: Sequence[Question], fill: str | None
    ) -> list[Explanation | Unexplained]:
        found: list[Explanation | Unexplained] = []
        for run in alike(inputs):
            questions = asked[len(found) : len(found) + len(run)]
            pixels = self.batch(run)
            features = self.trunk(pixels)
            cells = features[0, 0].numel()
            if size is not None and size > cells:
                raise ClassifierError(f"expected a size from 1 to {cells}, the cells of {self.name}, got {size}")
            about = None
            if self.attention.class_conditional:
                each_target = [-1 if target is None else target for target, _ in questions]
                about = torch.tensor(each_target, device=features.device)
            selection = self.attention(features, size=size, target=about)
            found += self.explained(run, pixels, features, selection, asked=questions, fill=fill)
        return found

    def batch(self, inputs: Sequence[Input]) -> Tensor:
        """The normalised pixels (B, 3, h, w) of inputs."""
        like = next(self.attention.parameters())
        if all(isinstance(item.pixels, np.ndarray) for item in inputs):
            pixels = self.pixels(np.stack([item.pixels for item in inputs]))  # one transfer to a GPU, of 8 bits
        else:
            each_input = (
                item.pixels[None].to(like) if isinstance(item.pixels, Tensor) else self.pixels(item.pixels[None])
                for item in inputs
            )
            pixels = torch.cat([*each_input])
        return pixels.contiguous(memory_format=CHANNELS_LAST[pixels.ndim])

    @torch.inference_mode()
    def explained(
        self,
        inputs: Sequence[Input],
        pixels: Tensor,
        features: Tensor,
        selection: Selection,
        *,
        asked: Sequence[Question] = (),
        fill: str | None = None,
    ) -> list[Explanation | Unexplained]:
        """The explanations of inputs by a selection of their features, whatever made it.

        ``asked``: for each image the class that votes are for, or None, and the class that they are against.
        """
        answer = self.answer(features, selection)
        logits, own = answer.logits.float(), answer.classifier_logits.float()
        probabilities, whole = (self.probabilities(of) for of in (logits, own))
        found_votes = self._votes(features, selection.hard, asked)
        present = self._present(features, selection.hard, logits)
        counted = answer.sizes.tolist()
        about = None if selection.target is None else selection.target.tolist()
        alone = []
        if fill is not None:
            kept = (selection.hard > 0).float()
            photos = [masked(pixels.float(), masks, fill).to(pixels.dtype) for masks in (kept, 1 - kept)]
            alone = [self.probabilities(from_all(self.head, self.trunk(each)).float()) for each in photos]
        unbounded, scores, soft, hard = (values.float().cpu().numpy() for values in selection[:4])
        found: list[Explanation | Unexplained] = []
        for row, (name, _, region, photo, shown, doubt) in enumerate(inputs):
            if not all(np.isfinite(values[row]).all() for values in (unbounded, probabilities, whole)):
                reason = unfinite(self, pixels[row : row + 1], lambda one: from_all(self.head, self.trunk(one)))
                found.append(Unexplained(name, f"{name}: expected finite features from {self.name}, got {reason}"))
                continue
            explanation = Explanation.from_arrays(
                name,
                probabilities[row],
                self.classes,
                from_all=whole[row],
                several_labels=self.several_labels,
                regression=self.regression,
                masked=[answers[row] for answers in alone],
                fill=fill,
                unbounded=unbounded[row],
                scores=scores[row],
                soft=soft[row],
                selected=hard[row] > 0,
                method=self.attention.method,
                region=region,
                photo=photo,
                target=None if about is None else about[row],
                model=self.name,
                setup=self.setup,
                sizes=Sizes(*counted[row]) if all(counted[row]) else None,
                votes=found_votes.get(row),
                present=present[row] if self.several_labels else None,
                note="; ".join(filter(None, (self.note, doubt))),
                shown=shown or None,
            )
            found.append(explanation)
        return found

    def probabilities(self, logits: Tensor) -> npt.NDArray[np.float32]:
        """The classes' probabilities by logits (B, K); of a regression its values."""
        found = logits if self.regression else logits.sigmoid() if self.several_labels else logits.softmax(-1)
        return np.asarray(found.cpu().numpy())

    def answer(self, features: Tensor, selection: Selection) -> Answer:
        """What the head says of features (B, C, H, W) and a selection of theirs; it is asked nothing twice."""
        unbounded, judged = selection.unbounded, selection.judged
        bound = (unbounded >= 0).sum(dim=grid_of(unbounded, 1)).clamp(min=self.attention.least)
        enough = None
        if judged is not None:
            whole, enough = judged.logits, judged.enough
        elif self.several_labels or not self.attention.bounded:
            whole, bound = from_all(self.head, features), torch.zeros_like(bound)
        else:
            said = ask(self.head, features, self._linear[0])
            whole, enough = said.logits, sufficiency(self.head, features, unbounded, said)
        if self.regression:  # of a value no size is enough
            enough, bound = None, torch.zeros_like(bound)
        sizes = torch.stack([*(enough or (torch.zeros_like(bound), torch.zeros_like(bound))), bound], dim=1)
        return Answer(self._selected(features, selection), whole, sizes)

    def _selected(self, features: Tensor, selection: Selection) -> Tensor:
        """Logits (B, K) from the hard selection, which a judge may have been asked for already."""
        judged = selection.judged
        return self.classify(features, selection.hard) if judged is None or judged.selected is None else judged.selected

    def _votes(self, features: Tensor, weights: Tensor, asked: Sequence[Question]) -> dict[int, Votes]:
        """By row what the cells of an image say for a class, or for it rather than another, where that is asked."""
        given: dict[int, Votes] = {}
        for alone in (True, False):
            rows = [row for row, (target, other) in enumerate(asked) if target is not None and (other is None) == alone]
            if not rows:
                continue
            pairs = [[index for index in asked[row] if index is not None] for row in rows]
            found = votes(self.head, features[rows], weights[rows], *torch.tensor(pairs, device=features.device).T)
            each_row = zip(found.cells.float().cpu().numpy(), found.offset.tolist(), found.logit.tolist(), strict=True)
            for row, indices, (cells, offset, logit) in zip(rows, pairs, each_row, strict=True):
                labels, other = tuple(self.classes[index] for index in indices), asked[row][1]
                given[row] = Votes(indices[0], other, labels, cells, offset, logit, found.method)
        return given

    def _present(self, features: Tensor, weights: Tensor, logits: Tensor) -> list[tuple[Votes, ...]]:
        """For each image the votes for every label above one half, the likeliest first."""
        found: list[list[Votes]] = [[] for _ in features]
        for label in (logits > 0).any(dim=0).nonzero()[:, 0].tolist() if self.several_labels else ():
            asked = [(label if has else None, None) for has in (logits[:, label] > 0).tolist()]
            for image, said in self._votes(features, weights, asked).items():
                found[image].append(said)
        return [tuple(sorted(of_image, key=lambda said: -said.logit)) for of_image in found]


@torch.inference_mode(False)  # what is made here can be trained, wherever it is called
def explainable(
    model: nn.Module,
    *,
    attention: Attention | Callable[[int], Attention] | None = None,
    head: nn.Module | int | None = None,
    parts: tuple[Part, Part] | None = None,
    transform: Transform | Any = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    output: Output | None = None,
    inputs: Sequence[Any] | Mapping[str, Any] = (),
    meaning: Meaning | None = None,
    several_labels: bool | None = None,
) -> ExplainableClassifier:
    """Wrap a classifier: split it before its global average pooling and put an attention there.

    The classifier is copied, never edited; your hooks stay with the original. It is cut by timm's
    ``forward_features`` / ``forward_head``, or, if torch.fx or torch.export can trace it, where a map, or patch
    tokens, are averaged, whatever operations do that. Where a class token reads the patch tokens (ViT), the cut is
    where it joins them: :mod:`bla.model.joining`; where the map is read in another way (flattened, its maxima), the
    head reads it with something neutral in the place of unselected cells. What cannot be traced runs as it is, with
    hooks: :mod:`bla.model.hooking`. The split is checked on random input, of several batch sizes and memory formats:
    uniform weights give the classifier's own output, moving the weight to one cell changes it, and cells that are left
    out change nothing.

    Parameters
    ----------
    model: takes pixels (B, 3, h, w), returns a row for each image, alone or among other things.
    attention: the module to insert, or what makes it from C, the map's channels. By default
        :class:`bla.model.own_prediction.OwnPredictionAttention`, which explains the classifier's own prediction, also
        untrained; for several labels, or a new head to be trained, ``BoundedLogitAttention``. A class-conditional one
        without a judge gets the classifier's head.
    head: instead of the classifier's: a module for pooled features (B, C), or K for a linear one, to be trained.
    parts: (trunk, head), where no cut is found: of each a submodule's name, or a callable of the classifier and a
        tensor, as in ``(lambda model, pixels: model.body(pixels)[-1], "fc")``. The trunk gives a map (B, C, H, W) or
        patch tokens (B, H*W, C), the head takes their mean (B, C). Checked as any other cut.
    transform: the preprocessing, an image processor of Hugging Face transformers or a preset of torchvision's weights;
        by default the model's own, crop included: :func:`bla.model.preprocessing.transform_of`. A new head gets the
        photo squashed, as in the paper.
    classes: K names; by default transformers' ``config.id2label``, ImageNet's for the 1,000 classes of a model of
        timm's or torchvision's, or "class 0", ... One logit tells two classes apart, the second of which it speaks for.
    output: which part of what the model returns is meant: an index, a key, or a callable that makes a tensor of it.
    inputs: what the model takes beside the pixels, in order or by name; a tensor with one row is for every image.
    meaning: of the output: ``"logits"``, ``"probabilities"`` or ``"value"`` (a regression). By default probabilities
        are known by staying from 0 to 1, and all else are logits.
    several_labels: whether an image may have several classes or none, each with a probability of its own; by default
        where there are probabilities that do not sum to 1.

    A classifier that cannot be split, or an output that may be meant in several ways, is a ClassifierError.

    >>> stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=16), nn.ReLU())
    >>> net = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> wrapped = explainable(net, classes=["cat", "dog"])
    >>> wrapped(torch.rand(4, 3, 224, 224)).shape, wrapped.select(torch.rand(4, 3, 224, 224)).hard.shape
    (torch.Size([4, 2]), torch.Size([4, 14, 14]))
    """
    if not isinstance(model, nn.Module) or isinstance(model, ExplainableClassifier):
        raise _no_classifier(model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    name = name or name_of(model)
    reading = Reading(output, inputs, meaning, several_labels)
    if transform is None:
        transform = transform_of(model, None if head is None else "squash")
        if transform.is_assumed:
            show(f"{name}: {transform.in_words()}; if it was trained with another, pass that as transform=", 0, 0)
    elif not isinstance(transform, Transform):
        transform = transform_of_code(transform, model)
    if head is not None and parts is not None:
        raise ClassifierError(f"{name}: expected parts=, which name a head, or head=, got both")
    own = copied(model)
    try:
        found = (
            split(own, transform, name, reading, parts)
            if head is None
            else split_for(head, own, transform, name, reading)
        )
    except ClassifierError as error:
        _refuse_quantised(own, name, error)
        raise
    several_labels, regression = found.meant.several_labels, found.meant.meaning == "value"
    classes = _class_names(classes, model, found, name)
    if attention is None and (several_labels or isinstance(head, int)):
        attention = BoundedLogitAttention
    like = torch.empty(0, dtype=found.dtype, device=next(own.parameters(), torch.empty(0)).device)
    blank = torch.zeros(2, *transform.shape).to(like)
    if attention is None:
        found, earlier = with_earlier(found, blank)
        attention = OwnPredictionAttention(found.channels, earlier=earlier).to(like)
    elif not isinstance(attention, Attention):
        attention = attention(found.channels).to(like)
    _check_attention(attention, found, own, blank, name)
    if found.note:
        show(f"{name}: {found.note}", 0, 0)
    return ExplainableClassifier(
        found.trunk,
        attention,
        found.head,
        transform=transform,
        classes=classes,
        name=name,
        setup=attention.post_hoc_setup,
        frozen_head=not isinstance(head, int),
        several_labels=several_labels,
        regression=regression,
        note=found.note,
    )


def _no_classifier(given: object) -> ClassifierError:
    """What to say of what is no module; of a learner, as fastai has them, which attribute is the network."""
    values = {} if isinstance(given, nn.Module) else dict(inspect.getmembers_static(given))
    held = {name: len([*value.parameters()]) for name, value in values.items() if isinstance(value, nn.Module)}
    return ClassifierError(
        f"expected a classifier, a torch.nn.Module not wrapped yet, got {type(given).__name__}"
        + (f": pass its .{max(held, key=held.__getitem__)}" if held else "")
    )


def _class_names(classes: Sequence[str] | None, model: nn.Module, found: Split, name: str) -> Sequence[str]:
    """As many names as the split has outputs, the model's own where none are given."""
    if classes is None:
        classes = ["value"] if found.meant.meaning == "value" else classes_of(model, found.outputs)
    elif len(classes) == 1 and found.outputs == 2:
        classes = [f"not {classes[0]}", classes[0]]
    elif twice := [one for one, count in Counter(classes).items() if count > 1]:
        raise ClassifierError(f"{name}: expected class names that differ, got {twice[0]!r} more than once")
    if len(classes) != found.outputs:
        raise ClassifierError(f"{name}: expected {found.outputs} class names, as many as logits, got {len(classes)}")
    return classes


def _check_attention(attention: Attention, found: Split, own: nn.Module, blank: Tensor, name: str) -> None:
    """Refuse an attention that does not fit; one that needs a judge and has none gets the classifier's head."""
    if attention.in_channels != found.channels:
        raise ClassifierError(
            f"{name}: expected an attention for {found.channels} channels, got one for {attention.in_channels}"
        )
    if attention.class_conditional and found.meant.several_labels:
        raise ClassifierError(
            f"{name}: expected a class-agnostic attention with several_labels, got a class-aware one, which explains "
            "one class: an image has one selection for all; explanation.present has each label's votes"
        )
    if getattr(attention, "judge", found.head) is not None:
        return
    try:
        attention.judged_by(found.head)
        attention.eval()(found.trunk(blank[:1]))
    except RuntimeError as error:
        _refuse_quantised(own, name, error)
        if "memory" in str(error):
            raise
        raise ClassifierError(
            f"{name}: expected a head with gradients, by which cells are ordered, got {raised(error)}: pass "
            "attention=BoundedLogitAttention, which needs none, and fit it"
        ) from error


def _refuse_quantised(own: nn.Module, name: str, error: Exception) -> None:
    """Give the reason for an error, if the classifier is quantised."""
    if layers := [type(module).__name__ for module in own.modules() if "quantized" in type(module).__module__]:
        raise ClassifierError(
            f"{name}: expected a classifier in floating point, got one with quantised layers "
            f"({layers[0]}): wrap it before it is quantised; bla.export(..., calibration=photos) makes int8 of it then"
        ) from error
