"""A session without an end: what its caller's process keeps does not grow with the number of chunks."""

import gc

import pytest
from support.small_bundles import bundle_factory, num_steps, prompt

import causalrt
from causalrt.runtime import session as session_module


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    changes = {"video.time_index": "relative", "video.window_frames": "6", **num_steps(1)}
    with causalrt.load(bundle_factory(tmp_path_factory.mktemp("endless"))(1, changes), device="cpu") as engine:
        yield engine


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_the_newest_times_are_kept(engine, monkeypatch, ahead):
    monkeypatch.setattr(session_module, "MAX_TIMES", 4)
    with engine.session(prompt(), num_chunks=10**6, ahead=ahead) as session:
        for _ in range(10):
            newest = next(session).index + ahead
        engine.wait()
        kept = list(session.times)
        assert len(kept) == 4
        assert kept == list(range(kept[0], kept[0] + 4))
        assert kept[-1] in (newest - 1, newest)  # the chunk made ahead may not have begun yet
        assert all(set(by_rank) == {0} for by_rank in list(session.times.values())[:-1])


def test_nothing_grows(engine, monkeypatch):
    monkeypatch.setattr(session_module, "MAX_TIMES", 4)
    with engine.session(prompt(), num_chunks=10**6) as session:

        def objects_after(num_chunks):
            for _ in range(num_chunks):
                next(session)
            engine.wait()
            gc.collect()
            return len(gc.get_objects())

        objects_after(10)
        before = objects_after(10)
        assert objects_after(100) - before < 20


def test_times_by_chunk_of_a_resumed_session(engine, tmp_path):
    session = engine.session(prompt(), num_chunks=4)
    next(session)
    next(session)
    session.snapshot(tmp_path / "snapshot")
    with engine.resume(tmp_path / "snapshot") as resumed:
        assert [chunk.index for chunk in resumed] == [2, 3]
        assert list(resumed.times) == [2, 3]
