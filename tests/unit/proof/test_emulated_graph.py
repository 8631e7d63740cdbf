"""All ranks in one graph, and low precision in float32: what is emulated, what is refused, and the numbers."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from causalrt.proof.emulated_graph import emulate_precision, emulate_ranks

HEADER = '<ir_version: 10, opset_import: ["" : 24, "causalrt" : 1]>\n'
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(text):
    return onnx.parser.parse_model(HEADER + text)


def run(model, feeds):
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


# ---- emulate_ranks


COLLECTIVE = (
    '<collective_operation: string = "all_to_all", reduce_op: string = "none", root: int = -1, nb_rank: int = 3>'
)
STEP = f"""g (float[3,2] x, float[2] m) => (float[3,2] y, float[3,2] kept)
<float[2] w = {{2.0, -1.0}}, float[3,2] sent, float[3,2] got>
{{ sent = Mul (x, w)
   got = causalrt.DistCollective {COLLECTIVE} (sent)
   kept = Clip (got, , )
   y = Add (got, m) }}"""


def test_ranks_exchange_blocks_and_share_constants():
    model = parse(STEP)
    before = model.SerializeToString()
    emulated = emulate_ranks(model, 3)
    assert model.SerializeToString() == before
    assert [tensor.name for tensor in emulated.graph.initializer] == ["w"]
    assert not any(node.domain for node in emulated.graph.node)
    x = np.random.default_rng(0).standard_normal((3, 3, 2)).astype(np.float32)
    m = np.arange(6, dtype=np.float32).reshape(3, 2)
    got = run(emulated, {f"r{r}.x": x[r] for r in range(3)} | {f"r{r}.m": m[r] for r in range(3)})
    sent = x * np.array([2, -1], dtype=np.float32)
    for rank in range(3):
        received = np.stack([sent[source][rank] for source in range(3)])
        np.testing.assert_array_equal(got[f"r{rank}.kept"], received)
        np.testing.assert_array_equal(got[f"r{rank}.y"], received + m[rank])


def test_one_rank_without_an_exchange_is_itself():
    emulated = emulate_ranks(parse("g (float[2] x) => (float[2] y) { y = Neg (x) }"), 1)
    assert [node.op_type for node in emulated.graph.node] == ["Neg"]
    np.testing.assert_array_equal(run(emulated, {"r0.x": np.float32([1, 2])})["r0.y"], [-1, -2])


@pytest.mark.parametrize(
    ("text", "world_size", "message"),
    [
        (STEP, 2, "no all-to-all over 2"),
        (STEP.replace("all_to_all", "all_gather"), 3, "all_gather"),
        (STEP.replace(f"DistCollective {COLLECTIVE}", "AllToAll"), 3, "AllToAll"),
        ("g (float[2] x) => (float[2] y) { y = Neg (x) }", 3, "no DistCollective"),
    ],
    ids=["other ranks", "other collective", "not lowered", "no exchange"],
)
def test_what_is_no_exchange_of_these_ranks_is_refused(text, world_size, message):
    with pytest.raises(ValueError, match=message):
        emulate_ranks(parse(text), world_size)


# ---- emulate_precision


def low_model(kind):
    """Gemm, a Cast to float32, an op in float32, a Cast back, an Add of a broadcast weight."""
    model = parse(f"""g ({kind}[3,4] x, int64[1] n) => ({kind}[3,5] y, float[3,5] wide, int64[1] m)
    <{kind}[3,5] h, float[3,5] s, {kind}[3,5] t>
    {{ h = Gemm (x, weight, bias)
       wide = Cast <to: int = 1> (h)
       s = Sin (wide)
       t = Cast <to: int = {getattr(TensorProto, kind.upper())}> (s)
       y = Add (t, bias)
       m = Neg (n) }}""")
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator).to(LOW[kind]) for shape in ((4, 5), (5,)))
    for name, tensor in (("weight", weight), ("bias", bias)):
        values = tensor.float().flatten().tolist()
        made = helper.make_tensor(name, getattr(TensorProto, kind.upper()), tensor.shape, values)
        model.graph.initializer.append(made)
    return model, weight, bias


@pytest.mark.parametrize("kind", LOW)
def test_every_low_value_is_rounded_as_it_arises(kind):
    model, weight, bias = low_model(kind)
    before = model.SerializeToString()
    emulated = emulate_precision(model)
    assert model.SerializeToString() == before
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    got = run(emulated, {"x": x.numpy(), "n": np.array([3])})

    def rounded(value):
        return value.to(LOW[kind]).float()

    h = rounded((rounded(x).double() @ weight.double() + bias.double()).float())
    y = rounded(rounded(h.sin()) + bias.float())
    np.testing.assert_array_equal(got["wide"], h.numpy())
    np.testing.assert_array_equal(got["y"], y.numpy())
    assert got["m"] == [-3]
    unrounded = (x @ weight.float() + bias.float()).sin() + bias.float()
    assert not torch.equal(unrounded, y), "the casts would show if they were optimised away"


@pytest.mark.parametrize(("kind", "largest"), [("bfloat16", np.float32(65520)), ("float16", np.inf)])
def test_what_a_type_cannot_hold_overflows(kind, largest):
    model = parse(f"g ({kind}[1] x) => ({kind}[1] y) {{ y = Add (x, x) }}")
    got = run(emulate_precision(model), {"x": np.float32([32760])})["y"]
    assert got == torch.tensor([largest]).to(LOW[kind]).float().numpy()


def test_a_float32_graph_stays_as_it_is():
    model = parse("g (float[3] x, int64[3] i) => (float[3] y) { f = Cast <to: int = 1> (i) y = Mul (x, f) }")
    emulated = emulate_precision(model)
    assert [node.op_type for node in emulated.graph.node] == ["Cast", "Mul"]
    feeds = {"x": np.float32([1 / 3, 2, 3]), "i": np.array([1, 2, 3])}
    np.testing.assert_array_equal(run(emulated, feeds)["y"], run(model, feeds)["y"])


def test_a_value_of_unknown_type_is_refused():
    model = parse("g (bfloat16[3] x) => (bfloat16[3] y) { a = causalrt.Unknown (x) y = Neg (a) }")
    with pytest.raises(ValueError, match="'a' \\(Unknown\\)"):
        emulate_precision(model)


def test_a_low_constant_in_an_attribute_is_refused():
    model = parse("g (float16[3] x) => (float16[3] y) { y = Add (x, c) }")
    constant = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.FLOAT16, [1], [1.0]))
    model.graph.node.insert(0, constant)
    with pytest.raises(ValueError, match="Constant"):
        emulate_precision(model)


def test_ranks_and_precision_together():
    text = STEP.replace("float[", "bfloat16[").replace("{2.0, -1.0}", "{16384, 49024}")  # the bits of 2 and -1
    x = torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0))
    feeds = {f"r{r}.x": x[r].numpy() for r in range(3)} | {f"r{r}.m": np.float32([0, 0]) for r in range(3)}
    one = run(emulate_precision(emulate_ranks(parse(text), 3)), feeds)
    other = run(emulate_ranks(emulate_precision(parse(text)), 3), feeds)
    sent = x.bfloat16().float() * torch.tensor([2.0, -1.0])
    for rank in range(3):
        np.testing.assert_array_equal(one[f"r{rank}.y"], sent[:, rank].numpy())
        np.testing.assert_array_equal(other[f"r{rank}.y"], sent[:, rank].numpy())
