"""Whatever our source uses of TensorRT is in the versions that we support: in NVIDIA's own bindings, without its library."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from support import SUPPORT, real_bindings
from support.tensorrt_uses import Api, names_of_others, uses_in, uses_in_package

from causalrt.engines.tensorrt_flavour import FLAVOURS, Flavour

PACKAGE = Path(__file__).parents[3] / "src" / "causalrt"
# Settings that `tensorrt_rtx` alone has, and the file of its kernels, which exists for a flavour that compiles late.
GUARDS = frozenset(
    field.name
    for field in fields(Flavour)
    if getattr(FLAVOURS["tensorrt_rtx"], field.name) and not getattr(FLAVOURS["tensorrt"], field.name)
) | {"kernels"}


def read_api(module, path, environment):
    script = SUPPORT / "tensorrt_api.py"
    subprocess.run([sys.executable, script, module, path], env=os.environ | environment, check=True, timeout=120)
    return Api(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def rtx(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    return read_api("tensorrt_rtx", tmp_path_factory.mktemp("rtx") / "api.json", {})


@pytest.fixture(
    scope="module", params=["11.4", *(pytest.param(old, marks=pytest.mark.slow) for old in ("11.2", "11.0"))]
)
def tensorrt(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bindings")
    return read_api("tensorrt", folder / "api.json", real_bindings.environment(folder, request.param))


@pytest.fixture(scope="module")
def uses():
    return uses_in_package(PACKAGE, GUARDS)


@pytest.fixture(scope="module")
def others():
    return names_of_others(PACKAGE)


def test_guards_are_the_settings_of_tensorrt_rtx_alone():
    assert {"compiles_late", "targets", "kernels"} == GUARDS


def test_all_that_is_used_is_in_tensorrt(tensorrt, rtx, uses, others):
    # 11.0 is what torch-tensorrt 2.13 wants, whose networks our converters write.
    known = frozenset((tensorrt.names | rtx.names) - others)
    assert tensorrt.faults(uses, distinctive=known, guarded=False) == []


def test_all_that_is_used_is_in_tensorrt_rtx(tensorrt, rtx, uses, others):
    known = frozenset((tensorrt.names | rtx.names) - others)
    found = [use for use in uses if use.receiver != "api"]
    plugin_objects = {use.scope for use in uses if use.receiver == "api"}  # objects of an API that it has not
    found = [use for use in found if use.receiver == "trt" or use.scope not in plugin_objects]
    assert rtx.faults(found, distinctive=known, guarded=True) == []
    for target in FLAVOURS["tensorrt_rtx"].targets:
        assert target.upper() in rtx.classes["ComputeCapability"]["members"]


def test_what_tensorrt_rtx_alone_has_is_used_under_a_guard(tensorrt, rtx, uses):
    alone = {name for name in rtx.names - tensorrt.names if not name.startswith("_")}
    found = [use for use in uses if alone & set(use.names)]
    assert {use.names[-1] for use in found} >= {"set_compute_capability", "get_engine_validity", "cuda_graph_strategy"}
    assert [str(use) for use in found if not use.guarded] == []


def test_uses_are_found(uses):
    chains = {(use.receiver, *use.names) for use in uses}
    assert len({chain for chain in chains if chain[0] == "trt"}) > 40
    assert chains >= {
        ("trt", "Runtime"),
        ("trt", "LayerType", "KV_CACHE_UPDATE"),
        ("trt", "IProgressMonitor", "phase_finish"),
        ("api", "AutoTuneCombination"),
        ("self._context", "execute_async_v3"),
        ("engine", "get_aliased_input_tensor"),
    }


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("trt.LayerType.CASTLE", "trt.LayerType.CASTLE is not in"),
        ("trt.Network", "trt.Network is not in"),
        ("trt.Builder()", "trt.Builder is called with"),
        ("trt.OnnxParser(1, log=2)", "trt.OnnxParser is called with"),
        ("self.trt.CudaGraphStrategy", "trt.CudaGraphStrategy is not in"),
        ("if flavour.compiles_late or other: trt.CudaGraphStrategy", "trt.CudaGraphStrategy is not in"),
        ("other.x, other2.is_stream_capturable(1)", "other2.is_stream_capturable is not in 11"),
        ("context.set_devicememory(1, 2)", "context.set_devicememory is not in .*IExecutionContext"),
        ("context.is_stream_capturable(1)", "context.is_stream_capturable is not in .*IExecutionContext"),
        ("context.execute_async_v3()", "context.execute_async_v3 is called with"),
        ("context.execute_async_v3(stream=1)", "context.execute_async_v3 is called with"),
        ("context.set_input_shape('x', (1,), 2)", "context.set_input_shape is called with"),
        ("class Logger(trt.ILogger):\n      def write(self): ...", "trt.ILogger.write is not in"),
        (
            "return self._engine.get_tensor_nam(0), self._engine.num_io_tensors",
            "get_tensor_nam is not in .*ICudaEngine",
        ),
    ],
)
def test_mistakes_are_found(tensorrt, rtx, others, line, fault):
    text = f"class A:\n  def run(self, trt: Any, context: Any):\n    context.set_tensor_address('x', 1)\n    {line}\n"
    found = tensorrt.faults(
        list(uses_in(text, "a.py", GUARDS)), distinctive=frozenset((tensorrt.names | rtx.names) - others), guarded=False
    )
    assert len(found) == 1
    assert re.search(rf"a.py:[45]: .*{fault}", found[0])


@pytest.mark.parametrize(
    "line",
    [
        "trt.LayerType.CAST, trt.Builder(1), trt.OnnxParser(1, logger=2)",
        "context.execute_async_v3(stream_handle=1)",
        "context.execute_async_v3(*values)",
        "other.get_tensor_nam(0), other.num_io_tensors",
        "if flavour.compiles_late: context.is_stream_capturable(trt.CudaGraphStrategy)",
        "x = trt.CudaGraphStrategy if self.flavour.targets and x else trt.LayerType",
        "if self.kernels is not None: trt.CudaGraphStrategy",
        "if not self.compiles_late: return\n    trt.CudaGraphStrategy",
        "if not self.compiles_late or other: return\n    trt.CudaGraphStrategy",
    ],
)
def test_what_is_right_is_not_a_mistake(tensorrt, rtx, others, line):
    text = f"class A:\n  def run(self, trt: Any, other: B, context: Any):\n    context.set_tensor_address('x', 1)\n    {line}\n"
    known = frozenset((tensorrt.names | rtx.names) - others)
    assert tensorrt.faults(list(uses_in(text, "a.py", GUARDS)), distinctive=known, guarded=False) == []
