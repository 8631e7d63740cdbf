"""Kernels with their arguments in the order in which TensorRT hands them over: the inputs as registered, then the outputs as
described. In Triton's interpreter; `test_tensorrt_plugin.py` starts this file in a process of its own."""

import math
import sys

import pytest
import torch

from causalrt.layout import plan_head_shards
from causalrt.plugins.plugin_specs import SPECS
from causalrt.plugins.rope_attention import rope_attention_rows
from causalrt.plugins.shard_blocks import blocks_from_shares
from causalrt.plugins.tensorrt_plugin import TYPES, register_plugins
from support import tensorrt_double as double
from support.qk_norm_rope_cases import CASES, check, operands
from support.tolerances import MODULE, QK_NORM_ROPE

TARGET = 80


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a plugin on tensors: (name, inputs by name, attributes) -> outputs, those in place included."""
    trt = double.make_trt()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    api = double.small_api()
    register_plugins(trt, target=TARGET, cache=tmp_path)

    def running(name, tensors, attributes):
        describe = api.registered[f"causalrt::{name}"]["register"]
        names = list(describe.__signature__.parameters)[: len(tensors)]
        inputs = [tensors[name] for name in names]
        descs = [double.TensorDesc(list(x.shape), getattr(trt.DataType, TYPES[x.dtype][0])) for x in inputs]
        outputs = []
        for desc in describe(*descs, **attributes):
            (dtype,) = [dtype for dtype, kinds in TYPES.items() if getattr(trt.DataType, kinds[0]) == desc.dtype]
            fresh = torch.full([int(size) for size in desc.shape_expr], math.nan, dtype=dtype)
            outputs.append(fresh if desc.alias is None else inputs[descs.index(desc.alias)])
        (spec,) = [spec for spec in SPECS if spec.name == name]
        launch = spec.plan({name: tensors[name].to("meta") for name in names}, attributes, TARGET)
        handed_over = [*inputs, *outputs]
        unread = handed_over[len(launch.signature) :]
        assert all(any(x is y for y in inputs) for x in unread), "only what is written in place may be left unread"
        launch.run(*handed_over[: len(launch.signature)])
        return outputs

    yield running
    register_plugins.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_qk_norm_rope(run, case):
    given = operands(case, torch.float32)
    names = ("sin", "cos", "norm_k", "norm_q", "v", "k", "q", "destinations")
    tensors = {name: getattr(given, name).contiguous() for name in names}
    attributes = {"num_heads": given.num_heads, "eps": given.eps, "out_rows": given.out_rows}
    (out,) = run("qk_norm_rope", tensors, attributes)
    check(out, given, QK_NORM_ROPE[torch.float32])


@pytest.mark.parametrize("kv_splits", [None, 3])
@pytest.mark.parametrize(
    ("num_heads", "world_size", "num_tokens"), [(3, 2, 13), (4, 2, 16)], ids=["2 shards", "1 shard"]
)
def test_rope_attention(run, num_heads, world_size, num_tokens, kv_splits):
    torch.manual_seed(0)
    head_dim, history, spare = 16, 21, 5
    local_tokens = math.ceil(num_tokens / world_size)
    shards = plan_head_shards("balanced", num_heads=num_heads, world_size=world_size, local_tokens=local_tokens)
    heads, splits = [shard.num_heads for shard in shards], [shard.split for shard in shards]
    rows = sum(shard.num_heads * (shard.query_rows + 2 * local_tokens) for shard in shards)
    received = torch.randn(world_size, rows, head_dim)
    blocks = blocks_from_shares(received.shape, num_tokens=num_tokens, num_heads=heads, splits=splits)
    slots = [torch.randn(1, count, num_tokens + history + spare, head_dim) for count in heads for _ in "kv"]
    kv_rows = torch.tensor([num_tokens + history])
    written = [x.clone() for x in slots]
    wanted = rope_attention_rows(received, written, kv_rows, (), blocks)

    names = [f"{kind}_slots_{number}" for number in range(len(heads)) for kind in "kv"]
    tensors = {"kv_rows": kv_rows, "received": received, **dict(zip(names, slots, strict=True))}
    attributes = {f"split_{number}": split for number, split in enumerate(splits)}
    attributes |= {"gather_rows": blocks.gather_rows, "num_tokens": num_tokens}
    if kv_splits is None:
        out, *after = run(f"rope_attention_{len(heads)}", tensors, attributes)
    else:
        several = attributes | {"kv_splits": kv_splits}
        parts, log_sums, *after = run(f"rope_attention_split_{len(heads)}", tensors, several)
        (out,) = run("combine_splits", {"log_sums": log_sums, "parts": parts}, {"dtype": 1})
    torch.testing.assert_close(out, wanted, rtol=MODULE, atol=MODULE)
    for got, of, expected in zip(after, slots, written, strict=True):
        assert got is of
        assert torch.equal(got, expected)
