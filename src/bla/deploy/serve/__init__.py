"""A server of explanations over ONNX Runtime: an API, and a page to try it on."""

from __future__ import annotations

import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from bla import BlaError
from bla.deploy.engine import Engine
from bla.deploy.serve import documents, routes
from bla.deploy.serve.batching import Batcher, Busy, Lane
from bla.deploy.serve.metrics import Metrics, Timed
from bla.deploy.serve.requests import Bodies, Limits
from bla.web.envelope import Envelope

__all__ = ["Batcher", "Busy", "Limits", "application", "serve"]


def application(
    engine: Engine,
    *,
    limits: Limits | None = None,
    most: int = 16,
    room: int = 64,
    latency: float = math.inf,
    workers: int = 1,
    token: str | None = None,
    framed_by: str | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    Parameters
    ----------
    limits: what a request may hold, and how long it may take.
    most, room, latency, workers: as of :class:`bla.deploy.serve.batching.Batcher`; the target is at most the limit.
    token: what a request must hold (:class:`bla.web.envelope.Envelope`), except one for ``/healthz``.
    framed_by: a site, such as https://huggingface.co, that may show the page in a frame; by default none may.
    """
    if len(engine.transform.size) == 3 or engine.transform.channels > 4:
        raise BlaError(
            f"expected an explainer of photos, got one of arrays {engine.transform.shape}: explain these in Python"
        )
    if framed_by is not None and not re.fullmatch(r"https?://[\w.:*-]+", framed_by, re.ASCII):
        raise BlaError(f"expected a site such as https://huggingface.co, without a path, got {framed_by!r}")
    refusals = (HTTPException, RequestValidationError, TimeoutError, BlaError)
    app = FastAPI(
        title="bla: what a classifier looked at",
        version=engine.card.version,
        description=documents.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers=dict.fromkeys(refusals, routes.refused),
    )
    limits = limits or Limits()
    batcher = Batcher(engine, most=most, room=room, latency=min(latency, limits.seconds), workers=workers)
    metrics, bodies, heavy = Metrics(batcher), Bodies(8 * limits.bytes), Lane(2, 8, limits.seconds / 2)
    app.state.server = routes.Server(engine, limits, batcher, bodies, heavy, metrics, framed_by or "'none'")
    app.include_router(routes.router)
    app.add_middleware(Envelope, token=token, public=("/healthz",))
    app.add_middleware(Timed, metrics=metrics)
    return app


def serve(engine: Engine, listener: socket.socket, **settings: Any) -> None:
    """Serve on a socket until the process is signalled to stop; accepted requests are answered first.

    ``settings`` are those of :func:`application`. The engine has run once before the first answer.
    """
    from bla.web import connections

    engine.run(np.zeros((1, *engine.transform.size, engine.transform.channels), np.uint8))

    limits: Limits = settings.get("limits") or Limits()
    app = application(engine, **settings)
    bounds = {"timeout_keep_alive": 10, "h11_max_incomplete_event_size": 64 * 1024}
    config = connections.configured(app, timeout_graceful_shutdown=math.ceil(limits.seconds) + 1, **bounds)
    threading.Thread(target=_watch, args=(app.state.server,), daemon=True).start()
    connections.run(config, listener)


def _watch(server: routes.Server, pause: float = 5.0, end: Callable[[int], Any] = os._exit) -> None:
    """End the process when its engine no longer answers, so that whatever started it can start it again."""
    while (fault := server.fault) is None:
        time.sleep(pause)
    print(f"bla: {fault}: the server ends", file=sys.stderr, flush=True)
    end(1)
