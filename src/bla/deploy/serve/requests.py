"""A request's photos and masks, read within limits from a form, from JSON, or from a bare body."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request

from bla.deploy.engine import Card
from bla.deploy.serve import documents
from bla.deploy.serve.batching import Busy

Photos = list[tuple[str, bytes]]  # names and encoded photos


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Of a request: bytes of its body, photos, pixels of each, masks, seconds to its answer, and between body parts."""

    bytes: int = 32 * 1024 * 1024
    photos: int = 16
    pixels: int = 50_000_000
    masks: int = 256
    seconds: float = 30.0
    stall: float = 10.0


class Bodies:
    """The bytes of the bodies under way, which share ``most``; for one event loop."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0


@asynccontextmanager
async def received(
    request: Request, limits: Limits, bodies: Bodies, card: Card, schema: type[documents.Photos]
) -> AsyncIterator[tuple[Photos, Any]]:
    """The photos of a request, still encoded, and its masks, if any, as :func:`masks_of` reads them."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    body = bytearray()
    try:
        await _read(request, limits, bodies, body)
        masks = None
        if kind == "multipart/form-data":
            photos, masks = await _multipart(request, bytes(body), limits)
            if isinstance(masks, str):
                masks = await asyncio.to_thread(_valid, TypeAdapter(documents.Masks), masks, limits, card)
        elif kind == "application/json":
            photos, masks = await asyncio.to_thread(_json, body, limits, card, schema)
        elif kind.startswith("image/") or kind == "application/octet-stream":
            photos = [("photo", bytes(body))]
        else:
            came = kind[:80] or "no type"
            raise HTTPException(415, f"expected multipart/form-data, application/json or image/..., got {came}")
        if not 1 <= len(photos) <= limits.photos:
            raise HTTPException(422, f"expected 1 to {limits.photos} photos, got {len(photos)}")
        yield photos, masks
    finally:
        bodies.held -= len(body)


def masks_of(masks: list[list[list[int]]], card: Card, limits: Limits) -> npt.NDArray[np.bool_]:
    """Subsets of cells (M, H, W) from lists."""
    if len(masks) > limits.masks or any(len({*map(len, rows)} | {card.grid[1]}) > 1 for rows in masks):
        raise HTTPException(422, f"expected 1 to {limits.masks} masks of {card.grid} cells, got {len(masks)} or others")
    if any(len(rows) != card.grid[0] for rows in masks):
        raise HTTPException(422, f"expected masks of {card.grid[0]} rows, got others")
    return card.checked_masks(np.array(masks))


async def _read(request: Request, limits: Limits, bodies: Bodies, body: bytearray) -> None:
    """Append the body as it comes: what has not come holds no memory of the server."""
    too_large = HTTPException(413, f"expected at most {limits.bytes:,} bytes, got more; send a smaller photo")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.bytes:  # before any of it is read
        raise too_large
    chunks = aiter(request.stream())
    try:
        while True:
            async with asyncio.timeout(limits.stall):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            if len(body) + len(chunk) > limits.bytes:
                raise too_large
            if bodies.held + len(chunk) > bodies.most:
                raise Busy(2)
            bodies.held += len(chunk)
            body += chunk
    except ClientDisconnect:
        raise HTTPException(400, "expected a whole body, got one that ends early") from None
    except TimeoutError:
        raise HTTPException(408, f"expected more of the body within {limits.stall:g} s, got none") from None
    if not body:
        raise HTTPException(422, "expected a photo, got an empty body")


async def _multipart(request: Request, body: bytes, limits: Limits) -> tuple[Photos, Any]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(
            request.headers, stream(), max_files=limits.photos, max_fields=8, max_part_size=1024 * 1024
        )
        form = await parser.parse()
    except Exception as error:  # the parser's own errors, and those of odd headers
        reason = str(error) or type(error).__name__
        raise HTTPException(422, f"expected a multipart form, got a malformed one: {reason[:200]}") from None
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        return [(_printable(file.filename), await file.read()) for file in files], form.get("masks")
    finally:
        await form.close()


def _json(
    body: bytes | bytearray, limits: Limits, card: Card, schema: type[documents.Photos]
) -> tuple[Photos, list[list[list[int]]] | None]:
    record = _valid(TypeAdapter(schema), body, limits, card)
    photos = []
    for index, text in enumerate(record.photos):
        try:
            content = base64.b64decode(text.partition(";base64,")[2] or text, validate=True)
        except ValueError:
            raise HTTPException(422, f"expected photos as base64 text, got something else at {index}") from None
        photos.append((f"photo {index}", content))
    return photos, getattr(record, "masks", None)


def _valid(schema: TypeAdapter[Any], text: str | bytes | bytearray, limits: Limits, card: Card) -> Any:
    """JSON of a schema; one of more values than a request can hold is refused before any of them is made."""
    height, width = card.grid
    most = 16 + 4 * limits.photos + limits.masks * (height * (width + 2) + 2)
    marks: Any = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    if sum(text.count(mark) for mark in marks) > most:
        raise HTTPException(422, f"expected JSON of at most {most:,} values, got more")
    try:
        return schema.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:80]
        raise HTTPException(422, f"expected JSON as /openapi.json says, got {place}: {first['msg']}") from None


def _printable(filename: str | None) -> str:
    """The last part of a file's name, printable and short: answers repeat it, and nothing opens it."""
    last = re.split(r"[\\/]", filename or "")[-1]
    return "".join(letter for letter in last if letter.isprintable())[:120].strip(". ") or "photo"
