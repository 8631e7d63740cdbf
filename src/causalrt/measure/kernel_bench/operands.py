"""What both kernels' cases are made of: values, types, and the comparison that comes before any time is taken."""

import torch

from causalrt.plugins.kernel_launch import is_interpreted
from causalrt.plugins.triton_rope_attention import rope_attention_kernel

OTHERS = 4.0
"""How much further off others may be, who round between their ops."""


class WrongResultError(RuntimeError):
    """A side does not compute what it should."""


def require(error: float, limit: float, what: str) -> float:
    """The error, which is no larger than the limit, and a number."""
    if not error <= limit:
        raise WrongResultError(f"{what}: error {error:.3e}, allowed {limit:.3e} (nan: values that nobody wrote)")
    return error


def element_bytes(dtype: torch.dtype) -> int:
    """Bytes of a value."""
    return torch.empty(0, dtype=dtype).element_size()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter here."""
    return is_interpreted(rope_attention_kernel)


class Random:
    """Normal values on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Values of a shape, in the type of the case or another."""
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype or self.dtype)
