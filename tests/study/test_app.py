"""The pages over HTTP: a participation, replays, refusals, blindness to the byte."""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import text
from starlette.testclient import TestClient

from bla.study.app import create_app
from bla.study.errors import StudyError
from bla.study.guard import Limits, Rate
from bla.study.keys import Keys
from bla.study.pages import Pages
from bla.study.participation import NONCE
from bla.study.pictures import registered
from bla.study.plan import Plan
from bla.study.preparing import Wishes, prepare
from bla.study.responses import DECOY, Collected
from bla.study.schedule import trials_of
from bla.study.site import TOKEN
from bla.study.store import Store, _taken, now_ms, participants
from bla.study.texts import Texts
from small_study import ARMS, explained, small_study

TASKS = ("preference", "prediction", "agreement")
Prepared = Callable[[str], tuple[Path, str]]


class Visitor:
    """A browser without JavaScript."""

    def __init__(self, app: Any, address: str = "10.0.0.1") -> None:
        self.client = TestClient(
            app, base_url="http://study.test", raise_server_exceptions=False, client=(address, 50_000)
        )
        self.html = ""

    def get(self, address: str, status: int = 200) -> str:
        return self._seen(self.client.get(address), status)

    def post(self, address: str, values: dict[str, str], status: int = 200) -> str:
        return self._seen(self.client.post(address, data=values), status)

    def _seen(self, response: Any, status: int) -> str:
        assert response.status_code == status, response.text
        self.html = response.text
        return self.html

    def fields(self) -> dict[str, str]:
        found = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', self.html)
        return dict(found)

    def begin(self) -> str:
        self.get("/")
        return self.post("/begin", {**self.fields(), "agree": "yes"})

    def answer(self, choice: str = "0", status: int = 200, **change: str) -> str:
        return self.post("/answer", {**self.fields(), "choice": choice, **change}, status)

    def pictures(self) -> list[str]:
        return re.findall(r'<img src="(/pictures/\w+\.jpg)"', self.html)


@pytest.fixture
def place(request: pytest.FixtureRequest, prepared: Prepared, tmp_path: Path) -> tuple[Path, str]:
    study, secret = prepared(getattr(request, "param", "preference"))
    return shutil.copytree(study, tmp_path / "study"), secret


of_every_task = pytest.mark.parametrize("place", TASKS, indirect=True)


@pytest.fixture
def store(place: tuple[Path, str]) -> Iterator[Store]:
    with Store.of(place[0]) as found:
        yield found


def test_routes_are_found_by_name(place: tuple[Path, str], store: Store) -> None:
    app = create_app(place[0], store)
    participant = {"consent": "/", "begin": "/begin", "trial": "/trial", "answer": "/answer", "pause": "/pause"}
    researcher = {"overview": "/researcher", "responses": "/researcher/responses.zip", "codes": "/researcher/codes.csv"}
    for name, address in (participant | researcher | {"health": "/health"}).items():
        assert app.url_path_for(name) == address
    assert app.url_path_for("come_back", token="x") == "/p/x"
    assert Visitor(app).get(app.url_path_for("health")) == "ok\n"


@of_every_task
def test_a_participation(place: tuple[Path, str], store: Store) -> None:
    study, secret = place
    plan = Plan.load(study)
    visitor = Visitor(create_app(study, store))
    assert 'href="/p/' in visitor.begin()
    visitor.get("/trial")
    for position in range(1, 8):
        assert f"Question {position} of 7" in visitor.html
        visitor.answer(str(position % 2), ms="0")
    assert "completion code" in visitor.html
    code = re.findall(r"<code>([\w-]{9})</code>", visitor.html)
    collected = store.collected(plan)
    assert [r.position for r in collected.responses] == list(range(1, 8))
    assert [r.place for r in collected.responses] == [position % 2 for position in range(1, 8)]
    planned = trials_of(plan, 0)
    for response, trial in zip(collected.responses, planned, strict=True):
        assert (response.kind, response.photo, response.left, response.arm) == (
            trial.kind, trial.photo, trial.left, trial.arm,
        )  # fmt: skip
        assert response.clock == "browser"
    assert collected.participants[0].finished
    visitor.get("/trial")
    assert "completion code" in visitor.html

    visitor.post("/researcher", {"secret": "wrong"}, 403)
    assert "7" not in re.sub(r"<style.*", "", visitor.get("/researcher/responses.zip"))
    visitor.post("/researcher", {"secret": secret})
    assert "<dd>1 of 30 planned</dd>" in visitor.html
    archive = zipfile.ZipFile(io.BytesIO(visitor.client.get("/researcher/responses.zip").content))
    assert Collected.model_validate_json(archive.read("responses.json")) == collected
    assert visitor.get("/researcher/codes.csv").split() == ["code", *code]
    assert visitor.get("/researcher/plan.json") == plan.to_json()


def test_what_comes_twice_changes_nothing(place: tuple[Path, str], store: Store) -> None:
    study, _ = place
    visitor = Visitor(create_app(study, store))
    visitor.get("/")
    form = {**visitor.fields(), "agree": "yes"}
    visitor.post("/begin", form)
    token = visitor.client.cookies[TOKEN]
    visitor.post("/begin", form)
    assert visitor.client.cookies[TOKEN] == token
    assert store.counts()["began"] == 1
    first = visitor.get("/trial")
    visitor.answer("1")
    for choice in "10":
        visitor.html = first
        visitor.answer(choice)
        assert "Question 2 of 7" in visitor.html
    (response,) = store.collected(Plan.load(study)).responses
    assert response.place == 1
    assert response.clock == "server"


def test_return_by_link_pause_and_taking_back(place: tuple[Path, str], store: Store) -> None:
    study, _ = place
    app = create_app(study, store, address="http://study.test")
    visitor = Visitor(app)
    visitor.begin()
    link = re.findall(r'href="http://study.test(/p/[^"]+)"', visitor.html)[0]
    visitor.get("/trial")
    visitor.answer()
    visitor.answer()
    other = Visitor(app)
    assert "Question 3 of 7" in other.get(link)
    assert link in other.get("/pause")
    other.post("/withdraw", other.fields(), 422)
    assert store.counts()["answers"] == 2
    other.post("/withdraw", {**other.fields(), "sure": "yes"})
    assert "Your answers are deleted" in other.html
    assert "Your answers are deleted" in visitor.get("/trial")
    assert store.counts() == {"began": 1, "finished": 0, "withdrawn": 1, "answers": 0}
    person = store.collected(Plan.load(study)).participants[0]
    assert person.withdrawn
    other.get("/p/" + "x" * 60, 404)


def test_forged_and_malformed_requests_are_refused(place: tuple[Path, str], store: Store) -> None:
    study, _ = place
    visitor = Visitor(create_app(study, store))
    assert "Welcome" in visitor.get("/trial")
    visitor.get("/")
    form = visitor.fields()
    visitor.post("/begin", form, 422)
    visitor.post("/begin", {**form, "agree": "yes", "nonce": "x"}, 403)
    del visitor.client.cookies[NONCE]
    visitor.post("/begin", {**form, "agree": "yes"}, 403)
    visitor.begin()
    page = visitor.get("/trial")
    fields = visitor.fields()
    for change, status in (
        ({"csrf": "0" * 32}, 403),
        ({"csrf": ""}, 403),
        ({"position": "2"}, 403),
        ({"sent": "1"}, 403),
        ({"signature": "\u00e9"}, 403),
        ({"choice": "9"}, 422),
        ({"choice": "-1"}, 422),
        ({"choice": "²"}, 422),
        ({"choice": ""}, 422),
        ({"choice": "0" * 300}, 422),
    ):
        visitor.html = page
        visitor.answer(status=status, **change)
    evil = visitor.client.post("/answer", data={**fields, "choice": "0"}, headers={"sec-fetch-site": "cross-site"})
    assert evil.status_code == 403
    assert visitor.client.post("/answer", content=b"x" * 9000).status_code == 413
    assert visitor.client.post("/answer", content=iter([b"x" * 5000] * 2)).status_code == 413
    assert visitor.client.get("/", headers={"x-long": "x" * 20_000}).status_code == 431
    visitor.get("/pictures/none.jpg", 404)
    visitor.get("/static/..%2Fapp.py", 404)
    visitor.get("/docs", 404)
    visitor.get("/openapi.json", 404)
    assert visitor.client.put("/answer").status_code == 405
    assert store.counts()["answers"] == 0


def test_rates_are_limited(place: tuple[Path, str], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study, _ = place
    now = 0.0
    monkeypatch.setattr(Rate.__init__, "__kwdefaults__", {"now": lambda: now})
    visitor = Visitor(create_app(study, store, limits=Limits(2, 0.5)))
    for _ in range(2):
        visitor.begin()
        visitor.client.cookies.clear()
    visitor.get("/")
    visitor.post("/begin", {**visitor.fields(), "agree": "yes"}, 429)
    codes = [visitor.client.get("/static/study.css").status_code for _ in range(40)]
    assert codes[-1] == 429
    now = float(visitor.client.get("/").headers["retry-after"])
    visitor.get("/")
    assert store.counts()["began"] == 2


def test_places_are_limited(tmp_path: Path) -> None:
    study, _ = small_study(tmp_path, places=1)
    store = Store.of(study)
    app = create_app(study, store)
    Visitor(app).begin()
    late = Visitor(app, "10.0.0.2")
    late.get("/")
    assert "all the participants it needs" in late.post("/begin", {**late.fields(), "agree": "yes"}, 403)
    store.close()


def test_one_address_cannot_take_all_places_and_all_behind_it_can_take_part(tmp_path: Path) -> None:
    study, _ = small_study(tmp_path, places=5)
    with Store.of(study) as store:
        app = create_app(study, store, limits=Limits(100))
        room = [Visitor(app, f"2001:db8::{number}") for number in range(5)]  # one network, and one address
        room[0].begin()
        room[1].begin()
        room[2].get("/")
        form = {**room[2].fields(), "agree": "yes"}
        assert "wait 60 seconds" in room[2].post("/begin", form, 429)
        Visitor(app, "2001:db8:0:1::1").begin()
        room[0].get("/trial")
        for _ in range(7):
            room[0].answer()
        room[2].post("/begin", form)  # one has finished
        room[3].get("/")
        room[3].post("/begin", {**room[3].fields(), "agree": "yes"}, 429)
        room[1].get("/pause")
        room[1].post("/withdraw", {**room[1].fields(), "sure": "yes"})
        room[3].begin()
        assert store.counts() == {"began": 5, "finished": 1, "withdrawn": 1, "answers": 7}


def test_every_answer_has_secure_headers(place: tuple[Path, str], store: Store) -> None:
    study, _ = place
    visitor = Visitor(create_app(study, store))
    visitor.begin()
    visitor.get("/trial")
    for address in ("/", "/trial", "/pause", visitor.pictures()[0], "/static/study.css", "/nowhere"):
        headers = visitor.client.get(address).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert "server-timing" not in headers
    assert "no-store" in visitor.client.get("/trial").headers["cache-control"]
    cookie = visitor.client.get("/").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    secure = TestClient(create_app(study, store), base_url="https://study.test").get("/").headers["set-cookie"]
    assert "Secure" in secure


def test_tokens_are_stored_hashed(place: tuple[Path, str], store: Store) -> None:
    study, secret = place
    visitor = Visitor(create_app(study, store))
    visitor.begin()
    token = visitor.client.cookies[TOKEN]
    kept = b"".join(path.read_bytes() for path in study.rglob("*") if path.is_file())
    assert token.encode() not in kept
    assert token[:22].encode() not in kept
    assert secret.encode() not in kept
    assert (study / "secrets.json").stat().st_mode & 0o077 == 0


@of_every_task
def test_no_byte_before_the_answer_names_an_arm(place: tuple[Path, str], store: Store) -> None:
    study, _ = place
    plan = Plan.load(study)
    visitor = Visitor(create_app(study, store))
    sent = bytearray()
    static = [path.read_bytes() for path in (files("bla.study") / "static").iterdir()]

    def heard(response: Any) -> None:
        response.read()
        if "/static/" in str(response.url):
            assert response.content in static  # the same for every study
            return
        sent.extend(str(sorted(response.headers.items())).encode() + str(response.url).encode() + response.content)

    visitor.client.event_hooks["response"].append(heard)
    visitor.begin()
    visitor.get("/trial")
    lengths, sizes, starts = set(), set(), set()
    while "completion code" not in visitor.html:
        for address in ("/static/study.css", "/static/study.js", *visitor.pictures()):
            visitor.client.get(address)
        for address in visitor.pictures():
            response = visitor.client.get(address)
            lengths.add(response.headers["content-length"])
            with Image.open(io.BytesIO(response.content)) as picture:
                sizes.add((picture.size, picture.mode, picture.format))
                assert set(picture.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "comment"}
                starts.add(tuple(map(tuple, picture.quantization.values())))
            headers = {name: value for name, value in response.headers.items() if name not in ("date",)}
            starts.add(tuple(sorted(headers.items())))
        visitor.answer()
    assert len(lengths) == len(sizes) == 1
    assert len(starts) == 2, "one set of tables, one set of headers"
    text = bytes(sent).decode("latin-1")
    forbidden = [*plan.arm_names, "secret-model", "setup-", ".json", "catch", DECOY, "repeat", plan.digest()]
    forbidden += [photo.id for photo in plan.every_photo.values()] + [p.name for p in plan.every_photo.values()]
    for word in forbidden:
        assert word not in text, word
    assert not re.search(r"\d+ cells", text)


@pytest.mark.parametrize("task", TASKS)
def test_pages_are_the_same_when_arms_change_places(task: str, prepared: Prepared) -> None:
    """Only the random names of the pictures differ."""
    plan = Plan.load(prepared(task)[0])
    pages = Pages(plan, Texts.english())
    exchanged: dict[str, str] = dict(zip(plan.arm_names, reversed(plan.arm_names), strict=True)) | {DECOY: DECOY}
    for number in range(8):
        for position, trial in enumerate(trials_of(plan, number), 1):
            other = replace(
                trial,
                left=exchanged.get(str(trial.left)),
                right=exchanged.get(str(trial.right)),
                arm=exchanged.get(str(trial.arm)),
            )
            shown = [pages.trial(t, position, 9, None, sent=1) for t in (trial, other)]
            assert shown[0] != shown[1]
            blank = [re.sub(r"/pictures/\w{24}\.jpg", "/pictures/x.jpg", html) for html in shown]
            assert blank[0] == blank[1]


def test_a_repeat_or_catch_of_a_preference_looks_like_any_other(tmp_path: Path) -> None:
    study, _ = small_study(tmp_path, catches=2, repeats=2, question="Which?")
    plan = Plan.load(study)
    pages = Pages(plan, Texts.english())
    shown = {
        re.sub(r"/pictures/\w{24}\.jpg", "", pages.trial(trial, 5, 9, None))
        for number in range(4)
        for trial in trials_of(plan, number)
        if trial.kind != "practice"
    }
    assert len(shown) == 1


def test_a_study_that_began_refuses_changes(place: tuple[Path, str], store: Store) -> None:
    study, _ = place
    Visitor(create_app(study, store)).begin()
    plan = Plan.load(study)
    create_app(study, store)
    with pytest.raises(StudyError, match="simulated"):
        create_app(study, store, simulated=True)
    plan.model_copy(update={"people": 99}).save(study / "plan.json")
    with pytest.raises(StudyError, match="put the old plan"):
        create_app(study, store)
    plan.save(study / "plan.json")
    texts = (study / "texts.toml").read_text()
    (study / "texts.toml").write_text(texts.replace("Welcome", "Hello"))
    with pytest.raises(StudyError, match="put the old texts"):
        create_app(study, store)
    (study / "texts.toml").write_text(texts)
    token = plan.photos[0].plain.token
    content = (study / "pictures" / f"{token}.jpg").read_bytes()
    (study / "pictures" / f"{token}.jpg").write_bytes(content[:-1] + b"x")
    with pytest.raises(StudyError, match="registered picture"):
        registered(study, plan)


def test_texts_in_another_language(tmp_path: Path) -> None:
    texts = tmp_path / "deutsch.toml"
    english = Texts.english().source
    texts.write_text(english.replace('language = "en"', 'language = "de"').replace("Welcome", "Willkommen"))

    explained(tmp_path)
    arms = [str(tmp_path / arm) for arm in ARMS]
    prepare(tmp_path / "study", arms, Wishes(trials=3, catches=1, practice=1, repeats=1), texts=texts)
    store = Store.of(tmp_path / "study")
    page = Visitor(create_app(tmp_path / "study", store)).get("/")
    store.close()
    assert '<html lang="de"' in page
    assert "<h1>Willkommen</h1>" in page
    for change, message in (
        (("[pause]", "[rest]"), "missing"),
        (("{minutes}", "{hours}"), "placeholders"),
        (('language = "en"', "language = 1"), "quotes"),
        (("[page]", "[page"), "TOML"),
    ):
        texts.write_text(english.replace(*change))
        with pytest.raises(StudyError, match=message):
            Texts.load(texts)


def test_a_place_is_free_again_when_it_is_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, _ = small_study(tmp_path, places=3)
    hour, begun = 3_600_000, now_ms()
    with Store.of(study) as store:
        app = create_app(study, store)
        idle, busy, gone = (Visitor(app, f"10.0.0.{number}") for number in range(3))
        for visitor in (idle, busy, gone):
            visitor.begin()
            visitor.get("/trial")
        busy.answer()
        gone.post("/withdraw", {**gone.fields(), "sure": "yes"})
        fourth = Visitor(app, "10.0.0.9")
        assert "places" not in fourth.begin(), "a withdrawal frees one"
        for hours, free in ((0.5, 0), (2, 2), (23, 2), (25, 3)):
            monkeypatch.setattr("bla.study.store.now_ms", lambda hours=hours: begun + int(hours * hour))
            with store._read() as connection:
                assert 3 - len(connection.execute(_taken(begun + int(hours * hour), participants.c.id)).all()) == free
        monkeypatch.undo()
        idle.get("/trial")
        idle.answer()


def test_a_renewed_secret_takes_effect_at_once(place: tuple[Path, str], store: Store) -> None:
    study, secret = place
    visitor = Visitor(create_app(study, store))
    visitor.post("/researcher", {"secret": secret})
    assert visitor.client.get("/researcher/plan.json").status_code == 200
    renewed = Keys.renewed(study)
    assert "plan.json" not in visitor.client.get("/researcher/plan.json").headers.get("content-disposition", "")
    visitor.post("/researcher", {"secret": secret}, 403)
    visitor.post("/researcher", {"secret": renewed})
    assert visitor.client.get("/researcher/plan.json").headers["content-disposition"].endswith('plan.json"')


def test_who_fails_to_sign_in_locks_out_nobody_else(place: tuple[Path, str], store: Store) -> None:
    study, secret = place
    app = create_app(study, store)
    attacker, researcher = Visitor(app), Visitor(app)
    researcher.get("/researcher")
    for _ in range(5):
        attacker.post("/researcher", {"secret": "guess"}, 403)
    attacker.post("/researcher", {"secret": secret}, 429)
    researcher.post("/researcher", {"secret": secret})
    attacker.get("/researcher")
    for _ in range(5):
        attacker.post("/researcher", {"secret": "guess"}, 403)
    attacker.post("/researcher", {"secret": "guess"}, 429)


def test_a_link_exchanges_no_participant_and_names_the_configured_address(
    place: tuple[Path, str], store: Store
) -> None:
    study, _ = place
    nowhere = Visitor(create_app(study, store))
    nowhere.client.headers["host"] = "evil.test"
    assert 'href="/p/' in nowhere.begin()
    assert "evil" not in nowhere.html
    app = create_app(study, store, address="https://study.example.org")
    one, other = Visitor(app), Visitor(app)
    for visitor in (one, other):
        visitor.client.headers["host"] = "evil.test"
        assert "evil" not in visitor.begin()
    link = re.findall(r'href="https://study.example.org(/p/[^"]+)"', one.html)[0]
    own = other.client.cookies[TOKEN]
    other.get(link)
    assert other.client.cookies[TOKEN] == own
    fresh = Visitor(app)
    fresh.get(link)
    assert fresh.client.cookies[TOKEN] == one.client.cookies[TOKEN]


def test_a_database_that_fails_is_told_in_one_line(
    place: tuple[Path, str], store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = Visitor(create_app(place[0], store))
    visitor.begin()
    visitor.get("/trial")
    form = visitor.fields() | {"choice": "0"}
    with monkeypatch.context() as patched:
        patched.setattr(Store, "answer", lambda *_, **__: store._asked(text("select secret from elsewhere")))
        assert "Your answers so far are saved" in visitor.post("/answer", form, 503)
    (record,) = [record for record in caplog.records if record.name == "bla.study"]
    assert "no such table" in record.getMessage()
    assert record.exc_info is None
    assert "secret" not in record.getMessage()
    visitor.post("/answer", form)
    assert store.counts()["answers"] == 1


def test_a_clock_that_is_set_back_is_marked(
    place: tuple[Path, str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = Visitor(create_app(place[0], store))
    visitor.begin()
    visitor.get("/trial")
    monkeypatch.setattr("bla.study.participation.now_ms", lambda: now_ms() - 60_000)
    visitor.answer()
    (response,) = store.collected(Plan.load(place[0])).responses
    assert (response.milliseconds, response.clock) == (0, "unknown")
