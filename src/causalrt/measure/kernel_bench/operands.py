"""Random operands of the cases, and the check of results that comes before any time is taken."""

import torch

from causalrt.plugins.kernel_launch import is_interpreted
from causalrt.plugins.triton_rope_attention import rope_attention_kernel

OTHERS = 4.0
"""Factor by which errors of the other sides may be larger, since they round between their ops."""


class WrongResultError(RuntimeError):
    """The result of a side is wrong."""


def require(error: float, limit: float, what: str) -> float:
    """Return the error, or raise WrongResultError if it is larger than the limit or not a number."""
    if not error <= limit:
        raise WrongResultError(f"{what}: error {error:.3e}, allowed {limit:.3e} (nan: values that nobody wrote)")
    return error


def element_bytes(dtype: torch.dtype) -> int:
    """Bytes of one value."""
    return torch.empty(0, dtype=dtype).element_size()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    return is_interpreted(rope_attention_kernel)


class Random:
    """Normal values on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Values of a shape, in the type of the case or in `dtype`."""
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype or self.dtype)
