from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.torch import save_file
from support.tolerances import ONE_OP
from torch import nn

from causalrt.config import override
from causalrt.export.onnx import step_names, with_shared_weights
from causalrt.export.segment import cut_at_exchanges, is_exchange
from causalrt.export.share_weights import weight_offsets
from causalrt.export.trace import trace_step
from causalrt.export.translate import OPSET, onnx_from_program
from causalrt.model.wan.transformer import Wan, wan_from_weights
from causalrt.plugins.all_to_all import ONNX_DOMAIN, ONNX_OP
from causalrt.recipes import recipe

SHAPE = (3, 5, 2)  # blocks, rows, channels


def session_of(model):
    """A session over the serialized graph, or over a file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


# ---- cut_at_exchanges


def exchange_node(sent, received, domain=ONNX_DOMAIN):
    return helper.make_node(ONNX_OP, [sent], [received], domain=domain)


def make_model(nodes, inputs, outputs, *, initializers=(), values=()):
    def info(names):
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in names]

    graph = helper.make_graph(
        nodes, "g", info(inputs), info(outputs), initializer=list(initializers), value_info=info(values)
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ONNX_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


WEIGHT = np.arange(30, dtype=np.float32).reshape(SHAPE) / 7 - 2


def layered_model():
    """Two exchanges; `a` and `received.0` are carried over a segment; `late` is fed by an input alone and read last."""
    nodes = [
        helper.make_node("Exp", ["m"], ["late"]),
        helper.make_node("Mul", ["m", "m"], ["early"]),
        helper.make_node("Mul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "early"], ["sent.0"]),
        exchange_node("sent.0", "received.0"),
        helper.make_node("Add", ["received.0", "a"], ["kept"]),
        helper.make_node("Neg", ["m"], ["middle"]),
        helper.make_node("Mul", ["kept", "middle"], ["sent.1"]),
        exchange_node("sent.1", "received.1"),
        helper.make_node("Mul", ["received.1", "late"], ["b"]),
        helper.make_node("Sub", ["b", "received.0"], ["c"]),
        helper.make_node("Add", ["c", "w"], ["d"]),
        helper.make_node("Add", ["d", "a"], ["y"]),
    ]
    values = [name for node in nodes for name in node.output if name not in ("y", "kept")]
    weight = numpy_helper.from_array(WEIGHT, "w")
    return make_model(nodes, ["x", "m"], ["y", "kept"], initializers=[weight], values=values)


def permute(blocks):
    """A known permutation in the place of the exchange."""
    return blocks[[1, 2, 0], ::-1]


def whole_in_numpy(x, m):
    a = x * WEIGHT
    received_0 = permute(a + m * m)
    kept = received_0 + a
    received_1 = permute(kept * -m)
    return received_1 * np.exp(m) - received_0 + WEIGHT + a, kept


def run_segments(segments, values):
    """Run them in order over one pool of named values, as the runtime does."""
    values = dict(values)
    for segment in segments:
        session = session_of(segment.model)
        names = [value.name for value in session.get_outputs()]
        feed = {value.name: values[value.name] for value in session.get_inputs()}
        values |= dict(zip(names, session.run(names, feed), strict=True))
        if segment.sent is not None:
            values[segment.received] = np.ascontiguousarray(permute(values[segment.sent]))
    return values


def names_of(values):
    return {value.name for value in values}


def test_cut_gives_the_same_numbers():
    generator = np.random.default_rng(0)
    x, m = (generator.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    values = run_segments(cut_at_exchanges(layered_model()), {"x": x, "m": m})
    y, kept = whole_in_numpy(x, m)
    np.testing.assert_allclose(values["y"], y, rtol=0, atol=ONE_OP)
    np.testing.assert_allclose(values["kept"], kept, rtol=0, atol=ONE_OP)


def test_cut_names_what_is_exchanged_and_keeps_every_node_once():
    model = layered_model()
    segments = cut_at_exchanges(model)
    exchanged = [(segment.sent, segment.received) for segment in segments]
    assert exchanged == [("sent.0", "received.0"), ("sent.1", "received.1"), (None, None)]
    kept = Counter(node.output[0] for segment in segments for node in segment.model.graph.node)
    assert kept == Counter(node.output[0] for node in model.graph.node if not is_exchange(node))
    for segment in segments:
        onnx.checker.check_model(segment.model, full_check=True)


def test_cut_carries_what_later_segments_read_and_nothing_else():
    first, second, third = (s.model.graph for s in cut_at_exchanges(layered_model()))
    assert (names_of(first.input), names_of(first.output)) == ({"x", "m"}, {"a", "sent.0"})
    assert (names_of(second.input), names_of(second.output)) == ({"a", "m", "received.0"}, {"kept", "sent.1"})
    assert (names_of(third.input), names_of(third.output)) == ({"a", "m", "received.0", "received.1"}, {"y"})
    assert [names_of(graph.initializer) for graph in (first, second, third)] == [{"w"}, set(), {"w"}]


def test_work_that_inputs_feed_goes_to_its_reader():
    made = [{node.output[0] for node in s.model.graph.node} for s in cut_at_exchanges(layered_model())]
    assert made == [{"early", "a", "sent.0"}, {"kept", "middle", "sent.1"}, {"late", "b", "c", "d", "y"}]


def test_work_read_by_two_segments_goes_to_the_first_of_them():
    nodes = [
        helper.make_node("Exp", ["m"], ["twice"]),
        helper.make_node("Neg", ["x"], ["sent.0"]),
        exchange_node("sent.0", "received.0"),
        helper.make_node("Mul", ["received.0", "twice"], ["sent.1"]),
        exchange_node("sent.1", "received.1"),
        helper.make_node("Mul", ["received.1", "twice"], ["y"]),
    ]
    values = [name for node in nodes for name in node.output if name != "y"]
    _, second, third = (s.model.graph for s in cut_at_exchanges(make_model(nodes, ["x", "m"], ["y"], values=values)))
    assert names_of(second.output) == {"twice", "sent.1"}
    assert names_of(third.input) == {"twice", "received.1"}


def test_work_goes_to_its_first_reader_in_whatever_order_the_nodes_stand():
    nodes = [
        helper.make_node("Neg", ["m"], ["shared"]),
        helper.make_node("Exp", ["shared"], ["late"]),  # stands first, runs last
        helper.make_node("Add", ["x", "shared"], ["sent.0"]),
        exchange_node("sent.0", "received.0"),
        helper.make_node("Mul", ["received.0", "late"], ["y"]),
    ]
    values = [name for node in nodes for name in node.output if name != "y"]
    first, second = (s.model.graph for s in cut_at_exchanges(make_model(nodes, ["x", "m"], ["y"], values=values)))
    assert names_of(first.output) == {"shared", "sent.0"}
    assert names_of(second.input) == {"shared", "received.0"}


@pytest.mark.parametrize("domain", [None, "elsewhere"], ids=["none", "other-domain"])
def test_cut_leaves_a_graph_without_exchanges_whole(domain):
    nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Exp", ["a"], ["y"])]
    if domain:  # a near miss: the same op type in another domain
        nodes[1] = exchange_node("a", "y", domain)
    model = make_model(nodes, ["x"], ["y"])
    (segment,) = cut_at_exchanges(model)
    assert segment.model is model
    assert (segment.sent, segment.received) == (None, None)


def test_cut_of_a_traced_step():
    config = override(recipe("tiny"), {"build.world_size": "2"})  # 2 layers, 3 heads: a whole and half a head a rank
    inputs, outputs = step_names(config)
    # Distinct values: the translation merges initializers that are equal.
    wan = wan_from_weights(
        config.model, {name: torch.randn(p.shape) for name, p in Wan(config.model).named_parameters()}
    )
    step = ir.to_proto(onnx_from_program(trace_step(wan, config), input_names=inputs, output_names=outputs))
    segments = cut_at_exchanges(step)
    assert len(segments) == 2 * config.model.num_layers + 1
    assert not any(is_exchange(node) for s in segments for node in s.model.graph.node)
    made = [name for s in segments for name in names_of(s.model.graph.output)]
    received = {s.received for s in segments}
    assert set(outputs) <= set(made)
    assert len(made) == len(set(made)), "two segments write one buffer"
    available = set(inputs)
    for segment in segments:
        assert names_of(segment.model.graph.input) <= available, "a segment reads what is not there yet"
        available |= names_of(segment.model.graph.output) | {segment.received}
        for value in segment.model.graph.output:  # the runtime allocates buffers from these shapes
            dims = value.type.tensor_type.shape.dim
            assert value.name.startswith(("k.", "v.")) or all(dim.HasField("dim_value") for dim in dims), value.name
    assert received - {None} <= available
    # A layer's weights, its modulation among them, are read by no segment before that layer.
    read = [{tensor.name for tensor in s.model.graph.initializer} for s in segments]
    assert [any(name.startswith("wan.blocks.1.") for name in each) for each in read] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert ["wan.blocks.1.modulation" in each for each in read] == [False, False, True, False, False]
    # Odd segments attend: segment 1 for layer 0, segment 3 for layer 1. No other segment touches the slots.
    slots = [{name[:3] for name in names_of(s.model.graph.output) if name.endswith(".written")} for s in segments]
    assert slots == [set(), {"k.0", "v.0"}, set(), {"k.1", "v.1"}, set()]


# ---- share_weights_pass


class Small(nn.Module):
    """Holds its model under `wan`, as the traced modules do, and a table of its own."""

    def __init__(self, prefix="wan"):
        super().__init__()
        torch.manual_seed(0)
        setattr(self, prefix, nn.Sequential(nn.Linear(96, 128), nn.SiLU(), nn.Linear(128, 48)))
        self.prefix = prefix
        self.register_buffer("table", torch.randn(48), persistent=False)

    def forward(self, x):
        return getattr(self, self.prefix)(x) * self.table


def translate(module):
    program = torch.export.export(module.requires_grad_(False).eval(), (torch.zeros(5, 96),))
    return onnx_from_program(program, input_names=["x"], output_names=["y"])


def save_weights(module, folder, drop=()):
    path = folder / "weights.safetensors"
    state = module.wan.state_dict() if hasattr(module, "wan") else {"0.weight": torch.zeros(1)}
    save_file({name: tensor for name, tensor in state.items() if name not in drop}, path)
    return path


def test_shared_weights_give_the_same_numbers_from_a_small_file(tmp_path):
    module = Small()
    weights = save_weights(module, tmp_path)
    whole = ir.to_proto(translate(module)).SerializeToString()
    path = tmp_path / "small.onnx"
    onnx.save(with_shared_weights(translate(module), weights), path)

    assert len(whole) > weights.stat().st_size
    assert path.stat().st_size < len(whole) - 0.95 * weights.stat().st_size
    assert path.stat().st_size < 8192
    tensors = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    external = {name for name, t in tensors.items() if t.data_location == TensorProto.EXTERNAL}
    assert external == {"wan.0.weight", "wan.0.bias", "wan.2.weight", "wan.2.bias"}
    assert {entry.value for name in external for entry in tensors[name].external_data if entry.key == "location"} == {
        "weights.safetensors"
    }

    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    (got,) = session_of(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), module(x), rtol=0, atol=ONE_OP)


def test_shared_weights_are_read_from_the_file(tmp_path):
    # Other weights in the file, other numbers: nothing of the traced module's own is left in the graph.
    module = Small()
    weights = save_weights(module, tmp_path)
    path = tmp_path / "small.onnx"
    onnx.save(with_shared_weights(translate(module), weights), path)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-0.5)
    save_weights(module, tmp_path)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    (got,) = session_of(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), module(x), rtol=0, atol=ONE_OP)


def test_sharing_is_an_error_where_nothing_hits(tmp_path):
    module = Small(prefix="net")
    with pytest.raises(RuntimeError, match="share_weights_pass had 0 hits"):
        with_shared_weights(translate(module), save_weights(module, tmp_path))


def test_sharing_is_an_error_for_a_name_that_the_file_lacks(tmp_path):
    module = Small()
    with pytest.raises(RuntimeError, match=r"wan\.2\.bias.*weights\.safetensors"):
        with_shared_weights(translate(module), save_weights(module, tmp_path, drop=["2.bias"]))


def test_weight_offsets_against_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b.weight": torch.randn(7, generator=generator).bfloat16(),
        "é": torch.arange(11, dtype=torch.int8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, path, metadata={"made": "here"})
    offsets, data = weight_offsets(path), path.read_bytes()
    with safe_open(path, framework="pt") as file:
        assert set(offsets) == set(file.keys()) == set(tensors)
    for name, tensor in tensors.items():
        offset, length = offsets[name]
        assert length == tensor.nbytes
        assert data[offset : offset + length] == tensor.flatten().view(torch.uint8).numpy().tobytes()
