"""The server's routes: explanations, answers for other subsets, what is served, health, the page."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from bla.data.photo import DataError, Photo
from bla.deploy import apart
from bla.deploy.engine import Engine, Outputs
from bla.deploy.page import PAGE
from bla.deploy.pictures import picture
from bla.deploy.serve import documents
from bla.deploy.serve.batching import Batcher, Busy, Lane
from bla.deploy.serve.metrics import Metrics
from bla.deploy.serve.reference import as_html
from bla.deploy.serve.requests import Bodies, Limits, masks_of, received
from bla.explanations.explanation import Explanation, Prediction, Unexplained, likeliest

# The page is one file: it loads nothing else, from here or elsewhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors "
)
router = APIRouter()


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """What the routes share."""

    engine: Engine
    limits: Limits
    batcher: Batcher
    bodies: Bodies
    heavy: Lane
    metrics: Metrics
    framed_by: str  # the site that may show the page in a frame, or 'none'

    @property
    def fault(self) -> str | None:
        """Why the server can answer no more."""
        return self.batcher.fault(2 * self.limits.seconds)

    async def asked(self, name: str, content: bytes, **question: Any) -> tuple[Photo, Outputs]:
        """A photo and what the engine says of it; raises DataError where it cannot be read, or has too many pixels."""
        transform, limits = self.engine.transform, self.limits

        def light() -> Photo:
            if apart.heavy(content):
                raise apart.Heavy
            return transform.read(content, name=name, most_pixels=limits.pixels)

        def elsewhere() -> Photo:
            return apart.read(transform, content, name=name, most_pixels=limits.pixels, seconds=limits.seconds)

        try:
            return await self.batcher.run(light, **question)
        except apart.Heavy:
            photo = await self.heavy.run(elsewhere)
            return await self.batcher.run(lambda: photo, **question)

    async def drawn(self, content: bytes, explanation: Explanation) -> bytes:
        """The picture of an explained photo, made in another thread, or where it is heavy in another process."""

        def light() -> bytes | None:
            return None if apart.heavy(content, whole=True) else picture(content, explanation)

        elsewhere = functools.partial(apart.drawn, content, explanation, seconds=self.limits.seconds)
        made = await asyncio.to_thread(light)
        return await self.heavy.run(elsewhere) if made is None else made

    async def explain(
        self, name: str, content: bytes, size: int, target: int, fill: str | None
    ) -> Explanation | Unexplained:
        """Read and explain one photo, and with a ``fill`` check the explanation."""
        try:
            photo, found = await self.asked(name, content, size=size, target=target)
        except DataError as error:
            return Unexplained(name, str(error))
        masked = list[tuple[Photo, Outputs]]()
        if fill is not None:
            pair = self.engine.masked_photos(photo.pixels[None], found.selected[None], fill)
            reads = (functools.partial(dataclasses.replace, photo, pixels=pixels) for (pixels,) in pair)
            masked = await asyncio.gather(*map(self.batcher.run, reads))
        return self.engine.explanation(name, photo, found, *(outputs for _, outputs in masked), fill=fill)


async def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


Shared = Annotated[Server, Depends(_server)]


@router.post("/v1/explain", **documents.EXPLAIN)
async def explain(
    request: Request,
    server: Shared,
    *,
    size: Annotated[int | None, Query(description=documents.SIZE, ge=1)] = None,
    target: Annotated[str | None, Query(description=documents.TARGET, max_length=200)] = None,
    check: Annotated[bool, Query(description=documents.CHECK)] = False,
    fill: Annotated[Literal["coarse", "blur", "mean", "grey"], Query(description=documents.FILL)] = "coarse",
    format: Annotated[Literal["json", "png"] | None, Query(description=documents.FORMAT)] = None,
) -> Response:
    """Explain one photo or many."""
    card = server.engine.card
    cells = 0 if size is None else card.checked_size(size)
    about = -1 if target is None else card.class_index(target)
    question = (cells, about, fill if check else None)
    accepted = {part.partition(";")[0].strip() for part in request.headers.get("accept", "").split(",")}
    drawn = format == "png" if format else "image/png" in accepted and "application/json" not in accepted
    async with asyncio.timeout(server.limits.seconds):
        with server.batcher.admitted(0):  # a full server reads no body
            pass
        async with received(request, server.limits, server.bodies, card, documents.Photos) as (photos, _):
            if drawn and len(photos) > 1:
                raise HTTPException(422, f"expected one photo for a picture, got {len(photos)}; ask for JSON")
            with server.batcher.admitted(len(photos)):
                asked = (server.explain(name, content, *question) for name, content in photos)
                results = await asyncio.gather(*asked)
            explained = [result for result in results if isinstance(result, Explanation)]
            if not explained:
                raise HTTPException(422, "; ".join(getattr(result, "error", "") for result in results))
            if drawn:
                return Response(await server.drawn(photos[0][1], explained[0]), media_type="image/png")
    answer = msgspec.json.encode({"explanations": [result.to_dict() for result in results]})
    return Response(answer, media_type="application/json")


@router.post("/v1/answers", **documents.ANSWERS)
async def answers(
    request: Request,
    server: Shared,
    *,
    target: Annotated[str | None, Query(description=documents.PROBABILITY, max_length=200)] = None,
) -> Response:
    """Say what the head predicts from other subsets of one photo's cells."""
    engine, limits = server.engine, server.limits
    about = None if target is None else engine.card.index_of(target)
    async with asyncio.timeout(limits.seconds):
        with server.batcher.admitted(0):
            pass
        async with received(request, limits, server.bodies, engine.card, documents.PhotosAndMasks) as (photos, masks):
            if len(photos) != 1 or masks is None:
                raise HTTPException(422, f"expected one photo and masks, got {len(photos)} photos")
            subsets = masks_of(masks, engine.card, limits)
            with server.batcher.admitted(1):
                _, outputs = await server.asked(*photos[0], masks=subsets)
    found = []
    for subset, logits in zip(subsets, outputs.answers, strict=True):
        probabilities = engine.probabilities(logits)
        kind = {"several_labels": engine.card.several_labels, "regression": engine.card.regression}
        guesses = likeliest(probabilities, engine.classes, **kind)
        top = [dataclasses.asdict(guess) for guess in guesses]
        answer = {"size": int(subset.sum()), "prediction": top[0], "top": top}
        if about is not None:
            asked = Prediction(about, engine.classes[about], float(probabilities[about]))
            answer["target"] = dataclasses.asdict(asked)
        found.append(answer)
    return JSONResponse({"answers": found})


@router.get("/v1/explainer")
async def explainer(server: Shared) -> dict[str, Any]:
    """What is served: the model, its classes and grid, and the limits."""
    card, limits = server.engine.card, server.limits
    return {
        "model": card.model, "setup": card.setup, "classes": list(card.classes), "grid": list(card.grid),
        "sizes": card.sizes, "targets": card.targets, "version": card.version, "note": card.note,
        "limits": {"bytes": limits.bytes, "photos": limits.photos, "pixels": limits.pixels},
    }  # fmt: skip


@router.get("/healthz", responses={503: {"description": "The engine no longer answers", "model": documents.Error}})
async def health(server: Shared) -> dict[str, Any]:
    """Whether the engine works, how many photos are under way, and how many it has explained."""
    if (fault := server.fault) is not None:
        raise HTTPException(503, fault)
    return {"status": "ok", "waiting": server.batcher.inside, "explained": server.batcher.done}


@router.get("/metrics", include_in_schema=False)
async def metrics(server: Shared) -> Response:
    """Say what the server counts, to Prometheus."""
    return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def page(server: Shared) -> HTMLResponse:
    """Show the page that explains a photo in the browser."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY + server.framed_by})


@router.get("/docs", include_in_schema=False)
async def reference(request: Request, server: Shared) -> HTMLResponse:
    """Show the API's reference."""
    policy = {"Content-Security-Policy": POLICY + server.framed_by}
    return HTMLResponse(as_html(request.app.openapi()), headers=policy)


async def refused(request: Request, error: Exception) -> Response:
    """Answer with the reason: a refusal, a value out of range, a photo that cannot be read, no answer in time."""
    status, reason, headers = 422, str(error), None
    if isinstance(error, TimeoutError):
        error = Busy((await _server(request)).batcher.wait, 503)
    match error:
        case HTTPException():
            status, reason, headers = error.status_code, error.detail, error.headers
        case RequestValidationError():
            first = error.errors()[0]
            reason = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    # A lone surrogate in the request must not break the answer.
    return JSONResponse({"error": reason.encode("utf-8", "replace").decode()}, status, headers)
