"""`causalrt serve` as a user runs it: a process of its own, a small bundle, real ranks, signals."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from support.running import Client, until
from support.serve_process import Process
from support.small_bundles import bundle_factory, num_steps
from support.small_encoders import write_text_encoder, write_vae

from causalrt.cli import main
from causalrt.install_hint import install_extra
from causalrt.server.command import LIBRARIES

STEPS = num_steps(12)  # a chunk takes long enough to be in the midst of it


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(bundle, text encoder)"""
    folder = tmp_path_factory.mktemp("serve")
    bundles = bundle_factory(folder, vae=write_vae(folder / "vae"))
    return bundles(2, STEPS), write_text_encoder(folder / "text")


@pytest.fixture(scope="module")
def server(places, tmp_path_factory):
    spool = tmp_path_factory.mktemp("spool")
    with Process(places, "--grace", "0", "--spool", str(spool)) as process:
        process.spool = spool
        yield process


def pictures(data):
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)])


def test_a_job_and_a_stream_show_the_same_video(server):
    job = server.http.post("/v1/videos", json={"prompt": "a fox runs", "seed": 5, "seconds": 1}).json()
    assert server.finished(job["id"])["status"] == "completed"
    file = pictures(server.http.get(f"/v1/videos/{job['id']}/content").content)
    with server.realtime() as socket:
        client = Client(socket)
        client.next("ready")
        client.start(prompt="a fox runs", seed=5, chunks=2)
        chunks = [client.next("chunk") for _ in range(2)]
        assert client.next("ended")["reason"] == "done"
        stream = pictures(b"".join(client.media))
        client.media.clear()
        client.start(prompt="a fox runs", seed=6, chunks=2)
        client.next("ended")
        another = pictures(b"".join(client.media))
    assert [chunk["frames"] for chunk in chunks] == [9, 12]
    assert (len(file), len(stream)) == (16, 21)
    assert abs(file - stream[:16]).mean() < abs(file - another[:16]).mean() / 3  # H.264 of two qualities, of noise
    first = chunks[0]
    stages = first["stages"]
    assert all(stages[name] > 0 for name in ("text", "denoise", "exchange", "decode", "encode"))
    parts = sum(stages[name] for name in ("queue", "denoise", "gather", "decode", "hand_over"))
    assert parts == pytest.approx(first["latency_ms"], rel=0.01)
    assert first["first_frame_ms"] >= first["latency_ms"]


def test_a_switch_and_a_stop_reach_the_ranks(server):
    with server.realtime() as socket:
        client = Client(socket)
        client.next("ready")
        client.start(prompt="a fox runs")
        client.next("chunk")
        client.send("switch", prompt="a cat sleeps", policy="recache")
        assert client.next("switched")["ms"] > 0
        client.next("chunk")
        client.send("stop")
        assert client.next("ended")["reason"] == "stopped"


def test_each_answer_says_that_the_prompt_was_cut(server):
    prompt = "a fox runs " * 20  # of which this model reads 8 tokens
    for _ in range(2):
        job = server.http.post("/v1/videos", json={"prompt": prompt, "seconds": 0.1}).json()
        assert [warning["code"] for warning in job["warnings"]] == ["prompt_cut"]
        assert "first 8 tokens" in job["warnings"][0]["message"]
        assert server.finished(job["id"])["warnings"] == job["warnings"]
    with server.realtime() as socket:
        client = Client(socket)
        client.next("ready")
        client.start(prompt=prompt, chunks=1)
        assert client.next("started")["warnings"] == job["warnings"]
        client.next("ended")


def test_the_page_and_its_files_are_served(server):
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["cache-control"] == "no-cache"
    for name in ("page.js", "page.css"):
        assert name in page.text
        answer = server.http.get(f"/{name}")
        assert answer.status_code == 200
        assert server.http.get(f"/{name}", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert server.http.get("/page.js").headers["content-type"].startswith("text/javascript")
    assert server.http.get("/../app.py").status_code == server.http.get("/app.py").status_code == 404


def test_metrics_of_a_real_engine(server):
    with server.realtime() as socket:
        client = Client(socket)
        client.next("ready")
        client.start(prompt="a fox")
        client.next("chunk")
        text = server.http.get("/metrics").text
    assert "\ncausalrt_sessions 1.0\n" in text
    (kv_bytes,) = (float(line.split()[1]) for line in text.splitlines() if line.startswith("causalrt_kv_bytes "))
    assert kv_bytes > 0


def test_a_rank_that_is_killed_is_replaced(server):
    job = server.http.post("/v1/videos", json={"prompt": "a fox"}).json()
    until(lambda: server.http.get(f"/v1/videos/{job['id']}").json()["progress"])
    victims = [pid for pid in server.descendants() if "causalrt" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(victims[-1], signal.SIGKILL)
    failed = server.finished(job["id"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "not_ready")
    until(lambda: server.http.get("/readyz").status_code == 200, "the reload")
    again = server.http.post("/v1/videos", json={"prompt": "a fox", "seconds": 1}).json()
    assert server.finished(again["id"])["status"] == "completed"


def ranks_of(server):
    """Process numbers of the ranks: the children of the supervisor that has several."""
    tree = {}
    for pid in server.descendants():
        tree.setdefault(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), []).append(pid)
    return next(children for parent, children in tree.items() if parent != server.process.pid and len(children) > 1)


def test_idle_connections_of_strangers_leave_the_server_as_it_is(places):
    """More of them than the process may have descriptors; the watch looks at the ranks several times meanwhile."""
    with Process(places, descriptors=256) as server, contextlib.ExitStack() as stack:
        host, port = server.url.removeprefix("http://").split(":")
        ranks = ranks_of(server)
        for _ in range(406):
            stack.enter_context(socket.create_connection((host, int(port))))
        for _ in range(4):
            assert server.http.get("/readyz").status_code == 200
            time.sleep(1)
        job = server.http.post("/v1/videos", json={"prompt": "a fox", "seconds": 1}).json()
        assert server.finished(job["id"])["status"] == "completed"
        assert ranks_of(server) == ranks
        server.process.send_signal(signal.SIGTERM)
        _, log = server.process.communicate(timeout=60)
        assert "the engine has failed" not in log
        assert len(log) < 20_000


@pytest.mark.slow  # test_failures.py has the same without ranks
def test_a_bundle_that_is_replaced_while_it_is_served_is_refused_with_a_word(places, tmp_path):
    bundle, encoder = places
    another = bundle_factory(tmp_path, vae=write_vae(tmp_path / "vae"))(
        2, {**STEPS, "video.latent_height": "8", "video.latent_width": "12"}
    )
    served = tmp_path / "served"
    shutil.copytree(bundle, served)
    with Process((served, encoder), "--max-sessions", "1") as server:
        running, waiting = (server.http.post("/v1/videos", json={"prompt": "a fox"}).json()["id"] for _ in range(2))
        until(lambda: server.http.get(f"/v1/videos/{running}").json()["progress"])
        shutil.rmtree(served)
        shutil.copytree(another, served)
        os.kill(ranks_of(server)[1], signal.SIGKILL)
        assert server.finished(running)["error"]["code"] == "not_ready"
        error = server.finished(waiting)["error"]
        assert error["code"] == "not_ready"
        assert "replaced by another one" in error["message"]
        said = server.http.get("/readyz")
        assert (said.status_code, said.json()["engine"]) == (503, "failing")
        assert "restart the server" in said.json()["detail"]
        assert server.http.post("/v1/videos", json={"prompt": "a fox"}).status_code == 503
        shutil.rmtree(served)
        shutil.copytree(bundle, served)
        until(lambda: server.http.get("/readyz").status_code == 200, "the reload")
        again = server.http.post("/v1/videos", json={"prompt": "a fox", "seconds": 1}).json()
        assert server.finished(again["id"])["status"] == "completed"
        server.process.send_signal(signal.SIGTERM)
        _, log = server.process.communicate(timeout=60)
        assert "has been replaced by another bundle" in log


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_a_library_one_error_names_the_extra(library, places, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    bundle, encoder = places
    assert main(["serve", str(bundle), "--text-encoder", str(encoder)]) == 2
    assert install_extra("serve") in capsys.readouterr().err


def test_a_bad_setting_is_said_before_anything_is_loaded(places, capsys):
    assert main(["serve", "nowhere", "--text-encoder", "nowhere", "--host", "0.0.0.0"]) == 2
    assert "--tokens FILE" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--text-encoder", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_help_and_defaults_need_no_server_library():
    program = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'starlette', 'prometheus_client', 'av'): sys.modules[name] = None\n"
        "from causalrt.cli import main\n"
        "main(['serve', '--help'])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--max-sessions" in shown.stdout


def test_sigterm_during_generation_ends_it_with_a_word_and_leaves_nothing(server):
    """The last test of this server."""
    with server.realtime() as socket:
        client = Client(socket)
        client.next("ready")
        job = server.http.post("/v1/videos", json={"prompt": "a fox"}).json()
        client.start()
        client.next("chunk")
        children = server.descendants()
        assert len(children) >= 4
        server.process.send_signal(signal.SIGTERM)
        assert client.next("ended")["reason"] == "draining"
        assert client.closed() == 1001
        _, log = server.process.communicate(timeout=60)
        assert server.process.returncode == 0, log
        assert "Traceback" not in log
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert json.loads((server.spool / f"{job['id']}.json").read_text())["error_code"] == "server_shutdown"
        assert not list(server.spool.glob(f"*{job['id']}*.mp4*"))
