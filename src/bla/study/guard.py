"""What stands before every request: bounds on size and rate, secure headers, the clock of the server's own time."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bla.study.errors import StudyError

LARGEST_BODY = 8 * 1024
LARGEST_HEADERS = 16 * 1024
Knows = Callable[[str], bool]
Refusal = Callable[[int, int], Response]

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), browsing-topics=()",
    "x-robots-tag": "noindex, nofollow",
}


def origin(connection: HTTPConnection) -> str:
    """Where a request comes from: an address, or of IPv6 the network of 2^64 that one connection is given.

    >>> [origin(HTTPConnection({"type": "http", "client": (host, 1)})) for host in ("10.0.0.9", "2001:db8::1:2")]
    ['10.0.0.9', '2001:db8::/64']
    """
    host = connection.client.host if connection.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.ip_network((address, 64), strict=False))


class Rate:
    """So many a second for each key, and so many at once; the keys least used are forgotten.

    >>> rate = Rate(1.0, 2, now=lambda: 0.0)
    >>> [rate.wait("a") for _ in range(3)], rate.wait("b")
    ([0.0, 0.0, 1.0], 0.0)
    """

    def __init__(self, a_second: float, at_once: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self.a_second, self.at_once, self._now = a_second, at_once, now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str) -> float:
        """Seconds to wait; 0 takes one."""
        now = self._now()
        left, then = self._buckets.pop(key, (float(self.at_once), now))
        left = min(self.at_once, left + (now - then) * self.a_second)
        taken = left >= 1
        self._buckets[key] = (left - 1 if taken else left), now
        if len(self._buckets) > 20_000:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1 - left) / self.a_second


@dataclass(frozen=True)
class Limits:
    """How much one visitor may ask for, and whether responses tell how long they took."""

    joins_a_minute: float = 60.0
    """New participants per minute from one address."""
    requests_a_second: float = 20.0
    """Requests per second of a participant; an address without one may make five times as many."""
    places_an_address: float = 0.5
    """Share of a study's places that unfinished participants of one address may hold; 1 for a study in one room."""
    timing: bool = False
    """Report processing times in the header Server-Timing."""

    def __post_init__(self) -> None:
        for name in ("joins_a_minute", "requests_a_second"):
            if not 0 < (value := getattr(self, name)) <= 1e6:
                raise StudyError(f"expected {name} above 0, at most a million, got {value}")
        if not 0 < self.places_an_address <= 1:
            raise StudyError(f"expected places_an_address above 0, at most 1, got {self.places_an_address}")


class Guard:
    """ASGI middleware around the study's application.

    `knows` says whether we signed a cookie's token: its holder has a separate limit, so that a class behind one address
    does not block itself. `refusal` makes the page of a refused request from its status and the seconds to wait.
    """

    def __init__(self, app: ASGIApp, *, cookie: str, knows: Knows, refusal: Refusal, limits: Limits) -> None:
        self.app, self.cookie, self.knows, self.refusal, self.timing = app, cookie, knows, refusal, limits.timing
        a_second = limits.requests_a_second
        self.people, self.addresses = Rate(a_second, int(10 * a_second)), Rate(5 * a_second, int(50 * a_second))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                static = scope["path"].startswith("/static/") and message["status"] < 400
                headers.setdefault("cache-control", "public, max-age=3600" if static else "no-store")
                if self.timing:
                    headers["server-timing"] = f"app;dur={1000 * (time.perf_counter() - began):.2f}"
            await send(message)

        connection = HTTPConnection(scope)
        headers = connection.headers
        length = headers.get("content-length", "0")
        token = connection.cookies.get(self.cookie, "")
        wait = self.people.wait(token) if self.knows(token) else self.addresses.wait(origin(connection))
        if sum(len(name) + len(value) for name, value in scope["headers"]) > LARGEST_HEADERS:
            await self.refusal(431, 0)(scope, receive, sent)
        elif wait:
            await self.refusal(429, int(wait) + 1)(scope, receive, sent)
        elif "transfer-encoding" in headers or not length.isdigit() or int(length) > LARGEST_BODY:
            # The server reads no more than was announced; a browser announces the length of every form.
            await self.refusal(413, 0)(scope, receive, sent)
        else:
            await self.app(scope, receive, sent)
