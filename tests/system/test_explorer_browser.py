"""The explorer and the report in Chromium: keyboard, widths, and accessibility by axe."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from memtail.explorer.server import listen, serve
from memtail.report.publish import publish_report
from memtail.storage import keys
from memtail.storage.local import LocalStore
from tests.support.servers import free_port, server_binary

TOKEN = "a token for this browser"
# One page of each kind.
PAGES = [
    "/",
    "/experiments/digits",
    "/experiments/young",
    "/experiments/odd/train/0?from=0",
    "/experiments/digits/test/1",
    "/experiments/odd/studies",
    "/none",
]


@pytest.fixture(scope="module")
def address(explored: LocalStore) -> Iterator[str]:
    """Address of a `memtail explore` process."""
    address = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "memtail", "explore", "--store", str(explored.root), "--port", address.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    assert address in process.stdout.readline()
    for name in ("digits", "odd"):
        while urllib3.request("GET", f"{address}/experiments/{name}/train/0", timeout=60).status == 503:  # while the scores are being read
            time.sleep(0.1)
    yield address
    process.terminate()
    with process:  # whose output is closed
        assert process.wait(30) in (0, -15, 143)


@pytest.fixture(scope="module")
def closed(explored: LocalStore) -> str:
    """Address of an explorer that requires a token; it ends with the tests."""
    listening = listen("127.0.0.1", 0)
    threading.Thread(target=serve, args=(explored, TOKEN, listening), daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=server_binary("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:
    """A page; at the end, the console must hold no error about scripts, styles or images."""
    context = chromium.new_context(base_url=address)
    page = context.new_page()
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert [error for error in errors if "status of 40" not in error and "status of 503" not in error] == []


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element that matches has the focus."""
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_gallery_and_examples_work_by_keyboard_alone(page: Page) -> None:
    page.goto("/")
    tab_to(page, "a[href='/experiments/digits']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/experiments/digits")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skips what comes before the content
    tab_to(page, ".grid a")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    second = page.locator(".grid a").nth(1).get_attribute("href")
    assert page.evaluate("document.activeElement.getAttribute('href')") == second
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{second}")
    tab_to(page, ".grid a[href*='/test/']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/test/*")
    tab_to(page, ".grid a[href*='/train/']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/train/*")
    third = page.url
    page.keyboard.press("ArrowRight")
    page.wait_for_url(lambda url: "/train/" in url and url != third)
    tab_to(page, ".crumbs a[href^='/experiments/']")
    page.keyboard.press("Enter")
    page.wait_for_url("**/experiments/digits?page=*")


def test_a_bar_and_the_form_select_examples(page: Page) -> None:
    page.goto("/experiments/digits")
    bar = page.locator(".histogram a[href*='from=0.5&']")
    count = bar.get_attribute("aria-label").split()[0]
    bar.locator(".hit").click()
    page.wait_for_url("**from=0.5&to=0.55")
    assert page.locator("#shown").inner_text().startswith(f"{count} training example")
    assert page.locator(".histogram a:not(.out)").count() == 1
    page.get_by_role("spinbutton", name="Memorization from").fill("0.25")
    page.get_by_role("spinbutton", name="Memorization below").fill("")
    page.locator("select[name=class]").select_option("8")
    page.locator("select[name=sort]").select_option("index")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**class=8**")
    assert {tile.strip() for tile in page.locator(".grid .class").all_inner_texts()} == {"8"}
    values = [float(score.split()[0]) for score in page.locator(".grid .score").all_inner_texts()]
    assert values
    assert min(values) >= 0.245


def pass_an_interval(page: Page) -> None:
    """Let the time of the next update come; the page's clock must be installed before the page is opened."""
    page.clock.fast_forward(5000)


def test_progress_updates_without_losing_the_focus(page: Page) -> None:
    page.clock.install()
    page.goto("/")
    page.locator("a[href='/experiments/young']").focus()
    page.evaluate("document.getElementById('experiments').querySelector('p').textContent = 'an old value'")
    pass_an_interval(page)
    expect(page.get_by_text("an old value")).to_have_count(0, timeout=60_000)
    assert page.evaluate("document.activeElement.getAttribute('href')") == "/experiments/young"


def test_a_page_that_cannot_update_shows_since_when(page: Page) -> None:
    page.clock.install()
    page.goto("/")
    page.route("**/*", lambda route: route.fulfill(status=503))
    pass_an_interval(page)
    expect(page.get_by_text("Not updated since")).to_be_visible(timeout=60_000)
    page.unroute("**/*")
    pass_an_interval(page)
    expect(page.get_by_text("Not updated since")).to_be_hidden(timeout=60_000)


def test_a_waiting_page_becomes_the_gallery(page: Page) -> None:
    page.clock.install()
    page.goto("/experiments/young")
    page.evaluate("history.replaceState(null, '', '/experiments/digits')")
    pass_an_interval(page)
    expect(page.locator(".grid li").first).to_be_visible(timeout=60_000)


def test_arrow_keys_change_the_page_only_where_nothing_else_has_the_focus(page: Page) -> None:
    page.goto("/experiments/digits")
    tab_to(page, ".histogram a")
    page.keyboard.press("ArrowRight")
    page.locator("a[href='#examples']").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("!!document.activeElement.closest('#examples')")
    assert "page=" not in page.url
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**?page=2")


def test_a_token_opens_the_requested_page_until_the_browser_signs_out(page: Page, closed: str) -> None:
    fits_a_phone(page, f"{closed}/experiments/digits?class=3")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#shown")).to_be_visible(timeout=60_000)
    assert page.url == f"{closed}/experiments/digits?class=3"
    fits_a_phone(page, f"{closed}/experiments/digits")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Token required")).to_be_visible()
    page.goto(f"{closed}/experiments/digits")
    expect(page.get_by_label("Token")).to_be_visible()


@pytest.mark.parametrize("path", PAGES)
def test_pages_fit_a_phone_and_axe_reports_nothing(page: Page, path: str) -> None:
    fits_a_phone(page, path)


@pytest.mark.parametrize("width", [360, 390, 600, 700, 1100, 1290, 1440])
def test_scores_of_neighbours_do_not_overlap(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    for path in ("/experiments/odd/test/0", "/experiments/digits/train/0"):
        page.goto(path)
        assert page.locator(".grid .score").count() > 4
        wide = "scores => scores.filter(score => score.scrollWidth > score.clientWidth).map(score => score.textContent)"
        assert page.locator(".grid .score").evaluate_all(wide) == []


@pytest.mark.parametrize("name", ["digits", "odd"])
def test_axe_reports_nothing_in_a_report_with_legible_figures(page: Page, explored: LocalStore, tmp_path: Path, name: str) -> None:
    store = LocalStore(shutil.copytree(explored.root, tmp_path / "store"))
    pointer = publish_report(store, name)
    (tmp_path / "report.html").write_bytes(store.get(keys.report(name, pointer.version) + pointer.page))
    for width in (360, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto((tmp_path / "report.html").as_uri())
        found = Axe().run(page).response["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        drawn = page.locator("#convergence ~ * img, #convergence ~ img")
        assert drawn.evaluate("image => image.getBoundingClientRect().width") >= 600  # of two figures side by side


def fits_a_phone(page: Page, path: str) -> None:
    """Check that nothing overflows the width of a phone, and that axe reports nothing."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": 360, "height": 740})
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        found = Axe().run(page).response["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []


def test_markup_in_names_is_not_executed(page: Page) -> None:
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    for path in ("/experiments/odd?q=onerror", "/experiments/odd/train/0", "/experiments/odd/test/0"):
        page.goto(path)
        assert page.locator("b, [onerror]").count() == 0
        loaded = "[...document.images].every(image => image.loading == 'lazy' || image.naturalWidth == 8)"
        assert page.evaluate(loaded)
