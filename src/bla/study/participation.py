"""A participation: consent, instructions, trials and answers, pause, withdrawal, the end.

A participant's token is in a cookie and in the personal link; it carries our signature, and the store knows its hash.
Forms carry a signature over the token, so that other sites cannot forge them. A trial's form also carries, signed, the
time at which the page was made: response times without JavaScript then need no writing when a page is shown.
"""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Cookie, Form, Request
from fastapi.responses import HTMLResponse, Response

from bla.study.errors import StudyError
from bla.study.guard import origin
from bla.study.site import TOKEN, Field, OfSite, Sender, Site, Token, Visitor, go, remember
from bla.study.store import Person, now_ms

router = APIRouter()

NONCE = "bla_consent"  # the cookie of the consent page's nonce
Nonce = Annotated[str, Cookie(alias=NONCE)]
Number = Annotated[int, Form()]


@router.get("/")
def consent(request: Request, site: OfSite, token: Token = "") -> Response:
    """What the study is, and the form that begins it."""
    nonce = secrets.token_urlsafe(16)
    link = "/trial" if site.person(token) else None
    signature = site.keys.signed("csrf", nonce)
    response = site.page("consent", nonce=nonce, signature=signature, problem=None, link=link)
    remember(response, request, NONCE, nonce, hours=8)
    return response


@router.post("/begin")
def begin(
    request: Request, site: OfSite, *, nonce: Field = "", signature: Field = "", agree: Field = "", given: Nonce = ""
) -> Response:
    """Take part: a new participant, unless this form was sent before."""
    if not nonce or not secrets.compare_digest(nonce.encode(), given.encode()):
        return site.message(403, "error.expired")
    site.refuse_forgery(request, nonce, signature)
    if agree != "yes":
        problem = site.texts["consent.must_agree"]
        return site.page("consent", 422, nonce=nonce, signature=signature, problem=problem, link=None)
    # The token follows from the page's nonce: the same form sent twice is the same person.
    token = nonce + site.keys.signed("token", nonce)
    if site.store.person(token) is None:
        site.limit(site.joins, origin(request))
        if site.join(request, token) is None:
            heading, text = site.texts["consent.title"], site.texts["consent.full"]
            return site.page("message", 403, heading=heading, text=text, home=False)
    return _remembered(request, token, "/instructions")


@router.get("/p/{token}")
def come_back(request: Request, site: OfSite, token: str, own: Token = "") -> Response:
    """The personal link: continue with the next trial, on any device that has not begun a participation of its own."""
    if site.person(token) is None:
        return site.message(404, "error.unknown")
    if own != token and (person := site.person(own)) is not None and not (person.finished or person.withdrawn):
        return go("/trial")  # a link that somebody sent must not exchange the participant
    return _remembered(request, token, "/trial")


def _remembered(request: Request, token: str, address: str) -> Response:
    response = go(address)
    remember(response, request, TOKEN, token, hours=28 * 24)
    return response


def _link(request: Request, site: Site, person: Person) -> str:
    path = request.app.url_path_for("come_back", token=person.token)
    return str(path.make_absolute_url(site.address)) if site.address else str(path)


@router.get("/instructions")
def instructions(request: Request, site: OfSite, person: Visitor) -> Response:
    """How it works, and the personal link."""
    return site.page("instructions", link=_link(request, site, person))


@router.get("/trial")
def trial(site: OfSite, person: Visitor) -> Response:
    """The first trial without an answer."""
    if person.withdrawn or person.finished:
        return go("/end")
    if person.next is None:
        raise StudyError(f"expected trial {person.done + 1} of a participant in the store, got none")
    feedback = None
    if 0 < person.done <= len(site.plan.practice):
        feedback = site.pages.feedback(site.store.trial(person, person.done), site.store.answered(person, person.done))
    sent = now_ms()
    signature = site.keys.signed("sent", f"{person.token}:{person.done + 1}:{sent}")
    hidden = {"sent": sent, "signature": signature, "csrf": site.keys.signed("csrf", person.token)}
    return HTMLResponse(site.pages.trial(person.next, person.done + 1, person.trials, feedback, **hidden))


@router.post("/answer")
def answer(
    site: OfSite,
    person: Sender,
    *,
    position: Number = 0,
    sent: Number = 0,
    choice: Field = "",
    signature: Field = "",
    ms: Field = "",
) -> Response:
    """Store an answer; one that was stored before stays. `ms` is the time that the browser measured, if it did."""
    if person.withdrawn:
        return go("/end")
    if not site.keys.verifies("sent", f"{person.token}:{position}:{sent}", signature):
        return site.message(403, "error.expired")
    shown = site.store.trial(person, position)
    if shown is None or choice not in map(str, range(len(shown.options))):
        return site.message(422, "error.answer")
    elapsed = max(0, now_ms() - sent)
    # No browser can have measured more than has passed; simulated people do not really wait.
    measured = ms.isascii() and ms.isdigit() and (site.simulated or int(ms) <= elapsed)
    milliseconds, clock = (int(ms), "browser") if measured else (elapsed, "server" if now_ms() >= sent else "unknown")
    option = shown.options[int(choice)]
    if site.store.answer(person, position, option, milliseconds=milliseconds, clock=clock, shown_ms=sent) == "early":
        return site.message(409, "error.answer")
    return go("/end" if position == person.trials else "/trial")


@router.get("/pictures/{token}.jpg")
def picture(site: OfSite, token: str) -> Response:
    """A registered picture, from memory: a file's date would tell which arm was rendered first."""
    if token not in site.images:
        return site.message(404, "error.unknown")
    headers = {"cache-control": "private, max-age=86400, immutable"}
    return Response(site.images[token], media_type="image/jpeg", headers=headers)


@router.get("/pause")
def pause(request: Request, site: OfSite, person: Visitor) -> Response:
    """How far the participant is, and how to continue later or to withdraw."""
    return go("/end") if person.withdrawn else _paused(request, site, person)


@router.post("/withdraw")
def withdraw(request: Request, site: OfSite, person: Sender, sure: Field = "") -> Response:
    """Delete the participant's answers."""
    if sure != "yes":
        return _paused(request, site, person, site.texts["pause.withdraw_must"], 422)
    site.store.withdraw(person)
    return go("/end")


def _paused(request: Request, site: Site, person: Person, problem: str | None = None, status: int = 200) -> Response:
    link, csrf = _link(request, site, person), site.keys.signed("csrf", person.token)
    return site.page("pause", status, done=person.done, all=person.trials, link=link, csrf=csrf, problem=problem)


@router.get("/end")
def end(site: OfSite, person: Visitor) -> Response:
    """Thanks and the completion code, or the confirmation of a withdrawal."""
    if not person.withdrawn and not person.finished:
        return go("/trial")
    return site.page("end", withdrawn=person.withdrawn, code=site.keys.completion_code(person.name))
