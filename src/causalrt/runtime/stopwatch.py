"""Stopwatches: the host's clock on a CPU, and CUDA events on a GPU, where a call returns before its work is done."""

import os
import time
from pathlib import Path
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """Marks moments and measures the time between two of them."""

    def mark(self) -> int:
        """Mark a moment and return its number, without waiting; on a GPU, the moment when the work queued so far is done."""

    def wait(self, mark: int) -> None:
        """Wait until that moment has come."""

    def ms(self, start: int, end: int) -> float:
        """Milliseconds between two marks; on a GPU only after both moments have come."""


class HostStopwatch:
    """A stopwatch on `time.perf_counter`."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> int:
        """See `Stopwatch.mark`."""
        self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def wait(self, mark: int) -> None:
        """Return at once: on the host every mark is in the past."""

    def ms(self, start: int, end: int) -> float:
        """See `Stopwatch.ms`."""
        return 1e3 * (self._marks[end] - self._marks[start])


class CudaStopwatch:
    """A stopwatch of events on the current stream."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> int:
        """See `Stopwatch.mark`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)
        return len(self._marks) - 1

    def wait(self, mark: int) -> None:
        """See `Stopwatch.wait`."""
        self._marks[mark].synchronize()

    def ms(self, start: int, end: int) -> float:
        """See `Stopwatch.ms`."""
        return float(self._marks[start].elapsed_time(self._marks[end]))


def stopwatch_for(device: torch.device) -> Stopwatch:
    """A stopwatch for work on `device`."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()


def process_age_s() -> float:
    """Seconds since this process was started, its interpreter and imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
