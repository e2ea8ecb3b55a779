"""Network namespaces, their cables and limits, by way of `ip` and `tc`.

A namespace's name tells which process made it, so that those of dead ones can be swept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PREFIX = "ltelab"
NAME = re.compile(rf"{PREFIX}-(\d+)-(\d+)-\d+-\w+")
"""Owner's pid, the kernel's tick at which it started (pids are used again), lab, node."""
FRAME_BYTES = 1514
QUEUE_S = 0.05
"""What waits longer than this at a full link is dropped."""
BURST_S = 1e-3
KILL_WAIT_S = 10.0


def run_tool(*words: object) -> str:
    """Run a command; return what it prints, raise with what it says on stderr."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def join(namespace: str, bridge: str, interfaces: Sequence[str]) -> None:
    """Join interfaces of a namespace by a bridge."""
    # Without multicast snooping the bridge sends no queries of its own, so that idle links stay silent.
    run_tool("ip", "-n", namespace, "link", "add", bridge, "type", "bridge", "mcast_snooping", 0)
    run_tool("ip", "-n", namespace, "link", "set", bridge, "up")
    for interface in interfaces:
        run_tool("ip", "-n", namespace, "link", "set", interface, "master", bridge)


def sweep() -> list[str]:
    """Remove the namespaces of labs whose owner is dead, with all that runs inside; return their names."""
    stale = [name for name in names() if (found := NAME.fullmatch(name)) and not _alive(*found.groups())]
    for name in stale:
        # Another process may be sweeping the same ones.
        with contextlib.suppress(RuntimeError):
            empty(name)
            remove(name)
    return stale


def owner_name() -> str:
    """Return the part of a name that tells this process from all others, dead ones with its pid included."""
    return f"{PREFIX}-{os.getpid()}-{_started_tick(os.getpid())}"


def add(name: str) -> None:
    """Make a namespace with a loopback interface and without IPv6."""
    run_tool("ip", "netns", "add", name)
    silent = "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"
    if Path("/proc/sys/net/ipv6").exists():  # its announcements would be counted as traffic
        run_tool("ip", "netns", "exec", name, "sh", "-c", silent)
    run_tool("ip", "-n", name, "link", "set", "lo", "up")


def remove(name: str) -> None:
    """Remove a namespace and cut its cables; processes inside would keep it alive unseen."""
    # The cables go with the namespaces, but only once the kernel gets to it: cut them now.
    for link in json.loads(run_tool("ip", "-n", name, "-j", "link", "show", "type", "veth") or "[]"):
        with contextlib.suppress(RuntimeError):  # gone with its other end
            run_tool("ip", "-n", name, "link", "delete", link["ifname"])
    run_tool("ip", "netns", "delete", name)


def shape(namespace: str, interface: str, bytes_per_s: float | None) -> None:
    """Limit what leaves an interface, frames with their headers; None lifts the limit."""
    if bytes_per_s is None:
        with contextlib.suppress(RuntimeError):  # there was no limit
            run_tool("tc", "-n", namespace, "qdisc", "delete", "dev", interface, "root")
        return
    if bytes_per_s <= 0:
        raise ValueError(f"a rate is above 0, not {bytes_per_s:g}")
    burst = max(4 * FRAME_BYTES, round(bytes_per_s * BURST_S))
    limit = burst + max(4 * FRAME_BYTES, round(bytes_per_s * QUEUE_S))
    limits = f"tbf rate {round(bytes_per_s)}bps burst {burst} limit {limit}"
    run_tool(*f"tc -n {namespace} qdisc replace dev {interface} root {limits}".split())


def names() -> list[str]:
    """Return the names of all namespaces."""
    return [line.split()[0] for line in run_tool("ip", "netns", "list").splitlines()]


def pids_in(namespace: str) -> list[int]:
    """Return what runs in a namespace."""
    return [int(pid) for pid in run_tool("ip", "netns", "pids", namespace).split()]


def empty(namespace: str) -> None:
    """Kill whatever runs in a namespace, until nothing does: a process may fork while it is being killed."""
    give_up_s = time.monotonic() + KILL_WAIT_S
    while left := pids_in(namespace):
        if time.monotonic() > give_up_s:
            raise RuntimeError(f"{namespace}: {left} did not die")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def command_line(pid: int) -> str:
    """Return a process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(gone)"


def _started_tick(pid: int) -> int | None:
    """The kernel's clock tick at which a process started; None if there is none, or only a zombie."""
    try:
        # The name in brackets may hold spaces; field 3 is the state, field 22 the tick.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _alive(pid: str, tick: str) -> bool:
    return _started_tick(int(pid)) == int(tick)
