"""Campaigns of training runs: run what is missing, and keep each result as a line of JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")
Row = dict[str, Any]


def run_missing(
    waiting: Callable[[], Iterator[Job]], work: Callable[[Job], Row], results: Path, processes: int, minutes: float
) -> None:
    """Do the first of the waiting jobs, some at a time, until none is left or the time is up.

    `waiting` reads what is there already, so that later jobs may depend on earlier ones. A job runs in a process of one
    thread; its row is appended to `results` as it comes.
    """
    # Set before the pool starts, since torch reads it once in each process, at its import.
    os.environ["OMP_NUM_THREADS"] = "1"
    running: dict[Job, Any] = {}
    deadline = time.monotonic() + minutes * 60
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=8) as pool:
        while True:
            while len(running) < processes and time.monotonic() < deadline:
                job = next((job for job in waiting() if job not in running), None)
                if job is None:
                    break
                running[job] = pool.apply_async(work, (job,))
            if not running:
                return
            time.sleep(0.2)
            # Appended at once, so that a stopped campaign loses only what was running.
            for job in [job for job, result in running.items() if result.ready()]:
                row = running.pop(job).get()
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{job}: {row}", flush=True)
