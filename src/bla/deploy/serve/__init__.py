"""A server of explanations over ONNX Runtime: an API, and a page to try it on."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from bla.data.photo import DataError, Photo, open_photo
from bla.deploy.engine import Engine
from bla.deploy.serve import documents
from bla.deploy.serve.batching import Batcher, Busy
from bla.deploy.serve.requests import Limits, Refused, Sent, decoded, masks_of, received
from bla.explanations.explanation import Explanation, Unexplained
from bla.explanations.render import panel

__all__ = ["Batcher", "Busy", "Limits", "application", "serve"]

PAGE = Path(__file__).with_name("page.html")
# The page is one file: nothing else is loaded, from here or elsewhere, and it is shown in no frame.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def application(
    engine: Engine, *, limits: Limits | None = None, most: int = 16, deadline: float = 0.005, room: int = 64
) -> FastAPI:
    """The server as an ASGI application.

    Parameters
    ----------
    limits: what a request may hold, and how long it may take.
    most, deadline, room: as of :class:`bla.deploy.serve.batching.Batcher`.
    """
    limits = limits or Limits()
    batcher = Batcher(engine, most=most, deadline=deadline, room=room)
    pool = ThreadPoolExecutor(thread_name_prefix="bla-photos")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)  # requests under way have been answered before
        pool.shutdown()

    app = FastAPI(
        title="bla: what a classifier looked at", version=engine.card.version, lifespan=lifespan, redoc_url=None,
        docs_url=None, description=documents.DESCRIPTION,
    )  # fmt: skip
    app.state.batcher = batcher

    async def in_pool(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)

    async def answered(work: Awaitable[Response]) -> Response:
        try:
            async with asyncio.timeout(limits.seconds):
                return await work
        except TimeoutError:
            return _error(504, f"expected an answer within {limits.seconds:g} s, got none; try again later")
        except Busy as busy:
            return _error(429, str(busy), {"Retry-After": str(busy.seconds)})
        except Refused as refused:
            return _error(refused.status, refused.reason)

    async def explained(request: Request, size: int | None, target: str | None, form: str | None) -> Response:
        asked = _size(engine, size), _target(engine, target)
        picture = form == "png" or (form is None and _prefers_png(request.headers.get("accept", "")))
        with ExitStack() as places:
            places.enter_context(batcher.admitted(1))  # before the body is read: memory is bounded by the room
            sent = await received(request, limits)
            places.enter_context(batcher.admitted(len(sent.photos) - 1))
            if picture and len(sent.photos) > 1:
                raise Refused(422, f"expected one photo for a picture, got {len(sent.photos)}; ask for JSON")
            results = await asyncio.gather(*(explain(name, content, *asked) for name, content in sent.photos))
            failed = [result for result in results if isinstance(result, Unexplained)]
            if len(failed) == len(results):
                raise Refused(422, "; ".join(result.error for result in failed))
            if picture:
                return Response(await in_pool(_panel, sent.photos[0][1], results[0]), media_type="image/png")
        return JSONResponse({"explanations": [result.to_dict() for result in results]})

    async def explain(name: str, content: bytes, size: int, target: int) -> Explanation | Unexplained:
        try:
            photo: Photo = await in_pool(decoded, name, content, engine.transform, limits)
        except DataError as error:
            return Unexplained(name, str(error))
        return engine.explanation(name, photo, await batcher.run(photo, size=size, target=target))

    async def asked_about(request: Request) -> Response:
        with batcher.admitted(1):
            sent: Sent = await received(request, limits)
            if len(sent.photos) != 1 or "masks" not in sent.fields:
                raise Refused(422, f"expected one photo and masks, got {len(sent.photos)} photos")
            masks = masks_of(sent.fields["masks"], engine.grid, limits)
            try:
                photo = await in_pool(decoded, *sent.photos[0], engine.transform, limits)
            except DataError as error:
                raise Refused(422, str(error)) from None
            outputs = await batcher.run(photo, masks=masks)
        answers = []
        for mask, logits in zip(masks, outputs.answers, strict=True):
            top = [{"index": p.index, "label": p.label, "probability": p.probability} for p in engine.top(logits)]
            answers.append({"size": int(mask.sum()), "prediction": top[0], "top": top})
        return JSONResponse({"answers": answers})

    @app.post("/v1/explain", **documents.EXPLAIN)
    async def _explain(
        request: Request,
        size: Annotated[int | None, Query(description=documents.SIZE, ge=1)] = None,
        target: Annotated[str | None, Query(description=documents.TARGET, max_length=200)] = None,
        format: Annotated[Literal["json", "png"] | None, Query(description=documents.FORMAT)] = None,
    ) -> Response:
        return await answered(explained(request, size, target, format))

    @app.post("/v1/answers", **documents.ANSWERS)
    async def _answers(request: Request) -> Response:
        return await answered(asked_about(request))

    @app.get("/v1/explainer", **documents.EXPLAINER)
    async def _explainer() -> dict[str, Any]:
        card = engine.card
        return {
            "model": card.model, "setup": card.setup, "classes": list(card.classes), "grid": list(card.grid),
            "sizes": card.sizes, "targets": card.targets, "version": card.version,
            "limits": {"bytes": limits.bytes, "photos": limits.photos, "pixels": limits.pixels},
        }  # fmt: skip

    @app.get("/healthz", **documents.HEALTH)
    async def _health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.inside, "explained": batcher.done}

    @app.get("/", include_in_schema=False)
    async def _page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return _error(422, f"{place}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail), dict(error.headers or {}))

    return app


def serve(engine: Engine, *, host: str = "127.0.0.1", port: int = 8000, **settings: Any) -> None:
    """Serve until a signal to stop; what was accepted is answered first. ``settings`` are :func:`application`'s."""
    import uvicorn

    limits: Limits = settings.get("limits") or Limits()
    uvicorn.run(
        application(engine, **settings),
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=math.ceil(limits.seconds) + 1,
        h11_max_incomplete_event_size=64 * 1024,
    )


def _error(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    # a lone surrogate of the request must not break its answer
    return JSONResponse({"error": reason.encode("utf-8", "replace").decode()}, status, headers)


def _prefers_png(accept: str) -> bool:
    kinds = [part.split(";")[0].strip() for part in accept.split(",")]
    return "image/png" in kinds and "application/json" not in kinds


def _size(engine: Engine, size: int | None) -> int:
    if size is not None and not engine.card.sizes:
        raise Refused(422, f"expected no size for {engine.card.setup}, got {size}: its size is fixed")
    if size is not None and size > engine.card.cells:
        raise Refused(422, f"expected a size from 1 to {engine.card.cells}, got {size}")
    return size or 0


def _target(engine: Engine, target: str | None) -> int:
    if target is None:
        return -1
    if not engine.card.targets:
        raise Refused(422, f"expected no target for {engine.card.setup}, got {target[:80]!r}: it is not class-aware")
    if target in engine.classes:
        return engine.classes.index(target)
    if target.isascii() and target.isdecimal() and int(target) < len(engine.classes):
        return int(target)
    raise Refused(422, f"expected the name or index of one of {len(engine.classes)} classes, got {target[:80]!r}")


def _panel(content: bytes, explanation: Explanation) -> bytes:
    file = io.BytesIO()
    panel(open_photo(content), explanation).save(file, "PNG", compress_level=3)
    return file.getvalue()
