"""`python -m tests.launch.forked ...` is `lte ...` whose workers are forked from one process that has imported torch.

Four workers that import torch at once take a minute on two busy cores, and tests of what happens to a running one would
do little else. All else of the command is the real thing.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from simulate.launch import children
from tests.launch.runs import PIDS

CONTEXT = multiprocessing.get_context("forkserver")


class ForkedProcess:
    """A forked process, with what is needed of subprocess.Popen."""

    _process: multiprocessing.process.BaseProcess

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()

    def wait(self) -> None:
        """Wait for its end."""
        self._process.join()


class Forked(ForkedProcess):
    """A forked worker."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], logs: Path) -> None:
        arguments = list(command[command.index("simulate.launch.worker") + 1 :])
        self._process = CONTEXT.Process(target=work, args=(arguments, dict(environment), str(logs), os.getpid()))
        self._process.start()
        self.pid = self._process.pid
        with (logs.parents[3] / PIDS).open("a") as file:
            file.write(f"{environment['RANK']} {self.pid}\n")


def work(arguments: list[str], environment: dict[str, str], logs: str, agent: int) -> None:
    """Be a worker."""
    from simulate.launch import worker

    # A worker ends with its parent, which is the agent but for these, whose parent outlives a killed agent.
    threading.Thread(target=exit_with, args=(psutil.Process(agent),), daemon=True).start()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{logs}/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["worker", *arguments]
    os._exit(worker.main())


def exit_with(agent: psutil.Process) -> None:
    """End this process once its agent has ended, also while nobody has asked for the agent's exit code."""
    while agent.is_running() and agent.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)
    os._exit(1)


class ForkedCompanion(ForkedProcess):
    """A forked process that simulates along (simulate.launch.simulated)."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdout: IO[bytes], **options: Any) -> None:
        CONTEXT.set_forkserver_preload(["simulate.launch.worker", "simulate.training.loop"])
        arguments = list(command[command.index("simulate.launch.simulated") + 1 :])
        self._process = CONTEXT.Process(target=simulate_along, args=(arguments, dict(env), stdout.name))
        self._process.start()


def simulate_along(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Be a process that simulates along."""
    import torch

    from simulate.launch import simulated

    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["simulated", *arguments]
    os._exit(simulated.main())


if __name__ == "__main__":
    CONTEXT.set_forkserver_preload(["simulate.launch.worker"])
    children.spawn = Forked  # type: ignore[assignment]
    from ltecli.app import main

    sys.exit(main(sys.argv[1:]))
