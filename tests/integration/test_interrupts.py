"""Ctrl-C (a real SIGINT) in the middle of every kind of call: the engine stays usable, and what it makes stays right.

Interrupts come at random instants; the seed makes their delays the same in every run, and not where they strike.
"""

import asyncio
import functools
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.small_bundles import bundle_factory, num_steps, prompt

import causalrt
from causalrt.errors import EngineClosedError

STRUCK = 5
"""Interrupts in the middle of each kind of call."""
MAX_TRIALS = 100
NO_SIGNAL_S = 30.0


def interrupted(call: Callable[[], object], after_s: float) -> bool:
    """Send a SIGINT so many seconds after the call begins; whether it was raised before the call had returned."""
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT))
    returned = False
    try:
        timer.start()
        call()
        returned = True
        time.sleep(NO_SIGNAL_S)
    except KeyboardInterrupt:
        return not returned
    finally:
        timer.cancel()
        timer.join()
    raise AssertionError("the interrupt was lost")


@dataclass(frozen=True)
class Subject:
    """An engine, and what its sessions make if nothing disturbs them."""

    engine: causalrt.Engine
    snapshot: Path
    chunks: list[causalrt.Chunk]
    switched: list[causalrt.Chunk]
    """With another prompt from chunk 1 on."""


def equal(chunks: list[causalrt.Chunk], wanted: list[causalrt.Chunk]) -> bool:
    assert [chunk.index for chunk in chunks] == [chunk.index for chunk in wanted]
    return all(
        torch.equal(chunk.latents, other.latents)
        and (chunk.frames is other.frames is None or torch.equal(chunk.frames, other.frames))
        for chunk, other in zip(chunks, wanted, strict=True)
    )


@pytest.fixture(scope="module", params=["latents", pytest.param("frames", marks=pytest.mark.slow)])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder, vae = tmp_path_factory.mktemp("interrupts"), None
    if request.param == "frames":
        pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")
        from support.small_encoders import write_vae

        vae = write_vae(folder / "vae")
    bundle = bundle_factory(folder, vae=vae)(2, num_steps(8))
    with causalrt.load(bundle, device="cpu", max_sessions=2) as engine:
        chunks = list(engine.session(prompt(), seed=2))
        session = engine.session(prompt(), seed=2)
        switched = [next(session)]
        session.snapshot(folder / "snapshot")
        session.switch_prompt(prompt(1))
        switched += session
        yield Subject(engine, folder / "snapshot", chunks, switched)


@dataclass
class Trial:
    """A session that has made one chunk, and a call that an interrupt came into (or came after)."""

    session: causalrt.Session
    chunks: list[causalrt.Chunk]
    struck: bool = False


def trials(subject: Subject, call: Callable[[Trial], object], *, ahead: bool = False) -> Iterator[Trial]:
    """Interrupt the call at random instants, each time in a session of its own."""

    def begin() -> Trial:
        session = subject.engine.session(prompt(), seed=2, ahead=ahead)
        return Trial(session, [next(session)])

    with begin().session as session:
        start = time.perf_counter()
        call(Trial(session, []))
        seconds = time.perf_counter() - start
    pids, instants, num_struck = subject.engine.rank_pids, random.Random(0), 0
    for _ in range(MAX_TRIALS):
        trial = begin()
        trial.struck = interrupted(functools.partial(call, trial), instants.uniform(0, seconds))
        num_struck += trial.struck
        seconds *= 1.2 if trial.struck else 0.7  # the machine is not always as fast
        yield trial
        trial.session.close()
        assert subject.engine.rank_pids == pids
        assert subject.engine.open_sessions == 0
        if num_struck == STRUCK:
            break
    assert num_struck == STRUCK, f"{num_struck} of {MAX_TRIALS} interrupts came in the middle of a call"
    assert equal(list(subject.engine.session(prompt(), seed=2)), subject.chunks)


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_in_a_chunk(subject: Subject, ahead: bool) -> None:
    """Not a chunk is lost: the next call returns the one that was under way."""
    for trial in trials(subject, lambda trial: trial.chunks.append(next(trial.session)), ahead=ahead):
        assert equal(trial.chunks + list(trial.session), subject.chunks)


def test_in_a_loop_over_chunks(subject: Subject) -> None:
    """The loop may lose the chunk that was just returned; no other is lost, and none comes twice."""
    for trial in trials(subject, lambda trial: [trial.chunks.append(chunk) for chunk in trial.session]):
        rest = list(trial.session)
        indices = [chunk.index for chunk in trial.chunks + rest]
        assert indices == sorted(set(indices))
        assert len(indices) >= len(subject.chunks) - 1
        assert equal(rest, subject.chunks[len(subject.chunks) - len(rest) :])


@pytest.mark.parametrize("how", ["session", "resume"])
def test_while_a_session_opens(subject: Subject, how: str) -> None:
    """No session is left behind, even if something keeps the interrupt's traceback, as a notebook does."""
    kept = []
    openings = {
        "session": lambda: subject.engine.session(prompt(), seed=2),
        "resume": lambda: subject.engine.resume(subject.snapshot),
    }

    def call(trial: Trial) -> None:
        try:
            opened = openings[how]()
        except KeyboardInterrupt as error:
            kept.append(error)
            raise
        opened.close()

    for trial in trials(subject, call):
        assert subject.engine.open_sessions == 1  # the trial's own
        assert equal(trial.chunks + list(trial.session), subject.chunks)
    assert kept


def test_in_a_prompt_switch(subject: Subject) -> None:
    """It is done, or it has not begun."""
    for trial in trials(subject, lambda trial: trial.session.switch_prompt(prompt(1))):
        chunks = trial.chunks + list(trial.session)
        assert equal(chunks, subject.switched) or (trial.struck and equal(chunks, subject.chunks))


def test_in_a_snapshot(subject: Subject, tmp_path: Path) -> None:
    """It is there and right, or nothing is."""
    folder = tmp_path / "snapshot"
    for trial in trials(subject, lambda trial: trial.session.snapshot(folder, overwrite=True)):
        assert equal(trial.chunks + list(trial.session), subject.chunks)
        found = os.listdir(tmp_path)
        assert found == ["snapshot"] or (trial.struck and not found)
        if found:
            assert equal(list(subject.engine.resume(folder)), subject.chunks[1:])
            shutil.rmtree(folder)


def test_in_close(subject: Subject) -> None:
    for trial in trials(subject, lambda trial: trial.session.close()):
        trial.session.close()
        assert subject.engine.open_sessions == 0


def test_in_wait_and_usage(subject: Subject) -> None:
    for trial in trials(subject, lambda trial: [subject.engine.wait(), subject.engine.usage()]):
        assert equal(trial.chunks + list(trial.session), subject.chunks)


@pytest.mark.parametrize("subject", [pytest.param("frames", marks=pytest.mark.slow)], indirect=True)
def test_in_encode_frames(subject: Subject) -> None:
    frames = subject.chunks[0].frames
    assert frames is not None
    expected = subject.engine.encode_frames(frames)
    for _ in trials(subject, lambda trial: subject.engine.encode_frames(frames)):
        assert torch.equal(subject.engine.encode_frames(frames), expected)


def test_in_async_iteration(subject: Subject) -> None:
    async def watch(trial: Trial) -> None:
        async for chunk in trial.session:
            trial.chunks.append(chunk)

    for trial in trials(subject, lambda trial: asyncio.run(watch(trial))):
        rest = list(trial.session)
        indices = [chunk.index for chunk in trial.chunks + rest]
        assert indices == sorted(set(indices))
        assert len(indices) >= len(subject.chunks) - 1  # the chunk that the cancelled task was waiting for
        assert equal(rest, subject.chunks[len(subject.chunks) - len(rest) :])


def test_a_second_interrupt_ends_the_engine(tmp_path: Path) -> None:
    engine = causalrt.load(bundle_factory(tmp_path)(2), device="cpu")
    session, pids = engine.session(prompt()), engine.rank_pids
    os.kill(pids[1], signal.SIGSTOP)  # the chunk never ends
    deferred = []

    def press_twice() -> None:
        while not engine.silent_s():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        deferred.append(returned == [])
        os.kill(os.getpid(), signal.SIGINT)

    returned: list[str] = []
    keys = threading.Thread(target=press_twice)
    keys.start()
    try:
        next(session)
    except KeyboardInterrupt:
        returned.append("interrupted")
    keys.join()
    assert deferred == [True]
    assert returned == ["interrupted"]
    for call in (lambda: next(session), lambda: engine.session(prompt())):
        with pytest.raises(EngineClosedError, match="load the bundle again"):
            call()
    session.close()
    engine.close()
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []


def children() -> str:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()


def test_an_interrupt_while_loading_ends_what_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, folder = bundle_factory(tmp_path)(2), tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    kept = []

    def call() -> None:
        try:
            causalrt.load(bundle, device="cpu")
        except KeyboardInterrupt as error:
            kept.append(error)  # and with it the half-made engine, as in a notebook
            raise

    instants, before = random.Random(0), children()
    for _ in range(4):
        assert interrupted(call, instants.uniform(0.02, 0.8))
        assert list(folder.glob("causalrt-*")) == []
        assert children() == before
