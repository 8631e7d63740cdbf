"""The fused kernels on a GPU: against float64, as an engine launches them, captured, and compiled into a graph.

    python -m pytest -m gpu tests/gpu/test_gpu_kernels.py
    compute-sanitizer --tool memcheck --target-processes all python -m pytest -m gpu tests/gpu/test_gpu_kernels.py -k float64
    compute-sanitizer --tool racecheck python -m pytest -m gpu tests/gpu/test_gpu_kernels.py -k "engine and small"

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1 for the sanitizer, or torch's allocator hides reads past the end of a tensor. It slows
kernels down some hundred times; what it must not find is anything.
"""

import sys

import pytest
import torch
from support import tensorrt_double as double
from support.driver_launch import Kernel
from support.qk_norm_rope_cases import CASES as QK_CASES
from support.qk_norm_rope_cases import check as check_qk
from support.qk_norm_rope_cases import operands
from support.rope_attention_cases import CUT_CASES, LAYOUTS, make_arguments, make_layout, run
from support.tolerances import QK_NORM_ROPE, ROPE_ATTENTION

from causalrt.plugins.plugin_specs import DTYPE_FROM_ONNX, LARGE_TILES, SMALL_TILES, SPECS
from causalrt.plugins.qk_norm_rope import qk_norm_rope, write_rows
from causalrt.plugins.rope_attention import rope_attention, rope_attention_in_place
from causalrt.plugins.shard_blocks import blocks_from_shares
from causalrt.plugins.tensorrt_plugin import TYPES, register_plugins

pytest.importorskip("triton", reason="the fused kernels need Triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
DEVICE = torch.device("cuda", 0)
NAN = float("nan")

# Beside the shapes of the unit tests, some with many full blocks of keys: only there do the pipelines of a GPU run full.
GPU_LAYOUTS = [*LAYOUTS, ("balanced", 12, 8, 1171, 777), ("grouped", 6, 4, 515, 300), ("balanced", 2, 1, 700, 1300)]
FORMS = [(whole, rotate) for whole in (False, True) for rotate in (False, True)]


@pytest.fixture(autouse=True)
def own_stream():
    """As in a rank; a launch on another stream than torch's would be seen."""
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        yield
        torch.cuda.synchronize()


def on_device(arguments):
    """The arguments of an op, tensors moved."""
    if isinstance(arguments, torch.Tensor):
        return arguments.to(DEVICE)
    return [on_device(value) for value in arguments] if isinstance(arguments, list | tuple) else arguments


def assert_same_bits(got, wanted):
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    differing = int((got != wanted).sum())
    largest = (got.double() - wanted.double()).abs().max()
    assert differing == 0, f"{differing} of {got.numel()} values differ, by {largest:.2e} at most (NaN: not written)"


# ---- (a) against float64


@pytest.mark.parametrize("dtype", QK_NORM_ROPE, ids=str)
@pytest.mark.parametrize("case", QK_CASES, ids=str)
def test_qk_norm_rope_against_float64(case, dtype):
    given = operands(case, dtype)
    arguments = on_device(given.arguments)
    out = torch.full((given.out_rows, case.head_dim), NAN, dtype=dtype, device=DEVICE)
    write_rows(out, *arguments[:8], given.eps)
    check_qk(out.cpu(), given, QK_NORM_ROPE[dtype])
    assert_same_bits(qk_norm_rope(*arguments), out)


def rope_cases():
    """Every layout in every form; types and ranges of keys take turns, with the op's own tiles."""
    kinds = [(dtype, splits) for splits in (1, 3) for dtype in ROPE_ATTENTION]
    for number, (plan, heads, ranks, tokens, history) in enumerate(GPU_LAYOUTS):
        for form, (whole, rotate) in enumerate(FORMS):
            dtype, kv_splits = kinds[(number + form) % len(kinds)]
            yield {
                "plan": plan,
                "heads": heads,
                "ranks": ranks,
                "tokens": tokens,
                "history": history,
                "spare": 5,
                "dim": 128 if number % 2 else 64,
                "whole": whole,
                "rotate": rotate,
                "rank": ranks - 1,
                "kv_splits": kv_splits,
                "dtype": dtype,
                "spread": 1.0,
                "seed": number,
            }


@pytest.mark.parametrize("case", [*CUT_CASES, *rope_cases()], ids=lambda case: "-".join(map(str, case.values())))
def test_rope_attention_against_float64(case):
    got = run(case, DEVICE)
    assert got["problems"] == []
    assert got["error"] <= ROPE_ATTENTION[case["dtype"]], got["worst"]


@pytest.mark.parametrize(("whole", "rotate"), FORMS)
def test_functional_form_is_the_one_in_place(whole, rotate):
    layout = make_layout("balanced", 12, 8, 37)
    made = make_arguments(layout, 64, 90, whole=whole, rotate=rotate, spare=6, dtype=torch.bfloat16)
    arguments = on_device(made)
    out, *written = rope_attention(*arguments)
    for slots, before in zip(arguments[1], made[1], strict=True):
        assert_same_bits(slots.cpu(), before)
    assert_same_bits(rope_attention_in_place(*arguments), out)
    for slots, after in zip(arguments[1], written, strict=True):
        assert_same_bits(slots, after)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_their_tensors_are():
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    given = operands(QK_CASES[0], torch.float32)
    arguments = [x.to(other) if isinstance(x, torch.Tensor) else x for x in given.arguments]
    check_qk(qk_norm_rope(*arguments).cpu(), given, QK_NORM_ROPE[torch.float32])
    assert run(CUT_CASES[0], other)["problems"] == []
    assert torch.cuda.current_device() == 0


# ---- (b) as an engine launches them: PTX ahead of time, through the driver

# head plan, heads, ranks, tokens, history, channels, type
ENGINES = {
    "small, 2 shards": ("balanced", 3, 2, 13, 21, 16, torch.float32),
    "small, 1 shard": ("grouped", 6, 4, 37, 75, 64, torch.float16),
    "1.3B, 8 ranks": ("balanced", 12, 8, 4680, 28080, 128, torch.bfloat16),
    "1.3B, 8 ranks, padded": ("padded", 12, 8, 4680, 28080, 128, torch.bfloat16),
    "1.3B, 1 rank": ("balanced", 12, 1, 4680, 9360, 128, torch.bfloat16),
}


@pytest.fixture
def plugin(monkeypatch, tmp_path):
    """Runs a plugin as TensorRT does: (name, inputs by name, attributes) -> outputs, those in place included."""
    trt = double.make_trt()
    major, minor = torch.cuda.get_device_capability(DEVICE)
    with monkeypatch.context() as registering:  # later imports of torch must not find a stand-in
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
            registering.delitem(sys.modules, name)
        registering.setitem(sys.modules, "tensorrt", trt)
        registering.setitem(sys.modules, "tensorrt.plugin", None)  # to be taken away again
        api = double.small_api()
        register_plugins(trt, target=10 * major + minor, cache=tmp_path)
    loaded = []

    def running(name, tensors, attributes, tactic=None):
        (spec,) = [spec for spec in SPECS if spec.name == name]
        inputs = [tensors[name] for name in spec.inputs]
        descs = [(trt.DataType[TYPES[x.dtype][0]], list(x.shape)) for x in inputs]
        built = double.build_with_small(trt, api, name, descs, attributes, tactic)
        outputs = []
        for kind, shape, alias in zip(built.dtypes, built.shapes, built.aliases, strict=True):
            (dtype,) = [dtype for dtype, (member, _) in TYPES.items() if trt.DataType[member] == kind]
            fresh = torch.full(shape, NAN, dtype=dtype, device=DEVICE) if alias < 0 else inputs[alias]
            outputs.append(fresh)
        launch = built.launch
        kernel = Kernel(built.ptx, built.kernel, shared_bytes=launch["shared_mem"])
        loaded.append(kernel)  # its module must outlive the launch
        kernel.launch(
            [*inputs, *built.extra_arguments, *outputs],
            grid=tuple(launch[f"grid_{axis}"] for axis in "xyz"),
            block=tuple(launch[f"block_{axis}"] for axis in "xyz"),
            shared_bytes=launch["shared_mem"],
            stream=torch.cuda.current_stream(DEVICE).cuda_stream,
        )
        return outputs

    yield running
    torch.cuda.synchronize()
    register_plugins.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*QK_CASES, (4680, 8), (4680, 1)], ids=str)
def test_qk_norm_rope_of_an_engine(plugin, case, dtype):
    if isinstance(case, tuple) and len(case) == 2:
        case = QK_CASES[0]._replace(num_tokens=case[0], world_size=case[1], head_dim=128)
    given = operands(case, dtype)
    names = ("q", "k", "v", "norm_q", "norm_k", "cos", "sin", "destinations")
    tensors = {name: getattr(given, name).contiguous().to(DEVICE) for name in names}
    attributes = {"num_heads": given.num_heads, "eps": given.eps, "out_rows": given.out_rows}
    (out,) = plugin("qk_norm_rope", tensors, attributes)
    assert_same_bits(out, qk_norm_rope(*tensors.values(), *attributes.values()))


@pytest.mark.parametrize("tactic", [LARGE_TILES, SMALL_TILES])
@pytest.mark.parametrize("kv_splits", [1, 3])
@pytest.mark.parametrize("name", ENGINES)
def test_rope_attention_of_an_engine(plugin, name, kv_splits, tactic):
    from causalrt.plugins.rope_attention_launch import plan, small_tiles_for, tiles_for

    *sizes, history, head_dim, dtype = ENGINES[name]
    layout = make_layout(*sizes)
    made = make_arguments(layout, head_dim, history, whole=True, spare=7, dtype=dtype)
    received, slots, kv_rows, _, heads, splits, num_tokens = on_device(made)
    written = [tensor.clone() for tensor in slots]
    for tensor in (*slots, *written):
        tensor[:, :, :num_tokens] = NAN  # staging: written before it is read, or never read

    blocks = blocks_from_shares(received.shape, num_tokens=num_tokens, num_heads=heads, splits=splits)
    major, minor = torch.cuda.get_device_capability(DEVICE)
    large = tiles_for(10 * major + minor, dtype=dtype, head_dim=head_dim, rotate=False)
    launches = plan(
        blocks,
        dtype=dtype,
        slot_rows=slots[0].shape[2],
        whole_slots=True,
        rotate=False,
        tiles=large if tactic == LARGE_TILES else small_tiles_for(dtype),
        num_multiprocessors=1,
        kv_splits=kv_splits,
    )
    wanted = launches.run(received, written, kv_rows, (), launches.buffers(DEVICE))
    assert wanted.isfinite().all()

    names = [f"{kind}_slots_{number}" for number in range(len(heads)) for kind in "kv"]
    tensors = {"received": received, "kv_rows": kv_rows, **dict(zip(names, slots, strict=True))}
    attributes = {"num_tokens": num_tokens, "gather_rows": blocks.gather_rows}
    attributes |= {f"split_{number}": split for number, split in enumerate(splits)}
    if kv_splits == 1:
        out, *after = plugin(f"rope_attention_{len(heads)}", tensors, attributes, tactic)
    else:
        several = attributes | {"kv_splits": kv_splits}
        parts, log_sums, *after = plugin(f"rope_attention_split_{len(heads)}", tensors, several, tactic)
        (number,) = [number for number, kind in DTYPE_FROM_ONNX.items() if kind == dtype]
        (out,) = plugin("combine_splits", {"parts": parts, "log_sums": log_sums}, {"dtype": number})
    assert_same_bits(out, wanted)
    for got, of, expected in zip(after, slots, written, strict=True):
        assert got is of
        assert_same_bits(got, expected)
    op = rope_attention_in_place(received, written, kv_rows, [], heads, splits, num_tokens)
    limit = ROPE_ATTENTION[str(dtype).removeprefix("torch.")] * float(wanted.abs().max())
    assert float((op.double() - wanted.double()).abs().max()) <= 2 * limit, "the op, with its own ranges of keys"


# ---- (c) under CUDA graph capture, (d) in torch.compile

WORLD_SIZE, NUM_TOKENS = 8, 1171


def both_ops(history, *, whole, rotate):
    """A layer's two ops on one rank that sends itself all blocks: (function, its tensors)."""
    dtype = torch.bfloat16
    given = operands(QK_CASES[0]._replace(num_tokens=NUM_TOKENS, world_size=WORLD_SIZE, head_dim=64), dtype)
    layout = make_layout("balanced", given.num_heads, WORLD_SIZE, NUM_TOKENS)
    made = make_arguments(layout, 64, history, whole=whole, rotate=rotate, spare=9 if whole else 0, dtype=dtype)
    _, slots, kv_rows, rotation, *numbers = on_device(made)
    rows = on_device([tensor.contiguous() for tensor in given[:8]])

    def layer(rows, slots, kv_rows, rotation):
        received = qk_norm_rope(*rows, given.num_heads, given.eps, given.out_rows)
        received = received.view(WORLD_SIZE, -1, 64)
        return rope_attention_in_place(received, slots, kv_rows, rotation, *numbers)

    return layer, (rows, slots, kv_rows, rotation)


@pytest.mark.parametrize(("whole", "rotate"), FORMS)
def test_captured_kernels_follow_what_lies_in_memory(whole, rotate):
    layer, given = both_ops(700, whole=whole, rotate=rotate)
    rows, slots, kv_rows, _ = given
    layer(*given)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*given)
    for history in (700, 301, 0) if whole else (700,):
        for tensor in (*rows[:3], *slots):
            tensor.copy_(torch.randn_like(tensor))
        kv_rows.fill_(NUM_TOKENS + history)
        before = [tensor.clone() for tensor in slots]
        out.fill_(NAN)
        graph.replay()
        written = [tensor.clone() for tensor in slots]
        for tensor, old in zip(slots, before, strict=True):
            tensor.copy_(old)
        assert_same_bits(out, layer(*given))
        for tensor, after in zip(slots, written, strict=True):
            assert_same_bits(tensor, after)


@pytest.mark.parametrize(("whole", "rotate"), FORMS)
def test_compiled_kernels_write_in_place_and_wait_for_nothing(whole, rotate):
    layer, given = both_ops(90_000, whole=whole, rotate=rotate)  # a slot tensor is larger than all else that is made
    _, slots, kv_rows, _ = given
    if not whole:  # the filled prefix of longer slots, as an executor binds it
        slots[:] = [torch.cat([tensor, torch.full_like(tensor, NAN)], dim=1)[:, : int(kv_rows)] for tensor in slots]
    before = [tensor.clone() for tensor in slots]
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    with torch.no_grad():
        for function in (layer, compiled, compiled):
            for tensor, old in zip(slots, before, strict=True):
                tensor.copy_(old)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(DEVICE)
            held = torch.cuda.memory_allocated(DEVICE)
            warm = len(results) == 2
            torch.cuda.set_sync_debug_mode("error" if warm else "default")
            try:
                out = function(*given)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            taken = torch.cuda.max_memory_allocated(DEVICE) - held
            results.append([out, *(tensor.clone() for tensor in slots)])
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert_same_bits(got, wanted)
    assert taken < slots[0].nbytes, "a copy of the slots was made"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(qk_norm_rope, tuple(on_device(operands(QK_CASES[0], dtype).arguments)))
    arguments = tuple(on_device(make_arguments(make_layout("balanced", 3, 2, 13), 16, 8, rotate=True, dtype=dtype)))
    torch.library.opcheck(rope_attention, arguments)
    torch.library.opcheck(rope_attention_in_place, arguments)
