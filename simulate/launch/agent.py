"""One node's elastic agent: it starts the node's worker processes, restarts them, and says how the run ended.

torchrun's LocalElasticAgent and c10d rendezvous do membership, restarts and quorum. This module adds what they lack: a
key-value store that listens at one address only, messages that name what failed, and a restart budget that a new
checkpoint refills. `lte train --launch` makes a Launch; the supervisor runs it in a thread. torch is imported by the
functions that need it, so that the command line stays light.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from simulate.common.errors import RunFailedError, first_line
from simulate.common.run_files import LOGS
from simulate.config.run import Run, run_fingerprint
from simulate.launch.heartbeat import MISSED_BEATS
from simulate.launch.keys import ATTEMPT, FATAL, FATAL_EXIT, NODES, OUTCOME, REPORTED_EXIT, STEP, log
from simulate.launch.lasting_store import Address, LastingStore, write_address
from simulate.launch.preflight.listener import listen
from simulate.launch.preflight.secret import VARIABLE as SECRET_VARIABLE
from simulate.launch.preflight.settings import Log

if TYPE_CHECKING:
    from torch.distributed import TCPStore

POLL_S, MONITOR_S = 0.3, 0.5
FAREWELL_S = 20.0
"""Seconds that node 0 keeps the store open at the end, for the other nodes to read how the run ended."""
KEEP_ALIVE_S = 2
"""Seconds between two signs of life in torchrun's rendezvous; MISSED_BEATS of them missing, and a node is lost."""


@dataclass(frozen=True)
class Node:
    """This machine's share of a launched run, and its addresses."""

    processes: int
    device: str
    """cpu or cuda."""
    number: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    """Address that this node listens at."""
    interface: str = "lo"
    store_address: str = "127.0.0.1"
    """Address of node 0, which holds the store."""
    processes_by_node: tuple[int, ...] = ()
    """Processes that each node starts, this one too; () for one node."""

    @property
    def all_processes(self) -> tuple[int, ...]:
        """Processes that each node starts."""
        return self.processes_by_node or (self.processes,)

    @property
    def first_process(self) -> int:
        """Number, in the run, of this node's first process."""
        return sum(self.all_processes[: self.number])


class Launch:
    """One node's agent and its connection to the store; `log` gets a line for each failure, as it happens."""

    def __init__(self, folder: Path, run: Run, node: Node, log: Log, threads: int) -> None:
        # The kernel counts its kills and names nobody: that the count grew is all that can be said.
        self._oom_kills_before = oom_kills()
        self.folder, self.run, self.node, self.log, self.threads = folder, run, node, log, threads
        self._store: TCPStore | LastingStore | None = None
        self.launch_id = ""
        """Id of this launch in a store that is apart; "" where node 0 has the store."""
        self.nodes: list[dict[str, Any]] = []
        """Facts of all nodes, for those that come back."""
        self.keep_alive_misses = MISSED_BEATS
        self.abandoned = threading.Event()
        """Set when no process may be started any more."""
        self._agent_class, self._running_agent = _agent_class(), None
        self.wire_sent_bytes: list[int] | None = None
        """Bytes that each node's interface sent, with all headers and other programs' traffic; node 0, at the end."""

    @property
    def store(self) -> TCPStore | LastingStore:
        """The agents' key-value store."""
        assert self._store is not None
        return self._store

    def open_store(self) -> None:
        """Open the store on node 0, at its own address only. Raises InputError."""
        from torch.distributed import TCPStore

        node = self.node
        # TCPStore by itself listens at every address, so it gets a socket that is bound to one.
        listener = listen(node.address, 0, "the agents' store")
        port = listener.getsockname()[1]
        self._store = TCPStore(
            node.address, port, is_master=True, timeout=self._join_timeout, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip

    def connect_store(self, port: int) -> None:
        """Connect another node to node 0's store. Raises RunFailedError."""
        from torch.distributed import TCPStore

        try:
            self._store = TCPStore(self.node.store_address, port, is_master=False, timeout=self._join_timeout)
        except RuntimeError as error:
            address = f"{self.node.store_address}:{port}"
            raise RunFailedError(f"node 0 does not answer at {address}: {first_line(error)}") from error

    def find_store(self, ask: Callable[[], Address], launch_id: str) -> None:
        """Connect to a store that is apart; `ask` returns where it is, and is called again once it restarts.

        Raises InputError, RunFailedError.
        """

        def find() -> Address:
            address = ask()
            write_address(self.logs, address)
            return address

        self.launch_id = launch_id
        self._store = LastingStore(find, self.run.cluster.join_timeout_s, launch_id)

    def tell_nodes(self) -> None:
        """Write into a store that is apart who the nodes are."""
        if isinstance(self.store, LastingStore):
            self.store.set(NODES, json.dumps(self.nodes))
            self.store.set_for_all(f"run/{run_fingerprint(self.run)}", self.launch_id)

    @property
    def store_apart(self) -> bool:
        """Whether the store is apart, and may restart."""
        return isinstance(self._store, LastingStore)

    @property
    def logs(self) -> Path:
        """Folder of this node's logs."""
        return self.folder / LOGS / f"node{self.node.number}"

    @property
    def _join_timeout(self) -> timedelta:
        return timedelta(seconds=self.run.cluster.join_timeout_s)

    def run_agent(self) -> dict[str, Any]:
        """Run the processes, restarting them after failures; returns the run's outcome. Raises RunFailedError."""
        from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

        node = self.node
        # The workers inherit the environment of this process.
        os.environ.update(self._environment())
        os.environ.pop(SECRET_VARIABLE, None)  # workers do not need it, so they do not get it
        # torchrun's own log lines are replaced by self.log's.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        # Counted since the system started, so only the difference is this run's.
        sent_before = self._interface_sent_bytes()
        try:
            failures = self._run_children() if self.run.cluster.drops_lost else self._run_elastic_agent()
        except (RendezvousError, RuntimeError) as error:
            # The store often goes away just after the run ended, because node 0 leaves first.
            if outcome := self._outcome():
                return outcome
            if isinstance(error, RendezvousTimeoutError):
                waited = f"{self.run.cluster.join_timeout_s:g} s (cluster.join_timeout_s)"
                raise RunFailedError(f"node {node.number} waited {waited} for nodes that were lost") from error
            if node.number > 0 and self._store_is_gone():
                raise RunFailedError(f"node {node.number}: node 0 is gone, and the run with it") from error
            raise RunFailedError(f"node {node.number} lost the others: {first_line(error)}") from error
        outcome = self._outcome()
        self._say_goodbye(self._interface_sent_bytes() - sent_before)
        if outcome is not None:
            return outcome
        raise RunFailedError(f"given up after {self.run.cluster.max_restarts} restarts: {failures}")

    def _run_elastic_agent(self) -> str:
        """Run torchrun's agent to its end; returns in words which processes failed."""
        agent, handler = self._agent()
        self._running_agent = agent
        result = agent.run()
        handler.shutdown()
        return "; ".join(self._failure(rank, failure) for rank, failure in sorted(result.failures.items()))

    def _run_children(self) -> str:
        """Run each process by itself, so that who is lost takes no other along; returns in words which failed."""
        from simulate.launch.children import Children

        return Children(self).run()

    def allow_clocks_apart(self, seconds: float) -> None:
        """Declare a node lost later: torchrun stamps signs of life with each node's own clock."""
        self.keep_alive_misses += math.ceil(seconds / KEEP_ALIVE_S)

    @property
    def is_waiting(self) -> bool:
        """Whether this node runs no process because it waits for other nodes."""
        from torch.distributed.elastic.agent.server.api import WorkerState

        agent = self._running_agent
        return agent is not None and agent.get_worker_group().state in (WorkerState.INIT, WorkerState.STOPPED)

    def abandon(self) -> None:
        """Kill this node's processes, and start no more."""
        self.abandoned.set()
        workers = []
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if str(self.folder) in child.cmdline():  # a worker of this run, not some other child
                    child.kill()
                    workers.append(child)
        psutil.wait_procs(workers, timeout=POLL_S)

    def _environment(self) -> dict[str, str]:
        """Return the environment variables that the workers get."""
        interface = self.node.interface
        return {
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the shared store would listen at every address
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP",  # Ctrl-C and SIGTERM first save a checkpoint
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",  # threads that spin take cores from other processes
            "KINETO_LOG_LEVEL": "99",
        }

    def _agent(self) -> tuple[Any, Any]:
        """Return torchrun's agent and its rendezvous handler."""
        from torch.distributed.elastic.agent.server.api import WorkerSpec
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
            DynamicRendezvousHandler,
            RendezvousTimeout,
        )

        cluster, node, run_id, store = self.run.cluster, self.node, run_fingerprint(self.run)[:16], self.store
        assert not isinstance(store, LastingStore)  # a store apart serves runs with a quorum, which need no torchrun
        # cluster.min_devices counts devices, rendezvous counts nodes.
        least = math.ceil((cluster.min_devices or cluster.devices) * node.count / cluster.devices)
        # The run's fingerprint names the rendezvous, so that nodes of two runs never meet.
        handler = DynamicRendezvousHandler.from_backend(
            run_id,
            store,
            C10dRendezvousBackend(store, run_id),
            min_nodes=least,
            max_nodes=node.count,
            local_addr=f"{node.number:06d}",  # ranks are sorted by this name: rank 0 is on node 0
            timeout=RendezvousTimeout(
                join=timedelta(seconds=cluster.join_timeout_s), last_call=timedelta(seconds=cluster.rejoin_s)
            ),
            keep_alive_interval=KEEP_ALIVE_S,
            keep_alive_max_attempt=self.keep_alive_misses,
        )
        logs = self.logs
        logs.mkdir(parents=True, exist_ok=True)
        host, port = node.store_address, self.store.port
        spec = WorkerSpec(
            role="process",
            local_world_size=node.processes,
            entrypoint=sys.executable,
            args=("-m", "simulate.launch.worker", str(self.folder), node.device, host, str(port), str(node.number)),
            rdzv_handler=handler,
            max_restarts=cluster.max_restarts,
            monitor_interval=MONITOR_S,
            local_addr=node.address,
        )
        return self._agent_class(spec, DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL), self), handler

    def on_failures(self, failures: dict[int, Any]) -> tuple[int, bool]:
        """Log failed processes; returns the newest checkpoint's step, and whether a restart can help."""
        for rank, failure in sorted(failures.items()):
            if failure.exitcode not in (FATAL_EXIT, REPORTED_EXIT):  # those have logged the reason themselves
                log(self.store, self._failure(rank, failure))
        self.store.set(ATTEMPT, json.dumps({"activity": "restarting"}))
        saved_step = int(self.store.get(STEP)) if self.store.check([STEP]) else 0
        return saved_step, not self.store.check([FATAL])

    def _failure(self, rank: int, failure: Any) -> str:
        return self.failure_text(rank, failure.local_rank, failure.exitcode)

    def failure_text(self, rank: int, local_rank: int, exit_code: int) -> str:
        """Return a line that says how a process ended, from its exit code and the last line of its log."""
        if exit_code < 0:
            name = signal.Signals(-exit_code).name
            hint = ""
            if name == "SIGKILL":
                out_of_memory = oom_kills() > self._oom_kills_before
                hint = ", since the system ran out of memory" if out_of_memory else ", by hand or for lack of memory"
            return f"process {rank} on node {self.node.number} was killed by {name}{hint}"
        # Attempts start at 0 again with the refilled budget, so the newest log is found by its time, not by its name.
        logs = (self.folder / LOGS).glob(f"node{self.node.number}/*/attempt_*/{local_rank}/stderr.log")
        newest = max(logs, key=lambda path: path.stat().st_mtime_ns, default=None)
        text = "" if newest is None else newest.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        last = f": {lines[-1].strip()}" if lines else ""
        without_memory = any("MemoryError" in line or "allocate memory" in line for line in lines)
        why = "ran out of memory and " if without_memory else ""
        return f"process {rank} on node {self.node.number} {why}ended with {exit_code}{last}"

    def _outcome(self) -> dict[str, Any] | None:
        """Return how the run ended, None where no process has said so or the store is gone."""
        try:
            return dict(json.loads(self.store.get(OUTCOME))) if self.store.check([OUTCOME]) else None
        except RuntimeError:
            return None

    def _store_is_gone(self) -> bool:
        try:
            self.store.check(["any"])
        except RuntimeError:
            return True
        return False

    def _interface_sent_bytes(self) -> int:
        counters = psutil.net_io_counters(pernic=True).get(self.node.interface)
        return 0 if counters is None else counters.bytes_sent

    def _say_goodbye(self, sent_bytes: int) -> None:
        """Report this node's sent bytes; node 0 then waits for the other nodes, because its store goes with it."""
        node = self.node
        try:
            self.store.set(f"left/{node.number}", str(sent_bytes))
            if node.number == 0 and node.count > 1:
                deadline = time.monotonic() + FAREWELL_S
                left = [f"left/{number}" for number in range(node.count)]
                while time.monotonic() < deadline and not self.store.check(left):
                    time.sleep(POLL_S)
                if self.store.check(left):
                    self.wire_sent_bytes = [int(self.store.get(key)) for key in left]
        except RuntimeError:
            self.log("node 0 has left")


def oom_kills() -> int:
    """Return how many processes this system has killed for lack of memory so far; 0 where it does not say."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _agent_class() -> Any:
    """Return torchrun's agent class, extended: it logs failures, and counts restarts since the newest checkpoint."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        def __init__(self, spec: Any, logs: Any, launch: Launch) -> None:
            super().__init__(spec, logs, exit_barrier_timeout=FAREWELL_S)
            self._launch, self._restarted_at = launch, 0

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            if self._launch.abandoned.is_set():
                raise RuntimeError("no process is started any more")
            return dict(super()._start_workers(worker_group))

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
                step, may_restart = self._launch.on_failures(result.failures)
                # torchrun's own budget is for the whole run, and a run of weeks would use it up.
                if step > self._restarted_at:  # the run has made progress since: refill the budget
                    self._restarted_at, self._remaining_restarts = step, worker_group.spec.max_restarts
                if not may_restart:
                    self._remaining_restarts = 0
            return result

        def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
            # A killed process loses nothing: checkpoints are written whole or not at all.
            super()._shutdown(signal.SIGKILL, timeout)

    return Agent
