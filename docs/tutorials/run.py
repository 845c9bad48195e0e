"""Run the tutorials: their Python blocks, one after another, each page with names of its own.

    python docs/tutorials/run.py

writes the pictures that they make beside them, and what each block prints into the block that follows it. The tests
run them by the same function and hold what is printed, and the pictures, against what is written here.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PAGES = ("explain", "audit", "train")
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?", re.DOTALL)


class Ran(NamedTuple):
    """A block: where it is in the page, what the page says that it prints, and what it printed."""

    block: re.Match[str]
    written: str
    printed: str


def ran(page: Path) -> Iterator[Ran]:
    """Run a page's blocks in the working folder."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        lines = "\n" * text[: block.start("code")].count("\n")  # so that a traceback names the page's line
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(lines + block["code"], str(page), "exec"), names)
        yield Ran(block, block["printed"] or "", printed.getvalue())


def main() -> None:
    """Run all pages in one temporary folder; write what they print and their pictures."""
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ["BLA_CACHE"] = str(Path(place) / "cache")
        for name in PAGES:
            page = HERE / f"{name}.md"
            text = page.read_text(encoding="utf-8")
            for block, _, printed in reversed(list(ran(page))):
                shown = f"\n```text\n{printed}```\n" if printed else ""
                text = f"{text[: block.start()]}```python\n{block['code']}```\n{shown}{text[block.end() :]}"
            page.write_text(text, encoding="utf-8")
        for picture in Path(place).glob("*.jpg"):
            shutil.copy(picture, HERE / picture.name)
        os.chdir(HERE)


if __name__ == "__main__":
    main()
