"""The page and the real server, with an engine that stands in and makes a chunk when the test says so."""

import pytest
from support.page_steps import accessibility_violations, start

for library in ("fastapi", "av", "prometheus_client"):
    pytest.importorskip(library, reason="needs the server: pip install '.[test]'")

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def engine():
    from support.fake_engine import FakeEngine

    engine = FakeEngine(max_sessions=1)
    engine.hold()
    return engine


@pytest.mark.parametrize("changes_mind", [False, True])
def test_a_start_right_behind_a_stop_is_not_lost(new_page, expect, screenshots, engine, changes_mind):
    from support.running import Running, until

    with Running(engine) as server:
        page = new_page()
        status, stop = page.get_by_role("status"), page.get_by_role("button", name="Stop")
        start(page, server, chunks=2)
        until(lambda: engine.begun, "the first chunk")
        expect(status).to_have_text("Generating the first chunk.")
        stop.click()
        expect(status).to_have_text("Stopping after this chunk.")
        page.get_by_label("Prompt", exact=True).fill("a bear in the river")
        page.get_by_label("Prompt", exact=True).press("Enter")
        expect(status).to_have_text("The new video begins after this chunk.")
        page.screenshot(path=screenshots / "start-behind-stop.png", full_page=True)
        if changes_mind:
            stop.click()
            engine.let(1)
            expect(status).to_have_text("Stopped. 1 chunk.")
        else:
            engine.let(3)
            expect(status).to_have_text("Finished. 2 chunks.")
        assert len(engine.sessions) == 2 - changes_mind
        assert engine.open_sessions == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_prompt_that_was_cut_is_shown_beside_it(new_page, expect, screenshots, engine, scheme):
    from support.running import Running

    with Running(engine) as server:
        page = new_page(color_scheme=scheme)
        warning = page.locator("#prompt-warning")
        start(page, server, "word " * 65)
        expect(warning).to_contain_text("the prompt was cut: the model reads its first 64 tokens")
        page.screenshot(path=screenshots / f"prompt-cut-{scheme}.png", full_page=True)
        assert accessibility_violations(page) == []
        page.get_by_label("Prompt", exact=True).fill("a bear")
        page.get_by_role("button", name="Switch prompt").click()
        engine.let(2)
        expect(page.get_by_role("status")).to_contain_text("New prompt from chunk")
        expect(warning).to_be_hidden()
        page.get_by_label("Prompt", exact=True).fill("word " * 65)
        page.get_by_role("button", name="Switch prompt").click()
        engine.let(2)
        expect(warning).to_be_visible()
        page.get_by_role("button", name="Stop").click()
        engine.let(10)
        expect(page.get_by_role("status")).to_contain_text("Stopped.")


def test_a_page_that_waits_for_its_token_is_told_that_the_server_ends(new_page, expect, screenshots, tmp_path, engine):
    from support.running import Running

    from causalrt.server.auth import Tokens

    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text("a-token-0123456789")
    with Running(engine, tokens=Tokens.from_file(tokens)) as server:
        page = new_page(connection_may_fail=True)
        page.goto(server.url)
        expect(page.get_by_label("Access token")).to_be_visible()
        server.end()
        expect(page.get_by_role("alert")).to_contain_text("The server is shutting down or restarting")
        expect(page.get_by_role("status")).to_have_text("Not connected.")
        page.screenshot(path=screenshots / "draining.png", full_page=True)
