"""The torch-tensorrt front end without torch_tensorrt, which needs CUDA to import: a stand-in takes the calls.

The stand-in converts our own ops with the converters that it was given, into a real TensorRT-RTX network; all other ops are
constants to it, and nothing is built.
"""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.network_from_program import network_from_program

from causalrt import build, finish_build, override, recipe
from causalrt.cli import main
from causalrt.engines.bundle import open_bundle
from causalrt.engines.step_record import StepGraphs
from causalrt.engines.tensorrt_engine import EngineLoader
from causalrt.engines.tensorrt_flavour import FLAVOURS, Flavour
from causalrt.errors import BuildError, ConfigError, ExecutorError
from causalrt.export.onnx import step_names
from causalrt.export.random_weights import random_weights
from causalrt.export.torch_tensorrt import build_with_torch_tensorrt, check_torch_tensorrt, tensor_names
from causalrt.export.trace import trace_prompt, trace_step, trace_time
from causalrt.install_hint import install_extra
from causalrt.model.wan.conditioning import prompt_names
from causalrt.model.wan.transformer import Wan
from causalrt.tools.inspect import inspect_bundle


def tiny(world_size=1):
    return override(recipe("tiny"), {"build.world_size": str(world_size), "build.precision": "bfloat16"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file({f"model.{name}": weight for name, weight in random_weights(tiny().model, seed=0)}, path)
    return path


class TorchTensorRT:
    """A stand-in for torch_tensorrt: its registry of converters, and the one function that is called."""

    def __init__(self, trt, *, rtx=False):
        self.trt = trt
        self.converters = {}
        self.calls = []
        self.refusal = None
        self.rename = {}
        self.dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=self.convert)
        self.module = ModuleType("torch_tensorrt")
        self.module.__version__ = "0.0.0"
        self.module.ENABLED_FEATURES = SimpleNamespace(tensorrt_rtx=rtx)
        self.module.dynamo = self.dynamo
        self.conversion = ModuleType("torch_tensorrt.dynamo.conversion")
        self.conversion.ConverterPriority = SimpleNamespace(STANDARD="standard", HIGH="high")
        self.conversion.dynamo_tensorrt_converter = self.register

    def install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_tensorrt", self.module)
        monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo", ModuleType("torch_tensorrt.dynamo"))
        monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo.conversion", self.conversion)

    def register(self, op, *, priority):
        def decorate(converter):
            found = self.converters.setdefault(op, [])
            found.insert(0 if priority == "high" else len(found), converter)
            return converter

        return decorate

    def convert(self, program, *, arg_inputs, **settings):
        """As `convert_exported_program_to_serialized_trt_engine`; unknown settings are refused by the assertions below."""
        assert set(settings) == {"device", "offload_module_to_cpu", "timing_cache_path"}
        if self.refusal is not None:
            raise self.refusal
        context = SimpleNamespace()

        def convert(network, op, arguments, name):
            context.net = network
            return self.converters[op][0](context, op, arguments, {}, name)

        network = network_from_program(self.trt, program, convert)
        for index in range(network.num_inputs):
            network.get_input(index).name = self.rename.get(
                network.get_input(index).name, network.get_input(index).name
            )
        self.calls.append(
            {
                **settings,
                "arguments": arg_inputs,
                "inputs": network.num_inputs,
                "cache": self.exchange_cache(settings["timing_cache_path"]),
            }
        )
        return b"an engine"

    def exchange_cache(self, path):
        """What torch_tensorrt does with a timing cache: read it if it is there, write it after each engine."""
        try:
            with open(path, "rb") as file:
                found = file.read()
        except FileNotFoundError:
            found = b""
        with open(path, "wb") as file:
            file.write(found + b"+")
        return found


@pytest.fixture
def torch_tensorrt(monkeypatch):
    """torch_tensorrt, TensorRT and a GPU, as far as a build goes."""
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX, which makes networks without a GPU, is not installed"
    )
    stand_in = TorchTensorRT(trt)
    stand_in.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(Flavour, "builds_here", lambda self: True)
    monkeypatch.setattr(Flavour, "check_target", lambda self, target: target or "sm80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stand-in")
    return stand_in


# ---- what is refused


def test_runtime_collectives_are_refused():
    with pytest.raises(ConfigError, match=r"--collectives runtime"):
        check_torch_tensorrt(("tensorrt",), "runtime")


def test_a_missing_torch_tensorrt_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(ExecutorError, match=re.escape(f"`{install_extra('torch-tensorrt')}` on a machine with a GPU")):
        check_torch_tensorrt(("tensorrt",), "engine")


def test_what_breaks_in_its_import_is_told(monkeypatch, tmp_path):
    (tmp_path / "torch_tensorrt.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExecutorError, match=r"OSError: libcuda\.so\.1"):
        check_torch_tensorrt(("tensorrt",), "engine")


@pytest.mark.parametrize(
    ("rtx", "flavours", "told"),
    [
        (False, ("tensorrt_rtx",), "drives tensorrt, not tensorrt_rtx"),
        (False, ("tensorrt_rtx", "tensorrt"), "drives tensorrt, not tensorrt_rtx"),
        (True, ("tensorrt",), "drives tensorrt_rtx, not tensorrt; build with `--executor tensorrt_rtx`"),
    ],
)
def test_the_other_tensorrt_is_refused(monkeypatch, rtx, flavours, told):
    TorchTensorRT(None, rtx=rtx).install(monkeypatch)
    check_torch_tensorrt(("tensorrt_rtx" if rtx else "tensorrt",), "engine")
    with pytest.raises(ExecutorError, match=told):
        check_torch_tensorrt(flavours, "engine")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--executor", "tensorrt"], install_extra("torch-tensorrt")),
        (["--executor", "tensorrt", "--collectives", "runtime"], "--collectives runtime"),
        (["--executor", "tensorrt_rtx", "--target", "sm80"], install_extra("torch-tensorrt")),
        ([], "--frontend"),
    ],
)
def test_the_command_leaves_nothing_behind(monkeypatch, checkpoint, tmp_path, capsys, flags, told):
    monkeypatch.setattr(Flavour, "builds_here", lambda self: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    base = [
        "build",
        "--recipe",
        "tiny",
        "--dtype",
        "bf16",
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(tmp_path / "bundle"),
    ]
    assert main([*base, "--frontend", "torch-tensorrt", *flags]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_not_here_is_refused(torch_tensorrt, tmp_path):
    with pytest.raises(ExecutorError, match="which is sm80, not for sm89"):
        build_with_torch_tensorrt(
            tiny(), tmp_path, lambda *_: None, flavour=FLAVOURS["tensorrt"], target="sm89", timing_cache=None
        )


# ---- a whole build


def build_tiny(checkpoint, folder, world_size=1):
    cache = folder / "kept" / "timing.cache"
    told = []
    path = build(
        tiny(world_size),
        checkpoint=checkpoint,
        out=folder / "bundle",
        executors=["tensorrt"],
        frontend="torch-tensorrt",
        timing_cache=cache,
        on_progress=lambda *progress: told.append(progress),
    )
    return open_bundle(path), cache, told


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_build(torch_tensorrt, checkpoint, tmp_path, world_size):
    bundle, cache, told = build_tiny(checkpoint, tmp_path, world_size)
    record = bundle.engines["tensorrt"]
    assert (record.frontend, record.collectives) == ("torch-tensorrt", "engine")
    files = record.targets["sm80"]
    engines = [files.prompt, files.time, *files.steps[0]]
    assert engines == [f"tensorrt-sm80-{stem}.engine" for stem in ("prompt", "time", "whole-step")]
    assert all((bundle.path / engine).read_bytes() == b"an engine" for engine in engines)
    assert bundle.steps == (StepGraphs(),)
    assert [entry for entry in told if entry[0] == "engines for sm80"][-1] == ("engines for sm80", 3, 3)

    assert [call["inputs"] for call in torch_tensorrt.calls] == [len(_inputs(files, engine)) for engine in engines]
    assert all(call["device"] == torch.device("cuda", 0) for call in torch_tensorrt.calls)
    assert all(value.device.type == "cpu" for value in torch_tensorrt.calls[0]["arguments"])
    assert [call["cache"] for call in torch_tensorrt.calls] == [b"", b"+", b"++"]
    assert cache.read_bytes() == b"+++"
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]

    networks = json.loads((bundle.path / files.networks).read_text())
    inputs, outputs = step_names(bundle.config, whole_slots=True)
    step = networks[files.steps[0][0]]
    layers, shards = bundle.config.model.num_layers, len(bundle.layout.shards)
    assert [entry["name"] for entry in step["inputs"]] == inputs
    assert [entry["name"] for entry in step["outputs"]] == outputs
    assert len(step["attentions"]) == layers * (1 + shards)
    assert sum(entry["has_lengths"] for entry in step["attentions"]) == layers * shards
    assert not any(entry["decomposable"] for entry in step["attentions"])
    assert [entry["ranks"] for entry in step["collectives"]] == [world_size] * (0 if world_size == 1 else 2 * layers)
    assert step["cache_updates"] == 2 * layers * shards
    assert [entry["name"] for entry in networks[files.prompt]["outputs"]] == prompt_names(
        bundle.config.model.num_layers
    )
    assert networks[files.time]["inputs"] == [{"name": "sinusoid", "shape": [32], "dtype": "BF16"}]
    assert json.dumps(inspect_bundle(bundle.path).as_dict())


def _inputs(files, engine):
    return [theirs for theirs in files.names[engine] if not theirs.startswith("output")]


def test_a_kept_timing_cache_is_read(torch_tensorrt, checkpoint, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "timing.cache").write_bytes(b"earlier")
    _, cache, _ = build_tiny(checkpoint, tmp_path)
    assert torch_tensorrt.calls[0]["cache"] == b"earlier"
    assert cache.read_bytes() == b"earlier+++"


def test_build_in_two_steps(torch_tensorrt, checkpoint, tmp_path):
    """The step is traced where the engines are built: what is prepared is the weights."""
    options = {"checkpoint": checkpoint, "executors": ["tensorrt"], "frontend": "torch-tensorrt"}
    at_once = build(tiny(), out=tmp_path / "at-once", **options)
    later = build(tiny(), out=tmp_path / "later", prepare=True, **options)
    assert open_bundle(later).unfinished == ("tensorrt",)
    finish_build(later)
    assert [path.name for path in sorted(later.iterdir())] == [path.name for path in sorted(at_once.iterdir())]
    assert open_bundle(later).engines == open_bundle(at_once).engines


@pytest.mark.slow
def test_a_second_build_uses_its_own_converters(torch_tensorrt, checkpoint, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        bundle, _, _ = build_tiny(checkpoint, tmp_path / name)
    networks = json.loads((bundle.path / bundle.engines["tensorrt"].targets["sm80"].networks).read_text())
    assert networks["tensorrt-sm80-whole-step.engine"]["attentions"]


def test_a_refused_graph_leaves_nothing_behind(torch_tensorrt, checkpoint, tmp_path):
    torch_tensorrt.refusal = RuntimeError("no converter for aten::gargle")
    with pytest.raises(
        BuildError, match=r"(?s)traced prompt: RuntimeError: no converter for aten::gargle.*--frontend onnx"
    ):
        build_tiny(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unforeseen_tensor_names_are_refused(torch_tensorrt, checkpoint, tmp_path):
    torch_tensorrt.rename = {"kv_rows": "arg7"}
    with pytest.raises(BuildError, match="arg7"):
        build_tiny(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- names


def random_wan(config):
    return Wan(config.model).to(torch.bfloat16).requires_grad_(False).eval()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_tensor_of_a_step_has_a_name(world_size):
    config = tiny(world_size)
    program = trace_step(random_wan(config), config, whole_slots=True)
    inputs, outputs = step_names(config, whole_slots=True)
    names = tensor_names(program, inputs, outputs)
    graph = program.module(check_guards=False).graph
    placeholders = [node.target for node in graph.nodes if node.op == "placeholder"]
    (made,) = (torch.utils._pytree.tree_leaves(node.args) for node in graph.nodes if node.op == "output")
    assert list(names) == [*placeholders, *(f"output{index}" for index in range(len(made)))]
    assert list(names.values()) == [*inputs, *outputs]

    for theirs, ours in names.items():
        kind, *place = theirs.split("_")
        if kind == "kv" and place != ["rows"]:
            layer, shard, value = map(int, place)
            assert ours == f"{'kv'[value]}.{layer}.{shard}"
        elif kind == "cross":
            layer, value = map(int, place[1:])
            assert ours == f"cross_{'kv'[value]}.{layer}"
        elif not theirs.startswith("output"):
            assert ours == theirs
    for node, ours in zip(made[1:], outputs[1:], strict=True):
        update, which = node.args  # (attention's output, k, v), the slots being the arguments 3 and 4
        assert f"{names[update.args[2 + which].target]}.written" == ours


def test_every_tensor_of_the_small_graphs_has_a_name():
    config = tiny()
    wan = random_wan(config)
    names = tensor_names(trace_prompt(wan), ["text"], prompt_names(config.model.num_layers))
    assert names == {
        "text_te": "text",
        **{f"output{i}": name for i, name in enumerate(prompt_names(config.model.num_layers))},
    }
    names = tensor_names(trace_time(wan), ["sinusoid"], ["e", "e0"])
    assert names == {"sinusoid_q": "sinusoid", "output0": "e", "output1": "e0"}


class Engine:
    """An opened engine, as far as its tensors go; every name that it is asked for is one of its own."""

    tensors = {  # noqa: RUF012
        "kv_0_0_0": ("INPUT", (1, 1, 4, 2), "BF16", None),
        "rank": ("INPUT", (1,), "INT64", None),
        "output0": ("OUTPUT", (3, 2), "BF16", None),
        "output1": ("OUTPUT", (1, 1, 4, 2), "BF16", "kv_0_0_0"),
    }
    num_io_tensors, num_optimization_profiles = len(tensors), 1

    def __init__(self):
        self.addresses = {}

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return self.tensors[name][0]

    def get_tensor_shape(self, name):
        return self.tensors[name][1]

    def get_tensor_dtype(self, name):
        return self.tensors[name][2]

    def get_aliased_input_tensor(self, name):
        return self.tensors[name][3]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in self.tensors


def test_an_engine_goes_by_our_names(monkeypatch, tmp_path):
    engine = Engine()
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    kinds = ("FLOAT", "HALF", "BF16", "INT64", "INT32")
    trt = SimpleNamespace(
        __version__="0.0.0",
        ILogger=object,
        Runtime=lambda logger: runtime,
        DataType=SimpleNamespace(**dict(zip(kinds, kinds, strict=True))),
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
    )
    monkeypatch.setattr(Flavour, "load", lambda self: trt)
    monkeypatch.setattr(EngineLoader, "make_context", lambda self, engine: engine)
    (tmp_path / "step.engine").write_bytes(b"an engine")
    names = {"kv_0_0_0": "k.0.0", "rank": "rank", "output0": "flow", "output1": "k.0.0.written"}
    loader = EngineLoader(FLAVOURS["tensorrt"], torch.device("cpu"))
    loaded = loader.load(tmp_path / "step.engine", names)
    assert loaded.names == ["k.0.0", "rank", "flow", "k.0.0.written"]
    assert loaded.empty("flow").shape == (3, 2)
    assert loaded.empty("rank").dtype == torch.int64

    tensors = {name: loaded.empty(name) for name in loaded.names[:3]}
    with pytest.raises(ExecutorError, match=r"k\.0\.0\.written updates k\.0\.0 in place"):
        loaded.bind({**tensors, "k.0.0.written": loaded.empty("k.0.0.written")})
    loaded.bind({**tensors, "k.0.0.written": tensors["k.0.0"]})
    with pytest.raises(ExecutorError, match=r"step\.engine has the tensors kv_0_0_0, .*the bundle names rank"):
        loader.load(tmp_path / "step.engine", {"rank": "rank"})
    assert engine.addresses == {
        "kv_0_0_0": tensors["k.0.0"].data_ptr(),
        "rank": tensors["rank"].data_ptr(),
        "output0": tensors["flow"].data_ptr(),
        "output1": tensors["k.0.0"].data_ptr(),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, with torch_tensorrt and TensorRT")
def test_engines_of_the_true_torch_tensorrt(checkpoint, tmp_path):
    pytest.importorskip("torch_tensorrt")
    bundle, _, _ = build_tiny(checkpoint, tmp_path)
    ((_, files),) = bundle.engines["tensorrt"].targets.items()
    loader = EngineLoader(FLAVOURS["tensorrt"], torch.device("cuda", 0))
    loaded = loader.load(bundle.path / files.steps[0][0], files.names[files.steps[0][0]])
    inputs, outputs = step_names(bundle.config, whole_slots=True)
    assert sorted(loaded.names) == sorted([*inputs, *outputs])
    tensors = {name: loaded.empty(name) for name in [*inputs, "flow"]}
    loaded.bind(
        tensors | {name: tensors[name.removesuffix(".written")] for name in outputs[1:]}
    )  # in place, or refused
