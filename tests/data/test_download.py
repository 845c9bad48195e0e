"""Downloads from a server of this machine: resumed, checked, all or nothing."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from bla.data import published as datasets
from bla.data.download import Archive, downloaded
from bla.data.photo import DataError
from bla.data.published import Published, cats_vs_dogs, read_images
from bla.progress import silent

from .test_published import write_cats_vs_dogs


class Server(HTTPServer):
    """Serves bytes by name; can break off once, and can know nothing of ranges."""

    files: dict[str, bytes]
    break_after: int | None = None
    ranges = True
    asked: list[tuple[str, str | None]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked.append((name, wanted))
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop, self.server.break_after = self.server.break_after, None
        self.wfile.write(content[start : start + stop if stop else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    found.files, found.asked = {}, []
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def archive(server: Server, name: str, content: bytes) -> Archive:
    server.files[name] = content
    return Archive(f"http://127.0.0.1:{server.server_port}/{name}", hashlib.sha256(content).hexdigest())


def tape(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as written:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            written.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_a_download_goes_on_and_appears_whole(server: Server, tmp_path: Path) -> None:
    one = archive(server, "one.tar.gz", tape(a=b"first" * 1000))
    two = archive(server, "two.tar.gz", tape(b=bytes(range(256)) * 40))
    folder = tmp_path / "kept" / "set"
    server.break_after = 50
    with pytest.raises(DataError, match=r"expected set from http://127.*The same command resumes the download"):
        downloaded("set", (one, two), folder, "a, b", silent)
    assert not folder.exists()
    told: list[tuple[str, int, int]] = []
    assert downloaded("set", (one, two), folder, "a, b", lambda *line: told.append(line)) == folder
    assert server.asked == [("one.tar.gz", None), ("one.tar.gz", "bytes=50-"), ("two.tar.gz", None)]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert (folder / "a").read_bytes() == b"first" * 1000
    assert sorted(path.name for path in folder.parent.iterdir()) in ([".set.lock", "set"], ["set"])
    assert "fetching one.tar.gz of set (kB)" in {title for title, _, _ in told}


def test_servers_without_ranges_and_files_already_there(server: Server, tmp_path: Path) -> None:
    content = tape(a=b"x" * 5000)
    one = archive(server, "one.tar.gz", content)
    partial = tmp_path / ".set.partial"
    partial.mkdir()
    (partial / "one.tar.gz.part").write_bytes(b"another beginning")
    server.ranges = False
    downloaded("set", (one,), tmp_path / "set", "a", silent)
    assert (tmp_path / "set" / "a").stat().st_size == 5000
    server.ranges = True
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".other.partial" / "one.tar.gz.part").write_bytes(content)
    assert (downloaded("other", (one,), tmp_path / "other", "a", silent) / "a").exists()


def test_what_is_not_the_published_file_is_refused(server: Server, tmp_path: Path) -> None:
    one = archive(server, "one.tar.gz", tape(a=b"x"))
    server.files["one.tar.gz"] = tape(a=b"y")
    with pytest.raises(DataError, match=rf"expected SHA-256 {one.sha256} .*, got [0-9a-f]{{64}}: not the file"):
        downloaded("set", (one,), tmp_path / "set", "a", silent)
    assert not (tmp_path / "set").exists()
    assert not list(tmp_path.glob(".set.partial/one*"))


def test_members_stay_in_the_folder(server: Server, tmp_path: Path) -> None:
    one = archive(server, "one.tar.gz", tape(**{"../../outside": b"x"}))
    with pytest.raises(DataError, match="whole archive"):
        downloaded("set", (one,), tmp_path / "below" / "set", "a", silent)
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "below" / "set").exists()


def test_a_folder_of_other_things_is_left_alone(server: Server, tmp_path: Path) -> None:
    one = archive(server, "one.tar.gz", tape(a=b"x"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(DataError, match="move it away"):
        downloaded("set", (one,), tmp_path / "set", "a", silent)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine"]


def test_data_by_name_is_fetched_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cats_vs_dogs(tmp_path / "original")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for path in sorted(root.rglob("*")):
            written.write(path, path.relative_to(root))
    pets = Published((archive(server, "pets.zip", buffer.getvalue()),), "", ("PetImages/Cat",), cats_vs_dogs)
    monkeypatch.setitem(datasets.PUBLISHED, "cats_vs_dogs", pets)
    kept = tmp_path / "kept"
    for _ in range(2):
        splits, source = read_images("cats_vs_dogs", data_root=kept, cache=tmp_path, report=silent)
        assert source == str(kept / "cats_vs_dogs")
        assert len(splits.whole()) == 26
    assert len(server.asked) == 1


@pytest.mark.parametrize("name", datasets.PUBLISHED)
def test_offline_the_error_tells_address_and_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.delenv("no_proxy", raising=False)
    published = datasets.PUBLISHED[name]
    with pytest.raises(DataError) as caught:
        read_images(name, data_root=tmp_path, cache=tmp_path, report=silent)
    message = str(caught.value)
    assert published.archives[0].url in message
    assert datasets.layout(name) in message
    assert str(tmp_path / name) in message
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert all(len(archive.sha256) == 64 for archive in published.archives)
