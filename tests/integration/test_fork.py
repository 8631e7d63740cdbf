"""An engine in processes that are forked from its owner's: they get one clear error, and the owner notices nothing."""

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_bundles import bundle_factory, num_steps, prompt

import causalrt
from causalrt.errors import CausalRTError, ForkError, RankError

STARTS_PROCESSES = True

CHILD_S = 30.0
"""How long a child may take before it counts as hung."""


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked process, as JSON carries it; what it raises is a text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = work()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        if not select.select([pipe], [], [], CHILD_S)[0]:
            os.kill(pid, signal.SIGKILL)
        answer = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(answer) if answer else "hung"


@pytest.fixture
def sleeping_child() -> Iterator[Callable[[], int]]:
    """Forks processes that live until the end of the test."""
    pids = []

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        pids.append(pid)
        return pid

    yield fork
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture(scope="module", params=["latents", pytest.param("frames", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[causalrt.Engine]:
    """Chunks of it last some tenths of a second."""
    folder, vae = tmp_path_factory.mktemp("fork"), None
    if request.param == "frames":
        pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")
        from support.small_encoders import write_vae

        vae = write_vae(folder / "vae")
    with causalrt.load(bundle_factory(folder, vae=vae)(2, num_steps(50)), device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(engine: causalrt.Engine) -> list[torch.Tensor]:
    return [chunk.latents for chunk in engine.session(prompt(), seed=2)]


def equal(chunks: list[causalrt.Chunk], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(chunk.latents, latents) for chunk, latents in zip(chunks, wanted, strict=True))


def calls(engine: causalrt.Engine, session: causalrt.Session, folder: Path) -> dict[str, Callable[[], object]]:
    frames = torch.zeros(1, engine.config.video.pixel_height, engine.config.video.pixel_width, 3, dtype=torch.uint8)
    made: dict[str, Callable[[], object]] = {
        "engine.session": lambda: engine.session(prompt()),
        "engine.resume": lambda: engine.resume(folder),
        "engine.encode_prompt": lambda: engine.encode_prompt(prompt()),
        "engine.forget_prompts": engine.forget_prompts,
        "engine.encode_frames": lambda: engine.encode_frames(frames),
        "engine.wait": engine.wait,
        "engine.usage": engine.usage,
        "engine.check_exchanges": engine.check_exchanges,
        "engine.rank_pids": lambda: engine.rank_pids,
        "engine.dead_processes": engine.dead_processes,
        "next": lambda: next(session),
        "list": lambda: list(session),
        "session.switch_prompt": lambda: session.switch_prompt(prompt(1)),
        "session.snapshot": lambda: session.snapshot(folder / "new"),
    }
    decoder = engine.decoder
    if decoder is not None:
        made |= {
            "decoder.pid": lambda: decoder.pid,
            "decoder.decode": lambda: decoder.decode(session.number, torch.zeros(3, 16, 4, 6)),
            "decoder.encode": lambda: decoder.encode(frames),
        }
    return made


def outcomes(calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    """What each call raises."""
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def expect_fork_errors(found: dict[str, str]) -> None:
    wanted = f"ForkError: the engine belongs to process {os.getpid()}, and this is process "
    assert {name: text for name, text in found.items() if not text.startswith(wanted)} == {}
    assert all("spawn" in text for text in found.values())


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("when", ["idle", "in a chunk"])
def test_every_call_in_a_child_names_the_owner(
    engine: causalrt.Engine, wanted: list[torch.Tensor], tmp_path: Path, when: str, ahead: bool
) -> None:
    """Also while a thread of the owner holds every lock, which no thread of the child will ever release."""
    session = engine.session(prompt(), seed=2, ahead=ahead)
    chunks, pids = [next(session)], engine.rank_pids
    thread = threading.Thread(target=lambda: chunks.append(next(session)))
    if when == "in a chunk":
        thread.start()
        time.sleep(0.05)
        assert thread.is_alive(), "the chunk should take longer"

    def child() -> list[dict[str, str]]:
        found = outcomes(calls(engine, session, tmp_path))
        return [found, in_child(lambda: outcomes(calls(engine, session, tmp_path)))]

    answers = in_child(child)
    assert isinstance(answers, list), answers
    for found in answers:  # of the child, and of its child
        expect_fork_errors(found)
    if thread.ident is not None:
        thread.join()
    assert equal(chunks + list(session), wanted)
    assert engine.rank_pids == pids


def test_what_ends_something_does_nothing_in_a_child(engine: causalrt.Engine, wanted: list[torch.Tensor]) -> None:
    """So the error that ends a `with` block is the one that is seen; and garbage collection ends nothing."""
    session = engine.session(prompt(), seed=2)
    chunks = [next(session)]

    def child() -> str:
        session.cancel()
        session.close()
        engine.close()
        if engine.decoder is not None:
            engine.decoder.close()
            engine.decoder.end()
            engine.decoder.kill()
        try:
            with engine, session:
                raise ZeroDivisionError
        except ZeroDivisionError:
            return "ZeroDivisionError"

    thread = threading.Thread(target=lambda: chunks.append(next(session)))
    thread.start()
    time.sleep(0.05)
    assert in_child(child) == "ZeroDivisionError"
    thread.join()
    assert equal(chunks + list(session), wanted)


def use_in_worker(connection: Any, engine: causalrt.Engine) -> None:
    try:
        engine.session(prompt())
    except CausalRTError as error:
        connection.send(error)


def test_multiprocessing(engine: causalrt.Engine, wanted: list[torch.Tensor]) -> None:
    """Its exceptions travel by pickle."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=use_in_worker, args=(theirs, engine))
    process.start()
    assert ours.poll(CHILD_S)
    error = ours.recv()
    process.join()
    assert process.exitcode == 0
    assert isinstance(error, ForkError)
    assert f"process {os.getpid()}" in str(error)
    assert equal(list(engine.session(prompt(), seed=2)), wanted)


class Prompts(torch.utils.data.Dataset[torch.Tensor]):
    """Uses an engine where it should not: in the loader's workers."""

    def __init__(self, engine: causalrt.Engine) -> None:
        self.engine = engine

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return next(self.engine.session(prompt(), seed=index)).latents


def test_data_loader(engine: causalrt.Engine, wanted: list[torch.Tensor]) -> None:
    loader = torch.utils.data.DataLoader(Prompts(engine), num_workers=2, multiprocessing_context="fork")
    with pytest.raises(ForkError, match=f"the engine belongs to process {os.getpid()}"):
        list(loader)
    assert equal(list(engine.session(prompt(), seed=2)), wanted)


def test_a_child_loads_an_engine_of_its_own(engine: causalrt.Engine, wanted: list[torch.Tensor]) -> None:
    """Both at a time, and each session is the first of its engine: no video gets into the other's hands."""

    def child() -> list[bool]:
        with causalrt.load(engine.bundle.path, device="cpu") as own:
            return [equal(list(own.session(prompt(), seed=2)), wanted)]

    session = engine.session(prompt(), seed=2)
    chunks: list[causalrt.Chunk] = []
    thread = threading.Thread(target=lambda: chunks.extend(session))
    thread.start()
    assert in_child(child) == [True]
    thread.join()
    assert equal(chunks, wanted)


@pytest.mark.parametrize("when", ["loaded", "loading"])
def test_closing_beside_a_living_child(
    engine: causalrt.Engine, sleeping_child: Callable[[], int], caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """The ranks end when they are asked to: nobody has to kill them."""
    stop = threading.Event()

    def fork_all_the_time() -> None:
        while not stop.wait(0.02):
            sleeping_child()

    thread = threading.Thread(target=fork_all_the_time)
    if when == "loading":
        thread.start()
    closing = causalrt.load(engine.bundle.path, device="cpu")
    session = closing.session(prompt())
    stop.set()
    if when == "loading":
        thread.join()
    sleeping_child()
    next(session)
    pools = [closing.workers.ranks, *([closing.decoder._pool] if closing.decoder else [])]
    closing.close()
    assert [pool._process.returncode for pool in pools] == [0] * len(pools)
    assert "killing them" not in caplog.text


def test_a_rank_that_dies_is_noticed_beside_children_forked_while_loading(
    engine: causalrt.Engine, sleeping_child: Callable[[], int]
) -> None:
    """None of them keeps the rank's end of the channel open."""
    stop = threading.Event()

    def fork_all_the_time() -> None:
        while not stop.is_set():
            sleeping_child()

    thread = threading.Thread(target=fork_all_the_time)
    thread.start()
    loaded = threading.Thread(target=lambda: engines.append(causalrt.load(engine.bundle.path, device="cpu")))
    engines: list[causalrt.Engine] = []
    loaded.start()
    time.sleep(0.2)
    stop.set()
    thread.join()
    loaded.join()
    with engines[0] as dying:
        session = dying.session(prompt())
        os.kill(dying.rank_pids[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 has died"):
            next(session)


SCRIPT = """
import gc, os, sys
import causalrt
from support.small_bundles import prompt

engine = causalrt.load(sys.argv[1], device="cpu")
session = engine.session(prompt(), seed=2)
next(session)
pid = os.fork()
if pid == 0:
    del session, engine
    gc.collect()
    sys.exit(7)  # the interpreter's own end: finalizers, atexit
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
pid = os.fork()
if pid == 0:
    sys.exit(8)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 8
print(len(list(session)))
"""


def test_the_end_of_a_child_ends_nothing(engine: causalrt.Engine) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(engine.bundle.path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
    assert "Error" not in done.stderr
