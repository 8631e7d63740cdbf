"""The page behind a proxy, in front of the real server with an engine that stands in."""

from urllib.parse import urlsplit

import pytest
from support.page_steps import PLAYED, wait_for
from support.proxy import running_proxy

for library in ("fastapi", "av", "prometheus_client"):
    pytest.importorskip(library, reason="needs the server: pip install '.[test]'")

pytestmark = pytest.mark.browser


@pytest.fixture
def proxy():
    with running_proxy() as proxy:
        yield proxy


def behind(proxy, **settings):
    """The server, which the proxy passes requests on to."""
    from support.running import Running

    server = Running(**settings)
    address = urlsplit(server.url)
    proxy.upstream = address.hostname, address.port
    return server


def watch_a_video(page, expect) -> None:
    expect(page.get_by_role("status")).to_have_text("Ready.")
    page.get_by_label("Prompt", exact=True).fill("a fox in the snow")
    page.get_by_label("Chunks", exact=True).fill("2")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("status")).to_have_text("Finished. 2 chunks.")
    wait_for(page, f"{PLAYED} > 0.2")


def test_page_works_under_a_path(new_page, expect, proxy):
    proxy.path = b"/causalrt/"
    with behind(proxy):
        page = new_page()
        page.goto(f"{proxy.url}/causalrt/")
        watch_a_video(page, expect)
        assert (
            page.evaluate("getComputedStyle(document.querySelector('main')).display") == "grid"
        )  # its style sheet came


@pytest.mark.parametrize("path", ["/", pytest.param("/causalrt/", marks=pytest.mark.slow)])
def test_page_names_the_option_that_lets_its_origin_in(new_page, expect, screenshots, proxy, path):
    proxy.path, proxy.host = path.encode(), b"localhost"
    page = new_page(connection_may_fail=True)
    with behind(proxy):
        page.goto(proxy.url + path)
        expect(page.get_by_role("alert")).to_contain_text(f"Start the server with --allow-origin {proxy.url},")
        page.screenshot(path=screenshots / "wrong-origin.png", full_page=True)
    with behind(proxy, allowed_origins=(proxy.url,)):
        watch_a_video(page, expect)  # the page connects again by itself


@pytest.mark.slow
def test_page_tells_blocked_websockets_from_a_server_that_is_away(new_page, expect, proxy):
    proxy.websockets = False
    page = new_page(connection_may_fail=True)
    alert = page.get_by_role("alert")
    with behind(proxy):
        page.goto(proxy.url)
        expect(alert).to_contain_text("WebSockets do not get through")
    page.get_by_role("button", name="Try now").click()
    expect(alert).to_contain_text("The server cannot be reached")
