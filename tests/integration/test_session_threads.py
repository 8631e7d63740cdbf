"""Sessions under interrupts, cancelled tasks and other threads: no frame at a wrong place, no other session hurt."""

import asyncio
import os
import signal
import threading
import time

import pytest
import torch
from support.small_bundles import bundle_factory, num_steps, prompt

import causalrt
from causalrt.errors import EngineClosedError


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Chunks of it last some tenths of a second."""
    bundle = bundle_factory(tmp_path_factory.mktemp("bundle"))(1, num_steps(150))
    with causalrt.load(bundle, device="cpu", max_sessions=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(engine):
    return [chunk.latents for chunk in engine.session(prompt(), seed=2)]


def all_right(chunks, wanted):
    return all(torch.equal(chunk.latents, wanted[chunk.index]) for chunk in chunks)


def test_a_reader_that_timed_out_goes_on(engine, wanted):
    async def watch():
        async with engine.session(prompt(), seed=2) as session:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(session), timeout=0.02)
            return [chunk async for chunk in session]

    chunks = asyncio.run(watch())
    assert [chunk.index for chunk in chunks] == [1, 2, 3]
    assert all_right(chunks, wanted)
    assert engine.open_sessions == 0


def test_an_interrupt_while_a_chunk_is_made_ahead(engine, wanted, monkeypatch):
    session = engine.session(prompt(), seed=2, ahead=True)
    chunks = [next(session)]
    made = session._made_ahead
    result = made.result

    def interrupted():  # in the thread of the caller, as a signal is handled
        signal.raise_signal(signal.SIGINT)
        return result()

    monkeypatch.setattr(made, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(session)
    chunks += session
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert all_right(chunks, wanted)


def test_an_interrupt_while_a_session_waits_to_be_closed(engine):
    session = engine.session(prompt())
    next(session)
    engine.wait()
    engine.workers._lock.acquire()  # another session's turn

    def interrupt():
        while not engine.workers._lock._waiting:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        session.close()
    engine.workers._lock.release()
    assert engine.open_sessions == 1
    session.close()
    assert engine.open_sessions == 0


def test_a_session_closed_by_another_thread(engine, wanted, monkeypatch):
    """It ends in order for whoever uses it, and no other session notices."""
    other = engine.session(prompt(), seed=2)
    session = engine.session(prompt(1), seed=1)
    chunks = [next(other)]
    encoding, closing, switch_ms = threading.Event(), threading.Event(), []
    real = engine.encode_prompt

    def slow(text):
        encoding.set()
        assert closing.wait(10)
        return real(text)

    monkeypatch.setattr(session, "_encode_prompt", slow)

    def switch():
        switch_ms.append(session.switch_prompt(prompt(2)))

    def close():
        closing.set()
        session.close()

    threads = [threading.Thread(target=switch)]
    threads[0].start()
    assert encoding.wait(10)
    threads.append(threading.Thread(target=close))
    threads[1].start()
    for thread in threads:
        thread.join(20)
    monkeypatch.undo()
    with pytest.raises(EngineClosedError, match="the session was closed"):
        session.switch_prompt(prompt(2))
    chunks += other
    assert len(switch_ms) == 1
    assert len(chunks) == 4
    assert all_right(chunks, wanted)


def test_ranks_refuse_a_chunk_at_another_place(tmp_path):
    from causalrt.errors import RankError

    with causalrt.load(bundle_factory(tmp_path)(1), device="cpu") as engine:
        session = engine.session(prompt())
        next(session)
        session._next = 0
        with pytest.raises(RankError, match="chunk 0 begins at frame 0, and this rank is at 3"):
            next(session)
