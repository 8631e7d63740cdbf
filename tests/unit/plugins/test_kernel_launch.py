import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from causalrt.errors import KernelError
from causalrt.plugins.kernel_launch import KernelLaunch


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
def test_launch_is_on_the_device_of_its_tensors(kernel, index):
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
