"""Photos of many requests, run together, and a bound on the number of photos under way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.exceptions import HTTPException

from bla.data.photo import Photo
from bla.deploy.engine import Engine, Outputs

Answer = tuple[Photo, Outputs]
Result = TypeVar("Result")


class Busy(HTTPException):
    """The server is full: 429, or 503 to a request that it had accepted; and in how many seconds to try again."""

    def __init__(self, wait: float, status: int = 429) -> None:
        seconds = max(1, math.ceil(wait))
        super().__init__(status, f"busy; try again in {seconds} s", {"Retry-After": str(seconds)})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Job:
    read: Callable[[], Photo]
    size: int
    target: int
    masks: npt.NDArray[np.bool_] | None
    future: asyncio.Future[Answer]


class Lane:
    """Threads of which each does one piece of work at a time, and a queue before them; for one event loop.

    At most ``waiting`` pieces wait, and none that would wait for longer than ``patience`` seconds. What has begun keeps
    its thread until it ends, also when nobody waits for it any more.
    """

    def __init__(self, most: int, waiting: int, patience: float = math.inf) -> None:
        self.room, self.patience = most + waiting, patience
        self._threads, self._most = ThreadPoolExecutor(most, "bla-lane"), most
        self._pace = 1.0  # seconds a piece, a running mean
        self._inside: list[Future[Any]] = []

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of the work; raises :class:`Busy` where too much waits."""
        self._inside = [piece for piece in self._inside if not piece.done()]
        wait = self._pace * len(self._inside) / self._most
        if len(self._inside) >= self.room or (self._inside and wait > self.patience):
            raise Busy(wait)

        def timed() -> Result:
            began = time.monotonic()
            try:
                return work()
            finally:
                self._pace += 0.3 * (time.monotonic() - began - self._pace)

        self._inside.append(self._threads.submit(timed))
        return await asyncio.wrap_future(self._inside[-1])


class Batcher:
    """Reads photos and runs an engine on up to ``most`` of them at once; for one event loop.

    So many ``workers`` run a batch each, of what waits when they are free, in threads that share the engine and its
    weights. At most ``room`` photos are under way, each from its acceptance to its answer. ``latency`` is the target,
    in seconds, for an answer: a photo is accepted if half of it is likely to suffice, which leaves the rest to chance,
    and a batch is to take a quarter.
    """

    def __init__(
        self, engine: Engine, *, most: int = 16, room: int = 64, latency: float = math.inf, workers: int = 1
    ) -> None:
        self.engine, self.most, self.room, self.latency = engine, most, room, latency
        self.inside = 0
        self.done = 0
        self._pace = 0.05  # seconds a photo, of all workers together, a running mean
        self._jobs: deque[_Job] = deque()
        self._working: set[asyncio.Task[None]] = set()
        self._threads, self._workers = ThreadPoolExecutor(workers, "bla-engine"), workers
        self._began: dict[int, float] = {}
        """When each thread began with what the engine has not answered."""
        self.ran: Callable[[int, float], None] = lambda photos, seconds: None
        """Called after each batch."""

    def fault(self, patience: float) -> str | None:
        """Why the engine will not answer: its thread is dead, or has been busy with a batch for so many seconds."""
        if time.monotonic() - min([*self._began.values()], default=math.inf) > patience:
            return f"the engine has not answered for more than {patience:g} s"
        if self._threads._shutdown or not all(thread.is_alive() for thread in self._threads._threads):
            return "the engine's thread has ended"
        return None

    @property
    def wait(self) -> float:
        """The seconds after which what is under way is likely to be done."""
        return self._pace * self.inside

    @contextlib.contextmanager
    def admitted(self, photos: int) -> Iterator[None]:
        """Count so many photos as under way while inside; raises :class:`Busy` if there is no room, also for none."""
        after = self.inside + max(photos, 1)
        if after > self.room or (self.inside and self._pace * after > self.latency / 2):
            raise Busy(self.wait)
        self.inside += photos
        try:
            yield
        finally:
            self.inside -= photos

    async def run(
        self, read: Callable[[], Photo], *, size: int = 0, target: int = -1, masks: npt.NDArray[np.bool_] | None = None
    ) -> Answer:
        """A photo and its row of each output; raises what ``read`` raises, which is not called if cancelled before."""
        self._jobs.append(job := _Job(read, size, target, masks, asyncio.get_running_loop().create_future()))
        if len(self._working) < self._workers:
            self._working.add(worker := asyncio.create_task(self._work()))
            worker.add_done_callback(self._working.discard)
        return await job.future

    async def _work(self) -> None:
        while self._jobs:
            suffice = self.latency / 4 / (self._pace * self._workers)
            most = max(1, int(min(self.most, suffice)))
            batch = [self._jobs.popleft() for _ in range(min(most, len(self._jobs)))]
            # Photos with masks run one by one: their outputs differ in shape.
            plain = [job for job in batch if job.masks is None]
            for group in [plain, *([job] for job in batch if job.masks is not None)]:
                if group:
                    started = time.monotonic()
                    await self._run(group)
                    taken = time.monotonic() - started
                    self._pace += 0.1 * (taken / len(group) / max(1, len(self._working)) - self._pace)
                    self.ran(len(group), taken)

    async def _run(self, jobs: Sequence[_Job]) -> None:
        try:
            answers = await asyncio.wrap_future(self._threads.submit(self._answers, jobs))
        except Exception as error:  # whatever it is, every waiting request gets it
            answers = [error] * len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            if job.future.done():
                continue
            if isinstance(answer, Exception):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)
        self.done += sum(isinstance(answer, tuple) for answer in answers)

    def _answers(self, jobs: Sequence[_Job]) -> list[Answer | Exception]:
        """In a thread: read the photos and run the engine; an answer for each, or the reason why there is none."""
        found = [_read(job) for job in jobs]
        readable = [(job, photo) for job, photo in zip(jobs, found, strict=True) if isinstance(photo, Photo)]
        rows = iter(self._rows(readable)) if readable else iter(())
        return [(photo, next(rows)) if isinstance(photo, Photo) else photo for photo in found]

    def _rows(self, readable: Sequence[tuple[_Job, Photo]]) -> list[Outputs]:
        question: dict[str, Any] = {"masks": readable[0][0].masks}
        if any(job.size for job, _ in readable):
            question["sizes"] = [job.size for job, _ in readable]
        if any(job.target >= 0 for job, _ in readable):
            question["targets"] = [job.target for job, _ in readable]
        thread = threading.get_ident()
        self._began[thread] = time.monotonic()
        try:
            return self.engine.run(np.stack([photo.pixels for _, photo in readable]), **question).rows()
        finally:
            del self._began[thread]


def _read(job: _Job) -> Photo | Exception:
    if job.future.done():  # nobody waits for it any more
        return TimeoutError()
    try:
        return job.read()
    except Exception as error:  # this photo's alone
        return error
