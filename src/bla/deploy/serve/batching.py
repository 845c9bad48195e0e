"""Photos of many requests, run together by one thread; the queue is bounded, and no accepted photo is dropped."""

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
from starlette.exceptions import HTTPException

from bla.data.photo import Photo
from bla.deploy.engine import Engine, Outputs


class Busy(HTTPException):
    """The queue is full: 429, with the number of seconds after which another try is likely to succeed."""

    def __init__(self, seconds: int) -> None:
        super().__init__(429, f"busy; try again in {seconds} s", {"Retry-After": str(seconds)})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Job:
    photo: Photo
    size: int
    target: int
    masks: npt.NDArray[np.bool_] | None
    future: asyncio.Future[Outputs]


class Batcher:
    """Runs an engine in one thread, on up to ``most`` photos at once.

    The first photo of a batch waits at most ``deadline`` seconds for others. At most ``room`` photos are under way,
    each from its acceptance, before it is decoded, to its answer.
    """

    def __init__(self, engine: Engine, *, most: int = 16, deadline: float = 0.005, room: int = 64) -> None:
        self.engine = engine
        self.most, self.deadline, self.room = most, deadline, room
        self.inside = 0
        self.done = 0
        self._pace = 0.05  # seconds a photo, a running mean
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="bla-engine", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def admitted(self, photos: int) -> Iterator[None]:
        """Count so many photos as under way while inside; to be entered on the event loop.

        Raises
        ------
        Busy
            If the queue has no room for them.
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
        """The photo's row of each output. A photo that is cancelled while it waits is not run."""
        future: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(photo, size, target, masks, future))
        return await future

    def close(self) -> None:
        """Run the photos that were accepted, and stop."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, closed = self._gathered(job)
            waiting = [each for each in batch if not each.future.cancelled()]
            plain = [each for each in waiting if each.masks is None]
            # Photos with masks run one by one: their outputs differ in shape.
            for group in [plain, *([each] for each in waiting if each.masks is not None)]:
                if group:
                    started = time.monotonic()
                    self._run(group)
                    self._pace += 0.1 * ((time.monotonic() - started) / len(group) - self._pace)
            if closed:
                return

    def _gathered(self, first: _Job) -> tuple[list[_Job], bool]:
        """A batch, and whether the batcher was closed meanwhile."""
        batch, end = [first], time.monotonic() + self.deadline
        while len(batch) < self.most:
            try:
                job = self._jobs.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False

    def _run(self, jobs: Sequence[_Job]) -> None:
        loop = jobs[0].future.get_loop()
        question: dict[str, Any] = {}
        if any(job.size for job in jobs):
            question["sizes"] = [job.size for job in jobs]
        if any(job.target >= 0 for job in jobs):
            question["targets"] = [job.target for job in jobs]
        if jobs[0].masks is not None:
            question["masks"] = jobs[0].masks
        try:
            outputs = self.engine.run(np.stack([job.photo.pixels for job in jobs]), **question)
        except Exception as error:  # whatever it is, every waiting request gets it
            loop.call_soon_threadsafe(_settle, jobs, error)
        else:
            self.done += len(jobs)  # before anybody has the answer
            loop.call_soon_threadsafe(_settle, jobs, outputs)


def _settle(jobs: Sequence[_Job], outputs: Outputs | Exception) -> None:
    for row, job in enumerate(jobs):
        if job.future.done():
            continue
        if isinstance(outputs, Outputs):
            job.future.set_result(outputs.of(row))
        else:
            job.future.set_exception(outputs)
