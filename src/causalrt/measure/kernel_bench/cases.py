"""What all cases share: options, random operands, and the check of results that comes before any time is taken."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from causalrt.config import Config
from causalrt.errors import ConfigError
from causalrt.plugins.kernel_launch import is_interpreted
from causalrt.plugins.triton_rope_attention import rope_attention_kernel

OTHERS = 4.0
"""Factor by which errors of the other sides may be larger, since they round between their ops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelBenchOptions:
    """What a run measures; the help of `benchmarks/gpu_kernels.py` explains every field."""

    recipe: str
    dtype: str
    world_sizes: Sequence[int]
    sections: Sequence[str]
    forms: Sequence[str]
    repeats: int
    kv_rows: Sequence[int] | None = None
    tune: Sequence[str] | None = None
    kv_splits: Sequence[int] | None = None
    check: bool = True
    compile: bool = True

    def kv_lengths(self, config: Config) -> list[int]:
        """Numbers of filled rows: those of the options, or every whole number of chunks.

        Raises:
            ConfigError: a number is smaller than a chunk or larger than the slots.
        """
        rows, slots = config.tokens_per_chunk, config.slot_rows
        lengths = list(self.kv_rows or range(rows, slots + 1, rows))
        for length in lengths:
            if not rows <= length <= slots:
                raise ConfigError(
                    f"--kv-rows: {length} is not between a chunk ({rows} rows) and the slots ({slots}); choose another"
                )
        return lengths


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
