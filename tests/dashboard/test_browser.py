"""The page in a real browser: the system's Chromium, driven by Playwright."""

import shutil
import time

import pytest

from fedmomentum.dashboard.dashboard import Dashboard
from fedmomentum.dashboard.site import HEADERS
from fedmomentum.report.live_page import LivePage
from tests.dashboard.serving import serving
from tests.report.folders import records, row, write_run
from tests.report.live import EVIL, write_running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
CONTRAST = """() => {
  const channel = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((value) => channel(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.querySelectorAll("main *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || element.closest("svg") || element.id === "spoken" || element.tagName === "NOSCRIPT") continue;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort();
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push([element.tagName, element.className, ratio]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """Open an address in a new window; the browser's complaints are collected."""
    contexts = []

    def open_at(url, **look):
        context = browser.new_context(**look)
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("dialog", lambda dialog: page.complaints.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#connection[data-state=open]")
        return page

    yield open_at
    for context in contexts:
        context.close()


def until(page, event, seconds=15.0):
    """Wait; the page's own waiting would evaluate text, which its policy forbids."""
    end = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < end, "it did not come about"
        page.wait_for_timeout(50)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run in progress whose clients have names that are attacks."""
    folder = tmp_path_factory.mktemp("hostile")
    write_running(folder, EVIL, reason="<svg onload=alert(1)>")
    (folder / "server.log").write_text(
        "".join(f"line {k} <img src=x onerror=alert(1)>\n" for k in range(90))
    )
    with serving(LivePage(folder, "server.log")) as found:
        yield found


def test_hostile_names_are_shown_and_do_nothing(hostile, open_page):
    page = open_page(f"http://127.0.0.1:{hostile.port}/")
    assert page.complaints == []
    names = page.locator("#clients tbody th").all_inner_texts()
    assert EVIL[0] in names and EVIL[1] in names and "abc\ufffdgnp.exe" in names
    assert page.locator("main img, main iframe, main script").count() == 0
    # everything came from the page's own address
    assert {url.split("/")[2] for url in page.asked} == {f"127.0.0.1:{hostile.port}"}
    # curves, with the page's colors although the policy blocks inline styles
    assert page.locator("#curves svg.plot").count() == 5
    color = page.locator("#curves svg.plot path[stroke='var(--series-0)']").first
    assert color.evaluate("one => getComputedStyle(one).stroke") == "rgb(0, 114, 178)"
    # the log's end is in view
    assert page.locator("#log").evaluate(
        "one => one.scrollTop + one.clientHeight >= one.scrollHeight - 4"
    )


def test_the_policy_blocks_an_injected_script(hostile, open_page):
    page = open_page(f"http://127.0.0.1:{hostile.port}/")
    page.evaluate(
        """document.getElementById('state').innerHTML = '<img src=x onerror="window.hit = 1">'"""
    )
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hit = 2'}))"
    )
    page.wait_for_timeout(200)
    assert (
        page.evaluate("window.hit") is None
        and len(page.complaints) >= 2
        and "script-src" in HEADERS["content-security-policy"]
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_nothing_is_cut_off_on_a_phone(hostile, open_page, scheme):
    url = f"http://127.0.0.1:{hostile.port}/"
    page = open_page(url, color_scheme=scheme, viewport={"width": 360, "height": 800})
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(22, 25, 28)") == (scheme == "dark")


def test_keyboard_names_and_motion(hostile, open_page):
    url = f"http://127.0.0.1:{hostile.port}/"
    page = open_page(url, reduced_motion="reduce")
    assert (
        page.evaluate(
            "getComputedStyle(document.getElementById('connection'), '::before').animationName"
        )
        == "none"
    )
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.getAttribute('aria-labelledby') || ''")
        )
    assert reached[:4] == ["clients-title", "recent-title", "log-title", "versions-title"]
    assert (
        page.get_by_role("region", name="Clients").count() >= 1
        and page.get_by_role("progressbar", name="Finished rounds").count() == 1
    )
    for image in page.get_by_role("img").all():
        assert len(image.get_attribute("aria-label")) > 10
    assert page.locator("[aria-live], [role=status], [role=alert]").count() == 1
    headings = page.locator("h1, h2, h3").evaluate_all(
        "all => all.filter(one => one.offsetParent).map(one => Number(one.tagName[1]))"
    )
    assert headings[0] == 1 and headings.count(1) == 1 and set(headings) == {1, 2}
    # one continues while the page updates itself
    page.focus("#clients")
    page.evaluate(
        "show({parts: {clients: '<table></table>'}, title: 't', now: 0, spoken: 'Round 9'})"
    )
    assert (
        page.evaluate("document.activeElement.id") == "clients"
        and page.inner_text("#spoken") == "Round 9"
    )


def test_a_run_from_its_start_to_its_report_and_the_page_stays(tmp_path, open_page):
    folder = tmp_path / "run"
    clients = ["north", "south", "east"]
    with Dashboard(folder, "server.log", "127.0.0.1", 0) as dashboard:
        page = open_page(dashboard.url)
        assert page.inner_text("h1") == "Before the first round"
        status = write_running(folder, clients, num_rounds=1)
        until(page, lambda: page.inner_text("h1").startswith("Round 2 of 10"))
        late = page.locator("#clients time[data-until]").first
        first = late.inner_text()
        until(page, lambda: late.inner_text() != first)
        assert late.inner_text().startswith("late by") and late.get_attribute("data-late") == ""
        page.wait_for_selector("#curves svg.plot")
        rows = [row(k, clients, ["a", "b"]) for k in range(11)]
        write_run(folder, rows, clients)
        status.on_round_end(records(rows)[10])
        status.__exit__(None, None, None)
    # the server is gone; the report is there, and so is the page
    page.wait_for_selector("#report h2")
    assert page.inner_text("h1").endswith("All 10 rounds are finished")
    assert page.locator("#report svg.plot").count() > 10 and page.locator("#curves").is_hidden()
    assert "has ended; this page stays" in page.inner_text("#connection")
    time.sleep(1.5)
    assert page.locator("#report h2").first.is_visible() and page.complaints == []


def test_a_lost_connection_is_reported_and_restored(open_page, tmp_path):
    """As when a run is stopped and resumed on the same port."""
    write_running(tmp_path)
    with serving(LivePage(tmp_path, "server.log")) as found:
        page = open_page(f"http://127.0.0.1:{found.port}/")
        port = found.port
    page.wait_for_selector("#connection[data-state=lost]")
    assert "There is no connection" in page.inner_text("#connection")
    assert page.inner_text("h1") == "Round 4 of 10: training"
    with serving(LivePage(tmp_path, "server.log"), port=port):
        page.wait_for_selector("#connection[data-state=open]")


def test_the_token_does_not_stay_in_the_address(tmp_path, open_page):
    write_running(tmp_path)
    with serving(LivePage(tmp_path, "server.log"), "0.0.0.0") as found:
        token = found.access.token
        page = open_page(f"http://127.0.0.1:{found.port}/?token={token}")
        assert (
            page.url == f"http://127.0.0.1:{found.port}/" and page.evaluate("document.cookie") == ""
        )
        assert page.evaluate("document.referrer") == "" and token not in page.content()
        page.reload()
        page.wait_for_selector("#connection[data-state=open]")
        assert [url for url in page.asked if token in url] == [
            f"http://127.0.0.1:{found.port}/?token={token}"
        ]
