import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrt.config import override, recipe
from causalrt.layout import SlotPlan, slots_from_config
from causalrt.model.relative_rope import relative_tables, slot_frames
from causalrt.model.rope import angles, axis_pairs
from causalrt.plugins.rope_attention import rope_attention_rows
from causalrt.plugins.share_blocks import blocks_from_shares


@settings(max_examples=200, deadline=None)
@given(chunk=st.integers(1, 5), sink=st.integers(0, 6), ring=st.integers(0, 9), chunks=st.integers(1, 12))
def test_slot_frames_are_those_that_commits_leave(chunk, sink, ring, chunks):
    plan = SlotPlan(capacity_frames=chunk + sink + ring, chunk_frames=chunk, sink_frames=sink)
    slots = np.full(plan.capacity_frames, -1)
    for first in range(0, chunk * chunks, chunk):
        slots[:chunk] = np.arange(first, first + chunk)
        filled = plan.valid_frames(first)
        assert slot_frames(plan, first).tolist() == slots[:filled].tolist()
        for staged, slot in list(plan.commits(first)):
            slots[slot] = slots[staged]


def make_config(*, sink=1, window=7, head_dim=24):
    return override(
        recipe("tiny"),
        {
            "model.dim": str(2 * head_dim),
            "model.num_heads": "2",
            "video.latent_height": "4",
            "video.latent_width": "6",
            "video.chunk_frames": "3",
            "video.sink_frames": str(sink),
            "video.window_frames": str(window),
            "video.horizon_frames": "21",
        },
    )


def turned(x_RHD, angle_RP):
    pairs = torch.view_as_complex(x_RHD.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.exp(1j * angle_RP)[:, None]).flatten(-2)


def attended(q, k, v):
    weights = (torch.einsum("rhd,lhd->hrl", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hrl,lhd->rhd", weights, v.double()).flatten(1)


def absolute_angles(config, frames, dtype):
    """`[len(frames) * T, D / 2]`, every product in `dtype`."""
    place = torch.arange(config.tokens_per_frame)
    axes = (
        torch.as_tensor(frames).repeat_interleave(len(place)),
        (place // config.grid_width).repeat(len(frames)),
        (place % config.grid_width).repeat(len(frames)),
    )
    pairs = axis_pairs(config.model.head_dim)
    steps = (torch.from_numpy(angles([1], count))[0].to(dtype) for count in pairs)
    return torch.cat([position.to(dtype)[:, None] * step for position, step in zip(axes, steps, strict=True)], dim=-1)


@pytest.mark.parametrize(("sink", "window", "head_dim"), [(0, 3, 16), (1, 7, 24), (2, 8, 128), (3, 9, 16)])
@pytest.mark.parametrize("first_frame", [0, 3, 6, 300, 999_999])
def test_attention_is_that_of_absolute_positions(sink, window, head_dim, first_frame):
    config = make_config(sink=sink, window=window, head_dim=head_dim)
    plan, per_frame, heads = slots_from_config(config), config.tokens_per_frame, config.model.num_heads
    frames = slot_frames(plan, first_frame)
    tokens, filled, rows = config.tokens_per_chunk, len(frames) * per_frame, plan.capacity_frames * per_frame
    torch.manual_seed(first_frame)
    received = torch.randn(1, 3 * tokens * heads, head_dim)
    slots = [torch.randn(1, rows, heads * head_dim) for _ in "kv"]
    rotation = (torch.tensor([0]), *relative_tables(config, first_frame))
    blocks = blocks_from_shares(received.shape, num_tokens=tokens, num_heads=[heads], splits=[1])
    out = rope_attention_rows(received, slots, torch.tensor([filled]), rotation, blocks)

    q = received[0, : tokens * heads].view(tokens, heads, head_dim)
    k, v = (x[0, :filled].view(filled, heads, head_dim) for x in slots)
    angle = absolute_angles(config, frames, torch.float64)
    expected = attended(turned(q, angle[:tokens]), turned(k, angle), v)
    assert (out.view(tokens, -1) - expected).abs().max() < 1e-5
    if first_frame == 999_999 and window > 3:
        angle = absolute_angles(config, frames, torch.float32).double()
        in_float32 = attended(turned(q, angle[:tokens]), turned(k, angle), v)
        assert (in_float32 - expected).abs().max() > 1e-4, "absolute angles in float32 would do: the test shows nothing"


def test_tables_have_a_row_for_every_slot_row():
    config = make_config()
    cos, sin = relative_tables(config, 0)
    assert cos.shape == sin.shape == (7 * config.tokens_per_frame, 12)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos[3 * config.tokens_per_frame :], cos[: config.tokens_per_frame].repeat(4, 1))
