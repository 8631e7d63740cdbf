"""Runs `rope_attention` cases in Triton's interpreter: one JSON line in, one JSON line out. Started by its test.

It is a process of its own because Triton looks at TRITON_INTERPRET once, and stays up because its imports take seconds.
"""

import json
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from causalrt.layout import plan_shares
from causalrt.plugins.rope_attention_launch import Tiles, plan
from causalrt.plugins.share_blocks import blocks_from_shares

NAN = float("nan")


def repair_bfloat16():
    """Triton 3.7's interpreter multiplies the bit patterns of bfloat16, and cuts float32 off where a GPU rounds."""
    builder = interpreter.InterpreterBuilder
    create_dot, cast_impl = builder.create_dot, builder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    builder.cast_impl = rounding_cast
    builder.create_fp_trunc = rounding_cast


def rotated(x_RHD, cos_RP, sin_RP, dtype):
    """Rounded to the type of the operands, as `causalrt::rotate` does: that is part of what is computed."""
    turned = torch.view_as_complex(x_RHD.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos_RP, sin_RP)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(dtype).double()


def expected(received, slots, rotation, blocks):
    """The output in float64, by index arithmetic of its own; `slots` `[rows, heads, D]`, filled rows only, chunk written."""
    ranks, local = blocks.world_size, blocks.local_tokens
    out = torch.full((ranks, blocks.gather_rows, blocks.head_dim), NAN, dtype=torch.float64)
    for share, k, v in zip(blocks.shares, slots[::2], slots[1::2], strict=True):
        q = [
            received[p, share.q_start + r * share.num_heads + h].double()
            for p in range(ranks)
            for r in range(share.query_rows)
            for h in range(share.num_heads)
        ]
        q, k, v = torch.stack(q).view(-1, share.num_heads, blocks.head_dim), k.double(), v.double()
        if rotation:
            rank, cos, sin = rotation
            first = share.first_row(int(rank), local)
            token = [
                min(p * local + min(first + r, local - 1), blocks.num_tokens - 1)
                for p in range(ranks)
                for r in range(share.query_rows)
            ]
            q = rotated(q, cos[token].double(), sin[token].double(), received.dtype)
            k = rotated(k, cos[: len(k)].double(), sin[: len(k)].double(), received.dtype)
        weights = (torch.einsum("rhd,lhd->hrl", q, k) / math.sqrt(blocks.head_dim)).softmax(-1)
        rows = torch.einsum("hrl,lhd->rhd", weights, v).reshape(ranks, -1, blocks.head_dim)
        out[:, share.out_start : share.out_start + share.query_rows * share.num_heads] = rows
    return out


def run(case):
    """The worst error of one case, relative to the largest value, and what was written where it must not be."""
    torch.manual_seed(case["seed"])
    dtype = getattr(torch, case["dtype"])
    ranks, tokens, dim, whole = case["ranks"], case["tokens"], case["dim"], case["whole"]
    local = math.ceil(tokens / ranks)
    shares = plan_shares(case["plan"], num_heads=case["heads"], world_size=ranks, local_tokens=local)
    heads, splits = [s.num_heads for s in shares], [s.split for s in shares]
    rows = sum(s.num_heads * (s.query_rows + 2 * local) for s in shares)
    blocks = blocks_from_shares((ranks, rows, dim), num_tokens=tokens, num_heads=heads, splits=splits)

    received = case["spread"] * torch.randn(ranks, rows, dim)
    for share in blocks.shares:
        for start in (share.k_start, share.v_start):  # the last ranks' padding rows
            part = received[:, start : start + local * share.num_heads]
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

    launches = plan(
        blocks,
        dtype=dtype,
        slot_rows=slot_rows,
        whole_slots=whole,
        rotate=case["rotate"],
        tiles=Tiles(block_m=case["block_m"], block_n=case["block_n"], num_warps=4, num_stages=2),
        num_multiprocessors=1,
        kv_splits=case["kv_splits"],
    )
    buffers = launches.buffers("cpu")
    for tensor in (buffers.out, buffers.parts, buffers.log_sums):
        tensor.fill_(NAN)
    with np.errstate(divide="ignore"):  # the logarithm of an empty range's sum
        out = launches.run(received, slots, torch.tensor([filled]), rotation, buffers)

    def token_slow(x, count):
        return x[0].transpose(0, 1) if whole else x[0].view(-1, count, dim)

    written, problems = [], []
    for number, (old, new) in enumerate(zip(before, slots, strict=True)):
        share = blocks.shares[number // 2]
        old, new = token_slow(old, share.num_heads), token_slow(new, share.num_heads)
        start = share.v_start if number % 2 else share.k_start
        chunk = received[:, start : start + local * share.num_heads].reshape(-1, share.num_heads, dim)[:tokens]
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    repair_bfloat16()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()
