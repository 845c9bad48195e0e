"""The study as a web application: server-rendered pages and forms, no state but the store's and the browser's cookie.

A participant's token is in a cookie and in the personal link; it carries our signature, and the store knows its hash.
Forms carry a signature over the token (against forgery by other sites) and the time at which the page was made, signed
too, so that response times without JavaScript need no writing when a page is shown.
"""

from __future__ import annotations

import secrets
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import Cookie, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from bla.study.errors import StudyError
from bla.study.guard import Guard, Rate
from bla.study.keys import Keys, new_token
from bla.study.pages import Pages
from bla.study.pictures import registered
from bla.study.plan import Plan
from bla.study.store import Person, Store, now_ms
from bla.study.texts import Texts

TOKEN, NONCE, RESEARCHER = "bla_study", "bla_consent", "bla_researcher"
"""Cookies: who takes part; what the consent page was given with; who may see results."""
_SIGNATURE = 32
_WEEKS_4, _HOURS_8 = 28 * 24 * 3600, 8 * 3600

Token = Annotated[str, Cookie(alias=TOKEN)]
Session = Annotated[str, Cookie(alias=RESEARCHER)]
Field = Annotated[str, Form(max_length=200)]


def create_app(
    study: Path,
    store: Store,
    *,
    simulated: bool = False,
    joins_a_minute: float = 60.0,
    requests_a_second: float = 20.0,
    timing: bool = False,
) -> FastAPI:
    """The application of a study's folder on a store, which must hold this plan's answers or none.

    Raises
    ------
    StudyError
        If the plan, a picture or the texts are not those with which the study began.
    """
    plan, keys, texts = Plan.load(study), Keys.load(study), Texts.load(study / "texts.toml")
    images = registered(study, plan)
    store.begin(plan, texts.digest(), simulated=simulated)
    pages = Pages(plan, texts, simulated=simulated)
    joins, logins = Rate(joins_a_minute / 60, max(1, int(joins_a_minute))), Rate(5 / 60, 5)
    static = {
        name: ((files("bla.study") / "static" / name).read_bytes(), kind)
        for name, kind in (("study.css", "text/css; charset=utf-8"), ("study.js", "text/javascript; charset=utf-8"))
    }
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def knows(token: str) -> bool:
        return len(token) > _SIGNATURE and keys.verifies("token", token[:-_SIGNATURE], token[-_SIGNATURE:])

    def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(pages.render(template, **values), status)

    def message(status: int, text: str, **values: object) -> HTMLResponse:
        return page("message", status, heading=texts["error.title"], text=texts.say(text, **values), home=True)

    def go(address: str) -> RedirectResponse:
        return RedirectResponse(address, 303)

    def remember(response: Response, request: HTTPConnection, name: str, value: str, seconds: int) -> None:
        secure = request.url.scheme == "https"
        response.set_cookie(name, value, max_age=seconds, httponly=True, samesite="lax", secure=secure, path="/")

    def taking_part(token: str) -> Person | None:
        return store.person(token) if knows(token) else None

    def from_our_page(request: Request, token: str, csrf: str) -> bool:
        site = request.headers.get("sec-fetch-site", "same-origin")
        return site in ("same-origin", "none") and keys.verifies("csrf", token, csrf)

    @app.get("/")
    def consent(request: Request, token: Token = "") -> Response:
        nonce = new_token()
        response = page(
            "consent",
            nonce=nonce,
            signature=keys.signed("csrf", nonce),
            problem=None,
            minutes=pages.minutes,
            trials=pages.trials,
            link="/trial" if taking_part(token) else None,
        )
        remember(response, request, NONCE, nonce, _HOURS_8)
        return response

    @app.post("/begin")
    def begin(
        request: Request,
        nonce: Field = "",
        signature: Field = "",
        agree: Field = "",
        given: Annotated[str, Cookie(alias=NONCE)] = "",
    ) -> Response:
        if not nonce or not secrets.compare_digest(nonce.encode(), given.encode()):
            return message(403, "error.expired")
        if not from_our_page(request, nonce, signature):
            return message(403, "error.expired")
        if agree != "yes":
            values = {"minutes": pages.minutes, "trials": pages.trials, "link": None, "signature": signature}
            return page("consent", 422, nonce=nonce, problem=texts["consent.must_agree"], **values)
        # The token follows from what the page was given with: the same form sent twice is the same person.
        token = nonce + keys.signed("token", nonce)
        person = store.person(token)
        if person is None:
            wait = joins.wait(request.client.host if request.client else "")
            if wait:
                return message(429, "error.busy", seconds=int(wait) + 1)
            person = store.join(plan, token)
        if person is None:
            return page("message", 403, heading=texts["consent.title"], text=texts["consent.full"], home=False)
        response = go("/instructions")
        remember(response, request, TOKEN, token, _WEEKS_4)
        return response

    @app.get("/p/{token}")
    def come_back(request: Request, token: str) -> Response:
        if taking_part(token) is None:
            return message(404, "error.unknown")
        response = go("/trial")
        remember(response, request, TOKEN, token, _WEEKS_4)
        return response

    def link(request: Request, token: str) -> str:
        return str(request.url_for("come_back", token=token))

    @app.get("/instructions")
    def instructions(request: Request, token: Token = "") -> Response:
        person = taking_part(token)
        if person is None:
            return go("/")
        return page(
            "instructions",
            link=link(request, token),
            keys=pages.keys,
            practice=len(plan.practice),
            checks=bool(plan.catches),
        )

    @app.get("/trial")
    def trial(token: Token = "") -> Response:
        person = taking_part(token)
        if person is None:
            return go("/")
        if person.withdrawn or person.finished:
            return go("/end")
        position = person.done + 1
        shown = store.trial(person, position)
        if shown is None:
            raise StudyError(f"expected trial {position} of a participant in the store, got none")
        before = store.trial(person, position - 1) if 1 < position <= len(plan.practice) + 1 else None
        feedback = None
        if before is not None and before.expected is not None:
            feedback = pages.feedback(before, store.answered(person, position - 1))
        sent = str(now_ms())
        return HTMLResponse(
            pages.trial(
                shown,
                position,
                person.trials,
                feedback,
                sent=sent,
                signature=keys.signed("sent", f"{token}:{position}:{sent}"),
                csrf=keys.signed("csrf", token),
            )
        )

    @app.post("/answer")
    def answer(  # noqa: PLR0917
        request: Request,
        position: Field = "",
        choice: Field = "",
        sent: Field = "",
        signature: Field = "",
        csrf: Field = "",
        ms: Field = "",
        token: Token = "",
    ) -> Response:
        person = taking_part(token)
        if person is None or not from_our_page(request, token, csrf):
            return message(403, "error.expired")
        if person.withdrawn:
            return go("/end")
        if not keys.verifies("sent", f"{token}:{position}:{sent}", signature):
            return message(403, "error.expired")
        place = int(position)  # signed, so a number
        shown = store.trial(person, place)
        if shown is None or not choice.isascii() or not choice.isdigit() or int(choice) >= len(shown.options):
            return message(422, "error.answer")
        elapsed = max(0, now_ms() - int(sent))
        # No browser can have measured more than has passed; simulated people do not really wait.
        measured = ms.isascii() and ms.isdigit() and (simulated or int(ms) <= elapsed)
        stored = store.answer(
            person,
            place,
            shown.options[int(choice)],
            milliseconds=int(ms) if measured else elapsed,
            clock="browser" if measured else "server",
            shown_ms=int(sent),
        )
        if stored == "early":
            return message(409, "error.answer")
        return go("/end" if place == person.trials else "/trial")

    @app.get("/pause")
    def pause(request: Request, token: Token = "") -> Response:
        person = taking_part(token)
        if person is None:
            return go("/")
        if person.withdrawn:
            return go("/end")
        return paused(request, person, token, None, 200)

    def paused(request: Request, person: Person, token: str, problem: str | None, status: int) -> HTMLResponse:
        values = {"link": link(request, token), "csrf": keys.signed("csrf", token), "problem": problem}
        return page("pause", status, done=person.done, all=person.trials, **values)

    @app.post("/withdraw")
    def withdraw(request: Request, csrf: Field = "", sure: Field = "", token: Token = "") -> Response:
        person = taking_part(token)
        if person is None or not from_our_page(request, token, csrf):
            return message(403, "error.expired")
        if sure != "yes":
            return paused(request, person, token, texts["pause.withdraw_must"], 422)
        store.withdraw(person)
        return go("/end")

    @app.get("/end")
    def end(token: Token = "") -> Response:
        person = taking_part(token)
        if person is None:
            return go("/")
        if not person.withdrawn and not person.finished:
            return go("/trial")
        return page("end", withdrawn=person.withdrawn, code=keys.completion_code(person.name))

    @app.get("/pictures/{token}.jpg")
    def picture(token: str) -> Response:
        if token not in images:
            return message(404, "error.unknown")
        headers = {"cache-control": "private, max-age=86400, immutable"}
        return Response(images[token], media_type="image/jpeg", headers=headers)

    @app.get("/static/{name}")
    def asset(name: str) -> Response:
        if name not in static:
            return message(404, "error.unknown")
        return Response(static[name][0], media_type=static[name][1], headers={"cache-control": "public, max-age=3600"})

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204, headers={"cache-control": "public, max-age=86400"})

    @app.get("/health")
    def health() -> Response:
        store.counts()
        return Response("ok\n", media_type="text/plain")

    # --- the researcher's side ---

    def is_researcher(session: str) -> bool:
        until, _, signature = session.partition(".")
        signed = keys.verifies("researcher", f"{until}:{keys.researcher}", signature)
        return signed and until.isdigit() and int(until) > time.time()

    @app.get("/researcher")
    def researcher(session: Session = "") -> Response:
        if not is_researcher(session):
            return page("researcher", counts=None, problem=None, plan=None, digest="")
        return page("researcher", counts=store.counts(), problem=None, plan=plan, digest=plan.digest())

    @app.post("/researcher")
    def sign_in(request: Request, secret: Field = "") -> Response:
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return message(403, "error.expired")
        wait = logins.wait(request.client.host if request.client else "")
        if wait:
            return message(429, "error.busy", seconds=int(wait) + 1)
        if not keys.opens(secret):
            return page("researcher", 403, counts=None, problem="This is not the study's secret.", plan=None, digest="")
        until = str(int(time.time()) + _HOURS_8)
        response = go("/researcher")
        session = f"{until}.{keys.signed('researcher', f'{until}:{keys.researcher}')}"
        remember(response, request, RESEARCHER, session, _HOURS_8)
        return response

    @app.get("/researcher/{name}")
    def download(name: str, session: Session = "") -> Response:
        if not is_researcher(session):
            return go("/researcher")
        word = "simulated-" if simulated else ""
        if name == "responses.zip":
            content, kind = store.collected(plan).archive(), "application/zip"
        elif name == "codes.csv":
            content, kind = completion_codes(store, plan, keys).encode(), "text/csv"
        elif name == "plan.json":
            content, kind = plan.to_json().encode(), "application/json"
        else:
            return message(404, "error.unknown")
        disposition = {"content-disposition": f'attachment; filename="{word}{name}"'}
        return Response(content, media_type=kind, headers=disposition)

    # --- what goes wrong ---

    @app.exception_handler(HTTPException)
    async def not_found(_: Request, error: HTTPException) -> Response:
        return message(error.status_code, "error.unknown")

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> Response:
        return message(500, "error.fault")

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, __: RequestValidationError) -> Response:
        return message(422, "error.answer")

    def refused(status: int, seconds: int) -> tuple[bytes, str]:
        text = texts.say("error.busy", seconds=seconds) if status == 429 else texts["error.large"]
        html = pages.render("message", heading=texts["error.title"], text=text, home=False)
        return html.encode(), "text/html; charset=utf-8"

    app.add_middleware(
        Guard,
        cookie=TOKEN,
        knows=knows,
        refused=refused,
        requests_a_second=requests_a_second,
        timing=timing,
    )
    return app


def completion_codes(store: Store, plan: Plan, keys: Keys) -> str:
    """The codes of those who finished, in the order of the alphabet: they lead to nobody's answers."""
    people = store.collected(plan).participants
    return "\n".join(["code", *sorted(keys.completion_code(p.participant) for p in people if p.finished)]) + "\n"
