"""Text in pictures: what Pillow's own font can write, how long it is, and what fits."""

from __future__ import annotations

import bisect
import functools
import math
import unicodedata

from PIL import ImageFont

# The font has English letters alone; these are the ones that Unicode does not take apart.
_SPELLINGS = str.maketrans("øØłŁđĐðÐ\u00d7\u2212\u2013\u2014", "oOlLdDdDx---") | str.maketrans(
    {"ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "þ": "th", "Þ": "Th", "\u0131": "i"}
)


@functools.lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)


def length(text: str, size: int) -> int:
    """Pixels across."""
    return math.ceil(font(size).getlength(text))


def shorten(text: str, size: int, room: int) -> str:
    """``text`` if it fits, else as much of it as fits with an ellipsis, else nothing."""
    if length(text, size) <= room:
        return text
    fitting = bisect.bisect_right(range(1, len(text)), room, key=lambda end: length(text[:end] + "…", size))
    return text[:fitting].rstrip(" ,;") + "…" if fitting else ""


def legible(text: str, otherwise: str) -> str:
    """``text`` in the letters that the font has, or ``otherwise`` if some of it cannot be written in them.

    >>> legible("crème brûlée", "class 7"), legible("猫", "class 7")
    ('creme brulee', 'class 7')
    """
    plain = unicodedata.normalize("NFKD", text[:400]).translate(_SPELLINGS)
    if any(letter.isalnum() and not _has_glyph(letter) for letter in plain):
        return otherwise
    kept = (letter if _has_glyph(letter) else " " * letter.isspace() for letter in plain)
    return " ".join("".join(kept).split()) or otherwise


@functools.lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    # Pillow does not say which characters a font has: it draws a missing one like a non-character, as a box.
    mask = font(20).getmask
    return bytes(mask(letter)) != bytes(mask("\uffff"))


def percent(probability: float) -> str:
    """With one decimal; 0 and 100 only where they are exact.

    >>> percent(0.5), percent(0.99999), percent(1)
    ('50.0%', '>99.9%', '100%')
    """
    if 0 < probability < 0.0005:
        return "<0.1%"
    if 0.9995 <= probability < 1:
        return ">99.9%"
    return f"{100 * probability:.0f}%" if probability in {0, 1} else f"{probability:.1%}"
