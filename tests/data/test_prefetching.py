"""Prefetching: order, how far it reads ahead, errors, and an end before the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bla.data.prefetching import prefetch


def test_prefetch_keeps_order_and_distance() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            asked.append(item)
            yield item

    with ThreadPoolExecutor(3) as pool:
        for position, result in enumerate(prefetch(pool, lambda item: item**2, items(), ahead=4)):
            assert result == position**2
            assert len(asked) <= position + 4
    assert len(asked) == 20


def test_prefetch_hands_errors_on() -> None:
    with ThreadPoolExecutor(1) as pool:
        results = prefetch(pool, lambda item: 1 / (2 - item), range(100), ahead=5)
        assert [next(results), next(results)] == [0.5, 1.0]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_prefetch_drops_what_nobody_waits_for() -> None:
    done: list[int] = []
    stopped = threading.Event()

    def work(item: int) -> None:
        if item == 1:
            stopped.wait(timeout=60)
        done.append(item)

    with ThreadPoolExecutor(1) as pool:
        results = prefetch(pool, work, range(100), ahead=5)
        next(results)
        results.close()  # type: ignore[attr-defined]
        stopped.set()
    assert done in ([0], [0, 1])
