"""The passes of TensorRT's lowerings: what they hit, what they leave alone, and that the numbers stay."""

import math
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from support.tolerances import ROUNDED

from causalrt.export.dist_collective import OP, lower_exchanges_pass
from causalrt.export.passes import PassContext
from causalrt.export.scale_queries import scale_queries_pass
from causalrt.export.segment import cut_at_exchanges, is_cache_write
from causalrt.export.split_single_heads import split_single_heads_pass
from causalrt.plugins.all_to_all import ONNX_DOMAIN, ONNX_OP
from causalrt.proof.emulated_graph import emulate_precision, emulate_ranks

HEADER = '<ir_version: 10, opset_import: ["" : 24, "causalrt" : 1, "elsewhere" : 1]>\n'


def parse(text):
    return onnx.parser.parse_model(HEADER + text)


def copy_of(model):
    return onnx.ModelProto.FromString(model.SerializeToString())


def run(model, feeds):
    """Outputs by name; the graph is checked first. `feeds` may hold more than it reads."""
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: feeds[v.name] for v in session.get_inputs()}), strict=True))


def random(**shapes):
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def ops(model):
    return Counter(node.op_type for node in model.graph.node)


# ---- lower_exchanges_pass


EXCHANGES = """g (float[3,4,2] x) => (float[3,4,2] y)
<float[3,4,2] a, float[3,4,2] b, float[3,4,2] c>
{ a = Exp (x)
  b = causalrt.AllToAll (a)
  c = Neg (b)
  y = causalrt.AllToAll (c) }"""


def test_every_exchange_becomes_a_collective():
    model = parse(EXCHANGES)
    assert lower_exchanges_pass(model, PassContext(world_size=3)) == 2
    assert ops(model) == {"Exp": 1, "Neg": 1, OP: 2}
    for node in model.graph.node:
        if node.op_type == OP:
            assert node.domain == ONNX_DOMAIN
            settings = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            assert settings == {"collective_operation": b"all_to_all", "reduce_op": b"none", "root": -1, "nb_rank": 3}


def test_an_op_of_the_same_name_elsewhere_is_no_exchange():
    model = parse(EXCHANGES.replace("causalrt.", "elsewhere."))
    before = model.SerializeToString()
    assert lower_exchanges_pass(model, PassContext(world_size=3)) == 0
    assert model.SerializeToString() == before


def test_collectives_give_what_segments_and_the_runtime_give():
    model, ranks = parse(EXCHANGES), range(3)
    x = random(x=(3, 3, 4, 2))["x"]
    values = [{"x": x[rank]} for rank in ranks]
    for segment in cut_at_exchanges(copy_of(model)):
        for own in values:
            own |= run(segment.model, own) if segment.model.graph.node else {}
        if segment.sent is not None:
            for rank in ranks:
                values[rank][segment.received] = np.stack([other[segment.sent][rank] for other in values])
    lower_exchanges_pass(model, PassContext(world_size=3))
    got = run(emulate_ranks(model, 3), {f"r{rank}.x": x[rank] for rank in ranks})
    for rank in ranks:
        np.testing.assert_array_equal(got[f"r{rank}.y"], values[rank]["y"])


# ---- scale_queries_pass


FLAT = """g (float[1,5,12] q, float[1,7,12] k, float[1,7,12] v) => (float[1,5,12] y)
{ y = Attention <q_num_heads: int = 3, kv_num_heads: int = 3> (q, k, v) }"""
HEADS_SLOW = """g (float[1,3,5,4] q, float[1,3,7,4] k, float[1,3,7,4] v, int64[1] rows) => (float[1,3,5,4] y)
<float[1,3,5,4] negative>
{ negative = Neg (q)
  y = Attention (negative, k, v, , , , rows) }"""
FEEDS = {
    FLAT: random(q=(1, 5, 12), k=(1, 7, 12), v=(1, 7, 12)),
    HEADS_SLOW: random(q=(1, 3, 5, 4), k=(1, 3, 7, 4), v=(1, 3, 7, 4)) | {"rows": np.array([6])},
}


@pytest.mark.parametrize("text", [FLAT, HEADS_SLOW], ids=["flat", "heads-slow"])
def test_the_scale_goes_to_the_queries(text):
    model, feeds = parse(text), FEEDS[text]
    before = run(model, feeds)["y"]
    assert scale_queries_pass(model, PassContext(head_dim=4)) == 1
    assert ops(model)["Mul"] == 1
    assert "Cast" not in ops(model)
    (attention,) = (node for node in model.graph.node if node.op_type == "Attention")
    assert {attribute.name: attribute.f for attribute in attention.attribute}["scale"] == 1.0
    np.testing.assert_allclose(run(model, feeds)["y"], before, rtol=0, atol=ROUNDED)


def test_queries_of_a_low_precision_are_scaled_in_float32():
    model = parse(FLAT.replace("float[", "bfloat16["))
    reference = run(emulate_precision(model), FEEDS[FLAT])["y"]
    assert scale_queries_pass(model, PassContext(head_dim=4)) == 1
    assert [node.op_type for node in model.graph.node] == ["Cast", "Mul", "Cast", "Attention"]
    assert [node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"] == [
        TensorProto.FLOAT,
        TensorProto.BFLOAT16,
    ]
    # 1 / sqrt(4) is a power of two: scaling rounds nothing, whatever the precision.
    np.testing.assert_array_equal(run(emulate_precision(model), FEEDS[FLAT])["y"], reference)


def test_two_attentions_of_one_query_are_scaled_once_each():
    model = parse("""g (float[1,5,12] q, float[1,7,12] k, float[1,7,12] v) => (float[1,5,12] y, float[1,5,12] z)
    { y = Attention <q_num_heads: int = 3, kv_num_heads: int = 3> (q, k, v)
      z = Attention <q_num_heads: int = 3, kv_num_heads: int = 3> (q, v, k) }""")
    before = run(model, FEEDS[FLAT])
    assert scale_queries_pass(model, PassContext(head_dim=4)) == 2
    after = run(model, FEEDS[FLAT])
    for name in ("y", "z"):
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=ROUNDED)


def test_an_attention_elsewhere_is_not_scaled():
    model = parse(FLAT.replace("Attention", "elsewhere.Attention"))
    before = model.SerializeToString()
    assert scale_queries_pass(model, PassContext(head_dim=4)) == 0
    assert model.SerializeToString() == before


def test_an_attention_with_a_scale_of_its_own_is_not_expected():
    model = parse(FLAT.replace("q_num_heads", "scale: float = 0.5, q_num_heads"))
    with pytest.raises(AssertionError):
        scale_queries_pass(model, PassContext(head_dim=4))


# ---- split_single_heads_pass


def single_flat(rows):
    text = f"""g (float[1,{rows},4] q, float[1,7,4] k, float[1,7,4] v) => (float[1,{rows},4] y)
    {{ y = Attention <q_num_heads: int = 1, kv_num_heads: int = 1> (q, k, v) }}"""
    return parse(text), random(q=(1, rows, 4), k=(1, 7, 4), v=(1, 7, 4))


def single_heads_slow(rows):
    text = f"""g (float[1,1,{rows},4] q, float[1,1,7,4] k, float[1,1,7,4] v, int64[1] n) => (float[1,1,{rows},4] y)
    <float[1,1,{rows},4] negative>
    {{ negative = Neg (q)
       y = Attention (negative, k, v, , , , n) }}"""
    return parse(text), random(q=(1, 1, rows, 4), k=(1, 1, 7, 4), v=(1, 1, 7, 4)) | {"n": np.array([5])}


@pytest.mark.parametrize("make", [single_flat, single_heads_slow], ids=["flat", "heads-slow"])
@pytest.mark.parametrize(("rows", "groups"), [(6, 2), (9, 3), (35, 5), (7, 7)])
def test_a_single_head_is_split_by_its_rows(make, rows, groups):
    model, feeds = make(rows)
    before = run(model, feeds)["y"]
    assert split_single_heads_pass(model, PassContext()) == 1
    (attention,) = (node for node in model.graph.node if node.op_type == "Attention")
    assert "q_num_heads" not in {attribute.name for attribute in attention.attribute}
    (queries,) = (value for value in model.graph.value_info if value.name == attention.input[0])
    assert [size.dim_value for size in queries.type.tensor_type.shape.dim] == [1, groups, rows // groups, 4]
    assert list(model.graph.node[-1].output) == ["y"]
    np.testing.assert_allclose(run(model, feeds)["y"], before, rtol=0, atol=ROUNDED)


def test_a_split_head_is_scaled_like_any_other():
    model, feeds = single_heads_slow(6)
    before = run(model, feeds)["y"]
    split_single_heads_pass(model, PassContext())
    assert scale_queries_pass(model, PassContext(head_dim=4)) == 1
    np.testing.assert_allclose(run(model, feeds)["y"], before, rtol=0, atol=ROUNDED)


@pytest.mark.parametrize(
    "model",
    [
        single_flat(1)[0],
        parse(FLAT),
        parse(HEADS_SLOW),
        parse(FLAT.replace("int = 3", "int = 1").replace("Attention", "elsewhere.Attention")),
    ],
    ids=["one row", "three heads", "three heads, heads slow", "elsewhere"],
)
def test_what_is_no_single_head_or_has_one_row_stays(model):
    before = model.SerializeToString()
    assert split_single_heads_pass(model, PassContext()) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("change", ["is_causal: int = 1, q_num_heads", "mask"])
def test_a_single_head_with_a_mask_is_not_expected(change):
    text = """g (float[1,6,4] q, float[1,7,4] k, float[1,7,4] v, float[6,7] m) => (float[1,6,4] y)
    { y = Attention <q_num_heads: int = 1, kv_num_heads: int = 1> (q, k, v) }"""
    text = text.replace("(q, k, v) }", "(q, k, v, m) }") if change == "mask" else text.replace("q_num_heads", change)
    with pytest.raises(AssertionError, match="query rows"):
        split_single_heads_pass(parse(text), PassContext())


# ---- cut_at_exchanges at cache writes


CACHED = """g (float[2,3,2] x, float[1,L,2] k, float[1,L,2] v) => (float[1,6,2] y, float[1,L,2] kw, float[1,L,2] vw)
<int64[3] flat = {1, 6, 2}, float[2,3,2] sent, float[2,3,2] got, float[1,6,2] new_k, float[1,6,2] new_v, float[1,6,2] q,
 float[1,6,2] out>
{ sent = Exp (x)
  got = causalrt.AllToAll (sent)
  new_k = Reshape (got, flat)
  new_v = Neg (new_k)
  q = Sin (new_k)
  kw = TensorScatter <axis: int = 1> (k, new_k)
  vw = TensorScatter <axis: int = 1> (v, new_v)
  out = Attention <q_num_heads: int = 1, kv_num_heads: int = 1> (q, kw, vw)
  y = Add (out, q) }"""


def test_a_cut_at_cache_writes_gives_the_same_numbers():
    # One rank of one: its exchange gives back what it sent, and the whole graph has an Identity in its place.
    feeds = random(x=(2, 3, 2), k=(1, 9, 2), v=(1, 9, 2))
    whole = run(parse(CACHED.replace("causalrt.AllToAll", "Identity")), feeds)
    segments = cut_at_exchanges(parse(CACHED), at_cache_writes=True)
    values = {"x": feeds["x"]}
    slots = {"kw": feeds["k"].copy(), "vw": feeds["v"].copy()}
    for segment in segments:
        values |= run(segment.model, values)
        if segment.sent is not None:
            values[segment.received] = values[segment.sent]
        for source, target in segment.writes.items():
            slots[target][:, : values[source].shape[1]] = values[source]
            values[target] = slots[target]
    np.testing.assert_array_equal(values["y"], whole["y"])
    for name in ("kw", "vw"):
        np.testing.assert_array_equal(slots[name], whole[name])


def test_segments_say_what_they_send_and_write_and_hold_no_write():
    first, second, third = cut_at_exchanges(parse(CACHED), at_cache_writes=True)
    assert (first.sent, first.received, first.writes) == ("sent", "got", {})
    assert (second.sent, second.received, second.writes) == (None, None, {"new_k": "kw", "new_v": "vw"})
    assert (third.sent, third.received, third.writes) == (None, None, {})
    graphs = [segment.model.graph for segment in (first, second, third)]
    read = [{value.name for value in graph.input} for graph in graphs]
    made = [{value.name for value in graph.output} for graph in graphs]
    assert read == [{"x"}, {"got"}, {"new_k", "kw", "vw"}], "what is read last is computed last"
    assert {"sent"} == made[0]
    assert {"new_k", "new_v"} <= made[1]
    assert made[2] == {"y"}, "the slots are the runtime's, no segment returns them"
    assert not any(is_cache_write(node) for graph in graphs for node in graph.node)


def test_writes_are_cut_at_only_where_that_is_asked_for():
    segments = cut_at_exchanges(parse(CACHED))
    assert [segment.writes for segment in segments] == [{}, {}]
    assert sum(ops(segment.model)["TensorScatter"] for segment in segments) == 2


def test_a_write_elsewhere_is_no_border():
    model = parse(CACHED.replace("TensorScatter", "elsewhere.TensorScatter").replace("causalrt.", "elsewhere."))
    (segment,) = cut_at_exchanges(model, at_cache_writes=True)
    assert segment.model is model


def test_the_constant_of_the_scale_is_the_root_of_the_head():
    model = parse(FLAT)
    scale_queries_pass(model, PassContext(head_dim=80))
    (constant,) = model.graph.initializer
    assert numpy_helper.to_array(constant) == np.float32(1 / math.sqrt(80))


def test_the_exchange_is_the_op_that_the_trace_marks():
    assert {(n.domain, n.op_type) for n in parse(EXCHANGES).graph.node if n.domain} == {(ONNX_DOMAIN, ONNX_OP)}
