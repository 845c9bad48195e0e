"""Requests to photos: bodies within limits, in three forms; headers looked at before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from bla.data.photo import FORMATS, DataError, Photo, Transform


class Refused(Exception):  # noqa: N818  an answer, not a fault
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a request may hold: bytes in its body, photos, pixels of a photo, subsets to ask about; seconds in all."""

    bytes: int = 32 * 1024 * 1024
    photos: int = 16
    pixels: int = 50_000_000
    masks: int = 256
    seconds: float = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """What came: named photos, still encoded, and the text fields."""

    photos: list[tuple[str, bytes]]
    fields: dict[str, Any]


async def received(request: Request, limits: Limits) -> Sent:
    """The photos and fields of a request: multipart, JSON with base64, or a photo as the body.

    Raises
    ------
    Refused
        413, 415 or 422, with the reason.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    body = await _body(request, limits)
    if kind == "multipart/form-data":
        sent = await _multipart(request, body, limits)
    elif kind == "application/json":
        sent = _json(body)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        sent = Sent([("photo", body)], {})
    else:
        raise Refused(415, f"expected multipart/form-data, application/json or image/..., got {kind[:80] or 'no type'}")
    if not 1 <= len(sent.photos) <= limits.photos:
        raise Refused(422, f"expected 1 to {limits.photos} photos, got {len(sent.photos)}")
    return sent


def decoded(name: str, content: bytes, transform: Transform, limits: Limits) -> Photo:
    """The photo, as the classifier is to see it.

    Raises
    ------
    DataError
        If it cannot be read, or has more pixels than are allowed: which is known before any of them is decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Exception:  # ``read`` gives the reason
        width = height = 0
    if width * height > limits.pixels:
        raise DataError(f"{name}: expected at most {limits.pixels:,} pixels, got {width} x {height}; scale it down")
    try:
        return transform.read(content)
    except DataError as error:
        raise DataError(f"{name}: {str(error).removeprefix(f'a file of {len(content)} bytes: ')}") from error


def masks_of(value: Any, grid: tuple[int, int], limits: Limits) -> npt.NDArray[np.bool_]:
    """Subsets of cells (M, H, W) from JSON, or from its text.

    Raises
    ------
    Refused
        422, with what was expected.
    """
    expected = f"expected masks as 1 to {limits.masks} lists of {grid[0]} rows of {grid[1]} cells, 0 or 1, not all 0"
    try:
        if isinstance(value, str):
            value = json.loads(value)
        array = np.array(value)
    except (ValueError, RecursionError, OverflowError):
        raise Refused(422, f"{expected}, got something else") from None
    if array.dtype.kind not in "biu" or array.ndim != 3 or array.shape[1:] != grid:
        raise Refused(422, f"{expected}, got shape {array.shape}")
    if not 1 <= len(array) <= limits.masks:
        raise Refused(422, f"{expected}, got {len(array)}")
    if not np.isin(array, (0, 1)).all() or not array.any(axis=(1, 2)).all():
        raise Refused(422, f"{expected}, got other values")
    return array.astype(np.bool_)


async def _body(request: Request, limits: Limits) -> bytes:
    too_large = Refused(413, f"expected at most {limits.bytes:,} bytes, got more; send a smaller photo")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > limits.bytes:
        raise too_large
    chunks, total = [], 0
    try:
        async for chunk in request.stream():
            total += len(chunk)
            if total > limits.bytes:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise Refused(400, "expected a whole body, got one that ends early") from None
    if not total:
        raise Refused(422, "expected a photo, got an empty body")
    return b"".join(chunks)


async def _multipart(request: Request, body: bytes, limits: Limits) -> Sent:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(
            request.headers, stream(), max_files=limits.photos, max_fields=8, max_part_size=1024 * 1024
        )
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(422, f"expected a multipart form, got a malformed one: {error.message}") from None
    except Exception as error:  # the parser's own errors, and those of odd headers
        raise Refused(422, f"expected a multipart form, got a malformed one: {type(error).__name__}") from None
    try:
        photos, fields = [], {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                photos.append((_name(value.filename), await value.read()))
            else:
                fields[name] = value
        return Sent(photos, fields)
    finally:
        await form.close()


def _json(body: bytes) -> Sent:
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(422, "expected JSON, got a malformed body") from None
    photos = record.get("photos") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(photos, list) or set(record) - {"photos", "masks"}:
        raise Refused(422, 'expected {"photos": ["BASE64", ...]}, got another object')
    found = []
    for index, text in enumerate(photos):
        if not isinstance(text, str):
            raise Refused(422, f"expected photos as base64 text, got {type(text).__name__} at {index}")
        try:
            found.append((f"photo {index}", base64.b64decode(text.partition(";base64,")[2] or text, validate=True)))
        except (binascii.Error, ValueError):
            raise Refused(422, f"expected photos as base64 text, got something else at {index}") from None
    return Sent(found, {key: value for key, value in record.items() if key != "photos"})


def _name(text: str | None) -> str:
    """The last part of a file's name, printable and short: it is only ever repeated, never opened."""
    last = re.split(r"[\\/]", text or "")[-1]
    return "".join(letter for letter in last if letter.isprintable())[:120].strip(". ") or "photo"
