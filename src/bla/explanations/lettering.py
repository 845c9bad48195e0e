"""Text in pictures: in which font, how long it is, and what fits. Any script, where the system has a font for it."""

from __future__ import annotations

import bisect
import functools
import math
import unicodedata
import warnings
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# For systems without a font for them: what Unicode does not take apart.
_SPELLINGS = str.maketrans("øØłŁđĐðÐ\u00d7\u2212\u2013\u2014", "oOlLdDdDx---") | str.maketrans(
    {"ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "þ": "th", "Þ": "Th", "\u0131": "i"}
)
FONT_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/Library/Fonts",
    "/System/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
_STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "mono", "serif", "condensed", "math")


def font(size: int, text: str = "") -> Font:
    """Pillow's own font, which has English letters, or the first of the system's fonts that can write ``text``."""
    return _loaded(_face(frozenset(text)), size)


@functools.lru_cache(maxsize=256)
def _loaded(path: Path | None, size: int) -> Font:
    return ImageFont.load_default(size=size) if path is None else ImageFont.truetype(path, size)


@functools.lru_cache(maxsize=4096)
def _face(letters: frozenset[str]) -> Path | None:
    return next((path for path in (None, *_files()) if all(_has_glyph(path, letter) for letter in letters)), None)


def _writable(text: str) -> bool:
    return _face(frozenset(text)) is not None or all(_has_glyph(None, letter) for letter in text)


@functools.cache
def _files() -> tuple[Path, ...]:
    """The system's fonts, upright ones of ordinary weight first."""
    files = (path for folder in FONT_FOLDERS for path in Path(folder).expanduser().rglob("*"))
    fonts = (path for path in files if path.suffix in (".ttf", ".otf", ".ttc"))
    return tuple(sorted(fonts, key=lambda path: (any(style in path.stem.lower() for style in _STYLES), path.stem)))


@functools.lru_cache(maxsize=16384)
def _has_glyph(path: Path | None, letter: str) -> bool:
    # Pillow does not say which characters a font has: it draws a missing one like a non-character, as a box.
    try:
        mask = _loaded(path, 20).getmask
        drawn = bytes(mask(letter))
        return letter.isspace() or (any(drawn) and drawn != bytes(mask("\uffff")))
    except OSError:  # no font after all
        return False


def length(text: str, size: int) -> int:
    """Pixels across."""
    return math.ceil(font(size, text).getlength(text))


def shorten(text: str, size: int, room: int) -> str:
    """``text`` if it fits, else as much of it as fits with an ellipsis, else nothing."""
    if length(text, size) <= room:
        return text
    fitting = bisect.bisect_right(range(1, len(text)), room, key=lambda end: length(text[:end] + "…", size))
    return text[:fitting].rstrip(" ,;") + "…" if fitting else ""


def wrapped(text: str, size: int, room: int, lines: int) -> list[str]:
    """``text`` in at most so many lines, broken at spaces, or within a word that is too long for one."""
    found, rest = list[str](), text
    while rest and len(found) < lines - 1 and length(rest, size) > room:
        fitting = max(bisect.bisect_right(range(1, len(rest)), room, key=lambda end: length(rest[:end], size)), 1)
        space = rest.rfind(" ", 0, fitting + 1)
        end = space if space > 0 else fitting
        found.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return [*found, shorten(rest, size, room)] if rest else found


def legible(text: str, otherwise: str) -> str:
    """``text`` without what is no letter and cannot be written, or ``otherwise`` if nothing is left.

    Where no font has some letter, a warning says so, and the text is spelled in English letters and code points.

    >>> legible(" cup \U0010ffff", "class 7"), legible("", "class 7")
    ('cup', 'class 7')
    """
    letters = (letter for letter in unicodedata.normalize("NFC", " ".join(text[:400].split())) if letter.isprintable())
    known = (letter for letter in letters if letter.isalnum() or ord(letter) in _SPELLINGS or _writable(letter))
    whole = "".join(known).strip()
    if not whole or _writable(whole):
        return whole or otherwise
    spelled = unicodedata.normalize("NFKD", whole).translate(_SPELLINGS)
    missing = {letter for letter in spelled if letter.isalnum() and not _has_glyph(None, letter)}
    for script in sorted({unicodedata.name(letter, "OTHER").split()[0] for letter in missing}):
        # the same words for every label, so that Python shows them once
        warnings.warn(f"expected a font with {script} letters on this system, found none: install one", stacklevel=2)
    codes = {letter: f"U+{ord(letter):04X} " for letter in missing}
    drawn = (letter if _has_glyph(None, letter) else codes.get(letter, "") for letter in spelled)
    return " ".join("".join(drawn).split()) or otherwise


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
