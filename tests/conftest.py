"""Fixtures that several test files share, and Hypothesis without a clock or a die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from bla.classifier import ExplainableClassifier

settings.register_profile("bla", deadline=None, derandomize=True)
settings.load_profile("bla")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is not for tests to fill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs, which are not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the photographs of ../shared/data, which are not part of the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def lite0() -> ExplainableClassifier:
    """tf_efficientnet_lite0 with its ImageNet weights, wrapped and never fitted: copy it before changing it."""
    from bla.backbones import LITE0, load_backbone
    from bla.classifier import explainable

    return explainable(load_backbone(LITE0))
