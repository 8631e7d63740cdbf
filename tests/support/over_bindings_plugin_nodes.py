"""The plugins' nodes of whole graphs, taken through a build by NVIDIA's own Python over NVIDIA's own bindings.

`test_plugin_nodes.py` starts this file in a process that `real_bindings` has prepared.
"""

import pytest
from onnx import helper

from causalrt.plugins.tensorrt_plugin import register_plugins
from support import library_double as library
from support.fused_step import SPEC_BY_NAME, with_plugins


@pytest.fixture
def build_plugin(tmp_path):
    """What TensorRT makes of a plugin's node: (name, inputs, attributes) -> Built."""
    trt, api = library.imported(), library.plugin_api()
    register_plugins(trt, target=80, cache=tmp_path)
    yield trt, lambda name, inputs, attributes: library.build_with_library(trt, api, name, inputs, attributes)
    register_plugins.cache_clear()


@pytest.mark.parametrize(("num_multiprocessors", "num_nodes"), [(1, 4), (512, 6)])
def test_every_node_is_what_its_plugin_declares(build_plugin, num_multiprocessors, num_nodes):
    # Output shapes and types that the plugins derive are those that the graph has, through TensorRT's own Python.
    trt, build = build_plugin
    _, model, _, _ = with_plugins(2, num_multiprocessors=num_multiprocessors, frames=300)
    kinds = {1: "FLOAT", 6: "INT32", 7: "INT64", 16: "BF16"}
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    known = {value.name: value.type.tensor_type for value in values}
    types = {
        name: (getattr(trt.DataType, kinds[kind.elem_type]), tuple(size.dim_value for size in kind.shape.dim))
        for name, kind in known.items()
    }
    for tensor in model.graph.initializer:
        types[tensor.name] = (getattr(trt.DataType, kinds[tensor.data_type]), tuple(tensor.dims))
    checked = 0
    for node in model.graph.node:
        if node.op_type not in SPEC_BY_NAME:
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        built = build(node.op_type, [types[name] for name in node.input], attributes)
        made = list(zip(built.dtypes, built.shapes, strict=True))
        for name, (dtype, shape) in zip(node.output, made, strict=True):
            assert types.setdefault(name, (dtype, tuple(shape))) == (dtype, tuple(shape)), name
        spec = SPEC_BY_NAME[node.op_type]
        aliases = [spec.inputs.index(name) for name in spec.in_place]
        assert built.aliases == [-1] * len(spec.outputs) + aliases
        outputs = {value.name for value in model.graph.output}
        for position in range(len(spec.outputs), len(node.output)):  # written in place: bound to its input's address
            source = node.input[built.aliases[position]]
            assert node.output[position] == f"{source}.written"
            assert node.output[position] in outputs
        checked += 1
    assert checked == num_nodes
