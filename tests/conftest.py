"""Fixtures that several test files share, and Hypothesis without a clock or a die."""

from __future__ import annotations

import gc
import io
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from forked import Starter

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from bla.model.classifier import ExplainableClassifier

settings.register_profile("bla", deadline=None, derandomize=True)
settings.load_profile("bla")


SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes come first, so that of several workers one alone imports everything for them."""
    items.sort(key=lambda item: "start" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """What collection imported stays until the end: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is not for tests to fill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs, which are not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the photographs of ../shared/data, which are not part of the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def bad_photos() -> dict[str, bytes]:
    """Some 200 kinds of files that are no photo, or a broken or an odd one, by name; few of them can be shown."""
    return dict(_bad_photos())


def _bad_photos() -> Iterator[tuple[str, bytes]]:
    import numpy as np
    from PIL import Image

    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 255, (24, 32, 3), np.uint8)

    def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
        file = io.BytesIO()
        (image or Image.fromarray(pixels)).save(file, kind, **options)
        return file.getvalue()

    def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = bytes(100)) -> bytes:
        content = b"\x89PNG\r\n\x1a\n"
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        for kind, part in ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")):
            content += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        return content

    formats = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    magics = [
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        b"MM\0*",
        b"P6 ",
    ]
    others = [
        b"",
        b"\0",
        bytes(5000),
        b"text",
        b"<html></html>",
        b"{}",
        b"[[[[",
        b"%PDF-1.7\n",
        b"PK\x03\x04",
        b"\x7fELF",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0\x18ftypmp42",
        b"\0\0\0\x18ftypavif",
        b"%!PS-Adobe-3.0 EPSF",
        b"8BPS\0\x01",
        b"\0\0\x01\0\x01\0",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"DDS |",
        b"SIMPLE  =",
        b"\xd7\xcd\xc6\x9a",
        b"#FIG",
        b"\x1f\x8b\x08\0" + bytes(50),
        b"../../../etc/passwd",
        "ünïcödé".encode("utf-16"),
        b"\xef\xbb\xbf",
        b"\r\n" * 99,
    ]
    for index, content in enumerate(others):
        yield f"other-{index}", content
    for kind in formats:
        whole = encoded(kind)
        for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
            yield f"{kind}-cut-{share}", whole[: int(len(whole) * share)]
        for seed in range(6):
            damaged = bytearray(whole)
            for place in rng.randint(0, min(len(whole), 400), 1 + 3 * seed):
                damaged[place] ^= 1 << rng.randint(8)
            yield f"{kind}-flipped-{seed}", bytes(damaged)
        yield f"{kind}-twice", whole + whole
        yield f"{kind}-trailed", whole + rng.bytes(100)
        yield f"{kind}-headed", b"\n" + whole
        narrow = Image.new("RGB", (1, 3000))
        yield f"{kind}-narrow", encoded(kind, narrow)
        yield f"{kind}-point", encoded(kind, Image.new("L", (1, 1)))
    for magic in magics:
        for count in (0, 3, 300):
            yield f"magic-{magic[:4].hex()}-{count}", magic + rng.bytes(count)
    sizes = [
        (60_000, 60_000),
        (2**31 - 1, 1),
        (1, 100_000_000),
        (0, 0),
        (0, 9),
        (2**31 - 1, 2**31 - 1),
        (13_400, 13_400),
    ]
    for width, height in sizes:
        yield f"png-declares-{width}x{height}", png(width, height)
        yield f"ppm-declares-{width}x{height}", b"P6 %d %d 255\n" % (width, height)
        header = struct.pack(
            "<2sIHHIIiiHHIIiiII", b"BM", 200, 0, 0, 54, 40, min(width, 2**31 - 1), -height, 1, 24, *[0] * 6
        )
        yield f"bmp-declares-{width}x{height}", header + bytes(50)
        yield (
            f"gif-declares-{width}x{height}",
            b"GIF89a" + struct.pack("<HHBBB", width % 65536, height % 65536, 0, 0, 0),
        )
    yield "png-inflates", png(3000, 3000, data=bytes(3000 * 9001))
    yield "png-of-no-depth", png(4, 4, depth=77)
    yield "png-of-no-colour", png(4, 4, colour=9)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        yield f"mode-png-{mode}", encoded("PNG", Image.new(mode, (20, 10)))
    for mode in ("CMYK", "YCbCr", "L"):
        yield f"mode-jpeg-{mode}", encoded("JPEG", Image.new(mode, (20, 10)))
    for mode in ("CMYK", "F", "LAB", "I;16", "RGBA"):
        yield f"mode-tiff-{mode}", encoded("TIFF", Image.new(mode, (20, 10)))
    yield "tiff-of-nan", encoded("TIFF", Image.fromarray(np.full((9, 9), np.nan, np.float32)))
    yield "exif-broken", encoded("JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    yield "icc-broken", encoded("JPEG", icc_profile=rng.bytes(99))


@pytest.fixture(scope="module")  # while it runs, asyncio.run refuses, so it ends with the file
def browser() -> Iterator[Browser]:
    """A headless chromium: open a context or a page of it for each test."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("expected chromium in CI")
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="session")
def start() -> Iterator[Starter]:
    """Starts processes without importing everything for each."""
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 36 photos in three classes: read it, or copy it."""
    from small import write_classes

    return write_classes(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def tiny_run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `small.Tiny` on `colours` (setup bla-t): read it, or copy it."""
    import torch

    from bla import train
    from bla.training.settings import Settings
    from small import Tiny

    folder = tmp_path_factory.mktemp("tiny")
    settings = Settings(setup="bla-t", epochs=3, head_epochs=12, batch_size=8, learning_rate=0.005)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of summation depends on the number of threads
    try:
        train(colours, folder / "run", settings, model=Tiny(), device="cpu", cache=folder / "caches")
    finally:
        torch.set_num_threads(threads)
    return folder / "run"


@pytest.fixture(scope="session")
def lite0() -> ExplainableClassifier:
    """tf_efficientnet_lite0 with its ImageNet weights, wrapped and never fitted: copy it before changing it."""
    from bla.model.backbones import LITE0, load_backbone
    from bla.model.classifier import explainable

    return explainable(load_backbone(LITE0))
