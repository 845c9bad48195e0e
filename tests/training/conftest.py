"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from forked import Starter


@pytest.fixture(scope="session")
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.close()
