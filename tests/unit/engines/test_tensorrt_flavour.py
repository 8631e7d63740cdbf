import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from causalrt.engines.kinds import EXECUTORS
from causalrt.engines.tensorrt_engine import EngineLoader
from causalrt.engines.tensorrt_flavour import FLAVOURS, device_target, recommended_executor
from causalrt.errors import ExecutorError
from causalrt.export.engine_files import default_timing_cache
from causalrt.install_hint import install_extra

RTX, FULL = FLAVOURS["tensorrt_rtx"], FLAVOURS["tensorrt"]
NEEDS_RTX = "what TensorRT-RTX itself says: pip install '.[tensorrt-rtx]'"


@pytest.fixture
def gpus(monkeypatch):
    """`gpus((9, 0))`: GPUs of these compute capabilities are here, as far as torch tells."""

    def pretend(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index or 0]
        )

    return pretend


def test_each_flavour_is_an_executor_of_its_name():
    for name, flavour in FLAVOURS.items():
        assert flavour.name == name
        assert EXECUTORS[name].devices == ("cuda",)
        assert EXECUTORS[name].compiled


# Targets


@pytest.mark.parametrize("target", RTX.targets)
def test_rtx_builds_for_what_it_names_wherever_it_is(gpus, target):
    gpus()
    assert RTX.check_target(target) == target


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (None, "no --target was given; A100 and A800 are sm80, RTX 4090 and L40 sm89, RTX 5090 sm120$"),
        ("sm90", r"sm90 is not among them; .* sm120 \(for H100 and H200, take executor tensorrt\)$"),
        ("80", "80 is not among them"),
        ("SM80", "SM80 is not among them"),
    ],
)
def test_rtx_refuses_other_targets_and_lists_its_own(target, said):
    with pytest.raises(ExecutorError, match=said) as caught:
        RTX.check_target(target)
    assert "tensorrt_rtx builds for sm75, sm80, sm86, sm89, sm120, sm121, and " in str(caught.value)


def test_tensorrt_builds_for_the_gpu_at_hand(gpus):
    gpus((9, 0), (8, 0))
    assert FULL.check_target(None) == FULL.check_target("sm90") == "sm90"
    with pytest.raises(ExecutorError, match="tensorrt builds for the GPU of this machine, which is sm90, not for sm80"):
        FULL.check_target("sm80")


@pytest.mark.parametrize("target", [None, "sm80"])
def test_tensorrt_builds_nothing_without_a_gpu(gpus, target):
    gpus()
    with pytest.raises(ExecutorError, match=r"torch sees none here; copy the bundle to a machine that has one"):
        FULL.check_target(target)


@pytest.mark.parametrize(
    ("gpu", "target", "executor"),
    [
        ("RTX 4090", "sm89", "tensorrt_rtx"),
        ("RTX 5090", "sm120", "tensorrt_rtx"),
        ("A100 and A800", "sm80", "tensorrt"),
        ("H100 and H200", "sm90", "tensorrt"),
        ("B200", "sm100", "tensorrt"),
        ("V100", "sm70", "inductor"),
    ],
)
def test_executor_to_build_for(gpu, target, executor):
    assert recommended_executor(target) == executor, gpu


def test_unlisted_gpus_are_told():
    assert [target for target in RTX.targets if RTX.unlisted(target)] == ["sm80"]
    assert "the documented way is `--executor tensorrt`" in RTX.unlisted("sm80")
    assert FULL.unlisted("sm90") is None


@pytest.mark.parametrize("here", [(), ((9, 0),)])
def test_targets_on_another_machine_do_not_depend_on_this_one(gpus, here):
    gpus(*here)
    assert FULL.check_later_target("sm80") == RTX.check_later_target("sm80") == "sm80"
    with pytest.raises(ExecutorError, match=r"tensorrt builds for sm80, .*, and sm79 is not among them"):
        FULL.check_later_target("sm79")
    with pytest.raises(ExecutorError, match="sm90 is not among them"):
        RTX.check_later_target("sm90")


def test_target_of_a_device(gpus):
    gpus((8, 0), (12, 0))
    assert [device_target(torch.device("cuda", index)) for index in range(2)] == ["sm80", "sm120"]


def test_timing_is_kept_where_something_is_measured(monkeypatch, tmp_path):
    assert default_timing_cache(RTX, "sm80") is None
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    sys.modules["tensorrt"].__version__ = "11.0.1"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):  # of one architecture; each refuses the other's times
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found.append(default_timing_cache(FULL, "sm90"))
    folder = tmp_path / "causalrt" / "timing"
    assert found == [
        folder / "tensorrt-11.0.1-NVIDIA-H100-80GB-HBM3-sm90.cache",
        folder / "tensorrt-11.0.1-NVIDIA-H200-sm90.cache",
    ]


# Loading


@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=lambda flavour: flavour.name)
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ImportError('libnvinfer.so.11: cannot open shared object file')", r"ImportError: libnvinfer\.so\.11"),
        ("import ctypes; ctypes.CDLL('libnonesuch.so')", "OSError: libnonesuch"),
        ("raise RuntimeError('driver')", "RuntimeError: driver"),
    ],
)
def test_module_that_does_not_import(flavour, body, said, monkeypatch, tmp_path):
    (tmp_path / f"{flavour.module}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, flavour.module, raising=False)
    with pytest.raises(ExecutorError, match=said) as caught:
        flavour.load()
    assert f"{flavour.name} needs the Python module {flavour.module}, which does not import here" in str(caught.value)
    assert f"`{install_extra(flavour.extra)}`" in str(caught.value)


# What is asked of TensorRT


class Settings:
    """An object that keeps every attribute that is set, and every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


TRT = SimpleNamespace(
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user's"),
    CudaGraphStrategy=SimpleNamespace(DISABLED="none"),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
    ComputeCapability=SimpleNamespace(SM80=80, SM120=120),
    BuilderFlag=SimpleNamespace(REQUIRE_USER_ALLOCATION="no allocation while it runs"),
)


@pytest.mark.parametrize(("flavour", "late"), [(RTX, True), (FULL, False)], ids=["tensorrt_rtx", "tensorrt"])
def test_context_has_the_callers_scratch_and_its_kernels_at_once(flavour, late):
    settings = Settings()
    engine = SimpleNamespace(
        create_runtime_config=lambda: settings, create_execution_context=lambda given: ("context", given)
    )
    assert flavour.make_runtime_config(TRT, engine) is settings
    assert settings.calls == [("set_execution_context_allocation_strategy", "user's")]
    kept = {name: value for name, value in vars(settings).items() if name != "calls"}
    wanted = {"cuda_graph_strategy": "none", "dynamic_shapes_kernel_specialization_strategy": "eager"}
    assert kept == (wanted if late else {})


def test_target_is_selected_and_engines_can_be_captured():
    """The data-centre flavour builds for the GPU at hand, and its engines never allocate while they run."""
    settings = Settings()
    RTX.configure_build(TRT, settings, "sm120")
    assert vars(settings).pop("num_compute_capabilities") == 1
    assert settings.calls == [("set_compute_capability", 120, 0), ("set_flag", "no allocation while it runs")]
    untouched = Settings()
    FULL.configure_build(TRT, untouched, "sm90")
    assert vars(untouched) == {"calls": []}


def test_names_are_those_of_the_real_module():
    trt = pytest.importorskip("tensorrt_rtx", reason=NEEDS_RTX)
    for target in RTX.targets:
        assert hasattr(trt.ComputeCapability, target.upper())
    assert not hasattr(trt.ComputeCapability, "SM90"), "RTX builds for H100 now: let it"
    for holder, names in vars(TRT).items():
        for name in vars(names):
            assert hasattr(getattr(trt, holder), name)
    assert trt.ILogger.ERROR <= trt.ILogger.WARNING


def test_validity_of_an_engine_is_told_by_name():
    kinds = {"VERSION_MISMATCH": SimpleNamespace(value=1), "UNSUPPORTED_CC": SimpleNamespace(value=2)}
    trt = SimpleNamespace(EngineInvalidityDiagnostics=SimpleNamespace(__members__=kinds))

    def validity(name, found):
        answer = SimpleNamespace(name=name), found
        return RTX.engine_validity(trt, SimpleNamespace(get_engine_validity=lambda data: answer), b"")

    assert validity("VALID", 0) == ("VALID", "no diagnosis")
    assert validity("SUBOPTIMAL", 2) == ("SUBOPTIMAL", "UNSUPPORTED_CC")
    assert validity("INVALID", 3) == ("INVALID", "VERSION_MISMATCH, UNSUPPORTED_CC")
    assert validity("INVALID", 64) == ("INVALID", "no diagnosis")
    assert FULL.engine_validity(trt, None, b"") == ("VALID", ""), "it cannot be asked"


def test_engine_that_is_none(monkeypatch, tmp_path, gpus):
    """The real runtime, asked for its opinion of a file that is no engine."""
    trt = pytest.importorskip("tensorrt_rtx", reason=NEEDS_RTX)
    gpus((8, 0))
    file = tmp_path / "step.engine"
    file.write_bytes(b"\0" * 1000)
    loader = EngineLoader(RTX, torch.device("cpu"))
    with pytest.raises(ExecutorError) as caught:
        loader.load(file)
    for words in (
        f"tensorrt_rtx {trt.__version__} cannot open step.engine here: invalid engine: MALFORMED_ENGINE",
        "build the bundle again with this version, for this GPU (sm80)",
    ):
        assert words in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no driver")
def test_tensorrts_own_words_reach_the_caller(tmp_path, gpus):
    """Without a driver the real runtime finds no engine valid, and only its log says why."""
    trt = pytest.importorskip("tensorrt_rtx", reason=NEEDS_RTX)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.mark_output(
        network.add_unary(network.add_input("x", trt.float32, (4,)), trt.UnaryOperation.NEG).get_output(0)
    )
    config = builder.create_builder_config()
    RTX.configure_build(trt, config, "sm80")
    file = tmp_path / "step.engine"
    file.write_bytes(memoryview(builder.build_serialized_network(network, config)))
    gpus((8, 0))
    loader = EngineLoader(RTX, torch.device("cpu"))
    with pytest.raises(ExecutorError, match=r"invalid engine: no diagnosis; .*Ensure that the GPU driver is installed"):
        loader.load(file)
