"""The examples of a run: its images that can be read, labelled with its classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bla.data.image_sets import ImageSet, Splits, stratified_split
from bla.data.photo import DataError
from bla.model.classifier import ExplainableClassifier
from bla.progress import Progress
from bla.training.cache import FeatureCache, cached_features
from bla.training.masked import masked_answers
from bla.training.networks import Examples
from bla.training.photos import Photos, StreamedFeatures, readable_photos
from bla.training.settings import Masked, Settings

Failures = tuple[tuple[str, str], ...]
"""(image, reason) for each image that could not be read."""

FEW = 50
"""Photos below which training is seldom better than the order that needs none."""

Parts = tuple[Examples, Examples | None, Examples, Failures]
"""The examples of a training: train, validation, test."""


def read_parts(read: Callable[..., Examples], splits: Splits, settings: Settings, report: Progress) -> Parts:
    """The examples of both splits, with a share of the training images held out if the settings say so."""
    if len(splits.train) < FEW:
        report(
            f"{len(splits.train)} photos are few to learn from: train on {FEW} or more, or leave training out: "
            "bla.explainable(model).explain and `bla explain` order the cells without any (c - E)",
            0,
            0,
        )
    train, test = read(splits.train, answered=settings.setup == "bla-px"), read(splits.test)
    failures = (*train.cache.failures, *test.cache.failures)
    if failures:
        report(f"{len(failures)} images cannot be read and take no part, the first: {failures[0][1]}", 0, 0)
    if settings.held_out is None:
        return train, None, test, failures
    kept, held_out = stratified_split(train.labels, len(train), settings.held_out.validation, settings.seed)
    return train.subset(kept), train.subset(held_out), test, failures


def read_examples(
    wrapped: ExplainableClassifier,
    settings: Settings,
    images: ImageSet,
    *,
    cache: Path | None,
    stream: bool,
    report: Progress,
    answered: bool = False,
    digest: str | None = None,
) -> Examples:
    """The images that can be read, as cached or streamed features, or as photos if the trunk is trained.

    ``answered``: with the classifier's answers to them masked. ``digest``: of the trunk's weights, where it is known.
    """
    images = _relabelled(images, wrapped.classes, settings)
    source: FeatureCache | StreamedFeatures | Photos
    kept: dict[str, Any] = {"root": cache, "digest": digest, "report": report}
    if settings.trunk is None and not stream:
        source = cached_features(wrapped, images, **kept)
    else:
        source = readable_photos(images, wrapped.transform, report)
        if settings.trunk is None:
            source = StreamedFeatures(wrapped, source)
    failed = {image for image, _ in source.failures}
    rows = np.array([row for row, name in enumerate(images.names) if name not in failed], np.int64)
    labels = None if images.labels is None else images.labels[rows]
    if not answered:
        return Examples(source, rows, labels)
    assert isinstance(settings.selection, Masked)
    masks, fill = settings.selection.masks, settings.selection.fill
    answers = masked_answers(wrapped, images, count=masks, fill=fill, seed=settings.seed, **kept)
    silent = {image for image, _ in answers.failures}  # photos of which features are finite and logits are not
    return Examples(source, rows[[images.names[row] not in silent for row in rows]], labels, answers)


def _relabelled(images: ImageSet, classes: Sequence[str], settings: Settings) -> ImageSet:
    """The images with labels that index ``classes``; without labels if the classifier's predictions are the targets."""
    if settings.head.targets == "predictions":
        return dataclasses.replace(images, labels=None, classes=())
    if images.labels is None:
        raise DataError(f"{images.root}: expected class folders for targets='labels', got images without classes")
    if images.several != settings.several_labels:
        kinds = ("one class an image", "a table of several labels an image")
        expected, came = kinds[settings.several_labels], kinds[images.several]
        raise DataError(f"{images.root}: expected {expected}, got {came}: use data of the kind that was trained on")
    if unknown := sorted(set(images.classes) - set(classes)):
        raise DataError(
            f"{images.root}: expected classes of the classifier, got {unknown[:5]}; it knows {list(classes[:5])}, ..."
        )
    index = np.array([list(classes).index(name) for name in images.classes], np.int64)
    columns = np.eye(len(classes), dtype=np.int64)[index]  # of each class in a table of several labels
    labels = images.labels @ columns if images.several else index[images.labels]
    return dataclasses.replace(images, labels=labels, classes=tuple(classes))
