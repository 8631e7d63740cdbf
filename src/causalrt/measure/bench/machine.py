"""What a figure was measured on: device, clocks, load, versions, commit."""

import os
import platform
from pathlib import Path
from typing import Any

from causalrt.control_groups import cpu_quota
from causalrt.engines.bundle import toolchain_versions
from causalrt.tools.gpus import find_gpus, output_of, query_nvidia_smi

GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
KIB = 1024


def describe_machine(device: str) -> dict[str, Any]:
    """What stays the same while a benchmark runs; CUDA is not started in this process."""
    return {
        "device": device,
        "gpus": [gpu.name for gpu in find_gpus().found] if device == "cuda" else [],
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_quota": cpu_quota(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **toolchain_versions()},
        "commit": _commit(),
    }


def describe_moment(device: str) -> dict[str, Any]:
    """What does not: load, and clocks as far as they can be read."""
    governor = _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
    return {
        "load_average": os.getloadavg(),
        "cpu_mhz": [round(float(value)) for value in _cpu_field("cpu MHz")],
        "cpu_governor": governor.strip() if governor else None,
        "gpus": query_nvidia_smi(*GPU_FIELDS) if device == "cuda" else None,
    }


def peak_host_bytes(pid: int) -> int | None:
    """Most memory that a process has held resident (VmHWM), mapped file pages included; None if it cannot be read."""
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cpu_field(name: str) -> list[str]:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]


def _cpu_model() -> str:
    return next(iter(_cpu_field("model name")), platform.machine())


def _commit() -> str | None:
    """Of the checkout that this package lies in, with `-dirty` where files differ from it; None for an installed one."""
    root = Path(__file__).resolve().parents[4]
    if not (root / ".git").exists():
        return None
    return output_of("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
