"""Limits of control groups, on trees of files as kernels, containers and systemd lay them out."""

import os

import pytest

from causalrt import control_groups
from causalrt.control_groups import available_cpus, cpu_quota, memory_limits

VERSION_2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
VERSION_1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 31 0:31 {top} /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
NO_LIMIT_V1 = 9223372036854771712


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(memberships, mounts, files)` writes the files that this process finds; 64 processors are visible."""

    def write(memberships: str, mounts: str, files: dict[str, str]):
        for name, text in {"proc/self/cgroup": memberships, "proc/self/mountinfo": mounts, **files}.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return write


def in_version_2(machine, own="0::/", top="/", **files):
    machine(own, VERSION_2.format(top=top), {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def in_version_1(machine, own="/", top="/", **files):
    memberships = f"4:memory:{own}\n3:cpuset:/\n2:cpu,cpuacct:{own}\n0::{own}"
    machine(memberships, VERSION_1.format(top=top), {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


@pytest.mark.parametrize(
    ("limit", "quota", "cpus"),
    [
        ("max 100000", None, 64),
        ("50000 100000", 0.5, 1),
        ("100000 100000", 1.0, 1),
        ("250000 100000", 2.5, 2),
        ("12800000 100000", 128.0, 64),
    ],
)
def test_version_2_quotas(machine, limit, quota, cpus):
    in_version_2(machine, **{"cpu.max": limit})
    assert (cpu_quota(), available_cpus()) == (quota, cpus)


@pytest.mark.parametrize(("limit", "quota", "cpus"), [("-1", None, 64), ("50000", 0.5, 1), ("800000", 8.0, 8)])
def test_version_1_quotas(machine, limit, quota, cpus):
    in_version_1(machine, **{"cpu,cpuacct/cpu.cfs_quota_us": limit, "cpu,cpuacct/cpu.cfs_period_us": "100000"})
    assert (cpu_quota(), available_cpus()) == (quota, cpus)


@pytest.mark.parametrize("holder", ["", "a.slice/", "a.slice/b.service/"])
def test_version_2_group_above_holds_its_members(machine, holder):
    files = {
        f"{group}cpu.max": "max 100000" for group in ("a.slice/", "a.slice/b.service/")
    }  # the topmost has no such file
    in_version_2(machine, "0::/a.slice/b.service", **{**files, f"{holder}cpu.max": "300000 100000"})
    assert available_cpus() == 3


@pytest.mark.parametrize("holder", ["", "a/", "a/b/"])
def test_version_1_group_above_holds_its_members(machine, holder):
    quotas = {f"cpu,cpuacct/{group}cpu.cfs_quota_us": "-1" for group in ("", "a/", "a/b/")}
    periods = {f"cpu,cpuacct/{group}cpu.cfs_period_us": "50000" for group in ("", "a/", "a/b/")}
    in_version_1(machine, "/a/b", **quotas | periods | {f"cpu,cpuacct/{holder}cpu.cfs_quota_us": "150000"})
    assert available_cpus() == 3


def test_groups_beside_ours_do_not_matter(machine):
    in_version_2(
        machine, "0::/a", **{"a/cpu.max": "max 100000", "a/below/cpu.max": "1000 100000", "b/cpu.max": "1 1000"}
    )
    assert cpu_quota() is None


@pytest.mark.parametrize("top", ["/docker/0123", r"/a\134x2db", "/../elsewhere"])
def test_container_sees_its_own_group_as_the_topmost(machine, top):
    """Its membership is written as the host sees it, or not, and what is mounted is its group."""
    for own in ("/docker/0123", "/"):
        in_version_2(machine, f"0::{own}", top=top, **{"cpu.max": "200000 100000"})
        assert available_cpus() == 2


def test_mounted_group_with_escaped_characters(machine):
    in_version_2(machine, "0::/a\\x2db/c", top=r"/a\134x2db", **{"c/cpu.max": "200000 100000"})
    assert available_cpus() == 2


def test_version_2_memory(machine):
    stat = "anon 500\ninactive_file 300"
    files = {"memory.max": "max", "a/memory.max": "5000", "a/memory.current": "1000", "a/memory.stat": stat}
    in_version_2(machine, "0::/a", **files)
    assert memory_limits() == [(5000, 4300)]


def test_version_1_memory(machine):
    stat = "inactive_file 7\ntotal_inactive_file 300"
    files = {
        "memory/memory.limit_in_bytes": str(NO_LIMIT_V1),
        "memory/memory.usage_in_bytes": "9000",
        "memory/a/memory.limit_in_bytes": "5000",
        "memory/a/memory.usage_in_bytes": "1000",
        "memory/a/memory.stat": stat,
    }
    in_version_1(machine, "/a", **files)
    assert memory_limits() == [(5000, 4300)]


def test_machine_without_control_groups(machine, tmp_path):
    assert (cpu_quota(), available_cpus(), memory_limits()) == (None, 64, [])
    machine("", "", {})
    assert (cpu_quota(), available_cpus(), memory_limits()) == (None, 64, [])


def test_affinity_below_the_quota(machine, monkeypatch):
    in_version_2(machine, **{"cpu.max": "800000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert available_cpus() == 2
