import itertools
import math

import pytest
import torch

from causalrt.config import override
from causalrt.errors import RequestError
from causalrt.recipes import recipe
from causalrt.runtime.noise import RecordedNoise, SeededNoise, checked_noise

SHAPE = (37, 64)


def test_a_draw_depends_on_seed_chunk_and_draw_alone():
    # No rank and no world size is asked for: every rank makes the same whole chunk and keeps its rows.
    noise = SeededNoise(7)
    wanted = noise.draw(2, 1, SHAPE)
    noise.draw(0, 0, (5, 3))  # order and history do not matter
    assert torch.equal(noise.draw(2, 1, SHAPE), wanted)
    assert torch.equal(SeededNoise(7).draw(2, 1, SHAPE), wanted)
    assert wanted.shape == SHAPE
    assert wanted.dtype == torch.float32


def test_all_draws_differ():
    draws = [
        SeededNoise(seed).draw(chunk, draw, SHAPE)
        for seed, chunk, draw in itertools.product((0, 1, 2**63, 2**64 - 1), (0, 1, 340), (0, 1, 3))
    ]
    flat = torch.stack(draws).flatten(1)
    assert len(torch.unique(flat)) > 0.95 * flat.numel()  # float32 values of normals do collide, rarely
    correlation = torch.corrcoef(flat).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(flat.shape[1])


def test_chunk_and_draw_are_not_interchangeable():
    noise = SeededNoise(3)
    assert not torch.equal(noise.draw(1, 2, SHAPE), noise.draw(2, 1, SHAPE))


def test_known_value():
    # Videos of a seed must not change between versions.
    first = SeededNoise(1234).draw(1, 2, (2, 2)).flatten()
    wanted = [-0.6241953372955322, -1.3890094757080078, -0.13346190750598907, -0.3996649384498596]
    assert first.tolist() == pytest.approx(wanted, rel=1e-6)


def test_distribution():
    x = SeededNoise(11).draw(0, 0, (4680, 64)).double()
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert 4 < x.abs().max() < 7
    assert abs((x[1:] * x[:-1]).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_seeds_within_bounds(seed):
    assert SeededNoise(seed).draw(0, 0, (1, 2)).isfinite().all()


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**70)])
def test_seeds_out_of_bounds_are_named(seed):
    with pytest.raises(RequestError, match=rf"seed.*{seed}"):
        SeededNoise(seed)


def test_recorded_draws_come_back_as_they_are():
    draws = torch.arange(2 * 4 * 3 * 5.0).view(2, 4, 3, 5)
    noise = RecordedNoise(draws)
    for chunk, draw in itertools.product(range(2), range(4)):
        assert torch.equal(noise.draw(chunk, draw, (3, 5)), draws[chunk, draw])


TWO_KINDS = override(recipe("tiny"), {"video.horizon_frames": "13", "video.independent_first_frame": "true"})


def test_noise_of_chunks_of_two_lengths():
    draws = [torch.randn(4, rows, 64) for rows in (6, 18, 18)]
    noise = checked_noise(TWO_KINDS, draws, num_chunks=3, num_given=0)
    kept = [draw.clone() for draw in draws]
    for draw in draws:
        draw.zero_()  # the caller's memory is the caller's
    for chunk, draw in itertools.product(range(3), range(4)):
        assert torch.equal(noise.draw(chunk, draw, (kept[chunk].shape[1], 64)), kept[chunk][draw])


def test_noise_after_an_initial_frame_is_one_tensor():
    draws = torch.randn(2, 4, 18, 64, dtype=torch.float64)
    noise = checked_noise(TWO_KINDS, draws, num_chunks=2, num_given=1)
    assert torch.equal(noise.draw(1, 3, (18, 64)), draws[1, 3].float())


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(4, 18, 64), (4, 18, 64)], r"\[4, 18, 64\] for chunk 0, not \[4, 6, 64\]"),
        ([(4, 6, 64), (3, 18, 64)], r"\[3, 18, 64\] for chunk 1, not \[4, 18, 64\]"),
        ([(4, 6, 64)], "1 chunks, not 2"),
        ([(4, 6, 64), (4, 18, 64), (4, 18, 64)], "3 chunks, not 2"),
        ([], "0 chunks, not 2"),
    ],
)
def test_noise_that_does_not_fit_is_refused(shapes, said):
    draws = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(RequestError, match=rf"noise must be .*, got {said}"):
        checked_noise(TWO_KINDS, draws, num_chunks=2, num_given=0)
