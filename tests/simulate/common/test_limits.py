"""Limits of containers, read from made-up trees of control groups as Linux lays them out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from simulate.common import limits
from simulate.common.limits import (
    Limits,
    UserLimits,
    control_group_limits,
    usable_cores,
    usable_memory,
    usable_workers,
    user_limits,
)
from simulate.config.profiles import detect_local
from tests.harness import ROOT, run_python

resource = pytest.importorskip("resource")  # Windows has none
ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from simulate.common.limits import usable_cores
print(usable_cores())
"""
GIB = 2**30
NONE_V1 = "9223372036854771712"
MOUNTED_V2 = "25 1 0:22 {shown} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
MOUNTED_V1 = """\
31 1 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 {shown} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {shown} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
36 31 0:33 {shown} /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
37 31 0:34 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd"""


def system(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """Write /proc/self and /sys/fs/cgroup of a made-up system."""
    contents = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}
    contents |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def limit(patch: pytest.MonkeyPatch, **given: float) -> None:
    patch.setattr(limits, "control_group_limits", lambda: Limits(**given))  # type: ignore[arg-type]


def test_without_limits(tmp_path: Path) -> None:
    """A system without control groups, and groups of both versions that say there is no limit."""
    assert control_group_limits(tmp_path) == Limits()
    one = {"memory/memory.limit_in_bytes": NONE_V1, "cpu,cpuacct/cpu.cfs_quota_us": "-1", "pids/pids.max": "max"}
    groups = "4:memory:/\n3:cpu,cpuacct:/\n2:pids:/"
    assert control_group_limits(system(tmp_path / "v1", groups, MOUNTED_V1.format(shown="/"), one)) == Limits()
    two = {"a/memory.max": "max", "a/memory.high": "max", "a/cpu.max": "max 100000", "a/pids.max": "max"}
    assert control_group_limits(system(tmp_path / "v2", "0::/a", MOUNTED_V2.format(shown="/"), two)) == Limits()


def test_a_container_of_version_2(tmp_path: Path) -> None:
    """It sees its own group as the root; files that the system can drop are free memory."""
    files = {
        "memory.max": str(4 * GIB), "memory.current": str(3 * GIB), "memory.stat": f"anon 1\ninactive_file {GIB}",
        "cpu.max": "150000 100000", "pids.max": "100", "pids.current": "40",
    }  # fmt: skip
    root = system(tmp_path, "0::/", MOUNTED_V2.format(shown="/"), files)
    assert control_group_limits(root) == Limits(4 * GIB, 2 * GIB, 1.5, 100, 60)


def test_of_nested_groups_the_tightest_counts(tmp_path: Path) -> None:
    """Each limit is another ancestor's; free is what the fullest group leaves, not the smallest."""
    files = {
        "outer/memory.max": str(8 * GIB), "outer/memory.current": str(7 * GIB + GIB // 2),
        "outer/middle/memory.max": str(2 * GIB), "outer/middle/memory.current": str(GIB),
        "outer/middle/own/memory.max": "max", "outer/middle/own/cpu.max": "400000 100000",
        "outer/cpu.max": "50000 100000", "outer/middle/pids.max": "64", "outer/middle/pids.current": "80",
        "beside/memory.max": "1", "beside/pids.max": "1",
    }  # fmt: skip
    root = system(tmp_path, "0::/outer/middle/own", MOUNTED_V2.format(shown="/"), files)
    assert control_group_limits(root) == Limits(2 * GIB, GIB // 2, 0.5, 64, 0)


def test_a_soft_limit_counts(tmp_path: Path) -> None:
    files = {"memory.max": str(4 * GIB), "memory.high": str(GIB), "memory.current": "0"}
    assert control_group_limits(system(tmp_path, "0::/", MOUNTED_V2.format(shown="/"), files)).memory_bytes == GIB


def test_a_container_of_version_1(tmp_path: Path) -> None:
    """It reads the host's path of its group, and sees only that group, mounted as the root."""
    groups = "12:pids:/docker/abc\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/"
    files = {
        "memory/memory.limit_in_bytes": str(GIB), "memory/memory.usage_in_bytes": str(GIB // 2),
        "memory/memory.stat": "inactive_file 0\ntotal_inactive_file 1024", "pids/pids.max": "50",
        "cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }  # fmt: skip
    root = system(tmp_path, groups, MOUNTED_V1.format(shown="/docker/abc"), files)
    assert control_group_limits(root) == Limits(GIB, GIB // 2 + 1024, 2.0, 50, 50)


def test_both_versions_at_once(tmp_path: Path) -> None:
    """Memory by version 1, an ancestor's, and processes by version 2, as systemd's hybrid has them."""
    mounts = MOUNTED_V1.format(shown="/") + "\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    files = {
        "memory/user/memory.limit_in_bytes": str(GIB), "memory/user/own/memory.limit_in_bytes": NONE_V1,
        "unified/own/pids.max": "9",
    }  # fmt: skip
    root = system(tmp_path, "4:memory:/user/own\n0::/own", mounts, files)
    assert control_group_limits(root) == Limits(GIB, GIB, None, 9, 9)


def test_a_path_outside_of_the_namespace(tmp_path: Path) -> None:
    """Linux shows a process that was moved out of its namespace with dots; only the mount's own group is seen then."""
    files = {"memory.max": str(GIB), "memory.current": "1"}
    assert control_group_limits(system(tmp_path, "0::/../a", MOUNTED_V2.format(shown="/"), files)).memory_bytes == GIB


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_only_cores_in_the_affinity_mask_count() -> None:
    assert run_python(ONE_CORE, cwd=ROOT) == "1\n"


@pytest.mark.parametrize(("quota", "cores"), [(None, 6), (0.2, 1), (1.5, 2), (2.0, 2), (64.0, 6)])
def test_a_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    """On a system that has no affinity call, where all of six cores count otherwise."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    limit(monkeypatch, **({} if quota is None else {"cpus": quota}))
    assert usable_cores() == cores


def test_the_local_profile_keeps_to_a_containers_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=16 * GIB, available=10 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 4)
    limit(monkeypatch)
    assert usable_memory() == (16 * GIB, 10 * GIB)
    limit(monkeypatch, memory_bytes=4 * GIB, memory_free_bytes=GIB, cpus=1.0)
    device = detect_local().device[0]
    assert (device.memory_bytes, device.reserved_bytes) == (4 * GIB, 3 * GIB)
    assert device.kind == "this machine (1 cores)"
    limit(monkeypatch, memory_bytes=32 * GIB, memory_free_bytes=20 * GIB)
    assert usable_memory() == (16 * GIB, 10 * GIB)


def test_limits_are_read_where_nothing_says_what_is_mounted(tmp_path: Path) -> None:
    files = {"memory.max": str(GIB), "memory.current": "0", "pids.max": "64", "pids.current": "60"}
    found = control_group_limits(system(tmp_path, "0::/", "25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw", files))
    assert (found.memory_bytes, found.memory_free_bytes, found.processes_free) == (GIB, GIB, 4)


def own_limits(patch: pytest.MonkeyPatch, processes: int, files: int) -> None:
    given = {resource.RLIMIT_NPROC: processes, resource.RLIMIT_NOFILE: files}
    patch.setattr(resource, "getrlimit", lambda name: (given[name], resource.RLIM_INFINITY))


def processes_of_this_user(root: Path, *threads: int) -> Path:
    for number, count in enumerate(threads, 1):
        for thread in range(count):
            (root / f"proc/{number}/task/{thread}").mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/uid_map").write_text("         0     100000      65536\n", encoding="utf-8")
    return root


def test_ulimits_count_threads_of_the_user_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = processes_of_this_user(tmp_path, 3, 1, 5)
    (root / "proc/9").mkdir()  # one that has just ended
    own_limits(monkeypatch, 20, 64)
    assert user_limits(root) == UserLimits(20, 11, 64)
    own_limits(monkeypatch, 5, resource.RLIM_INFINITY)
    assert user_limits(root) == UserLimits(5, 0, None)
    own_limits(monkeypatch, resource.RLIM_INFINITY, 64)
    assert user_limits(root) == UserLimits(None, None, 64)


def test_others_threads_do_not_count_and_root_is_not_held_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = processes_of_this_user(tmp_path, 3)
    own_limits(monkeypatch, 20, 64)
    monkeypatch.setattr(os, "getuid", lambda: root.stat().st_uid + 1)
    assert user_limits(root).processes_free == 20
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert user_limits(root).processes == 20  # root of a container alone
    (root / "proc/self/uid_map").write_text("         0          0 4294967295\n", encoding="utf-8")
    assert user_limits(root) == UserLimits(None, None, 64)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system has no /proc")
def test_the_threads_of_this_process_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EVERYBODY", [])  # also where the tests run as root
    own_limits(monkeypatch, 1_000_000, 64)
    free = user_limits().processes_free
    assert free is not None and free <= 1_000_000 - len(list(Path("/proc/self/task").iterdir()))


def test_workers_fit_into_what_a_limit_of_processes_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "usable_cores", lambda: 4)
    for free, expected in ((None, 4), (100, 4), (14, 2), (4, 0)):
        for mine, other in (("control_group_limits", "user_limits"), ("user_limits", "control_group_limits")):
            monkeypatch.setattr(limits, mine, lambda free=free: SimpleNamespace(processes_free=free))
            monkeypatch.setattr(limits, other, lambda: SimpleNamespace(processes_free=None))
            assert usable_workers(9) == expected
    assert usable_workers(0) == 0
