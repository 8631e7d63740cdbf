"""Plugins taken through a build by NVIDIA's own Python, over NVIDIA's own bindings, without its library.

`test_tensorrt_plugin.py` starts this file in a process that `real_bindings` has prepared.
"""

import re
import subprocess
import types
from dataclasses import replace

import pytest
import torch

from causalrt.errors import OperandError
from causalrt.layout import Layout, plan_head_shards
from causalrt.plugins.plugin_specs import COMBINE_SPLITS, LARGE_TILES, QK_NORM_ROPE, SMALL_TILES, SPECS
from causalrt.plugins.ptx import compile_kernel
from causalrt.plugins.tensorrt_plugin import enable_in_place, register_plugins
from support import library_double as library
from support import tensorrt_double as double

# The 1.3B model, 12 heads of 128 channels on 8 ranks: chunks of 4680 tokens, slots of 32760 rows.
WORLD_SIZE, NUM_TOKENS, SLOT_ROWS, NUM_HEADS, HEAD_DIM = 8, 4680, 32760, 12, 128
LOCAL_TOKENS = 585
SHARDS = plan_head_shards("balanced", num_heads=NUM_HEADS, world_size=WORLD_SIZE, local_tokens=LOCAL_TOKENS)
LAYOUT = Layout(num_heads=NUM_HEADS, world_size=WORLD_SIZE, num_tokens=NUM_TOKENS, shards=SHARDS)
SCATTER_ROWS = sum(shard.num_heads * (shard.query_rows + 2 * LOCAL_TOKENS) for shard in SHARDS)
GATHER_ROWS = sum(shard.num_heads * shard.query_rows for shard in SHARDS)
TARGET = 80


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("ptx")


@pytest.fixture
def trt():
    yield library.imported()
    register_plugins.cache_clear()


@pytest.fixture
def build(trt, cache):
    """Takes a registered plugin through a build: (name, inputs, attributes, tactic) -> Built."""
    api = library.plugin_api()
    register_plugins(trt, target=TARGET, cache=cache)
    return lambda *given, **options: library.build_with_library(trt, api, *given, **options)


# ---- the plugins at 1.3B, 8 ranks


def qk_norm_rope_case(trt, dtype="BF16"):
    value, row = getattr(trt.DataType, dtype), (LOCAL_TOKENS, NUM_HEADS * HEAD_DIM)
    table, places = (1, LOCAL_TOKENS, HEAD_DIM // 2), LAYOUT.scatter_destinations().shape
    inputs = [(value, row)] * 3 + [(value, row[1:])] * 2
    inputs += [(trt.DataType.FLOAT, table)] * 2 + [(trt.DataType.INT32, places)]
    return inputs, {"num_heads": NUM_HEADS, "eps": 1e-6, "out_rows": WORLD_SIZE * SCATTER_ROWS}


def rope_attention_case(trt, dtype="BF16", *, kv_splits=None):
    value = getattr(trt.DataType, dtype)
    slots = [(value, (1, shard.num_heads, SLOT_ROWS, HEAD_DIM)) for shard in SHARDS for _ in "kv"]
    inputs = [(value, (WORLD_SIZE, SCATTER_ROWS, HEAD_DIM)), *slots, (trt.DataType.INT64, (1,))]
    splits = {f"split_{number}": shard.split for number, shard in enumerate(SHARDS)}
    more = {"kv_splits": kv_splits} if kv_splits else {}
    return inputs, {"num_tokens": NUM_TOKENS, "gather_rows": GATHER_ROWS} | splits | more


def combine_case(trt, dtype=16, *, kv_splits=3):
    shape = (kv_splits, WORLD_SIZE, GATHER_ROWS, HEAD_DIM)
    return [(trt.DataType.FLOAT, shape), (trt.DataType.FLOAT, shape[:3])], {"dtype": dtype}


def parameters(built):
    entry = re.search(rf"\.entry {built.kernel}\(([^)]*)\)", built.ptx)
    return re.findall(r"\.param \.u64 .*?(\w+_param_\d+)", entry[1])


def launch_of(spec, inputs, attributes, tactic=0):
    types_ = {"BF16": torch.bfloat16, "HALF": torch.float16, "FLOAT": torch.float32}
    types_ |= {"INT32": torch.int32, "INT64": torch.int64}
    tensors = {
        name: torch.empty(shape, dtype=types_[dtype.name], device="meta")
        for name, (dtype, shape) in zip(spec.inputs, inputs, strict=True)
    }
    return spec.plan(tensors, attributes, TARGET, tactic)


def named(name):
    return next(spec for spec in SPECS if spec.name == name)


def check_kernel(built, spec, case, cache, tactic=0):
    """What is launched is what was planned, and its parameters are as many as TensorRT hands over."""
    launch = launch_of(spec, *case, tactic)
    compiled = compile_kernel(launch, target=TARGET, cache=cache)
    count = len(spec.inputs) + spec.num_outputs
    assert built.kernel == compiled.name == launch.kernel.__name__
    assert built.ptx.count(".entry") == 1
    assert parameters(built) == [f"{built.kernel}_param_{number}" for number in range(count)]
    assert f".reqntid {built.launch['block_x']}\n" in built.ptx
    assert built.launch == {
        **dict(zip(("grid_x", "grid_y", "grid_z"), launch.grid, strict=True)),
        "block_x": 32 * compiled.num_warps,
        "block_y": 1,
        "block_z": 1,
        "shared_mem": compiled.shared_bytes,
    }
    assert built.extra_arguments == []


@pytest.mark.parametrize("dtype", ["BF16", "HALF"])
def test_qk_norm_rope(build, trt, cache, dtype):
    case = qk_norm_rope_case(trt, dtype)
    built = build("qk_norm_rope", *case)
    assert built.shapes == [(WORLD_SIZE * SCATTER_ROWS, HEAD_DIM)]
    assert built.dtypes == [getattr(trt.DataType, dtype)]
    assert built.aliases == [-1]
    wanted = [*(kind for kind, _ in case[0]), getattr(trt.DataType, dtype)]
    assert built.combinations == [(kind, trt.TensorFormat.LINEAR) for kind in wanted]
    check_kernel(built, QK_NORM_ROPE, case, cache)
    assert built.launch["grid_x"] == LOCAL_TOKENS


@pytest.mark.parametrize(("dtype", "tactic"), [("BF16", 1), ("BF16", 2), ("HALF", 1)])
def test_rope_attention(build, trt, cache, dtype, tactic):
    case = rope_attention_case(trt, dtype)
    built = build("rope_attention_2", *case, tactic=tactic)
    slots = [shape for _, shape in case[0][1:5]]
    assert built.shapes == [(WORLD_SIZE, GATHER_ROWS, HEAD_DIM), *slots]
    assert built.dtypes == [getattr(trt.DataType, dtype)] * 5
    assert built.aliases == [-1, 1, 2, 3, 4]
    check_kernel(built, named("rope_attention_2"), case, cache, tactic)


@pytest.mark.parametrize(("name", "kv_splits"), [("rope_attention_2", None), ("rope_attention_split_2", 3)])
def test_attention_has_a_tactic_that_needs_no_more_shared_memory_than_any_kernel_gets(build, trt, name, kv_splits):
    case = rope_attention_case(trt, kv_splits=kv_splits)
    large, small = (build(name, *case, tactic=tactic) for tactic in (LARGE_TILES, SMALL_TILES))
    assert large.tactics == small.tactics == [LARGE_TILES, SMALL_TILES]
    assert large.launch["shared_mem"] > 48 * 1024 >= small.launch["shared_mem"]
    assert large.ptx != small.ptx
    assert large._replace(ptx="", launch={}) == small._replace(ptx="", launch={})


def test_plugins_with_one_kernel_need_no_more_shared_memory_than_any_kernel_gets(build, trt):
    for name, case in (("qk_norm_rope", qk_norm_rope_case(trt)), ("combine_splits", combine_case(trt))):
        built = build(name, *case)
        assert built.tactics == []
        assert built.launch["shared_mem"] <= 48 * 1024


def test_rope_attention_over_ranges_of_keys(build, trt, cache):
    case = rope_attention_case(trt, kv_splits=3)
    built = build("rope_attention_split_2", *case)
    parts = (3, WORLD_SIZE, GATHER_ROWS, HEAD_DIM)
    assert built.shapes == [parts, parts[:3], *(shape for _, shape in case[0][1:5])]
    assert built.dtypes == [trt.DataType.FLOAT] * 2 + [trt.DataType.BF16] * 4
    assert built.aliases == [-1, -1, 1, 2, 3, 4]
    check_kernel(built, named("rope_attention_split_2"), case, cache)

    case = combine_case(trt)
    built = build("combine_splits", *case)
    assert (built.shapes, built.dtypes, built.aliases) == ([parts[1:]], [trt.DataType.BF16], [-1])
    check_kernel(built, COMBINE_SPLITS, case, cache)


def test_combine_is_the_launch_of_the_whole_plan(trt):
    from causalrt.plugins.rope_attention_launch import plan, tiles_for
    from causalrt.plugins.shard_blocks import blocks_from_shares

    blocks = blocks_from_shares(
        (WORLD_SIZE, SCATTER_ROWS, HEAD_DIM),
        num_tokens=NUM_TOKENS,
        num_heads=[shard.num_heads for shard in SHARDS],
        splits=[shard.split for shard in SHARDS],
    )
    tiles = tiles_for(TARGET, dtype=torch.bfloat16, head_dim=HEAD_DIM, rotate=False)
    both = {"whole_slots": True, "rotate": False, "tiles": tiles, "num_multiprocessors": 108, "kv_splits": 3}
    whole = plan(blocks, dtype=torch.bfloat16, slot_rows=SLOT_ROWS, **both)
    assert launch_of(COMBINE_SPLITS, *combine_case(trt)) == whole.combine
    assert launch_of(named("rope_attention_split_2"), *rope_attention_case(trt, kv_splits=3)) == whole.attend


@pytest.mark.parametrize("name", ["rope_attention_2", "rope_attention_split_2"])
def test_assembler_takes_pointers_that_nothing_reads(build, trt, name, tmp_path):
    from triton.backends.nvidia.compiler import get_ptxas

    built = build(name, *rope_attention_case(trt, kv_splits=3 if "split" in name else None))
    last = parameters(built)[-4:]
    assert not any(re.search(rf"\[{pointer}\]", built.ptx) for pointer in last)
    source = tmp_path / "kernel.ptx"
    source.write_text(built.ptx)
    command = [get_ptxas(TARGET).path, f"--gpu-name=sm_{TARGET}", source, "-o", tmp_path / "kernel.cubin"]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("name", ["qk_norm_rope", "rope_attention_2", "rope_attention_split_2", "combine_splits"])
def test_our_own_stand_in_builds_the_same(build, trt, cache, name):
    cases = {"qk_norm_rope": qk_norm_rope_case, "rope_attention_2": rope_attention_case, "combine_splits": combine_case}
    case = cases[name](trt) if name in cases else rope_attention_case(trt, kv_splits=3)
    built = build(name, *case)
    register_plugins.cache_clear()
    api = double.small_api()
    register_plugins(trt, target=TARGET, cache=cache)
    assert double.build_with_small(trt, api, name, *case) == built


def test_network_takes_a_plugin_by_call(trt, cache, monkeypatch):
    monkeypatch.setattr(trt, "ITensor", type("ITensor", (), {}))  # the library makes them
    api = library.plugin_api()
    register_plugins(trt, target=TARGET, cache=cache)
    inputs, attributes = qk_norm_rope_case(trt)
    tensors = [trt.ITensor() for _ in inputs]
    given, shapes, plugin = api.op.causalrt.qk_norm_rope(*tensors, **attributes)(
        trt.QuickPluginCreationRequest.STRICT_AOT
    )
    assert (given, shapes, plugin.attrs) == (tensors, [], attributes)
    with pytest.raises(ValueError, match="Unexpected schema"):
        api.op.causalrt.qk_norm_rope(*tensors[1:], **attributes)


def test_in_place_is_a_preview_feature(trt):
    seen = []
    config = types.SimpleNamespace(set_preview_feature=lambda *given: seen.append(given))
    enable_in_place(trt, config)
    assert seen == [(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)]


# ---- what is refused


@pytest.mark.parametrize(
    ("number", "shape", "message"),
    [
        (0, (LOCAL_TOKENS - 1, NUM_HEADS * HEAD_DIM), "q must be"),
        (0, (LOCAL_TOKENS, 7), "12 heads takes q"),
        (5, (1, LOCAL_TOKENS, 3), "cos must be"),
        (7, (3, LOCAL_TOKENS, 11, 2), "destinations"),
        (1, (-1, NUM_HEADS * HEAD_DIM), "k is .* static"),
    ],
)
def test_qk_norm_rope_refuses_shapes(build, trt, number, shape, message):
    inputs, attributes = qk_norm_rope_case(trt)
    inputs[number] = (inputs[number][0], shape)
    with pytest.raises(OperandError, match=message):
        build("qk_norm_rope", inputs, attributes)


@pytest.mark.parametrize(("number", "message"), [(3, "norm_q is torch.float32, and the kernel takes bf16"), (5, "cos")])
def test_qk_norm_rope_refuses_types(build, trt, number, message):
    inputs, attributes = qk_norm_rope_case(trt)
    kind = trt.DataType.BF16 if inputs[number][0] == trt.DataType.FLOAT else trt.DataType.FLOAT
    inputs[number] = (kind, inputs[number][1])
    with pytest.raises(OperandError, match=message):
        build("qk_norm_rope", inputs, attributes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gather_rows": GATHER_ROWS + 1}, "gather_rows is"),
        ({"num_tokens": NUM_TOKENS + 8}, "received has blocks"),
        ({"split_1": 3}, "received has blocks"),
        ({"kv_splits": 1}, "without split"),
    ],
)
def test_rope_attention_refuses_attributes(build, trt, change, message):
    inputs, attributes = rope_attention_case(trt, kv_splits=2)
    with pytest.raises(OperandError, match=message):
        build("rope_attention_split_2", inputs, attributes | change)


@pytest.mark.parametrize(
    ("number", "kind", "shape", "message"),
    [
        (2, "BF16", (1, 1, SLOT_ROWS, 64), "v_slots_0 must be"),
        (4, "BF16", (1, 1, SLOT_ROWS - 1, HEAD_DIM), "v_slots_1 must be"),
        (1, "BF16", (1, SLOT_ROWS, HEAD_DIM), "slots"),
        (3, "HALF", (1, 1, SLOT_ROWS, HEAD_DIM), "k_slots_1 is torch.float16, and the kernel takes bf16"),
        (5, "INT32", (1,), "kv_rows is torch.int32, and the kernel takes i64"),
        (5, "INT64", (2,), "kv_rows must hold one number"),
        (0, "FP8", (WORLD_SIZE, SCATTER_ROWS, HEAD_DIM), "received is DataType.FP8"),
    ],
)
def test_rope_attention_refuses_tensors(build, trt, number, kind, shape, message):
    inputs, attributes = rope_attention_case(trt)
    inputs[number] = (getattr(trt.DataType, kind), shape)
    with pytest.raises(OperandError, match=message):
        build("rope_attention_2", inputs, attributes)


def test_combine_refuses_unknown_types(build, trt):
    with pytest.raises(OperandError, match="dtype is 7"):
        build("combine_splits", *combine_case(trt, dtype=7))


def test_launch_in_another_order_is_our_own_mistake(trt):
    spec = replace(QK_NORM_ROPE, inputs=("k", "q", *QK_NORM_ROPE.inputs[2:]))
    with pytest.raises(AssertionError):
        launch_of(spec, *qk_norm_rope_case(trt))


def test_shapes_are_those_of_the_issue():
    assert GATHER_ROWS == 878
    assert SCATTER_ROWS == 878 + 4 * 585
