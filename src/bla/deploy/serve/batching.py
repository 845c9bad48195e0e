"""Photos of many requests, run together: a bounded room, one thread that runs, nothing accepted is dropped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bla.data.photo import Photo
from bla.deploy.engine import Engine, Outputs


class Busy(Exception):  # noqa: N818  no error: what a busy server answers
    """The room is full; ``seconds`` says when it is likely to be worth another try."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"busy; try again in {seconds} s")
        self.seconds = seconds


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Job:
    photo: Photo
    size: int
    target: int
    masks: npt.NDArray[np.bool_] | None
    future: asyncio.Future[Outputs]


class Batcher:
    """Runs an engine in a thread of its own, on up to ``most`` photos at once.

    The first photo of a batch waits at most ``deadline`` seconds for others. At most ``room`` photos are in the
    house, from their acceptance, before they are decoded, to their answer.
    """

    def __init__(self, engine: Engine, *, most: int = 16, deadline: float = 0.005, room: int = 64) -> None:
        self.engine = engine
        self.most, self.deadline, self.room = most, deadline, room
        self.inside = 0
        self.done = 0
        self._pace = 0.05  # seconds a photo, measured as it goes
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="bla-engine", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def admitted(self, photos: int) -> Iterator[None]:
        """Room for so many photos while inside, to be entered on the event loop.

        Raises
        ------
        Busy
            If there is none.
        """
        if self.inside + photos > self.room:
            raise Busy(max(1, math.ceil(self._pace * self.inside)))
        self.inside += photos
        try:
            yield
        finally:
            self.inside -= photos

    async def run(
        self, photo: Photo, *, size: int = 0, target: int = -1, masks: npt.NDArray[np.bool_] | None = None
    ) -> Outputs:
        """The photo's row of each output. Cancelled while it waits, it is not run."""
        future: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(photo, size, target, masks, future))
        return await future

    def close(self) -> None:
        """Finish what was accepted, and stop."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, open_ = self._gathered(job)
            waiting = [job for job in batch if not job.future.cancelled()]
            plain = [job for job in waiting if job.masks is None]
            for group in ([plain] if plain else []) + [[job] for job in waiting if job.masks is not None]:
                started = time.monotonic()
                self._run(group)
                self._pace += 0.1 * ((time.monotonic() - started) / len(group) - self._pace)
            if not open_:
                return

    def _gathered(self, first: _Job) -> tuple[list[_Job], bool]:
        batch, end = [first], time.monotonic() + self.deadline
        while len(batch) < self.most:
            try:
                job = self._jobs.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return batch, False
            batch.append(job)
        return batch, True

    def _run(self, jobs: Sequence[_Job]) -> None:
        loop = jobs[0].future.get_loop()
        try:
            asked: dict[str, Any] = {}
            if any(job.size for job in jobs):
                asked["sizes"] = [job.size for job in jobs]
            if any(job.target >= 0 for job in jobs):
                asked["targets"] = [job.target for job in jobs]
            if jobs[0].masks is not None:
                asked["masks"] = jobs[0].masks
            outputs = self.engine.run(np.stack([job.photo.pixels for job in jobs]), **asked)
            rows = [Outputs(*(values[row] for values in outputs)) for row in range(len(jobs))]
        except Exception as error:  # whatever it is, those who wait must hear of it
            loop.call_soon_threadsafe(_settle, jobs, error)
        else:
            self.done += len(jobs)  # before anybody has the answer
            loop.call_soon_threadsafe(_settle, jobs, rows)


def _settle(jobs: Sequence[_Job], results: Sequence[Outputs] | Exception) -> None:
    for index, job in enumerate(jobs):
        if job.future.done():
            continue
        if isinstance(results, Exception):
            job.future.set_exception(results)
        else:
            job.future.set_result(results[index])
