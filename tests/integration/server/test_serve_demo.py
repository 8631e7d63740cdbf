"""`causalrt serve` without a bundle: the demo model, its words, and an end that leaves nothing."""

import io
import signal

import av
import pytest
from support.running import Client
from support.serve_process import Process

from causalrt.cli import main
from causalrt.tools.arguments import ABOUT, EXAMPLES


def test_the_demo_model_is_served(tmp_path, monkeypatch):
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with Process((), "--grace", "0") as server:
        assert list(cache.glob("causalrt/demo/ranks-2-*/manifest.json"))
        refused = server.http.post("/v1/videos", json={"prompt": "a fox in the snow"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "prompt"
        assert "does not know fox, snow; its words are: " in refused.json()["error"]["message"]
        job = server.http.post("/v1/videos", json={"prompt": EXAMPLES[0], "seconds": 1}).json()
        assert server.finished(job["id"])["status"] == "completed"
        video = server.http.get(f"/v1/videos/{job['id']}/content").content
        with av.open(io.BytesIO(video)) as container:
            shapes = [(frame.height, frame.width) for frame in container.decode(video=0)]
        assert shapes == [(64, 64)] * 16
        with server.realtime() as socket:
            client = Client(socket)
            ready = client.next("ready")
            assert (ready["about"], ready["examples"], ready["max_chunks"]) == (ABOUT, list(EXAMPLES), 42)
            client.start(prompt="a fox")
            assert client.next("error")["code"] == "bad_request"
            client.start(prompt=EXAMPLES[1], chunks=2)
            assert client.next("ended")["chunks"] == 2
            client.start(prompt=EXAMPLES[1])
            client.next("chunk")
            client.send("switch", prompt="green fox", policy="keep")
            assert "does not know fox" in client.next("error")["message"]
            client.next("chunk")  # the video goes on
        server.process.send_signal(signal.SIGTERM)
        _, log = server.process.communicate(timeout=60)
        assert server.process.returncode == 0, log
        assert "Traceback" not in log
    assert list(temporary.glob("*causalrt*")) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["bundle"], "--text-encoder FOLDER"),
        (["--text-encoder", "folder"], "name the bundle"),
        (["--host", "0.0.0.0"], "--tokens FILE"),
        (["--executor", "tensorrt"], "not built for tensorrt; leave --executor out"),
    ],
)
def test_what_is_half_said_is_refused_at_once(flags, words, capsys, monkeypatch):
    monkeypatch.setattr("causalrt.tools.demo.build", lambda *given, **named: pytest.fail("it was built"))
    assert main(["serve", *flags]) == 2
    assert words in capsys.readouterr().err
