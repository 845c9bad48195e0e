"""A server of explanations over ONNX Runtime: an API, and a page to try it on."""

from __future__ import annotations

import math
import socket
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from bla import BlaError
from bla.deploy.engine import Engine
from bla.deploy.serve import documents, routes
from bla.deploy.serve.batching import Batcher, Busy
from bla.deploy.serve.requests import Bodies, Limits

__all__ = ["Batcher", "Busy", "Limits", "application", "serve"]


def application(
    engine: Engine, *, limits: Limits | None = None, most: int = 16, deadline: float = 0.005, room: int = 64
) -> FastAPI:
    """The server as an ASGI application.

    Parameters
    ----------
    limits: what a request may hold, and how long it may take.
    most, deadline, room: as of :class:`bla.deploy.serve.batching.Batcher`.
    """
    app = FastAPI(
        title="bla: what a classifier looked at",
        version=engine.card.version,
        description=documents.DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers=dict.fromkeys(
            (HTTPException, RequestValidationError, TimeoutError, BlaError), routes.refused
        ),
    )
    batcher = Batcher(engine, most=most, deadline=deadline, room=room)
    limits = limits or Limits()
    app.state.server = routes.Server(engine, limits, batcher, Bodies(8 * limits.bytes))
    app.include_router(routes.router)
    return app


def serve(engine: Engine, listener: socket.socket, **settings: Any) -> None:
    """Serve on a socket until the process is signalled to stop; accepted requests are answered first.

    ``settings`` are those of :func:`application`.
    """
    import uvicorn

    limits: Limits = settings.get("limits") or Limits()
    config = uvicorn.Config(
        application(engine, **settings),
        log_level="warning",
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=math.ceil(limits.seconds) + 1,
        h11_max_incomplete_event_size=64 * 1024,
    )
    uvicorn.Server(config).run(sockets=[listener])
