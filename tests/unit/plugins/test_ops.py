import math

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.tolerances import ONE_OP, ROUNDED
from torch import nn

from causalrt.export.translate import onnx_from_program
from causalrt.plugins.all_to_all import all_to_all
from causalrt.plugins.attention import attend, attention, kv_attention, kv_attention_in_place
from causalrt.plugins.rotate import rotate, rotate_pairs

# heads, channels of a head, query rows, new rows, filled slots: odd, prime, and R != N as a cut head has it
SIZES = [(1, 6, 1, 1, 1), (3, 10, 5, 7, 13), (2, 16, 11, 3, 3), (5, 8, 2, 9, 31)]


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotate_arguments(heads, head_dim, rows, dtype=torch.float32):
    angle = randn(1, 1, rows, head_dim // 2) * 100
    return randn(0, 1, rows, heads * head_dim, dtype=dtype), angle.cos(), angle.sin(), heads


def attention_arguments(heads, head_dim, rows, slots, dtype=torch.float32):
    width = heads * head_dim
    return *(randn(i, 1, n, width, dtype=dtype) for i, n in enumerate((rows, slots, slots))), heads


def kv_attention_arguments(heads, head_dim, rows, new, slots, dtype=torch.float32):
    lengths = (rows, new, new, slots, slots)
    return *(randn(i, 1, n, heads * head_dim, dtype=dtype) for i, n in enumerate(lengths)), heads


def softmax_in_float64(q, k, v, heads):
    q, k, v = (x[0].double().view(x.shape[1], heads, -1) for x in (q, k, v))
    scores = torch.einsum("rhd,lhd->hrl", q, k) / math.sqrt(q.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("hrl,lhd->rhd", weights / weights.sum(-1, keepdim=True), v).flatten(1)[None]


def run_onnx(module, arguments, num_outputs, tmp_path):
    """Outputs of `module` through the exporter and ONNX Runtime, and its graph's op types."""
    inputs = [f"in{i}" for i in range(len(arguments))]
    program = torch.export.export(module, arguments)
    model = onnx_from_program(program, input_names=inputs, output_names=[f"out{i}" for i in range(num_outputs)])
    path = tmp_path / "op.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: value.numpy() for name, value in zip(inputs, arguments, strict=True)})
    return [torch.from_numpy(value) for value in got], {node.op_type for node in model.graph}


class Rotate(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, x, cos, sin):
        return rotate(x, cos, sin, self.heads)


class Attention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, q, k, v):
        return attention(q, k, v, self.heads)


class KVAttention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, q, k_new, v_new, k_slots, v_slots):
        return kv_attention(q, k_new, v_new, k_slots, v_slots, self.heads)


# ---- the ops as torch sees them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    heads, head_dim, rows, new, slots = SIZES[1]
    torch.library.opcheck(rotate, rotate_arguments(heads, head_dim, rows, dtype))
    torch.library.opcheck(attention, attention_arguments(heads, head_dim, rows, slots, dtype))
    torch.library.opcheck(kv_attention, kv_attention_arguments(heads, head_dim, rows, new, slots, dtype))


def test_opcheck_on_prefix_views():
    # What an executor hands over: the filled prefix of longer slots.
    heads, head_dim, rows, new, slots = SIZES[1]
    q, k_new, v_new, k, v, _ = kv_attention_arguments(heads, head_dim, rows, new, 2 * slots)
    torch.library.opcheck(kv_attention, (q, k_new, v_new, k[:, :slots], v[:, :slots], heads))


def test_all_to_all_refuses_to_run_but_traces():
    with pytest.raises(NotImplementedError, match="executor"):
        all_to_all(torch.zeros(2, 3, 4))
    shape = all_to_all(torch.empty(2, 3, 4, device="meta")).shape
    assert shape == (2, 3, 4)


# ---- their meaning


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rotate_is_rotate_pairs(sizes):
    heads, head_dim, rows, *_ = sizes
    arguments = rotate_arguments(heads, head_dim, rows)
    assert torch.equal(rotate(*arguments), rotate_pairs(*arguments))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_against_float64(sizes):
    heads, head_dim, rows, _, slots = sizes
    arguments = attention_arguments(heads, head_dim, rows, slots)
    got = attention(*arguments)
    assert torch.equal(got, attend(*arguments))
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), softmax_in_float64(*arguments), rtol=0, atol=ONE_OP)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kv_attention_attends_over_new_and_old_rows(sizes):
    heads, _, _, new, _ = sizes
    q, k_new, v_new, k, v, _ = arguments = kv_attention_arguments(*sizes)
    out, k_written, v_written = kv_attention(*arguments)
    assert torch.equal(k_written, torch.cat([k_new, k[:, new:]], dim=1))
    assert torch.equal(v_written, torch.cat([v_new, v[:, new:]], dim=1))
    torch.testing.assert_close(out.double(), softmax_in_float64(q, k_written, v_written, heads), rtol=0, atol=ONE_OP)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kv_attention_equals_its_in_place_form(sizes):
    arguments = kv_attention_arguments(*sizes)
    before = [x.clone() for x in arguments[:-1]]
    functional = kv_attention(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=False)), (
        "the functional form wrote its input"
    )
    k, v = arguments[3], arguments[4]
    in_place = kv_attention_in_place(*arguments)
    assert in_place[1] is k
    assert in_place[2] is v
    for x, y in zip(functional, in_place, strict=True):
        assert torch.equal(x, y)


def test_in_place_form_writes_through_a_view_and_no_further():
    q, k_new, v_new, k, v, heads = kv_attention_arguments(3, 10, 5, 7, 26)
    k_before, v_before = k.clone(), v.clone()
    kv_attention_in_place(q, k_new, v_new, k[:, :13], v[:, :13], heads)
    for slots, new, before in ((k, k_new, k_before), (v, v_new, v_before)):
        assert torch.equal(slots[:, :7], new)
        assert torch.equal(slots[:, 7:], before[:, 7:])


def test_order_of_keys_does_not_matter():
    q, k, v, heads = attention_arguments(3, 10, 5, 13)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    shuffled = attend(q, k[:, order], v[:, order], heads)
    torch.testing.assert_close(shuffled, attend(q, k, v, heads), rtol=0, atol=ROUNDED)


# ---- their ONNX forms


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_onnx_rotate(sizes, tmp_path):
    heads, head_dim, rows, *_ = sizes
    *tensors, _ = rotate_arguments(heads, head_dim, rows)
    (got,), ops = run_onnx(Rotate(heads), tuple(tensors), 1, tmp_path)
    assert "RotaryEmbedding" in ops
    torch.testing.assert_close(got, rotate(*tensors, heads), rtol=0, atol=ROUNDED)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_onnx_attention(sizes, tmp_path):
    heads, head_dim, rows, _, slots = sizes
    *tensors, _ = attention_arguments(heads, head_dim, rows, slots)
    (got,), ops = run_onnx(Attention(heads), tuple(tensors), 1, tmp_path)
    assert ops == {"Attention"}
    torch.testing.assert_close(got, attention(*tensors, heads), rtol=0, atol=ONE_OP)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_onnx_kv_attention(sizes, tmp_path):
    *tensors, heads = kv_attention_arguments(*sizes)
    got, ops = run_onnx(KVAttention(heads), tuple(tensors), 3, tmp_path)
    assert ops == {"Attention", "TensorScatter"}
    out, k, v = kv_attention(*tensors, heads)
    torch.testing.assert_close(got[0], out, rtol=0, atol=ONE_OP)
    assert torch.equal(got[1], k)
    assert torch.equal(got[2], v)
