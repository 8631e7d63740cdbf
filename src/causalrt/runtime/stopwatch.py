"""Time between marks: the host's clock on a CPU, CUDA events on a GPU, where work is only queued when a call returns."""

import os
import time
from pathlib import Path
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """Marks moments, and tells the time between two of them."""

    def mark(self) -> int:
        """A moment, by number; on a GPU that at which the work queued so far is done. Never waits."""

    def wait(self, mark: int) -> None:
        """Return once that moment has come."""

    def ms(self, start: int, end: int) -> float:
        """Milliseconds between two marks; on a GPU only after both moments have come."""


class HostStopwatch:
    """`time.perf_counter`."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> int:
        """See `Stopwatch.mark`."""
        self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def wait(self, mark: int) -> None:
        """See `Stopwatch.wait`; the host's clock is past every mark."""

    def ms(self, start: int, end: int) -> float:
        """See `Stopwatch.ms`."""
        return 1e3 * (self._marks[end] - self._marks[start])


class CudaStopwatch:
    """Events on the current stream."""

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
