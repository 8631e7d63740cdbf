"""What the two writers write plays in a browser: whole files with seeking, fragmented ones from beginning to end."""

from pathlib import Path

import pytest
from support.page_steps import PLAYED, wait_for

pytestmark = pytest.mark.browser
fastapi = pytest.importorskip("fastapi")
pytest.importorskip("av")

NUM_FRAMES, FPS = 45, 16


def write_files(folder: Path) -> None:
    from support.stand_in_server import pictures

    from causalrt.media.video_file import FragmentWriter, Mp4Writer

    frames = pictures(0, NUM_FRAMES, height=240, width=416, prompt="a")
    with Mp4Writer(folder / "whole.mp4", height=240, width=416, fps=FPS) as whole:
        whole.write(frames)
    fragments = FragmentWriter(height=240, width=416, fps=FPS)
    (folder / "fragments.mp4").write_bytes(b"".join([fragments.header, *fragments.write(frames), *fragments.close()]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole.mp4", "fragments.mp4"])
def test_file_plays(new_page, tmp_path, name):
    from support.stand_in_server import served

    write_files(tmp_path)
    app = fastapi.FastAPI()
    app.get("/video")(lambda: fastapi.responses.FileResponse(tmp_path / name, media_type="video/mp4"))
    app.get("/")(
        lambda: fastapi.responses.HTMLResponse(
            '<link rel="icon" href="data:,"><p role="status"></p><video src="/video" muted>'
        )
    )
    with served(app) as port:
        page = new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        wait_for(page, "document.querySelector('video').readyState === HTMLMediaElement.HAVE_ENOUGH_DATA")
        size = page.evaluate(
            "(({videoWidth, videoHeight}) => [videoWidth, videoHeight])(document.querySelector('video'))"
        )
        assert size == [416, 240]
        if name == "whole.mp4":  # its index says how long it is, and where everything lies
            assert page.evaluate("document.querySelector('video').duration") == pytest.approx(
                NUM_FRAMES / FPS, abs=0.01
            )
            page.evaluate("document.querySelector('video').currentTime = 2")
            wait_for(page, f"!document.querySelector('video').seeking && {PLAYED} === 2")
            page.evaluate("document.querySelector('video').currentTime = 0")
        page.evaluate("document.querySelector('video').play()")
        wait_for(page, "document.querySelector('video').ended")
        assert page.evaluate(PLAYED) == pytest.approx(NUM_FRAMES / FPS, abs=0.1)
        assert page.evaluate("document.querySelector('video').error") is None
