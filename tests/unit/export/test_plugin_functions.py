from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.fused_step import expanded, fused_step
from support.tolerances import FUSED_OP
from torch import nn

from causalrt.export.passes import PassContext
from causalrt.export.plugin_functions import NODE_FORMS, check_fused_nodes, expand_functions_pass
from causalrt.export.segment import cut_at_exchanges
from causalrt.export.translate import onnx_from_program
from causalrt.layout import layout_from_config
from causalrt.plugins.all_to_all import ONNX_DOMAIN
from causalrt.plugins.plugin_specs import SPECS
from causalrt.plugins.rope_attention import rope_attention


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_layer_calls_one_function_of_each_kind(world_size):
    config, model = fused_step(world_size)
    shards = len(layout_from_config(config).shards)
    names = {"qk_norm_rope", f"rope_attention_{shards}"}
    assert {function.name for function in model.functions} == names
    called = Counter(node.op_type for node in model.graph.node if node.domain == ONNX_DOMAIN)
    assert {name: called[name] for name in names} == dict.fromkeys(names, config.model.num_layers)
    check_fused_nodes(model, num_layers=config.model.num_layers)
    forms = {spec.name: spec for spec in SPECS}
    for function in model.functions:
        assert function.domain == ONNX_DOMAIN
        assert tuple(function.input) == forms[function.name].inputs
        assert set(function.attribute) == set(forms[function.name].attributes)
        assert len(function.output) == forms[function.name].num_outputs
        assert {node.domain for node in function.node} == {""}
    if world_size == 1:  # AllToAll, an op without a function, is unknown to the checker
        onnx.checker.check_model(model, full_check=True)


def test_exchange_order_is_not_spelled_out_in_a_function():
    # It is an input, and a constant of the graph once: at 1.3B on 8 ranks it has 42,120 places.
    _, model = fused_step(2)
    numbers = [
        max(len(attribute.ints), attribute.t.ByteSize()) if attribute.type != onnx.AttributeProto.INT else 1
        for function in model.functions
        for node in function.node
        if node.op_type == "Constant"
        for attribute in node.attribute
    ]
    assert numbers
    assert max(numbers) <= 16


def test_a_layer_without_fused_ops_is_an_error():
    config, model = fused_step(2)
    with pytest.raises(RuntimeError, match=r"each of 3 layers must have .* found \{'qk_norm_rope': 2"):
        check_fused_nodes(model, num_layers=3)
    plain = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    with pytest.raises(RuntimeError, match=r"found \{\}"):
        check_fused_nodes(plain, num_layers=config.model.num_layers)


def test_expanded_graph_has_standard_ops_and_types():
    _, model = fused_step(2, precision="bfloat16")
    graph = expanded(model)
    assert not graph.functions
    assert {node.op_type for node in graph.graph.node if node.domain} == {"AllToAll"}
    known = {value.name for value in (*graph.graph.value_info, *graph.graph.output)}
    assert {name for node in graph.graph.node for name in node.output if name} <= known
    assert expand_functions_pass(graph, PassContext()) == 0


def test_segments_keep_the_functions_that_they_call():
    config, model = fused_step(2, whole_slots=False)
    segments = cut_at_exchanges(model)
    assert len(segments) == 2 * config.model.num_layers + 1
    for segment in segments:
        called = {node.op_type for node in segment.model.graph.node if node.domain == ONNX_DOMAIN}
        assert called <= {function.name for function in segment.model.functions}
        assert called <= set(NODE_FORMS)


class Twice(nn.Module):
    """Two calls over slots of different lengths."""

    def forward(self, received, short, long, kv_rows, more_rows):
        out, *_ = rope_attention(received, short, kv_rows, [], [2], [1], 6)
        return rope_attention(out.repeat(1, 3, 1), long, more_rows, [], [2], [1], 6)


def test_one_function_serves_slots_of_every_length(tmp_path):
    torch.manual_seed(0)
    received, short, long = torch.randn(2, 18, 8), torch.randn(2, 1, 9, 16), torch.randn(2, 1, 31, 16)
    arguments = (received, list(short), list(long), torch.tensor([9]), torch.tensor([31]))
    inputs = ["received", "k", "v", "k_long", "v_long", "kv_rows", "more_rows"]
    model = onnx_from_program(
        torch.export.export(Twice(), arguments), input_names=inputs, output_names=["out", "k_written", "v_written"]
    )
    path = tmp_path / "twice.onnx"
    onnx.save(ir.to_proto(model), path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    tensors = [received, *short, *long, arguments[3], arguments[4]]
    feeds = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
    for got, wanted in zip(session.run(None, feeds), Twice()(*arguments), strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), atol=FUSED_OP)
