"""What a study's routes share: its plan, texts, keys and store, who is asking, and how a request is turned away."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Cookie, Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from bla.study.guard import Limits, Rate, origin
from bla.study.keys import Keys
from bla.study.pages import Pages
from bla.study.pictures import registered
from bla.study.plan import Plan
from bla.study.store import Person, Store
from bla.study.texts import Texts

TOKEN = "bla_study"  # the cookie of a participant's token
_SIGNATURE = 32

Token = Annotated[str, Cookie(alias=TOKEN)]
Field = Annotated[str, Form(max_length=200)]


class Instead(Exception):  # noqa: N818
    """Ends a request with this response in place of the route's."""

    def __init__(self, response: Response) -> None:
        self.response = response


@dataclass(frozen=True)
class Site:
    """A study that is being served; the application keeps it in `app.state.site`."""

    plan: Plan
    texts: Texts
    keys: Keys
    store: Store
    pages: Pages
    images: dict[str, bytes]
    joins: Rate
    logins: Rate
    simulated: bool
    folder: Path
    address: str = ""
    """Where participants find it, for their personal links; never as a request says."""
    share: float = 1.0
    """Of the places, what unfinished participants of one address may hold."""
    holders: dict[str, list[int]] = field(default_factory=dict)
    """By their address the participants who may hold a place; in memory alone."""
    joining: threading.Lock = field(default_factory=threading.Lock)

    @property
    def secrets(self) -> Keys:
        """The keys as the folder holds them now: the researcher's secret may have been renewed."""
        return Keys.load(self.folder)

    @classmethod
    def opened(cls, study: Path, store: Store, *, simulated: bool, limits: Limits, address: str = "") -> Site:
        """Read a study's folder, and begin or continue to collect in the store."""
        plan, texts = Plan.load(study), Texts.load(study / "texts.toml")
        images = registered(study, plan)
        store.begin(plan, texts.digest(), simulated=simulated)
        pages = Pages(plan, texts, simulated=simulated)
        joins = Rate(limits.joins_a_minute / 60, max(1, int(limits.joins_a_minute)))
        logins = Rate(5 / 60, 5)
        share = limits.places_an_address
        return cls(plan, texts, Keys.load(study), store, pages, images, joins, logins, simulated, study, address, share)

    def join(self, request: Request, token: str) -> Person | None:
        """A new participant; None if all places are taken. An address that holds its share of them has to wait."""
        with self.joining:
            address, places = origin(request), self.plan.places
            held = [] if places is None else self.store.holding(self.holders.get(address, []))
            if places is not None and len(held) >= max(1, int(self.share * places)):
                raise Instead(self.refusal(429, 60))
            person = self.store.join(self.plan, token)
            if places is not None and person is not None:
                self.holders[address] = [*held, person.id]
            return person

    def knows(self, token: str) -> bool:
        """Whether the token carries our signature."""
        return len(token) > _SIGNATURE and self.keys.verifies("token", token[:-_SIGNATURE], token[-_SIGNATURE:])

    def person(self, token: str) -> Person | None:
        return self.store.person(token) if self.knows(token) else None

    def page(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.pages.render(template, **values), status)

    def message(self, status: int, text: str, **values: object) -> HTMLResponse:
        """A page that says why a request failed, in one of the study's texts."""
        words = self.texts.say(text, **values)
        return self.page("message", status, heading=self.texts["error.title"], text=words, home=True)

    def refusal(self, status: int, seconds: int) -> HTMLResponse:
        """The answer to a request that is too large (413, 431), or one too many (429) for so many seconds."""
        response = self.message(status, "error.busy" if status == 429 else "error.large", seconds=seconds)
        if status == 429:
            response.headers["retry-after"] = str(seconds)
        return response

    def limit(self, rate: Rate, key: str) -> None:
        """Turn the request away if there were too many of this key, an address say."""
        if wait := rate.wait(key):
            raise Instead(self.refusal(429, int(wait) + 1))

    def refuse_forgery(self, request: Request, token: str | None = None, csrf: str = "") -> None:
        """Turn a form away if another site sent it, or if it does not come from our page for this token."""
        ours = request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
        if not ours or (token is not None and not self.keys.verifies("csrf", token, csrf)):
            raise Instead(self.message(403, "error.expired"))


async def site_of(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


OfSite = Annotated[Site, Depends(site_of)]


def visitor_of(site: OfSite, token: Token = "") -> Person:
    """The participant who asks for a page; anyone else is sent to the consent page."""
    person = site.person(token)
    if person is None:
        raise Instead(go("/"))
    return person


def sender_of(request: Request, site: OfSite, csrf: Field = "", token: Token = "") -> Person:
    """The participant who sent a form from one of our pages."""
    site.refuse_forgery(request, token, csrf)
    person = site.person(token)
    if person is None:
        raise Instead(site.message(403, "error.expired"))
    return person


Visitor = Annotated[Person, Depends(visitor_of)]
Sender = Annotated[Person, Depends(sender_of)]


def go(address: str) -> RedirectResponse:
    return RedirectResponse(address, 303)


def remember(response: Response, request: Request, name: str, value: str, hours: int) -> None:
    """Set a cookie that scripts cannot read and other sites' forms do not carry."""
    secure = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=3600 * hours, httponly=True, samesite="lax", secure=secure, path="/")
