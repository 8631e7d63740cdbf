"""The limits on processors and memory that Linux control groups set for this process.

A process is limited by its own group and by every group above it, so the smallest limit counts. Both versions of control
groups are read, wherever they are mounted.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
"""Where `/proc` and the mounted control groups are found."""
NO_LIMIT_BYTES = 2**62
"""In version 1, a number beyond this says that there is no limit."""


def available_cpus() -> int:
    """The number of processors that this process may use, limited by its quota: how many threads are worth starting."""
    visible, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return visible if quota is None else max(1, min(visible, int(quota)))


def cpu_quota() -> float | None:
    """The number of processors whose time this process may use, for example 0.5; None without a limit."""
    quotas = []
    for group in _groups("cpu"):
        limit = _read(group / "cpu.max").split()
        quota, period = limit or (_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))
        with contextlib.suppress(ValueError):  # "max", or nothing
            if int(quota) > 0:  # -1 is no limit in version 1
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limits() -> list[tuple[int, int]]:
    """(bytes allowed, bytes still free) of each group that holds this process to a limit."""
    limits = []
    for group in _groups("memory"):
        version_2 = ("memory.max", "memory.current", "inactive_file")
        version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        most_file, used_file, cache = version_2 if (group / "memory.max").exists() else version_1
        counts = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
        with contextlib.suppress(ValueError):  # "max", or nothing
            most, used = int(_read(group / most_file)), int(_read(group / used_file))
            if most < NO_LIMIT_BYTES:
                reclaimable = int(counts.get(cache, 0))  # file cache, which is counted as used
                limits.append((most, most - used + reclaimable))
    return limits


def _groups(controller: str) -> Iterator[Path]:
    """The folders of the groups that limit this process in `controller`, of either version."""
    memberships = [line.split(":", 2) for line in _read(ROOT / "proc/self/cgroup").splitlines()]
    for line in _read(ROOT / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        filesystem, _, options = kind.split(" ", 2)
        if filesystem == "cgroup2":
            wanted = ""
        elif filesystem == "cgroup" and controller in options.split(","):
            wanted = controller
        else:
            continue
        top, mount_point = (PurePosixPath(_unescaped(field)) for field in mount.split()[3:5])
        for _, controllers, path in memberships:
            if wanted in controllers.split(","):
                own = PurePosixPath(path)
                # Inside a container the path can be the host's, which is not mounted here; the mounted one is our own then.
                below = own.relative_to(top) if own.is_relative_to(top) and ".." not in own.parts else PurePosixPath()
                yield from (ROOT / mount_point.relative_to("/") / part for part in (below, *below.parents))


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), field)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
