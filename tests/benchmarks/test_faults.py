"""Damaged records of every kind, fewer than the benchmark damages."""

from __future__ import annotations

import pytest

from benchmarks.faults.records import KINDS, Kind, outcomes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_damaged_record_is_read_or_refused(kind: Kind) -> None:
    found = outcomes(kind, 25)
    assert found.pop("refused", 0) > 10
    found.pop("read", 0)
    assert not found
