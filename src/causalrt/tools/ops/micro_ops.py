"""Single ops to time on this machine, as the executors run them: torch's own, or a graph of one node under ONNX Runtime.

The cost of an op is linear in its features: `plan/calibration.py` fits the seconds of each.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import onnxruntime as ort
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from causalrt.export.fuse_attention import RUNTIME_DOMAIN, RUNTIME_OP
from causalrt.plugins.attention import attend
from causalrt.plugins.rotate import rotate_pairs
from causalrt.tools.ops.work import Attention, Exchange, Gemm, PassKind, StepWork

OpExecutor = Literal["eager", "onnxruntime"]
"""Executors whose ops can be run one by one."""
Features = dict[str, float]
OPSET = 24
EPS = 1e-6
GEMMS = ((512, 256, 256), (2048, 256, 256), (2048, 1024, 256), (2048, 256, 1024), (1024, 512, 512), (1024, 2048, 512))
"""m, n, k."""
ATTENTIONS = (
    (4, 512, 512, 64),
    (4, 1024, 2048, 64),
    (2, 2048, 4096, 64),
    (1, 1024, 8192, 64),
    (3, 1024, 2048, 64),
    (6, 1536, 512, 64),
    (2, 1024, 2048, 128),
    (4, 768, 3072, 128),
)
"""Heads, rows, keys, channels of a head."""
PASSES = ((256, 256), (2048, 256), (1024, 1024), (2048, 1024))
"""Rows, channels."""
HEAD = 64
"""Channels of a head in passes that depend on it."""
COLD_BYTES, MOST_COPIES = 96 * 2**20, 32
"""Bytes of inputs that are used in turn so that none is in a cache, and the most copies that make them up."""
Random = Callable[..., torch.Tensor]
"""Makes a tensor of a shape."""


def gemm_features(gemm: Gemm) -> Features:
    """Features of one product."""
    return {"flop": gemm.flops, "element": gemm.elements, "call": 1}


def attention_features(attention: Attention) -> Features:
    """Features of one attention: its products, and the softmax over the scores."""
    return {"flop": attention.flops, "score": attention.scores, "call": 1}


def pass_features(elements: int) -> Features:
    """Features of one pass over memory."""
    return {"element": elements, "call": 1}


def exchange_features(exchange: Exchange, world_size: int) -> Features:
    """Features of one collective: the call, and the elements that go to other ranks."""
    return {"element": (world_size - 1) * exchange.rows * exchange.head_dim, "call": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The measured time of one op."""

    kind: str
    features: Features
    seconds: float


def rates_of(samples: Sequence[Sample], *, element_bytes: int) -> dict[str, float]:
    """The highest rates among samples: GFLOP/s of products and attention, GB/s of a sum of two tensors and of exchanges."""

    def most(kind: str, feature: str, scale: float) -> float:
        return max(float(scale * s.features[feature] / s.seconds) for s in samples if s.kind == kind) / 1e9

    rates = {
        "gemm_gflops": most("gemm", "flop", 1),
        "attention_gflops": most("attention", "flop", 1),
        "memory_gbs": most("arithmetic", "element", 3 * element_bytes),  # two are read, one is written
    }
    if any(sample.kind == "exchange" for sample in samples):
        rates["exchange_gbs"] = most("exchange", "element", element_bytes)
    return rates


@dataclass(frozen=True, kw_only=True)
class MicroOp:
    """An op of one size.

    Attributes:
        kind: `gemm`, `attention`, or a kind of pass.
        features: what its cost is linear in.
        inputs: tensors by name of the input.
        node: ONNX operator and attributes.
        eager: the op in torch.
        constant: names of inputs that ONNX Runtime holds as weights.
    """

    kind: str
    features: Features
    inputs: dict[str, torch.Tensor]
    node: tuple[str, dict[str, Any]]
    eager: Callable[..., torch.Tensor]
    constant: Sequence[str] = field(default=())


def random_tensors(dtype: torch.dtype) -> Random:
    """Normal values in `dtype`, the same ones in every process."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def gemm_op(gemm: Gemm, random: Random) -> MicroOp:
    """A product with bias."""
    return MicroOp(
        kind="gemm",
        features=gemm_features(gemm),
        inputs={"x": random(gemm.m, gemm.k), "weight": random(gemm.n, gemm.k), "bias": random(gemm.n)},
        node=("Gemm", {"transB": 1}),
        eager=F.linear,
        constant=("weight", "bias"),
    )


def attention_op(attention: Attention, random: Random) -> MicroOp:
    """An attention, in ONNX Runtime by the operator that the executor uses."""
    heads, width = attention.num_heads, attention.num_heads * attention.head_dim
    rows, keys = attention.rows, attention.keys
    return MicroOp(
        kind="attention",
        features=attention_features(attention),
        inputs={"q": random(1, rows, width), "k": random(1, keys, width), "v": random(1, keys, width)},
        node=(RUNTIME_OP, {"num_heads": heads, "domain": RUNTIME_DOMAIN}),
        eager=lambda q, k, v: attend(q, k, v, heads),
    )


def standard_attention_op(attention: Attention, random: Random) -> MicroOp:
    """An attention by the standard ONNX operator, which stores the matrix of all scores."""
    heads = attention.num_heads
    return replace(attention_op(attention, random), node=("Attention", {"q_num_heads": heads, "kv_num_heads": heads}))


def sum_op(rows: int, width: int, random: Random) -> MicroOp:
    """A sum of two tensors: a pass over memory."""
    inputs = {"x": random(rows, width), "y": random(rows, width)}
    return MicroOp(
        kind="arithmetic", features=pass_features(rows * width), inputs=inputs, node=("Add", {}), eager=torch.add
    )


def micro_ops(dtype: torch.dtype = torch.float32) -> list[MicroOp]:
    """The ops of a calibration, with random inputs."""
    random = random_tensors(dtype)
    found = [gemm_op(Gemm(m=m, n=n, k=k, count=1), random) for m, n, k in GEMMS]
    for heads, rows, keys, depth in ATTENTIONS:
        attention = Attention(num_heads=heads, rows=rows, keys=keys, head_dim=depth, count=1, over_slots=True)
        found.append(attention_op(attention, random))
    for rows, width in PASSES:
        found += _passes(random(rows, width), random(rows, width))
    return found


def step_ops(work: StepWork, executor: OpExecutor, dtype: torch.dtype) -> list[MicroOp]:
    """The products, attentions and one sum of a step, each size once; in ONNX Runtime attention by either operator."""
    random = random_tensors(dtype)
    found = [gemm_op(gemm, random) for gemm in work.gemms]
    attentions = [attention for attention in work.attentions if attention.rows]
    found += [attention_op(attention, random) for attention in attentions]
    if executor == "onnxruntime":
        found += [standard_attention_op(attention, random) for attention in attentions]
    widest = work.gemms[1]
    return [*found, sum_op(widest.m, widest.n, random)]


def _passes(x: torch.Tensor, other: torch.Tensor) -> list[MicroOp]:
    rows, width = x.shape
    one = torch.ones(width, dtype=x.dtype)
    angles = torch.randn(1, rows, HEAD // 2)
    heads = width // HEAD
    by_head = x.view(-1, HEAD)
    index = torch.randperm(by_head.shape[0])

    def op(kind: PassKind, inputs: dict[str, torch.Tensor], name: str, eager: Any, **attributes: Any) -> MicroOp:
        return MicroOp(
            kind=kind, features=pass_features(x.numel()), inputs=inputs, node=(name, attributes), eager=eager
        )

    def rotate(x_BSC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate_pairs(x_BSC, cos, sin, heads)

    return [
        op(
            "layer_norm",
            {"x": x, "scale": one},
            "LayerNormalization",
            lambda x, scale: F.layer_norm(x, scale.shape, eps=EPS),
            axis=-1,
            epsilon=EPS,
        ),
        op(
            "rms_norm",
            {"x": x, "scale": one},
            "RMSNormalization",
            lambda x, scale: F.rms_norm(x, scale.shape, scale, EPS),
            axis=-1,
            epsilon=EPS,
        ),
        op(
            "rotate",
            {"x": x[None], "cos": angles.cos(), "sin": angles.sin()},
            "RotaryEmbedding",
            rotate,
            interleaved=1,
            num_heads=heads,
        ),
        op("gelu", {"x": x}, "Gelu", lambda x: F.gelu(x, approximate="tanh"), approximate="tanh"),
        op("arithmetic", {"x": x, "y": other}, "Add", torch.add),
        op("arithmetic", {"x": x, "y": one[None]}, "Mul", torch.mul),
        op("copy", {"x": by_head, "index": index}, "Gather", lambda x, index: x.index_select(0, index), axis=0),
    ]


def runner(op: MicroOp, executor: OpExecutor, device: torch.device, *, cold: bool = False) -> Callable[[], object]:
    """A function that runs the op on its inputs, on `device` in torch and on the CPU in ONNX Runtime.

    With `cold`, each call takes the next of several copies of the inputs, more than a cache holds, as in a step, where other
    ops and other layers' weights come between. Products then reach about 0.85 of their rate on the same inputs every time.
    """
    input_bytes = sum(tensor.nbytes for tensor in op.inputs.values())
    copies = min(MOST_COPIES, math.ceil(COLD_BYTES / input_bytes)) if cold else 1
    runs = []
    for _ in range(copies):
        own = replace(op, inputs={name: tensor.to(device, copy=True) for name, tensor in op.inputs.items()})
        runs.append(functools.partial(op.eager, *own.inputs.values()) if executor == "eager" else _onnx_runner(own))
    for run in runs[1:]:
        run()
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def _onnx_runner(op: MicroOp) -> Callable[[], object]:
    types = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    out = op.eager(*op.inputs.values())
    values = {name: helper.make_tensor_value_info(name, types[t.dtype], list(t.shape)) for name, t in op.inputs.items()}
    graph = helper.make_graph(
        [helper.make_node(op.node[0], list(op.inputs), ["out"], **op.node[1])],
        "one",
        [info for name, info in values.items() if name not in op.constant],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, list(out.shape))],
        [
            helper.make_tensor(n, types[op.inputs[n].dtype], op.inputs[n].shape, op.inputs[n].numpy())
            for n in op.constant
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(RUNTIME_DOMAIN, 1)], ir_version=10
    )
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    made = torch.empty_like(out)
    for name, tensor in op.inputs.items():
        if name not in op.constant:
            binding.bind_input(name, "cpu", 0, types[tensor.dtype], list(tensor.shape), tensor.data_ptr())
    binding.bind_output("out", "cpu", 0, TensorProto.FLOAT, list(out.shape), made.data_ptr())
    return lambda: (session.run_with_iobinding(binding), op, made)
