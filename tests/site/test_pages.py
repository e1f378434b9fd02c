"""The built site in a browser: `make browse`, after `make docs`."""

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
PICTURES = ROOT / "out" / "site"
PAGES = sorted(str(p.parent.relative_to(SITE)) for p in SITE.rglob("index.html"))
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
SCHEMES = {"light": "default", "dark": "slate"}
# Of the formulas that are not in a hidden tab.
HEIGHTS = """() => [...document.querySelectorAll("math")]
    .filter(math => math.checkVisibility())
    .map(math => math.getBoundingClientRect().height)"""
# Whether the theme's scripts are done: on a slow machine they outlast the network.
READY = """scheme => document.body.dataset.mdColorScheme === scheme &&
    [...document.querySelectorAll("pre > code")].every(code =>
        !code.checkVisibility() || code.scrollWidth <= code.clientWidth || code.tabIndex === 0)"""

pytestmark = pytest.mark.site


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    if not PAGES:
        pytest.fail("there is no site: run `make docs` first")
    handler = functools.partial(Quiet, directory=SITE)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    from playwright.sync_api import sync_playwright  # of the extra `browser`

    with sync_playwright() as host:
        browser = host.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page in a tab of its own, with what it complains about and what it asks for."""

    def __init__(self, browser, address, **options):
        self.address, self.complaints, self.requests = address, [], []
        self.context = browser.new_context(**options)
        self.tab = self.context.new_page()
        self.tab.on("console", self._message)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("requestfailed", lambda request: self.complaints.append(request.url))

    def _message(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, page):
        self.tab.goto(f"{self.address}{page}/", wait_until="networkidle")
        return self.tab

    def close(self):
        self.context.close()


@pytest.fixture
def visit(browser, address):
    visits = []

    def begin(page, **options):
        visits.append(Visit(browser, address, **options))
        visits[-1].open(page)
        return visits[-1]

    yield begin
    for one in visits:
        one.close()


def picture(tab, page, name):
    """Keep a screenshot, for eyes."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    tab.screenshot(
        path=PICTURES / f"{page.replace('/', '-').replace('.', 'index')}-{name}.png", full_page=True
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_quiet_and_stays_at_home(visit, page, address):
    seen = visit(page, viewport=DESK)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith((address, "data:"))] == []
    assert all(height > 5 for height in seen.tab.evaluate(HEIGHTS))
    assert seen.tab.locator(".arithmatex").count() == 0
    assert seen.tab.locator("img:not([alt]), img[alt='']").count() == 0
    picture(seen.tab, page, "desk")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_a_phone(visit, page):
    seen = visit(page, viewport=PHONE)
    width = seen.tab.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
    picture(seen.tab, page, "phone")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_accessible(visit, page, scheme):
    """No serious finding of axe-core, such as too little contrast."""
    from axe_playwright_python.sync_playwright import Axe

    seen = visit(page, viewport=DESK, color_scheme=scheme)
    seen.tab.wait_for_function(READY, arg=SCHEMES[scheme])
    found = Axe().run(seen.tab).response["violations"]
    serious = {
        finding["id"]: [node["html"][:120] for node in finding["nodes"][:3]]
        for finding in found
        if finding["impact"] in ("serious", "critical")
    }
    assert serious == {}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(visit, page, address):
    seen = visit(page, viewport=DESK)
    links = set(seen.tab.eval_on_selector_all("a[href]", "all => all.map(a => a.href)"))
    for link in sorted(link for link in links if link.startswith(address)):
        place, _, anchor = link.removeprefix(address).partition("#")
        path = SITE / place
        path = path / "index.html" if path.is_dir() else path
        assert path.exists(), link
        if anchor and path.suffix == ".html":
            assert f'id="{anchor}"' in path.read_text(), link


def chosen(tab):
    """The labels of the tabs that are shown, one for each group."""
    return tab.eval_on_selector_all(
        ".tabbed-set > input:checked",
        "all => all.map(i => document.querySelector(`label[for='${i.id}']`).textContent.trim())",
    )


def test_a_host_stays_chosen_from_page_to_page(visit):
    seen = visit("tutorials/first-flow", viewport=DESK)
    assert set(chosen(seen.tab)) == {"Pyro"}
    seen.tab.locator(".tabbed-labels label", has_text="NumPyro").first.click()
    assert set(chosen(seen.tab)) == {"NumPyro"}
    seen.open("tutorials/equations")
    seen.tab.wait_for_timeout(300)
    assert set(chosen(seen.tab)) == {"NumPyro"}


def test_search_finds_a_name(visit):
    seen = visit("", viewport=DESK)
    seen.tab.locator("input.md-search__input").click()
    seen.tab.keyboard.type("AutoRealNVP")
    result = seen.tab.locator(".md-search-result a[href*='pyroflows.AutoRealNVP']").first
    result.wait_for(state="attached", timeout=10_000)
    seen.tab.goto(result.evaluate("link => link.href"))
    assert seen.tab.locator("[id='pyroflows.AutoRealNVP']").is_visible()


def test_the_keyboard_reaches_the_content(visit):
    seen = visit("", viewport=DESK)
    seen.tab.keyboard.press("Tab")
    assert seen.tab.evaluate("document.activeElement.matches('a.md-skip')")
    assert seen.tab.evaluate("document.activeElement.getAttribute('href')").startswith("#")
