"""What a request may hold, and how long it may take."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The bytes of a request's body, its photos, the pixels of each, its masks, and the seconds to its answer.

    A photo of more pixels is refused before it is decoded.
    """

    bytes: int = 32 * 1024 * 1024
    photos: int = 16
    pixels: int = 50_000_000
    masks: int = 256
    seconds: float = 30.0
