"""One command that measures this program on a machine with a GPU: `make gpu`, or a part of it, `make gpu PART=a`.

    python3 -m bench.gpu --part a --device cuda

It needs Python and PyTorch, installs and downloads nothing, and runs from the checkout. Rows run in processes of their
own (bench/gpu/worker.py); one that fails, hangs or crashes is recorded, and the next one starts. A part stops at its
time limit and goes on where it stopped when it is called again. docs/gpu.md says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from bench.gpu.results import Results, Stamp, code_digest, commit_of, digest, markdown
from bench.gpu.rows import PARTS, ROWS, Row

ROOT = Path(__file__).parents[2]
PART_LIMIT_S = 520.0
"""With the start of the first process and the end of the last, nine minutes."""
ROW_SHARE = 0.9
"""Most of a part's time that one row may take: a longer one would be cut off, and begun again, at every call."""
FACTS_LIMIT_S = 120.0
MARK = "@@ "
"""As in bench/gpu/worker.py, which imports torch."""
PROGRAM = ["-m", "bench.gpu.worker"]
DISTRIBUTIONS = {"PIL": "pillow", "tomli_w": "tomli-w"}
"""Packages whose name to install is another than the one to import."""


class Worker:
    """A worker process and its messages."""

    def __init__(self, *words: str) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        # One GPU unless the caller names several: `lte train` would launch a run over all that it sees.
        self.process = subprocess.Popen(
            [sys.executable, *PROGRAM, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, start_new_session=True, env={"CUDA_VISIBLE_DEVICES": "0", **os.environ},
        )  # fmt: skip
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith(MARK):
                    self.messages.put(json.loads(line[len(MARK) :]))
        self.messages.put(None)

    def message(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message, None after the last one; raises queue.Empty where none comes in time."""
        return self.messages.get(timeout=max(0.0, seconds))

    def last_words(self) -> str:
        """Return how the process ended and the last line that it wrote."""
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1][:300] if lines else 'it said nothing'}"

    def end(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=10.0)  # a process that left the group may still hold the pipe
        self.errors.close()


class Parts:
    """The rows of all parts on one machine, and what is done of them."""

    def __init__(self, results: Results, limit_s: float) -> None:
        self.results, self.limit_s = results, limit_s
        stamp = results.stamp
        self.folder = results.path.parent / stamp.folder
        self.rows = {part: list(rows(stamp.size)) for part, rows in ROWS.items()}
        self.left_out = {
            row: reason for rows in self.rows.values() for row in rows if (reason := missing(row, stamp.device))
        }

    def waiting(self, part: str) -> list[Row]:
        """Return the rows of a part that can run and are not done, those that failed before last."""
        todo = [row for row in self.rows[part] if row not in self.left_out and not self.results.is_done(row)]
        return sorted(todo, key=lambda row: self.results.find(row) is not None)

    def run(self, part: str) -> None:
        """Run what is waiting, within the part's time limit."""
        deadline = time.monotonic() + self.limit_s
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{part}. {PARTS[part]}", flush=True)
        for _, members in groupby(self.waiting(part), key=lambda row: row.group):
            rows = list(members)
            while rows and time.monotonic() < deadline:
                rows = self._run_some(rows, deadline)

    def _run_some(self, rows: list[Row], deadline: float) -> list[Row]:
        """Run rows in one process, until one fails or the time is up; returns those that remain."""
        stamp = self.results.stamp
        names = [row.name for row in rows]
        worker = Worker("rows", stamp.device, stamp.size, str(self.folder), rows[0].part, *names)
        try:
            while rows:
                row, began = rows[0], time.monotonic()
                done = self._follow(worker, row, began, deadline)
                if done is None:
                    return rows  # the part's time is up: the row is for the next call
                rows = rows[1:]
                self._keep(row, time.monotonic() - began, done)
                if "failed" in done:
                    break
            return rows
        finally:
            worker.end()

    def _follow(self, worker: Worker, row: Row, began: float, deadline: float) -> dict[str, Any] | None:
        """Return the message that ends a row; None where the part's time is up before the row's own."""
        limit_s = min(row.limit_s, ROW_SHARE * self.limit_s)
        while True:
            try:
                message = worker.message(min(began + limit_s, deadline) - time.monotonic())
            except queue.Empty:
                if deadline < began + limit_s:
                    return None
                return {"failed": row.name, "error": f"took more than {limit_s:g} s"}
            if message is None:
                return {"failed": row.name, "error": worker.last_words()}
            if "begin" not in message:
                return message

    def _keep(self, row: Row, seconds: float, done: dict[str, Any]) -> None:
        if "failed" in done:
            self.results.add(row, seconds, error=done["error"])
            print(f"  {row.name}: failed: {done['error']}", flush=True)
        else:
            self.results.add(row, done["seconds"], figures=done["figures"])
            print(f"  {row.name}: {done['seconds']:.1f} s", flush=True)

    def report(self, parts: Sequence[str]) -> int:
        """Write the table, say what is open, and return the exit code."""
        path = self.results.path.with_suffix(".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(self.results, self.rows, self.left_out), encoding="utf-8")
        is_open = False
        for part in parts:
            rows = self.rows[part]
            unrun = [row for row in self.waiting(part) if self.results.find(row) is None]
            failed = [row for row in self.waiting(part) if row not in unrun]
            absent = Counter(self.left_out[row] for row in rows if row in self.left_out)
            counts = f"{sum(map(self.results.is_done, rows))} of {len(rows)} rows done, {len(failed)} failed"
            print(
                f"{part}: {counts}, {len(unrun)} not run yet"
                + "".join(f"; {n} left out: {why}" for why, n in absent.items())
            )
            is_open |= bool(failed or unrun)
            if unrun:
                print(f"   to go on: make gpu PART={part}")
        print(f"wrote {self.results.path} and {path}")
        return int(is_open)


def missing(row: Row, device: str) -> str | None:
    """Return why a row cannot run here, None where it can."""
    if row.gpu_only and device == "cpu":
        return "needs a GPU"
    absent = [DISTRIBUTIONS.get(name, name) for name in row.needs if find_spec(name) is None]
    return f"needs {', '.join(absent)}" if absent else None


def facts_of(device: str) -> dict[str, Any]:
    """Return the facts of this machine; exits with a line where it has no such device."""
    worker = Worker("facts", device)
    try:
        message = worker.message(FACTS_LIMIT_S) or {"error": worker.last_words()}
    except queue.Empty:
        message = {"error": f"torch did not answer within {FACTS_LIMIT_S:g} s"}
    finally:
        worker.end()
    if "error" in message:
        print(f"make gpu: DEVICE={device}: {message['error']}; try: make gpu DEVICE=cpu SIZE=tiny", file=sys.stderr)
        sys.exit(2)
    return dict(message["facts"])


def main() -> int:
    """Run the parts that are asked for, write the table, and return the exit code: 1 where a row is open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: a smoke of the programs")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "gpu.json")
    parser.add_argument("--limit-s", type=float, default=PART_LIMIT_S, help="seconds of a part")
    parser.add_argument("--fresh", action="store_true", help="measure what is done, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no worker is left behind
    facts = facts_of(arguments.device)
    machine = digest(json.dumps(facts, sort_keys=True).encode())
    stamp = Stamp(code_digest(ROOT), commit_of(ROOT), machine, arguments.device, arguments.size)
    parts = Parts(Results(arguments.results.absolute(), stamp, facts), arguments.limit_s)
    chosen = list(PARTS) if arguments.part == "all" else [arguments.part]
    for part in chosen:
        for row in parts.rows[part] if arguments.fresh else ():
            parts.results.forget(row)
    try:
        for part in chosen:
            parts.run(part)
    except KeyboardInterrupt:
        print("interrupted; the rows that are done are kept")
        return 130
    finally:
        code = parts.report(chosen)
    return code


if __name__ == "__main__":
    sys.exit(main())
