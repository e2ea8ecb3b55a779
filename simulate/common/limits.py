"""Limits of this process on its machine: cores, memory, processes and files, as masks, containers and ulimit set them.

Inside a container the system still reports the whole machine's cores and memory; the limits are those of control groups
(cgroups, versions 1 and 2), where each ancestor of the process's own group limits it, too. Plans and probes ask for
memory here, launches for cores, and simulate.doctor for all of it. psutil is imported late, since it is slow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED_BYTES = 1 << 62
"""Version 1 says "no limit" with the largest multiple of a page; nothing near it is meant as a limit."""


EVERYBODY = ["0", "0", "4294967295"]
"""Users that the machine's own namespace maps to themselves, as /proc/self/uid_map has it."""


@dataclass(frozen=True)
class UserLimits:
    """Limits that `ulimit` sets; None where there is none."""

    processes: int | None = None
    """Processes and threads of this user on the whole machine."""
    processes_free: int | None = None
    open_files: int | None = None
    """Files and sockets that one process may have open."""


def user_limits(root: Path = Path("/")) -> UserLimits:
    """Return the limits of this process's user; tests pass another file system as `root`."""
    try:
        import resource  # Windows has none
    except ImportError:
        return UserLimits()

    def soft(name: int) -> int | None:
        limit = resource.getrlimit(name)[0]
        return None if limit == resource.RLIM_INFINITY else limit

    processes, free = soft(resource.RLIMIT_NPROC), None
    # Linux does not hold the machine's own root to it; root in a container of an ordinary user is that user.
    if os.getuid() == 0 and [line.split() for line in _lines(root / "proc/self/uid_map")] == [EVERYBODY]:
        processes = None
    if processes is not None:
        free = max(0, processes - sum(map(_threads, (root / "proc").glob("[0-9]*"))))
    return UserLimits(processes, free, soft(resource.RLIMIT_NOFILE))


def _threads(process: Path) -> int:
    """Return the threads of one process in /proc, if it is this user's."""
    try:
        return len(list((process / "task").iterdir())) if process.stat().st_uid == os.getuid() else 0
    except OSError:  # it has ended
        return 0


@dataclass(frozen=True)
class Limits:
    """The tightest limits of all control groups around this process; None where there is none."""

    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    """Bytes that may still be allocated; cached files that the system can drop count as free."""
    cpus: float | None = None
    """Processor time per time: 1.5 is one core and a half."""
    processes: int | None = None
    """Processes and threads, which count alike."""
    processes_free: int | None = None


def control_group_limits(root: Path = Path("/")) -> Limits:
    """Return the limits of the control groups around this process; tests pass another file system as `root`."""
    memory: list[tuple[int, int]] = []  # limit, free
    cpus: list[float] = []
    processes: list[tuple[int, int]] = []
    for folder in _groups(root):  # files say by their names which version and which limit they are of
        memory += _memory(folder)
        cpus += _cpus(folder)
        for limit in _numbers(folder, "pids.max"):
            processes.append((limit, max(0, limit - next(_numbers(folder, "pids.current"), 0))))
    return Limits(
        memory_bytes=min((limit for limit, _ in memory), default=None),
        memory_free_bytes=min((free for _, free in memory), default=None),
        cpus=min(cpus, default=None),
        processes=min((limit for limit, _ in processes), default=None),
        processes_free=min((free for _, free in processes), default=None),
    )


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, and of all their ancestors that can be seen from here."""
    own: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        own |= dict.fromkeys(controllers.split(","), path)
    # Sandboxes show a container's own limits there, whatever they call what is mounted.
    yield root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        fields, (kind, *_, options) = mount.split(), kind.split() or ("", "")
        if kind not in ("cgroup", "cgroup2"):
            continue
        names = [""] if kind == "cgroup2" else options.split(",")
        path = next((own[name] for name in names if name in own), "/")
        shown, top = fields[3], root / fields[4].lstrip("/")
        # A container without a namespace of its own reads its group's path on the host; the mount shows a part of it.
        below = Path(path).relative_to(shown) if Path(path).is_relative_to(shown) else Path()
        below = Path() if ".." in below.parts else below
        for parts in range(len(below.parts) + 1):
            yield top.joinpath(*below.parts[:parts])


def _memory(folder: Path) -> Iterator[tuple[int, int]]:
    # Version 2, then version 1. memory.high slows a group down that exceeds it until hardly anything moves.
    used = next(_numbers(folder, "memory.current", "memory.usage_in_bytes"), 0)
    dropped = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            dropped = max(dropped, int(value))  # the total, where there is one, contains the other
    for limit in _numbers(folder, "memory.max", "memory.high", "memory.limit_in_bytes"):
        if limit < UNLIMITED_BYTES:
            yield limit, max(0, limit - max(0, used - dropped))


def _cpus(folder: Path) -> Iterator[float]:
    for line in _lines(folder / "cpu.max"):  # "max 100000" or "150000 100000"
        quota, _, period = line.partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
    quota_us = next(_numbers(folder, "cpu.cfs_quota_us"), None)  # -1, which is no number, where there is none
    period_us = next(_numbers(folder, "cpu.cfs_period_us"), None)
    if quota_us and period_us:
        yield quota_us / period_us


def _numbers(folder: Path, *names: str) -> Iterator[int]:
    """Yield what files hold that have one number each; "max", -1 and missing files are none."""
    for name in names:
        yield from (int(line) for line in _lines(folder / name)[:1] if line.isdigit())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system, another version, or not for this user
        return []


def usable_cores() -> int:
    """Return the number of cores for threads: those that taskset or a cpuset allows, at most a quota, rounded up."""
    # macOS and Windows have no sched_getaffinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = control_group_limits().cpus
    # One core and a half is used up by two threads, not by one.
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def usable_workers(tasks: int) -> int:
    """Return how many processes are worth starting for so many tasks: at most one a core, and as a limit leaves room.

    Each starts as many threads as there are cores, since libraries do so when they are imported, and limits count them.
    """
    cores = usable_cores()
    free = [f for f in (control_group_limits().processes_free, user_limits().processes_free) if f is not None]
    return min(tasks, cores, *(f // (cores + 1) for f in free))


def usable_memory() -> tuple[int, int]:
    """Return the bytes of memory that this process may use, and those of them that are free."""
    import psutil

    memory, limits = psutil.virtual_memory(), control_group_limits()
    total, free = memory.total, memory.available
    if limits.memory_bytes is not None and limits.memory_free_bytes is not None:
        total, free = min(total, limits.memory_bytes), min(free, limits.memory_free_bytes)
    return total, free
