"""A rehearsal: simulated people walk the study's real pages over HTTP, and everything they leave says "simulated".

They see what people see, and recognise an arm's picture by its bytes, as the plan holds every picture's hash. Their
answers follow from the stated behaviour, the seed, their number and the trial's position alone.
"""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import unescape
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

from bla.progress import Progress, silent
from bla.study.app import create_app
from bla.study.behaviour import Behaviour
from bla.study.errors import StudyError
from bla.study.guard import Limits
from bla.study.plan import Plan
from bla.study.responses import Collected
from bla.study.schedule import LEFT_RIGHT, YES_NO, trials_of
from bla.study.serving import served
from bla.study.simulation import Person, strengths_for, strengths_on
from bla.study.store import Store
from bla.study.texts import Texts


def behaviour_for(plan: Plan, share: float, against: float | None, behaviour: Behaviour, seed: int) -> Behaviour:
    """The behaviour with strengths such that on the plan's photos the first arm wins this share against any other.

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
    study: Path, behaviour: Behaviour, people: int, *, store: Store, seed: int = 0, report: Progress = silent
) -> Collected:
    """Let so many simulated people take part in a study, on an empty store; raises StudyError if it holds answers."""
    plan, texts = Plan.load(study), Texts.load(study / "texts.toml")
    app = create_app(study, store, simulated=True, limits=Limits(1e6, 1e6, 1))
    if store.counts()["began"]:
        raise StudyError(f"expected an empty store for a rehearsal, got one with answers: remove {store.url}")
    if plan.places is not None and people > plan.places:
        raise StudyError(f"expected {people} places in the study, got {plan.places}")
    with served(app) as address:
        walkers = [Walker(plan, texts, Actor(plan, behaviour, seed, number), address) for number in range(people)]
        for walker in walkers:
            walker.begin()
        with ThreadPoolExecutor(8) as pool:
            for done, _ in enumerate(pool.map(Walker.walk, walkers), 1):
                report("simulated people walk the pages", done, people)
    return store.collected(plan)


class Seen(NamedTuple):
    """What a person sees in a trial; `asked` is the answer that an attention check requests."""

    photo: str
    shown: tuple[tuple[str, str], ...]
    """Photo and arm of each explanation, from the left."""
    options: tuple[str, ...]
    asked: str | None = None


class Actor(Person):
    """Simulated person `number` of the study `seed`, who knows the plan."""

    def __init__(self, plan: Plan, behaviour: Behaviour, seed: int, number: int) -> None:
        trials = len(trials_of(plan, number))
        super().__init__(behaviour, seed, number, trials)
        self.plan = plan
        self.answers = trials if self.leaves_before is None else self.leaves_before
        """How many trials the person answers."""

    def answer(self, position: int, seen: Seen) -> tuple[int, float]:
        """Which of the options, and after how many seconds."""
        photo = self.plan.every_photo[seen.photo]
        number = list(self.plan.every_photo).index(seen.photo)
        arms = [self.plan.arm_names.index(arm) for _, arm in seen.shown]
        strange = [place for place, (of, _) in enumerate(seen.shown) if of != seen.photo]
        if seen.asked is not None:
            reply, right = self.catch(position), seen.asked
        elif strange:
            reply, right = self.catch(position), seen.options[1 - strange[0]]
        elif self.plan.task == "preference":
            reply, right = self.choice(position, left=arms[0], right=arms[1], photo=number), seen.options[0]
        else:
            reply = self.judgement(position, arm=arms[0], photo=number)
            right = photo.prediction if self.plan.task == "prediction" else ("yes" if photo.program_is_right else "no")
        place = seen.options.index(right)
        if not reply.yes:  # one of the other answers
            place = (place + 1 + int(1e6 * reply.seconds) % (len(seen.options) - 1)) % len(seen.options)
        return place, reply.seconds


class Walker:
    """A browser without JavaScript, and the actor before it."""

    def __init__(self, plan: Plan, texts: Texts, actor: Actor, address: str) -> None:
        self.plan, self.texts, self.actor, self.address = plan, texts, actor, address
        self._known = {picture.sha256: (photo, arm) for photo, arm, picture in plan.every_picture.values()}
        self._opener = build_opener(ProxyHandler({}), HTTPCookieProcessor())  # keeps cookies, follows redirects
        self._page = ""

    def begin(self) -> None:
        self._page = self._load("/").decode()
        self._send("/begin", agree="yes")

    def walk(self) -> None:
        """Answer trial after trial until the end, or until the person leaves."""
        self._page = self._load("/trial").decode()
        for position in range(1, self.actor.answers + 1):
            place, seconds = self.actor.answer(position, self._look())
            self._send("/answer", choice=str(place), ms=str(round(1000 * seconds)))

    def _look(self) -> Seen:
        """Load the pictures, and recognise them."""
        pictures = []
        for address in self._find(r'<img src="([^"]+)"'):
            sha256 = hashlib.sha256(self._load(address)).hexdigest()
            if sha256 not in self._known:
                raise StudyError(f"expected one of the registered pictures at {address}, got another")
            pictures.append(self._known[sha256])
        explained = tuple((photo, arm) for photo, arm in pictures if arm is not None)
        photo = next((photo for photo, arm in pictures if arm is None), explained[0][0])
        if self.plan.task == "preference":
            return Seen(photo, explained, LEFT_RIGHT)
        options = words = tuple(self._find(r"</kbd> (.*?)</span>"))
        if self.plan.task == "agreement":
            options = tuple(next(n for n in YES_NO if self.texts[f"trial.{n}"] == word) for word in words)
        spoken = {self.texts.say("trial.check", option=w): option for option, w in zip(options, words, strict=True)}
        return Seen(photo, explained, options, spoken.get(self._find(r'<h1 class="question">(.*?)</h1>')[0]))

    def _find(self, pattern: str) -> list[str]:
        return [unescape(found) for found in re.findall(pattern, self._page)]

    def _send(self, address: str, **values: str) -> None:
        """Send the page's form, and go where it leads."""
        hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', self._page))
        self._page = self._load(address, hidden | values).decode()

    def _load(self, address: str, form: dict[str, str] | None = None, tries: int = 3) -> bytes:
        """Ask again if the connection is lost: the server takes a repeated answer once."""
        body = None if form is None else urlencode(form).encode()
        try:
            with self._opener.open(self.address + address, body, timeout=60) as response:
                return bytes(response.read())
        except HTTPError as error:
            raise StudyError(f"expected the page {address}, got status {error.code}") from error
        except (HTTPException, OSError):
            if tries == 1:
                raise
        return self._load(address, form, tries - 1)
