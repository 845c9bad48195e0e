"""Archives from the internet: resumed, checked, and unpacked all or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from bla.data.photo import DataError
from bla.files import whole_folder
from bla.progress import Progress

BLOCK = 1 << 20
TIMEOUT = 30.0


class Archive(NamedTuple):
    """The address of a file, and the SHA-256 that it must have."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def downloaded(name: str, archives: Sequence[Archive], folder: Path, layout: str, report: Progress) -> Path:
    """Fetch and unpack archives into ``folder``, which appears whole or not at all.

    Until then the files lie beside it, and a second call resumes. Of two processes one fetches and the other waits.
    If an archive cannot be fetched or is not the one published, a DataError names the address and the ``layout`` that
    the folder should have.
    """
    partial = folder.parent / f".{folder.name}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if folder.exists():
                if any(folder.iterdir()):
                    raise DataError(f"{folder}: expected {layout}, or no such folder, got another; move it away")
                folder.rmdir()
            partial.mkdir(exist_ok=True)
            for archive in archives:
                _fetch(archive, partial / archive.name, name, f"{layout} in {folder}", report)
            with whole_folder(folder) as contents:
                for number, archive in enumerate(archives):
                    report(f"unpacking {archive.name}", number, len(archives))
                    _unpack(partial / archive.name, contents)
            shutil.rmtree(partial)
    except OSError as error:
        raise DataError(f"expected a folder for {name} that can be written, got {folder}: {error}") from error
    return folder


def _fetch(archive: Archive, target: Path, name: str, layout: str, report: Progress) -> None:
    if target.exists():
        return  # it has this name since it was checked
    part = target.with_name(f"{target.name}.part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            done = done if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            total = done + int(answer.headers.get("Content-Length") or 0)
            with part.open("ab" if done else "wb") as file:
                while block := answer.read(BLOCK):
                    done += file.write(block)
                    report(f"fetching {archive.name} of {name} (kB)", done // 1024, max(total, done) // 1024)
        if done < total:
            raise http.client.IncompleteRead(b"", total - done)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        if getattr(error, "code", 0) != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # else all of it was there
            with contextlib.suppress(OSError):
                part.parent.rmdir()  # an empty folder need not stay
            reason = getattr(error, "reason", "") or error
            raise DataError(
                f"expected {name} from {archive.url}, got {type(error).__name__}: {reason}. The same command resumes "
                f"the download; without internet, put {layout}, or pass the folder that has it"
            ) from error
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        part.unlink()
        raise DataError(
            f"expected SHA-256 {archive.sha256} of {archive.url}, got {digest}: not the file that was published, or "
            f"damaged in transit; it is removed. Try again, or put {layout}"
        )
    part.replace(target)


def _unpack(archive: Path, folder: Path) -> None:
    """Nothing lands outside of the folder: such members are an error (tar) or renamed (zip)."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as members:
                members.extractall(folder)
            return
        with tarfile.open(archive) as tape:
            tape.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive}: expected a whole archive, got {error}; remove it and try again") from error
