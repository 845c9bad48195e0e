"""Photos of many requests, run together, and a bound on the number of photos under way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.exceptions import HTTPException

from bla.data.photo import Photo
from bla.deploy.engine import Engine, Outputs

Result = TypeVar("Result")


class Busy(HTTPException):
    """The server is full: 429, or 503 to a request that it had accepted; and in how many seconds to try again."""

    def __init__(self, wait: float, status: int = 429) -> None:
        seconds = max(1, math.ceil(wait))
        super().__init__(status, f"busy; try again in {seconds} s", {"Retry-After": str(seconds)})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Job:
    photo: Photo
    size: int
    target: int
    masks: npt.NDArray[np.bool_] | None
    future: asyncio.Future[Outputs]


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
    """Runs an engine on up to ``most`` photos at once; for one event loop.

    So many ``workers`` run a batch each, in threads that share the engine and its weights. The first photo of a batch
    waits at most ``deadline`` seconds for others. At most ``room`` photos are under way, each from its acceptance,
    before it is decoded, to its answer, and no more than ``patience`` seconds suffice for.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        most: int = 16,
        deadline: float = 0.005,
        room: int = 64,
        patience: float = math.inf,
        workers: int = 1,
    ) -> None:
        self.engine, self.most, self.deadline, self.room, self.patience = engine, most, deadline, room, patience
        self.inside = 0
        self.done = 0
        self._pace = 0.05  # seconds a photo, a running mean
        self._jobs: list[_Job] = []
        self._full = asyncio.Event()
        self._workers: set[asyncio.Task[None]] = set()
        self._threads, self._most_workers = ThreadPoolExecutor(workers, "bla-engine"), workers
        self._began: dict[asyncio.Task[None] | None, float] = {}
        """When each worker began with what the engine has not answered."""
        self.ran: Callable[[int, float], None] = lambda photos, seconds: None
        """Called after each batch."""

    def fault(self, patience: float) -> str | None:
        """Why the engine will not answer: its thread is dead, or has been busy with a batch for so many seconds."""
        if time.monotonic() - min(self._began.values(), default=math.inf) > patience:
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
        if after > self.room or (self.inside and self._pace * after > self.patience):
            raise Busy(self.wait)
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
        self._jobs.append(_Job(photo, size, target, masks, future))
        if len(self._jobs) >= self.most:
            self._full.set()
        if len(self._workers) < self._most_workers:
            self._workers.add(worker := asyncio.create_task(self._work()))
            worker.add_done_callback(self._workers.discard)
        return await future

    async def _work(self) -> None:
        while self._jobs:
            self._full.clear()
            if len(self._jobs) < self.most:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self.deadline)
            batch, self._jobs = self._jobs[: self.most], self._jobs[self.most :]
            waiting = [job for job in batch if not job.future.cancelled()]
            # Photos with masks run one by one: their outputs differ in shape.
            plain = [job for job in waiting if job.masks is None]
            for group in [plain, *([job] for job in waiting if job.masks is not None)]:
                if group:
                    started = time.monotonic()
                    await self._run(group)
                    taken = time.monotonic() - started
                    self._pace += 0.1 * (taken / len(group) / max(1, len(self._workers)) - self._pace)
                    self.ran(len(group), taken)

    async def _run(self, jobs: Sequence[_Job]) -> None:
        question: dict[str, Any] = {"masks": jobs[0].masks}
        if any(job.size for job in jobs):
            question["sizes"] = [job.size for job in jobs]
        if any(job.target >= 0 for job in jobs):
            question["targets"] = [job.target for job in jobs]
        worker = asyncio.current_task()
        self._began[worker] = time.monotonic()
        try:
            photos = np.stack([job.photo.pixels for job in jobs])
            running = self._threads.submit(self.engine.run, photos, **question)
            rows = (await asyncio.wrap_future(running)).rows()
            for job, row in zip(jobs, rows, strict=True):
                if not job.future.done():
                    job.future.set_result(row)
        except Exception as error:  # whatever it is, every waiting request gets it
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)
            return
        finally:
            del self._began[worker]
        self.done += len(jobs)
