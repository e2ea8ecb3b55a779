"""Processes that tests start: one way to start them, to wait for them, to get their output and to find what they left.

A child carries a mark in its environment, which everything that it starts inherits. So a test that ends finds the
processes that are left, whoever started them, and fails. Tests of commands, launched runs, real exchanges and network
laboratories start their processes here. Without torch, so that light tests stay light.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MARK = "LTE_TEST_PROCESS"
LIMIT_S = 180.0
GONE_S = 10.0
"""Time for the processes of a child that has ended to end, too."""


@dataclass(frozen=True)
class Outcome:
    """What a process left: its exit code and its output."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """Return the JSON document that is all of stdout."""
        return json.loads(self.stdout)


def environment(**more: str) -> dict[str, str]:
    """Return an environment for children: one thread, no terminal, loopback for gloo."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "GLOO_SOCKET_IFNAME": "lo", **more}


class Child(subprocess.Popen[Any]):
    """A process that a test started; options are Popen's."""

    def __init__(self, argv: Sequence[object], env: dict[str, str] | None = None, **options: Any) -> None:
        self.mark = uuid.uuid4().hex
        marked = {**(environment() if env is None else env), MARK: self.mark}
        super().__init__([str(word) for word in argv], env=marked, **{"text": True, **options})

    def family(self) -> list[psutil.Process]:
        """Return the live processes that carry the mark: this one, and whatever it started."""
        return marked({self.mark})

    def outcome(self, limit_s: float = LIMIT_S) -> Outcome:
        """Wait for the end; fails with the output where it takes longer, or where a process is left."""
        try:
            stdout, stderr = self.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.end_family()
            said = "\n".join(filter(None, self.communicate()))
            raise AssertionError(f"{self.args} took more than {limit_s:.0f} s:\n{said}") from None
        self.assert_nothing_left()
        return Outcome(self.returncode, stdout or "", stderr or "")

    def assert_nothing_left(self) -> None:
        """Fail where a process outlives the one that has ended, which is killed."""
        try:
            wait_until(lambda: not self.family(), GONE_S)
        except AssertionError:
            left = [" ".join(_command_line(process)) for process in self.family()]
            self.end_family()
            raise AssertionError(f"{self.args} left running: {left}") from None

    def end_family(self) -> None:
        """Kill it and whatever it started."""
        for process in self.family():
            with suppress(psutil.Error):
                process.kill()
        if self.poll() is None:
            self.kill()
            self.wait()


def marked(marks: set[str]) -> list[psutil.Process]:
    """Return the live processes that carry one of the marks."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) in marks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return ["(gone)"]


def wait_until(condition: Callable[[], object], limit_s: float = LIMIT_S, why: Callable[[], str] = str) -> None:
    """Return once something is so; fails after the limit, with what `why` says then."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {limit_s:.0f} s: {why()}"
        time.sleep(0.05)


def run(argv: Sequence[object], limit_s: float = LIMIT_S, **options: Any) -> Outcome:
    """Run a process to its end; options are Popen's."""
    return Child(argv, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}).outcome(limit_s)


def run_python(code: str, *arguments: object, limit_s: float = LIMIT_S, **options: Any) -> str:
    """Run code in an interpreter of its own; returns its stdout, and fails where it fails."""
    outcome = run([sys.executable, "-c", code, *arguments], limit_s, **options)
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout


def run_together(commands: Iterable[Sequence[object]], limit_s: float = LIMIT_S, **options: Any) -> list[Outcome]:
    """Run processes that wait for each other; fails where one fails, with the output of those that did."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    children = [Child(command, **options) for command in commands]
    try:
        outcomes = [child.outcome(limit_s) for child in children]
    finally:
        for child in children:
            child.end_family()
    failed = [outcome.stdout for outcome in outcomes if outcome.code]
    assert not failed, "\n".join(failed)
    return outcomes
