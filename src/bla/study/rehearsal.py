"""A rehearsal: simulated people walk the study's real pages over HTTP, and everything they leave says "simulated".

They see what people see. Whose explanation a picture is, they know by its bytes: the plan holds every picture's hash.
What they answer follows from the stated behaviour, the seed, their number and the trial's position alone, so that the
same rehearsal without a server (`without_pages`) must give the same answers, one by one.
"""

from __future__ import annotations

import hashlib
import http.client
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode, urlsplit

from bla.progress import Progress
from bla.study.app import create_app
from bla.study.errors import StudyError
from bla.study.plan import Plan
from bla.study.responses import DECOY, Collected, Participant, Response
from bla.study.schedule import Trial, trials_of
from bla.study.serving import served
from bla.study.simulation import Behaviour, Person, Reply, person, strengths_for, strengths_on
from bla.study.store import Store
from bla.study.texts import Texts


def behaviour_for(plan: Plan, share: float, against: float | None, behaviour: Behaviour, seed: int) -> Behaviour:
    """The behaviour with strengths so that on the plan's photos the first arm wins this share against any other.

    In tasks with right answers ``share`` is that of right answers with the first arm, ``against`` with the others.
    """
    others = len(plan.arms) - 1
    if plan.task == "preference":
        if against is not None:
            raise StudyError("expected no share against in a study of preferences: the others have the rest")
        strengths = strengths_on([share] + [0.5] * (others - 1), behaviour, seed, len(plan.photos))
    else:
        rest = share if against is None else against
        strengths = strengths_for([share] + [rest] * others, behaviour.person_sd, behaviour.photo_sd)
    return replace(behaviour, strengths=strengths)


def rehearse(
    study: Path,
    behaviour: Behaviour,
    people: int,
    *,
    store: Store,
    seed: int = 0,
    together: int = 8,
    report: Progress | None = None,
) -> Collected:
    """Let so many simulated people take part in a study, on a store of its own that holds nothing yet.

    Raises
    ------
    StudyError
        If the store holds answers, or a page is not what a study's page should be.
    """
    plan, texts = Plan.load(study), Texts.load(study / "texts.toml")
    app = create_app(study, store, simulated=True, joins_a_minute=1e6, requests_a_second=1e6)
    if store.counts()["began"]:
        raise StudyError(f"expected an empty store for a rehearsal, got one with answers: remove {store.url}")
    with served(app) as address:
        walkers = [Walker(plan, texts, _actor(plan, behaviour, seed, number), address) for number in range(people)]
        for walker in walkers:
            if not walker.begin():
                raise StudyError(f"expected {people} places in the study, got {plan.places}")
        with ThreadPoolExecutor(together) as pool:
            for done, _ in enumerate(pool.map(Walker.walk, walkers), 1):
                if report is not None:
                    report("simulated people walk the pages", done, people)
    return store.collected(plan)


def without_pages(plan: Plan, behaviour: Behaviour, people: int, *, seed: int = 0) -> Collected:
    """The same rehearsal in memory."""
    moment = datetime.fromtimestamp(0, UTC)
    takers, responses = [], []
    for number in range(people):
        actor = _actor(plan, behaviour, seed, number)
        planned = trials_of(plan, number)
        answered = [trial for position, trial in enumerate(planned, 1) if not actor.leaves(position)]
        name = f"{number:016x}"
        finished = moment if len(answered) == len(planned) else None
        takers.append(
            Participant(
                participant=name, number=number, trials=len(planned), started_at=moment, finished_at=finished,
                simulated=True,
            )
        )  # fmt: skip
        for position, trial in enumerate(answered, 1):
            place, seconds = actor.answer(position, _seen(plan, trial))
            choice = trial.options[place]
            responses.append(
                Response(
                    participant=name, position=position, kind=trial.kind, repeats=trial.repeats, task=plan.task,
                    photo=trial.photo, left=trial.left, right=trial.right, arm=trial.arm, options=trial.options,
                    choice=choice, expected=trial.expected,
                    correct=None if trial.expected is None else choice == trial.expected,
                    milliseconds=round(1000 * seconds), clock="browser", shown_at=moment,
                    answered_at=moment + timedelta(seconds=seconds), simulated=True,
                )
            )  # fmt: skip
    return Collected(plan=plan.digest(), simulated=True, participants=tuple(takers), responses=tuple(responses))


@dataclass(frozen=True)
class Seen:
    """What a person sees in a trial: the photo, whose explanations stand where, the answers, a request to give one."""

    photo: str
    shown: tuple[tuple[str, str], ...]
    """Photo and arm of each explanation, from the left."""
    options: tuple[str, ...]
    asked: str | None = None


@dataclass(frozen=True)
class Actor:
    """A simulated person who knows the plan."""

    plan: Plan
    person: Person

    def leaves(self, position: int) -> bool:
        """Whether the person is gone before this trial."""
        return self.person.leaves_before is not None and position > self.person.leaves_before

    def answer(self, position: int, seen: Seen) -> tuple[int, float]:
        """Which of the options, and after how many seconds."""
        photo = self.plan.every_photo[seen.photo]
        number = list(self.plan.every_photo).index(seen.photo)
        arms = self.plan.arm_names
        if seen.asked is not None:
            return self._place(self.person.catch(position), seen, seen.asked)
        if self.plan.task == "preference":
            strange = [place for place, (of, _) in enumerate(seen.shown) if of != seen.photo]
            if strange:
                return self._place(self.person.catch(position), seen, seen.options[1 - strange[0]])
            left, right = (arms.index(arm) for _, arm in seen.shown)
            reply = self.person.choice(position, left=left, right=right, photo=number)
            return (0 if reply.left else 1), reply.seconds
        reply = self.person.judgement(position, arm=arms.index(seen.shown[0][1]), photo=number)
        truth = photo.prediction if self.plan.task == "prediction" else ("yes" if photo.program_is_right else "no")
        return self._place(reply, seen, truth)

    @staticmethod
    def _place(reply: Reply, seen: Seen, right: str) -> tuple[int, float]:
        """The right answer, or one of the others."""
        place = seen.options.index(right)
        if not reply.right_answer:
            step = 1 + int(1e6 * reply.seconds) % (len(seen.options) - 1)
            place = (place + step) % len(seen.options)
        return place, reply.seconds


def _actor(plan: Plan, behaviour: Behaviour, seed: int, number: int) -> Actor:
    return Actor(plan, person(behaviour, seed, number, len(trials_of(plan, number))))


def _seen(plan: Plan, trial: Trial) -> Seen:
    """What the page of a trial will show."""
    if plan.task != "preference":
        asked = trial.expected if trial.kind == "catch" else None
        return Seen(trial.photo, ((trial.photo, str(trial.arm)),), trial.options, asked)
    arms = (str(trial.left), str(trial.right))
    own = next(arm for arm in arms if arm != DECOY)
    shown = tuple((str(trial.decoy), own) if arm == DECOY else (trial.photo, arm) for arm in arms)
    return Seen(trial.photo, shown, trial.options)


class Form(HTMLParser):
    """Of a page: hidden fields, pictures and buttons in their order, the question, the words on the buttons."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: dict[str, str] = {}
        self.pictures: list[str] = []
        self.buttons: list[str] = []
        self.words: list[str] = []
        self.question = ""
        self._within: list[str] = []

    @classmethod
    def read(cls, html: str) -> Self:
        """Parse a page."""
        form = cls()
        form.feed(html)
        return form

    def handle_starttag(self, tag: str, attrs: Iterable[tuple[str, str | None]]) -> None:
        """Note what is sought."""
        values: dict[str, Any] = dict(attrs)
        if tag == "input" and values.get("type") == "hidden":
            self.hidden[values["name"]] = values.get("value") or ""
        elif tag == "img":
            self.pictures.append(values["src"])
        elif tag == "button":
            self.buttons.append(values.get("value") or "")
            self.words.append("")
        if tag in ("h1", "button", "kbd"):
            self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Leave it."""
        if self._within and self._within[-1] == tag:
            self._within.pop()

    def handle_data(self, data: str) -> None:
        """Words of the question, and on buttons."""
        if self._within[-1:] == ["h1"]:
            self.question = (self.question + data).strip()
        elif self._within[-1:] == ["button"]:
            self.words[-1] = (self.words[-1] + data).strip()


@dataclass
class Walker:
    """A browser without JavaScript, and the actor before it."""

    plan: Plan
    texts: Texts
    actor: Actor
    address: str
    cookies: dict[str, str] = field(default_factory=dict)
    page: Form = field(default_factory=Form)
    position: int = 0

    def __post_init__(self) -> None:
        """Connect when first asked."""
        self._connection = http.client.HTTPConnection(str(urlsplit(self.address).netloc), timeout=60)

    def begin(self) -> bool:
        """Consent; False if all places are taken."""
        self._get("/")
        begun = self._post("/begin", self.page.hidden | {"agree": "yes"}) == "/instructions"
        self._connection.close()  # others walk first
        return begun

    def walk(self) -> None:
        """Answer trial after trial until the end, or until the person leaves."""
        self._get("/instructions")
        for position in range(1, len(trials_of(self.plan, self.actor.person.number)) + 1):
            if self.actor.leaves(position):
                break
            self._get("/trial")
            place, seconds = self.actor.answer(position, self._look())
            values = {"choice": self.page.buttons[place], "ms": str(round(1000 * seconds))}
            self._post("/answer", self.page.hidden | values)
        self._connection.close()

    def _look(self) -> Seen:
        """Load the pictures, and see what they are."""
        known = {sha256: token for token, sha256 in self.plan.hashes.items()}
        pictures = []
        for address in self.page.pictures:
            content = self._request("GET", address)[1]
            token = known.get(hashlib.sha256(content).hexdigest())
            if token is None:
                raise StudyError(f"expected one of the registered pictures at {address}, got another")
            pictures.append(self.plan.every_picture[token])
        explained = tuple((photo, arm) for photo, arm in pictures if arm is not None)
        photo = next((photo for photo, arm in pictures if arm is None), explained[0][0])
        if self.plan.task == "preference":
            return Seen(photo, explained, ("left", "right"))
        words = dict.fromkeys(self.page.words)
        if self.plan.task == "agreement":
            options = tuple(n for word in words for n in ("yes", "no") if self.texts[f"trial.{n}"] == word)
        else:
            options = tuple(words)
        spoken = {option: self.texts.say("trial.check", option=w) for option, w in zip(options, words, strict=True)}
        asked = next((option for option, text in spoken.items() if text == self.page.question), None)
        return Seen(photo, explained, options, asked)

    def _get(self, address: str) -> None:
        status, content, _ = self._request("GET", address)
        if status != 200:
            raise StudyError(f"expected the page {address}, got status {status}")
        self.page = Form.read(content.decode())

    def _post(self, address: str, values: dict[str, str]) -> str:
        """Send a form; where it leads."""
        status, _, location = self._request("POST", address, urlencode(values))
        if status not in (303, 403):
            raise StudyError(f"expected the form {address} to be taken, got status {status}")
        return location

    def _request(self, method: str, address: str, body: str | None = None) -> tuple[int, bytes, str]:
        headers = {"cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        if body is not None:
            headers["content-type"] = "application/x-www-form-urlencoded"
        for again in (True, True, False):
            try:
                self._connection.request(method, address, body, headers)
                response = self._connection.getresponse()
                content = response.read()
                break
            except (http.client.HTTPException, ConnectionError):
                # The server closes a connection that was idle. What it took already it will take once.
                self._connection.close()
                if not again:
                    raise
        for name, value in response.getheaders():
            if name.lower() == "set-cookie":
                self.cookies |= {key: morsel.value for key, morsel in SimpleCookie(value).items()}
        return response.status, content, response.getheader("location") or ""
