"""What a rank has used of its device: peak memory, and how often its host waited for it."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch

WAIT_WARNING = "called a synchronizing CUDA operation"
"""Part of torch's warning of a wait. (Enabling the mode emits another warning, which does not contain it.)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one rank has used; the fields are None where there is no GPU.

    Attributes:
        peak_device_bytes: peak of torch's allocator, CUDA graphs included and TensorRT's own memory excluded.
        device_waits: how often torch waited for the device while waits were counted, without TensorRT's and NCCL's waits.
    """

    peak_device_bytes: int | None = None
    device_waits: int | None = None


class WaitCounter:
    """Counts torch's warnings of synchronisations, from `begin` to `end`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._catching: warnings.catch_warnings[Any] | None = None
        self._caught: list[warnings.WarningMessage] = []

    def begin(self) -> None:
        """Start counting; without a GPU nothing is counted."""
        if self._device.type != "cuda":
            return
        self.end()
        self._catching = warnings.catch_warnings(record=True)
        caught = self._catching.__enter__()
        assert caught is not None
        self._caught = caught
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> int | None:
        """The number of waits since `begin`, or None if nothing was counted."""
        if self._catching is None:
            return None
        torch.cuda.set_sync_debug_mode("default")
        self._catching.__exit__(None, None, None)
        self._catching = None
        return sum(WAIT_WARNING in str(warning.message) for warning in self._caught)
