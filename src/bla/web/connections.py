"""uvicorn with bounds on connections: how many there are, and how long each may take to send its head."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import sys
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""Within which a connection must send a request's head."""
BODY_SECONDS = 10.0
"""Within which it must send more of the body."""
SPARE = 128
"""Descriptors for everything else than connections."""


def bounded(most: int, seconds: float = HEAD_SECONDS) -> type[H11Protocol]:
    """A protocol of at most so many connections at once.

    When there are more, the one that has waited longest for a head is closed, or one that is kept alive: a client that
    sends its head at once is never turned away by others that do not.
    """
    waiting: dict[H11Protocol, asyncio.TimerHandle] = {}

    class Bounded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_a_head()
            if len(self.connections) > most:
                first = next(iter(waiting))
                if first is self:  # no other waits for a head; one may be kept alive for nothing
                    kept = (each for each in self.connections if getattr(each, "timeout_keep_alive_task", None))
                    first = next(kept, self)  # type: ignore[assignment]
                first.close_now()  # type: ignore[attr-defined]

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._expect_a_head()
            else:
                self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def close_now(self) -> None:
            self._forget()
            self.connections.discard(self)
            self.transport.abort()

        def _expect_a_head(self) -> None:
            if self not in waiting:
                waiting[self] = self.loop.call_later(seconds, self.close_now)

        def _forget(self) -> None:
            if (timer := waiting.pop(self, None)) is not None:
                timer.cancel()

    return Bounded


class Patience:
    """ASGI middleware: a body of which nothing more comes for so long counts as one whose client has gone."""

    def __init__(self, app: ASGIApp, seconds: float = BODY_SECONDS) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended = False

        async def received() -> Message:
            nonlocal ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout(self.seconds):
                    message = await receive()
            except TimeoutError:
                message = {"type": "http.disconnect"}
            ended = not message.get("more_body", False)
            return message

        await self.app(scope, received if scope["type"] == "http" else receive, send)


def configured(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """How uvicorn runs an application; of what clients do wrong nothing is logged, so that they cannot fill a disk."""
    protocol = bounded(max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE))
    fixed: dict[str, Any] = {"http": protocol, "ws": "none", "log_level": "error", "access_log": False}
    fixed["backlog"] = SPARE // 2  # so many are accepted before the first of them is counted
    return uvicorn.Config(Patience(app), server_header=False, **fixed, **settings)


def run(config: uvicorn.Config, listener: socket.socket) -> None:
    """Serve until a signal; SIGTERM then exits as SIGINT does, through every block that closes something."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.Server(config).run(sockets=[listener])
