import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerances import ONE_OP, ROUNDED

from causalrt.config import override
from causalrt.layout import layout_from_config
from causalrt.model.wan.rope import angles, axis_pairs, rope_tables
from causalrt.model.wan.step import ChunkStep, StepOps
from causalrt.model.wan.transformer import Wan
from causalrt.plugins.rotate import rotate_pairs
from causalrt.recipes import recipe

# model_spec section 4, and the split's own rule for widths beyond its list
WIDTHS = {
    128: (44, 42, 42),
    32: (12, 10, 10),
    24: (8, 8, 8),
    20: (8, 6, 6),
    16: (8, 4, 4),
    8: (4, 2, 2),
    6: (2, 2, 2),
    4: (4, 0, 0),
    2: (2, 0, 0),
}


def make_config(*, world_size=1, height=4, width=6, frames=3, head_dim=16, chunks=4):
    return override(
        recipe("tiny"),
        {
            "model.dim": str(3 * head_dim),
            "video.latent_height": str(height),
            "video.latent_width": str(width),
            "video.chunk_frames": str(frames),
            "video.horizon_frames": str(frames * chunks),
            "video.window_frames": "none",
            "build.world_size": str(world_size),
        },
    )


def unreachable(*_):
    raise AssertionError("the rotation needs no op")


def rotation_of(config, rank, first_frame):
    """(cos, sin) `[S, D / 2]` as the step graph looks them up."""
    with torch.device("meta"):
        wan = Wan(config.model)
    ops = StepOps(all_to_all=unreachable, rotate=unreachable, attention=unreachable, kv_attention=unreachable)
    step = ChunkStep(wan, config, layout_from_config(config), ops)
    cos, sin = step.rotation(torch.tensor([rank]), torch.tensor([first_frame]))
    return cos[0], sin[0]


def specified_rotation(x, frame, y, x_place, head_dim):
    """model_spec section 4 for one token, written out in complex float64: `[H, D]` -> `[H, D]`."""
    spatial = 2 * (head_dim // 6)
    turned, start = np.empty_like(x), 0
    for position, width in ((frame, head_dim - 2 * spatial), (y, spatial), (x_place, spatial)):
        for j in range(width // 2):
            a, b = start + 2 * j, start + 2 * j + 1
            z = (x[:, a] + 1j * x[:, b]) * np.exp(1j * position * 10000.0 ** (-2 * j / width))
            turned[:, a], turned[:, b] = z.real, z.imag
        start += width
    assert start == head_dim
    return turned


@pytest.mark.parametrize("head_dim", WIDTHS)
def test_widths_of_the_axes(head_dim):
    assert tuple(2 * pairs for pairs in axis_pairs(head_dim)) == WIDTHS[head_dim]


@pytest.mark.parametrize("head_dim", range(2, 260, 2))
def test_axes_fill_the_head(head_dim):
    t, y, x = axis_pairs(head_dim)
    assert t + y + x == head_dim // 2
    assert t >= y == x
    assert (x > 0) == (head_dim >= 6)


def test_the_divisor_is_the_width_of_the_axis():
    # 128 channels a head: 22 pairs for time, 21 for rows and columns
    assert angles([1], 22)[0, 1] == pytest.approx(10000 ** (-2 / 44), rel=1e-15)
    assert angles([1], 21)[0, 20] == pytest.approx(10000 ** (-40 / 42), rel=1e-15)
    np.testing.assert_array_equal(angles([0, 3], 4)[:, 0], [0, 3])


@settings(max_examples=100, deadline=None)
@given(
    world_size=st.integers(1, 16),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    frames=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 8, 16, 20]),
)
def test_a_row_depends_on_the_global_index_alone(world_size, height, width, frames, head_dim):
    config = make_config(world_size=world_size, height=2 * height, width=2 * width, frames=frames, head_dim=head_dim)
    layout = layout_from_config(config)
    tables = rope_tables(config, layout)
    tokens = config.tokens_per_chunk
    t, y, x = axis_pairs(head_dim)
    assert tables.spatial.shape == (world_size, layout.local_tokens, y + x)
    assert tables.frame_in_chunk.shape == (world_size, layout.local_tokens)

    index = np.arange(tokens)  # frame slowest, then row, then column (model_spec section 2)
    frame, row, column = index // (height * width), index // width % height, index % width
    spatial = tables.spatial.reshape(world_size * layout.local_tokens, y + x)
    in_chunk = tables.frame_in_chunk.ravel()
    np.testing.assert_array_equal(in_chunk[:tokens], frame)
    np.testing.assert_array_equal(spatial[:tokens], np.hstack([angles(row, y), angles(column, x)]))
    # Padding repeats the last token: a frame within the chunk, so that a lookup never passes the horizon.
    assert (in_chunk[tokens:] == frames - 1).all()
    assert (spatial[tokens:] == spatial[tokens - 1]).all()
    np.testing.assert_array_equal(tables.temporal, angles(np.arange(4 * frames), t))


@pytest.mark.parametrize("head_dim", [128, 32, 24, 20, 16, 8, 6, 4, 2])
@pytest.mark.parametrize("first_frame", [0, 3, 9])
def test_rotation_against_the_specification(head_dim, first_frame):
    config = make_config(world_size=2, height=4, width=6, head_dim=head_dim)  # 18 tokens; rank 1 begins inside a frame
    generator = np.random.default_rng(head_dim)
    for rank in range(2):
        x = generator.standard_normal((9, 3, head_dim))
        cos, sin = rotation_of(config, rank, first_frame)
        got = rotate_pairs(torch.from_numpy(x.reshape(1, 9, -1)).float(), cos[None], sin[None], 3)
        for local in range(9):
            token = rank * 9 + local
            wanted = specified_rotation(x[local], first_frame + token // 6, token // 3 % 2, token % 3, head_dim)
            np.testing.assert_allclose(got[0, local].view(3, head_dim), wanted, rtol=0, atol=ONE_OP)


def test_the_last_chunk_of_the_longest_video():
    config = make_config(frames=4, chunks=256, height=2, width=2)
    cos, sin = rotation_of(config, 0, 1020)
    wanted = [math.cos(frame * 10000 ** (-2 / 8)) for frame in range(1020, 1024)]
    torch.testing.assert_close(cos[:, 1], torch.tensor(wanted), rtol=0, atol=6e-8)  # built in float64, rounded once
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos), rtol=0, atol=3e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_tables_are_float32_whatever_the_precision(precision):
    config = override(make_config(), {"build.precision": precision})
    constants = rope_tables(config, layout_from_config(config)).constants()
    assert {name: tensor.dtype for name, tensor in constants.items()} == {
        "temporal_cos": torch.float32,
        "temporal_sin": torch.float32,
        "spatial_cos": torch.float32,
        "spatial_sin": torch.float32,
        "frame_in_chunk": torch.int64,
    }


def test_no_two_ranks_or_frames_share_a_rotation():
    config = make_config(world_size=3)
    rows = torch.cat([torch.hstack(rotation_of(config, rank, 3)) for rank in range(3)])
    assert len(torch.unique(rows, dim=0)) == 18


# ---- rotate_pairs


@pytest.mark.parametrize(("heads", "head_dim", "rows"), [(1, 6, 1), (3, 16, 7), (5, 10, 13)])
def test_rotate_pairs_against_float64(heads, head_dim, rows):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, heads * head_dim, generator=generator, dtype=torch.float64)
    angle = torch.rand(1, rows, head_dim // 2, generator=generator, dtype=torch.float64) * 1000
    got = rotate_pairs(x.float(), angle.cos().float(), angle.sin().float(), heads)
    even, odd = x.view(rows, heads, head_dim)[..., 0::2], x.view(rows, heads, head_dim)[..., 1::2]
    cos, sin = angle[0, :, None].cos(), angle[0, :, None].sin()
    wanted = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).reshape(1, rows, -1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=ROUNDED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotate_pairs_works_in_float32_and_rounds_once(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 5, 24, generator=generator).to(dtype)
    angle = torch.rand(1, 5, 4, generator=generator) * 1000
    got = rotate_pairs(x, angle.cos(), angle.sin(), 3)
    assert got.dtype == dtype
    assert torch.equal(got, rotate_pairs(x.float(), angle.cos(), angle.sin(), 3).to(dtype))
