"""The researcher's side, behind the study's secret: counts, and files of what was collected."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Cookie, Depends, Request
from fastapi.responses import Response

from bla.study.site import Field, Instead, OfSite, Site, go, remember

SESSION = "bla_researcher"  # the cookie of the researcher's session
_HOURS = 8


def signed_in(site: OfSite, session: Annotated[str, Cookie(alias=SESSION)] = "") -> bool:
    """Whether the researcher asks."""
    until, _, signature = session.partition(".")
    genuine = site.keys.verifies("researcher", f"{until}:{site.keys.researcher}", signature)
    return genuine and until.isdigit() and int(until) > time.time()


SignedIn = Annotated[bool, Depends(signed_in)]


def only_the_researcher(researcher: SignedIn) -> None:
    """Send everyone else to the form."""
    if not researcher:
        raise Instead(go("/researcher"))


router = APIRouter(prefix="/researcher")
files = APIRouter(prefix="/researcher", dependencies=[Depends(only_the_researcher)])


@router.get("")
def overview(site: OfSite, researcher: SignedIn) -> Response:
    """How many took part; for others the form to sign in."""
    return site.page("researcher", counts=site.store.counts() if researcher else None, problem=None)


@router.post("")
def sign_in(request: Request, site: OfSite, secret: Field = "") -> Response:
    """Exchange the secret for a session."""
    site.refuse_forgery(request)
    site.limit(site.logins, request)
    if not site.keys.opens(secret):
        return site.page("researcher", 403, counts=None, problem="This is not the study's secret.")
    until = str(int(time.time()) + 3600 * _HOURS)
    signature = site.keys.signed("researcher", f"{until}:{site.keys.researcher}")
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
    """The registered plan."""
    return _file(site, "plan.json", site.plan.to_json().encode(), "application/json")


def _file(site: Site, name: str, content: bytes, kind: str) -> Response:
    word = "simulated-" if site.simulated else ""
    disposition = {"content-disposition": f'attachment; filename="{word}{name}"'}
    return Response(content, media_type=kind, headers=disposition)
