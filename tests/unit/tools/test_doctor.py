"""What `doctor` finds, and what it says about it, on machines of several kinds."""

import importlib
import io
import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from causalrt.tools import doctor, doctor_page, gpus
from causalrt.tools.gpus import Gpu, Gpus

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020)"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with these GPUs, a driver, a torch with CUDA 13 unless said otherwise, and a quick compiler."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CC", str(compiler))

    def make(found: Gpus, *, driver: str | None = "580.65.06", cuda: str | None = "13.0", nccl: bool = True) -> None:
        monkeypatch.setattr(doctor, "find_gpus", lambda: found)
        monkeypatch.setattr(doctor, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def cards(number: int, name: str = "NVIDIA A100-SXM4-80GB", target: str = "sm80", **changes) -> Gpus:
    facts = {"name": name, "target": target, "total_bytes": 80 * 2**30, "free_bytes": 79 * 2**30}
    return Gpus(counted=number, found=[Gpu(index=index, **facts) for index in range(number)], **changes)


def page(found: dict, width: int = 100) -> str:
    text = io.StringIO()
    doctor_page.print_page(found, Console(file=text, width=width, markup=False), version="1.2.3")
    return text.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


def examined() -> tuple[dict, str]:
    """The findings, and the page about them; both must be complete in JSON and text."""
    found = doctor.examine()
    assert json.loads(json.dumps(found)).keys() == found.keys()
    return found, flat(page(found))


def commands(found: dict) -> list[str]:
    return [step["command"] for step in found["next"]["commands"]]


def test_driver_that_is_too_old(machine):
    machine(Gpus(counted=8, fault=TOO_OLD), driver="535.161.08")
    found, said = examined()
    assert not found["next"]["gpus_usable"]
    assert (
        f"8 GPUs by NVML, and CUDA does not start: {TOO_OLD}; driver 535.161.08, torch's CUDA 13.0 needs driver 580 or newer"
        in said
    )
    assert "Update the driver, or install a build of torch for an older CUDA" in said
    assert "No GPU of this machine can be used yet" in said
    assert commands(found)[:2] == ["causalrt doctor", "causalrt demo"]
    assert not found["can"]["run several ranks on GPUs"]["ok"]


def test_torch_cuda_itself_under_a_driver_that_is_too_old(monkeypatch):
    """The whole way, with torch's functions in the place of a driver: NVML counts eight, and all else raises."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError(f"{TOO_OLD}. Please update your GPU driver.")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("init", "get_device_name", "get_device_properties", "get_device_capability", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(gpus, "try_in_child", lambda counted: gpus.try_gpus())
    found, said = examined()
    assert found["gpus"]["counted"] == 8
    assert f"CUDA does not start: {TOO_OLD};" in said


def test_eight_gpus_of_a_data_centre(machine):
    machine(cards(8))
    found, said = examined()
    assert found["next"]["gpus_usable"]
    assert "This machine has 8 x NVIDIA A100-SXM4-80GB (sm80)." in said
    assert "on up to 8 ranks" in said
    assert "The compiled executor for these GPUs is tensorrt, whose engines are built on this machine" in said
    assert "79.0 of 80.0 GiB free" in said
    assert "peer access between all that work" in said
    assert found["can"]["run several ranks on GPUs"] == {"ok": True, "detail": "8 GPUs, NCCL"}
    first, build = commands(found)
    assert first.startswith("causalrt gpu-day")
    assert "--world-size 8 --executor tensorrt --out" in build
    assert "--target" not in build


def test_card_that_tensorrt_rtx_is_for(machine):
    machine(cards(1, "NVIDIA GeForce RTX 5090", "sm120"))
    found, said = examined()
    assert "The compiled executor for these GPUs is tensorrt_rtx, whose engines are built on any machine" in said
    assert "--world-size 1 --executor tensorrt_rtx --target sm120" in commands(found)[1]


def test_card_that_no_tensorrt_is_for(machine):
    machine(cards(1, "Tesla V100", "sm70"))
    found, said = examined()
    assert "NVIDIA documents neither TensorRT for sm70" in said
    assert "--executor" not in commands(found)[1]


def test_machine_without_a_gpu(machine):
    machine(Gpus(counted=0), driver=None, cuda=None, nccl=False)
    found, said = examined()
    assert found["next"]["gpus_usable"]
    assert "This machine has no NVIDIA GPU. On the CPU it runs eager" in said
    assert "driver none found" in said
    assert "a build without CUDA" in said
    assert commands(found)[0] == "causalrt demo"
    assert not any("gpu-day" in command for command in commands(found))
    assert found["next"]["problems"] == []


def test_gpus_under_a_torch_without_cuda(machine):
    machine(Gpus(counted=0), cuda=None, nccl=False)
    found, said = examined()
    assert not found["next"]["gpus_usable"]
    assert "NVIDIA's driver 580.65.06 is here, and the torch installed is a build without CUDA" in said


def test_gpus_that_are_hidden(machine, monkeypatch):
    machine(Gpus(counted=0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found, said = examined()
    assert "CUDA_VISIBLE_DEVICES='' hides its GPUs; unset it" in said
    assert found["gpus"]["visible_devices"] == ""


def test_gpus_that_may_not_be_opened(machine):
    machine(Gpus(counted=0, fault="Can't initialize NVML"))
    found, said = examined()
    assert not found["next"]["gpus_usable"]
    assert (
        "torch counts no GPU (Can't initialize NVML); see whether nvidia-smi lists one, whether this user may" in said
    )


def test_slices_of_mig(machine):
    slice_of = Gpu(index=0, name="NVIDIA H100 MIG 1g.10gb", target="sm90", total_bytes=2**33, free_bytes=2**33)
    machine(Gpus(counted=8, found=[slice_of]))
    found, said = examined()
    assert not found["next"]["gpus_usable"]
    assert "8 GPUs by NVML, and CUDA shows 1 of them: with MIG it shows one slice" in said
    assert commands(found)[0].startswith("causalrt gpu-day")


def test_one_gpu_of_several_that_does_not_work(machine):
    broken = Gpu(
        index=1, name="NVIDIA A100", target="sm80", total_bytes=2**36, fault="CUDA error: uncorrectable ECC error"
    )
    machine(Gpus(counted=2, found=[*cards(1).found, broken]))
    found, said = examined()
    assert not found["next"]["gpus_usable"]
    assert "GPU 1 (NVIDIA A100) does not work: CUDA error: uncorrectable ECC error" in said
    assert re.search(
        r"It runs eager(, | and )inductor( and onnxruntime)? on one rank\.", said
    )  # by what is installed here


def test_what_slows_or_stops_several_ranks(machine, monkeypatch):
    machine(cards(2, without_peer_access=[(0, 1)]))
    usage = type("Usage", (), {"total": 64 * 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    _, said = examined()
    assert "/dev/shm has 0.1 GiB, too little for NCCL; start the container with `--ipc=host` or `--shm-size=8g`" in said
    assert "GPUs 0 and 1 cannot read each other's memory" in said


def test_several_gpus_without_nccl(machine):
    machine(cards(2), nccl=False)
    found, said = examined()
    assert "one rank only: 2 GPUs, but this torch has no NCCL" in said
    assert "--world-size 1" in commands(found)[1]


def test_no_compiler_on_a_gpu(machine, monkeypatch, tmp_path):
    machine(cards(1))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    found, said = examined()
    assert not found["can"]["run inductor"]["ok"]
    assert not found["can"]["run fused ops on GPUs"]["ok"]
    assert "compilers C: none, C++: none" in said
    assert "Problem: inductor does not run: Triton needs a C compiler to launch kernels on a GPU" in said
    assert re.search(r"It runs eager( and onnxruntime)? on one rank", said)


def test_no_compiler_on_a_cpu(machine, monkeypatch, tmp_path):
    machine(Gpus(counted=0), driver=None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found, said = examined()
    assert "inductor needs a C++ compiler on a CPU" in found["can"]["run inductor"]["detail"]
    assert "Problem: inductor does not run: inductor needs a C++ compiler" in said


def test_gpu_with_a_c_compiler_alone(machine, monkeypatch, tmp_path):
    machine(cards(1))
    gcc = tmp_path / "gcc"
    gcc.write_text("#!/bin/sh\n")
    gcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    found = doctor.examine()
    assert found["can"]["run inductor"]["ok"]
    assert found["can"]["run inductor"]["detail"].startswith("on GPUs alone: inductor needs a C++ compiler")


@pytest.fixture
def imports(monkeypatch):
    """Has an import of a module raise, or give what is said."""
    real = importlib.import_module

    def replace(name: str, given: object) -> None:
        def import_module(module: str, *rest: object) -> object:
            if module != name:
                return real(module, *rest)
            if isinstance(given, Exception):
                raise given
            return given

        monkeypatch.setattr(importlib, "import_module", import_module)

    return replace


@pytest.mark.parametrize(
    "error",
    [ImportError("libcudart.so.13: cannot open shared object file"), AttributeError("no version"), OSError()],
    ids=["library", "attribute", "no words"],
)
def test_onnxruntime_that_does_not_import(machine, imports, error):
    machine(Gpus(counted=0), driver=None)
    imports("onnxruntime", error)
    found, said = examined()
    assert not found["can"]["build and run onnxruntime"]["ok"]
    assert f"Problem: onnxruntime: {type(error).__name__}" in said
    assert "On the CPU it runs eager and inductor" in said


def test_onnxruntime_that_imports_and_answers_nothing(machine, imports):
    class Broken:
        __version__ = "1.31.1"

        def get_available_providers(self) -> list[str]:
            raise RuntimeError("no providers")

    machine(Gpus(counted=0), driver=None)
    imports("onnxruntime", Broken())
    assert doctor.examine()["can"]["build and run onnxruntime"] == {"ok": True, "detail": "1.31.1, on the CPU only"}


@pytest.mark.parametrize(
    ("version", "numpy_version", "warned"),
    [("11.1.0.106", "2.4.0", True), ("11.1.0.106", "2.3.5", False), ("11.2.0", "2.5.2", False), ("10.13", "2.5", True)],
)
def test_tensorrt_whose_plugins_break_under_this_numpy(machine, imports, monkeypatch, version, numpy_version, warned):
    machine(cards(1))
    monkeypatch.setattr(numpy, "__version__", numpy_version)
    imports("tensorrt", type("TensorRT", (), {"__version__": version}))
    found, said = examined()
    answer = found["can"]["build tensorrt engines"]
    assert answer["ok"]
    assert answer["detail"].startswith(version)
    assert ("without plugins: before 11.2" in answer["detail"]) == warned
    assert ("Problem: tensorrt: " in said) == warned


@pytest.mark.parametrize(
    ("providers", "said_so"), [(["CPUExecutionProvider"], True), (["CUDAExecutionProvider"], False)]
)
def test_onnxruntime_that_leaves_gpus_unused(machine, imports, monkeypatch, providers, said_so):
    machine(cards(1))
    library = SimpleNamespace(__version__="1.31.1", cuda_version="13.0", get_available_providers=lambda: providers)
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    imports("onnxruntime", library)
    _, said = examined()
    assert ("the onnxruntime installed here has no CUDA" in said) == said_so
    assert ("pip install 'onnxruntime-gpu" in said) == said_so
    assert ("It runs eager, inductor and onnxruntime" in said) == (not said_so)


def test_tensorrt_of_which_only_the_folder_is_here(machine, imports):
    machine(cards(1))
    imports("tensorrt", object())
    assert "is incomplete" in doctor.examine()["can"]["build tensorrt engines"]["detail"]


def test_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    for extra, names in doctor.EXTRAS.items():
        wanted = [line.split(">=")[0] for line in project["optional-dependencies"][extra]]
        assert sorted(name for name in wanted if not name.startswith("causalrt")) == sorted(names)


def test_extra_that_is_incomplete(machine, monkeypatch):
    machine(Gpus(counted=0), driver=None)
    monkeypatch.setitem(doctor.EXTRAS, "video", ("torch", "no-such-distribution"))
    found, said = examined()
    assert found["extras"]["video"] == ["no-such-distribution"]
    assert "extra video lacks no-such-distribution" in said


@pytest.mark.parametrize("width", [80, 120])
def test_page_fits_its_width_and_has_no_colour(machine, width):
    machine(cards(8, without_peer_access=[(0, 1)]))
    text = page(doctor.examine(), width)
    assert "\x1b" not in text
    wide = [line for line in text.splitlines() if len(line) > width]
    assert wide
    assert all(line.startswith("    causalrt ") for line in wide)  # commands are not broken
