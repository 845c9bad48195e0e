"""Photos that take much memory or time, handled by another process: it can be ended, and holds no thread of ours up."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import numpy as np

from bla.data.decoding import decoding_bytes
from bla.data.photo import DECODING, DataError, Photo, Transform
from bla.deploy.pictures import picture
from bla.explanations.explanation import Explanation
from bla.files import typed

LARGE = 128 * 2**20
"""A photo that takes more to decode is handled here. Smaller WebP files hold other threads up too, but not for long."""


class Heavy(Exception):  # noqa: N818 - it is no fault
    """A photo that belongs here."""


def heavy(content: bytes, *, whole: bool = False) -> bool:
    """Whether a photo's file belongs here; ``whole`` where its picture is wanted, for which no JPEG is reduced."""
    slow = content[:2] == b"BM" or content[:1] == b"P"  # which Pillow decodes in Python, some of them
    return (slow and len(content) > 2**20) or decoding_bytes(content, whole=whole) > LARGE


def read(transform: Transform, content: bytes, *, name: str, most_pixels: int | None, seconds: float) -> Photo:
    """:meth:`bla.data.photo.Transform.read` of a file; a DataError also if it takes longer."""
    question = {"transform": transform.to_dict(), "name": name, "most_pixels": most_pixels}
    head, _, pixels = _asked(question, content, name, seconds).partition(b"\n")
    size, region, shown = typed(head, tuple[tuple[int, ...], tuple[float, ...], str])
    return Photo(np.load(io.BytesIO(pixels)), size, region, shown=shown)


def drawn(content: bytes, explanation: Explanation, *, seconds: float) -> bytes:
    """:func:`bla.deploy.pictures.picture` of a photo's file; a DataError also if it takes longer."""
    return _asked({"explanation": explanation.to_dict()}, content, explanation.image, seconds)


def _asked(question: dict[str, Any], content: bytes, name: str, seconds: float) -> bytes:
    # -P: a module in the working folder is not taken for one of ours
    command = [sys.executable, "-P", "-m", "bla.deploy.apart"]
    text = json.dumps(question).encode() + b"\n" + content
    with DECODING.taken(min(DECODING.most, decoding_bytes(content, whole=True))):
        try:
            found = subprocess.run(command, input=text, capture_output=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise DataError(
                f"{name}: expected a photo that is read within {seconds:g} s, got a slower one; scale it down"
            ) from None
    if found.returncode:
        raise DataError(f"{name}: expected a whole photo, got one that cannot be read; replace it")
    kind, _, answer = found.stdout.partition(b"\n")
    if kind != b"done":
        raise DataError(answer.decode())
    return answer


def _answer(question: dict[str, Any], content: bytes) -> bytes:
    if "explanation" in question:
        return picture(content, Explanation.from_dict(question["explanation"]))
    transform = Transform.from_dict(question["transform"])
    photo = transform.read(content, name=question["name"], most_pixels=question["most_pixels"])
    pixels = io.BytesIO()
    np.save(pixels, photo.pixels)
    return json.dumps([photo.size, photo.region, photo.shown]).encode() + b"\n" + pixels.getvalue()


def main() -> None:
    """Answer the question on stdin."""
    question = json.loads(sys.stdin.buffer.readline())
    try:
        answer = b"done\n" + _answer(question, sys.stdin.buffer.read())
    except DataError as error:
        answer = b"refused\n" + str(error).encode("utf-8", "replace")
    sys.stdout.buffer.write(answer)


if __name__ == "__main__":
    main()
