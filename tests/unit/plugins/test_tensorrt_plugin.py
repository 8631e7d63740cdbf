import sys

import pytest
from support import SUPPORT, real_bindings
from support import tensorrt_double as double
from support.interpreter import run_in_interpreter, run_tests

from causalrt.errors import ExecutorError, KernelError
from causalrt.plugins import plugin_specs
from causalrt.plugins.plugin_spec import OutputSpec, PluginSpec
from causalrt.plugins.plugin_specs import QK_NORM_ROPE
from causalrt.plugins.tensorrt_plugin import register_plugins

TARGET = 80


@pytest.fixture
def trt(monkeypatch):
    """TensorRT without a plugin API."""
    trt = double.make_trt()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    yield trt
    sys.modules.pop("tensorrt.plugin", None)
    register_plugins.cache_clear()


@pytest.mark.parametrize("version", ["11.4", pytest.param("11.2", marks=pytest.mark.slow)])
def test_plugins_build_over_the_bindings(version, tmp_path):
    run_tests(SUPPORT / "over_bindings_tensorrt_plugin.py", real_bindings.environment(tmp_path, version))


@pytest.mark.slow
def test_bindings_older_than_11_2_are_refused(tmp_path):
    run_tests(SUPPORT / "over_old_bindings.py", real_bindings.environment(tmp_path, "11.0"))


def test_order_of_parameters_in_the_interpreter():
    run_in_interpreter("interpreted_tensorrt_plugin.py")


# ---- what is refused


def test_no_plugin_api_is_an_executor_error(tmp_path):
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")

    with pytest.raises(ExecutorError, match=r"tensorrt_rtx has no plugin API .*--plugins off"):
        register_plugins(tensorrt_rtx, target=TARGET, cache=tmp_path)


@pytest.mark.parametrize(
    ("version", "numpy", "refused"),
    [
        ("11.0.0.114", "2.4.0", True),
        ("11.1.0.7", "2.5.2", True),
        ("11.1.0.7", "2.3.5", False),
        ("11.2.0.1", "2.5.2", False),
        ("11.10.0.1", "2.10.0", False),
        ("12.0.0.1", "3.0.0", False),
        ("10.9.0.1", "3.0.0rc1", True),
    ],
)
def test_tensorrt_that_fails_under_this_numpy_is_named(trt, tmp_path, monkeypatch, version, numpy, refused):
    double.small_api()
    trt.__version__ = version
    monkeypatch.setattr("numpy.__version__", numpy)
    if not refused:
        register_plugins(trt, target=TARGET, cache=tmp_path)
        return
    with pytest.raises(ExecutorError, match=rf"TensorRT {version} .* NumPy {numpy}.*'tensorrt-cu13>=11\.2,<12'"):
        register_plugins(trt, target=TARGET, cache=tmp_path)


def test_plugin_api_that_runs_python_alone_is_an_executor_error(trt, tmp_path):
    api = double.small_api()
    del api.aot_impl
    with pytest.raises(ExecutorError, match="ahead of time"):
        register_plugins(trt, target=TARGET, cache=tmp_path)


def test_registering_again_does_nothing_and_for_another_target_is_refused(trt, tmp_path):
    double.small_api()
    register_plugins(trt, target=80, cache=tmp_path)
    register_plugins(trt, target=80, cache=tmp_path)
    with pytest.raises(KernelError, match=r"causalrt::qk_norm_rope is registered .* sm_90"):
        register_plugins(trt, target=90, cache=tmp_path)


def test_missing_triton_says_what_to_install(trt, tmp_path, monkeypatch):
    double.small_api()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelError, match="pip install 'triton"):
        register_plugins(trt, target=TARGET, cache=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "two words"}, "'two words' cannot be a name"),
        ({"inputs": ("q", "outputs")}, "'outputs' cannot be a name"),
        ({"inputs": ("q", "q")}, "share a name"),
        ({"inputs": ()}, "needs both"),
        ({"outputs": ()}, "needs both"),
        ({"in_place": ("slots",)}, "in_place"),
        ({"in_place": ("q", "q")}, "in_place"),
        ({"attributes": {"eps": list}}, "'eps' is of type"),
        ({"attributes": {"tactic": int}}, "'tactic' cannot be a name"),
        ({"attributes": {"aot": int}}, "'aot' cannot be a name"),
        ({"tactics": (0, 1)}, "tactics are .*positive"),
    ],
)
def test_specs_that_tensorrt_would_not_take_are_refused(change, message):
    out = OutputSpec(name="out", dtype=plugin_specs._float32, shape=lambda dims, given: (1,))
    sound = {"name": "plugin", "inputs": ("q",), "outputs": (out,), "in_place": (), "attributes": {"eps": float}}
    sound["launch"] = QK_NORM_ROPE.launch
    PluginSpec(**sound)
    with pytest.raises(KernelError, match=message):
        PluginSpec(**sound | change)
