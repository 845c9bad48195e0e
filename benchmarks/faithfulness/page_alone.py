"""Does the page without a server say what `bla explain` says? Needs Chromium; a page is made by `bla export --to html`.

    python -m benchmarks.faithfulness.page_alone page.html PHOTO ... --explainer tf_efficientnet_lite0

Each photo is given to the page in a browser that is offline, of a desktop's and of a phone's width.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

from benchmarks.results import parser_of
from bla.deploy.engine import open_engine

WIDTHS = {"desktop": (1160, 960), "phone": (390, 844)}
ANSWERED = "why && photo && photo.name === {} && !document.body.classList.contains('busy')"
ANSWERS = ("classifier", "prediction")


def said(page: Page, photo: Path, seconds: int = 60) -> dict[str, Any]:
    """The explanation of a photo on the page."""
    page.set_input_files("#choose", photo)
    for _ in range(10 * seconds):
        if page.evaluate(ANSWERED.format(json.dumps(photo.name))):
            break
        if page.locator("#error").is_visible():
            raise RuntimeError(f"{photo}: {page.inner_text('#error')}")
        page.wait_for_timeout(100)
    found: dict[str, Any] = page.evaluate("why")
    return found


def main() -> None:
    """Ask the page and the engine about each photo, print what differs."""
    parser = parser_of(__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--explainer", default="tf_efficientnet_lite0")
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots")
    arguments = parser.parse_args()
    expected = [why.to_dict() for why in open_engine(arguments.explainer).explain_each(arguments.photos)]
    assert all("error" not in record for record in expected)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, (across, down) in WIDTHS.items():
            messages: list[str] = []
            page = browser.new_context(viewport={"width": across, "height": down}, offline=True).new_page()
            for event in ("console", "pageerror", "requestfailed"):
                page.on(event, lambda what, kept=messages: kept.append(str(what)))  # type: ignore[call-overload]
            page.goto(arguments.page.resolve().as_uri())
            same, furthest = {"class": 0, "cells": 0, "region": 0}, 0.0
            for number, (photo, record) in enumerate(zip(arguments.photos, expected, strict=True)):
                found = said(page, photo)
                same["class"] += all(found[key]["index"] == record[key]["index"] for key in ANSWERS)
                same["cells"] += found["selected"] == record["selected"]
                same["region"] += np.allclose(found["region"], record["region"])
                misses = [abs(found[key]["probability"] - record[key]["probability"]) for key in ANSWERS]
                furthest = max(furthest, *misses)
                if arguments.pictures:
                    arguments.pictures.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=arguments.pictures / f"{width}-{number}.png", full_page=True)
            findings = [violation["id"] for violation in Axe().run(page).response["violations"]]
            wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
            record = {"width": width, "photos": len(expected), "same": same, "largest difference": furthest}
            print(json.dumps(record | {"axe": findings, "console": messages, "too wide": wide}))
        browser.close()


if __name__ == "__main__":
    main()
