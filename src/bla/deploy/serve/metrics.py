"""What a server counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bla.deploy.serve.batching import Batcher


class Metrics:
    """Requests by path and status, photos under way, batches, and the process's time and memory: of one server."""

    def __init__(self, batcher: Batcher) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        under_way = Gauge("bla_photos_under_way", "Photos accepted and not yet answered", registry=registry)
        under_way.set_function(lambda: batcher.inside)
        labels = ["path", "status"]
        self.requests = Histogram("bla_request_seconds", "Time of a request", labels, registry=registry)
        sizes = [2**power for power in range(8)]
        photos = Histogram("bla_batch_photos", "Photos in a batch", buckets=sizes, registry=registry)
        seconds = Histogram("bla_batch_seconds", "Time of a batch in the engine", registry=registry)

        def ran(count: int, taken: float) -> None:
            photos.observe(count)
            seconds.observe(taken)

        batcher.ran = ran

    def text(self) -> bytes:
        """All of it, in Prometheus's format."""
        return generate_latest(self._registry)


class Timed:
    """ASGI middleware: observes each request's time, by the path of its route and its status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), 0  # 0: the client went away

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            if scope["type"] == "http":
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, str(status)).observe(time.monotonic() - began)
