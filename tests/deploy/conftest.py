"""Exports of the tiny classifier, made once for all test files."""

from __future__ import annotations

import pytest

from bla.data.photo import Transform
from bla.deploy.export import export
from bla.model.attention import BoundedLogitAttention, ClassAwareAttention
from small_exports import Pair, of_tokens, wrapped


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A class-agnostic explainer and its graph."""
    classifier = wrapped(BoundedLogitAttention(8, threshold="auto", hidden=(6,)))
    return classifier, export(classifier, tmp_path_factory.mktemp("plain") / "plain.onnx")


@pytest.fixture(scope="session")
def class_aware(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A class-aware explainer and its graph."""
    classifier = wrapped(ClassAwareAttention(8))
    return classifier, export(classifier, tmp_path_factory.mktemp("class_aware") / "class_aware.onnx")


@pytest.fixture(scope="session")
def of_photos(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A classifier of tokens, an attention with a gate and a context, and their graph, which crops photos itself."""
    cropping = Transform((64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", mode="crop")
    classifier = wrapped(BoundedLogitAttention(48, gate=True, context=True), cropping, of_tokens)
    return classifier, export(classifier, tmp_path_factory.mktemp("photos") / "photos.onnx", entry="photos")
