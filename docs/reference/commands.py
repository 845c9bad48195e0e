"""Write the reference of the commands, docs/reference/cli.md, from their help texts.

python docs/reference/commands.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"


def reference() -> str:
    """The page: cyclopts' own, without its table of contents, the lists of subcommands and the defaults of flags."""
    from bla.cli import app

    sys.argv = ["bla"]  # which cyclopts takes for the program's name
    text = app.generate_docs()
    text = re.sub(r"^## Table of Contents\n\n(?: *- .*\n)+\n", "", text, flags=re.M)
    text = re.sub(r"^\*\*Commands\*\*:\n\n(?:\* .*\n|    .*\n)+\n?", "", text, flags=re.M)
    text = re.sub(r"^\*\*(?:Arguments|Parameters)\*\*:\n\n", "", text, flags=re.M)
    text = text.replace(" *[default: False]*", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip().replace("# bla\n", "# Commands\n", 1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
