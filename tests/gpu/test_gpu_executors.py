"""Executors on a GPU against the recording, against eager, and against themselves without CUDA graphs.

Everything runs on a stream of its own, as in a rank: on the default one TensorRT would wait for the device.
"""

import pytest
import torch
from support.gpu_rollouts import (
    DEVICE,
    Case,
    largest_difference,
    make_case,
    play,
    ready_to_step,
)
from support.tolerances import WHOLE_MODEL

from causalrt.engines.eager import EagerExecutor
from causalrt.engines.inductor import InductorExecutor
from causalrt.engines.make import make_executor
from causalrt.engines.streams import own_stream
from causalrt.engines.tensorrt import TensorRTExecutor
from causalrt.engines.tensorrt_engine import EngineLoader
from causalrt.engines.tensorrt_flavour import FLAVOURS, device_target
from causalrt.errors import ExecutorError
from causalrt.proof.compare import largest_errors, replay, rms_errors
from causalrt.proof.differences import EAGER_RATIO, TOLERANCE
from causalrt.proof.rollouts import Outputs
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.load import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
    pytest.mark.usefixtures("exact_float32"),
]
FUSED = "A"
"""The recording for TensorRT: its heads have 32 channels, and for the 8 of B there is no fused kernel."""
TWO_KINDS = ("J", "J2")
"""Recordings whose first chunk is one frame, generated and given."""
ENGINE_RATIO = 1.5
"""How much further from a float32 recording than eager, both in bfloat16, an engine may be (root mean square): its kernels
round elsewhere than eager's, which for the graphs themselves makes a ratio of up to `EAGER_RATIO`."""


@pytest.fixture(autouse=True)
def on_own_stream():
    with own_stream(DEVICE):
        yield
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """`cases(precision, executor=..., ...)`: the recording's bundle, built once."""
    made: dict[tuple, Case] = {}

    def get(precision, executor="eager", **options):
        key = precision, executor, *sorted((name, str(value)) for name, value in options.items())
        if key not in made:
            made[key] = make_case(tmp_path_factory.mktemp("gpu"), precision, executor, **options)
        return made[key]

    return get


def check(outputs: Outputs, expected: Outputs, tolerance: float) -> None:
    for name, error in largest_errors(outputs, expected).items():
        assert error.error <= tolerance, f"{name}: {error.error:.2e} at {error.name}"


def check_low(outputs: Outputs, eager: Outputs, expected: Outputs, ratio: float) -> None:
    """Not much further from the recording than eager in the same precision."""
    ours, eagers = rms_errors(outputs, expected), rms_errors(eager, expected)
    for name, error in ours.items():
        assert error <= ratio * eagers[name], f"{name}: {error:.3e}, eager {eagers[name]:.3e}"


def eager_outputs(case: Case) -> Outputs:
    return play(case, EagerExecutor(case.bundle, LocalCollectives(), device=DEVICE))


# float32


@pytest.mark.parametrize("kind", [EagerExecutor, InductorExecutor])
def test_float32_is_the_recording_and_the_cpu(cases, kind):
    case = cases("float32")
    outputs = play(case, kind(case.bundle, LocalCollectives(), device=DEVICE))
    check(outputs, case.recording.outputs(), TOLERANCE)
    on_cpu = play(case, EagerExecutor(case.bundle, LocalCollectives(), device=torch.device("cpu")))
    check(outputs, on_cpu, TOLERANCE)


@pytest.mark.parametrize("name", TWO_KINDS)
@pytest.mark.parametrize("kind", [EagerExecutor, InductorExecutor])
def test_two_kinds_of_step(cases, kind, name):
    case = cases("float32", name=name)
    outputs = play(case, kind(case.bundle, LocalCollectives(), device=DEVICE))
    check(outputs, case.recording.outputs(), TOLERANCE)


@pytest.mark.parametrize("kind", [EagerExecutor, InductorExecutor])
def test_fused_kernels_in_float32(cases, kind):
    pytest.importorskip("triton", reason="the fused kernels need Triton")
    case = cases("float32")
    outputs = play(case, kind(case.bundle, LocalCollectives(), device=DEVICE, fused_ops=True))
    check(outputs, case.recording.outputs(), TOLERANCE)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [EagerExecutor, InductorExecutor])
def test_fused_kernels_in_low_precision(cases, kind, precision):
    pytest.importorskip("triton", reason="the fused kernels need Triton")
    case = cases(precision)
    outputs = play(case, kind(case.bundle, LocalCollectives(), device=DEVICE, fused_ops=True))
    check_low(outputs, eager_outputs(case), case.recording.outputs(), EAGER_RATIO)


@pytest.mark.parametrize("name", ["B", *TWO_KINDS])
def test_onnxruntime_on_cuda(cases, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs ONNX Runtime with CUDA: see `causalrt doctor`")
    case = cases("float32", "onnxruntime", name=name)
    executor = make_executor(
        "onnxruntime", case.bundle, LocalCollectives(), num_threads=1, device=DEVICE, fused_ops=False
    )
    check(play(case, executor), case.recording.outputs(), TOLERANCE)


@pytest.mark.parametrize("name", ["B", "J"])
@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_through_a_rank_process(cases, executor, name):
    case = cases("float32", name=name)
    with load(case.bundle.path, executor=executor, device="cuda") as engine:
        assert engine.device == "cuda"
        outputs = replay(case.recording, engine)
        session = engine.session(case.recording.prompt(0), num_chunks=2)
        times = [chunk.times for chunk in session]
    check(outputs, case.recording.outputs(), TOLERANCE)
    for stages in times:
        assert all(0 < ms < 60_000 for ms in stages.denoise_ms)
        assert stages.exchange_ms is None, "nobody waits for an exchange on a GPU"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, for NCCL")
@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_two_ranks_over_nccl(cases, executor):
    case = cases("float32", world_size=2)
    with load(case.bundle.path, executor=executor, device="cuda") as engine:
        check(replay(case.recording, engine), case.recording.outputs(), TOLERANCE)


# bfloat16


def test_inductor_in_bfloat16_is_as_good_as_eager(cases):
    case = cases("bfloat16")
    outputs = play(case, InductorExecutor(case.bundle, LocalCollectives(), device=DEVICE))
    check_low(outputs, eager_outputs(case), case.recording.outputs(), EAGER_RATIO)


# CUDA graphs, and waiting


def test_cuda_graphs_change_nothing(cases):
    case = cases("float32")
    plain, captured = (
        InductorExecutor(case.bundle, LocalCollectives(), device=DEVICE, cuda_graphs=on) for on in (False, True)
    )
    # A matrix product that is captured may be given another workspace, and so another order of sums.
    check(play(case, captured), play(case, plain), WHOLE_MODEL)
    assert len(plain._graphs._graphs) == 0
    assert len(captured._graphs._graphs) == case.recording.num_chunks, "one for each number of filled rows"


@pytest.mark.parametrize("kind", [EagerExecutor, InductorExecutor])
def test_a_warm_step_does_not_wait_for_the_device(cases, kind):
    step_without_waiting(cases("float32"), kind(cases("float32").bundle, LocalCollectives(), device=DEVICE))


def step_without_waiting(case, executor):
    """torch raises where it would wait; what is drawn for the next step is copied without waiting too."""
    step, next_noise = ready_to_step(case, executor)
    step()
    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            step()
            next_noise()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# TensorRT


def tensorrt_case(cases, flavour, collectives, world_size=1, name=FUSED):
    """The recording's bundle with engines for this GPU; skipped with a reason where they cannot be built here."""
    pytest.importorskip(FLAVOURS[flavour].module, reason=f"needs the Python module {FLAVOURS[flavour].module}")
    target = device_target(DEVICE)
    if FLAVOURS[flavour].targets and target not in FLAVOURS[flavour].targets:
        pytest.skip(f"{flavour} does not build for this GPU ({target})")
    options = {"name": name, "collectives": collectives, "world_size": world_size}
    return cases("bfloat16", flavour, targets=(target,), **options)


@pytest.mark.parametrize("collectives", ["engine", "runtime"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tensorrt_is_as_good_as_eager(cases, flavour, collectives):
    case = tensorrt_case(cases, flavour, collectives)
    executor = TensorRTExecutor(FLAVOURS[flavour], case.bundle, LocalCollectives(), device=DEVICE)
    outputs = play(case, executor)
    check_low(outputs, eager_outputs(case), case.recording.outputs(), ENGINE_RATIO)
    graphs = len(executor._graphs._graphs)
    assert graphs == (1 if collectives == "engine" else case.recording.num_chunks)
    step_without_waiting(case, executor)


@pytest.mark.parametrize("collectives", ["engine", "runtime"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tensorrt_after_a_first_chunk_of_one_frame(cases, flavour, collectives):
    case = tensorrt_case(cases, flavour, collectives, name=TWO_KINDS[0])
    executor = TensorRTExecutor(FLAVOURS[flavour], case.bundle, LocalCollectives(), device=DEVICE)
    check_low(play(case, executor), eager_outputs(case), case.recording.outputs(), ENGINE_RATIO)
    assert len(executor._graphs._graphs) == (2 if collectives == "engine" else case.recording.num_chunks)


@pytest.mark.parametrize("collectives", ["engine", "runtime"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tensorrt_without_cuda_graphs_is_the_same(cases, flavour, collectives):
    case = tensorrt_case(cases, flavour, collectives)
    with_graphs, without = (
        play(case, TensorRTExecutor(FLAVOURS[flavour], case.bundle, LocalCollectives(), device=DEVICE, cuda_graphs=on))
        for on in (True, False)
    )
    assert largest_difference(with_graphs, without) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, for NCCL")
@pytest.mark.parametrize("collectives", ["engine", "runtime"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tensorrt_on_two_ranks(cases, flavour, collectives):
    case, alone = tensorrt_case(cases, flavour, collectives, world_size=2), cases("bfloat16", name=FUSED)
    with load(case.bundle.path, executor=flavour) as engine:
        outputs = replay(case.recording, engine)
    check_low(outputs, eager_outputs(alone), case.recording.outputs(), ENGINE_RATIO)


def test_what_tensorrt_rtx_says_of_an_engine_for_another_gpu(cases, record_property):
    pytest.importorskip("tensorrt_rtx", reason="needs the Python module tensorrt_rtx")
    here = device_target(DEVICE)
    other = "sm120" if here != "sm120" else "sm80"
    case = cases("bfloat16", "tensorrt_rtx", name=FUSED, targets=(other,), collectives="engine")
    flavour = FLAVOURS["tensorrt_rtx"]
    with pytest.raises(ExecutorError, match=f"engines for {other}, and this GPU is {here}; build it again"):
        TensorRTExecutor(flavour, case.bundle, LocalCollectives(), device=DEVICE)
    loader = EngineLoader(flavour, DEVICE)
    with pytest.raises(ExecutorError, match=r"cannot open .*-whole-step\.engine here: ") as caught:
        loader.load(case.bundle.path / f"tensorrt_rtx-{other}-whole-step.engine")
    record_property("message", str(caught.value))
