"""The elastic agent that keeps one node's processes of a launched run going, and who listens to it.

Membership, restarts and quorum are torchrun's: its LocalElasticAgent over its c10d rendezvous, here with a key-value
store that listens at one address only, and with word of what failed. Everything that imports torch does so when called.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
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

from simulate.common.errors import InputError, RunFailedError
from simulate.config.run import Run, run_fingerprint
from simulate.launch.preflight.secret import VARIABLE as SECRET_VARIABLE

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOGS = "logs"
POLL_S, MONITOR_S = 0.3, 0.5
FAREWELL_S = 20.0
"""How long the first node waits for the others to hear how the run ended."""
KEEP_ALIVE_S, KEEP_ALIVE_MISSES = 2, 3
"""A node that is not heard of for so long is lost."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Node:
    """This machine's part in a launched run."""

    processes: int
    device: str
    """cpu or cuda."""
    number: int = 0
    count: int = 1
    address: str = "127.0.0.1"
    """Of this node, where it listens."""
    interface: str = "lo"
    store_address: str = "127.0.0.1"
    """Of the first node."""
    store_port: int = 0
    """0: any that is free, on the first node."""


class Launch:
    """One node's agent with its store; `tell` gets what goes wrong, in words, as it happens."""

    def __init__(self, folder: Path, run: Run, node: Node, log: Log, threads: int) -> None:
        self._oom_kills_before = oom_kills()
        self.folder, self.run, self.node, self.log, self.threads = folder, run, node, log, threads
        self._store: TCPStore | None = None
        self.keep_alive_misses = KEEP_ALIVE_MISSES
        self.abandoned = threading.Event()
        """Set where no process may be started any more."""
        self._agent_class, self._running_agent = _agent_class(), None
        self.wire_sent_bytes: list[int] | None = None
        """What each node's interface sent, with all headers and whatever else was on it; known on node 0 at the end."""

    @property
    def store(self) -> TCPStore:
        """The agents' key-value store."""
        assert self._store is not None
        return self._store

    def open_store(self) -> None:
        """Listen, on the first node, at its address only. Raises InputError."""
        from torch.distributed import TCPStore

        node = self.node
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((node.address, node.store_port))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            raise InputError(
                f"--join {node.address}:{node.store_port} cannot be listened at ({error.strerror}); choose another port"
            ) from None
        port = listener.getsockname()[1]
        self._store = TCPStore(
            node.address, port, is_master=True, timeout=self._join_timeout, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip

    def connect_store(self, port: int) -> None:
        """Connect, on another node, to the first one's. Raises RunFailedError."""
        from torch.distributed import TCPStore

        try:
            self._store = TCPStore(self.node.store_address, port, is_master=False, timeout=self._join_timeout)
        except RuntimeError as error:
            place = f"{self.node.store_address}:{port}"
            raise RunFailedError(f"node 0 does not answer at {place}: {_first_line(error)}") from error

    @property
    def _join_timeout(self) -> timedelta:
        return timedelta(seconds=self.run.cluster.join_timeout_s)

    def run_agent(self) -> dict[str, Any]:
        """Start the processes and keep them going; returns how the run ended. Raises RunFailedError."""
        from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

        node = self.node
        os.environ.update(self._environment())
        os.environ.pop(SECRET_VARIABLE, None)  # processes have no use for it
        # What it has to say is told here, in our words.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        sent_before = self._interface_sent_bytes()
        agent, handler = self._agent()
        self._running_agent = agent
        try:
            result = agent.run()
            handler.shutdown()
        except (RendezvousError, RuntimeError) as error:
            if outcome := self._outcome():
                return outcome
            if isinstance(error, RendezvousTimeoutError):
                waited = f"{self.run.cluster.join_timeout_s:g} s (cluster.join_timeout_s)"
                raise RunFailedError(f"node {node.number} waited {waited} for nodes that were lost") from error
            if node.number > 0 and self._store_is_gone():
                raise RunFailedError(f"node {node.number}: node 0 is gone, and the run with it") from error
            raise RunFailedError(f"node {node.number} lost the others: {_first_line(error)}") from error
        outcome = self._outcome()
        self._part(self._interface_sent_bytes() - sent_before)
        if outcome is not None:
            return outcome
        failures = "; ".join(self._failure(rank, failure) for rank, failure in sorted(result.failures.items()))
        raise RunFailedError(f"given up after {self.run.cluster.max_restarts} restarts: {failures}")

    def allow_clocks_apart(self, seconds: float) -> None:
        """Take a node for lost later: signs of life bear the time of each node's own clock."""
        self.keep_alive_misses += math.ceil(seconds / KEEP_ALIVE_S)

    @property
    def is_waiting(self) -> bool:
        """Whether no process runs here, since others are waited for."""
        from torch.distributed.elastic.agent.server.api import WorkerState

        agent = self._running_agent
        return agent is not None and agent.get_worker_group().state in (WorkerState.INIT, WorkerState.STOPPED)

    def abandon(self) -> None:
        """End this node's processes at once, and start none any more."""
        self.abandoned.set()
        own = [child for child in psutil.Process().children(recursive=True) if self._is_ours(child)]
        for process in own:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(own, timeout=POLL_S)

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return str(self.folder) in process.cmdline()
        return False

    def _environment(self) -> dict[str, str]:
        interface = self.node.interface
        return {
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # its server would listen everywhere
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP",  # Ctrl-C and SIGTERM are asked for more gently
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",  # processes that spin stand in each other's way
            "KINETO_LOG_LEVEL": "99",
        }

    def _agent(self) -> tuple[Any, Any]:
        """Return the agent and its part of the rendezvous."""
        from torch.distributed.elastic.agent.server.api import WorkerSpec
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
            DynamicRendezvousHandler,
            RendezvousTimeout,
        )

        cluster, node, run_id = self.run.cluster, self.node, run_fingerprint(self.run)[:16]
        least = math.ceil((cluster.min_devices or cluster.devices) * node.count / cluster.devices)
        handler = DynamicRendezvousHandler.from_backend(
            run_id,
            self.store,
            C10dRendezvousBackend(self.store, run_id),
            min_nodes=least,
            max_nodes=node.count,
            local_addr=f"{node.number:06d}",  # ranks go by these names, so the first process is node 0's
            timeout=RendezvousTimeout(
                join=timedelta(seconds=cluster.join_timeout_s), last_call=timedelta(seconds=cluster.rejoin_s)
            ),
            keep_alive_interval=KEEP_ALIVE_S,
            keep_alive_max_attempt=self.keep_alive_misses,
        )
        logs = self.folder / LOGS / f"node{node.number}"
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

    def failed(self, failures: dict[int, Any]) -> None:
        """Tell everyone which of this node's processes failed by themselves; others wrote so before they left."""
        from simulate.launch.keys import FATAL_EXIT, REPORTED_EXIT
        from simulate.launch.worker import log

        for rank, failure in sorted(failures.items()):
            if failure.exitcode not in (FATAL_EXIT, REPORTED_EXIT):
                log(self.store, self._failure(rank, failure))

    def may_restart(self) -> bool:
        """Whether trying again can end otherwise."""
        from simulate.launch.keys import FATAL

        return not self.store.check([FATAL])

    def saved_step(self) -> int:
        """Return the step of the newest checkpoint that the run told of."""
        from simulate.launch.keys import STEP

        return int(self.store.get(STEP)) if self.store.check([STEP]) else 0

    def _failure(self, rank: int, failure: Any) -> str:
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = ""
            if name == "SIGKILL":
                out_of_memory = oom_kills() > self._oom_kills_before
                hint = ", since the system ran out of memory" if out_of_memory else ", by hand or for lack of memory"
            return f"process {rank} on node {self.node.number} was killed by {name}{hint}"
        logs = sorted((self.folder / LOGS).glob(f"node{self.node.number}/*/attempt_*/{failure.local_rank}/stderr.log"))
        lines = [line for line in logs[-1].read_text(errors="replace").splitlines() if line.strip()] if logs else []
        last = f": {lines[-1].strip()}" if lines else ""
        without_memory = any("MemoryError" in line or "allocate memory" in line for line in lines)
        why = "ran out of memory and " if without_memory else ""
        return f"process {rank} on node {self.node.number} {why}ended with {failure.exitcode}{last}"

    def _outcome(self) -> dict[str, Any] | None:
        from simulate.launch.keys import OUTCOME

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

    def _part(self, sent_bytes: int) -> None:
        """Say what crossed the interface; stay on the first node until everybody has: its store goes with it."""
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
    """Return how many processes this system has killed for lack of memory so far; 0 where it does not tell."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _agent_class() -> Any:
    """Return torchrun's agent, which also tells of failures, and counts restarts from the last checkpoint on."""
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
                self._launch.failed(result.failures)
                step = self._launch.saved_step()
                if step > self._restarted_at:  # the run got on in between
                    self._restarted_at, self._remaining_restarts = step, worker_group.spec.max_restarts
                if not self._launch.may_restart():
                    self._remaining_restarts = 0
            return result

        def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
            # Nothing is lost with a killed process: what it saves is whole or not there.
            super()._shutdown(signal.SIGKILL, timeout)

    return Agent


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
