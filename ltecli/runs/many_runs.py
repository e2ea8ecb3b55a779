"""Train many runs on this machine: how many at a time, how long they take, and a process for each.

Each run is trained by a `lte train` of its own, so that one that fails takes no other along and one that is interrupted
is resumed like any other. `lte sweep` and `lte compare` plan the work with `plan_work` and do it with `train_all`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ltecli.console import Output, scores_text
from ltecli.errors import DONE
from ltecli.runs.figures import figures, read_run
from ltecli.runs.lock import is_locked
from ltecli.runs.run_folder import new_folder, stop_on_signal
from ltecli.runs.sweep_folder import saved_steps
from ltecli.runs.variants import Variant
from simulate.common.errors import InputError
from simulate.common.limits import usable_cores, usable_memory, usable_workers
from simulate.common.run_files import CHECKPOINTS, PROFILE_FILE, RUN_FILE
from simulate.common.units import bytes_text, order_text, range_text, seconds_text
from simulate.config.calibration import SWITCH
from simulate.config.hardware import LOCAL
from simulate.config.profiles import load_profile, local_gpu_profile
from simulate.config.run import Run, load_run, with_profile_name
from simulate.planning.candidate import candidate_of
from simulate.planning.margins import Margins
from simulate.planning.planner import evaluate
from simulate.planning.time_ranges import simulated_here_range

POLL_S = 0.1
START_S = 5.5
"""Seconds that a process of `lte train` takes beside its steps: 5.1 to 6.4 measured on two shared cores."""
LOG_FILE = "train.log"
"""Printed lines of a run's process."""


@dataclass(frozen=True)
class Work:
    """The runs that are left to train, how many at a time, and how long they take."""

    path: Path
    """Folder of the sweep."""
    variants: Sequence[Variant]
    left: dict[str, tuple[float, float]]
    """Shortest and longest seconds of each run that is not finished, by its name."""
    is_order: bool
    """Whether seconds are known by their order of magnitude alone."""
    parallel: int
    threads: int
    """Threads of each process."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Shortest and longest seconds of all that is left."""
        starts_s = START_S * len(self.left) / self.parallel
        # A run's seconds are those of all cores, which processes beside each other share.
        low_s, high_s = (sum(seconds[end] for seconds in self.left.values()) for end in (0, 1))
        return low_s + starts_s, high_s + starts_s

    def text(self) -> str:
        """Return a line on how many runs, how many at a time, and how long."""
        runs, done = len(self.variants), len(self.variants) - len(self.left)
        before = f", {done} finished before" if done else ""
        if not self.left:
            return f"{runs} runs in {self.path}, all finished before"
        how = "one after the other" if self.parallel == 1 else f"{self.parallel} at a time"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''} each"
        time_text = order_text(self.seconds[1]) if self.is_order else range_text(*self.seconds)
        about = time_text if self.is_order else f"about {time_text}"
        return f"{runs} run{'s' if runs > 1 else ''} in {self.path}{before}; {how}, {threads}; {about} here"


@dataclass
class Outcome:
    """Result of training many runs."""

    failed: dict[str, str] = field(default_factory=dict)
    """Why runs failed, by name."""
    is_interrupted: bool = False


def plan_work(
    path: Path, variants: Sequence[Variant], device_type: str, parallel: int | None, needed_bytes: Callable[[Run], int]
) -> Work:
    """Plan what is left to train; raises InputError for more runs at a time than memory has room for.

    `needed_bytes` gives the bytes of the host's memory that a run's process needs.
    """
    on_gpu = device_type != "cpu"
    profile = (local_gpu_profile() if on_gpu else None) or load_profile(LOCAL)
    left = {}
    for variant in variants:
        steps = variant.run.train.steps
        share = 1 - saved_steps(path / variant.name, variant.run) / steps
        if share > 0:
            candidate = candidate_of(evaluate(variant.run, profile, steps * variant.run.tokens_per_step))
            low_s, high_s = simulated_here_range(candidate)
            left[variant.name] = low_s * share, high_s * share
    needed = [needed_bytes(variant.run) for variant in variants if variant.name in left]
    at_once = _parallel(needed, on_gpu, parallel)
    threads = max(1, usable_cores() // at_once)
    return Work(path, variants, left, Margins.of(profile).is_order, at_once, threads)


def _parallel(needed: Sequence[int], on_gpu: bool, asked: int | None) -> int:
    """Return how many runs to train at a time: one a core and as memory has room, on a GPU one after the other."""
    if not needed:
        return 1
    most_bytes, free_bytes = max(needed), usable_memory()[1]
    fits = max(1, free_bytes // most_bytes)
    if asked is not None and asked > fits:
        raise InputError(
            f"--parallel {asked}: a run needs about {bytes_text(most_bytes)} and {bytes_text(free_bytes)} are free; "
            f"try --parallel {fits}"
        )
    at_once = 1 if on_gpu else max(1, min(fits, usable_workers(len(needed))))
    return min(asked or at_once, len(needed))


class _Pace:
    """Seconds that are left, by what finished runs took over their estimates."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._begun_s: dict[str, float] = {}
        self._taken_s, self._estimated_s = 0.0, 0.0

    def begin(self, name: str) -> None:
        """Count a run's seconds from now."""
        self._begun_s[name] = time.monotonic()

    def end(self, name: str) -> None:
        """Count a run that has finished."""
        self._taken_s += time.monotonic() - self._begun_s[name]
        self._estimated_s += self._estimate_s(name)

    def left_s(self, running: Sequence[str], waiting: Sequence[str]) -> float:
        """Return the seconds until all runs are finished."""
        factor, now_s = self._taken_s / self._estimated_s, time.monotonic()
        ends_s = [max(0.0, factor * self._estimate_s(name) - (now_s - self._begun_s[name])) for name in running]
        waiting_s = factor * sum(self._estimate_s(name) for name in waiting)
        return max([(sum(ends_s) + waiting_s) / self._work.parallel, *ends_s])

    def _estimate_s(self, name: str) -> float:
        return self._work.left[name][1] + START_S


def train_all(work: Work, device_name: str, output: Output) -> Outcome:
    """Train the runs that are left; those that fail are named, and the others go on.

    The first Ctrl-C or SIGTERM lets all runs save and stop, the second one ends them at once.
    """
    outcome, waiting = Outcome(), [v for v in work.variants if v.name in work.left]
    running: dict[str, subprocess.Popen[bytes]] = {}
    pace, stopping, told = _Pace(work), False, False
    # The loop below looks at `stops` ten times a second, so that no other thread has to answer.
    with stop_on_signal(lambda: None, lambda: None, []) as stops:
        try:
            while waiting or running:
                if stops and not stopping:
                    stopping, waiting = True, []
                    output.hint(f"stopping: {len(running)} runs finish their step and save; Ctrl-C again ends them now")
                    for process in running.values():
                        _interrupt(process)
                while waiting and len(running) < work.parallel and not stops:
                    # A run whose sweep was killed may still be trained; others go first.
                    variant = next((v for v in waiting if not is_locked(work.path / v.name)), None)
                    if variant is None:
                        if not (running or told):
                            output.hint(f"waiting for {waiting[0].name}, which an earlier process still trains")
                        told = told or not running
                        break
                    waiting.remove(variant)
                    try:
                        running[variant.name] = _start(work, variant, device_name)
                        pace.begin(variant.name)
                    except InputError as error:
                        outcome.failed[variant.name] = str(error)
                        output.warning(f"{variant.name} failed: {error}")
                for name, process in list(running.items()):
                    if (code := process.poll()) is None:
                        continue
                    del running[name]
                    if code == DONE:
                        pace.end(name)
                        rest = [v.name for v in waiting]
                        _report_done(work, name, len(running) + len(rest), pace.left_s(list(running), rest), output)
                    elif not stopping:
                        outcome.failed[name] = reason = _reason(work.path / name, code)
                        output.warning(f"{name} failed: {reason}")
                time.sleep(POLL_S)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    outcome.is_interrupted = stopping
    return outcome


def _start(work: Work, variant: Variant, device_name: str) -> subprocess.Popen[bytes]:
    """Start a run's process, in a folder that is made where there is none; raises InputError."""
    folder = work.path / variant.name
    if not (folder / RUN_FILE).is_file():
        if not any(folder.glob(f"{CHECKPOINTS}/*")):  # a kill may have left a part of a folder
            shutil.rmtree(folder, ignore_errors=True)
        new_folder(folder, variant.run, device_name)
    elif load_run(folder / RUN_FILE) != with_profile_name(variant.run, load_profile(str(folder / PROFILE_FILE))):
        raise InputError(f"{folder / RUN_FILE} was changed; restore it, or remove {folder} to train it anew")
    # Room was asked for, for all runs together.
    words = ["train", str(folder), "--resume", "--device", device_name, "--ignore-memory", "--quiet"]
    threads = {name: str(work.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # A machine is not measured while other runs use it.
    environment = {**os.environ, **threads, SWITCH: "0"}
    with (folder / LOG_FILE).open("ab") as log:
        # In a group of its own: a terminal sends Ctrl-C to the whole group, and a second one would cut the save short.
        return subprocess.Popen(
            [sys.executable, "-m", "ltecli", *words],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    # Windows sends Ctrl-C to all processes of the terminal by itself.
    if os.name != "nt":
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)


def _report_done(work: Work, name: str, num_left: int, left_s: float, output: Output) -> None:
    """Print a finished run, and how long the others take."""
    figure, count = figures(read_run(work.path / name)), len(work.variants)
    output.hint(
        f"[{count - num_left}/{count}] {name}: {scores_text(figure['val_loss'], figure['val_accuracy'])}, "
        f"{seconds_text(figure['wall_s']['measured'])} here"
        + (f"; about {seconds_text(max(1.0, left_s))} left" if num_left else "")
    )


def _reason(folder: Path, code: int) -> str:
    """Return why a run's process failed: its last line, or where it was killed the signal's number."""
    lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.removeprefix("lte: ") for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"killed by signal {-code}" if code < 0 else f"{said} (exit code {code}; {folder / LOG_FILE})"
