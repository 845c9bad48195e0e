"""The documentation site: it builds without a warning, holds the public names, and asks nothing of other machines."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
ELSEWHERE = re.compile(r"""(?:src=|<link[^>]*href=|@import|url\()\s*["']?(?:https?:)?//[^"')\s>]+""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not importlib.util.find_spec("sphinx") and not os.environ.get("CI"):
        pytest.skip("needs the extra [docs]")
    from sphinx.cmd.build import build_main

    place = tmp_path_factory.mktemp("site")
    folders = [DOCS, place / "html", "-d", place / "read"]
    errors = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(errors):
        warnings.simplefilter("ignore")  # Sphinx's own
        code = build_main(["-W", "--keep-going", "-q", "-b", "html", *map(str, folders)])
    assert code == 0, errors.getvalue()
    return place / "html"


def test_every_page_is_there_and_the_readme_is_the_front(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    front = (site / "index.html").read_text(encoding="utf-8")
    assert "for each image it selects a subset of the feature map" in front.replace("\n", " ")
    assert all(f'href="{page.as_posix()}"' in front for page in pages - {Path("index.html")})  # the navigation


PUBLIC = (
    "bla",
    "bla.comparison",
    "bla.comparison.methods",
    "bla.comparison.report",
    "bla.deploy.batch",
    "bla.deploy.export",
    "bla.deploy.serve",
    "bla.metrics",
    "bla.operators",
)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_described(site: Path, module: str) -> None:
    pages = (site / "reference" / "api").glob("*.html")
    described = set(re.findall(r'id="(bla\.[\w.]+)"', "".join(page.read_text() for page in pages)))
    public = importlib.import_module(module)
    names = [name for name in public.__all__ if inspect.isroutine(it := getattr(public, name)) or inspect.isclass(it)]
    assert names
    assert not {f"{module}.{name}" for name in names} - described


def test_what_a_user_needs_first_heads_the_reference(site: Path) -> None:
    page = (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    first = ["bla.explainable", "bla.fit", "bla.model.classifier.ExplainableClassifier.explain"]
    places = [page.index(f'id="{name}"') for name in first]
    assert places == sorted(places)
    assert page.count('<dt class="sig sig-object py" id="bla.', 0, places[1]) == 1  # nothing stands before them


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("heatmap", "how-to/pictures"),
        ("saliency", "how-to/pictures"),
        ("notebook", "how-to/pictures"),
        ("matplotlib", "how-to/pictures"),
        ("grayscale", "how-to/inputs"),
        ("DataLoader", "how-to/inputs"),
        ("troubleshooting", "how-to/troubleshooting"),
    ],
)
def test_a_search_finds_the_page(site: Path, word: str, page: str) -> None:
    from snowballstemmer import stemmer

    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").rstrip(";)\n"))
    found: set[str] = set()
    for kind in ("terms", "titleterms"):
        places = index[kind].get(stemmer("english").stemWord(word.lower()), [])
        found |= {index["docnames"][place] for place in ([places] if isinstance(places, int) else places)}
    assert page in found


def test_commands_keep_their_dashes_and_quotes(site: Path) -> None:
    assert "--seeds" in (site / "background" / "paper.html").read_text(encoding="utf-8")
    assert not [page for page in site.rglob("*.html") if re.search("[\u2018\u2019\u201c\u201d]", page.read_text())]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    found = {path.name: ELSEWHERE.findall(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: links for name, links in found.items() if links}
    assert ELSEWHERE.search('<script src="https://cdn.example/mathjax.js">')
    assert ELSEWHERE.search('<link rel="stylesheet" href="//fonts.example/css">')
