"""The documentation site: ``make docs`` builds it in ``site/`` from these pages, the README and the docstrings."""

from __future__ import annotations

import re
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "bla"
author = "the authors of bla"
release = version_of("bounded-logit-attention")
html_title = f"bla {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["study/*"]
html_theme = "furo"
html_copy_source = html_show_sphinx = html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": False}

html_math_renderer = "mathml"
myst_heading_anchors = 3
smartquotes = False  # commands are copied from these pages
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"ImageLike": "ImageLike", "PhotoSource": "PhotoSource"}
maximum_signature_line_length = 88

README = Path(__file__).parents[1] / "README.md"
CARD = re.compile(r"\]\(src/bla/runs/explainers/(\w+)/CARD\.md\)")
SECTIONS = ("Attributes", "Examples", "Notes", "Parameters", "Raises", "Returns")
ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")


def sectioned(*given: Any) -> None:
    """Our docstrings' sections in reStructuredText: a title, and ``name: text`` as an entry of a definition list."""
    lines: list[str] = given[-1]
    found: list[str] = []
    section = ""
    for number, line in enumerate(lines):
        under = lines[number + 1] if number + 1 < len(lines) else ""
        if line in SECTIONS and under == "-" * len(line):
            section = line
            found += [f".. rubric:: {line}", ""]
        elif section and line and line == "-" * len(section):
            continue
        elif section in ("Attributes", "Parameters") and (entry := ENTRY.fullmatch(line)):
            names = ", ".join(f"``{part}``" for part in entry[1].split(", "))
            found += [names, f"    {entry[2]}"]
        else:
            found.append(line)
    lines[:] = found


def fronted(app: object, page: str, source: list[str]) -> None:
    """The front page is the README, with links as of a page here, and then its own text."""
    if page == "index":
        text = CARD.sub(r"](reference/explainers/\1.md)", README.read_text(encoding="utf-8"))
        text = re.sub(r"\]\((?!\w+:|#|docs/|reference/)", "](../", text).replace("](docs/", "](")
        source[0] = text + source[0]


def aliased(*event: Any) -> tuple[str | None, ...]:
    """A signature with type aliases by their names, in place of the objects that Sphinx puts there."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in event[-2:])


def kept_together(app: object, page: nodes.document) -> None:
    """A figure and its interval stay on one line, in text and in tables."""
    for text in [text for text in page.findall(nodes.Text) if " \u00b1 " in text]:
        text.parent.replace(text, nodes.Text(text.replace(" \u00b1 ", "\u00a0\u00b1\u00a0")))


def mathml(writer: Any, node: nodes.Node, *, block: bool) -> None:
    """Mathematics in MathML, which every browser shows without a script."""
    writer.body.append(tex2mathml(node.astext().replace(r"\textstyle", ""), as_block=block))
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls first."""
    app.connect("autodoc-process-docstring", sectioned)
    app.connect("autodoc-process-signature", aliased)
    app.connect("source-read", fronted)
    app.connect("doctree-read", kept_together)
    app.add_html_math_renderer("mathml", (partial(mathml, block=False), None), (partial(mathml, block=True), None))
    return {"parallel_read_safe": True}
