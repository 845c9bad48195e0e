"""Ids, tokens and refusals around any application."""

from __future__ import annotations

import base64
import logging

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from bla.web.envelope import Envelope

TOKEN = "a token that nobody guesses"


async def answer(request: Request) -> Response:
    if request.url.path == "/fault":
        raise RuntimeError("a secret of the server")
    return PlainTextResponse((await request.body()).decode())


def client(token: str | None = None) -> TestClient:
    routes = [Route(path, answer, methods=["GET", "POST"]) for path in ("/", "/fault", "/healthz")]
    app = Starlette(routes=routes, middleware=[Middleware(Envelope, token=token, public=("/healthz",))])
    return TestClient(app, raise_server_exceptions=False)


def test_every_answer_has_an_id_and_no_guess_of_its_type(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "bla.web"):
        answers = [client().get(path) for path in ("/", "/nothing", "/fault", "/")]
    assert [answer.status_code for answer in answers] == [200, 404, 500, 200]
    assert {answer.headers["x-content-type-options"] for answer in answers} == {"nosniff"}
    names = [answer.headers["x-request-id"] for answer in answers]
    assert len({*names}) == 4
    assert "secret" not in answers[2].text
    assert names[2] in answers[2].json()["error"]
    assert [record.getMessage().split()[:3] for record in caplog.records] == [[names[2], "GET", "/fault:"]]


def test_two_lengths_are_refused() -> None:
    headers = {"transfer-encoding": "chunked", "content-length": "3"}
    assert client().post("/", content=b"abc", headers=headers).status_code == 400
    assert client().post("/", content=iter([b"a", b"bc"])).text == "abc"


def basic(word: str) -> str:
    return "Basic " + base64.b64encode(word.encode()).decode()


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (f"Bearer {TOKEN}", 200), (f"bearer {TOKEN}", 200), (basic(f"anyone:{TOKEN}"), 200), (None, 401), ("", 401),
        (TOKEN, 401), ("Bearer", 401), ("Bearer ", 401), (f"Bearer {TOKEN}x", 401), (f"Bearer {TOKEN[:-1]}", 401),
        (basic(TOKEN), 401), ("Basic %%%", 401), ("Basic " + "A" * 3000, 401), ("Bearer \xff\xfe", 401),
    ],
)  # fmt: skip
def test_a_token_opens(given: str | None, status: int) -> None:
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    found = client(TOKEN).get("/", headers=headers)
    assert found.status_code == status
    assert ("www-authenticate" in found.headers) == (status == 401)
    assert client(TOKEN).get("/healthz").status_code == 200
