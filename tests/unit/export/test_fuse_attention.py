import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from support.tolerances import ROUNDED

from causalrt.config import override
from causalrt.export.fuse_attention import RUNTIME_DOMAIN, RUNTIME_OP, fuse_attention_pass
from causalrt.export.onnx import runtime_graph
from causalrt.export.passes import PassContext
from causalrt.recipes import recipe

HEADER = '<ir_version: 10, opset_import: ["" : 24, "causalrt" : 1]>\n'
PLAIN = (
    "y = Attention <q_num_heads: int = 3, kv_num_heads: int = 3, is_causal: int = 0, softcap: float = 0.0> (q, k, v)"
)
SIGNATURE = "g (float[1,5,12] q, float[1,rows,12] k, float[1,rows,12] v) => (float[1,5,12] y)"


def parse(body, *, functions="", signature=SIGNATURE):
    return onnx.parser.parse_model(f"{HEADER}{signature} {{ {body} }}{functions}")


def run(model, rows=7):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    shapes = {"q": (1, 5, 12), "k": (1, rows, 12), "v": (1, rows, 12)}
    feeds = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return session.run(None, feeds)[0]


def kinds(body):
    return [(node.domain, node.op_type) for node in body.node]


@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_the_runtimes_own_attention_gives_the_same(rows):
    model = parse(PLAIN)
    before = run(model, rows)
    assert fuse_attention_pass(model, PassContext()) == 1
    assert kinds(model.graph) == [(RUNTIME_DOMAIN, RUNTIME_OP)]
    np.testing.assert_allclose(run(model, rows), before, rtol=0, atol=ROUNDED)


def test_what_is_imported_already_is_not_imported_again():
    model = parse(PLAIN)
    model.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
    assert fuse_attention_pass(model, PassContext()) == 1
    assert [opset.domain for opset in model.opset_import].count(RUNTIME_DOMAIN) == 1
    onnx.checker.check_model(model)


def test_attentions_in_functions_are_replaced():
    functions = f"""
    <domain: "causalrt", opset_import: ["" : 24]>
    attend (q, k, v) => (y) {{ {PLAIN} }}"""
    model = parse("y = causalrt.attend (q, k, v)", functions=functions)
    before = run(model)
    assert fuse_attention_pass(model, PassContext()) == 1
    assert kinds(model.functions[0]) == [(RUNTIME_DOMAIN, RUNTIME_OP)]
    np.testing.assert_allclose(run(model), before, rtol=0, atol=ROUNDED)


@pytest.mark.parametrize(
    "body",
    [
        PLAIN.replace("is_causal: int = 0", "is_causal: int = 1"),
        PLAIN.replace("softcap: float = 0.0", "softcap: float = 5.0"),
        PLAIN.replace("softcap: float = 0.0", "scale: float = 0.5"),
        PLAIN.replace("(q, k, v)", "(q, k, v, q)"),
        PLAIN.replace("y = ", "y, present = "),
        PLAIN.replace("kv_num_heads: int = 3", "kv_num_heads: int = 1"),
        PLAIN.replace("q_num_heads: int = 3, kv_num_heads: int = 3, ", ""),
        PLAIN.replace("Attention", "causalrt.Attention"),
    ],
    ids=["causal", "capped", "scaled", "masked", "with outputs more", "grouped", "heads slow", "of another domain"],
)
def test_an_attention_of_another_kind_stays(body):
    model = parse(body)
    before = model.SerializeToString()
    assert fuse_attention_pass(model, PassContext()) == 0
    assert model.SerializeToString() == before


def test_a_step_whose_attentions_are_not_all_found_is_refused():
    config = override(recipe("tiny"), {"model.num_layers": "1"})
    step = parse(PLAIN)  # one attention, where a layer has two
    with pytest.raises(RuntimeError, match="fuse_attention_pass had 1 hits and must have 2"):
        runtime_graph(step, config)
    assert kinds(step.graph) == [("", "Attention")]


def test_other_types_keep_the_standard_attention():
    config = override(recipe("tiny"), {"build.precision": "bfloat16"})
    step = parse(PLAIN)
    assert runtime_graph(step, config) is step
