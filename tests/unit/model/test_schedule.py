import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.tolerances import ROUNDED

from causalrt.config import SamplerConfig
from causalrt.model.schedule import schedule_from_config, scheduler_tables
from causalrt.model.wan.transformer import sinusoid

GOLDEN = sorted((Path(__file__).parents[2] / "data" / "golden").glob("*.safetensors"))


def float32s(*values):
    return [float(np.float32(value)) for value in values]


# ---- values of model_spec sections 7 and 7b


def test_the_four_warped_steps():
    schedule = schedule_from_config(SamplerConfig())
    assert schedule.timesteps == (1000.0, 937.5, 833.33331298828125, 625.0)
    assert schedule.sigmas == (1.0, 0.9375, 0.83333331346511841, 0.625)
    assert schedule.context_timestep == 0.0


def test_unwarped_steps_keep_the_integer_and_take_the_nearest_sigma():
    schedule = schedule_from_config(SamplerConfig(steps=(1000, 750, 500, 250), warp=False))
    assert schedule.timesteps == (1000.0, 750.0, 500.0, 250.0)
    np.testing.assert_allclose(schedule.sigmas, [1, 0.75000006, 0.50059956, 0.25159743], rtol=0, atol=5e-9)
    sigmas, timesteps = scheduler_tables(5.0)
    assert list(schedule.sigmas) == [float(sigmas[i]) for i in (0, 625, 833, 937)]
    np.testing.assert_allclose(timesteps[[625, 833, 937]], [750.00006, 500.59955, 251.59743], rtol=0, atol=5e-6)


def test_shift_eight():
    schedule = schedule_from_config(SamplerConfig(shift=8.0))
    np.testing.assert_allclose(schedule.timesteps, [1000, 960, 888.888916, 727.272766], rtol=0, atol=5e-7)


def test_two_steps():
    schedule = schedule_from_config(SamplerConfig(steps=(1000, 500)))
    assert schedule.timesteps == (1000.0, 833.33331298828125)
    assert schedule.sigmas == (1.0, 0.83333331346511841)


@pytest.mark.parametrize("warp", [True, False])
def test_context_timestep_is_never_warped(warp):
    assert schedule_from_config(SamplerConfig(warp=warp, context_timestep=100.0)).context_timestep == 100.0


@pytest.mark.parametrize("warp", [True, False])
def test_every_single_step_has_a_level(warp):
    sigmas, _ = scheduler_tables(5.0)
    found = [schedule_from_config(SamplerConfig(steps=(step,), warp=warp)).sigmas[0] for step in range(1000, 0, -1)]
    assert all(a >= b for a, b in itertools.pairwise(found))
    if warp:
        assert found == sigmas.tolist()


# ---- the tables


# 1.2e-7 is model_spec's bound for shift 5; elsewhere the four roundings may add up to twice that.
@pytest.mark.parametrize(("shift", "atol"), [(1.0, 2.4e-7), (3.0, 2.4e-7), (5.0, 1.2e-7), (8.0, 2.4e-7)])
def test_tables_against_float64(shift, atol):
    sigmas, timesteps = scheduler_tables(shift)
    u = 1 - np.arange(1000) / 1000
    exact = shift * u / (1 + (shift - 1) * u)
    assert sigmas.dtype == timesteps.dtype == np.float32
    np.testing.assert_allclose(sigmas, exact, rtol=0, atol=atol)
    np.testing.assert_allclose(timesteps, 1000 * exact, rtol=0, atol=1.4e-4 * atol / 1.2e-7)
    assert (np.diff(timesteps) < 0).all()


def test_there_are_recordings():
    assert len(GOLDEN) >= 8


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_tables_equal_the_recorded_ones_bit_for_bit(path):
    with safe_open(path, framework="np") as file:
        config = json.loads(file.metadata()["config"])
        recorded = {name: file.get_tensor(f"sched.{name}") for name in ("sigmas", "timesteps", "step_list")}
    sigmas, timesteps = scheduler_tables(config["timestep_shift"])
    np.testing.assert_array_equal(sigmas.view(np.uint32), recorded["sigmas"].view(np.uint32))
    np.testing.assert_array_equal(timesteps.view(np.uint32), recorded["timesteps"].view(np.uint32))
    sampler = SamplerConfig(
        steps=tuple(config["denoising_step_list"]),
        shift=config["timestep_shift"],
        warp=config["warp_denoising_step"],
        context_timestep=config["context_noise"],
    )
    assert list(schedule_from_config(sampler).timesteps) == recorded["step_list"].tolist()


# ---- the sinusoid (model_spec section 2)


def test_sinusoid_check_values():
    got = sinusoid(833.33331298828125, 256)
    assert got.dtype.itemsize == 8
    cos, sin = got[:128], got[128:]
    np.testing.assert_allclose(cos[:2], [-0.68858544, -0.87915817], rtol=0, atol=5e-9)
    np.testing.assert_allclose(sin[[0, 127]], [-0.72515522, 0.08943101], rtol=0, atol=5e-9)


@pytest.mark.parametrize("freq_dim", [2, 34, 256])
def test_sinusoid_against_the_formula(freq_dim):
    half = freq_dim // 2
    angle = 937.5 * 10000.0 ** (-np.arange(half) / half)
    np.testing.assert_allclose(
        sinusoid(937.5, freq_dim), np.concatenate([np.cos(angle), np.sin(angle)]), rtol=0, atol=1e-12
    )


def test_the_algebra_of_the_sampler() -> None:
    """The flow is noise - x0, so the rows that noise was added to come back; steps compute x0 in float64."""
    schedule = schedule_from_config(SamplerConfig())
    x0, noise = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for step in range(len(schedule.sigmas)):
        x = schedule.add_noise(step, x0, noise)
        clean = schedule.clean(step, x, noise - x0)
        assert clean.dtype == torch.float32
        torch.testing.assert_close(clean, x0, rtol=0, atol=ROUNDED)
