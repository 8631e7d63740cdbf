"""The few-step schedule: the timesteps given to the model, the noise level of each, and the sampler's arithmetic.

The reference's tables are float32 (model_spec section 7). Its operations are repeated one by one, so the tables are equal bit
for bit. With x = (1 - sigma) x0 + sigma noise, the model predicts the flow noise - x0, from which each step computes x0.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from causalrt.config import SamplerConfig

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The denoising steps of a chunk, and the context pass that follows them.

    Attributes:
        timesteps: timestep of each denoising step.
        sigmas: noise level of each denoising step.
        context_timestep: timestep of the context pass.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    context_timestep: float

    def clean(self, step: int, x: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
        """Return the float32 x0 of a step, given its noisy rows `x` and the predicted flow."""
        return (x.double() - self.sigmas[step] * flow.double()).float()

    def add_noise(self, step: int, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the noisy rows from which a step starts."""
        return (1 - self.sigmas[step]) * x0 + self.sigmas[step] * noise


def scheduler_tables(shift: float) -> tuple[Float32Array, Float32Array]:
    """Return (sigmas, timesteps), `[1000]` float32 each.

    sigma = s u / (1 + (s - 1) u) and tau = 1000 sigma, for u from 1 towards 0.
    """
    step, s = np.float32(-0.001), np.float32(shift)
    i = np.arange(1000)
    # The first half is rounded once (a fused multiply-add there), and the second half counts from the other end.
    u = np.where(i < 500, 1.0 + np.float64(step) * i, -np.float64(step) * (1000 - i)).astype(np.float32)
    sigmas = (s * u) / (np.float32(1) + (s - np.float32(1)) * u)
    return sigmas, np.float32(1000) * sigmas


def schedule_from_config(sampler: SamplerConfig) -> Schedule:
    """Look up the steps in the tables: warped steps by index 1000 - step, unwarped ones by the nearest timestep."""
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
