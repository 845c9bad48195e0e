"""A study's application on a port, by uvicorn; no address of a participant is written down."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from bla.study.errors import StudyError
from bla.web import connections


def configured(app: FastAPI, *, proxy: str | None = None) -> uvicorn.Config:
    """How uvicorn runs it; `proxy` is the address of the reverse proxy that may say whom it speaks for."""
    bounds = {"timeout_keep_alive": 30, "limit_concurrency": 2000, "h11_max_incomplete_event_size": 32 * 1024}
    return connections.configured(app, proxy_headers=proxy is not None, forwarded_allow_ips=proxy, **bounds)


def serve(app: FastAPI, server: socket.socket, *, proxy: str | None = None) -> None:
    """Serve until interrupted."""
    connections.run(configured(app, proxy=proxy), server)


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve in a thread at a free port of this machine; gives the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(configured(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise StudyError("expected the study's server to start, got one that ended: see its messages")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
