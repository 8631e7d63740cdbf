import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from causalrt.errors import ExecutorError, KernelError
from causalrt.plugins import kernel_launch
from causalrt.plugins.kernel_launch import KernelLaunch, c_compiler


class RecordingKernel:
    """In the place of a `triton.jit` function: keeps the launches, and the device that was current then."""

    __name__ = "kernel"
    arg_names = ("x", "y", "SIZE")

    def __init__(self):
        self.current, self.launches = torch.device("cuda", 0), []

    def __getitem__(self, grid):
        return lambda **named: self.launches.append(SimpleNamespace(grid=grid, named=named, device=self.current))


@pytest.fixture
def kernel(monkeypatch):
    kernel = RecordingKernel()

    @contextlib.contextmanager
    def current(device):
        before, kernel.current = kernel.current, device
        yield
        kernel.current = before

    monkeypatch.setattr(torch.cuda, "device", current)
    return kernel


def launch_of(kernel):
    signature = {"x": "*fp32", "y": "*fp32"}
    return KernelLaunch(
        kernel=kernel, signature=signature, constexprs={"SIZE": 3}, grid=(5, 1, 1), num_warps=4, num_stages=2
    )


def on(*devices):
    with FakeTensorMode():
        return [torch.empty(3, device=device) for device in devices]


@pytest.mark.parametrize("index", [0, 1, 7])
def test_launch_is_on_the_device_of_its_tensors(kernel, index, programs):
    programs("gcc")
    x, y = on(f"cuda:{index}", f"cuda:{index}")
    launch_of(kernel).run(x, y)
    (launched,) = kernel.launches
    assert launched.device == torch.device("cuda", index)
    assert launched.grid == (5, 1, 1)
    assert launched.named == {"x": x, "y": y, "SIZE": 3, "num_warps": 4, "num_stages": 2}
    assert kernel.current == torch.device("cuda", 0)


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cuda:0", "cpu"), ("cpu", "cpu")], ids=str)
def test_tensors_elsewhere_are_refused(kernel, devices):
    with pytest.raises(KernelError, match=f"on {', '.join(sorted(set(devices)))}, and runs on one CUDA"):
        launch_of(kernel).run(*on(*devices))
    assert kernel.launches == []


# ---- the compiler of Triton's launchers


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """A machine with no programs but those that are made, which has not launched anything yet."""

    def make(*names):
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        return tmp_path

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    kernel_launch.launches_checked.cache_clear()
    yield make
    kernel_launch.launches_checked.cache_clear()


@pytest.mark.parametrize(("names", "found"), [((), None), (("clang",), "clang"), (("clang", "gcc"), "gcc")], ids=str)
def test_compiler_that_triton_would_use(programs, names, found):
    folder = programs(*names)
    assert c_compiler() == (None if found is None else str(folder / found))


@pytest.mark.parametrize("named", ["/nowhere/gcc", "gcc -O1", ""])
def test_compiler_that_cc_names_and_is_missing(programs, monkeypatch, named):
    programs("gcc")
    monkeypatch.setenv("CC", named)
    assert c_compiler() is None
    with pytest.raises(ExecutorError, match=f"CC is '{named}', which is no program here; install gcc"):
        kernel_launch.require_triton_launches()


def test_launch_without_a_compiler_is_refused_until_there_is_one(programs, kernel):
    operands = on("cuda:0", "cuda:0")
    for _ in range(2):
        with pytest.raises(
            ExecutorError, match=r"Triton needs a C compiler .* neither gcc nor clang is here; install gcc"
        ):
            launch_of(kernel).run(*operands)
    assert kernel.launches == []
    programs("gcc")
    launch_of(kernel).run(*operands)
    assert len(kernel.launches) == 1


def test_interpreter_needs_no_compiler(programs, monkeypatch):
    kernel = RecordingKernel()
    monkeypatch.setattr(kernel_launch, "is_interpreted", lambda kernel: True)
    launch_of(kernel).run(*on("cpu", "cpu"))
    assert len(kernel.launches) == 1
