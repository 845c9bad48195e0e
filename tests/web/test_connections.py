"""Connections over sockets of this machine: idle, slow and many ones, and good ones among them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from bla.web.connections import Patience, bounded

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HEAD = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body, or 0 if its client has gone."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
        length = 0 if message["type"] == "http.disconnect" else length
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
    await send({"type": "http.response.body", "body": b"%03d" % length})


def served(clients: Callable[[Callable[[], Awaitable[Client]]], Awaitable[None]], *, most: int = 100) -> None:
    """Serve while clients talk to it; heads must come within 0.2 s, more of a body within 0.2 s."""

    async def both() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            Patience(echo, 0.2), http=bounded(most, 0.2), lifespan="off", log_config=None, timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.001)
        everyone: list[Client] = []

        async def opened() -> Client:
            everyone.append(await asyncio.open_connection(*listener.getsockname()))
            return everyone[-1]

        try:
            await clients(opened)
        finally:
            for _, writer in everyone:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
            server.should_exit = True
            await serving

    asyncio.run(both())


async def said(client: Client, text: bytes) -> bytes:
    client[1].write(text)
    await client[0].readuntil(b"\r\n\r\n")
    return await client[0].readexactly(3)


def test_idle_and_slow_heads_are_closed_and_good_ones_are_answered() -> None:
    async def clients(opened: Callable[[], Awaitable[Client]]) -> None:
        idle, slow, good = [await opened() for _ in range(3)]
        slow[1].write(HEAD[:10])
        for _ in range(3):
            assert await said(good, HEAD) == b"000"
        for client in (idle, slow):
            with contextlib.suppress(ConnectionError):
                assert await client[0].read() == b""

    served(clients)


def test_many_idle_connections_give_way() -> None:
    async def clients(opened: Callable[[], Awaitable[Client]]) -> None:
        idle = [await opened() for _ in range(30)]
        for _ in range(12):
            assert await said(await opened(), HEAD) == b"000"
        with contextlib.suppress(ConnectionError):
            assert await idle[0][0].read() == b"", "the oldest goes first"

    served(clients, most=10)


def test_a_body_that_stops_coming_counts_as_gone() -> None:
    async def clients(opened: Callable[[], Awaitable[Client]]) -> None:
        post = HEAD.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\ncontent-length: 9\r\n\r\n")
        assert await said(await opened(), post + b"123456789") == b"009"
        assert await said(await opened(), post + b"1234") == b"000"

    served(clients)
