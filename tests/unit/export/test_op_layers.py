"""Our ops as TensorRT layers: they compute what the ops do, make what the ONNX parser makes, and have fused kernels."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from support.network_from_program import add_input, kinds_of, layers_of, make_network, network_from_program
from support.tolerances import MODULE
from torch import nn

from causalrt.export.dist_collective import lower_exchanges_pass
from causalrt.export.engine_network import attentions, describe_network, finish_attentions
from causalrt.export.engine_worker import parse
from causalrt.export.passes import PassContext
from causalrt.export.scale_queries import scale_queries_pass
from causalrt.export.split_single_heads import split_single_heads_pass
from causalrt.export.torch_tensorrt.op_layers import add_all_to_all, add_attention, add_kv_attention_whole, add_rotate
from causalrt.export.translate import onnx_from_program
from causalrt.plugins.all_to_all import all_to_all
from causalrt.plugins.attention import attention, kv_attention_whole
from causalrt.plugins.rotate import rotate

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, which builds without a GPU, is not installed")

ADD = {"rotate": add_rotate, "attention": add_attention, "kv_attention_whole": add_kv_attention_whole}
OWN_KINDS = ("ROTARY_EMBEDDING", "ATTENTION_INPUT", "ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "DIST_COLLECTIVE")
D = 32


def convert(network, op, arguments, name):
    if op == torch.ops.causalrt.all_to_all.default:
        return add_all_to_all(trt, network, name, *arguments)
    return ADD[op._opname](trt, network, name, *arguments)


def tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments_of(op, *, heads, rows, dtype=torch.float32):
    """Tensors of one of our ops, and the number of heads."""
    q = tensor(1, rows, heads * D, dtype=dtype)
    if op == "rotate":
        angles = tensor(1, rows, D // 2, seed=1) * 10
        return (q, angles.cos(), angles.sin()), heads
    if op == "attention":
        return (q, *(tensor(1, 11, heads * D, seed=seed, dtype=dtype) for seed in (1, 2))), heads
    new = [tensor(1, 6, heads * D, seed=seed, dtype=dtype) for seed in (1, 2)]
    slots = [tensor(1, heads, 20, D, seed=seed, dtype=dtype) for seed in (3, 4)]
    return (q, *new, *slots, torch.tensor([13])), heads


def network_of(op, tensors, heads):
    network = make_network(trt)
    inputs = [add_input(trt, network, f"in{index}", value) for index, value in enumerate(tensors)]
    made = ADD[op](trt, network, op, *inputs, heads)
    for output in made if isinstance(made, tuple) else (made,):
        network.mark_output(output)
    return network


def torch_dtype(dtype):
    return {trt.float32: torch.float32, trt.bfloat16: torch.bfloat16, trt.int32: torch.int32}[dtype]


def run(network, tensors):
    """What the layers say, in torch: TensorRT's documentation of each kind, and no GPU."""
    values = {network.get_input(index).name: value for index, value in enumerate(tensors)}
    settings = iter(attentions(trt, network))
    for layer in layers_of(network):
        kind = str(layer.type).removeprefix("LayerType.")
        inputs = [values[layer.get_input(i).name] for i in range(layer.num_inputs) if layer.get_input(i) is not None]
        output = layer.get_output(0)
        if kind == "CONSTANT":
            layer.__class__ = trt.IConstantLayer
            value = torch.from_numpy(np.array(layer.weights)).reshape(tuple(layer.shape))
        elif kind == "CAST":
            value = inputs[0].to(torch_dtype(output.dtype))
        elif kind == "SHUFFLE":
            layer.__class__ = trt.IShuffleLayer
            moved = inputs[0].permute(list(layer.first_transpose)[: inputs[0].dim()])
            reshaped = moved.reshape(tuple(layer.reshape_dims))
            value = reshaped.permute(list(layer.second_transpose)[: reshaped.dim()])
        elif kind == "ELEMENTWISE":
            layer.__class__ = trt.IElementWiseLayer
            assert layer.op == trt.ElementWiseOperation.PROD
            value = inputs[0] * inputs[1]
        elif kind == "ROTARY_EMBEDDING":
            layer.__class__ = trt.IRotaryEmbeddingLayer
            assert layer.interleaved
            x, cos, sin = inputs[0], *(table[:, None] for table in inputs[1:])
            even, odd = x[..., ::2], x[..., 1::2]
            value = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        elif kind == "KV_CACHE_UPDATE":
            slots, new, start = inputs
            value = slots.clone()
            value[:, :, int(start) : int(start) + new.shape[2]] = new
        elif kind == "ATTENTION_INPUT":
            q, k, v, *lengths = inputs
            filled = int(lengths[0]) if lengths else k.shape[2]
            assert (next(settings).key_value_lengths is not None) == bool(lengths)
            k, v = (x[:, :, :filled].expand(1, q.shape[1], filled, D) for x in (k, v))
            value = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            assert kind == "ATTENTION_OUTPUT"
            value = inputs[0]
        assert tuple(value.shape) == tuple(output.shape), layer.name
        assert value.dtype == torch_dtype(output.dtype), layer.name
        values[output.name] = value
    return [values[network.get_output(index).name] for index in range(network.num_outputs)]


@pytest.mark.parametrize("rows", [7, 12])  # a prime number of rows too: a single head is then split row by row
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("op", "eager"), [("rotate", rotate), ("attention", attention), ("kv_attention_whole", kv_attention_whole)]
)
def test_layers_compute_what_the_op_does(op, eager, heads, rows):
    tensors, heads = arguments_of(op, heads=heads, rows=rows)
    wanted = eager(*tensors, heads)
    found = run(network_of(op, tensors, heads), tensors)
    for value, reference in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        torch.testing.assert_close(value, reference, rtol=MODULE, atol=MODULE)


def test_rotation_and_scale_are_float32_in_a_bfloat16_network():
    tensors, heads = arguments_of("rotate", heads=2, rows=5, dtype=torch.bfloat16)
    assert torch.equal(run(network_of("rotate", tensors, heads), tensors)[0], rotate(*tensors, heads))
    tensors, heads = arguments_of("attention", heads=2, rows=5, dtype=torch.bfloat16)
    network = network_of("attention", tensors, heads)
    products = [layer for layer in layers_of(network) if layer.type == trt.LayerType.ELEMENTWISE]
    assert [layer.get_output(0).dtype for layer in products] == [trt.float32]
    wanted = attention(*(value.float() for value in tensors), heads)
    torch.testing.assert_close(run(network, tensors)[0].float(), wanted, rtol=2e-2, atol=2e-2)


def serialize(network):
    config = network.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    return network.builder.build_serialized_network(network, config)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("op", ["rotate", "attention", "kv_attention_whole"])
def test_layers_have_kernels(op, heads):
    tensors, heads = arguments_of(op, heads=heads, rows=12, dtype=torch.bfloat16)
    network = network_of(op, tensors, heads)
    found = list(attentions(trt, network))
    assert [attention.decomposable for attention in found] == [False] * (op != "rotate")
    assert all((attention.key_value_lengths is not None) == (op == "kv_attention_whole") for attention in found)
    assert serialize(network) is not None


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_exchange_is_between_as_many_ranks_as_there_are_blocks(ranks):
    network = make_network(trt)
    received = add_all_to_all(trt, network, "exchange", network.add_input("blocks", trt.bfloat16, (ranks, 5, D)))
    network.mark_output(received)
    assert tuple(received.shape) == (ranks, 5, D)
    assert describe_network(trt, network)["collectives"] == [
        {"name": "exchange", "ranks": ranks, "shape": [ranks, 5, D]}
    ]
    assert serialize(network) is not None


class MiniStep(nn.Module):
    """Our four ops, and nothing else."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, q, k, v, cos, sin, k_slots, v_slots, cross_k, cross_v, blocks, kv_rows):
        q, k = rotate(q, cos, sin, self.heads), rotate(k, cos, sin, self.heads)
        out, k_slots, v_slots = kv_attention_whole(q, k, v, k_slots, v_slots, kv_rows, self.heads)
        return attention(out, cross_k, cross_v, self.heads), k_slots, v_slots, all_to_all(blocks)


def mini_step(heads, ranks):
    def rows(count):
        return tensor(1, count, heads * D, dtype=torch.bfloat16)

    def slots():
        return tensor(1, heads, 20, D, dtype=torch.bfloat16)

    angles = [tensor(1, 6, D // 2) for _ in range(2)]
    blocks = tensor(ranks, 5, D, dtype=torch.bfloat16)
    arguments = (rows(6), rows(6), rows(6), *angles, slots(), slots(), rows(11), rows(11), blocks, torch.tensor([13]))
    return torch.export.export(MiniStep(heads).eval(), arguments)


def parsed_network(program, folder, ranks):
    """The same program through ONNX, as the `engine` lowering takes it."""
    outputs = [f"output{index}" for index in range(len(program.graph_signature.user_outputs))]
    inputs = list(program.graph_signature.user_inputs)
    model = ir.to_proto(onnx_from_program(program, input_names=inputs, output_names=outputs))
    split_single_heads_pass(model, PassContext())
    scale_queries_pass(model, PassContext(head_dim=D))
    lower_exchanges_pass(model, PassContext(world_size=ranks))
    onnx.save(model, folder / "mini.onnx")
    _, network, _ = parse(trt, trt.Logger(trt.Logger.ERROR), folder / "mini.onnx")
    finish_attentions(trt, network)
    return network


def cache_updates(network):
    """(cache, updated cache) of every update: an input and an output of the network, so that TensorRT aliases them."""
    found = [layer for layer in layers_of(network) if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    assert all(layer.get_input(0).is_network_input and layer.get_output(0).is_network_output for layer in found)
    return {(layer.get_input(0).name, layer.get_output(0).name) for layer in found}


def rotations(network):
    found = [layer for layer in layers_of(network) if layer.type == trt.LayerType.ROTARY_EMBEDDING]
    for layer in found:
        layer.__class__ = trt.IRotaryEmbeddingLayer
    return [(layer.interleaved, layer.rotary_embedding_dim, layer.get_output(0).dtype) for layer in found]


@pytest.mark.parametrize("heads", [1, 3])
def test_a_program_becomes_what_the_onnx_parser_makes_of_it(heads, tmp_path):
    program = mini_step(heads, ranks=3)
    networks = {
        "parsed": parsed_network(program, tmp_path, ranks=3),
        "converted": network_from_program(trt, program, convert),
    }
    told = {}
    for name, network in networks.items():
        described = describe_network(trt, network)
        kinds = kinds_of(network)
        told[name] = {
            "kinds": {kind: kinds[kind] for kind in OWN_KINDS},
            "attentions": [
                {key: entry[key] for key in ("query", "key", "decomposable", "has_lengths")}
                for entry in described["attentions"]
            ],
            "collectives": [(entry["ranks"], entry["shape"]) for entry in described["collectives"]],
            "cache_updates": cache_updates(network),
            "rotations": rotations(network),
            "inputs": described["inputs"],
            "outputs": described["outputs"],
        }
    assert told["converted"] == told["parsed"]
    assert told["converted"]["kinds"] == dict(zip(OWN_KINDS, (2, 2, 2, 2, 1), strict=True))
    assert told["converted"]["cache_updates"] == {("k_slots", "output1"), ("v_slots", "output2")}
    first = told["converted"]["attentions"][0]["query"]
    assert first == ([1, 2, 3, D] if heads == 1 else [1, 3, 6, D])
    assert math.prod(first) == 6 * heads * D
    assert serialize(networks["converted"]) is not None
