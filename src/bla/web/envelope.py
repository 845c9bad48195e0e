"""What every answer has: an id, no guess of its type, and where a server asks for one, a token before it."""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("bla.web")


class Envelope:
    """ASGI middleware: gives each answer an id, which the log line of a fault has too.

    A request that says its length twice over is refused, and with a ``token`` one that does not hold it, as a bearer or
    as the password of any user; paths in ``public`` need none.
    """

    def __init__(self, app: ASGIApp, *, token: str | None = None, public: tuple[str, ...] = ()) -> None:
        self.app, self.token, self.public = app, token, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, begun = secrets.token_hex(8), False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"], headers["x-content-type-options"] = name, "nosniff"
            await send(message)

        headers = Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:
            refusal = JSONResponse({"error": "expected Content-Length or Transfer-Encoding, got both"}, 400)
            await refusal(scope, receive, sent)
        elif self.token is not None and scope["path"] not in self.public and not self._opens(headers):
            error = {"error": "expected the server's token, as a bearer or as a password, got none or another"}
            await JSONResponse(error, 401, {"www-authenticate": 'Basic realm="bla"'})(scope, receive, sent)
        else:
            try:
                await self.app(scope, receive, sent)
            except Exception as error:
                logger.error("%s %s %s: %r", name, scope["method"], scope["path"], error, exc_info=error)
                if begun:
                    raise
                await JSONResponse({"error": f"a fault of the server's, {name}"}, 500)(scope, receive, sent)

    def _opens(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("utf-8", "replace").partition(":")[2]
            except (binascii.Error, ValueError):
                given = ""
        return hmac.compare_digest(given.strip().encode("utf-8", "replace"), str(self.token).encode())
