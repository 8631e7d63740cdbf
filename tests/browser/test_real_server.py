"""`causalrt serve` with a small random model and its page in a browser: from a prompt to pixels, nothing stood in."""

import io
import json
import re
import signal
import subprocess
import sys

import pytest
from support.page_steps import PLAYED, wait_for
from support.small_bundles import bundle_factory
from support.small_encoders import write_text_encoder, write_vae

for library in ("diffusers", "transformers", "fastapi", "av", "prometheus_client"):
    pytest.importorskip(library, reason="needs the server and the VAE: pip install '.[test]'")
pytestmark = [pytest.mark.browser, pytest.mark.slow]

TOKEN = "a-token-for-this-test"
# 64 x 96 pixels; 40 chunks, 30 seconds of video, if nobody stops it.
SIZES = {
    "video.latent_height": "8",
    "video.latent_width": "12",
    "video.window_frames": "9",
    "video.horizon_frames": "120",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(process, URL) of a server with two ranks that wants a token."""
    folder = tmp_path_factory.mktemp("serve")
    bundle = bundle_factory(folder, vae=write_vae(folder / "vae"))(2, SIZES)
    encoder = write_text_encoder(folder / "text")
    tokens = folder / "tokens.txt"
    tokens.touch(mode=0o600)
    tokens.write_text(f"{TOKEN}\n")
    command = [sys.executable, "-m", "causalrt.cli", "serve", str(bundle), "--text-encoder", str(encoder)]
    command += ["--device", "cpu", "--threads", "1", "--port", "0", "--tokens", str(tokens), "--json"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        assert line, f"the server did not start:\n{(folder / 'log').read_text()}"
        yield process, json.loads(line)["url"]
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


def test_from_prompt_to_pixels(new_page, served, expect, screenshots):
    import av

    process, url = served
    page = new_page(connection_may_fail=True)  # at the very end, when the server is gone
    status, alert = page.get_by_role("status"), page.get_by_role("alert")

    page.goto(url)
    token = page.get_by_label("Access token")
    token.fill("not-the-token-at-all")
    token.press("Enter")
    expect(alert).to_contain_text("does not accept this token")
    token.fill(TOKEN)
    token.press("Enter")
    expect(status).to_have_text("Ready.")

    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("a fox runs")
    prompt.press("Enter")
    wait_for(page, f"{PLAYED} > 1")
    assert page.evaluate("document.querySelector('video').getVideoPlaybackQuality().totalVideoFrames") > 8
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()  # so it still generates
    assert page.evaluate("document.querySelector('video').duration") == float("inf")

    prompt.fill("a cat sleeps")
    page.get_by_label("recomputed").check()
    page.get_by_role("button", name="Switch prompt").click()
    expect(page.locator("#switch-note")).to_have_text(re.compile(r"history recomputed, from chunk \d+"))
    before = page.evaluate(PLAYED)
    wait_for(page, f"{PLAYED} > {before} + 1")
    page.screenshot(path=screenshots / "real-server.png", full_page=True)

    page.get_by_role("button", name="Pause").click()
    expect(status).to_have_text("Paused.")
    page.get_by_role("button", name="Resume").click()
    expect(status).to_have_text("Generating.")
    page.get_by_role("button", name="Stop").click()
    expect(status).to_have_text(re.compile(r"Stopped\. \d+ chunks\."))
    wait_for(page, "document.querySelector('video').ended")

    page.get_by_label("Chunks", exact=True).fill("2")
    page.get_by_role("button", name="Start").click()
    expect(status).to_have_text("Finished. 2 chunks.")
    for tile in ("first-frame", "latest-chunk", "rate"):
        expect(page.locator(f"#{tile}")).to_have_text(re.compile(r"^[\d.]+"))
    expect(page.locator("#first-frame-note")).to_have_text(re.compile(r"^server [\d.]+ m?s$"))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    with av.open(io.BytesIO(download.value.path().read_bytes())) as video:
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(96, 64)] * 21

    page.get_by_label("Chunks", exact=True).fill("")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#chunk-count")).to_have_text(re.compile("[1-9]"))
    process.send_signal(signal.SIGTERM)
    page.get_by_role("button", name="Stop").click()
    expect(status).to_have_text(re.compile("Stopped|Not connected"))
    expect(alert).to_contain_text("shutting down")
    assert process.wait(60) == 0
