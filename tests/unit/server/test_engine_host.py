"""What counts as a dead or a hanging engine, and what does not."""

import threading
from types import SimpleNamespace

import pytest

from causalrt.errors import EngineClosedError, RankError
from causalrt.server import engine_host
from causalrt.server.engine_host import BundleReplacedError, EngineHost

CHUNK_S = 0.5


class Engine:
    """Of which only the processes are of interest; `closed` is set when the host gives it up."""

    config = None

    def __init__(self):
        self.dead, self.silent, self.closed = [], 0.0, threading.Event()

    def dead_processes(self):
        return self.dead

    def silent_s(self):
        return self.silent

    def close(self):
        self.closed.set()


@pytest.fixture
def clock(monkeypatch):
    """The host's clock, which stands still."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(engine_host, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))
    return clock


def host_of(engine, load=Engine, **how):
    return EngineHost(engine, load, **{"first_wait_s": 0.0, "max_wait_s": 0.0, **how})


def pass_time(host, engine, clock, seconds, *, step_s=1.0):
    """Let an answer be owed for so many seconds more, with a look at each step; the last status."""
    status = host.look()
    for _ in range(int(seconds / step_s)):
        clock.now += step_s
        engine.silent += step_s
        status = host.look()
    return status


def warm(host, engine):
    for _ in range(2):
        host.chunk_took(engine, CHUNK_S)


def test_a_process_that_has_ended_is_named_in_the_log(caplog):
    engine = Engine()
    host = host_of(engine, first_wait_s=60.0)
    assert host.look().detail is None
    engine.dead = ["rank 1", "the decoder"]
    status = host.look()
    assert status.state == "reloading"
    assert "being started again" in status.detail
    assert engine.closed.wait(10)
    assert "rank 1, the decoder" in caplog.text
    host.close()


def test_an_answer_that_is_late_makes_the_server_not_ready_and_then_ends_the_engine(clock, caplog):
    engine = Engine()
    host = host_of(engine, first_wait_s=1e6)
    warm(host, engine)
    assert pass_time(host, engine, clock, 10).detail is None
    slow = pass_time(host, engine, clock, 2)
    assert (slow.state, slow.detail) == ("ready", "a generating process has given no answer for 12 s")
    assert pass_time(host, engine, clock, 48).state == "ready"
    assert pass_time(host, engine, clock, 1).state == "reloading"
    assert engine.closed.wait(10)
    assert "no answer has come for 61 s; the slowest chunk so far took 0.5 s" in caplog.text
    host.close()


def test_an_answer_that_comes_after_all_makes_the_server_ready_again(clock):
    engine = Engine()
    host = host_of(engine)
    warm(host, engine)
    assert pass_time(host, engine, clock, 40).detail is not None
    engine.silent = 0.0
    assert host.look().detail is None
    assert not engine.closed.is_set()


@pytest.mark.parametrize(("slowest_s", "patience_s"), [(0.1, 60), (2.0, 60), (7.0, 210)])
def test_slow_machines_have_more_time(clock, slowest_s, patience_s):
    engine = Engine()
    host = host_of(engine, first_wait_s=1e6)
    for seconds in (0.05, slowest_s, 0.05):
        host.chunk_took(engine, seconds)
    assert pass_time(host, engine, clock, patience_s).state == "ready"
    assert pass_time(host, engine, clock, 1).state == "reloading"
    host.close()


@pytest.mark.parametrize("chunks", [[], [400.0]])
def test_what_is_not_warm_yet_has_the_engines_own_time_out(clock, chunks):
    """The first chunk, in which much is done once, may take any time, and says nothing of those that follow."""
    engine = Engine()
    host = host_of(engine, first_wait_s=1e6)
    for seconds in chunks:
        host.chunk_took(engine, seconds)
    assert pass_time(host, engine, clock, 500).detail is None
    host.chunk_took(engine, CHUNK_S)
    host.chunk_took(engine, CHUNK_S)
    assert host.look().state == "reloading"
    host.close()


def test_time_in_which_all_processes_stood_still_is_not_held_against_them(clock):
    """As after `docker pause`, or when a debugger has stopped everything."""
    engine = Engine()
    host = host_of(engine)
    warm(host, engine)
    assert pass_time(host, engine, clock, 3600, step_s=3600).detail is None
    assert not engine.closed.is_set()


def test_another_engine_begins_to_learn_anew(clock):
    engine, loaded = Engine(), threading.Event()
    host = host_of(engine, first_wait_s=0.001, on_reload=loaded.set)
    warm(host, engine)
    host.report(engine, "it has died")
    assert loaded.wait(10)
    warm(host, engine)  # a generation that was under way on the former one
    assert pass_time(host, host.current, clock, 500).detail is None


def test_who_waits_for_an_engine_is_refused_after_some_tries_and_served_when_one_succeeds():
    engines, loaded = [RankError("no memory")] * 5 + [Engine()], threading.Event()

    def load():
        found = engines.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    engine = Engine()
    host = host_of(engine, load, first_wait_s=0.01, max_wait_s=0.02, on_reload=loaded.set)
    host.report(engine, "it has died")
    with pytest.raises(EngineClosedError, match="could not be started again"):
        host.engine()
    assert loaded.wait(10)
    assert host.engine() is host.current is not engine
    assert host.status.tries == 0


def test_who_waits_is_refused_at_once_when_the_bundle_is_another_one():
    def load():
        raise BundleReplacedError("/srv/bundle has been replaced")

    engine = Engine()
    host = host_of(engine, load, first_wait_s=0.01, max_wait_s=1e6)
    host.report(engine, "it has died")
    with pytest.raises(EngineClosedError, match="bundle has been replaced by another one since"):
        host.engine()
    assert (host.status.state, host.status.tries) == ("failing", 1)
    host.close()
    with pytest.raises(EngineClosedError, match="shutting down"):
        host.engine()


def test_waits_between_tries_grow_to_a_ceiling(monkeypatch):
    waits, closed = [], threading.Event()

    def load():
        raise RankError("no memory")

    engine = Engine()
    host = host_of(engine, load, first_wait_s=1.0, max_wait_s=60.0)

    def wait(seconds):
        waits.append(seconds)
        if len(waits) < 7:
            return True
        closed.set()
        return False

    monkeypatch.setattr(host, "_wait", wait)
    host.report(engine, "it has died")
    assert closed.wait(10)
    assert waits == [1.0, 4.0, 16.0, 60.0, 60.0, 60.0, 60.0]
