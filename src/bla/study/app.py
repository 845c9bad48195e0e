"""The study as a web application: server-rendered pages and forms; all state is in the store and a cookie."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from bla.study import participation, researcher
from bla.study.errors import StudyError
from bla.study.guard import Guard, Limits
from bla.study.site import TOKEN, Instead, OfSite, Site
from bla.study.store import Store

logger = logging.getLogger("bla.study")
router = APIRouter()


@router.get("/favicon.ico")
def icon() -> Response:
    return Response(status_code=204, headers={"cache-control": "public, max-age=86400"})


@router.get("/health")
def health(site: OfSite) -> Response:
    """Whether an answer can be stored now."""
    try:
        site.store.check()
    except StudyError as error:
        return Response(f"{error}\n", 503, media_type="text/plain")
    return Response("ok\n", media_type="text/plain")


async def failed(request: Request, error: Any) -> Response:
    """What a participant sees of an address that leads nowhere, a form that cannot be read, a fault of ours."""
    site: Site = request.app.state.site
    match error:
        case Instead():
            return error.response
        case HTTPException():
            return site.message(error.status_code, "error.unknown")
        case RequestValidationError():
            return site.message(422, "error.answer")
        case SQLAlchemyError():  # a full disk, say: one line, which may stand on that disk too
            logger.error("%s %s: %s", request.method, request.url.path, " ".join(str(error).split("\n")[0].split()))
            return site.message(503, "error.fault")
    return site.message(500, "error.fault")


def create_app(
    study: Path, store: Store, *, simulated: bool = False, limits: Limits | None = None, address: str = ""
) -> FastAPI:
    """The application of a study's folder; StudyError unless the store is empty or holds answers to the same study."""
    limits = limits or Limits()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site = site = Site.opened(study, store, simulated=simulated, limits=limits, address=address)
    for routes in (participation.router, researcher.router, researcher.files, router):
        app.include_router(routes)
    app.mount("/static", StaticFiles(packages=[("bla.study", "static")]))
    for error in (Instead, HTTPException, RequestValidationError, SQLAlchemyError, Exception):
        app.add_exception_handler(error, failed)
    app.add_middleware(Guard, cookie=TOKEN, knows=site.knows, refusal=site.refusal, limits=limits)
    return app
