"""A request's photos and masks, read within limits from a form, from JSON, or from a bare body."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request

from bla.deploy.engine import Card

Photos = list[tuple[str, bytes]]  # names and encoded photos


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The bytes of a request's body, its photos, the pixels of each, its masks, and the seconds to its answer."""

    bytes: int = 32 * 1024 * 1024
    photos: int = 16
    pixels: int = 50_000_000
    masks: int = 256
    seconds: float = 30.0


async def received(request: Request, limits: Limits) -> tuple[Photos, Any]:
    """The photos of a request, still encoded, and its masks, if any, as :func:`masks_of` reads them."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    body = await _body(request, limits)
    masks = None
    if kind == "multipart/form-data":
        photos, masks = await _multipart(request, body, limits)
    elif kind == "application/json":
        photos, masks = _json(body)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        photos = [("photo", body)]
    else:
        came = kind[:80] or "no type"
        raise HTTPException(415, f"expected multipart/form-data, application/json or image/..., got {came}")
    if not 1 <= len(photos) <= limits.photos:
        raise HTTPException(422, f"expected 1 to {limits.photos} photos, got {len(photos)}")
    return photos, masks


def masks_of(value: Any, card: Card, limits: Limits) -> npt.NDArray[np.bool_]:
    """Subsets of cells (M, H, W) from lists, or from their JSON text."""
    try:
        array = np.array(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError, OverflowError):
        array = np.array(None)
    if array.ndim != 3 or len(array) > limits.masks:
        raise HTTPException(422, f"expected masks as 1 to {limits.masks} lists of rows of cells, got {array.shape}")
    return card.checked_masks(array)


async def _body(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    too_large = HTTPException(413, f"expected at most {limits.bytes:,} bytes, got more; send a smaller photo")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.bytes:  # before any of it is read
        raise too_large
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.bytes:
                raise too_large
    except ClientDisconnect:
        raise HTTPException(400, "expected a whole body, got one that ends early") from None
    if not body:
        raise HTTPException(422, "expected a photo, got an empty body")
    return bytes(body)


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


def _json(body: bytes) -> tuple[Photos, Any]:
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(422, "expected JSON, got a malformed body") from None
    texts = record.get("photos") if isinstance(record, dict) else None
    if not isinstance(texts, list) or set(record) - {"photos", "masks"}:
        raise HTTPException(422, 'expected {"photos": ["BASE64", ...]}, got another object')
    photos = []
    for index, text in enumerate(texts):
        try:
            content = base64.b64decode(text.partition(";base64,")[2] or text, validate=True)
        except (AttributeError, binascii.Error, ValueError):
            raise HTTPException(422, f"expected photos as base64 text, got something else at {index}") from None
        photos.append((f"photo {index}", content))
    return photos, record.get("masks")


def _printable(filename: str | None) -> str:
    """The last part of a file's name, printable and short: answers repeat it, and nothing opens it."""
    last = re.split(r"[\\/]", filename or "")[-1]
    return "".join(letter for letter in last if letter.isprintable())[:120].strip(". ") or "photo"
