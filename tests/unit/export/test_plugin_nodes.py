from collections import Counter

import onnx
import pytest
from onnx import helper
from support import SUPPORT, real_bindings
from support.fused_step import apply_plugins, expanded, fused_step, with_plugins
from support.interpreter import run_tests

from causalrt.errors import BuildError, ExecutorError
from causalrt.export import engine_worker
from causalrt.export.dist_collective import lower_exchanges_pass
from causalrt.export.engine_worker import PluginDevice, graph_with_plugins, parse
from causalrt.export.passes import PassContext
from causalrt.plugins.all_to_all import ONNX_DOMAIN


@pytest.mark.parametrize("world_size", [1, 2])
def test_functions_go_and_nodes_stay(world_size):
    config, model, before, counts = with_plugins(world_size)
    shards = {1: 1, 2: 2}[world_size]
    assert counts == dict.fromkeys(["qk_norm_rope", f"rope_attention_{shards}"], config.model.num_layers)
    assert not model.functions
    assert {name for node in model.graph.node for name in node.output} == before
    found = Counter(node.op_type for node in model.graph.node if node.domain == ONNX_DOMAIN)
    found.pop("AllToAll", None)
    assert found == counts


def test_keys_are_split_where_the_gpu_is_not_full():
    config, model, before, counts = with_plugins(2, num_multiprocessors=512, frames=300)
    layers = config.model.num_layers
    assert counts == dict.fromkeys(["qk_norm_rope", "rope_attention_split_2", "combine_splits"], layers)
    producers = {name: node for node in model.graph.node for name in node.output}
    assert before <= set(producers)
    for node in model.graph.node:
        if node.op_type == "combine_splits":
            split = producers[node.input[0]]
            assert split.op_type == "rope_attention_split_2"
            assert list(split.output[:2]) == list(node.input)
            (kv_splits,) = (attribute.i for attribute in split.attribute if attribute.name == "kv_splits")
            assert kv_splits > 1
    order = {name: number for number, node in enumerate(model.graph.node) for name in node.output}
    for number, node in enumerate(model.graph.node):
        assert all(order.get(name, -1) < number for name in node.input)


def test_every_node_is_what_its_plugin_declares(tmp_path):
    run_tests(SUPPORT / "over_bindings_plugin_nodes.py", real_bindings.environment(tmp_path))


# ---- what is refused


def test_a_graph_without_fused_ops_is_an_error():
    _, model = fused_step(2)
    with pytest.raises(RuntimeError, match="use_plugins_pass had 0 hits and must have 1 at least"):
        apply_plugins(expanded(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: node.attribute.pop(), "attributes .* declares"),
        (lambda node: node.input.pop(), "7 inputs"),
        (lambda node: node.attribute.append(helper.make_attribute("more", 1)), "'more'"),
    ],
)
def test_nodes_of_another_form_are_refused(change, message):
    _, model = fused_step(1)
    change(next(node for node in model.graph.node if node.op_type == "qk_norm_rope"))
    with pytest.raises(BuildError, match=message):
        apply_plugins(model)


def test_nodes_are_checked_though_their_function_is_gone():
    _, model = fused_step(1)
    del model.functions[:]
    node = next(node for node in model.graph.node if node.op_type == "rope_attention_1")
    del node.attribute[:]
    with pytest.raises(BuildError, match=r"the attributes \[\]"):
        apply_plugins(model)


def test_an_op_without_a_plugin_is_named():
    _, model = fused_step(1)
    for node in (*model.graph.node, *model.functions):
        if isinstance(node, onnx.FunctionProto) and node.name == "rope_attention_1":
            node.name = "rope_attention_1_rotated"
        elif isinstance(node, onnx.NodeProto) and node.op_type == "rope_attention_1":
            node.op_type = "rope_attention_1_rotated"
    with pytest.raises(BuildError, match="no plugin rope_attention_1_rotated"):
        apply_plugins(model)


# ---- in the process that builds


DEVICE = PluginDevice(capability=80, num_multiprocessors=108)


def test_tensorrt_without_plugins_is_told_so(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    _, model = fused_step(1)
    onnx.save(model, tmp_path / "step.onnx")
    with pytest.raises(ExecutorError, match="plugins off"):
        graph_with_plugins(trt, tmp_path / "step.onnx", DEVICE)


def test_a_graph_without_functions_is_parsed_from_its_file(tmp_path):
    _, model = fused_step(1)
    onnx.save(expanded(model), tmp_path / "step.onnx")
    assert graph_with_plugins(None, tmp_path / "step.onnx", DEVICE) == (None, {})


def test_a_changed_graph_finds_its_weights_beside_the_file(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    _, model = fused_step(1, precision="bfloat16")
    lower_exchanges_pass(model, PassContext(world_size=1))
    path = tmp_path / "step.onnx"
    onnx.save(expanded(model), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    graph = onnx.load(path, load_external_data=False)
    graph.graph.output.pop()
    log = engine_worker._make_log(trt)
    _builder, network, _parser = parse(trt, log.logger, path, graph.SerializeToString())
    assert network.num_outputs == len(graph.graph.output)
