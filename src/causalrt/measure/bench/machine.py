"""What a figure was measured on: devices, clocks, load, versions, commit."""

import os
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from causalrt.control_groups import cpu_quota
from causalrt.engines.toolchain import toolchain_versions
from causalrt.tools.gpus import find_gpus, output_of, query_nvidia_smi

GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
KIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What stays the same while a benchmark runs; `commit` is that of the checkout this package lies in, if it does."""

    device: str
    gpus: list[str]
    cpu: str
    cores: int
    cpu_quota: float | None
    platform: str
    versions: Mapping[str, str | None]
    commit: str | None

    @property
    def summary(self) -> str:
        """The GPUs, or the CPU and its cores."""
        gpus = ", ".join(f"{count} x {name}" for name, count in Counter(self.gpus).items())
        return gpus or f"{self.cpu}, {self.cores} cores"


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What changes while a benchmark runs: load, and clocks as far as they can be read."""

    load_average: tuple[float, float, float]
    cpu_mhz: list[int]
    cpu_governor: str | None
    gpus: list[dict[str, str]] | None


def describe_machine(device: str) -> Machine:
    """Describe the machine; CUDA is not started in this process."""
    return Machine(
        device=device,
        gpus=[gpu.name for gpu in find_gpus().found] if device == "cuda" else [],
        cpu=next(iter(_cpu_field("model name")), platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        cpu_quota=cpu_quota(),
        platform=platform.platform(),
        versions={"python": platform.python_version(), **toolchain_versions()},
        commit=_commit(),
    )


def describe_moment(device: str) -> Moment:
    """Read load and clocks."""
    return Moment(
        load_average=os.getloadavg(),
        cpu_mhz=[round(float(value)) for value in _cpu_field("cpu MHz")],
        cpu_governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        gpus=query_nvidia_smi(*GPU_FIELDS) if device == "cuda" else None,
    )


def peak_host_bytes(pid: int) -> int | None:
    """Most memory that a process has held resident (VmHWM), mapped file pages included; None if it cannot be read."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_field(name: str) -> list[str]:
    pairs = [line.partition(":") for line in _read("/proc/cpuinfo").splitlines()]
    return [value.strip() for found, _, value in pairs if found.strip() == name]


def _commit() -> str | None:
    """The commit of the checkout, with `-dirty` where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[4]
    if not (root / ".git").exists():
        return None
    return output_of("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
