import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript.values import Opset
from support.interpreter import run_in_interpreter
from support.qk_norm_rope_cases import CASES, check, operands
from support.tolerances import QK_NORM_ROPE
from torch import nn

import causalrt.plugins.qk_norm_rope as qk_norm_rope_module
from causalrt.errors import KernelError, OperandError
from causalrt.plugins.qk_norm_rope import onnx_qk_norm_rope, qk_norm_rope, qk_norm_rope_rows, write_rows
from causalrt.proof.emulated_graph import emulate_precision

DTYPES = list(QK_NORM_ROPE)
OPSET = 24


# ---- the reference and the op


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_against_float64(case, dtype):
    given = operands(case, dtype)
    got = qk_norm_rope(*given.arguments)
    check(got, given, QK_NORM_ROPE[dtype])
    assert got.dtype == dtype
    assert torch.equal(got, qk_norm_rope_rows(*given.arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(qk_norm_rope, operands(CASES[0], dtype).arguments)


def test_one_rank_gets_its_own_rows():
    given = operands(CASES[-1], torch.float32)
    q, k, v = qk_norm_rope(*given.arguments).view(3, *given.q.shape)
    assert torch.equal(v, given.v)
    assert torch.equal(q[0], torch.zeros_like(q[0]))  # a row of zeros stays one
    normed = given.k * (given.k.square().mean(1, keepdim=True) + given.eps).rsqrt() * given.norm_k
    lengths = [x.unflatten(1, (-1, 2)).norm(dim=-1) for x in (k, normed)]
    torch.testing.assert_close(*lengths)  # rotation keeps them


# ---- the kernel


def test_kernel_in_the_interpreter():
    run_in_interpreter("interpreted_qk_norm_rope.py")


def write(given, **changed):
    given = given._replace(**changed)
    out = given.q.new_empty(given.out_rows, 2 * given.cos.shape[-1])
    write_rows(out, *given[:7], given.destinations, given.eps)


def test_kernel_is_not_interpreted_unasked():
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        write(operands(CASES[0], torch.float32))


def test_missing_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    qk_norm_rope_module._plan.cache_clear()  # plans that other tests have left need no Triton
    with pytest.raises(KernelError, match="pip install 'triton"):
        write(operands(CASES[0], torch.float32))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda k: k[:, :-1], "k must be"),
        ("v", lambda v: v.half(), "v must be .* torch.float32, .* got .* torch.float16"),
        ("v", lambda v: v.t().contiguous().t(), "v has strides"),
        ("norm_q", lambda w: w[:1], "norm_q must be"),
        ("cos", lambda t: t.double(), "cos must be .* torch.float32, .* torch.float64"),
        ("sin", lambda t: t[0], "sin must be"),
        ("destinations", lambda t: t.long(), "destinations must be .* torch.int32"),
        ("destinations", lambda t: t[0], r"\[3, S, H, M\]"),
        ("destinations", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "destinations has strides"),
    ],
)
def test_operands_that_do_not_fit_are_refused(name, change, message):
    given = operands(CASES[0], torch.float32)
    with pytest.raises(OperandError, match=message):
        write(given, **{name: change(getattr(given, name))})


def test_odd_heads_are_refused():
    given = operands(CASES[0], torch.float32)
    with pytest.raises(OperandError, match="even number"):
        write_rows(given.q.new_empty(1, 3), *given[:7], given.destinations, given.eps)


# ---- the ONNX form


class Rows(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.register_buffer("destinations", given.destinations)
        self.rest = (given.num_heads, given.eps, given.out_rows)

    def forward(self, *operands):
        return qk_norm_rope(*operands, self.destinations, *self.rest)


def model_from_operands(given):
    op = Opset("", OPSET)

    def translated(q, k, v, norm_q, norm_k, cos, sin, destinations, num_heads: int, eps: float, out_rows: int):
        return onnx_qk_norm_rope(op, q, k, v, norm_q, norm_k, cos, sin, destinations, num_heads, eps, out_rows)

    exported = torch.onnx.export(
        torch.export.export(Rows(given), tuple(given[:7])),
        opset_version=OPSET,
        input_names=given._fields[:7],
        output_names=["rows"],
        custom_translation_table={torch.ops.causalrt.qk_norm_rope.default: translated},
        verbose=False,
    )
    return ir.to_proto(exported.model)


def run_onnx(model, feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["rows"], feeds)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnx_form_against_float64(case, dtype):
    given = operands(case, dtype)
    model = model_from_operands(given)
    onnx.checker.check_model(model, full_check=True)
    own = {node.op_type for node in model.graph.node} - {"Constant", "Unsqueeze", "Cast", "CastLike"}
    assert own == {"RMSNormalization", "RotaryEmbedding", "Reshape", "Concat", "Gather"}
    assert {node.domain for node in model.graph.node} == {""}
    if dtype == torch.bfloat16:  # NumPy has no such type: float32, rounded where the graph would
        model, carrier = emulate_precision(model), np.float32
    else:
        carrier = {torch.float32: np.float32, torch.float16: np.float16}[dtype]
    feeds = {
        name: x.float().numpy().astype(carrier if x.dtype == dtype else np.float32)
        for name, x in zip(given._fields[:7], given, strict=False)
    }
    check(run_onnx(model, feeds), given, QK_NORM_ROPE[dtype])
