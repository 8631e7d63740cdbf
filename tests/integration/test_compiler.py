"""Compilers and cache folders that do not work: said in a sentence before any rank is started, and by `doctor`."""

import json
import shlex
import shutil
import time

import pytest
import torch
from support.small_bundles import bundle_factory

from causalrt import load
from causalrt.cli import main
from causalrt.engines import inductor
from causalrt.engines.bundle import open_bundle
from causalrt.errors import ExecutorError, RankError
from causalrt.runtime.collectives import LocalCollectives

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU: install g++"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundle_factory(tmp_path_factory.mktemp("bundles"))()


@pytest.fixture
def no_ranks(monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("ranks were started")

    monkeypatch.setattr("causalrt.runtime.workers.RankPool", refuse)


def script(folder, body: str) -> str:
    path = folder / "my-compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def runs(pid: int) -> bool:
    """Whether a process of this number runs, a zombie aside."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until_ended(pid: int) -> None:
    end = time.monotonic() + 30
    while runs(pid):
        assert time.monotonic() < end, f"process {pid} still runs"
        time.sleep(0.01)


def refusal(bundle, capsys) -> str:
    """What `load` and `doctor` say, which is the same."""
    with pytest.raises(ExecutorError) as caught:
        load(bundle, executor="inductor", device="cpu")
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["can"]["run inductor"]
    assert answer == {"ok": False, "detail": str(caught.value)}
    return answer["detail"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('case "$*" in *--version*) exec g++ --version;; esac; echo "ld: error: no libgomp" >&2; exit 1', "no libgomp"),
        ("exit 3", "exit code 3: no message"),
    ],
    ids=["cannot link", "fails without a word"],
)
def test_compiler_that_fails(bundle, no_ranks, tmp_path, monkeypatch, capsys, body, said):
    monkeypatch.setenv("CXX", script(tmp_path, body))
    detail = refusal(bundle, capsys)
    assert said in detail
    assert "set CXX" in detail
    assert len(detail) < 500


def test_compiler_that_is_missing(bundle, no_ranks, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "no /nowhere/g++; install g++" in refusal(bundle, capsys)


def test_executor_says_the_same_as_load(bundle, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(ExecutorError) as by_check:
        inductor.check_can_compile()
    with pytest.raises(ExecutorError) as by_executor:
        inductor.InductorExecutor(open_bundle(bundle), LocalCollectives(), device=torch.device("cpu"))
    assert str(by_executor.value) == str(by_check.value)


@pytest.mark.parametrize(("executor", "plugins"), [("inductor", False), ("inductor", True), ("eager", True)])
def test_gpu_without_a_c_compiler(bundle, no_ranks, tmp_path, monkeypatch, executor, plugins):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ExecutorError, match="Triton needs a C compiler to launch kernels on a GPU"):
        load(bundle, executor=executor, fused_ops=plugins, device="cuda", vae=False)


def test_compiler_that_is_no_program_of_this_machine(bundle, no_ranks, tmp_path, monkeypatch, capsys):
    path = tmp_path / "my-compiler"
    path.write_bytes(b"\x7fELF of another machine")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert "Exec format error" in refusal(bundle, capsys)


@pytest.mark.parametrize("named", ["g++ -O1", "g++ 'unclosed"])
def test_compiler_with_arguments(bundle, no_ranks, monkeypatch, capsys, named):
    monkeypatch.setenv("CXX", named)
    assert "takes a program without arguments" in refusal(bundle, capsys)


def test_compiler_that_hangs_is_ended_with_what_it_has_started(bundle, no_ranks, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    body = f"sleep 600 & echo $! >> {shlex.quote(str(pids))}; echo $$ >> {shlex.quote(str(pids))}; wait"
    monkeypatch.setenv("CXX", script(tmp_path, body))
    monkeypatch.setattr(inductor, "COMPILER_S", 2.0)
    with pytest.raises(ExecutorError, match="no answer within 2 s"):
        load(bundle, executor="inductor", device="cpu")
    for pid in map(int, pids.read_text().split()):
        until_ended(pid)


def test_cache_folder_that_cannot_be_made(bundle, no_ranks, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "set TORCHINDUCTOR_CACHE_DIR" in refusal(bundle, capsys)


def test_compiler_that_works(monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    assert inductor.check_can_compile() == shutil.which("g++")


@pytest.mark.slow
def test_compiler_that_hangs_later_ends_with_the_ranks(bundle, tmp_path, monkeypatch):
    """It works when it is tried, and hangs when the ranks compile."""
    pids = tmp_path / "pids"
    body = f"""case "$*" in *trial.cpp*|*--version*|*-v|*-dump*) exec g++ "$@";; esac
echo $$ >> {shlex.quote(str(pids))}; exec sleep 600"""
    monkeypatch.setenv("CXX", script(tmp_path, body))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("causalrt.runtime.start.WARM_START_S", 20.0)
    with pytest.raises(RankError, match="gave no answer"):
        load(bundle, executor="inductor", device="cpu", timeout_s=20.0)
    started = list(map(int, pids.read_text().split()))
    assert started
    for pid in started:
        until_ended(pid)
