import json
import math
import os
import subprocess
import sys

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import SUPPORT
from support.rope_attention_cases import CUT_CASES, LAYOUTS, make_arguments, make_layout
from support.tolerances import FUSED_OP, ONE_OP, ROPE_ATTENTION
from torch import nn

from causalrt.errors import KernelError, OperandError
from causalrt.export import translate
from causalrt.model.wan.step import HeadExchange
from causalrt.plugins.attention import kv_attention_in_place
from causalrt.plugins.rope_attention import rope_attention, rope_attention_in_place, run_kernel
from causalrt.plugins.shard_blocks import blocks_from_shares

# ---- the kernel, in Triton's interpreter


class Interpreter:
    """A process that interprets kernels: Triton asks for its mode once, when it is imported."""

    def __init__(self):
        script = SUPPORT / "interpreted_rope_attention.py"
        self.process = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )

    def run(self, case):
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the interpreting process died; its traceback is above"
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def interpreter():
    pytest.importorskip("triton")
    process = Interpreter()
    yield process
    process.close()


CASES = {
    "plan": st.sampled_from(["balanced", "padded", "grouped"]),
    "heads": st.integers(1, 7),
    "ranks": st.integers(1, 9),
    "tokens": st.integers(1, 40),
    "history": st.one_of(st.just(0), st.integers(1, 70)),
    "spare": st.integers(0, 9),
    "dim": st.sampled_from([16, 24, 64, 128]),
    "whole": st.booleans(),
    "rotate": st.booleans(),
    "rank": st.integers(0, 8),
    "kv_splits": st.integers(1, 3),
    "block_m": st.sampled_from([16, 32]),
    "block_n": st.sampled_from([16, 32]),
    "dtype": st.sampled_from(sorted(ROPE_ATTENTION)),
    "spread": st.sampled_from([1.0, 3.0]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=30, deadline=None)
@given(case=st.fixed_dictionaries(CASES))
@example(case=CUT_CASES[0])
@example(case=CUT_CASES[1])
@example(case=CUT_CASES[2])
@example(case=CUT_CASES[3])
def test_kernel_against_float64(interpreter, case):
    # Outputs, staging, unfilled rows and padding tokens are NaN beforehand.
    got = interpreter.run(case | {"rank": case["rank"] % case["ranks"]})
    assert got["problems"] == []
    assert got["error"] <= ROPE_ATTENTION[case["dtype"]], got["worst"]


@pytest.mark.parametrize("kv_splits", [1, 2])
@pytest.mark.parametrize("case", CUT_CASES[:2], ids=["bfloat16", "float16"])
def test_small_tiles_against_float64(interpreter, case, kv_splits):
    launch = pytest.importorskip("causalrt.plugins.rope_attention_launch")
    tiles = launch.small_tiles_for(getattr(torch, case["dtype"]))
    sizes = {"heads": 2, "ranks": 2, "rank": 1, "tokens": 70, "dim": 16, "rotate": False, "whole": True}
    sizes |= {"block_m": tiles.block_m, "block_n": tiles.block_n, "kv_splits": kv_splits}
    got = interpreter.run(case | sizes)
    assert got["problems"] == []
    assert got["error"] <= ROPE_ATTENTION[case["dtype"]], got["worst"]


# ---- the launch plan


def plan_at_1_3b(head_plan, capability, **options):
    launch = pytest.importorskip("causalrt.plugins.rope_attention_launch")
    layout = make_layout(head_plan, 12, 8, 4680)
    heads, splits = [s.num_heads for s in layout.shards], [s.split for s in layout.shards]
    blocks = blocks_from_shares((8, layout.scatter_rows, 128), num_tokens=4680, num_heads=heads, splits=splits)
    dtype, rotate = torch.bfloat16, options.pop("rotate", False)
    return launch.plan(
        blocks,
        dtype=dtype,
        slot_rows=options.pop("slot_rows", 32760),
        whole_slots=True,
        rotate=rotate,
        tiles=launch.tiles_for(capability, dtype=dtype, head_dim=128, rotate=rotate),
        num_multiprocessors=108,
        **options,
    )


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_nothing_spills_at_1_3b(capability, rotate, tmp_path):
    ptx = pytest.importorskip("causalrt.plugins.ptx")
    plan = plan_at_1_3b("balanced", capability, rotate=rotate)
    for launch in (plan.attend, plan.combine):
        compiled = ptx.compile_kernel(launch, target=capability, cache=tmp_path)
        assert compiled.spill_bytes == 0
        assert compiled.shared_bytes <= {80: 163, 90: 227}[capability] * 1024


SMALL_SIZES = [
    (dtype, dim) for dtype in ROPE_ATTENTION for dim in (16, 24, 64, 128) if (dtype, dim) != ("bfloat16", 128)
]


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bfloat16", 128), *(pytest.param(*size, marks=pytest.mark.slow) for size in SMALL_SIZES)]
)
def test_small_tiles_need_48_kib_at_most(dtype, head_dim, capability, tmp_path):
    launch, ptx = (pytest.importorskip(f"causalrt.plugins.{name}") for name in ("rope_attention_launch", "ptx"))
    blocks = blocks_from_shares((1, 3 * 192, head_dim), num_tokens=192, num_heads=[1], splits=[1])
    dtype = getattr(torch, dtype)
    for kv_splits in (1, 2):
        plan = launch.plan(
            blocks,
            dtype=dtype,
            slot_rows=500,
            whole_slots=True,
            rotate=False,
            tiles=launch.small_tiles_for(dtype),
            num_multiprocessors=1,
            kv_splits=kv_splits,
        )
        compiled = ptx.compile_kernel(plan.attend, target=capability, cache=tmp_path)
        assert compiled.shared_bytes <= launch.UNRAISED_SHARED_BYTES == 48 * 1024
        assert compiled.spill_bytes == 0


def test_one_launch_covers_all_tiles_of_all_shares():
    plan = plan_at_1_3b("balanced", 80, kv_splits=1)
    assert plan.combine is None
    assert plan.attend.grid == (37 + 19 + 2 * math.ceil(4680 / 64), 1, 1)


def test_keys_are_split_where_waves_are_ragged():
    launch = pytest.importorskip("causalrt.plugins.rope_attention_launch")
    choose = launch.choose_kv_splits
    assert choose(num_tiles=108, key_blocks=512, num_multiprocessors=108) == 1
    assert choose(num_tiles=54, key_blocks=512, num_multiprocessors=108) == 2
    assert choose(num_tiles=54, key_blocks=2, num_multiprocessors=108) == 1, "a range costs more than it saves"
    assert choose(num_tiles=56, key_blocks=512, num_multiprocessors=108) == 7  # 392 programs: 4 waves of a seventh


def test_plan_refuses_what_the_kernel_cannot_address():
    with pytest.raises(KernelError, match="shorter window"):
        plan_at_1_3b("balanced", 80, slot_rows=2**24)
    with pytest.raises(KernelError, match="cannot stage"):
        plan_at_1_3b("balanced", 80, slot_rows=4679)


# ---- the op as torch sees it


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, whole, rotate):
    arguments = make_arguments(make_layout("balanced", 3, 2, 13), 16, 8, whole=whole, rotate=rotate, dtype=dtype)
    torch.library.opcheck(rope_attention, arguments)
    torch.library.opcheck(rope_attention_in_place, arguments)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_functional_form_is_the_one_in_place_and_writes_no_input(sizes, whole):
    *layout, history = sizes
    arguments = make_arguments(make_layout(*layout), 8, history, whole=whole, rotate=True, spare=4)
    slots = arguments[1]
    before = [x.clone() for x in slots]
    out, *written = rope_attention(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(slots, before, strict=True))
    assert torch.equal(out, rope_attention_in_place(*arguments))
    for x, y, old in zip(slots, written, before, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[..., arguments[-1] :, :], old[..., arguments[-1] :, :]), "history was written"


def test_blocks_of_another_layout_are_refused():
    received, *rest = make_arguments(make_layout("balanced", 3, 2, 13), 16, 8)
    with pytest.raises(OperandError, match="take both from one Layout"):
        rope_attention(received[:, 1:], *rest)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda received: received.transpose(0, 1).contiguous().transpose(0, 1), "received has strides"),
        (1, lambda slots: slots[:-1], "k and v of 2 shards"),
        (1, lambda slots: [*slots[:3], slots[3][:, :, :-1]], "slots 3 must be"),
        (1, lambda slots: [slots[0].bfloat16(), *slots[1:]], "slots 0 must be .* torch.float32, got .* torch.bfloat16"),
        (1, lambda slots: [slots[0].mT.contiguous().mT, *slots[1:]], "slots 0 has strides"),
        (2, lambda kv_rows: kv_rows.int(), "kv_rows must be .* torch.int64, got .* torch.int32"),
        (3, lambda rotation: rotation[:2], "rank, cos and sin or nothing, got .* 2 tensors"),
        (3, lambda rotation: [rotation[0].int(), *rotation[1:]], "rank must be .* torch.int64"),
        (3, lambda rotation: [*rotation[:2], rotation[2].double()], "sin must be .* torch.float32"),
        (3, lambda rotation: [rotation[0], *(table[:-1] for table in rotation[1:])], "cos must be"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_kernel_is_given_what_it_was_planned_for(whole, number, change, message):
    arguments = list(make_arguments(make_layout("balanced", 3, 2, 13), 16, 8, whole=whole, rotate=True))
    arguments[number] = change(arguments[number])
    with pytest.raises(OperandError, match=message):
        run_kernel(*arguments)


def test_kernel_is_not_interpreted_unasked():
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        run_kernel(*make_arguments(make_layout("balanced", 3, 2, 13), 16, 8))


# ---- its meaning: the unfused graph


def all_to_all(sent):
    """`[P, P, rows, D]`: block p of rank r arrives as block r of rank p."""
    return sent.transpose(0, 1).contiguous()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_a_layer_equals_the_unfused_one(sizes, whole):
    """scatter_heads, attention shard by shard and gather_heads on P ranks, and the op between the same exchanges."""
    *layout, history = sizes
    layout, dim = make_layout(*layout), 8
    ranks, rows = layout.world_size, layout.local_tokens
    qkv = torch.randn(ranks, 3, 1, rows, layout.num_heads * dim, generator=torch.Generator().manual_seed(0))
    received = all_to_all(qkv.view(ranks, -1, dim)[:, torch.from_numpy(layout.scatter_index())])
    slots = [make_arguments(layout, dim, history, whole=whole, seed=rank)[1] for rank in range(ranks)]
    others = make_arguments(layout, dim, history)[2:]
    fused = torch.stack([rope_attention(received[rank], slots[rank], *others)[0] for rank in range(ranks)])

    outputs = []
    for rank in range(ranks):
        exchange = HeadExchange(layout, dim, lambda sent, rank=rank: received[rank])
        pairs = zip(layout.shards, exchange.scatter_heads(*qkv[rank]), slots[rank][::2], slots[rank][1::2], strict=True)
        outputs.append(
            [
                kv_attention_in_place(
                    *new, *(x.transpose(1, 2).flatten(2) if whole else x for x in (k, v)), shard.num_heads
                )[0]
                for shard, new, k, v in pairs
            ]
        )
    sent = torch.stack([torch.cat([x.reshape(ranks, -1, dim) for x in shards], dim=1) for shards in outputs])
    torch.testing.assert_close(fused, sent, rtol=0, atol=ONE_OP)
    for rank in range(ranks):
        exchange = HeadExchange(layout, dim, lambda _, rank=rank: all_to_all(sent)[rank])
        got = all_to_all(fused)[rank].view(-1, dim)[torch.from_numpy(layout.gather_index())].view(1, rows, -1)
        torch.testing.assert_close(got, exchange.gather_heads(outputs[rank]), rtol=0, atol=ONE_OP)


# ---- its ONNX form


class Op(nn.Module):
    def __init__(self, heads, splits, tokens):
        super().__init__()
        self.descriptors = heads, splits, tokens

    def forward(self, received, slots, kv_rows, rotation):
        return rope_attention(received, slots, kv_rows, rotation, *self.descriptors)


def export_op(arguments, path, dynamic_shapes=None):
    """An ONNX Runtime session of the op, and the names of its inputs."""
    inputs = [f"in{i}" for i in range(len(flattened(arguments)))]
    outputs = [f"out{i}" for i in range(len(arguments[1]) + 1)]
    program = torch.export.export(Op(*arguments[4:]), arguments[:4], dynamic_shapes=dynamic_shapes)
    model = translate.onnx_from_program(program, input_names=inputs, output_names=outputs)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    assert {node.domain for function in model.functions.values() for node in function} == {""}
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]), inputs


def flattened(arguments):
    received, slots, kv_rows, rotation, *_ = arguments
    return [received, *slots, kv_rows, *rotation]


def assert_equals_the_op(session, inputs, arguments):
    wanted = {x.name for x in session.get_inputs()}  # token by token, kv_rows is not asked for
    fed = {name: x.numpy() for name, x in zip(inputs, flattened(arguments), strict=True) if name in wanted}
    got = [torch.from_numpy(x) for x in session.run(None, fed)]
    out, *written = rope_attention(*arguments)
    torch.testing.assert_close(got[0], out, rtol=0, atol=FUSED_OP)
    assert all(torch.equal(x, y) for x, y in zip(got[1:], written, strict=True))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS[:5:2], ids=str)
def test_onnx_form(sizes, whole, rotate, tmp_path):
    *layout, history = sizes
    arguments = make_arguments(make_layout(*layout), 8, history, whole=whole, rotate=rotate, spare=4 if whole else 0)
    assert_equals_the_op(*export_op(arguments, tmp_path / "op.onnx"), arguments)


@pytest.mark.parametrize("rotate", [False, True])
def test_onnx_form_of_a_prefix_takes_any_length(rotate, tmp_path):
    """The tables are those of all slots, however many are bound."""
    layout, whole = make_layout("balanced", 3, 2, 13), 99
    _, _, _, tables, *_ = make_arguments(layout, 8, whole - 13, rotate=rotate)

    def arguments(history):
        received, slots, kv_rows, _, *numbers = make_arguments(layout, 8, history, seed=history)
        return received, slots, kv_rows, tables, *numbers

    rows = torch.export.Dim("rows", min=14, max=whole)
    dynamic = (None, [{1: rows}] * 4, None, [None] * len(tables))
    session, inputs = export_op(arguments(8), tmp_path / "op.onnx", dynamic)
    for history in (8, 30, whole - 13):
        assert_equals_the_op(session, inputs, arguments(history))
