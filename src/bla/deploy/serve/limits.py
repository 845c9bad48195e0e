"""What a request may hold, and how long it may take."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The server's limits.

    Attributes
    ----------
    bytes: of a request's body.
    photos: in a request.
    pixels: of a photo; a larger one is refused before it is decoded.
    masks: subsets of cells in a request.
    seconds: from a request to its answer.
    """

    bytes: int = 32 * 1024 * 1024
    photos: int = 16
    pixels: int = 50_000_000
    masks: int = 256
    seconds: float = 30.0
