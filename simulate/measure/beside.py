"""Measure the memory of one device's program in a process of its own, while the run itself already trains.

    python -m simulate.measure.beside FOLDER

A large network's three steps alone would keep a run waiting for as long as three of its own. The process has one thread
and a low priority, prints the allocator's peak, and ends when the process that started it does. `lte train` starts it
for runs on the processor that are large enough to be worth a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from simulate.common.exits import end_process
from simulate.common.run_files import RUN_FILE
from simulate.config.run import Run, load_run
from simulate.costs.flops import forward_flops

PASSES = 10
"""Forward passes that the measured program's steps and evaluation are worth."""
WORTH_A_PROCESS = 2e11
"""Operations of the measured program from which it runs beside training: a process takes about three seconds to start,
and so do these on a core that makes 7e10 a second."""
NICENESS = 10
"""The system gives a training thread nine times the time of one so nice where both want the same core."""


def is_large(run: Run) -> bool:
    """Whether a run's measurement takes longer than a process takes to start."""
    return PASSES * forward_flops(run.shape(), run.train.device_batch) > WORTH_A_PROCESS


class MemoryBeside:
    """A measurement that is under way in another process."""

    def __init__(self, folder: Path, of_class: int = 0) -> None:
        """Measure a device of a class of the folder's run."""
        # A file, since nobody reads a pipe while the run trains, and a full one would stop the process.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "simulate.measure.beside", str(folder), str(of_class)],
            # The process reads the end of its input when this one is gone, however it went.
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # The terminal's Ctrl-C is for the training process, which saves first.
            start_new_session=True,
        )  # fmt: skip

    @property
    def is_done(self) -> bool:
        """Whether `measured_bytes` returns at once."""
        return self._process.poll() is not None

    def measured_bytes(self) -> int:
        """Wait for the measurement and return it; raises RuntimeError with the last words of one that failed."""
        assert self._process.stdout is not None
        printed = self._process.stdout.read()
        if code := self._process.wait():
            self._log.seek(0)
            lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
            raise RuntimeError(lines[-1] if lines else f"its process ended with {code}")
        return int(json.loads(printed)["measured_bytes"])

    def close(self) -> None:
        """End the process, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            if file is not None:
                file.close()


def end_with_the_parent() -> None:
    """End this process when its standard input ends, as it does when the process that started it is gone."""

    def watch() -> None:
        # Not sys.stdin.read, which holds a lock that Python's teardown needs after an error.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Measure the run of a folder and print the bytes; returns the exit code."""
    end_with_the_parent()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    import torch

    from simulate.layers.dtypes import CPU
    from simulate.measure.one_device import measure_memory_bytes

    torch.set_num_threads(1)
    run = load_run(Path(sys.argv[1]) / RUN_FILE).of_class(int(sys.argv[2]))
    print(json.dumps({"measured_bytes": measure_memory_bytes(run, CPU)}))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    end_process(main())
