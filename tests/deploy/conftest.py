"""Exports of the tiny classifier, made once for all test files."""

from __future__ import annotations

import pytest

from bla.deploy.export import export
from bla.model.attention import BoundedLogitAttention, ClassAwareAttention
from small_exports import Pair, wrapped


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
