"""A page whose tab is hidden by another: its browser plays nothing, and generation must not run away from it."""

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("av")
from support.page_steps import PLAYED, start, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.slow]
HOLD_S = 6
MARGIN_S = 6  # of video that is made before the page's "pause" arrives, on busy cores


def seconds_sent(server):
    return sum(message["frames"] for message in server.sent if message["type"] == "chunk") / server.fps


@pytest.mark.parametrize("begins", ["hidden", "in view"])
def test_a_hidden_tab_holds_generation(window, server, expect, begins):
    """Where the video begins while the tab is hidden already (a server that had a queue), its MediaSource stays closed."""
    server.width, server.height = 96, 64
    server.chunk_s = 0.15  # five times as fast as it is played, and slow enough for a page on busy cores to say "pause"
    page, other = window.pages[0], window.new_page()
    page.bring_to_front()
    if begins == "in view":
        start(page, server)
        expect(page.get_by_role("status")).to_have_text("Generating the first chunk.")
    else:
        page.goto(server.url)
        expect(page.get_by_role("status")).to_have_text("Ready.")
        page.get_by_label("Prompt", exact=True).fill("a fox in the snow")
    other.bring_to_front()
    wait_for(page, "document.visibilityState === 'hidden'")
    if begins == "hidden":
        page.evaluate("document.querySelector('#go').click()")
    wait_for(page, "document.querySelector('#chunk-count').textContent >= 8")
    other.wait_for_timeout(3000)
    assert page.evaluate(PLAYED) < 1
    held = seconds_sent(server)
    assert HOLD_S < held < HOLD_S + MARGIN_S
    other.wait_for_timeout(1000)
    assert seconds_sent(server) == held

    page.bring_to_front()
    wait_for(page, f"{PLAYED} > 4")
    page.get_by_label("Prompt", exact=True).fill("night falls")
    page.get_by_role("button", name="Switch prompt").click()
    expect(page.locator("#switch-note")).to_contain_text("history kept, from chunk")
    (switched,) = (message for message in server.sent if message["type"] == "switched")
    shown_at = (server.first_frames + 12 * (switched["from_chunk"] - 1)) / server.fps
    assert shown_at - page.evaluate(PLAYED) < HOLD_S + MARGIN_S
    wait_for(page, f"{PLAYED} > {shown_at}")
