"""TensorRT engines built by tensorrt_rtx itself, which needs no GPU for it; and the child process that builds them."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.torch import save_file

from causalrt import build, override, recipe
from causalrt.cli import main
from causalrt.engines.bundle import new_bundle, open_bundle
from causalrt.engines.network_record import DTYPE_BYTES
from causalrt.engines.tensorrt_flavour import FLAVOURS, Flavour
from causalrt.errors import BuildError, ConfigError, ExecutorError
from causalrt.export import engine_files, engine_worker
from causalrt.export.engine_files import build_engines, kv_lengths
from causalrt.export.engine_worker import EngineRequest, build_engine, parse
from causalrt.export.onnx import step_names
from causalrt.export.random_weights import random_weights
from causalrt.install_hint import install_extra
from causalrt.model.wan.conditioning import prompt_names
from causalrt.model.wan.rope import rope_tables
from causalrt.runtime.memory import predict_memory, rank_memory
from causalrt.tools.inspect import inspect_bundle

trt = pytest.importorskip("tensorrt_rtx", reason="engines are built with tensorrt_rtx: pip install '.[tensorrt-rtx]'")

RTX = FLAVOURS["tensorrt_rtx"]
DTYPES = {"bfloat16": "BF16", "float16": "HALF"}
BUILDS = [
    (1, "engine", "bfloat16", "sm80"),
    (2, "engine", "float16", "sm89"),
    (3, "engine", "bfloat16", "sm120"),
    (8, "engine", "float16", "sm80"),
    (1, "runtime", "float16", "sm120"),
    (2, "runtime", "bfloat16", "sm80"),
    (3, "runtime", "float16", "sm80"),
    (8, "runtime", "bfloat16", "sm89"),
]
"""Ranks (3 heads: whole, cut, one each, and cut among more ranks than heads), lowering, precision, target."""


def tiny(world_size=1, precision="bfloat16", **changes):
    return override(recipe("tiny"), {"build.world_size": str(world_size), "build.precision": precision, **changes})


def write_checkpoint(config, path):
    save_file({f"model.{name}": tensor for name, tensor in random_weights(config.model, seed=0)}, path)
    return path


class Built:
    """A bundle with the engines of one target, and the progress that was told."""

    def __init__(self, world_size, collectives, precision, target, folder):
        self.progress = []
        self.config, self.target, self.collectives = tiny(world_size, precision), target, collectives
        self.path = build(
            self.config,
            checkpoint=write_checkpoint(self.config, folder / "checkpoint.safetensors"),
            out=folder / "bundle",
            executors=["tensorrt_rtx"],
            targets=[target],
            collectives=collectives,
            on_progress=lambda *told: self.progress.append(told),
        )
        self.bundle = open_bundle(self.path)
        self.layout = self.bundle.layout
        self.record = self.bundle.engines["tensorrt_rtx"].targets[target]
        self.networks = json.loads((self.path / self.record.networks).read_text())
        self.step = [self.networks[name] for name in self.record.steps[0]]
        self.parts = self.bundle.steps[0].tensorrt

    def all(self, key):
        return [entry for network in self.step for entry in network[key]]

    def again(self, out, on_progress=lambda stage, done, total: None):
        """Build the same engines from the same graphs once more, in a bundle of their own."""
        with new_bundle(out, overwrite=False, needed_bytes=0) as folder:
            for file in self.path.iterdir():
                if file.suffix in (".onnx", ".safetensors"):
                    shutil.copy(file, folder)
            build_engines(
                self.config, folder, self.bundle.steps, on_progress, flavour=RTX, target=self.target, timing_cache=None
            )
        return out


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    made = {}

    def get(*key):
        if key not in made:
            made[key] = Built(*key, tmp_path_factory.mktemp("built"))
        return made[key]

    return get


def _marked(key):
    slow = key not in (BUILDS[0], BUILDS[-1])
    return pytest.param(key, id="-".join(map(str, key)), marks=[pytest.mark.slow] if slow else [])


@pytest.fixture(params=map(_marked, BUILDS))
def built(builds, request):
    return builds(*request.param)


@pytest.fixture
def small(builds):
    return builds(*BUILDS[0])


# Fused ops without plugins


@pytest.mark.slow
@pytest.mark.parametrize("collectives", ["engine", "runtime"])
def test_fused_ops_are_built_as_what_their_functions_say(tmp_path, collectives):
    """Keys that are rotated when they are read: attention is fused, and has its length, all the same."""
    config = tiny(2, **{"video.time_index": "relative"})
    path = build(
        config,
        checkpoint=write_checkpoint(config, tmp_path / "checkpoint.safetensors"),
        out=tmp_path / "bundle",
        executors=["tensorrt_rtx"],
        targets=["sm80"],
        collectives=collectives,
    )
    found = inspect_bundle(path).as_dict()
    (engines,) = found["engines"]
    step, layers = engines["steps"][0], config.model.num_layers
    assert found["plugins"] == "on"
    assert step["engines"] == (1 if collectives == "engine" else 2 * layers + 1)  # slots whole: no cut at cache writes
    assert step["self_attentions"] == step["self_attentions_with_lengths"] == 2 * layers
    assert step["decomposable_attentions"] == 0
    assert step["cache_updates"] == 4 * layers
    assert step["plugins"] == {}
    assert all(table["equal_constants"] for table in step["constants"].values())
    assert {"temporal_cos", "scatter_destinations"} <= set(step["constants"])


@pytest.mark.slow
def test_tables_of_a_window_of_one_chunk_are_found(tmp_path):
    """Nothing depends on time: the tables of the slots are constants themselves."""
    window = {"video.window_frames": "3", "video.sink_frames": "0", "video.time_index": "relative"}
    config = tiny(2, **window)
    checkpoint = write_checkpoint(config, tmp_path / "checkpoint.safetensors")
    path = build(config, checkpoint=checkpoint, out=tmp_path / "bundle", executors=["tensorrt_rtx"], targets=["sm80"])
    (engines,) = inspect_bundle(path).as_dict()["engines"]
    constants = engines["steps"][0]["constants"]
    assert {"slot_cos", "slot_sin"} <= set(constants)
    assert all(table["equal_constants"] for table in constants.values())


# What is in the networks


def test_the_builder_says_what_memory_engines_take(built):
    """In the record, in `inspect`, and in the prediction of memory, in the place of an estimate."""
    memories = [built.networks[name]["memory"] for name in built.record.engine_files]
    assert all(memory["weights_bytes"] > 0 for memory in memories[:2])
    assert all(memory["activation_bytes"] >= memory["scratch_bytes"] for memory in memories)

    (engines,) = inspect_bundle(built.path).as_dict()["engines"]
    told = engines["builder_memory"]
    assert told["activation_bytes"] == max(memory["activation_bytes"] for memory in memories) > 0
    assert told["weights_bytes"] == sum(memory["weights_bytes"] for memory in memories)

    predicted = rank_memory(built.bundle, "tensorrt_rtx", device="cuda").activation_bytes
    assert predicted == engines["bytes_per_rank"]["activation_bytes"]
    assert predicted == told["activation_bytes"] + buffer_bytes(built)


def buffer_bytes(built):
    """What the executor allocates for a step: every tensor but slots, staging and the prompt's keys and values."""
    staged = {name for part in built.parts for name in part.writes}
    tensors = {tensor["name"]: tensor for network in built.step for tensor in network["inputs"] + network["outputs"]}
    kept = [
        tensor for name, tensor in tensors.items() if not name.startswith(("k.", "v.", "cross_")) and name not in staged
    ]
    return sum(DTYPE_BYTES[tensor["dtype"]] * math.prod(tensor["shape"]) for tensor in kept)


def test_a_bundle_without_the_builders_figures(small, tmp_path, capsys, monkeypatch):
    """Such as an earlier version has made: memory is estimated."""
    networks = {name: {k: v for k, v in n.items() if k != "memory"} for name, n in small.networks.items()}
    copy = dataclasses.replace(small.bundle, path=tmp_path)
    record = tmp_path / small.record.networks
    estimate = predict_memory(small.config, "tensorrt_rtx", device="cuda")
    for text in (json.dumps(networks), "{}", "damaged"):
        record.write_text(text)
        assert rank_memory(copy, "tensorrt_rtx", device="cuda") == estimate
    assert rank_memory(small.bundle, "tensorrt_rtx", device="cuda") != estimate
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["inspect", str(small.path)]) == 0
    assert "by its builder" in capsys.readouterr().out


def test_networks_hold_what_the_step_is_made_of(built):
    model, layout = built.config.model, built.layout
    layers, shards, ranks = model.num_layers, len(layout.shards), layout.world_size
    in_engine = built.collectives == "engine"
    attentions = built.all("attentions")
    assert len(attentions) == layers * (shards + 1)
    assert not any(attention["decomposable"] for attention in attentions)

    over_text = [attention for attention in attentions if attention["key"][-2] == model.text_len]
    over_slots = [attention for attention in attentions if attention["key"][-2] != model.text_len]
    assert len(over_text) == layers
    assert [attention["has_lengths"] for attention in over_text] == [False] * layers
    assert [attention["has_lengths"] for attention in over_slots] == [in_engine] * (layers * shards)
    sources = sorted(attention["key_source"] for attention in over_slots)
    names = [f"k.{layer}.{shard}" for layer in range(layers) for shard in range(shards)]
    assert sources == sorted(names if in_engine else [f"{name}.written" for name in names])
    rows = {attention["key"][-2] for attention in over_slots}
    assert rows == ({built.config.slot_rows} if in_engine else {-1})
    queried = Counter(attention["query"][-3] * attention["query"][-2] for attention in over_slots)
    assert queried == Counter(
        shard.num_heads * ranks * shard.query_rows for shard in layout.shards for _ in range(layers)
    )

    assert sum(network["cache_updates"] for network in built.step) == (2 * layers * shards if in_engine else 0)
    rows = [[ranks, layout.scatter_rows, model.head_dim], [ranks, layout.gather_rows, model.head_dim]]
    if in_engine and ranks > 1:
        found = built.all("collectives")
        assert [(entry["ranks"], entry["shape"]) for entry in found] == [(ranks, shape) for shape in rows] * layers
    else:
        assert built.all("collectives") == []
    small = {name: built.networks[getattr(built.record, name)] for name in ("prompt", "time")}
    for network in small.values():
        assert (network["attentions"], network["collectives"], network["cache_updates"]) == ([], [], 0)
    weight_bytes = sum(network["weight_bytes"] for network in built.networks.values())
    stored = (built.path / "weights.safetensors").stat().st_size
    assert 0.9 * stored < weight_bytes < 1.01 * stored


def test_networks_have_the_steps_own_inputs_and_outputs(built):
    config = built.config
    kind = DTYPES[config.build.precision]
    if built.collectives == "engine":
        inputs, outputs = step_names(config, whole_slots=True)
        (network,) = built.step
        assert sorted(entry["name"] for entry in network["inputs"]) == sorted(inputs)
        assert sorted(entry["name"] for entry in network["outputs"]) == sorted(outputs)
    else:
        sent = [part.sent for part in built.parts if part.sent]
        assert len(sent) == (2 * config.model.num_layers if config.build.world_size > 1 else 0)
        written = [name for part in built.parts for name in part.writes.values()]
        assert sorted(written) == sorted(step_names(config)[1][1:])
        assert [entry["name"] for entry in built.step[-1]["outputs"]] == ["flow"]
    rotation = [1, built.layout.local_tokens, config.model.head_dim // 2]
    for network in built.networks.values():
        for entry in (*network["inputs"], *network["outputs"]):
            if entry["name"] in ("rank", "first_frame", "kv_rows"):
                assert entry["dtype"] == "INT64", entry
            elif entry["dtype"] == "FLOAT":  # rotation is float32 in any precision, on its way between segments too
                assert (entry["shape"], built.collectives) == (rotation, "runtime"), entry
            else:
                assert entry["dtype"] == kind, entry
    prompt = built.networks[built.record.prompt]
    assert [entry["name"] for entry in prompt["outputs"]] == prompt_names(config.model.num_layers)


def test_constants_are_the_tables_bit_for_bit(built):
    """Rotation in float32 whatever the precision, and the packing indices; the networks hold no other table."""
    layout = built.layout
    tables = {name: table.numpy() for name, table in rope_tables(built.config, layout).constants().items()}
    if layout.world_size > 1:
        tables |= {"scatter": layout.scatter_index().ravel(), "gather": layout.gather_index()}
    expected = {
        (str(table.dtype), table.shape, hashlib.sha256(table.tobytes()).hexdigest()) for table in tables.values()
    }
    assert len(expected) == len(tables)
    found = {(entry["dtype"], tuple(entry["shape"]), entry["sha256"]) for entry in built.all("constants")}
    assert found == expected


def test_one_set_of_engines_serves_every_rank_and_chunk(built):
    names = [built.record.prompt, built.record.time, *built.record.steps[0]]
    assert sorted(file.name for file in built.path.glob("*.engine")) == sorted(names)
    assert len(built.record.steps[0]) == len(built.parts)
    assert built.record.version == trt.__version__
    graphs = {part.file for part in built.parts} | {"prompt.onnx", "time.onnx"}
    assert {file.name for file in built.path.glob("*.onnx")} == graphs


def test_progress_is_told(built):
    stage = f"engines for {built.target}"
    count = 2 + len(built.parts)
    assert [told for told in built.progress if told[0] == stage] == [(stage, done, count) for done in range(count + 1)]
    phases = [told for told in built.progress if told[0].startswith(f"{built.target}-")]
    assert bool(phases) == (count <= 3), "many small engines are told one by one, few large ones by their phases"
    assert all(0 <= done <= total for _, done, total in phases)
    assert built.progress[-1] == ("hashes", 1, 1)


def test_built_again_it_holds_the_same(small, tmp_path):
    """The networks, that is: of the 5 MB of this step's engine some hundred bytes differ, where TensorRT-RTX 1.7.1 writes down
    tensors in an order that changes."""
    again = small.again(tmp_path / "again")
    assert json.loads((again / small.record.networks).read_text()) == small.networks
    for name in (small.record.prompt, small.record.time, *small.record.steps[0]):
        assert (again / name).stat().st_size == (small.path / name).stat().st_size, name


def test_profiles_are_the_lengths_that_occur():
    """Window of 7 frames with a sink of 1, chunks of 3 frames: 3, 6, then 7 frames, for ever."""
    assert kv_lengths(tiny()) == (18, 36, 42)
    assert kv_lengths(tiny(**{"video.window_frames": "none"})) == (18, 36, 54, 72)
    assert kv_lengths(tiny(**{"video.window_frames": "none", "video.horizon_frames": "3"})) == (18,)


# What is refused


@pytest.mark.parametrize(
    ("changes", "options", "error", "said"),
    [
        (
            {},
            {"targets": ["sm90"]},
            ExecutorError,
            r"sm90 is not among them.*for H100 and H200, take executor tensorrt",
        ),
        ({}, {"targets": ["a100"]}, ExecutorError, "a100 is not among them; A100 and A800 are sm80"),
        ({}, {"targets": []}, ExecutorError, r"builds for sm75, .*no --target was given"),
        ({}, {"targets": ["sm80", "sm90"]}, ExecutorError, "sm90 is not among them"),
        ({"build.precision": "float32"}, {}, ConfigError, "build.precision is float32; build with `--dtype bf16`"),
        (
            {},
            {"executors": ["onnxruntime"]},
            ConfigError,
            "--target, --frontend, --collectives, --timing-cache and --prepare are for TensorRT",
        ),
        ({}, {"collectives": "both"}, ConfigError, "collectives must be engine or runtime, got 'both'"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, changes, options, error, said):
    settings = {"executors": ["tensorrt_rtx"], "targets": ["sm80"], **options}
    checkpoint = write_checkpoint(tiny(), tmp_path / "checkpoint.safetensors")
    with pytest.raises(error, match=said):
        build(tiny(**changes), checkpoint=checkpoint, out=tmp_path / "place" / "bundle", **settings)
    assert not (tmp_path / "place").exists()


def test_other_flavour_is_not_installed_here(tmp_path, monkeypatch):
    monkeypatch.setattr(Flavour, "builds_here", lambda self: True)
    with contextlib.suppress(ImportError):
        import tensorrt  # noqa: F401

        pytest.skip("tensorrt is installed here")
    checkpoint = write_checkpoint(tiny(), tmp_path / "checkpoint.safetensors")
    said = rf"needs the Python module tensorrt, which does not import here .*{re.escape(install_extra('gpu'))}"
    with pytest.raises(ExecutorError, match=said):
        build(tiny(), checkpoint=checkpoint, out=tmp_path / "place" / "bundle", executors=["tensorrt"])
    assert not (tmp_path / "place").exists()


def test_attention_without_a_fused_kernel(tmp_path):
    """Heads of 6 channels: no silent fall back to separate products."""
    config = tiny(**{"model.dim": "18", "model.num_layers": "1"})
    checkpoint = write_checkpoint(config, tmp_path / "checkpoint.safetensors")
    place = tmp_path / "place"
    with pytest.raises(BuildError) as caught:
        build(config, checkpoint=checkpoint, out=place / "bundle", executors=["tensorrt_rtx"], targets=["sm80"])
    for words in (
        "cannot build whole-step.onnx for sm80",
        "Attention operation was not supported by a dedicated kernel",
        "take bfloat16 or float16, another --target, or `--executor onnxruntime`",
    ):
        assert words in str(caught.value)
    assert list(place.iterdir()) == []


@pytest.fixture
def kept_log():
    return engine_worker._make_log(trt)


def write_graph(nodes, path):
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [2, 3]) for name in ("x", "y")]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("elsewhere", 1)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_op_that_the_parser_does_not_know(tmp_path, kept_log):
    nodes = [
        helper.make_node("Neg", ["x"], ["a"], name="fine"),
        helper.make_node("Nonesuch", ["a"], ["y"], name="the_odd_one", domain="elsewhere"),
    ]
    with pytest.raises(BuildError) as caught:
        parse(trt, kept_log.logger, write_graph(nodes, tmp_path / "odd.onnx"))
    for words in (
        f"tensorrt_rtx {trt.__version__} cannot parse odd.onnx",
        "the_odd_one",
        "op Nonesuch",
        "run this model with `--executor onnxruntime` and report the node",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("contents", [None, b"no graph"], ids=["missing", "damaged"])
def test_graph_that_cannot_be_read(tmp_path, kept_log, contents):
    file = tmp_path / "step.onnx"
    if contents is not None:
        file.write_bytes(contents)
    with pytest.raises(BuildError, match=r"cannot parse step\.onnx"):
        parse(trt, kept_log.logger, file)


@pytest.mark.parametrize("key", ["attentions", "lengths", "collectives", "cache_updates", "plugins"])
def test_network_that_is_not_what_the_graph_says(tmp_path, key):
    write_graph([helper.make_node("Neg", ["x"], ["y"], name="n")], tmp_path / "neg.onnx")
    expected = {"attentions": 0, "lengths": 0, "collectives": 0, "cache_updates": 0}
    request = EngineRequest(onnx="neg.onnx", engine="neg.engine", profiles=(), expected=expected | {key: 1})
    with pytest.raises(BuildError, match=rf"made something else of neg\.onnx than it says.*expected .*'{key}': 1"):
        build_engine(RTX, "sm80", request, tmp_path, None)
    assert not (tmp_path / "neg.engine").exists()


@pytest.fixture
def neg(tmp_path):
    """Build the engine of a graph of one node, with a timing cache or without; the engine, and what the worker said."""
    write_graph([helper.make_node("Neg", ["x"], ["y"], name="n")], tmp_path / "neg.onnx")
    expected = {"attentions": 0, "lengths": 0, "collectives": 0, "cache_updates": 0}
    request = EngineRequest(onnx="neg.onnx", engine="neg.engine", profiles=(), expected=expected)

    def make(cache=None):
        build_engine(RTX, "sm80", request, tmp_path, cache)
        return tmp_path / "neg.engine"

    return make


def test_engines_are_built_to_be_captured(neg, monkeypatch):
    flags = []
    monkeypatch.setattr(
        trt.Builder, "build_serialized_network", lambda builder, network, config: flags.append(config.flags)
    )
    with pytest.raises(BuildError):
        neg()
    assert flags[0] >> int(trt.BuilderFlag.REQUIRE_USER_ALLOCATION) & 1


@pytest.mark.filterwarnings("ignore:.*Timing cache:DeprecationWarning")
@pytest.mark.parametrize("refused", ["when it is read", "when it is attached"])
def test_a_refused_timing_cache_costs_its_times_and_not_the_build(neg, tmp_path, monkeypatch, capsys, refused):
    """As one of another GPU is. It may be somebody's: it stays as it was."""
    if refused == "when it is read":
        monkeypatch.setattr(trt.IBuilderConfig, "create_timing_cache", lambda config, data: None)
    else:
        monkeypatch.setattr(trt.IBuilderConfig, "set_timing_cache", lambda config, cache, ignore_mismatch: False)
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"of another GPU")
    assert neg(cache).stat().st_size > 0
    assert cache.read_bytes() == b"of another GPU"
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (warning,) = [message["text"] for message in said if message["kind"] == "warning"]
    assert warning.startswith(f"TensorRT refuses the timing cache {cache}, which may be of another GPU or driver")


@pytest.mark.filterwarnings("ignore:.*Timing cache:DeprecationWarning")
@pytest.mark.parametrize("given", [True, False], ids=["times", "no times"])
def test_a_timing_cache_is_kept_if_there_is_one_after_the_build(neg, tmp_path, monkeypatch, given):
    if not given:
        monkeypatch.setattr(trt.IBuilderConfig, "get_timing_cache", lambda config: None)
    cache = tmp_path / "timing.cache"
    assert neg(cache).stat().st_size > 0
    assert cache.exists() == given


def test_build_is_cancelled_when_nobody_listens(small, tmp_path, monkeypatch):
    """The caller is gone: its end of the pipe is closed."""

    def broken(kind, **content):
        raise BrokenPipeError

    monkeypatch.setattr(engine_worker, "_say", broken)
    for name in ("time.onnx", "weights.safetensors"):
        shutil.copy(small.path / name, tmp_path)
    expected = {"attentions": 0, "lengths": 0, "collectives": 0, "cache_updates": 0}
    request = EngineRequest(onnx="time.onnx", engine="time.engine", profiles=(), expected=expected)
    with pytest.raises(BuildError, match=r"cannot build time\.onnx"):
        build_engine(RTX, "sm80", request, tmp_path, None)
    assert not (tmp_path / "time.engine").exists()


# The child process


def children():
    """Builders that this process has started and that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"engine_worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("when", ["begins", "builds"])
def test_child_killed_in_the_middle(small, tmp_path, when):
    def kill(stage, done, total):
        if stage.startswith("sm80-" if when == "builds" else "engines for"):
            for pid in children():
                os.kill(pid, signal.SIGKILL)

    place = tmp_path / "place"
    with pytest.raises(
        BuildError, match=r"engines for sm80 ended without an answer \(exit code -9; -9 is a lack of memory"
    ):
        small.again(place / "bundle", kill)
    assert list(place.iterdir()) == []
    assert children() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_interrupt_ends_the_child(small, tmp_path, error):
    """Ctrl-C, or whatever else the caller's progress function raises."""
    seen = []

    def interrupt(stage, done, total):
        seen.extend(children())
        if stage.startswith("sm80-"):
            raise error

    place = tmp_path / "place"
    with pytest.raises(error):
        small.again(place / "bundle", interrupt)
    assert seen
    assert children() == []
    assert list(place.iterdir()) == []


def test_full_disk_in_the_child(small, tmp_path):
    """There is room for the graphs, and none for an engine."""
    room = 400_000
    graphs = max(file.stat().st_size for file in small.path.iterdir() if file.suffix != ".engine")
    assert graphs < room < (small.path / small.record.prompt).stat().st_size
    place = tmp_path / "place"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(
            BuildError, match=r"cannot write a bundle to .*, what was there is as it was: .*File too large"
        ):
            small.again(place / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(place.iterdir()) == []


@pytest.fixture
def child(tmp_path, monkeypatch):
    """`child(source)`: what `build_engines` starts is this Python program; what came of it."""
    monkeypatch.setattr(engine_files, "END_S", 1.0)

    def run(source, told=None):
        program = tmp_path / "child"
        program.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{textwrap.dedent(source)}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(program))
            return engine_files.run_child("{}", "sm80", lambda *args: told is None or told.append(args))

    return run


DONE = '{"kind": "done", "version": "1", "networks": {}}'


def test_child_whose_answers_are_among_other_lines(child, caplog):
    """Numbers, lists, nulls and objects are JSON too; bytes need not be text."""
    told = []
    with caplog.at_level("INFO", "causalrt.export.engine_files"):
        answer = child(
            f"""
            out = sys.stdout.buffer
            for line in (b"3", b"null", b"[1]", b'"kind"', b"{{}}", b'{{"sort": 1}}', b"\\xff\\xfe", b"", b"half a li"):
                out.write(line + b"\\n")
            out.write(b'{{"kind": "engine", "name": "x", "done": 1, "total": 9}}\\n')
            out.write(b'{{"kind": "phase", "phase": "p", "done": 1, "total": 9}}\\n')
            out.write(b'{{"kind": "news"}}\\n{DONE}\\n')
            """,
            told,
        )
    assert answer == json.loads(DONE)
    assert told == [("engines for sm80", 1, 9)]
    assert "engine build: half a li" in caplog.text


def test_child_that_says_nothing(child):
    with pytest.raises(BuildError, match=r"ended without an answer \(exit code 0;"):
        child("pass")


def test_child_with_an_error_that_nobody_expected(child):
    with pytest.raises(BuildError) as caught:
        child("{}['the key']")
    assert "ended without an answer (exit code 1;" in str(caught.value)
    assert str(caught.value).rstrip().endswith("KeyError: 'the key'")


@pytest.mark.parametrize(("kind", "raised"), [("BuildError", BuildError), ("ExecutorError", ExecutorError)])
def test_typed_error_keeps_its_type(child, kind, raised):
    with pytest.raises(raised, match=r"^as it was said$"):
        child(f"print(json.dumps(dict(kind='error', error={kind!r}, message='as it was said')))")


def test_system_error_is_left_to_the_bundle(child):
    with pytest.raises(OSError, match="No space left on device"):
        child("print(json.dumps(dict(kind='error', error='OSError', message='No space left on device')))")


def test_child_that_floods_its_log(child):
    """More than any pipe holds, and more than a message should."""
    with pytest.raises(BuildError) as caught:
        child(
            """
            for i in range(20_000):
                sys.stderr.write(f"line {i} " + "x" * 200 + "\\n")
            sys.stderr.buffer.write(b"\\xff last words")
            sys.exit(5)
            """
        )
    assert "exit code 5" in str(caught.value)
    assert str(caught.value).endswith("last words")
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("after", ["time.sleep(60)", "sys.stdout.write('x' * 10**7)"], ids=["hangs", "floods"])
def test_child_that_does_not_end_when_it_has_answered(child, after):
    start = time.monotonic()
    assert child(f"print('{DONE}', flush=True)\n{after}") == json.loads(DONE)
    assert time.monotonic() - start < 20


def test_worker_keeps_its_answers_apart_and_imports_from_where_its_caller_does(tmp_path, monkeypatch):
    """What a library prints is in the log; what lies about in the working directory is not imported."""
    (tmp_path / "onnx.py").write_text("raise SystemExit('the wrong onnx')")
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError) as caught:
        engine_files.run_child('{"flavour": "nonesuch", "folder": "."}', "sm80", lambda stage, done, total: None)
    assert str(caught.value).rstrip().endswith("KeyError: 'nonesuch'")

    source = """
        import os
        from causalrt.export import engine_worker
        engine_worker._keep_answers_apart()
        os.write(1, b"a library's chatter\\n")
        engine_worker._say("done", networks={})
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=60
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"kind": "done", "networks": {}}]
    assert done.stderr == "a library's chatter\n"
