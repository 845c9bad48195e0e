"""What a photo's file says before it is decoded: its format, its size, its scans, and the memory that it will take."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from PIL import Image

from bla.data.arrays import DataError
from bla.data.sharing import PILLOW_QUIET

# Pillow knows dozens more; these are the photos' own, and none of them starts another program, as EPS does.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Those of phones, if Pillow or a plugin of it reads them: pillow-heif's register_heif_opener()
_PHONES = ("AVIF", "HEIF")
MAX_SCANS = 100
"""Of a JPEG, usually 1 or 10; each takes the time of a photo, and a few bytes."""
BYTES = {"WEBP": 20, "AVIF": 20, "HEIF": 20}
"""What decoding takes at its peak, in bytes for each pixel; 12, more than any, for other formats."""


def formats_of(head: bytes) -> tuple[str, ...]:
    """The formats that a file may be of by its first bytes."""
    if head[4:8] != b"ftyp":
        return FORMATS
    Image.init()  # which loads all plugins
    return tuple(kind for kind in _PHONES if kind in Image.OPEN) or FORMATS


def decoding_bytes(content: bytes, *, whole: bool = False) -> int:
    """About what decoding a photo's file takes at its peak, from its head; 0 if it is no photo.

    :meth:`Transform.read` reduces a JPEG of one scan; ``whole`` photos, as :func:`open_photo` gives them, are not.
    """
    kind, size = "WEBP", webp_size(content[:30])
    if size is None:
        try:
            file = Bounded(io.BytesIO(content), "a photo")
            with PILLOW_QUIET, Image.open(file, formats=formats_of(content[:30])) as photo:
                kind, size = str(photo.format), photo.size
                scans = scans_of(photo)
                if scans > MAX_SCANS:
                    return 0
                whole = whole or kind != "JPEG" or scans > 1
        except Exception:  # reading it will say why
            return 0
    return BYTES.get(kind, 12) * size[0] * size[1] // (1 if whole or kind == "WEBP" else 16)


class Bounded:
    """A photo's file; one that makes its decoder read in very many small pieces would keep it busy for minutes."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self._reads, self._bytes = file, name, 0, 0

    def read(self, count: int = -1) -> bytes:
        content = self._file.read(count)
        self._reads, self._bytes = self._reads + 1, self._bytes + len(content)
        if self._reads > 5_000 + self._bytes / 512:
            raise DataError(f"{self._name}: expected a photo, got thousands of tiny parts; save it anew")
        return content

    def unbounded(self) -> None:
        """Allow small pieces from now on."""
        self.__dict__["read"] = self._file.read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def scans_of(photo: Image.Image) -> int:
    """In how many passes over its pixels a JPEG comes; 1 for other formats, and for most JPEGs."""
    file: Any = getattr(photo, "fp", None)
    if file is None or photo.format not in ("JPEG", "MPO"):
        return 1
    place = file.tell()  # behind the first scan's marker: its length, then its components
    if not photo.info.get("progressive") and file.read(3)[2:] == bytes([len(photo.getbands())]):
        scans = 1
    else:
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
    file.seek(place)
    return int(scans)


def webp_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) by the first 30 bytes of a WebP file; None for other files."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    match head[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        case b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
