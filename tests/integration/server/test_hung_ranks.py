"""Real ranks that are stopped, so that they live and give no answer."""

import os
import signal
import threading

import pytest
from support.running import until
from support.small_bundles import bundle_factory, prompt
from support.small_encoders import write_vae

from causalrt.errors import EngineClosedError, RankError
from causalrt.runtime.load import load
from causalrt.server import engine_host
from causalrt.server.engine_host import EngineHost


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hung")
    return bundle_factory(folder, vae=write_vae(folder / "vae"))(2)


def next_chunk(host, engine, session):
    """As a generation does it."""
    chunk = next(session)
    host.chunk_took(engine, 1e-3 * (sum(chunk.times.denoise_ms) + chunk.times.gather_ms + chunk.decode_ms))


def answers_read(engine):
    """The context pass of the last chunk has ended, and nobody has asked for its answer yet."""
    return engine.silent_s() == 0.0


@pytest.mark.parametrize("whom", ["rank", pytest.param("decoder", marks=pytest.mark.slow)])
def test_what_hangs_is_not_ready_and_is_started_again(bundle, whom, monkeypatch):
    monkeypatch.setattr(engine_host, "SLOW_S", 0.5)
    monkeypatch.setattr(engine_host, "SLOW_CHUNKS", 2)
    monkeypatch.setattr(engine_host, "HUNG_S", 3.0)
    monkeypatch.setattr(engine_host, "HUNG_CHUNKS", 4)

    def loaded():
        return load(bundle, vae=True, num_threads=1, max_sessions=1)

    engine = loaded()
    host = EngineHost(engine, loaded, first_wait_s=0.01, max_wait_s=1.0)
    try:
        session = engine.session(prompt(), seed=0)
        for _ in range(3):
            next_chunk(host, engine, session)
        until(lambda: answers_read(engine), "the end of the context pass")
        assert host.look().detail is None
        os.kill(engine.rank_pids[1] if whom == "rank" else engine.decoder.pid, signal.SIGSTOP)
        assert host.look().detail is None  # it owes nothing
        errors = []

        def generate():
            try:
                next_chunk(host, engine, session)
            except (RankError, EngineClosedError) as error:
                errors.append(error)

        waiting = threading.Thread(target=generate)
        waiting.start()
        until(lambda: (status := host.look()).state == "ready" and status.detail, "being not ready")
        assert "no answer for" in host.status.detail
        until(lambda: host.look().state == "reloading", "giving it up")
        waiting.join(30)
        assert len(errors) == 1
        until(lambda: host.look().detail is None, "the reload")
        assert host.current is not engine
        with host.engine().session(prompt(), seed=0, num_chunks=1) as again:
            assert len(list(again)) == 1
    finally:
        host.close()


def test_a_rank_that_hangs_when_nobody_waits_for_it_is_seen(bundle):
    """The context pass of a chunk runs while the chunk is used, and its answer is read with the next command."""
    with load(bundle, vae=False, num_threads=1) as engine:
        assert engine.silent_s() == 0.0
        rank = engine.rank_pids[1]
        for seed in range(50):  # until it is caught in the midst of a context pass
            session = engine.session(prompt(), seed=seed)
            next(session)
            os.kill(rank, signal.SIGSTOP)
            if not answers_read(engine):
                break
            os.kill(rank, signal.SIGCONT)
            session.close()
        first = until(engine.silent_s)
        until(lambda: engine.silent_s() > first + 0.1, "more silence")
        os.kill(rank, signal.SIGCONT)
        until(lambda: answers_read(engine), "the answer")
