"""What several test files of the study share: a prepared study of each task."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from small_study import small_study

Prepared = Callable[[str], tuple[Path, str]]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A small study's folder, which tests may copy but not change, and its secret: by task, made when first needed."""

    @cache
    def of(task: str) -> tuple[Path, str]:
        return small_study(tmp_path_factory.mktemp(task), task=task)

    return of
