import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from onnx import TensorProto

from causalrt.engines.base import ONNX_TYPES, SessionView, StepBuffers
from causalrt.engines.kinds import EXECUTORS, choose_device, executor_kind, precision_fault, warms_up
from causalrt.engines.make import make_executor
from causalrt.engines.step_record import FlavourEngines, TargetEngines
from causalrt.errors import ExecutorError

BOTH, GPU_ONLY = ("eager", "inductor"), ("tensorrt_rtx", "tensorrt")


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(2, onnxruntime_cuda=False)`: what is installed here, as far as anyone asks."""

    def pretend(count, *, onnxruntime_cuda=True):
        providers = ["CUDAExecutionProvider"] * onnxruntime_cuda + ["CPUExecutionProvider"]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)

    return pretend


def test_unknown_executor_is_refused_with_the_known_ones():
    for call in (
        lambda: executor_kind("cuda"),
        lambda: choose_device("cuda", asked=None, world_size=1),
        lambda: make_executor("cuda", None, None, num_threads=1, device=torch.device("cpu"), fused_ops=False),
    ):
        with pytest.raises(ExecutorError, match=f"no executor 'cuda'; this version has: {', '.join(EXECUTORS)}$"):
            call()


@pytest.mark.parametrize("name", [*BOTH, "onnxruntime", *GPU_ONLY])
def test_gpus_are_taken_where_each_rank_has_one(gpus, name):
    gpus(2)
    for asked in (None, "cuda"):
        assert choose_device(name, asked=asked, world_size=2) == "cuda"


@pytest.mark.parametrize("name", [*BOTH, "onnxruntime"])
def test_a_cpu_will_do_where_there_are_too_few(gpus, name):
    gpus(2)
    assert choose_device(name, asked=None, world_size=3) == "cpu"
    assert choose_device(name, asked="cpu", world_size=1) == "cpu"


@pytest.mark.parametrize("name", EXECUTORS)
def test_every_executor_warms_up_on_a_gpu(name):
    """What it takes has been taken when free memory is counted. On a CPU, only what compiles warms up."""
    assert warms_up(name, "cuda")
    assert warms_up(name, "cpu") == (name not in ("eager", "onnxruntime"))


@pytest.mark.parametrize("name", GPU_ONLY)
def test_tensorrt_does_not_run_on_a_cpu(gpus, name):
    gpus(1)
    with pytest.raises(ExecutorError, match=f"{name} runs on cuda, not on cpu"):
        choose_device(name, asked="cpu", world_size=1)


@pytest.mark.parametrize(
    ("name", "asked"), [*((name, None) for name in GPU_ONLY), *((name, "cuda") for name in EXECUTORS)]
)
def test_too_few_gpus_are_refused(gpus, name, asked):
    gpus(1)
    said = (
        rf"{name} needs a GPU for each of 2 rank\(s\), and torch sees 1 here; .*take an executor that runs on a CPU "
        r"\(eager, inductor, onnxruntime\)"
    )
    with pytest.raises(ExecutorError, match=said):
        choose_device(name, asked=asked, world_size=2)


REINSTALL = r"`pip uninstall -y onnxruntime.* && pip install 'onnxruntime-gpu.*'`$"


@pytest.fixture
def distributions(monkeypatch):
    """`distributions("onnxruntime", ...)`: those that bring the module onnxruntime, as far as anyone asks."""

    def pretend(*names):
        monkeypatch.setattr(metadata, "packages_distributions", lambda: {"onnxruntime": list(names)})

    return pretend


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (["onnxruntime"], r"has no CUDA; `pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu"),
        (
            ["onnxruntime-gpu", "onnxruntime"],
            "has no CUDA; onnxruntime and onnxruntime-gpu overwrite each other's files; ",
        ),
    ],
)
def test_gpus_that_onnxruntime_cannot_use(gpus, distributions, caplog, installed, said):
    gpus(1, onnxruntime_cuda=False)
    distributions(*installed)
    assert choose_device("onnxruntime", asked=None, world_size=1) == "cpu"
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert re.search(rf"^1 GPU\(s\) are left unused, .*{said}.*", warning)
    assert re.search(REINSTALL, warning)
    with pytest.raises(ExecutorError, match=said) as caught:
        choose_device("onnxruntime", asked="cuda", world_size=1)
    assert re.search(REINSTALL, str(caught.value))


def test_two_distributions_that_still_have_cuda(gpus, distributions, caplog):
    gpus(1)
    distributions("onnxruntime", "onnxruntime-gpu")
    assert choose_device("onnxruntime", asked="cuda", world_size=1) == "cuda"
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning.startswith("onnxruntime and onnxruntime-gpu overwrite each other's files; `pip uninstall -y ")


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_said_where_onnxruntime_is_as_it_should_be(gpus, distributions, caplog, count):
    gpus(count)
    distributions("onnxruntime-gpu")
    assert choose_device("onnxruntime", asked=None, world_size=1) == ("cuda" if count else "cpu")
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize(("ours", "device"), [("13.0", "cuda"), ("12.6", "cpu")])
def test_onnxruntime_for_another_cuda_than_torch(gpus, distributions, monkeypatch, ours, device):
    gpus(1)
    distributions("onnxruntime-gpu")
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    monkeypatch.setattr(torch.version, "cuda", ours)
    assert choose_device("onnxruntime", asked=None, world_size=1) == device
    if device == "cpu":
        with pytest.raises(ExecutorError, match="is for CUDA 13, torch for CUDA 12; install a torch for CUDA 13"):
            choose_device("onnxruntime", asked="cuda", world_size=1)


@pytest.mark.parametrize("count", [0, 1])
def test_onnxruntime_that_is_missing(gpus, distributions, monkeypatch, count):
    gpus(count)
    distributions()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExecutorError, match=r"cannot be imported here \(not found\); `pip install 'onnxruntime-gpu"):
        choose_device("onnxruntime", asked=None, world_size=1)


def test_onnxruntime_of_which_a_part_is_left(gpus, distributions, monkeypatch, tmp_path):
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    gpus(0)
    distributions("onnxruntime-gpu")
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        ExecutorError, match=r"only a part of its files is left\); `pip uninstall -y onnxruntime-gpu && pip"
    ):
        choose_device("onnxruntime", asked=None, world_size=1)


@pytest.mark.parametrize("asked", ["gpu", "cuda:0", "CPU", ""])
def test_device_that_is_none(gpus, asked):
    gpus(1)
    with pytest.raises(ExecutorError, match=f"device must be cuda or cpu, got {asked!r}; rank r runs on GPU r"):
        choose_device("eager", asked=asked, world_size=1)


@pytest.mark.parametrize("name", GPU_ONLY)
def test_library_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    files = TargetEngines(version="1", prompt="p", time="t", steps=(("s",),), networks="n", names={})
    record = FlavourEngines(collectives="engine", frontend="onnx", targets={"sm80": files})
    config = SimpleNamespace(build=SimpleNamespace(precision="bfloat16", world_size=1))
    bundle = SimpleNamespace(engines={name: record}, config=config)
    with pytest.raises(ExecutorError, match=rf"{name} needs the Python module {name}, .*`pip install '"):
        make_executor(name, bundle, None, num_threads=1, device=torch.device("cpu"), fused_ops=False)


def test_types_are_numbered_as_onnx_numbers_them():
    assert {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.bfloat16: TensorProto.BFLOAT16,
        torch.int64: TensorProto.INT64,
    } == ONNX_TYPES


def test_ranks_do_not_import_what_only_builds_need():
    """Half a second for every rank, one after the other where they share cores."""
    script = (
        "import sys, causalrt.runtime.worker, causalrt.engines.eager, causalrt.engines.onnxruntime; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint({"onnx", "onnx_ir", "onnxscript", "sympy", "diffusers", "transformers"})


@pytest.mark.parametrize(
    ("name", "precision", "device", "fault"),
    [
        ("eager", "bfloat16", "cpu", None),
        ("onnxruntime", "float32", "cpu", None),
        ("onnxruntime", "float16", "cuda", None),
        ("onnxruntime", "float16", "cpu", "onnxruntime on a CPU runs float32 only, .*float16; .*`--dtype fp32`$"),
        ("tensorrt", "bfloat16", "cuda", None),
        ("tensorrt", "float32", "cuda", "tensorrt runs bfloat16 and float16 only, .*`--dtype bf16` or `--dtype fp16`$"),
    ],
)
def test_precisions_that_an_executor_does_not_run(name, precision, device, fault):
    found = precision_fault(name, precision, device)
    assert found is None if fault is None else re.match(fault, found)


def test_a_session_view_names_its_tensors_as_the_step_graph_does():
    pair = torch.zeros(1), torch.ones(1)
    view = SessionView(buffers_id=0, step=0, prompt={"cross_k.0": pair[0]}, kv=[[pair, pair], [pair, pair]], kv_rows=3)
    assert list(view.slots()) == [f"{kind}.{layer}.{shard}" for layer in (0, 1) for shard in (0, 1) for kind in "kv"]
    assert view.slots()["v.1.0"] is pair[1]
    assert view.tensors() == {**view.slots(), "cross_k.0": pair[0]}


def test_step_buffers_take_over_what_the_step_reads():
    buffers = StepBuffers(x=torch.zeros(2, 3), e=torch.zeros(4), kv_rows=torch.zeros(1, dtype=torch.int64))
    x, addresses = buffers["x"], {name: tensor.data_ptr() for name, tensor in buffers.items()}
    buffers.copy_from(torch.ones(2, 3), {"e": torch.full((4,), 2.0)}, first_frame=5, kv_rows=7)
    assert torch.equal(x, torch.ones(2, 3))
    assert buffers["e"].tolist() == [2.0] * 4
    assert buffers["kv_rows"].tolist() == [7]
    assert {name: tensor.data_ptr() for name, tensor in buffers.items()} == addresses, "no tensor for the first frame"
