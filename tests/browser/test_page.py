"""The page in a real browser, against a server that stands in: every state that a user can see."""

import re

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("av")
from support.page_steps import PLAYED, wait_for

pytestmark = pytest.mark.browser


def test_video_plays_while_it_is_generated(new_page, server, expect, screenshots):
    page = new_page()
    page.goto(server.url)
    status = page.get_by_role("status")
    expect(status).to_have_text("Ready.")
    page.screenshot(path=screenshots / "wide-ready.png", full_page=True)
    page.get_by_label("Prompt", exact=True).fill("a fox in the snow")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Chunks", exact=True).fill("8")
    page.get_by_label("Prompt", exact=True).press("Enter")
    expect(status).to_have_text("Generating the first chunk.")
    assert server.messages("start") == [{"type": "start", "prompt": "a fox in the snow", "seed": 7, "chunks": 8}]

    # Two chunks are there and the third is not made: frames are on the screen and time goes on.
    server.release(2)
    wait_for(page, f"{PLAYED} > 0.4")
    assert page.evaluate("document.querySelector('video').getVideoPlaybackQuality().totalVideoFrames") > 4
    expect(page.locator("#chunk-count")).to_have_text("2")
    expect(page.locator("#first-frame")).to_have_text(re.compile(r"\d+ ms|[\d.]+ s"))
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()

    page.get_by_label("Prompt", exact=True).fill("night falls over the snow")
    page.get_by_label("recomputed").check()
    page.get_by_role("button", name="Switch prompt").click()
    expect(status).to_have_text("New prompt from chunk 2 on.")
    assert server.messages("switch") == [{"type": "switch", "prompt": "night falls over the snow", "policy": "recache"}]
    before = page.evaluate(PLAYED)
    server.release(2)
    wait_for(page, f"{PLAYED} > {before} + 0.5")

    page.get_by_role("button", name="Pause").click()
    expect(status).to_have_text("Paused.")
    assert page.evaluate("document.querySelector('video').paused")
    server.release(1)
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#chunk-count")).to_have_text("5")
    page.screenshot(path=screenshots / "wide-running.png", full_page=True)

    page.get_by_role("button", name="Stop").click()
    expect(status).to_have_text("Stopped. 5 chunks.")
    wait_for(page, "document.querySelector('video').ended")
    assert page.evaluate("document.querySelector('video').duration") == pytest.approx((9 + 4 * 12) / 16, abs=0.05)
    expect(page.get_by_role("button", name="Start")).to_be_enabled()
