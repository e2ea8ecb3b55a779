"""What campaigns of training runs have in common: do what is missing, keep each result as a line of JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
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
    os.environ["OMP_NUM_THREADS"] = "1"
    running: dict[Job, Future[Row]] = {}
    deadline = time.monotonic() + minutes * 60
    # An executor's processes, unlike multiprocessing.Pool's, may start their own: loading images does.
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=8) as pool:
        while True:
            while len(running) < processes and time.monotonic() < deadline:
                job = next((job for job in waiting() if job not in running), None)
                if job is None:
                    break
                running[job] = pool.submit(work, job)
            if not running:
                return
            time.sleep(0.2)
            for job in [job for job, result in running.items() if result.done()]:
                row = running.pop(job).result()
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{job}: {row}", flush=True)
