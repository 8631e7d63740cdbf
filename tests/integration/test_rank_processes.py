"""The rank processes and their surroundings: which of them live, and what becomes of the temporary folder."""

import contextlib
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from support.small_bundles import bundle_factory, prompt

import causalrt
from causalrt.errors import RankError
from causalrt.model.codecs.block_dct import write_block_dct

STARTS_PROCESSES = True

ODD_NAMES = ["job#12", "run?id=3", "a%41b", "with space", "a:b", "ünïcode-日本", "x" * 200]
STARTER = "the process that started the ranks"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return bundle_factory(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def bundle_with_decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with-decoder")
    write_block_dct(folder / "codec.safetensors", mean=[0.0] * 16, std=[3.0] * 16)
    return bundle_factory(folder, vae=folder / "codec.safetensors")(2)


@pytest.fixture
def set_temporary_folder(monkeypatch):
    def set_folder(folder):
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(tempfile, "tempdir", None)
        return folder

    return set_folder


def environment(pid):
    entries = Path(f"/proc/{pid}/environ").read_text().rstrip("\0").split("\0")
    return dict(entry.split("=", 1) for entry in entries)


def test_what_the_processes_find_in_their_environment(bundle_with_decoder):
    """NCCL's communicators are complete when an engine is given one; under MPS, rank 0 goes before the decoder."""
    with causalrt.load(bundle_with_decoder, device="cpu") as engine:
        ranks, decoder = [environment(pid) for pid in engine.rank_pids], environment(engine.decoder.pid)
    for found in (*ranks, decoder):
        assert found["TORCH_NCCL_USE_COMM_NONBLOCKING"] == "0"
        assert found["GLOO_SOCKET_IFNAME"] == "lo"
    assert decoder["CUDA_MPS_CLIENT_PRIORITY"] == "1"
    assert all("CUDA_MPS_CLIENT_PRIORITY" not in found for found in ranks)


def wait_until(condition, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@contextlib.contextmanager
def no_descriptor_left():
    """This process can open no file, until the block ends."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 256), limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)


def clean(folder):
    """What a cleaner of temporary files does."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def cleaning_all_the_time(folder):
    ended = threading.Event()

    def run():
        while not ended.wait(0.01):
            clean(folder)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def first_chunk(engine):
    with engine.session(prompt(), seed=1) as session:
        return next(session).latents


# Which processes live


def test_dead_processes_are_named_and_slow_ones_are_not(bundle_with_decoder):
    with causalrt.load(bundle_with_decoder, device="cpu") as engine:
        processes = [*engine.rank_pids, engine.decoder.pid]
        assert engine.dead_processes() == []
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        assert engine.dead_processes() == []
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
        first_chunk(engine)
        os.kill(engine.rank_pids[1], signal.SIGKILL)
        assert wait_until(engine.dead_processes)
        assert engine.dead_processes() == ["rank 1"]
        os.kill(engine.decoder.pid, signal.SIGKILL)
        assert wait_until(lambda: "the decoder" in engine.dead_processes())
        assert "rank 0" not in engine.dead_processes()
    ended = ["rank 0", "rank 1", STARTER, "the decoder", "the process that started the decoder"]
    assert engine.dead_processes() == ended
    assert engine.dead_processes() == ended, "asking changes nothing"


def test_the_process_that_started_the_ranks_is_watched_too(bundles):
    with causalrt.load(bundles(1)) as engine:
        os.kill(engine.workers.ranks._process.pid, signal.SIGKILL)
        assert wait_until(lambda: engine.dead_processes() == ["rank 0", STARTER])


def test_liveness_needs_no_descriptor(bundles):
    with causalrt.load(bundles(2)) as engine, no_descriptor_left():
        assert engine.dead_processes() == []
        os.kill(engine.rank_pids[0], signal.SIGKILL)
        assert wait_until(engine.dead_processes)
        assert engine.dead_processes() == ["rank 0"]
    with no_descriptor_left():
        assert engine.dead_processes() == ["rank 0", "rank 1", STARTER]


def test_liveness_while_another_thread_closes(bundles):
    """Freed descriptors get new owners at once: the question must not reach those, and must not raise."""
    engine = causalrt.load(bundles(3))
    answers, failed, ended = [], [], threading.Event()

    def ask():
        try:
            while not ended.is_set():
                answers.append(engine.dead_processes())
        except BaseException as error:
            failed.append(error)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for thread in askers:
        thread.start()
    engine.close()
    ended.set()
    for thread in askers:
        thread.join()
    assert failed == []
    assert answers[0] == []
    assert engine.dead_processes() == ["rank 0", "rank 1", "rank 2", STARTER]


def test_an_engine_that_cannot_get_its_descriptors_leaves_none(bundles):
    bundle = bundles(2)

    def held():
        return len(os.listdir("/proc/self/fd"))

    before = held()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for room in range(1, 9):  # it fails at another place each time
        with no_descriptor_left():
            resource.setrlimit(resource.RLIMIT_NOFILE, (256 + room, limits[1]))
            with pytest.raises(RankError, match=r"cannot start 2 rank process\(es\): .*Too many open files"):
                causalrt.runtime.ranks.RankPool(2, timeout_s=10)
        assert held() == before
    with causalrt.load(bundle) as engine:
        assert engine.dead_processes() == []


# The temporary folder


def test_an_engine_lives_on_when_the_temporary_folder_is_cleaned(bundles, set_temporary_folder, tmp_path):
    folder = set_temporary_folder(tmp_path / "tmp")
    bundle = bundles(2)
    with causalrt.load(bundle) as engine:
        wanted = first_chunk(engine)
    with cleaning_all_the_time(folder), causalrt.load(bundle) as engine:
        assert torch.equal(first_chunk(engine), wanted)
        assert engine.dead_processes() == []
        assert len(engine.rank_pids) == 2
        os.kill(engine.rank_pids[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 has died") as caught:
            first_chunk(engine)
        assert "rank 1 of 2 ready" in caught.value.log_tail


def test_two_engines_in_an_odd_temporary_folder(bundles, set_temporary_folder, tmp_path):
    """Where its name could be cut off, as in a URL, others have a folder, a link and a file."""
    parent = tmp_path / "place"
    parent.mkdir()
    victim = parent / "victim"
    victim.write_text("years of work")
    (parent / "job").symlink_to(victim)
    (parent / "job#12" / "run").mkdir(parents=True)
    folder = set_temporary_folder(parent.joinpath(*ODD_NAMES))

    def surroundings():
        return sorted(path for path in parent.rglob("*") if folder not in path.parents)

    before = surroundings()
    bundle = bundles(2)
    with causalrt.load(bundle) as one, causalrt.load(bundle) as other:
        assert torch.equal(first_chunk(one), first_chunk(other))
        os.killpg(one.workers.ranks._process.pid, signal.SIGKILL)  # nothing that it leaves may hinder the next one
        with causalrt.load(bundle) as third:
            assert torch.equal(first_chunk(third), first_chunk(other))
    assert surroundings() == before
    assert victim.read_text() == "years of work"
    assert not list(folder.glob("causalrt-*"))
