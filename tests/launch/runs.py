"""Launched runs in processes of their own, to do damage to: on this machine, or on nodes of a lab."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ltecli.app import main
from simulate.common.events import Event
from simulate.launch.preflight.secret import make_secret
from tests.harness import LIMIT_S, Child, environment, marked, wait_until
from tests.ltecli.command import events_of, write_run
from tests.network.lab import Lab

SECRET = make_secret()
PIDS = "pids"
"""File of a node's logs that names its workers' ranks and pids, where they are forked (tests.launch.forked)."""
LOSS_TOLERANCE = 0.05


@dataclass
class Launched:
    """A launched run: one agent a node, each with its run folder and what it said."""

    folder: Path
    agents: list[Child] = field(default_factory=list)
    nodes: int = 1
    folders: dict[int, Path] = field(default_factory=dict)
    """Of nodes that have theirs elsewhere, below `folder`."""
    marks: dict[int, set[str]] = field(default_factory=dict)
    """Of each node's agents, also of those that have ended."""

    def node_folder(self, node: int = 0) -> Path:
        """Return a node's run folder."""
        return self.folders.get(node, self.folder / f"node{node}")

    def said(self, node: int = 0) -> str:
        """Return what a node said, on stdout and stderr."""
        return (self.folder / f"said{node}.txt").read_text()

    def events(self, kind: str = "") -> list[Event]:
        """Return the events so far, of a kind or all."""
        path = self.node_folder() / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [event for event in found if event["kind"] == kind or not kind]

    def val_loss(self) -> float:
        """Return the last evaluation's loss."""
        return float(self.events("evaluate")[-1]["val_loss"])

    def wait_for(self, condition: Callable[[], object], seconds: float = LIMIT_S) -> None:
        """Wait until something is so; fails with everything that was said."""
        wait_until(condition, seconds, self.all_said)

    def wait_for_step(self, step: int) -> None:
        """Wait until that step was told of, this time or before."""
        self.wait_for(lambda: any(event["step"] >= step for event in self.events("step")))

    def end(self, seconds: float = LIMIT_S) -> list[int]:
        """Wait until every agent has ended; returns their exit codes. No process may be left."""
        self.wait_for(lambda: all(agent.poll() is not None for agent in self.agents), seconds)
        self.wait_for(lambda: not self.processes(), 10.0)
        return [int(agent.returncode) for agent in self.agents]

    def processes(self, node: int | None = None) -> list[psutil.Process]:
        """Return the live processes of the run; of one node, or all."""
        nodes = self.marks if node is None else [node]
        return marked({mark for number in nodes for mark in self.marks.get(number, ())})

    def workers(self, node: int = 0) -> list[psutil.Process]:
        """Return a node's worker processes, by their numbers."""
        found = {}
        if (pids := self.node_folder(node) / "logs" / PIDS).exists():
            newest = dict(line.split() for line in pids.read_text().splitlines())
            for rank, pid in newest.items():
                with suppress(psutil.Error):
                    process = psutil.Process(int(pid))
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found[int(rank)] = process
            return [found[rank] for rank in sorted(found)]
        for process in self.processes(node):
            with suppress(psutil.Error):
                if "simulate.launch.worker" in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def all_said(self) -> str:
        """Return what all nodes said, for a test that fails."""
        said = [f"--- node {k}, exit {a.poll()}:\n{self.said(k)}" for k, a in enumerate(self.agents)]
        kinds = [f"{e['kind']} {e['step']}" for e in self.events() if e["kind"] != "step"]
        return "\n".join([*said, *kinds, *self.worker_logs()])

    def worker_logs(self) -> list[str]:
        """Return the ends of what workers wrote to stderr."""
        return [path.read_text()[-2000:] for path in sorted(self.folder.rglob("stderr.log"))]

    def kill(self) -> None:
        """End everything that is left."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        for agent in self.agents:
            agent.end_family()


def start_node(
    launched: Launched, run: Path, node: int = 0, processes: int = 2, lab: Lab | None = None, resume: bool = False,
    module: str = "ltecli", more: Sequence[str] = (),
) -> None:  # fmt: skip
    """Start a node's line, also a second time; `more` are further options."""
    folder = launched.node_folder(node)
    command = [sys.executable, "-m", module, "train", str(folder) if resume else str(run), "--launch"]
    command += ["--processes", str(processes), "--device", "cpu"]
    command += ["--resume"] if resume else ["--out", str(folder)]
    command += more
    if launched.nodes > 1:
        assert lab is not None
        command += ["--nodes", str(launched.nodes), "--node", str(node), "--join", f"{lab[0].address}:29400"]
    said = (launched.folder / f"said{node}.txt").open("a")
    options: dict[str, Any] = {
        "stdout": said,
        "stderr": subprocess.STDOUT,
        "env": environment(LTE_SECRET=SECRET),
    }
    agent = Child(command, **options) if lab is None else lab[node].popen(command, **options)
    launched.marks.setdefault(node, set()).add(agent.mark)
    said.close()
    if node < len(launched.agents):
        launched.agents[node] = agent
    else:
        launched.agents.append(agent)


@contextmanager
def launched_run(
    folder: Path,
    run: Path,
    processes: int = 2,
    lab: Lab | None = None,
    resume: bool = False,
    folders: dict[int, Path] | None = None,
    module: str = "ltecli",
) -> Iterator[Launched]:
    """Start a run on this machine, or a node of it on each node of a lab; whatever is left is killed at the end."""
    folder.mkdir(exist_ok=True)
    launched = Launched(folder, nodes=1 if lab is None else len(lab), folders=folders or {})
    try:
        for node in range(launched.nodes):
            start_node(launched, run, node, processes, lab, resume, module)
        yield launched
    finally:
        launched.kill()


def tiny_run(
    folder: Path, steps: int = 60, diagnostics_every: int | None = None, method: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None, **cluster: Any,
) -> Path:  # fmt: skip
    """Write a tiny run of four devices in float64, of lte unless `method` says otherwise, which merges and saves every
    five steps, and can be hit there.
    """
    path = folder / f"tiny{steps}.toml"
    train = {"steps": steps, "evaluate_every": steps, "checkpoint_every": steps, "dtype": "fp64", **(train or {})}
    if diagnostics_every is not None:
        train["diagnostics_every"] = diagnostics_every
    method = {"merge_every": 5, "rank": 2, "name": "lte"} if method is None else method
    cluster = {"devices": 4, "timeout_s": 60, "join_timeout_s": 60, **cluster}
    return write_run(path, method=method, train=train, cluster=cluster)


def simulated_loss(run: Path, folder: Path, *more: str) -> float:
    """Return the last validation loss of the run undisturbed, in this process; `more` are further options."""
    assert main(["train", str(run), "--out", str(folder), "--device", "cpu", "--quiet", *more]) == 0
    return float(events_of(folder, "evaluate")[-1]["val_loss"])


def interrupt(process: subprocess.Popen[Any] | psutil.Process, number: signal.Signals = signal.SIGINT) -> None:
    """Send a signal; inside a lab, Popen's process became the command itself."""
    os.kill(process.pid, number)


def figures_of(launched: Launched) -> str:
    """Return, for the documentation, what each restart of a run cost."""
    restarts = [(round(event["silent_s"], 1), event["repeated_steps"]) for event in launched.events("restart")]
    return f"restarts (seconds without a step, steps repeated): {restarts}, loss {launched.val_loss():.6f}"
