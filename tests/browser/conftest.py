import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.page_steps import PATIENCE_MS

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# A page that was closed, or asked for, while its server was away or refused it: Chromium logs that whatever the page does.
LOST_CONNECTION = re.compile(
    r"WebSocket connection to .* failed|Failed to load resource: .*(ERR_|status of (403|405|502))"
)


@pytest.fixture(scope="module")  # not for the session: while it is open, its event loop runs in this thread
def playwright() -> Iterator[object]:
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install '.[test]'")
    with api.sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def chromium() -> str:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)} (Debian: apt install chromium)")
    return executable


@pytest.fixture(scope="module")
def browser(playwright, chromium) -> Iterator[object]:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture
def window(playwright, chromium, tmp_path) -> Iterator[object]:
    """A window (Playwright's context) whose tabs hide each other; Playwright's own pages all believe that they are seen."""
    command = [chromium, "--headless", "--no-sandbox", "--no-first-run", "--remote-debugging-port=0"]
    ready = tmp_path / "profile" / "DevToolsActivePort"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--user-data-dir={ready.parent}"], stderr=log)
    try:
        while not (ready.exists() and ready.read_text().count("\n")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        port = ready.read_text().splitlines()[0]
        browser = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}", no_defaults=True, timeout=120_000)
        yield browser.contexts[0]
        browser.close()
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def new_page(browser) -> Iterator[Callable[..., object]]:
    """Opens pages (options as of Playwright's `new_context`) and fails the test if one complained or broke its policy.

    `page.complaints` lists what was logged as an error or thrown; `connection_may_fail=True` leaves out lost connections.
    """
    opened = []

    def open_page(*, connection_may_fail: bool = False, scripts: tuple[str, ...] = (), **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.complaints = []

        def complain(words: str) -> None:
            if not (connection_may_fail and LOST_CONNECTION.search(words)):
                page.complaints.append(words)

        page.on("console", lambda message: message.type in ("error", "warning") and complain(message.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.add_init_script(
            "addEventListener('securitypolicyviolation',"
            " (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
        )
        for script in scripts:
            page.add_init_script(script)
        opened.append(page)
        return page

    yield open_page
    complaints = [words for page in opened for words in page.complaints]
    for page in opened:
        page.context.close()
    assert complaints == []


@pytest.fixture
def screenshots(tmp_path) -> Path:
    folder = Path(os.environ.get("CAUSALRT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def expect():
    expect = pytest.importorskip("playwright.sync_api").expect
    expect.set_options(timeout=PATIENCE_MS)
    return expect


@pytest.fixture
def server():
    pytest.importorskip("fastapi")
    pytest.importorskip("av")
    from support.stand_in_server import StandInServer

    with StandInServer().running() as server:
        yield server
