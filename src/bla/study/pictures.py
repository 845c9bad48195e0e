"""The pictures of a study: alike in everything that is not the explanation.

All have one size in pixels, one encoder with one setting, no metadata, random names, and files of one length: JPEG
comments fill the shorter ones up. Only what a picture shows tells arms apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bla.explanations import render
from bla.explanations.explanation import Explanation
from bla.study.errors import StudyError
from bla.study.plan import Plan

GREY = (128, 128, 128)  # around photos of another shape
LONG_SIDE = 480
_LANCZOS = Image.Resampling.LANCZOS
_SEGMENT = 65_533  # the most that one JPEG comment holds


def cut_to(explanation: Explanation, share: float) -> Explanation:
    """The explanation that selects this share of the grid, the best cells by rank, at least one."""
    ranks = explanation.unbounded.ravel()
    selected = np.zeros(ranks.size, np.bool_)
    selected[np.argsort(-ranks, kind="stable")[: max(1, round(share * ranks.size))]] = True
    return dataclasses.replace(explanation, selected=selected.reshape(explanation.grid))


def canvas(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one size (width, height) of all pictures: photos' median shape, from 3:4 to 4:3, the long side 480.

    >>> canvas([(640, 480), (100, 75), (50, 200)])
    (480, 360)
    """
    shapes = sorted(math.log(width / height) for width, height in sizes)
    ratio = math.exp(min(max(shapes[len(shapes) // 2], math.log(3 / 4)), math.log(4 / 3)))
    return (LONG_SIDE, round(LONG_SIDE / ratio)) if ratio >= 1 else (round(LONG_SIDE * ratio), LONG_SIDE)


def drawn(photo: Image.Image, explanation: Explanation | None, size: tuple[int, int], *, alone: bool) -> Image.Image:
    """The photo, or its explanation (`alone`: without the photo around it), in a picture of `size`."""
    if explanation is None:
        picture = photo.convert("RGB")
    else:
        # Strokes are drawn at the size at which they are seen.
        shown = ImageOps.contain(photo, size, _LANCZOS)
        across, down = shown.width / photo.width, shown.height / photo.height
        left, top, right, bottom = explanation.region
        region = (left * across, top * down, right * across, bottom * down)
        picture = (render.cutout if alone else render.overlay)(shown, dataclasses.replace(explanation, region=region))
    return ImageOps.pad(picture, size, _LANCZOS, color=GREY)


def encoded(picture: Image.Image) -> bytes:
    """As JPEG of the one setting, colours in full, nothing else in it."""
    clean = Image.new("RGB", picture.size)
    clean.paste(picture)
    return render.encoded(clean, "JPEG", quality=90, subsampling=0, optimize=False, progressive=False)


def common_length(files: Sequence[bytes]) -> int:
    """The length to which all files can be filled up: a comment takes 4 bytes at least."""
    return math.ceil((max(map(len, files)) + 4) / 1024) * 1024 + 1024


def filled_up(jpeg: bytes, length: int) -> bytes:
    """The file with comments of zeros behind its first marker, `length` bytes in all."""
    missing = length - len(jpeg)
    if jpeg[:2] != b"\xff\xd8" or missing < 4:
        raise ValueError(f"expected a JPEG of at most {length - 4} bytes, got {len(jpeg)} bytes")
    comments = bytearray()
    while missing:
        part = min(missing, _SEGMENT + 4)
        if 0 < missing - part < 4:
            part -= 4
        comments += b"\xff\xfe" + (part - 2).to_bytes(2, "big") + bytes(part - 4)
        missing -= part
    return jpeg[:2] + bytes(comments) + jpeg[2:]


def registered(study: Path, plan: Plan) -> dict[str, bytes]:
    """Every picture's bytes by its token, from the study's folder; StudyError if one is not the registered one."""
    found = {}
    for token, (_, _, picture) in plan.every_picture.items():
        path = study / "pictures" / f"{token}.jpg"
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != picture.sha256:
            raise StudyError(f"expected the registered picture {path}, got a changed or missing file: put it back")
        found[token] = content
    return found
