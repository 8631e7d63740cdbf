"""What becomes of requests when the ranks die, and when the server ends."""

import signal
import threading
import time

import pytest
from support.fake_engine import FakeEngine, FakeSession
from support.running import Running, until

from causalrt.errors import RankError, RequestError
from causalrt.media.video_file import Mp4Writer
from causalrt.server import services
from causalrt.server.auth import Tokens
from causalrt.server.engine_host import BundleReplacedError
from causalrt.server.run import listen

TOKEN = "a-token-0123456789"


def test_ranks_that_die_fail_what_runs_and_come_back():
    engine = FakeEngine(max_sessions=2)
    engine.hold()
    with Running(engine, reload_after_s=0.3) as server, server.realtime() as client:
        job = server.post(seconds=1).json()["id"]
        client.start()
        client.next("started")
        queued = server.post(seconds=1).json()["id"]
        engine.die()
        failed = server.finished(job)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "not_ready")
        assert "rank 0" not in failed["error"]["message"]
        assert client.next("error")["code"] == "not_ready"
        answer = server.http.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
        assert server.http.get("/healthz").status_code == 200
        refused = server.post()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        until(lambda: server.http.get("/readyz").status_code == 200, "the reload")
        assert engine.closed
        assert server.finished(queued)["status"] == "completed"  # it had waited
        assert server.finished(server.post(seconds=1).json()["id"])["status"] == "completed"
        client.start(chunks=1)
        assert client.next("ended")["reason"] == "done"
        assert server.metric("causalrt_engine_reloads_total") == 1


def test_dead_ranks_are_seen_without_a_request():
    engine = FakeEngine()
    with Running(engine, reload_after_s=60) as server:
        engine.dead = ["rank 0"]
        until(lambda: server.metric("causalrt_ready") == 0)
        assert engine.closed or until(lambda: engine.closed)


def engine_state(server, path="/readyz"):
    """What the server says of its engine."""
    return server.http.get(path).json()


def test_an_engine_that_cannot_be_loaded_is_tried_for_ever():
    tried, mended = [], threading.Event()

    def load():
        tried.append(1)
        if not mended.is_set():
            raise RankError("no GPU is left in /dev/secret")
        return FakeEngine()

    engine = FakeEngine(max_sessions=1)
    engine.hold()
    with Running(engine, load=load, reload_after_s=0.01, reload_max_wait_s=0.05) as server:
        job, waiting = (server.post(seconds=1).json()["id"] for _ in range(2))
        before = engine_state(server)
        assert (before["engine"], before["tries"], before["next_try_s"]) == ("ready", 0, None)
        engine.die()
        ends = [server.finished(each) for each in (job, waiting)]
        assert [(end["status"], end["error"]["code"]) for end in ends] == [("failed", "not_ready")] * 2
        until(lambda: len(tried) > 10, "many more tries")
        answer = server.http.get("/readyz")
        assert answer.status_code == 503
        said = answer.json()
        assert (said["status"], said["engine"]) == ("not ready", "failing")
        assert said["tries"] >= 10
        assert "could not be started again" in said["detail"]
        assert "secret" not in said["detail"]
        assert said["since"] >= before["since"]
        until(lambda: (state := engine_state(server, "/healthz"))["next_try_s"] is not None and state, "a wait")
        assert engine_state(server, "/healthz")["status"] == "alive"
        assert server.post().status_code == 503
        mended.set()
        until(lambda: server.http.get("/readyz").status_code == 200, "the reload")
        assert (engine_state(server)["engine"], engine_state(server)["tries"]) == ("ready", 0)
        assert server.finished(server.post(seconds=1).json()["id"])["status"] == "completed"


def test_a_replaced_bundle_is_not_served_until_the_former_one_is_back():
    back = threading.Event()

    def load():
        if not back.is_set():
            raise BundleReplacedError("/srv/secret has been replaced by another bundle")
        return FakeEngine()

    engine = FakeEngine(max_sessions=1)
    engine.hold()
    with Running(engine, load=load, reload_after_s=0.01, reload_max_wait_s=0.05) as server, server.realtime() as client:
        client.start()
        client.next("started")
        waiting = server.post(seconds=1).json()["id"]
        engine.die()
        assert client.next("error")["code"] == "not_ready"
        failed = server.finished(waiting)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "not_ready")
        assert "the bundle has been replaced by another one" in failed["error"]["message"]
        assert "secret" not in failed["error"]["message"]
        said = engine_state(server)
        assert (said["status"], said["engine"]) == ("not ready", "failing")
        assert "restart the server" in said["detail"]
        client.start()
        assert "restart the server" in client.next("error")["message"]
        back.set()
        until(lambda: server.http.get("/readyz").status_code == 200, "the reload")
        assert server.finished(server.post(seconds=1).json()["id"])["status"] == "completed"


class Sessions(FakeEngine):
    """Sessions whose methods a test replaces with its own, which are given the session."""

    def __init__(self, **methods):
        super().__init__()
        self._methods = methods

    def session(self, *args, **how):
        session = super().session(*args, **how)
        session.__class__ = type("Session", (type(session),), self._methods)
        return session


def test_an_error_in_mid_generation_is_the_servers_own():
    def second_fails(session):
        if session.next_chunk == 1:
            raise RequestError("latents to decode have values that are not finite")
        return FakeSession.__next__(session)

    with Running(Sessions(__next__=second_fails)) as server, server.realtime() as client:
        client.start(chunks=5)
        said = client.next("error")
        assert said["code"] == "internal"
        assert "finite" not in said["message"]
        failed = server.finished(server.post(seconds=4).json()["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "internal")


def test_ranks_that_die_after_the_last_chunk_take_nothing_from_the_video():
    def close(session):
        FakeSession.close(session)
        raise RankError("rank 1 has died")

    engine = Sessions(close=close)
    with Running(engine, reload_after_s=0.01) as server:
        job = server.finished(server.post(seconds=1).json()["id"])
        assert job["status"] == "completed"
        assert server.http.get(f"/v1/videos/{job['id']}/content").status_code == 200
        until(lambda: engine.closed and server.metric("causalrt_engine_reloads_total") == 1, "the reload")


def test_what_cannot_be_discarded_hides_no_dead_ranks(monkeypatch):
    def discard(self):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Mp4Writer, "discard", discard)
    engine = FakeEngine()
    engine.hold()
    with Running(engine, reload_after_s=0.01) as server:
        job = server.post(seconds=1).json()["id"]
        until(lambda: server.video(job)["status"] == "in_progress")
        engine.die()
        assert server.finished(job)["error"]["code"] == "not_ready"
        until(lambda: server.metric("causalrt_engine_reloads_total") == 1, "the reload")


# ---- the end


def test_a_job_whose_last_chunk_comes_after_the_grace_time_is_complete(tmp_path):
    engine = FakeEngine(max_sessions=2)
    engine.hold()
    with Running(engine, grace_s=0.1, spool=tmp_path / "spool") as server, server.realtime() as client:
        job = server.post(seconds=0.1).json()["id"]
        client.start(chunks=1)
        client.next("started")
        until(lambda: server.video(job)["status"] == "in_progress")
        server.end()
        until(lambda: server.services.generator.stopping == 2, "the end of the grace time")
        engine.let(2)
        ended = client.next("ended")
        assert (ended["reason"], ended["chunks"]) == ("draining", 1)
        server.ended()
        assert server.services.jobs.get(job, "anonymous").status == "completed"
        assert (tmp_path / "spool" / f"{job}.mp4").stat().st_size


def test_draining_finishes_what_runs_and_takes_nothing_new():
    engine = FakeEngine(max_sessions=2)
    engine.hold()
    with Running(engine) as server, server.realtime() as client, server.realtime() as idle:
        job = server.post(seconds=1).json()["id"]
        client.start(chunks=2)
        client.next("started")
        queued = server.post(seconds=1).json()["id"]
        server.end()
        assert idle.closed() == 1001
        until(lambda: server.http.get("/readyz").status_code == 503)
        assert server.post().status_code == 503
        failed = server.finished(queued)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "server_shutdown")
        assert server.video(job)["status"] == "in_progress"
        engine.let(10)
        assert client.next("ended")["reason"] == "done"
        assert client.closed() == 1001
        server.ended()
        assert engine.closed
        assert not engine.open_sessions


def test_draining_tells_a_client_that_waits_for_its_token(tmp_path):
    """A token would not help it any more, so it must not be asked for one."""
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(TOKEN)
    engine = FakeEngine()
    engine.hold()
    with (
        Running(engine, tokens=Tokens.from_file(tokens)) as server,
        server.realtime(ready=False) as waiting,
        server.realtime(ready=False) as client,
    ):
        client.send("auth", token=TOKEN)
        client.start(chunks=1)
        client.next("started")  # so that the server has something to wait for
        server.end()
        assert waiting.closed() == 1001
        with server.realtime(ready=False) as late:
            assert late.closed() == 1001
        engine.let(1)
        assert client.next("ended")["reason"] == "done"


def test_draining_waits_for_a_reader_that_is_behind():
    engine = FakeEngine(changes={"video.latent_height": "40", "video.latent_width": "60"})
    with (
        Running(engine, grace_s=0.1, send_buffer_bytes=4096) as server,
        server.realtime(max_queue=1) as client,
    ):
        client.start(chunks=7)
        client.next("started")
        until(lambda: (made := engine.made.get(0)) and time.sleep(0.5) is None and engine.made[0] == made)
        server.end()
        until(lambda: engine.open_sessions == 0 and server.services.admission.running == 0, "ending the generation")
        time.sleep(0.3)  # still behind, when everything has ended
        ended = client.next("ended")
        chunks = [message for message in client.seen if message["type"] == "chunk"]
        assert ended["reason"] == "draining"
        assert ended["chunks"] == len(chunks) == engine.made[0] < 7
        assert client.closed() == 1001
        server.ended()
        assert server.services.metrics.dropped_frames._value.get() == 0


def test_draining_does_not_wait_for_a_reader_for_ever(monkeypatch):
    monkeypatch.setattr(services, "FAREWELL_S", 0.2)
    engine = FakeEngine(changes={"video.latent_height": "40", "video.latent_width": "60"})
    with (
        Running(engine, grace_s=0.1, send_buffer_bytes=4096, stall_s=600.0) as server,
        server.realtime(max_queue=1, close_timeout=0.2) as client,
    ):
        client.start(chunks=7)
        client.next("started")  # and reads nothing more
        until(lambda: engine.made.get(0))
        server.end()
        server.ended()


def test_draining_ends_what_takes_too_long(tmp_path):
    engine = FakeEngine(max_sessions=2)
    engine.hold()
    with Running(engine, grace_s=0.2, spool=tmp_path / "spool") as server, server.realtime() as client:
        job = server.post(seconds=5).json()["id"]
        client.start()
        client.next("started")
        server.end()
        until(lambda: server.services.generator.stopping == 2, "the end of the grace time")
        engine.let(2)  # the chunks that are under way
        ended = client.next("ended")
        assert (ended["reason"], ended["chunks"]) == ("draining", 1)
        assert client.closed() == 1001
        server.ended()
        assert engine.closed
        assert server.services.jobs.get(job, "anonymous").error_code == "server_shutdown"
        assert not list((tmp_path / "spool").glob("*.mp4*"))


def test_a_bundle_without_a_vae_is_refused():
    engine = FakeEngine()
    engine.has_vae = False
    with pytest.raises(RequestError, match="no VAE"), Running(engine):
        pass


def test_an_address_that_is_taken_is_an_error():
    taken = listen("127.0.0.1", 0, send_buffer_bytes=4096)
    with taken, pytest.raises(RequestError, match="choose another"):
        listen("127.0.0.1", taken.getsockname()[1], send_buffer_bytes=4096)


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_a_chunk_that_hangs(again):
    engine = FakeEngine()
    engine.hold()
    with Running(engine, grace_s=600.0) as server, server.realtime() as client:
        job = server.post(seconds=1).json()["id"]
        client.start()
        client.next("started")
        server.end()
        until(lambda: server.video(job)["status"] == "in_progress" and server.services.draining.is_set())
        server.end(again)
        server.ended()
        assert engine.closed
        assert not engine.open_sessions
        assert server.services.jobs.get(job, "anonymous").error_code == "server_shutdown"
        assert not server.services.store.folder.exists()
