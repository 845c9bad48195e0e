"""A whole participation in a real browser: keyboard alone, a phone, without JavaScript; nothing axe-core objects to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bla.study.app import create_app
from bla.study.plan import Plan
from bla.study.responses import Collected
from bla.study.serving import served
from bla.study.store import Store
from small_study import small_study

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

TRIALS = 3  # the practice, and what counts
Places = Callable[[str], "Served"]


class Served:
    """A study at an address, and what it has collected."""

    def __init__(self, study: Path, store: Store, address: str) -> None:
        self.study, self.store, self.address = study, store, address

    def collected(self) -> Collected:
        return self.store.collected(Plan.load(self.study))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """A study of each task, served from when it is first needed."""
    with ExitStack() as stack:

        @cache
        def of(task: str) -> Served:
            study, _ = small_study(tmp_path_factory.mktemp(task), task=task, trials=2, repeats=0, catches=0)
            store = stack.enter_context(Store.of(study))
            return Served(study, store, stack.enter_context(served(create_app(study, store))))

        yield of


@pytest.fixture
def context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    found = browser.new_context(**getattr(request, "param", {}))
    found.set_default_timeout(120_000)
    yield found
    found.close()


def opened(context: BrowserContext, address: str) -> tuple[Page, list[str]]:
    """A page, and what its console complains about."""
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    return page, said


def ready(page: Page) -> None:
    page.locator("form.answer[data-appeared]").wait_for()  # the clock runs, keys answer


def begin(page: Page) -> None:
    page.get_by_role("checkbox").check()
    with page.expect_navigation(url="**/instructions"):
        page.get_by_role("button", name="Begin").click()


def start(page: Page) -> None:
    with page.expect_navigation(url="**/trial"):
        page.get_by_role("link", name="Start").click()


@pytest.mark.parametrize("task", ["preference", "prediction"])  # arrows, digits
def test_with_the_keyboard_alone(task: str, places: Places, context: BrowserContext) -> None:
    place = places(task)
    page, said = opened(context, place.address)
    before = len(place.collected().participants)

    def tab_to(name: str) -> None:
        for _ in range(12):
            page.keyboard.press("Tab")
            if name in page.evaluate("document.activeElement.closest('label, a, button')?.textContent ?? ''"):
                style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert style != "none", "the focus is seen"
                return
        pytest.fail(f"no way to {name} by Tab")

    tab_to("I have read this")
    page.keyboard.press("Space")
    tab_to("Begin")
    page.keyboard.press("Enter")
    page.wait_for_url("**/instructions")
    tab_to("Start")
    page.keyboard.press("Enter")
    page.wait_for_url("**/trial")
    words = page.locator("form.answer button .words").first
    for number in range(TRIALS):
        ready(page)
        with page.expect_navigation():
            if number % 2:
                page.keyboard.press("ArrowRight" if task == "preference" else "2")
            else:
                tab_to(words.inner_text().split("\n")[-1].strip()[-5:])
                page.keyboard.press("Enter")
    assert "completion code" in page.inner_text("main")
    collected = place.collected()
    assert len(collected.participants) == before + 1
    mine = [r for r in collected.responses if r.participant == collected.participants[-1].participant]
    assert [r.place for r in mine] == [number % 2 for number in range(TRIALS)]
    assert {r.clock for r in mine} == {"browser"}
    assert all(0 < r.milliseconds <= (r.answered_at - r.shown_at).total_seconds() * 1000 for r in mine)
    assert said == []


PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2,
}  # fmt: skip


def accessible(page: Page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.wait_for_load_state()
    page.evaluate("Promise.all(document.getAnimations().map(each => each.finished))")  # colours on their way
    found = Axe().run(page).response["violations"]
    wrong = [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]
    assert not wrong, f"{page.url}: {wrong}"


def fits_a_phone(page: Page) -> None:
    ready(page)
    accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    for button in page.locator("form.answer button").all():
        box = button.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 44


@pytest.mark.parametrize("context", [PHONE], indirect=True)
def test_on_a_phone_and_back_by_the_personal_link(places: Places, context: BrowserContext, browser: Browser) -> None:
    page, said = opened(context, places("preference").address)
    page.get_by_role("checkbox").tap()
    page.get_by_role("button", name="Begin").tap()
    link = page.locator(".link a").evaluate("a => a.href")
    page.get_by_role("link", name="Start").tap()
    for number in range(TRIALS):
        fits_a_phone(page)
        if number == 1:  # on another device
            other = browser.new_context(**PHONE)
            page = other.new_page()
            page.goto(link)
            ready(page)
            assert "Question 2 of 3" in page.inner_text("header")
        with page.expect_navigation():
            page.locator("form.answer button").last.tap()
    assert "completion code" in page.inner_text("main")
    other.close()
    assert said == []


@pytest.mark.parametrize("task", ["prediction", "agreement"])
@pytest.mark.parametrize("context", [PHONE], indirect=True)
def test_every_task_fits_a_phone_and_is_accessible(task: str, places: Places, context: BrowserContext) -> None:
    page, said = opened(context, places(task).address)
    begin(page)
    accessible(page)
    start(page)
    for _ in range(2):  # the practice, and then with feedback to it
        fits_a_phone(page)
        with page.expect_navigation():
            page.locator("form.answer button").last.tap()
    assert said == []


@pytest.mark.parametrize("context", [{"java_script_enabled": False}], indirect=True)
def test_without_javascript(places: Places, context: BrowserContext) -> None:
    place = places("agreement")
    page, _ = opened(context, place.address)
    page.get_by_role("button", name="Begin").click()
    assert "tick the box" in page.inner_text("main")
    begin(page)
    start(page)
    for _ in range(TRIALS):
        page.locator("form.answer button").first.click()
    assert "completion code" in page.inner_text("main")
    collected = place.collected()
    mine = [r for r in collected.responses if r.participant == collected.participants[-1].participant]
    assert len(mine) == TRIALS
    assert {r.clock for r in mine} == {"server"}


def test_double_clicks_and_the_way_back_change_nothing(places: Places, context: BrowserContext) -> None:
    place = places("preference")
    page, _ = opened(context, place.address)
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="Begin").dblclick()
    page.get_by_role("link", name="Start").click()
    ready(page)
    page.locator("form.answer button").first.dblclick()
    page.wait_for_function("document.title.includes('Question 2')")
    page.go_back()
    page.wait_for_load_state()
    ready(page)
    page.locator("form.answer button").last.click()
    page.wait_for_load_state()
    collected = place.collected()
    mine = [r for r in collected.responses if r.participant == collected.participants[-1].participant]
    assert mine[0].place == 0
    assert [r.position for r in mine] == list(range(1, len(mine) + 1))
    assert len(mine) <= 2


def test_axe_finds_nothing_serious_in_light_and_in_dark(places: Places, context: BrowserContext) -> None:
    place = places("preference")
    page, said = opened(context, place.address)

    def in_both() -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            accessible(page)

    in_both()
    begin(page)
    in_both()
    start(page)
    for number in range(TRIALS):
        ready(page)
        if number < 2:
            in_both()
        with page.expect_navigation():
            page.locator("form.answer button").first.click()
    in_both()
    for address in ("/pause", "/nowhere", "/researcher"):
        page.goto(place.address + address)
        in_both()
    assert not [text for text in said if "404" not in text]
