"""Run the tutorials, and write the notebooks: each page is the source of one.

    python docs/tutorials/run.py [NAME ...]

runs the Python blocks of each page, one after another, as a notebook's cells: what a block prints goes into the block
of text that follows it, the picture that its last line is, or shows itself as, into the file that follows it. Then
`NAME.ipynb` is written from `NAME.md`. The tests run the pages on small networks and few photos.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

HERE = Path(__file__).parent
PAGES = ("explain", "audit", "train", "inspect")
BLOCK = re.compile(
    r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?"
    r"(?:\n!\[(?P<words>[^\]]+)\]\((?P<picture>[\w-]+\.jpg)\)\n)?",
    re.DOTALL,
)


class Ran(NamedTuple):
    """A block: where it is in the page, what it printed, and the picture that it displayed."""

    block: re.Match[str]
    printed: str
    picture: Image.Image | None


def ran(page: Path, smaller: Callable[[str], str] = str) -> Iterator[Ran]:
    """Run a page's blocks in the working folder, each changed by ``smaller``."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        lines = "\n" * text[: block.start("code")].count("\n")  # so that a traceback names the page's line
        tree = ast.parse(lines + smaller(block["code"]), str(page))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, str(page), "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), str(page), "eval"), names)
        yield Ran(block, printed.getvalue(), _picture(value))


def _picture(value: Any) -> Image.Image | None:
    """What a notebook displays of a value."""
    if value is None or isinstance(value, Image.Image):
        return value
    return Image.open(io.BytesIO(value._repr_png_())).convert("RGB")


def notebook(page: Path) -> str:
    """The notebook of a page, with what the page says that its blocks print and show."""
    text, cells, start = page.read_text(encoding="utf-8"), [], 0
    text = re.sub(r" \[The page as a\s+notebook\]\(\w+\.ipynb\)\.", "", text)
    for block in BLOCK.finditer(text):
        cells.append({"cell_type": "markdown", "source": text[start : block.start()].strip()})
        outputs: list[dict[str, Any]] = []
        if block["printed"]:
            outputs.append({"output_type": "stream", "name": "stdout", "text": block["printed"]})
        if block["picture"]:
            data = base64.b64encode((page.parent / block["picture"]).read_bytes()).decode("ascii")
            shown = {"image/jpeg": data, "text/plain": f"<{block['words']}>"}
            outputs.append({"output_type": "display_data", "data": shown, "metadata": {}})
        code = {"cell_type": "code", "source": block["code"].rstrip("\n")}
        cells.append(code | {"execution_count": None, "outputs": outputs})
        start = block.end()
    cells.append({"cell_type": "markdown", "source": text[start:].strip()})
    cells = [cell | {"id": f"cell-{number}", "metadata": {}} for number, cell in enumerate(cells) if cell["source"]]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    whole = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(names: Sequence[str]) -> None:
    """Run pages, each in a temporary folder; write what they print, their pictures and the notebooks."""
    for name in names:
        page = HERE / f"{name}.md"
        text = page.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            os.environ["BLA_CACHE"] = str(Path(place) / "cache")
            done = list(ran(page))
        for block, printed, picture in reversed(done):
            shown = f"\n```text\n{printed}```\n" if printed else ""
            if picture is not None:
                picture.convert("RGB").save(HERE / block["picture"], quality=88)
                shown += f"\n![{block['words']}]({block['picture']})\n"
            text = f"{text[: block.start()]}```python\n{block['code']}```\n{shown}{text[block.end() :]}"
        page.write_text(text, encoding="utf-8")
        (HERE / f"{name}.ipynb").write_text(notebook(page), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or PAGES)
