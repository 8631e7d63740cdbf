import math
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tolerances import MODULE
from torch.export import Dim

from causalrt.config import override
from causalrt.errors import ConfigError
from causalrt.export.random_weights import random_weights
from causalrt.export.trace import TRACED_OPS, step_arguments
from causalrt.export.translate import onnx_from_program
from causalrt.layout import layout_from_config, slots_from_config
from causalrt.model.wan.relative_rope import RelativeRope
from causalrt.model.wan.rope import angles, axis_pairs
from causalrt.model.wan.step import ChunkStep, FusedOps
from causalrt.model.wan.transformer import Wan, wan_from_weights
from causalrt.plugins.qk_norm_rope import qk_norm_rope
from causalrt.plugins.rope_attention import attend_in_place, attend_to_copies, rope_attention_rows
from causalrt.plugins.shard_blocks import blocks_from_shares
from causalrt.recipes import recipe

FAR = 30_000_000
"""A first frame after 87 days, at 4 latent frames a second."""


def make_config(*, chunk=3, sink=1, window=7, horizon=21, head_dim=24, **changes):
    return override(
        recipe("tiny"),
        {
            "model.dim": str(2 * head_dim),
            "model.num_heads": "2",
            "video.latent_height": "4",
            "video.latent_width": "6",
            "video.chunk_frames": str(chunk),
            "video.sink_frames": str(sink),
            "video.window_frames": str(window),
            "video.horizon_frames": str(horizon),
            "video.time_index": "relative",
            **changes,
        },
    )


def frames_in_slots(plan, first_frame):
    """What the commits of earlier chunks have left in the filled slots, staging included; sinks are never written again."""
    chunk = plan.staging_frames
    slots = np.full(plan.capacity_frames, -1)
    slots[chunk : chunk + plan.sink_frames] = np.arange(plan.sink_frames)
    start = max(0, first_frame - chunk * (math.ceil(plan.ring_frames / chunk) + 1))
    for first in range(start, first_frame + chunk, chunk):
        slots[:chunk] = np.arange(first, first + chunk)
        if first < first_frame:
            for staged, slot in list(plan.commits(first)):
                slots[slot] = slots[staged]
    return slots[: plan.valid_frames(first_frame)]


def positions_in_slots(config, first_frame):
    """Positions in time that attention shall see: the frames', but sinks not further off than in the horizon's last chunk."""
    plan = slots_from_config(config)
    frames = frames_in_slots(plan, first_frame)
    sinks = slice(plan.staging_frames, plan.staging_frames + plan.sink_frames)
    frames[sinks] += max(0, first_frame - (config.video.horizon_frames - config.video.chunk_frames))
    return frames


def angles_of_rows(config, positions, dtype=torch.float64):
    """`[len(positions) * T, D / 2]`, every product in `dtype`."""
    place = torch.arange(config.tokens_per_frame)
    axes = (
        torch.as_tensor(positions).repeat_interleave(len(place)),
        (place // config.grid_width).repeat(len(positions)),
        (place % config.grid_width).repeat(len(positions)),
    )
    pairs = axis_pairs(config.model.head_dim)
    steps = (torch.from_numpy(angles([1], count))[0].to(dtype) for count in pairs)
    return torch.cat([position.to(dtype)[:, None] * step for position, step in zip(axes, steps, strict=True)], dim=-1)


def tables(config, first_frame):
    return RelativeRope(config)(torch.tensor([first_frame]))


@settings(max_examples=200, deadline=None)
@given(
    chunk=st.integers(1, 6),
    sink=st.integers(0, 6),
    ring=st.integers(0, 9),
    horizon=st.integers(1, 12),
    index=st.one_of(st.integers(0, 30), st.integers(FAR, 2 * FAR)),
    head_dim=st.sampled_from([2, 6, 16, 128]),
)
@example(chunk=3, sink=5, ring=0, horizon=4, index=1, head_dim=16)  # a sink longer than a chunk, half filled
@example(chunk=3, sink=0, ring=0, horizon=1, index=FAR, head_dim=16)  # nothing but staging
def test_tables_in_float64(chunk, sink, ring, horizon, index, head_dim):
    config = make_config(chunk=chunk, sink=sink, window=chunk + sink + ring, horizon=chunk * horizon, head_dim=head_dim)
    first_frame = chunk * index
    positions = positions_in_slots(config, first_frame)
    angle = angles_of_rows(config, positions - first_frame)
    cos, sin = tables(config, first_frame)
    assert cos.shape == sin.shape == (config.slot_rows, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos[: len(angle)] - angle.cos()).abs().max() < 1e-7
    assert (sin[: len(angle)] - angle.sin()).abs().max() < 1e-7
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos), rtol=0, atol=3e-7)  # unfilled slots too
    distance = positions[:chunk].max() - positions.min()
    assert distance < config.video.horizon_frames, "a query sees no key from further than within the horizon"


def turned(x_RHD, angle_RP):
    pairs = torch.view_as_complex(x_RHD.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.exp(1j * angle_RP)[:, None]).flatten(-2)


def attended(q, k, v):
    weights = (torch.einsum("rhd,lhd->hrl", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hrl,lhd->rhd", weights, v.double()).flatten(1)


@pytest.mark.parametrize("whole", [False, True], ids=["prefix", "whole"])
@pytest.mark.parametrize(("sink", "window", "head_dim"), [(0, 3, 16), (1, 7, 24), (2, 8, 128), (3, 9, 16)])
@pytest.mark.parametrize("first_frame", [0, 3, 6, 18, 21, 300, FAR])
def test_attention_is_that_of_absolute_positions(sink, window, head_dim, first_frame, whole):
    config = make_config(sink=sink, window=window, head_dim=head_dim)
    positions, heads = positions_in_slots(config, first_frame), config.model.num_heads
    tokens, filled = config.tokens_per_chunk, len(positions) * config.tokens_per_frame
    bound = config.slot_rows if whole else filled
    torch.manual_seed(first_frame)
    received = torch.randn(1, 3 * tokens * heads, head_dim)
    slots = [torch.randn(1, heads, bound, head_dim) if whole else torch.randn(1, bound, heads * head_dim) for _ in "kv"]
    rotation = (torch.tensor([0]), *tables(config, first_frame))
    blocks = blocks_from_shares(received.shape, num_tokens=tokens, num_heads=[heads], splits=[1])
    out = rope_attention_rows(received, slots, torch.tensor([filled]), rotation, blocks)

    q = received[0, : tokens * heads].view(tokens, heads, head_dim)
    k, v = (x[0].transpose(0, 1)[:filled] if whole else x[0].view(-1, heads, head_dim) for x in slots)
    angle = angles_of_rows(config, positions)
    expected = attended(turned(q, angle[:tokens]), turned(k, angle), v)
    assert (out.view(tokens, -1) - expected).abs().max() < MODULE
    if first_frame == FAR and window > 3:
        angle = angles_of_rows(config, positions, torch.float32).double()
        in_float32 = attended(turned(q, angle[:tokens]), turned(k, angle), v)
        assert (in_float32 - expected).abs().max() > 1e-4, "absolute angles in float32 would do: the test shows nothing"


# ---- in a graph


@pytest.mark.parametrize(("sink", "window"), [(1, 7), (0, 9), (2, 5)], ids=["sink and ring", "ring", "sink"])
def test_onnx_in_standard_ops(sink, window):
    config = make_config(sink=sink, window=window)
    rope = RelativeRope(config)
    program = torch.export.export(rope, (torch.tensor([3]),))
    model = ir.to_proto(onnx_from_program(program, input_names=["first_frame"], output_names=["cos", "sin"]))
    assert {node.domain for node in model.graph.node} == {""}
    session = ort.InferenceSession(model.SerializeToString())
    for first_frame in (0, 3, 6, 18, 21, FAR):
        got = session.run(None, {"first_frame": np.array([first_frame])})
        for table, expected in zip(got, tables(config, first_frame), strict=True):
            assert np.array_equal(table, expected.numpy())


def fused_step(config, attend):
    weights = dict(random_weights(config.model, seed=0))
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    ops = replace(TRACED_OPS, fused=FusedOps(qk_norm_rope=qk_norm_rope, rope_attention=attend))
    return ChunkStep(wan_from_weights(config.model, weights), config, layout_from_config(config), ops).eval()


def arguments_of_step(config, whole):
    """Of a chunk that finds all slots filled."""
    random = torch.Generator().manual_seed(0)

    def drawn(arguments):
        if isinstance(arguments, torch.Tensor):
            return torch.randn(arguments.shape, generator=random) if arguments.is_floating_point() else arguments
        return type(arguments)(drawn(argument) for argument in arguments)

    given = drawn(step_arguments(config, whole_slots=whole)[:7])
    return (*given, torch.tensor([config.slot_rows]))


def at_frame(arguments, first_frame, rows=None):
    """Copies, since a step in eager writes to its slots; token by token, a prefix of the slots."""
    *first, kv, cross_kv, kv_rows = arguments
    first[4] = torch.tensor([first_frame])
    copies = [
        [tuple(x.clone() if rows is None else x[:, :rows].clone() for x in pair) for pair in layer] for layer in kv
    ]
    return (*first, copies, cross_kv, kv_rows if rows is None else torch.tensor([rows]))


@pytest.mark.parametrize("whole", [False, True], ids=["prefix", "whole"])
def test_a_traced_step_serves_every_chunk(whole):
    config = make_config()
    arguments, dynamic = arguments_of_step(config, whole), None
    if not whole:
        rows = Dim("kv_rows", min=config.tokens_per_chunk, max=config.slot_rows)
        kv = [[({1: rows}, {1: rows}) for _ in layer] for layer in arguments[5]]
        dynamic = (*[None] * 5, kv, [(None, None) for _ in arguments[6]], None)
    program = torch.export.export(fused_step(config, attend_to_copies), arguments, dynamic_shapes=dynamic)
    looked_up = Counter(
        node.args[0].name
        for node in program.graph.nodes
        if node.target is torch.ops.aten.index_select.default and "temporal" in node.args[0].name
    )
    assert len(looked_up) == 2
    assert set(looked_up.values()) == {1}, "cosines and sines are looked up once a step, not once a layer"
    traced, step = program.module(), fused_step(config, attend_in_place)
    flows = []
    for first_frame, rows in ((0, 18), (3, 36), (6, None), (21, None), (FAR, None)):
        rows = None if whole else rows
        flow, written = traced(*at_frame(arguments, first_frame, rows))
        expected, expected_written = step(*at_frame(arguments, first_frame, rows))
        torch.testing.assert_close(flow, expected, rtol=0, atol=MODULE)
        torch.testing.assert_close(written, expected_written, rtol=0, atol=MODULE)
        flows.append(flow)
    assert (flows[-1] - flows[-2]).abs().max() < MODULE, "both are at a distance from the sink that no longer grows"
    assert (flows[-1] - flows[-3]).abs().max() > 1e-3


def test_keys_lie_unrotated_in_the_slots():
    config = make_config()
    arguments, step = arguments_of_step(config, whole=False), fused_step(config, attend_in_place)
    staged = []
    for first_frame in (0, 6, FAR):
        _, written = step(*at_frame(arguments, first_frame))
        staged.append(written[0][0][0][:, : config.tokens_per_chunk])  # the keys of the first layer
    assert torch.equal(staged[0], staged[1])
    assert torch.equal(staged[0], staged[2])


def test_a_step_without_fused_ops_is_refused():
    config = make_config()
    with torch.device("meta"):
        wan = Wan(config.model)
    with pytest.raises(ConfigError, match=r"video\.time_index is relative.*fused ops.*video\.time_index=global"):
        ChunkStep(wan, config, layout_from_config(config), TRACED_OPS)
