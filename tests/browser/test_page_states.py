"""Every other state that a user can see: refusals, lost connections, keyboard, narrow and dark screens, odd browsers."""

import io
import re
from fractions import Fraction

import pytest
from support.page_steps import PLAYED, accessibility_violations, overflow, start, wait_for

from causalrt.media.mp4_boxes import boxes

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_token_is_asked_for(new_page, server, expect, screenshots):
    server.token = "open sesame"
    page = new_page()
    page.goto(server.url)
    box = page.get_by_label("Access token")
    expect(box).to_be_focused()
    box.fill("wrong")
    box.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("does not accept this token")
    page.screenshot(path=screenshots / "token.png", full_page=True)
    box.fill("open sesame")
    box.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Ready.")
    expect(box).to_be_hidden()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.get_by_role("alert")).to_be_hidden()
    page.reload()
    expect(page.get_by_role("status")).to_have_text("Ready.")
    assert "open sesame" not in page.url


def test_busy_server_says_when_to_come_back(new_page, server, expect, screenshots):
    busy = {"code": "busy", "message": "All 4 sessions are taken and 8 requests wait", "retry_after_s": 12}
    server.refuse = [busy, {"code": "bad_request", "message": "<img src=x onerror=alert(1)>", "retry_after_s": None}]
    page = new_page()
    start(page, server)
    expect(page.get_by_role("alert")).to_contain_text("All 4 sessions are taken and 8 requests wait.")
    expect(page.get_by_role("alert")).to_contain_text("Try again in 12 s.")
    page.screenshot(path=screenshots / "busy.png", full_page=True)
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("img").count() == 0
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_role("status")).to_have_text("Generating the first chunk.")


def test_lost_connection_comes_back(new_page, expect, screenshots):
    from support.stand_in_server import StandInServer

    page = new_page(connection_may_fail=True)
    first = StandInServer()
    with first.running():
        start(page, first)
        first.release(2)
        wait_for(page, f"{PLAYED} > 0.2")
    expect(page.get_by_role("alert")).to_contain_text("what arrived can be played and downloaded")
    expect(page.locator("#connection")).to_contain_text("next try in")
    page.screenshot(path=screenshots / "lost.png", full_page=True)
    wait_for(page, "document.querySelector('video').ended")
    expect(page.get_by_role("button", name="Download")).to_be_enabled()
    with StandInServer(port=first.port).running() as second:
        page.get_by_role("button", name="Try now").click()
        expect(page.get_by_role("status")).to_have_text("Connected again. Start begins a new video.")
        expect(page.get_by_role("alert")).to_be_hidden()
        second.close_connections(1001, "draining")
        expect(page.get_by_role("alert")).to_contain_text("shutting down")
        expect(page.get_by_role("status")).to_have_text("Connected again. Start begins a new video.")  # by itself
        page.get_by_role("button", name="Start").click()
        second.release(1)
        expect(page.locator("#chunk-count")).to_have_text("1")


def test_generation_waits_for_playback(new_page, server, expect):
    server.width, server.height = 96, 64  # made much faster than it is played, on busy cores too
    page = new_page()
    start(page, server)
    server.release(12)  # nine seconds of video at once
    expect(page.locator("#ahead-note")).to_have_text("generation waits")
    assert [message["type"] for message in server.received] == ["start", "pause"]
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#status")).to_have_text("Paused.")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#status")).to_have_text("Generating.")
    assert [message["type"] for message in server.received] == ["start", "pause"]
    expect(page.locator("#ahead-note")).to_have_text("not yet played")
    expect(page.locator("#status")).to_have_text("Generating.")
    assert [message["type"] for message in server.received] == ["start", "pause", "resume"]


def test_keyboard_alone(new_page, server, expect):
    page = new_page()
    page.goto(server.url)
    expect(page.get_by_role("status")).to_have_text("Ready.")
    keys, focused = page.keyboard, lambda: page.evaluate("document.activeElement.id || document.activeElement.value")
    assert focused() == "prompt"
    keys.type("first line")
    keys.press("Shift+Enter")
    keys.type("second line")
    keys.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Generating the first chunk.")
    assert server.messages("start")[0]["prompt"] == "first line\nsecond line"
    server.release(1)
    keys.press("Tab")
    assert focused() == "keep"
    keys.press("ArrowDown")
    keys.press("ArrowDown")
    keys.press("Tab")
    assert focused() == "go"
    keys.press("Space")
    expect(page.get_by_role("status")).to_contain_text("New prompt")
    assert server.messages("switch")[0]["policy"] == "flush"
    for expected in ("flush", "prompt", "download", "stop", "pause"):
        keys.press("Shift+Tab")
        assert focused() == expected
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Space")
    expect(page.get_by_role("status")).to_have_text("Paused.")
    keys.press("Space")
    expect(page.get_by_role("status")).to_have_text("Generating.")
    keys.press("Tab")
    keys.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Stopped.")
    assert focused() == "stop"  # out of use now, yet the place on the page is kept


def test_first_chunk_does_not_talk_over_a_switch(new_page, server, expect):
    page = new_page()
    start(page, server)
    status = page.get_by_role("status")
    expect(status).to_have_text("Generating the first chunk.")
    page.get_by_role("button", name="Switch prompt").click()
    expect(status).to_have_text("New prompt from chunk 0 on.")
    server.release(1)
    expect(page.locator("#chunk-count")).to_have_text("1")
    expect(status).to_have_text("New prompt from chunk 0 on.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screen(new_page, server, expect, screenshots, scheme):
    page = new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme, device_scale_factor=2, has_touch=True)
    server.chunk_s = 0.4
    start(page, server, "a fox in the snow, " + "unbreakable" * 12)
    expect(page.locator("#chunk-count")).to_have_text("4")
    page.get_by_text("Figures as a table").click()
    page.screenshot(path=screenshots / f"narrow-{scheme}.png", full_page=True)
    assert overflow(page) == 0
    server.close_connections(1011, "w" * 90)
    expect(page.get_by_role("alert")).to_contain_text("The server failed")
    assert overflow(page) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_accessible_in_every_state(new_page, server, expect, scheme, width):
    page = new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    server.token = "secret"
    server.about, server.examples = "A small model.", ["a red circle", "a blue square"]
    page.goto(server.url)
    expect(page.get_by_label("Access token")).to_be_visible()
    violations = {"token": accessibility_violations(page)}
    page.get_by_label("Access token").fill("secret")
    page.get_by_label("Access token").press("Enter")
    expect(page.get_by_role("status")).to_have_text("Ready.")
    violations["ready"] = accessibility_violations(page)
    page.get_by_label("Prompt", exact=True).fill("a fox in the snow")
    page.get_by_role("button", name="Start").click()
    server.release(2)
    expect(page.locator("#chunk-count")).to_have_text("2")
    page.get_by_text("Figures as a table").click()
    violations["running"] = accessibility_violations(page)
    server.close_connections(1011)
    expect(page.get_by_role("alert")).to_contain_text("The server failed")
    violations["failed"] = accessibility_violations(page)
    assert violations == {"token": [], "ready": [], "running": [], "failed": []}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_wide_screen(new_page, server, expect, screenshots, scheme):
    server.chunk_s, server.width, server.height = 0.42, 640, 368
    page = new_page(color_scheme=scheme, reduced_motion="reduce")
    start(page, server, chunks=30)
    expect(page.locator("#chunk-count")).to_have_text("9")
    page.get_by_label("Prompt", exact=True).fill("night falls over the snow, stars come out")
    page.get_by_label("kept").check()
    page.get_by_role("button", name="Switch prompt").click()
    expect(page.locator("#chunk-count")).to_have_text("16")
    page.mouse.move(0, 0)
    page.screenshot(path=screenshots / f"wide-{scheme}.png", full_page=True)
    assert page.evaluate("getComputedStyle(document.querySelector('#stage'), '::after').animationName") == "none"


def test_table_says_what_the_chart_draws(new_page, server, expect):
    page = new_page()
    start(page, server, chunks=3)
    server.release(3)
    expect(page.get_by_role("status")).to_have_text("Finished. 3 chunks.")
    page.get_by_text("Figures as a table").click()
    rows = page.get_by_role("table").get_by_role("row").all_inner_texts()
    assert rows[0].lower().split("\t")[:4] == ["chunk", "frames", "latency", "queue"]
    figures = [[float(cell) for cell in row.split("\t")] for row in rows[1:]]
    assert [row[:2] for row in figures] == [[2, 12], [1, 12], [0, 9]]
    sent = [message for message in reversed(server.sent) if message["type"] == "chunk"]
    for row, message in zip(figures, sent, strict=True):
        stages = {stage: ms or 0 for stage, ms in message["stages"].items()}
        whole = stages["text"] + message["latency_ms"] + stages["encode"]
        denoise = stages["denoise"] - stages["exchange"]
        assert row[2:6] == pytest.approx([whole, stages["queue"], stages["text"], denoise], abs=0.06)
        assert sum(row[3:]) == pytest.approx(whole, abs=0.5)  # the stages do not overlap, and leave nothing out
    words = page.get_by_role("img").get_attribute("aria-label")
    assert re.search(r"chunks 0 to 2; the latest took \d+ ms: queue", words)
    bars = page.evaluate(
        "[...document.querySelectorAll('.bar')]"
        ".map((bar) => [bar.querySelectorAll('rect').length, bar.querySelector('.cut') !== null])"
    )
    wanted = [9, 8, 8]  # the text encoder is in the first alone
    # A chunk that took much longer than the others is cut off at the top, and its last stages with it.
    for (stages, cut), every in zip(bars, wanted, strict=True):
        assert 0 < stages <= every if cut else stages == every


def downloaded(page) -> bytes:
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    return download.value.path().read_bytes()


def frame_times(data: bytes) -> list[tuple[Fraction, Fraction]]:
    """When each frame of a plain MP4 begins and how long it lasts, in seconds; its index must say how long it is itself."""
    import av

    assert [name for name, _ in boxes(data)] == ["ftyp", "moov", "mdat"]
    assert "mvex" not in dict(boxes(dict(boxes(data))["moov"]))
    with av.open(io.BytesIO(data)) as video:
        stream = video.streams.video[0]
        packets = [packet for packet in video.demux(stream) if packet.size]  # the demuxer's end mark has none
        times = [(packet.pts * stream.time_base, packet.duration * stream.time_base) for packet in packets]
        assert stream.duration * stream.time_base == sum(duration for _, duration in times)
        assert video.duration == pytest.approx(1e6 * float(sum(duration for _, duration in times)), abs=1000)
    return times


@pytest.mark.parametrize("frames", [1, 9, 21])
def test_download_is_a_plain_mp4(new_page, server, expect, frames):
    import av

    server.first_frames, chunks = (9, 2) if frames == 21 else (frames, 1)
    page = new_page()
    start(page, server, "A fox / in <snow>!", chunks=chunks)
    server.release(chunks)
    expect(page.get_by_role("status")).to_have_text(re.compile(r"Finished\. \d chunks?\."))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "a-fox-in-snow.mp4"
    data = download.value.path().read_bytes()
    assert frame_times(data) == [(Fraction(number, 16), Fraction(1, 16)) for number in range(frames)]
    with av.open(io.BytesIO(data)) as video:
        assert sum(1 for _ in video.decode(video=0)) == frames


def test_download_of_a_long_video_can_be_seeked(new_page, server, expect):
    """The index of the file lists its key frames, also while the video still runs."""
    import av

    server.width, server.height = 96, 64
    page = new_page()
    start(page, server)
    server.release(7)
    expect(page.locator("#chunk-count")).to_have_text("7")
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    data = downloaded(page)
    assert len(frame_times(data)) == 81
    with av.open(io.BytesIO(data)) as video:
        keys = [packet.pts * packet.time_base for packet in video.demux(video=0) if packet.size and packet.is_keyframe]
        assert keys == [0, 2, 4]
        video.seek(3_000_000)
        assert next(frame.time for frame in video.decode(video=0)) == 2.0


def test_second_video_replaces_the_first(new_page, server, expect):
    page = new_page()
    start(page, server, chunks=2)
    server.release(2)
    expect(page.get_by_role("status")).to_have_text("Finished. 2 chunks.")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("status")).to_have_text("Generating the first chunk.")
    server.release(1)
    expect(page.locator("#chunk-count")).to_have_text("1")
    wait_for(page, f"{PLAYED} > 0.2 && document.querySelector('video').duration === Infinity")
    server.release(1)
    expect(page.get_by_role("status")).to_have_text("Finished. 2 chunks.")
    wait_for(page, "document.querySelector('video').ended")


FULL_ONCE = """
const append = SourceBuffer.prototype.appendBuffer;
let calls = 0;
SourceBuffer.prototype.appendBuffer = function (data) {
  calls += 1;
  if (calls > 12 && calls < 18) throw new DOMException("full", "QuotaExceededError");
  append.call(this, data);
};
"""


def test_full_buffer_is_waited_for(new_page, server, expect):
    page = new_page(scripts=(FULL_ONCE,))
    start(page, server, chunks=4)
    server.release(4)
    wait_for(page, "document.querySelector('video').ended")
    assert page.evaluate("document.querySelector('video').duration") == pytest.approx(45 / 16, abs=0.05)


MANAGED_ONLY = "window.ManagedMediaSource = window.MediaSource; delete window.MediaSource;"


def test_managed_media_source(new_page, server, expect):
    page = new_page(scripts=(MANAGED_ONLY,))
    start(page, server)
    server.release(2)
    wait_for(page, f"{PLAYED} > 0.4")


@pytest.mark.parametrize(
    ("script", "mime", "words"),
    [
        ("delete window.MediaSource; delete window.ManagedMediaSource;", None, "Media Source Extensions"),
        ("", 'video/mp4; codecs="vvc1.1.L51"', "cannot play video/mp4"),
    ],
)
def test_browser_that_cannot_play(new_page, server, expect, script, mime, words):
    server.mime = mime
    page = new_page(scripts=(script,))
    page.goto(server.url)
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(page.get_by_role("button", name="Start")).to_be_disabled()


def test_no_token_in_time_asks_for_one(new_page, server, expect):
    server.token = "secret"
    page = new_page()
    page.goto(server.url)
    expect(page.get_by_label("Access token")).to_be_visible()
    server.close_connections(4408, "no token came in time")
    expect(page.get_by_role("status")).to_have_text("The server asks for an access token.")
    page.get_by_label("Access token").fill("secret")
    page.get_by_role("button", name="Connect").click()
    expect(page.get_by_role("status")).to_have_text("Ready.")


def test_refused_switch_leaves_the_video_running(new_page, server, expect):
    page = new_page()
    start(page, server)
    server.release(1)
    expect(page.locator("#chunk-count")).to_have_text("1")
    server.refuse_switch = {
        "code": "rate_limited",
        "message": "too many generations in a short time",
        "retry_after_s": 3,
    }
    page.get_by_role("button", name="Switch prompt").click()
    expect(page.locator("#alert-text")).to_have_text("too many generations in a short time. Try again in 3 s.")
    server.release(1)
    expect(page.locator("#chunk-count")).to_have_text("2")
    expect(page.get_by_role("status")).to_have_text("Generating, with the prompt as it was.")


BROKEN = "const append = SourceBuffer.prototype.appendBuffer; let calls = 0; SourceBuffer.prototype.appendBuffer ="
BROKEN += "function (data) { append.call(this, ++calls === 6 ? new Uint8Array(64).fill(255) : data); };"


def test_broken_video_stops_generation(new_page, server, expect):
    page = new_page(scripts=(BROKEN,))
    start(page, server)
    server.release(3)
    expect(page.get_by_role("alert")).to_contain_text("The video cannot be decoded")
    expect(page.get_by_role("status")).to_contain_text("Stopped.")
    assert len(server.messages("stop")) == 1


def test_examples_fill_the_prompt(new_page, server, expect):
    page = new_page()
    server.about, server.examples = "A <b>small</b> model.", ["a red circle", "a <i>blue</i> square"]
    page.goto(server.url)
    expect(page.get_by_role("status")).to_have_text("Ready.")
    expect(page.locator("#about")).to_have_text("A <b>small</b> model.")  # text, not markup
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_have_attribute("placeholder", "a red circle")
    page.get_by_role("group", name="Example prompts").get_by_role("button", name="a <i>blue</i> square").click()
    expect(prompt).to_have_value("a <i>blue</i> square")
    expect(prompt).to_be_focused()
    assert server.messages("start") == []  # it is the user who starts
    prompt.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Generating the first chunk.")
    assert [message["prompt"] for message in server.messages("start")] == ["a <i>blue</i> square"]


def test_a_server_that_says_nothing_of_its_model_has_no_examples(new_page, server, expect):
    page = new_page()
    page.goto(server.url)
    expect(page.get_by_role("status")).to_have_text("Ready.")
    expect(page.locator("#about")).to_be_hidden()
    expect(page.locator("#examples")).to_be_hidden()
