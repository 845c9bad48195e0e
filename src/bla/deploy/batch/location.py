"""Where a batch keeps its files: a folder on a disk or in an object store, which fsspec opens."""

from __future__ import annotations

import dataclasses
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from bla import BlaError
from bla.files import real, sole_writer, write_atomically


class BatchError(BlaError):
    """Photos that cannot be found, or a folder of results that belongs to other work."""


def is_url(place: str | Path) -> bool:
    """Whether this is in an object store or at another place that fsspec opens, such as s3://bucket/folder."""
    return isinstance(place, str) and "://" in place


def one_line(error: Exception) -> str:
    """An error's message on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """A file or folder: its path or URL, and its file system and path there, which PyArrow takes, too."""

    place: str
    files: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, place: str | Path) -> Location:
        """The location at a path or URL."""
        if not is_url(place):
            if not str(place) or re.match(r"\w{2,}:/", str(place)):
                raise BatchError(f"expected a folder or a URL such as s3://bucket/folder, got {str(place)!r}")
            path = str(real(place))
            return cls(path, LocalFileSystem(), path)
        scheme, _, rest = str(place).partition("://")
        try:  # without a cache of listings: other workers write, too
            return cls(f"{scheme}://{rest.rstrip('/')}", *fsspec.url_to_fs(place, use_listings_cache=False))
        except (ImportError, ValueError) as error:  # a package that it names, a scheme
            came = f"{type(error).__name__}: {one_line(error)}"
            raise BatchError(f"{place}: expected a URL that fsspec can open, got {came}") from error

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.place}/{name}", self.files, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.place

    @property
    def local(self) -> bool:
        """Whether it is on this machine's disks."""
        return isinstance(self.files, LocalFileSystem)

    def exists(self) -> bool:
        """Whether there is such a file."""
        return bool(self.files.exists(self.path))

    def names(self) -> set[str]:
        """The names of what the folder holds; none if there is no such folder."""
        try:
            return {path.rpartition("/")[2] for path in self.files.ls(self.path, detail=False)}
        except FileNotFoundError:
            return set()

    def read(self) -> bytes:
        """The file's content."""
        return bytes(self.files.cat_file(self.path))

    def write(self, content: bytes) -> None:
        """Write the file, whole or not at all: by a rename on a disk, by one put in an object store."""
        if self.local:
            write_atomically(Path(self.path), content)
        else:
            self.files.pipe_file(self.path, content)

    def remove(self) -> None:
        """Remove the file, if there is one."""
        with suppress(FileNotFoundError):
            self.files.rm_file(self.path)

    def clear(self) -> None:
        """Remove the folder, which holds files alone."""
        for name in self.names():
            (self / name).remove()
        if self.local:
            Path(self.path).rmdir()

    def mkdir(self) -> None:
        """Make the folder; an object store needs none."""
        if self.local:
            try:
                Path(self.path).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BatchError(
                    f"expected a folder that can be written, got {self}: {error.strerror}; choose another"
                ) from error

    def sole_writer(self, busy: Exception) -> AbstractContextManager[None]:
        """Raise ``busy`` if another process writes to this folder. An object store has no locks to tell by."""
        self.mkdir()
        return sole_writer(Path(self.path), busy) if self.local else nullcontext()
