"""Write the reference of the commands, docs/reference/cli.md, from their help texts.

python docs/reference/commands.py
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
OPTION = re.compile(r"^\* `[-A-Z].*\n", re.M)
"""An option or an argument; what several commands have, with the same words, is described once."""


def reference() -> str:
    """The page: cyclopts' own, without its lists of commands, and with what several commands share described once."""
    from bla.cli import app

    app["study"]  # which loads it
    sys.argv = ["bla"]  # which cyclopts takes for the program's name
    text = app.generate_docs()
    text = re.sub(r"^## Table of Contents\n\n(?: *- .*\n)+\n", "", text, flags=re.M)
    text = re.sub(r"^\*\*.*\*\*:\n\n(?:\* \[`.*\n|    .*\n)+\n?", "", text, flags=re.M)
    text = re.sub(r"^\*\*(?:Arguments|Parameters)\*\*:\n\n", "", text, flags=re.M)
    text = re.sub(r"^(#+) bla .*\n\n```console\n(.*)\n```", r"\1 `\2`", text, flags=re.M).replace(" [OPTIONS]", "")
    text = re.sub(r" \*\[default: (?:False|\(\))\]\*| \*\*\[required\]\*\*", "", text)
    text = OPTION.sub(lambda option: _brief(option[0]), text)
    common = [option for option, count in Counter(OPTION.findall(text)).items() if count > 1]
    for option in common:
        name = option.split("`")[1]
        text = text.replace(option, f"* {name}\n" if name.startswith("--") else "")  # an argument stands in the heading
    text = re.sub(r"^(?:\* --.*\n)+", _named, text, flags=re.M)
    head, rest = re.sub(r"\n\nExample: `bla explain.*", "", text, count=1).split("\n## ", 1)
    many = "Several commands share these arguments and options:\n\n" + "".join(common)
    text = f"{head.strip()} What a heading names is required; defaults stand in brackets.\n\n{many}\n## {rest}"
    return re.sub(r"\n{3,}", "\n\n", text).strip().replace("# bla\n", "# Commands\n", 1) + "\n"


def _brief(option: str) -> str:
    """An option as `--name=TYPE`, without the choices that its words name, and with its default in brackets."""
    if (found := re.search(r" \*\[choices: (.*?)\]\*", option)) and all(
        re.search(rf"\b{re.escape(choice)}\b", option.replace(found[0], "")) for choice in found[1].split(", ")
    ):
        option = option.replace(found[0], "")
    option = re.sub(r"^(\* `--[\w-]+) ([A-Z|]+`)", r"\1=\2", option)
    return re.sub(r"\*\[default: (.*?)\]\*", r"*[\1]*", option)


def _named(options: re.Match[str]) -> str:
    names = (line[2:].partition("=")[0] for line in options[0].splitlines())
    return f"* `{'`, `'.join(names)}`\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
