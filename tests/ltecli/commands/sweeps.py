"""Sweeps whose runs are trained in this process, one after the other: a process of its own takes seconds to start."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ltecli.app import main
from ltecli.runs import many_runs


class TrainedHere:
    """Stand-in for the process of a run, which has ended as soon as it is made."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self._code = main(list(command[3:]))  # after `python -m ltecli`

    def poll(self) -> int:
        """Return the exit code."""
        return self._code


def train_here(patch: pytest.MonkeyPatch, processes: int = 0) -> None:
    """Let sweeps train in this process all but the first runs, so many of which get a process as usual."""
    started: list[Any] = []

    def start(command: Sequence[str], **options: Any) -> Any:
        is_process = len(started) < processes
        started.append(subprocess.Popen(command, **options) if is_process else TrainedHere(command))
        return started[-1]

    patch.setattr(many_runs, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
