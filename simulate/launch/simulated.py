"""Simulate a run's devices in several processes of this machine: the command's own process, and others that it starts.

    python -m simulate.launch.simulated FOLDER RENDEZVOUS PROCESS PROCESSES CHECKPOINT

A small network leaves the threads of one process waiting for each other; a process a core, each with its share of the
devices in one tensor program, does not. All processes run the same loop over the same clock, as one would alone, and
exchange tensors by gloo on loopback. The first, `lte train` itself, has the events, the signals and the report. The
others train along, save their devices' parts, and end with the first. Nothing is restarted: a run that lost a process
ends, and is resumed from its checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from simulate.common.errors import InputError, RunFailedError
from simulate.common.exits import end_process
from simulate.common.run_files import CHECKPOINTS, PROFILE_FILE, RUN_FILE
from simulate.config.profiles import load_profile
from simulate.config.run import Run, load_run
from simulate.launch.keys import FATAL_EXIT, REPORTED_EXIT
from simulate.launch.preflight.address import loopback_interface

if TYPE_CHECKING:
    import torch

    from simulate.comm.base import Communicator
    from simulate.config.hardware import Profile
    from simulate.data.load import Dataset
    from simulate.training.loop import Session

WAIT = timedelta(hours=12)
"""Longest wait for another process. A lost one breaks its connections at once; one that is stopped may go on."""
POLL_S, GONE_S = 0.05, 10.0
"""Seconds between two looks at a process, and those that it has to end once its peers are gone."""
NO_CHECKPOINT = "-"


def simulation_session(
    run: Run,
    profile: Profile,
    data: Dataset,
    checkpoints: Path,
    device: torch.device,
    processes: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> Session:
    """Return a session of this process's simulated devices, at step 0, whose events are dropped."""
    from simulate.comm.virtual import VirtualCommunicator
    from simulate.data.batches import build_batches
    from simulate.methods.registry import build_method
    from simulate.training.loop import Session
    from simulate.training.simulated_clock import SimulatedClock

    devices = run.cluster.devices
    clock = SimulatedClock(run, profile.devices(devices), profile.link)
    communicator: Communicator = VirtualCommunicator(devices, clock.charge_transfer, clock.wait)
    if processes > 1:
        from simulate.comm.process_group import TorchCommunicator

        communicator = TorchCommunicator(devices, device, WAIT.total_seconds(), clock.charge_transfer, clock.wait)
    return Session(
        run=run,
        method=build_method(run, communicator, device),
        batches=build_batches(run, data, device),
        communicator=communicator,
        clock=clock,
        emit=lambda event: None,
        checkpoints=checkpoints,
        device=device,
        stop=stop,
        writes_shared=communicator.process == 0,
        folder_devices=range(devices),
        is_simulation=True,
    )


class Companions:
    """The other processes of a simulation, as the first sees them; none where it simulates alone."""

    def __init__(self, folder: Path, run: Run, processes: int, threads: int) -> None:
        self._folder, self._run, self.processes, self._threads = folder, run, processes, threads
        self._scratch = Path()
        """Folder in which the processes find each other, with what each prints."""
        self._children: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def started(self, resume_from: Path | None) -> Iterator[None]:
        """Start the processes that train the run folder's devices with this one; on leaving, none is left.

        Raises RunFailedError, in the place of what an exchange raised, where one of them failed.
        """
        if self.processes == 1:
            yield
            return
        from simulate.comm.process_group import LostPeerError

        with tempfile.TemporaryDirectory(prefix="lte-") as name:
            self._scratch = Path(name)
            try:
                self._start(resume_from)
                yield
            except LostPeerError as error:
                raise self._failure(GONE_S) or error from error
            finally:
                self._end()

    def _start(self, resume_from: Path | None) -> None:
        # An attempt that was killed may have left parts of other shares of the devices.
        for path in (self._folder / CHECKPOINTS).glob("step-*"):
            if resume_from is None or path.name > resume_from.name:
                shutil.rmtree(path, ignore_errors=True)
        module = [sys.executable, "-m", "simulate.launch.simulated", str(self._folder), str(self._scratch)]
        environment = {**os.environ, **_gloo_environment(), "OMP_NUM_THREADS": str(self._threads)}
        for process in range(1, self.processes):
            words = [str(process), str(self.processes), str(resume_from or NO_CHECKPOINT)]
            with self._log(process).open("wb") as log:
                # A session of its own: the terminal's Ctrl-C is for the first process, which lets all save.
                self._children.append(
                    subprocess.Popen(
                        [*module, *words], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True,
                    )
                )  # fmt: skip

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the others, once all have loaded their data; raises RunFailedError or InputError for one that failed."""
        if self.processes == 1:
            yield
            return
        import torch.distributed as dist

        while not all((self._scratch / f"ready-{process}").exists() for process in range(1, self.processes)):
            self._raise_failure()
        variables = _gloo_environment()
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            join(self._scratch, 0, self.processes)
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def wait_for_the_end(self) -> None:
        """Wait until all have saved and left; raises RunFailedError or InputError for one that failed."""
        while any(child.poll() is None for child in self._children):
            self._raise_failure()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if failure := self._failure(POLL_S):
            raise failure

    def _failure(self, seconds: float) -> RunFailedError | InputError | None:
        """Return why a process ended early, waiting for one to end; None where none has, or only as others did."""
        deadline = time.monotonic() + seconds
        while True:
            codes = [child.poll() for child in self._children]
            # One that lost its peer did not begin the trouble.
            for process, code in enumerate(codes, 1):
                if code not in (None, 0, REPORTED_EXIT):
                    return self._error(process, int(code or 0))
            if time.monotonic() >= deadline or all(code is not None for code in codes):
                return None
            time.sleep(POLL_S)

    def _error(self, process: int, code: int) -> RunFailedError | InputError:
        report = self._scratch / f"failure-{process}"
        if code == FATAL_EXIT and report.is_file():
            found = json.loads(report.read_text(encoding="utf-8"))
            return (InputError if found["input"] else RunFailedError)(found["text"])
        name = f"simulating process {process} of {self.processes}"
        less = "--processes 1 simulates all devices in one, which needs less memory"
        if code == -9:
            return RunFailedError(f"{name} was killed by SIGKILL, by hand or for lack of memory; {less}")
        log = self._log(process).read_text(encoding="utf-8", errors="replace")
        last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no message")
        return RunFailedError(f"{name} ended with {code}: {last}; {less}")

    def _log(self, process: int) -> Path:
        return self._scratch / f"log-{process}"

    def _end(self) -> None:
        """Kill what still runs, which loses nothing: a part of a checkpoint is written whole or not at all."""
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _gloo_environment() -> dict[str, str]:
    """Return the variables by which gloo listens on this machine alone."""
    return {"GLOO_SOCKET_IFNAME": loopback_interface()}


def join(rendezvous: Path, process: int, processes: int) -> None:
    """Join the process group of a simulation; the processes find each other by a file, so that no port is opened."""
    import torch.distributed as dist

    store = dist.FileStore(str(rendezvous / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=process, world_size=processes, timeout=WAIT)


def main() -> int:
    """Train one process's share of a simulation to its end; returns the exit code."""
    from simulate.comm.process_group import LostPeerError
    from simulate.launch.worker import exit_with_the_agent

    folder, rendezvous, process, processes, checkpoint = sys.argv[1:]
    exit_with_the_agent()
    try:
        _train(Path(folder), Path(rendezvous), int(process), int(processes), checkpoint)
    except LostPeerError:
        traceback.print_exc()
        return REPORTED_EXIT
    except (InputError, RunFailedError) as error:
        report = Path(rendezvous) / f"failure-{process}"
        report.write_text(json.dumps({"text": str(error), "input": isinstance(error, InputError)}), encoding="utf-8")
        return FATAL_EXIT
    return 0


def _train(folder: Path, rendezvous: Path, process: int, processes: int, checkpoint: str) -> None:
    import torch
    import torch.distributed as dist

    from simulate.data.load import kept_tokenizer, load_data
    from simulate.training.loop import train

    run, profile = load_run(folder / RUN_FILE), load_profile(str(folder / PROFILE_FILE))
    data = load_data(run, kept_tokenizer(folder))
    (rendezvous / f"ready-{process}").touch()
    join(rendezvous, process, processes)
    session = simulation_session(run, profile, data, folder / CHECKPOINTS, torch.device("cpu"), processes)
    try:
        begin(session, None if checkpoint == NO_CHECKPOINT else Path(checkpoint))
        train(session)
    finally:
        session.communicator.close()
    dist.destroy_process_group()


def begin(session: Session, resume_from: Path | None) -> None:
    """Bring a process's session to where the run begins; raises InputError for other start weights or checkpoints."""
    from simulate.training.loop import restore

    if session.communicator.processes > 1:
        from simulate.comm.process_group import TorchCommunicator
        from simulate.launch.worker import check_start

        assert isinstance(session.communicator, TorchCommunicator)
        check_start(session.run, session.communicator, f"process {session.communicator.process}")
    if resume_from is not None:
        restore(session, resume_from)


if __name__ == "__main__":
    end_process(main())
