"""The server: explanations as the engine gives them, refusals with reasons, batches, overload, a page in a browser."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from bla import BlaError
from bla.data.decoding import decoding_bytes
from bla.data.photo import DataError, Photo, Transform
from bla.deploy import apart
from bla.deploy.engine import Engine, Outputs
from bla.deploy.page import RESIZING, alone
from bla.deploy.serve import Batcher, Busy, Limits, _watch, application
from bla.deploy.serve.batching import Lane
from bla.deploy.serve.documents import PhotosAndMasks
from bla.deploy.serve.requests import _json
from bla.explanations.explanation import Explanation
from small_exports import Pair

if TYPE_CHECKING:
    from playwright.sync_api import Browser
from starlette.exceptions import HTTPException

HALF = (0.5, 0.5, 0.5)
LIMITS = Limits(bytes=400_000, photos=4, pixels=200_000, masks=8, seconds=120)


@pytest.fixture(scope="module")
def engine(class_aware: Pair) -> Engine:
    return Engine(class_aware[1].path, threads=1)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(application(engine, limits=LIMITS), raise_server_exceptions=False) as client:
        yield client


def photo(seed: int = 0, size: tuple[int, int] = (90, 70), form: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def test_one_or_many_in_every_form(client: TestClient, engine: Engine) -> None:
    sent = [photo(0), photo(1, form="JPEG")]
    expected = [result.to_dict() | {"image": ""} for result in engine.explain_each(sent, size=3, target=1)]
    route = "/v1/explain?size=3&target=bee"
    encoded = [base64.b64encode(content).decode() for content in sent]
    answers = [
        client.post(route, files=[("photo", ("../a/x.png", sent[0])), ("photo", ("y\\z.jpg", sent[1]))]),
        client.post(route, json={"photos": [encoded[0], f"data:image/jpeg;base64,{encoded[1]}"]}),
    ]
    names = (["x.png", "z.jpg"], ["photo 0", "photo 1"])
    for answer, own in zip(answers, names, strict=True):
        found = answer.json()["explanations"]
        assert [result["image"] for result in found] == own
        for result, reference in zip(found, expected, strict=True):
            assert result["selected"] == reference["selected"]
            assert result["target"] == 1
            np.testing.assert_allclose(result["unbounded"], reference["unbounded"], atol=1e-5)
    raw = client.post(route, content=sent[0], headers={"content-type": "image/png"}).json()["explanations"][0]
    assert raw["selected"] == expected[0]["selected"]


def test_the_classifiers_own_answer_and_on_request_a_check(client: TestClient, engine: Engine) -> None:
    sent = photo(3)
    (why,) = engine.explain_each([sent], check=True, fill="mean")
    assert isinstance(why, Explanation)
    assert why.check is not None
    (found,) = client.post("/v1/explain?check=true&fill=mean", files={"photo": sent}).json()["explanations"]
    assert found["classifier"]["index"] == why.classifier.index
    assert found["agrees"] == why.agrees
    assert found["check"]["words"] == str(why.check)
    assert found["check"]["fill"] == "mean"
    assert "check" not in client.post("/v1/explain", files={"photo": sent}).json()["explanations"][0]
    assert client.post("/v1/explain?check=true&fill=black", files={"photo": sent}).status_code == 422


def test_a_picture(client: TestClient) -> None:
    by_accept = client.post("/v1/explain", files={"photo": photo()}, headers={"accept": "image/png"})
    by_name = client.post("/v1/explain?format=png", files={"photo": photo()})
    assert by_accept.headers["content-type"] == "image/png"
    assert by_accept.content == by_name.content
    with Image.open(io.BytesIO(by_name.content)) as picture:
        assert picture.height >= 160


def test_answers_of_subsets(client: TestClient, engine: Engine) -> None:
    (why,) = client.post("/v1/explain", files={"photo": photo()}).json()["explanations"]
    masks = [why["selected"], np.ones(engine.grid, int).tolist()]
    requests: list[dict[str, Any]] = [
        {"files": {"photo": photo()}, "data": {"masks": json.dumps(masks)}},
        {"json": {"photos": [base64.b64encode(photo()).decode()], "masks": masks}},
    ]
    for form in requests:
        own, whole = client.post("/v1/answers", **form).json()["answers"]
        assert own["size"] == why["size"]
        assert own["prediction"]["index"] == why["prediction"]["index"]
        assert own["prediction"]["probability"] == pytest.approx(why["prediction"]["probability"], abs=1e-5)
        assert whole["size"] == 20


def test_the_other_pages(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    about = client.get("/v1/explainer").json()
    assert (about["classes"], about["note"]) == (["ant", "bee", "cat", "dog", "eel"], "")
    lines = client.get("/metrics").text.splitlines()
    assert any(line.startswith('bla_request_seconds_count{path="/healthz",status="200"}') for line in lines)
    assert "bla_photos_under_way 0.0" in lines
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith("; frame-ancestors 'none'")
    assert "http://" not in page.text
    assert "https://" not in page.text
    document = client.get("/openapi.json").json()
    assert document["paths"]["/v1/explain"]["post"]["requestBody"]["content"]["application/json"]["example"]


def test_one_site_may_frame_the_page(engine: Engine) -> None:
    client = TestClient(application(engine, framed_by="https://huggingface.co"))
    assert client.get("/").headers["content-security-policy"].endswith("; frame-ancestors https://huggingface.co")
    with pytest.raises(BlaError, match="expected a site such as"):
        application(engine, framed_by="https://huggingface.co; script-src *")


@pytest.mark.parametrize("transform", [Transform((8, 8, 8), (0.5,), (0.5,)), Transform((8, 8), (0.5,) * 5, (0.5,) * 5)])
def test_what_takes_no_photo_is_not_served(engine: Engine, transform: Transform, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "transform", transform)
    with pytest.raises(BlaError, match=r"an explainer of photos, got one of arrays .*: explain these in Python"):
        application(engine)


def bad_photos() -> Iterator[tuple[str, bytes]]:
    whole = {form: photo(form=form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")}
    for form, content in whole.items():
        for share in (0.02, 0.1, 0.3, 0.5):
            yield f"{form} cut at {share}", content[: max(1, int(share * len(content)))]
        yield f"{form} without its beginning", content[7:]
        yield f"{form} of zeros", content[:12] + bytes(500)
    for name, content in {
        "text": b"text", "html": b"<html>", "svg": b"<svg/>", "pdf": b"%PDF-1.7", "zip": b"PK\x03\x04" + bytes(90),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0", "zeros": bytes(1000), "path": b"../../etc/passwd", "script": b"#!/bin/sh",
        "xcf": b"gimp xcf v011", "icc": b"acsp", "utf-16": "photo".encode("utf-16"),
    }.items():  # fmt: skip
        yield name, content
    for size in ((700, 700), (20_000, 20)):
        yield f"{size} pixels", photo(size=size, mode="1")
    header = photo(size=(90, 70))
    for width, height in ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (0, 0), (1, 2**31 - 1)):
        yield f"a bomb of {width} x {height}", header[:16] + width.to_bytes(4) + height.to_bytes(4) + header[24:]


BAD_PHOTOS = dict(bad_photos())


def bad_requests() -> Iterator[tuple[str, str, dict[str, Any]]]:
    good = base64.b64encode(photo()).decode()
    whole = np.ones((4, 5), int).tolist()
    bodies: list[Any] = [
        b"", b"{", b"null", b"[]", b"1", b'"x"', b"{}", b'{"photos": null}', b'{"photos": []}', b'{"photos": [1]}',
        b'{"photos": ["%"]}', b'{"photos": ["\\ud800"]}', b"[" * 100_000, b'{"photos": [[]]}', b"\xff\xfe", b"NaN",
        json.dumps({"photos": [good] * 5}).encode(), json.dumps({"photos": [good], "path": "/etc"}).encode(),
        b'{"photos": ["' + b"A" * 500_000 + b'"]}',
    ]  # fmt: skip
    for index, body in enumerate(bodies):
        for path in ("/v1/explain", "/v1/answers"):
            yield f"JSON {index} to {path}", path, {"content": body, "headers": {"content-type": "application/json"}}
    masks: list[Any] = [
        None, 1, "x", [], [[]], [[[]]], [whole[:3]], [[[2] * 5] * 4], [[[0] * 5] * 4], [whole] * 9, [[[0.5] * 5] * 4],
        [[["1"] * 5] * 4], [[[None] * 5] * 4], {"a": 1}, [[[1e400] * 5] * 4], [[[10**30] * 5] * 4], [whole, [1]],
    ]  # fmt: skip
    for index, mask in enumerate(masks):
        body = json.dumps({"photos": [good], "masks": mask}).encode()
        yield f"masks {index}", "/v1/answers", {"content": body, "headers": {"content-type": "application/json"}}
        fields = {"files": {"photo": photo()}, "data": {"masks": json.dumps(mask)}}
        yield f"masks {index} in a form", "/v1/answers", fields
    for kind in ("", "text/plain", "application/xml", "multipart/mixed", "application/json;charset=\xff", "x" * 300):
        headers = {"content-type": kind.encode("latin-1")}
        yield f"type {kind[:20]!r}", "/v1/explain", {"content": b"x", "headers": headers}
    for index, kind in enumerate(
        ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=a")
    ):
        for body in (b"--a\r\n", b"--a\r\nContent-Disposition: form-data\r\n\r\nx\r\n--a--", b"\x00" * 50):
            yield f"form {index} {body[:9]!r}", "/v1/explain", {"content": body, "headers": {"content-type": kind}}
    sizes = ["0", "21", "-1", "x", "1e3", "99999999999999999999"]
    targets = ["5", "", "cow", "%00", "-1", "%F0%9F%90%88"]
    queries = [f"size={size}" for size in sizes] + [f"target={target}" for target in targets]
    for query in (*queries, "format=gif", "format=../x"):
        yield query, f"/v1/explain?{query}", {"files": {"photo": photo()}}
    yield "many for a picture", "/v1/explain?format=png", {"files": [("p", photo())] * 2}
    yield "too many", "/v1/explain", {"files": [("p", photo())] * 5}
    yield "no file", "/v1/explain", {"data": {"photo": "text"}, "files": {}}
    yield "too many bytes", "/v1/explain", {"files": {"photo": bytes(500_000)}}


def test_two_hundred_kinds_of_bad_input(client: TestClient) -> None:
    """Each is refused with a reason; afterwards the server is up and no photo is under way."""
    requests = list(bad_requests())
    for name, content in BAD_PHOTOS.items():
        form = {"content": content, "headers": {"content-type": "application/octet-stream"}}
        requests.append((name, "/v1/explain", form))
        requests.append((f"{name} in a form", "/v1/explain", {"files": {"photo": (f"../../{name}\x00", content)}}))
    requests += [
        (path, path, {"content": b"x"}) for path in ("/../etc/passwd", "/v1/explain/../..", "/%2e%2e/x", "/static/x")
    ]
    assert len(requests) >= 200
    for name, path, form in requests:
        answer = client.post(path, **form)
        # what is left of a photo may still be one, of fewer rows
        assert answer.status_code in (404, 405, 413, 415, 422) or (" cut at " in name and answer.status_code == 200), (
            name
        )
        if answer.status_code != 200:
            assert set(answer.json()) == {"error"}, name
            assert "Traceback" not in answer.text, name
            assert len(answer.json()["error"]) > 5, name
    assert client.get("/healthz").json()["waiting"] == 0
    assert client.post("/v1/explain", files={"photo": photo()}).status_code == 200


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_odd_colour_modes_are_explained(mode: str, client: TestClient) -> None:
    form = {"YCbCr": "JPEG", "CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG")
    grey = np.random.default_rng(0).integers(0, 256, (70, 90), np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey * np.uint16(257) if mode == "I;16" else grey).convert(mode).save(file, form)
    assert client.post("/v1/explain", files={"photo": file.getvalue()}).status_code == 200


def test_one_broken_photo_does_not_spoil_the_others(client: TestClient) -> None:
    files = [("photo", ("a.png", photo())), ("photo", ("b.png", b"broken")), ("photo", ("c.png", photo(2)))]
    found = client.post("/v1/explain", files=files).json()["explanations"]
    assert [sorted(result) == ["error", "image"] for result in found] == [False, True, False]
    assert "b.png" in found[1]["error"]


def test_the_document_holds_for_what_is_sent_at_random(engine: Engine) -> None:
    pytest.importorskip("schemathesis")
    from benchmarks.faults.requests import sent

    assert set(sent(application(engine, limits=LIMITS), 4).values()) <= {1, 2, 3, 4}


class Slow:
    """An engine that counts, and takes its time."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.engine, self.sizes = engine, list[int]()
        self.before: Callable[[], object] = lambda: time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, photos: Any, **question: Any) -> Outputs:
        self.sizes.append(len(photos))
        self.before()
        return self.engine.run(photos, **question)


def test_requests_are_run_together(engine: Engine) -> None:
    slow = Slow(engine, 0.05)
    batcher = Batcher(slow, most=8)  # type: ignore[arg-type]
    seen = Photo(np.zeros((64, 80, 3), np.uint8), (80, 64), (0, 0, 80, 64))

    async def many(photos: int = 20) -> list[Outputs]:
        answers = await asyncio.gather(*(batcher.run(lambda: seen, size=1 + index % 3) for index in range(photos)))
        return [outputs for _, outputs in answers]

    rows = asyncio.run(many())
    assert [int(row.selected.sum()) for row in rows] == [1 + index % 3 for index in range(20)]
    assert slow.sizes == [8, 8, 4]
    both = threading.Barrier(2, timeout=60)  # two batches at once: neither ends before the other has begun
    slow.before, batcher = both.wait, Batcher(slow, most=8, workers=2)  # type: ignore[arg-type]
    assert len(asyncio.run(many(16))) == 16
    slow = Slow(engine, 0.05)
    batcher = Batcher(slow, most=8, latency=0.61)  # type: ignore[arg-type]
    assert len(asyncio.run(many())) == 20
    assert slow.sizes[0] == 3, "at .05 s a photo, its first guess, three take a quarter of the target"
    with batcher.admitted(1), pytest.raises(Busy), batcher.admitted(30):
        pass
    with batcher.admitted(64), pytest.raises(Busy), batcher.admitted(1):
        pass
    assert batcher.inside == 0


def test_overload_is_refused_and_all_that_was_accepted_is_answered(engine: Engine) -> None:
    slow = Slow(engine, 0.02)
    app = application(slow, room=6, most=4, limits=LIMITS)  # type: ignore[arg-type]

    async def storm() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"content-type": "image/png"}
            requests = (client.post("/v1/explain", content=photo(), headers=headers) for _ in range(60))
            return await asyncio.gather(*requests)

    answers = asyncio.run(storm())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 6
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
    assert app.state.server.batcher.inside == 0
    assert app.state.server.batcher.done == statuses.count(200)


def test_what_takes_too_long_is_told_so(engine: Engine) -> None:
    app = application(Slow(engine, 0.5), limits=Limits(seconds=0.1))  # type: ignore[arg-type]
    with TestClient(app) as client:
        assert client.post("/v1/explain", files={"photo": photo()}).status_code == 503


def test_an_answer_holds_the_probability_of_a_class(client: TestClient, engine: Engine) -> None:
    send: dict[str, Any] = {
        "files": {"photo": photo()},
        "data": {"masks": json.dumps(np.ones((1, *engine.grid), int).tolist())},
    }
    (answer,) = client.post("/v1/answers?target=eel", **send).json()["answers"]
    whole = {guess["label"]: guess for guess in answer["top"]}
    assert answer["target"] == whole["eel"]
    refused = client.post("/v1/answers?target=el", **send)
    assert (refused.status_code, "did you mean 'eel'" in refused.json()["error"]) == (422, True)


def test_an_engine_that_no_longer_answers_ends_the_server(engine: Engine) -> None:
    app = application(engine, limits=dataclasses.replace(LIMITS, seconds=0.5), token="a token nobody guesses")
    server, ended = app.state.server, list[int]()
    with TestClient(app) as client:
        assert client.get("/healthz").json()["status"] == "ok"
        assert client.get("/v1/explainer").status_code == 401
        server.batcher._began[0] = time.monotonic() - 3
        assert "has not answered for more than 1 s" in client.get("/healthz").json()["error"]
        server.batcher._began.clear()
        assert client.get("/healthz").status_code == 200
        server.batcher._threads.shutdown()
        assert client.get("/healthz").status_code == 503
    _watch(server, 0, ended.append)
    assert ended == [1]


def test_an_error_before_the_engine_reaches_every_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("bla.deploy.serve.batching.np.stack", full)
    with TestClient(application(engine, limits=LIMITS), raise_server_exceptions=False) as client:
        assert [client.post("/v1/explain", files={"photo": photo()}).status_code for _ in range(2)] == [500, 500]


HUGE = {
    "masks of letters": b'{"photos":["AA"],"masks":[' + b'"a",' * 75_000 + b'"",' * 20_000 + b'""]}',
    "empty photos": b'{"photos":[' + b'"",' * 600_000 + b'""]}',
    "empty masks": b'{"photos":["AA"],"masks":[' + b"[]," * 600_000 + b"[]]}",
    "one long row": b'{"photos":["AA"],"masks":[[[' + b"1," * 900_000 + b"1]]]}",
    "depth": b'{"photos":' + b"[" * 900_000,
    "objects": b'{"photos":["AA"],"masks":[' + b"{}," * 600_000 + b"{}]}",
    "keys": b"{" + b'"a":1,' * 300_000 + b'"photos":["AA"]}',
    "digits": b'{"photos":["AA"],"masks":' + b"9" * 1_800_000 + b"}",
}


@pytest.mark.parametrize("name", HUGE)
def test_nothing_is_made_of_what_a_request_cannot_hold(name: str, engine: Engine) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(HTTPException, match="expected JSON"):
            _json(HUGE[name], LIMITS, engine.card, PhotosAndMasks)
        assert tracemalloc.get_traced_memory()[1] < 400_000
    finally:
        tracemalloc.stop()


def test_heavy_work_waits_in_a_lane_and_not_for_ever() -> None:
    async def many(lane: Lane, pieces: int) -> list[object]:
        ends = threading.Event()
        asked = [asyncio.create_task(lane.run(ends.wait)) for _ in range(pieces)]
        await asyncio.sleep(0)
        asked[0].cancel()
        await asyncio.sleep(0)
        with pytest.raises(Busy) as refused:  # what has begun keeps its place, though nobody waits for it
            await lane.run(lambda: True)
        assert refused.value.headers == {"Retry-After": str(pieces if lane.room < 9 else 1)}
        ends.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    assert asyncio.run(many(Lane(1, 3), 4))[1:] == [True] * 3
    assert asyncio.run(many(Lane(1, 9, patience=0.5), 1))[1:] == []


def test_a_heavy_photo_is_read_in_another_process(client: TestClient, engine: Engine) -> None:
    bomb = base64.b64decode("UklGRhoAAABXRUJQVlA4TA0AAAAvnpvnFgcQERGIiP4HAA==")
    assert apart.heavy(bomb)
    assert not apart.heavy(large := photo(size=(4000, 3000), form="JPEG"))
    assert apart.heavy(large, whole=True)
    assert apart.heavy(b"P3" + b"#" * 2**21)
    plain = b"P3\n400 300\n255\n" + b"1 2 3 \n        " * 120_000
    assert apart.heavy(plain)
    options = {"name": "a.ppm", "most_pixels": 200_000}
    found, expected = apart.read(engine.transform, plain, **options, seconds=60), engine.transform.read(plain)
    assert np.array_equal(found.pixels, expected.pixels)
    assert (found.size, found.region) == (expected.size, expected.region)
    with pytest.raises(DataError, match=r"a\.ppm: expected at most 100 pixels"):
        apart.read(engine.transform, plain, name="a.ppm", most_pixels=100, seconds=60)
    with pytest.raises(DataError, match=r"read within 0\.001 s"):
        apart.read(engine.transform, plain, **options, seconds=0.001)
    assert decoding_bytes(b"") == decoding_bytes(b"RIFF") == decoding_bytes(b"\x89PNG\r\n") == 0


def test_bodies_under_way_share_the_memory_and_hold_no_place_in_the_queue(engine: Engine) -> None:
    app = application(engine, room=2, limits=dataclasses.replace(LIMITS, stall=0.2))
    server, sent = app.state.server, photo()

    def body(chunks: list[bytes], wait: float) -> Callable[[], Awaitable[dict[str, Any]]]:
        parts = iter(chunks)

        async def receive() -> dict[str, Any]:
            if (part := next(parts, None)) is None:
                await asyncio.sleep(wait)
            return {"type": "http.request", "body": part or b"", "more_body": part is not None}

        return receive

    async def request(receive: Callable[[], Awaitable[dict[str, Any]]]) -> int:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        head = {"headers": [(b"content-type", b"image/png")], "query_string": b"", "method": "POST", "type": "http"}
        await app({**head, "path": "/v1/explain", "raw_path": b"", "root_path": "", "app": app}, receive, send)
        return statuses[0]

    async def all_at_once() -> list[int]:
        stalled = [asyncio.create_task(request(body([sent[:100]], 5))) for _ in range(20)]
        await asyncio.sleep(0.05)
        assert server.bodies.held == 2000
        return [await request(body([sent], 0)), *(await asyncio.gather(*stalled))]

    assert asyncio.run(all_at_once()) == [200] + [408] * 20
    assert server.bodies.held == server.batcher.inside == 0
    server.bodies.most = 1000
    with TestClient(app) as client:
        answer = client.post("/v1/explain", files={"photo": sent})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_command_serves_without_torch_and_stops_gracefully(engine: Engine, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-X", "importtime", "-m", "bla", "serve", str(engine.path), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in itertools.takewhile(lambda _: process.poll() is None, range(1200)):
            try:
                if httpx.get(f"{address}/healthz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        found: list[int] = []
        large = io.BytesIO()
        Image.new("RGB", (3300, 3300)).save(large, "PNG", compress_level=1)  # reading it takes a while
        send = {"content": large.getvalue(), "headers": {"content-type": "image/png"}, "timeout": 120}
        under_way = threading.Thread(
            target=lambda: found.append(httpx.post(f"{address}/v1/explain", **send).status_code)  # type: ignore[arg-type]
        )
        under_way.start()
        while under_way.is_alive() and not httpx.get(f"{address}/healthz").json()["waiting"]:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        under_way.join()
        assert found == [200]
        assert process.wait(120) in (0, -signal.SIGTERM)
    finally:
        process.kill()
    log_text = (tmp_path / "log").read_text()
    assert "Traceback" not in log_text
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in log_text.splitlines() if "|" in line}
    assert "torch" not in modules
    assert "onnxruntime" in modules
    # the container installs every dependency of ours that serving imports: the extra serve-onnx
    ours = {re.split(r"[^\w.-]", text)[0] for text in metadata.requires("bounded-logit-attention") or ()}
    packages = metadata.packages_distributions()
    imported = {name.lower() for module in modules for name in packages.get(module, ())} & ours
    assert {"numpy", "filelock", "fastapi"} <= imported
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]["serve-onnx"]
    assert imported <= {re.split(r"[^\w.-]", text)[0] for text in wanted}


@pytest.mark.parametrize("phone", [False, True])
def test_the_page_in_a_browser(phone: bool, browser: Browser, engine: Engine, tmp_path: Path) -> None:
    import uvicorn
    from axe_playwright_python.sync_playwright import Axe

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(application(engine), port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    (tmp_path / "photo.png").write_bytes(photo(size=(300, 200)))
    (tmp_path / "text.png").write_bytes(b"no photo")
    faults: list[str] = []
    requests: list[str] = []
    try:
        size = {"width": 390, "height": 844} if phone else {"width": 1200, "height": 850}
        context = browser.new_context(viewport=size, color_scheme="dark" if phone else "light", has_touch=phone)  # type: ignore[arg-type]
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"http://127.0.0.1:{port}/")
        page.set_input_files("#choose", tmp_path / "text.png")
        page.wait_for_selector("#error:visible")
        page.set_input_files("#choose", tmp_path / "photo.png")
        page.wait_for_selector("#curve path", state="attached")
        assert page.locator("#error").is_hidden()
        checked = page.locator("#cells [aria-checked=true]")
        own = checked.count()
        assert f"from {own} of 20 cells, the explainer" in page.inner_text("#read")
        (why,) = engine.explain_each([Path(tmp_path / "photo.png")])
        assert isinstance(why, Explanation)
        assert page.inner_text("#whole") == str(why.classifier)  # the file itself was sent: these are the API's figures
        assert page.inner_text("#label") == str(why.prediction)
        assert page.locator("#differs").is_hidden() == why.agrees
        assert page.locator("#curve text").all_text_contents()[:6] == ["0%", "50%", "100%", "1", "10", "20"]
        assert f"from the whole photo: {str(why.classifier).split()[-1]}." in page.inner_text("#legend")
        assert why.sizes is not None
        enough = f"From {why.sizes.sufficient} cells on, it stays" if why.sizes.sufficient > 1 else "at every size"
        assert (enough in page.inner_text("#legend")) == why.agrees
        page.fill("#target", "bee")
        page.press("#target", "Enter")
        page.locator("#legend", has_text="The probability of bee").wait_for()
        (about,) = engine.explain_each([tmp_path / "photo.png"], target="bee")
        assert isinstance(about, Explanation)
        assert page.inner_text("#label") == str(about.prediction)
        page.fill("#target", "")
        page.press("#target", "Enter")
        page.locator("#legend", has_text=f"The probability of {why.classifier.label}").wait_for()
        page.click("#check")
        page.locator("#checked", has_text="from these pixels alone: ").wait_for()
        page.locator("#size").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert checked.count() == 2
        assert "from 2 of 20 cells" in page.inner_text("#read")
        off = page.locator("#cells [aria-checked=false]").first
        off.tap() if phone else off.click()
        page.locator("#read", has_text="from 3 of 20 cells, your choice").wait_for()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Space")
        page.locator("#read").filter(has_not_text="from 3 of").wait_for()
        page.click("#own")
        assert checked.count() == own
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [violation["id"] for violation in Axe().run(page).response["violations"]] == []
        page.goto(f"http://127.0.0.1:{port}/docs")
        assert "POST /v1/explain" in page.inner_text("main")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [violation["id"] for violation in Axe().run(page).response["violations"]] == []
        context.close()
    finally:
        server.should_exit = True
        thread.join()
    assert faults == []
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:")) for url in requests)


# In place of onnxruntime-web: it asks the runtime of the tests, and calls what it gets by the types of JavaScript.
RUNTIME = b"""
export const env = { wasm: {} };
export class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
export const InferenceSession = { create: async graph => ({
  inputNames: JSON.parse(await window.open_graph(btoa(String.fromCharCode(...new Uint8Array(graph))))),
  run: async (feeds, names) => {
    const plain = Object.entries(feeds).map(([name, { data, dims }]) => [name, Array.from(data, Number), dims]);
    const found = JSON.parse(await window.run_graph(JSON.stringify([plain, names])));
    return Object.fromEntries(names.map((name, i) => [name, { data: found[i] }]));
  } }) };
"""


def test_the_page_alone_in_a_browser(browser: Browser, class_aware: Pair, tmp_path: Path) -> None:
    import onnxruntime
    from axe_playwright_python.sync_playwright import Axe

    engine, faults, requests = Engine(class_aware[1].path), list[str](), list[str]()
    card = json.dumps(dataclasses.asdict(engine.card))
    (tmp_path / "alone.html").write_bytes(alone(engine.path.read_bytes(), card, (RUNTIME, b"")))
    (tmp_path / "photo.png").write_bytes(photo(size=(301, 200)))
    graph: list[onnxruntime.InferenceSession] = []

    def open_graph(content: str) -> str:
        graph.append(onnxruntime.InferenceSession(base64.b64decode(content)))
        return json.dumps([each.name for each in graph[0].get_inputs()])

    def run_graph(question: str) -> str:
        feeds, names = json.loads(question)
        kinds = {"pixels": np.float32, "masks": np.float32}
        arrays = {name: np.array(data, kinds.get(name, np.int64)).reshape(dims) for name, data, dims in feeds}
        return json.dumps([output.ravel().tolist() for output in graph[0].run(names, arrays)])

    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", offline=True)
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.expose_function("open_graph", open_graph)
    page.expose_function("run_graph", run_graph)
    page.goto((tmp_path / "alone.html").as_uri())
    page.set_input_files("#choose", tmp_path / "photo.png")
    page.wait_for_selector("#curve path", state="attached")
    for target in (None, "bee"):
        if target is not None:
            page.fill("#target", target)
            page.press("#target", "Enter")
            page.locator("#legend", has_text=f"The probability of {target}").wait_for()
        (why,) = engine.explain_each([tmp_path / "photo.png"], target=target, check=True)
        assert isinstance(why, Explanation)
        expected, found = why.to_dict(), page.evaluate("why")
        for key in ("classifier", "prediction"):
            assert found[key] == expected[key] | {"probability": pytest.approx(expected[key]["probability"], abs=1e-5)}
        assert found["region"] == pytest.approx(expected["region"])
        assert (found["selected"], found["target"]) == (expected["selected"], expected["target"])
    page.click("#check")
    page.locator("#checked", has_text=str(why.check)).wait_for()
    page.locator("#cells [aria-checked=false]").first.click()
    page.locator("#read", has_text="your choice").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert [violation["id"] for violation in Axe().run(page).response["violations"]] == []
    context.close()
    assert faults == []
    assert all(url.startswith(("file://", "blob:")) for url in requests)


def test_the_page_resizes_as_pillow_does(browser: Browser) -> None:
    page = browser.new_page()
    page.add_script_tag(content=RESIZING)
    for width, height, transform in (
        (47, 31, Transform((16, 16), HALF, HALF, mode="crop")),
        (9, 70, Transform((20, 24), HALF, HALF, "bilinear", mode="crop")),
        (33, 20, Transform((8, 16), HALF, HALF, "lanczos")),
        (50, 21, Transform((15, 16), HALF, HALF, "nearest", mode="squash-crop", crop_fraction=0.7)),
    ):
        pixels = np.random.default_rng(0).choice([0, 3, 128, 255], (height, width, 3)).astype(np.uint8)
        rgba = np.dstack([pixels, np.full((height, width, 1), 255, np.uint8)])
        found = page.evaluate(
            """([rgba, sides, transform]) => {
              const { whole, part, region } = resizing.framed(transform, sides);
              const strip = (top, bottom) => rgba.slice(4 * top * sides[0], 4 * bottom * sides[0]);
              return [Array.from(resizing.resized(sides, strip, whole, part, transform.interpolation)), region];
            }""",
            [rgba.ravel().tolist(), [width, height], transform.to_dict()],
        )
        seen = transform.read(pixels)
        assert found[0] == seen.pixels.ravel().tolist()
        assert found[1] == pytest.approx(seen.region)
    page.close()
