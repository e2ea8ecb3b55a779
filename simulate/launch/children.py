"""A node's processes, each started, watched and restarted by itself: who is lost takes no other along.

torchrun's agent restarts all processes of a run when one ends. Where a run goes on without lost ones, this takes its
place: one loop that starts a process, sees it end, tells the members (simulate.launch.membership), and starts it again,
until the run has an outcome. Logs lie where torchrun's would. Launch (simulate.launch.agent) runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from simulate.launch.keys import FATAL, FATAL_EXIT, OUTCOME, REPORTED_EXIT, STEP, log
from simulate.launch.membership import mark_dead

LOOK_S = 0.02
"""Seconds between two looks at the processes: so late are the others told."""
END_S = 20.0
"""Seconds that processes have to end by themselves once the run has ended."""
NODE_PROCESSES = "LTE_NODE_PROCESSES"
"""Environment variable of the workers: the processes of each node, "2,2"."""
INCARNATION = "LTE_INCARNATION"
"""Environment variable of a worker: how often a process with its number was started in this run."""
STORE_LOGS = "LTE_STORE_LOGS"
"""Environment variable of a worker whose store is apart: the folder of the file that says where."""
LAUNCH_ID = "LTE_LAUNCH_ID"
"""Environment variable of such a worker: the prefix of the launch's keys."""


class Launching(Protocol):
    """The part of a node's Launch (simulate.launch.agent) that its processes need."""

    folder: Path
    run: Any
    node: Any
    launch_id: str
    abandoned: threading.Event

    @property
    def store(self) -> Any: ...
    @property
    def logs(self) -> Path: ...
    @property
    def store_apart(self) -> bool: ...
    def tell_nodes(self) -> None: ...
    def failure_text(self, rank: int, local_rank: int, exit_code: int) -> str: ...


@dataclass
class Child:
    """One of this node's processes, over all its starts."""

    local_rank: int
    restarts_left: int
    process: subprocess.Popen[bytes] | None = None
    incarnation: int = 0
    is_done: bool = False
    restarted_at: int = 0
    """Step of the newest checkpoint at its last restart."""
    failures: list[str] = field(default_factory=list)


class Children:
    """The processes of one node, until the run's end."""

    def __init__(self, launch: Launching) -> None:
        self.launch, self.store = launch, launch.store
        budget = launch.run.cluster.max_restarts
        self.children = [Child(rank, budget) for rank in range(launch.node.processes)]

    def run(self) -> str:
        """Run to the end; returns in words which processes were given up."""
        for child in self.children:
            self._start(child)
        self._generation = getattr(self.store, "generation", 0)
        ended_s: float | None = None
        while not all(child.is_done for child in self.children):
            for child in self.children:
                code = None if child.process is None else child.process.poll()
                if code is not None and not child.is_done:
                    self._on_exit(child, code)
            if self.launch.abandoned.is_set():
                break
            if self._generation != getattr(self.store, "generation", 0):
                self._generation = getattr(self.store, "generation", 0)
                self._tell_new_store()
            if ended_s is None and self.store.check([OUTCOME]):
                ended_s = time.monotonic()
            if ended_s is not None and time.monotonic() - ended_s > END_S:
                break  # a process that hangs has nothing left to do
            time.sleep(LOOK_S)
        self._kill()
        return "; ".join(child.failures[-1] for child in self.children if child.failures)

    def _start(self, child: Child) -> None:
        launch, node = self.launch, self.launch.node
        member = node.first_process + child.local_rank
        child.incarnation = self.store.add(f"group/incarnation/{member}", 1)
        logs = launch.logs / "children" / f"attempt_{child.incarnation - 1}" / str(child.local_rank)
        logs.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "RANK": str(member),
            "WORLD_SIZE": str(sum(node.all_processes)),
            "LOCAL_RANK": str(child.local_rank),
            "LOCAL_WORLD_SIZE": str(node.processes),
            NODE_PROCESSES: ",".join(map(str, node.all_processes)),
            INCARNATION: str(child.incarnation),
            **({STORE_LOGS: str(launch.logs), LAUNCH_ID: launch.launch_id} if launch.store_apart else {}),
        }
        where = (node.device, node.store_address, str(self.store.port), str(node.number))
        command = [sys.executable, "-m", "simulate.launch.worker", str(launch.folder), *where]
        child.process = spawn(command, environment, logs)

    def _tell_new_store(self) -> None:
        """Write again what this node knows, where the store was restarted."""
        self.launch.tell_nodes()
        for child in self.children:
            member, is_alive = self.launch.node.first_process + child.local_rank, not child.is_done
            self.store.set(f"group/incarnation/{member}", str(child.incarnation))
            mark_dead(self.store, member, child.incarnation - is_alive)

    def _on_exit(self, child: Child, code: int) -> None:
        """Tell the others that a process has ended, and start it again where that can help."""
        launch, member = self.launch, self.launch.node.first_process + child.local_rank
        mark_dead(self.store, member, child.incarnation)
        if code == 0:
            child.is_done = True
            return
        text = launch.failure_text(member, child.local_rank, code)
        child.failures.append(text)
        if code not in (FATAL_EXIT, REPORTED_EXIT):  # those have logged the reason themselves
            log(self.store, text)
        step = int(self.store.get(STEP)) if self.store.check([STEP]) else 0
        if step > child.restarted_at:  # the run has made progress since: refill the budget
            child.restarted_at, child.restarts_left = step, launch.run.cluster.max_restarts
        is_over = self.store.check([FATAL]) or self.store.check([OUTCOME]) or launch.abandoned.is_set()
        if is_over or not child.restarts_left:
            child.is_done = True
            return
        child.restarts_left -= 1
        self._start(child)

    def _kill(self) -> None:
        for child in self.children:
            if child.process is not None and child.process.poll() is None:
                child.process.kill()
                child.process.wait()


def spawn(command: Sequence[str], environment: Mapping[str, str], logs: Path) -> subprocess.Popen[bytes]:
    """Start a process whose output goes to files in `logs`."""
    with (logs / "stdout.log").open("ab") as out, (logs / "stderr.log").open("ab") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment)
