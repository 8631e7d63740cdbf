"""The few-step schedule: which timesteps the model sees, and the noise level of each (model_spec section 7).

The reference's tables are float32; they are followed operation by operation, so they come out bit for bit.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from causalrt.config import SamplerConfig

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Timesteps fed to the sinusoid and the noise level sigma of each denoising step, and the refresh's timestep."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    context_timestep: float


def scheduler_tables(shift: float) -> tuple[Float32Array, Float32Array]:
    """(sigmas, timesteps), `[1000]` each, float32: sigma = s u / (1 + (s - 1) u), tau = 1000 sigma, u from 1 towards 0."""
    step, s = np.float32(-0.001), np.float32(shift)
    i = np.arange(1000)
    # The first half is rounded once (a fused multiply-add there), the second half counts from the other end.
    u = np.where(i < 500, 1.0 + np.float64(step) * i, -np.float64(step) * (1000 - i)).astype(np.float32)
    sigmas = (s * u) / (np.float32(1) + (s - np.float32(1)) * u)
    return sigmas, np.float32(1000) * sigmas


def schedule_from_config(sampler: SamplerConfig) -> Schedule:
    """Look the step list up in the tables: warped steps by index 1000 - step, unwarped ones by the nearest timestep."""
    sigmas, timesteps = scheduler_tables(sampler.shift)
    if sampler.warp:
        used = [float(np.append(timesteps, np.float32(0))[1000 - step]) for step in sampler.steps]
    else:
        used = [float(step) for step in sampler.steps]
    nearest = [int(np.argmin(np.abs(timesteps - np.float32(t)))) for t in used]
    return Schedule(
        timesteps=tuple(used),
        sigmas=tuple(float(sigmas[i]) for i in nearest),
        context_timestep=sampler.context_timestep,
    )
