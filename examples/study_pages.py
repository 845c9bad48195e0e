"""Screenshots of a study's pages: desktop and phone, light and dark. Needs Chromium."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from bla.study.app import create_app
from bla.study.serving import served
from bla.study.store import Store

DESKTOP, PHONE = (1100, 760), (390, 760)


def main() -> None:
    """Serve a copy of the study, walk through it, write PNG files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/study"))
    parser.add_argument("--only", nargs="*", help="such as trial-desktop consent-phone; by default all")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        study = Path(temporary) / "study"
        shutil.copytree(arguments.study, study, ignore=shutil.ignore_patterns("*.db*"))
        store = Store.of(study)
        options = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=options)
        with served(create_app(study, store)) as address:
            for name, size, dark in (("desktop", DESKTOP, False), ("phone", PHONE, False), ("dark", DESKTOP, True)):
                walk(browser, address, arguments.out, name, size, dark=dark, only=arguments.only)
        browser.close()
        store.close()


def walk(
    browser: Browser, address: str, out: Path, name: str, size: tuple[int, int], *, dark: bool, only: list[str] | None
) -> None:
    """Take part once, with a screenshot of each kind of page."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        device_scale_factor=1,
        has_touch=size == PHONE,
        is_mobile=size == PHONE,
    )
    page = context.new_page()

    def keep(what: str) -> None:
        if only and f"{what}-{name}" not in only:
            return
        page.wait_for_load_state("networkidle")
        target = out / f"{what}-{name}.png"
        page.screenshot(path=target, full_page=True)
        smaller(target)

    page.goto(address)
    keep("consent")
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="Begin").click()
    keep("instructions")
    page.get_by_role("link", name="Start").click()
    number = 0
    while page.locator("form.answer").count():
        number += 1
        if number in (1, 3):
            page.locator("form.answer:not(.waiting)").wait_for()
            keep("practice" if number == 1 else "trial")
        answer(page)
        if number == 5:
            page.goto(f"{address}/pause")
            keep("pause")
            page.get_by_role("link", name="Continue").click()
    keep("end")
    context.close()


def answer(page: Page) -> None:
    """Choose the first answer once the pictures have loaded."""
    page.locator("form.answer:not(.waiting)").wait_for()
    with page.expect_navigation():
        page.locator("form.answer button").first.click()


def smaller(path: Path) -> None:
    """Reduce the PNG to 256 colours."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
