"""Cases of `rope_attention`'s kernel, and what it must give, in float64.

A case is a dict: head plan and sizes of a layout, `history` and `spare` slot rows behind the chunk, form of the slots,
rotation, ranges of keys, tiles, type, spread of the values, seed. `make_arguments` makes those of the op.
"""

import math

import numpy as np
import torch

from causalrt.layout import Layout, plan_head_shards
from causalrt.plugins.rope_attention import _device_facts
from causalrt.plugins.shard_blocks import blocks_from_shares

NAN = float("nan")

# Worst error beside float64, relative to the largest value of the output.

CUT_HEADS = {"plan": "balanced", "heads": 12, "ranks": 8, "tokens": 37, "history": 75, "spare": 3, "dim": 128}
CUT_HEADS |= {"whole": True, "rotate": True, "rank": 5, "kv_splits": 2, "block_m": 32, "block_n": 32}
CUT_HEADS |= {"spread": 1.0, "seed": 1}
CUT_CASES = [
    CUT_HEADS | {"dtype": "bfloat16"},
    CUT_HEADS | {"dtype": "float16", "rotate": False, "whole": False},
    CUT_HEADS | {"dtype": "float32", "history": 0, "spare": 0, "kv_splits": 3},
    CUT_HEADS | {"dtype": "float32", "heads": 3, "tokens": 5, "rank": 7, "dim": 24},  # ranks without a token
]

# plan, heads, ranks, tokens, history: odd rows, cut heads, more ranks than heads, ranks without a token, first chunk
LAYOUTS = [
    ("balanced", 12, 8, 37, 20),
    ("balanced", 3, 2, 13, 8),
    ("balanced", 2, 5, 11, 3),
    ("balanced", 3, 8, 3, 7),
    ("padded", 5, 3, 8, 0),
    ("grouped", 6, 4, 9, 5),
    ("balanced", 4, 1, 6, 9),
]


def make_layout(plan, heads, ranks, tokens):
    shards = plan_head_shards(plan, num_heads=heads, world_size=ranks, local_tokens=math.ceil(tokens / ranks))
    return Layout(world_size=ranks, num_tokens=tokens, num_heads=heads, shards=shards)


def make_arguments(layout, dim, history, *, whole=False, rotate=False, spare=0, dtype=torch.float32, seed=0):
    """Arguments of `rope_attention` as one rank has them."""
    random = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=random).to(dtype)

    rows = layout.num_tokens + history + spare
    slots = [
        randn(1, shard.num_heads, rows, dim) if whole else randn(1, rows, shard.num_heads * dim)
        for shard in layout.shards
        for _ in "kv"
    ]
    angle = 10 * randn(rows, dim // 2).float()
    rotation = [torch.tensor([layout.world_size - 1]), angle.cos(), angle.sin()] if rotate else []
    return (
        randn(layout.world_size, layout.scatter_rows, dim),
        slots,
        torch.tensor([layout.num_tokens + history]),
        rotation,
        [shard.num_heads for shard in layout.shards],
        [shard.split for shard in layout.shards],
        layout.num_tokens,
    )


def rotated(x_RHD, cos_RP, sin_RP, dtype):
    """Rounded to the type of the operands, as `causalrt::rotate` does: that is part of what is computed."""
    turned = torch.view_as_complex(x_RHD.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos_RP, sin_RP)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(dtype).double()


def expected(received, slots, rotation, blocks):
    """The output in float64, by index arithmetic of its own; `slots` `[rows, heads, D]`, filled rows only, chunk written."""
    ranks, local = blocks.world_size, blocks.local_tokens
    out = torch.full((ranks, blocks.gather_rows, blocks.head_dim), NAN, dtype=torch.float64)
    for shard, k, v in zip(blocks.shards, slots[::2], slots[1::2], strict=True):
        q = [
            received[p, shard.q_start + r * shard.num_heads + h].double()
            for p in range(ranks)
            for r in range(shard.query_rows)
            for h in range(shard.num_heads)
        ]
        q, k, v = torch.stack(q).view(-1, shard.num_heads, blocks.head_dim), k.double(), v.double()
        if rotation:
            rank, cos, sin = rotation
            first = shard.first_row(int(rank), local)
            token = [
                min(p * local + min(first + r, local - 1), blocks.num_tokens - 1)
                for p in range(ranks)
                for r in range(shard.query_rows)
            ]
            q = rotated(q, cos[token].double(), sin[token].double(), received.dtype)
            k = rotated(k, cos[: len(k)].double(), sin[: len(k)].double(), received.dtype)
        weights = (torch.einsum("rhd,lhd->hrl", q, k) / math.sqrt(blocks.head_dim)).softmax(-1)
        rows = torch.einsum("hrl,lhd->rhd", weights, v).reshape(ranks, -1, blocks.head_dim)
        out[:, shard.out_start : shard.out_start + shard.query_rows * shard.num_heads] = rows
    return out


def run(case, device="cpu"):
    """The worst error of one case, relative to the largest value, and what was written where it must not be.

    Outputs, staging, unfilled rows and padding tokens are NaN beforehand. Without `block_m` the tiles are those of an op.
    """
    from causalrt.plugins.rope_attention_launch import Tiles, plan, tiles_for

    torch.manual_seed(case["seed"])
    dtype = getattr(torch, case["dtype"])
    ranks, tokens, dim, whole = case["ranks"], case["tokens"], case["dim"], case["whole"]
    local = math.ceil(tokens / ranks)
    shards = plan_head_shards(case["plan"], num_heads=case["heads"], world_size=ranks, local_tokens=local)
    heads, splits = [s.num_heads for s in shards], [s.split for s in shards]
    rows = sum(s.num_heads * (s.query_rows + 2 * local) for s in shards)
    blocks = blocks_from_shares((ranks, rows, dim), num_tokens=tokens, num_heads=heads, splits=splits)

    received = case["spread"] * torch.randn(ranks, rows, dim)
    for shard in blocks.shards:
        for start in (shard.k_start, shard.v_start):  # the last ranks' padding rows
            part = received[:, start : start + local * shard.num_heads]
            rows_of_tokens = part.reshape(ranks * local, -1).clone()
            rows_of_tokens[tokens:] = NAN
            part.copy_(rows_of_tokens.view_as(part))
    received = received.to(dtype)
    filled = tokens + case["history"]
    slot_rows = filled + case["spare"]
    slots = []
    for count in heads:
        for _ in "kv":
            x = torch.randn(slot_rows, count, dim).to(dtype)
            x[:tokens] = NAN
            x[filled:] = NAN
            slots.append(x.transpose(0, 1)[None].contiguous() if whole else x.flatten(1)[None])
    before = [x.clone() for x in slots]
    rotation = ()
    if case["rotate"]:
        angle = 10 * torch.randn(slot_rows, dim // 2)
        angle[filled:] = NAN
        rotation = (torch.tensor([case["rank"]]), angle.cos(), angle.sin())

    if "block_m" in case:
        tiles = Tiles(block_m=case["block_m"], block_n=case["block_n"], num_warps=4, num_stages=2)
    else:
        capability, _ = _device_facts(torch.device(device))
        tiles = tiles_for(capability, dtype=dtype, head_dim=dim, rotate=case["rotate"])
    launches = plan(
        blocks,
        dtype=dtype,
        slot_rows=slot_rows,
        whole_slots=whole,
        rotate=case["rotate"],
        tiles=tiles,
        num_multiprocessors=1,
        kv_splits=case["kv_splits"],
    )
    buffers = launches.buffers(device)
    for tensor in (buffers.out, buffers.parts, buffers.log_sums):
        tensor.fill_(NAN)
    there = [x.to(device) for x in slots]
    on_device = (received.to(device), there, torch.tensor([filled], device=device), [x.to(device) for x in rotation])
    with np.errstate(divide="ignore"):  # the logarithm of an empty range's sum
        out = launches.run(*on_device, buffers).cpu()
    slots = [x.cpu() for x in there]

    def token_slow(x, count):
        return x[0].transpose(0, 1) if whole else x[0].view(-1, count, dim)

    written, problems = [], []
    for number, (old, new) in enumerate(zip(before, slots, strict=True)):
        shard = blocks.shards[number // 2]
        old, new = token_slow(old, shard.num_heads), token_slow(new, shard.num_heads)
        start = shard.v_start if number % 2 else shard.k_start
        chunk = received[:, start : start + local * shard.num_heads].reshape(-1, shard.num_heads, dim)[:tokens]
        if not torch.equal(new[:tokens], chunk):
            problems.append(f"staging of slots {number}")
        if not torch.equal(new[tokens:].nan_to_num(12345.0), old[tokens:].nan_to_num(12345.0)):
            problems.append(f"rows past staging of slots {number}")
        written.append(torch.cat([chunk, old[tokens:filled]]))
    reference = expected(received, written, rotation, blocks)
    if not out.isfinite().all():
        problems.append(f"{int((~out.isfinite()).sum())} values of the output are not finite")
    error = (out.double() - reference).abs()
    index = np.unravel_index(int(error.nan_to_num(math.inf).argmax()), error.shape)
    return {
        "error": float(error[index] / reference.abs().max()),
        "worst": f"at {[int(i) for i in index]}: {float(out[index])} for {float(reference[index])}",
        "problems": problems,
        "programs": launches.attend.grid[0],
    }
