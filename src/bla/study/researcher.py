"""The researcher's side, behind the study's secret: counts, and files of what was collected."""

from __future__ import annotations

import secrets
import time
from typing import Annotated

from fastapi import APIRouter, Cookie, Depends, Request
from fastapi.responses import Response

from bla.study.guard import origin
from bla.study.site import Field, Instead, OfSite, Site, go, remember

SESSION = "bla_researcher"  # the cookie of the researcher's session
VISIT = "bla_visit"  # the cookie of one who has seen the form
Visit = Annotated[str, Cookie(alias=VISIT)]
_HOURS = 8


def signed_in(site: OfSite, session: Annotated[str, Cookie(alias=SESSION)] = "") -> bool:
    until, _, signature = session.partition(".")
    if not (until.isascii() and until.isdigit() and len(until) < 20 and int(until) > time.time()):
        return False
    return site.keys.verifies("researcher", f"{until}:{site.secrets.researcher_sha256}", signature)


SignedIn = Annotated[bool, Depends(signed_in)]


def only_the_researcher(researcher: SignedIn) -> None:
    """Send everyone else to the form."""
    if not researcher:
        raise Instead(go("/researcher"))


router = APIRouter(prefix="/researcher")
files = APIRouter(prefix="/researcher", dependencies=[Depends(only_the_researcher)])


@router.get("")
def overview(request: Request, site: OfSite, researcher: SignedIn, visit: Visit = "") -> Response:
    """How many took part; for others the form to sign in."""
    response = site.page("researcher", counts=site.store.counts() if researcher else None, problem=None)
    if not researcher and not _known(site, visit):
        name = secrets.token_urlsafe(16)
        remember(response, request, VISIT, f"{name}.{site.keys.signed('visit', name)}", 1)
    return response


def _known(site: Site, visit: str) -> bool:
    name, _, signature = visit.partition(".")
    return site.keys.verifies("visit", name, signature)


@router.post("")
def sign_in(request: Request, site: OfSite, secret: Field = "", visit: Visit = "") -> Response:
    """Exchange the secret for a session."""
    site.refuse_forgery(request)
    # one who fails locks out this visit, and not everyone behind the same proxy
    site.limit(site.logins, visit if _known(site, visit) else origin(request))
    keys = site.secrets
    if not keys.opens(secret):
        return site.page("researcher", 403, counts=None, problem="This is not the study's secret.")
    until = str(int(time.time()) + 3600 * _HOURS)
    signature = site.keys.signed("researcher", f"{until}:{keys.researcher_sha256}")
    response = go("/researcher")
    remember(response, request, SESSION, f"{until}.{signature}", _HOURS)
    return response


@files.get("/responses.zip")
def responses(site: OfSite) -> Response:
    """Everything collected: tables, codebook, JSON."""
    return _file(site, "responses.zip", site.store.collected(site.plan).archive(), "application/zip")


@files.get("/codes.csv")
def codes(site: OfSite) -> Response:
    """The completion codes of those who finished, in alphabetical order: they lead to nobody's answers."""
    people = site.store.collected(site.plan).participants
    found = sorted(site.keys.completion_code(person.participant) for person in people if person.finished)
    return _file(site, "codes.csv", "\n".join(["code", *found, ""]).encode(), "text/csv")


@files.get("/plan.json")
def plan(site: OfSite) -> Response:
    return _file(site, "plan.json", site.plan.to_json().encode(), "application/json")


def _file(site: Site, name: str, content: bytes, kind: str) -> Response:
    word = "simulated-" if site.simulated else ""
    disposition = {"content-disposition": f'attachment; filename="{word}{name}"'}
    return Response(content, media_type=kind, headers=disposition)
