"""The trial of GPUs: what a child process reports, and what is said when it cannot report."""

import json
import sys
import warnings
from dataclasses import asdict

import pytest
import torch

from causalrt.tools import gpus
from causalrt.tools.gpus import Gpu, Gpus, driver_version, find_gpus, first_sentence, mps_state, needed_driver

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading and "
    "installing a new version"
)


@pytest.fixture
def child(monkeypatch):
    """Has this Python code run as the child that tries the GPUs, of which torch counts eight."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    def run(code: str) -> Gpus:
        monkeypatch.setattr(gpus, "python_command", lambda module: [sys.executable, "-c", code])
        return find_gpus()

    return run


def test_what_the_child_finds_is_read_back(child):
    found = Gpus(
        counted=8,
        found=[
            Gpu(index=0, name="NVIDIA H200", target="sm90", total_bytes=2**37, free_bytes=2**36),
            Gpu(index=1, name="NVIDIA H200", target="sm90", total_bytes=2**37, fault="CUDA error: out of memory"),
        ],
        without_peer_access=[[0, 1]],
    )
    read = child(f"print('a library greets'); print({json.dumps(asdict(found))!r})")
    assert read == found
    assert [gpu.index for gpu in read.working] == [0]


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import os; os.abort()", "ended with code -6: no message"),
        ("import sys; sys.exit('cannot open libcuda')", "ended with code 1: cannot open libcuda"),
        ("print('{}')", "ended with code 0"),
    ],
    ids=["crash", "exit", "another answer"],
)
def test_child_that_ends_without_a_report(child, code, fault):
    found = child(code)
    assert (found.counted, found.working) == (8, [])
    assert fault in found.fault


def test_child_that_hangs_is_ended(child, monkeypatch):
    monkeypatch.setattr(gpus, "TRIAL_S", 0.5)
    assert "no answer within 0.5 s" in child("import time; time.sleep(60)").fault


def test_machine_without_gpus_starts_no_child(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(gpus, "try_in_child", lambda counted: pytest.fail("a child was started"))
    assert find_gpus() == Gpus(counted=0)


def test_why_torch_counts_none_is_kept(monkeypatch):
    def count() -> int:
        warnings.warn("Can't initialize NVML", stacklevel=1)
        return 0

    monkeypatch.setattr(torch.cuda, "device_count", count)
    assert find_gpus() == Gpus(counted=0, fault="Can't initialize NVML")


def test_count_that_raises_is_a_finding(monkeypatch):
    def count() -> int:
        raise OSError("libnvidia-ml.so.1: invalid ELF header")

    monkeypatch.setattr(torch.cuda, "device_count", count)
    assert find_gpus() == Gpus(counted=0, fault="libnvidia-ml.so.1: invalid ELF header")


# ---- in the child


class Cuda:
    """In the place of torch.cuda: two GPUs, of which one may be broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "device_count",
            "init",
            "get_device_name",
            "get_device_capability",
            "get_device_properties",
            "mem_get_info",
            "can_device_access_peer",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(gpus, "add_ones", self.add_ones)
        self.broken: int | None = None

    def device_count(self) -> int:
        return 2

    def init(self) -> None:
        return None

    def get_device_name(self, index: int) -> str:
        return f"card {index}"

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return 12, 0

    def get_device_properties(self, index: int) -> object:
        return type("Properties", (), {"total_memory": 2**35})

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 2**34, 2**35

    def can_device_access_peer(self, first: int, second: int) -> bool:
        return False

    def add_ones(self, device: torch.device) -> int:
        if device.index == self.broken:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")
        return 2


def test_gpus_that_work(monkeypatch):
    Cuda(monkeypatch)
    first, second = (
        Gpu(index=i, name=f"card {i}", target="sm120", total_bytes=2**35, free_bytes=2**34) for i in (0, 1)
    )
    assert gpus.try_gpus() == Gpus(counted=2, found=[first, second], without_peer_access=[(0, 1)])


def test_one_broken_gpu_leaves_the_other(monkeypatch):
    Cuda(monkeypatch).broken = 0
    found = gpus.try_gpus()
    assert [gpu.index for gpu in found.working] == [1]
    assert found.found[0].fault == "CUDA error: no kernel image is available for execution on the device"
    assert found.found[0].name == "card 0"
    assert found.without_peer_access == []


def test_driver_that_is_too_old(monkeypatch):
    cuda = Cuda(monkeypatch)

    def refuse() -> None:
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert cuda.broken is None
    assert gpus.try_gpus() == Gpus(counted=8, fault="The NVIDIA driver on your system is too old (found version 12020)")


# ---- small facts


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 24 22:39:51 UTC 2024\nGCC 12.2",
            "535.161.08",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@x)\n", "580.65.06"),
    ],
    ids=["proprietary", "open"],
)
def test_driver_version_by_its_file(monkeypatch, tmp_path, text, version):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "version")
    assert driver_version() == version


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo 535.161.08; echo 535.161.08", "535.161.08"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
        ("echo '[N/A]'", None),
    ],
    ids=["answers", "fails", "does not know"],
)
def test_driver_version_by_nvidia_smi(monkeypatch, tmp_path, script, version):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "missing")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert driver_version() == version


def test_machine_without_a_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "missing")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None


@pytest.mark.parametrize(
    ("cuda", "driver"), [("13.0", 580), ("12.6", 525), ("11.8", 450), ("99.1", None), (None, None)]
)
def test_driver_that_cuda_needs(cuda, driver):
    assert needed_driver(cuda) == driver


def test_mps_is_seen_by_its_daemon_or_its_pipes(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "PROCESSES", tmp_path / "proc")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "pipes"))
    assert mps_state() == "off"
    (tmp_path / "pipes").mkdir()
    (tmp_path / "pipes/control").touch()
    assert "no daemon is visible" in mps_state()
    (tmp_path / "proc/42").mkdir(parents=True)
    (tmp_path / "proc/42/comm").write_text("nvidia-cuda-mps\n")
    assert mps_state() == f"on: its daemon runs, pipes in {tmp_path / 'pipes'}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (OLD_DRIVER, "The NVIDIA driver on your system is too old (found version 12020)"),
        ("wrong, e.g. changing it. Then more", "wrong, e.g. changing it"),
        ("one line\nanother", "one line"),
        ("", "RuntimeError"),
    ],
)
def test_first_sentence_of_an_error(text, sentence):
    assert first_sentence(RuntimeError(text)) == sentence
