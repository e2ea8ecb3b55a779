"""Run folders: made from a run.toml, opened again to resume, and locked while a process trains in them.

A run folder keeps everything that its run needs: run.toml, the profile, the plan, a trained tokenizer, events and
checkpoints. `lte train` makes and opens it; report, export and --link-from read it. All is checked before the first
byte is written, and run.toml comes last, so that a folder with a run.toml is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltecli.output_paths import check_absent, unwritable
from simulate.common import toml_io
from simulate.common.disk import TEMPORARY_VARIABLE, temporary_folder
from simulate.common.errors import InputError
from simulate.common.events import truncate_events
from simulate.common.run_files import CHECKPOINTS, EVENTS_FILE, EXTENDED_FILE, PLAN_FILE, PROFILE_FILE, RUN_FILE
from simulate.common.units import bytes_text
from simulate.config.hardware import LOCAL, Profile
from simulate.config.method_table import BASELINE, default_options
from simulate.config.profiles import is_profile_path, load_profile, local_gpu_profile
from simulate.config.run import Run, build_run, dump_run, load_run, with_profile_name
from simulate.costs.memory import checkpoint_bytes, mapped_file_bytes
from simulate.data.load import TOKENIZER_FILE, Dataset, kept_tokenizer, load_data
from simulate.data.text import Text
from simulate.models.schema import FactoryModel
from simulate.models.shapes import ModelShape, shape_of_table, shape_table
from simulate.planning.candidate import Rejected, is_library_installed
from simulate.planning.planner import Plan, evaluate
from simulate.training.checkpoints import accepted_runs, list_checkpoints

STUCK_S = 1.0
"""Seconds after which a second Ctrl-C ends a process that is inside a long operation."""
RUNS = Path("runs")
"""Folder in which run folders and sweeps lie, unless --out names another."""
CHECKPOINTS_AT_ONCE = 3
"""Checkpoints on the disk at the same time: two are kept while a third is written."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder and its content, ready to train."""

    path: Path
    run: Run
    profile: Profile
    data: Dataset
    plan: dict[str, Any]
    resume_from: Path | None
    """Checkpoint to continue from; None for a new run."""

    @property
    def is_finished(self) -> bool:
        """Whether the newest checkpoint is the last step's."""
        last = f"-{self.run.train.steps:08d}"
        return self.resume_from is not None and self.resume_from.name.endswith(last)

    @property
    def newest_step(self) -> int:
        """Step of the newest checkpoint, 0 without one.

        The folder of one of several nodes has no whole checkpoint. The run continues from this step or an earlier one.
        """
        saved = sorted(self.path.glob(f"{CHECKPOINTS}/step-*"))
        return int(saved[-1].name.rpartition("-")[2]) if saved else 0

    @property
    def events(self) -> Path:
        """The run's event file."""
        return self.path / EVENTS_FILE


def run_name(given: Path) -> str:
    """Return the name of a run.toml: its file's name, or its folder's where the file is called run.toml."""
    return given.parent.resolve().name if given.stem == "run" else given.stem


def check_trainable(run: Run) -> None:
    """Raise InputError where a package is missing that the run needs."""
    frozen = run.method.frozen_format
    if frozen.startswith("nf4") and not is_library_installed():
        raise InputError(
            f"method.quantize = {frozen!r} needs bitsandbytes: pip install 'lte[quantize]', or try "
            "--set method.quantize=int8"
        )


def new_folder(path: Path, run: Run, device_name: str = "cpu") -> RunFolder:
    """Make a run folder; raises InputError before anything is written."""
    check_trainable(run)
    check_new(path)
    data = load_data(run)
    _check_disk(path, run)
    profile = load_profile(run.cluster.profile)
    # `local` describes the processor. Training on a GPU needs the plan of that GPU.
    if profile.name == LOCAL and device_name != "cpu":
        profile = local_gpu_profile() or profile
    plan = _plan_with_shape(run, profile)
    run = with_profile_name(run, profile)
    try:
        path.mkdir(parents=True)
    except FileExistsError:  # another run has made it since the check
        check_new(path)
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        (path / PROFILE_FILE).write_text(toml_io.dump(profile.model_dump(exclude_none=True)), encoding="utf-8")
        (path / PLAN_FILE).write_text(json.dumps(plan, indent=1), encoding="utf-8")
        (path / CHECKPOINTS).mkdir()
        if isinstance(data, Text) and data.vocabulary is not None:
            (path / TOKENIZER_FILE).write_text(data.vocabulary.json, encoding="utf-8")
        # run.toml comes last: with it the folder is whole.
        toml_io.write_atomically(path / RUN_FILE, dump_run(run, profile).encode())
    except BaseException as error:  # an interrupt, too
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise
    return RunFolder(path, run, profile, data, plan, None)


def check_new(path: Path) -> None:
    """Raise InputError where a run folder, or anything else, has the path of a new one."""
    # Path.is_file raises an OSError for a name that is too long.
    if os.path.isfile(path / RUN_FILE):  # noqa: PTH113
        check_absent(path, instead="add --resume to continue it, or choose another --out")
    check_absent(path, instead="it is no run folder; choose another --out")


def check_run_folder(path: Path) -> None:
    """Raise InputError where a path is no run folder."""
    if not os.path.isfile(path / RUN_FILE):  # noqa: PTH113
        raise InputError(
            f"{path} is no run folder (it has no {RUN_FILE}); name one that lte train made, as in runs/demo"
        )


def resumed_folder(path: Path, given: Run | None) -> RunFolder:
    """Open a run folder to resume it; `given`, a run.toml beside --resume, must be equal. Raises InputError."""
    if not os.path.isfile(path / RUN_FILE):  # noqa: PTH113
        raise InputError(f"--resume: {path} is no run folder (it has no {RUN_FILE}); start it without --resume")
    run = load_run(path / RUN_FILE)
    profile = load_profile(str(path / PROFILE_FILE))
    # Another run under the same name would go on from this one's weights.
    if given is not None and given != run and _by_profile_name(given, profile) != run:
        raise InputError(
            f"--resume: the run given differs from {path / RUN_FILE} in {_difference(given, run)}; "
            f"resume with lte train {path} --resume, or start anew with another --out"
        )
    # Found now, not at the first checkpoint hours later.
    if not os.access(path, os.W_OK):
        raise InputError(f"--resume: {path} is read-only; make it writable")
    checkpoints = list_checkpoints(path / CHECKPOINTS, run.cluster.devices)
    data = load_data(run, kept_tokenizer(path))
    return RunFolder(path, run, profile, data, read_plan(path), checkpoints[-1] if checkpoints else None)


def extended_folder(path: Path, assignment: str) -> RunFolder:
    """Open a run folder to resume it for more steps, as `--set train.steps=N` says; nothing is written.

    Raises InputError where the run would not be the one that has so many steps from its start.
    """
    folder = resumed_folder(path, None)
    run, steps = folder.run, folder.run.train.steps
    table = with_profile_name(run, folder.profile).model_dump(exclude_none=True)
    key = toml_io.set_key(table, assignment)
    longer = build_run(table, "command line", assigned=[key])
    more, anew = longer.train.steps, "train anew with another --out"
    rule = f"--set {assignment}: {path} has {steps} steps"
    if more <= steps:
        raise InputError(f"{rule}; name more")
    if run.train.schedule != "constant":
        raise InputError(
            f"{rule}, over which train.schedule = {run.train.schedule!r} spreads its rates: with more they would all "
            f"have been others; {anew}, with train.schedule=constant if more steps may follow"
        )
    if run.train.warmup_share is not None:
        raise InputError(f"{rule}, of which train.warmup_share is a share: the warm-up would have been longer; {anew}")
    if not run.method.ends_plainly(steps):
        raise InputError(
            f"{rule}, and {run.method.name} treats a run's last step otherwise than the same step of a longer run "
            f"(docs/run.md); {anew}"
        )
    return replace(folder, run=longer, plan=_plan_with_shape(longer, folder.profile))


def keep_extension(folder: RunFolder) -> None:
    """Write the run and the plan of `extended_folder`; the caller has locked the folder."""
    path = folder.path
    earlier = sorted(accepted_runs(load_run(path / RUN_FILE), path))
    # run.toml comes last: before it, the folder is that of the shorter run.
    toml_io.write_atomically(path / EXTENDED_FILE, json.dumps(earlier).encode())
    toml_io.write_atomically(path / PLAN_FILE, json.dumps(folder.plan, indent=1).encode())
    toml_io.write_atomically(path / RUN_FILE, dump_run(folder.run, folder.profile).encode())


def _plan_with_shape(run: Run, profile: Profile) -> dict[str, Any]:
    plan = plan_of(run, profile)
    if isinstance(run.model, FactoryModel):  # a report needs no import of the network
        plan["shape"] = shape_table(run.shape())
    return plan


def _by_profile_name(given: Run, profile: Profile) -> Run:
    """Return the run with the profile's name for its path, if the path still leads to that profile."""
    named = load_profile(given.cluster.profile) if is_profile_path(given.cluster.profile) else None
    # `local` is another one at every moment, and on GPUs the run folder has the GPU's.
    is_same = named is not None and named.name == profile.name and (named == profile or named.name == LOCAL)
    return with_profile_name(given, profile) if is_same else given


def stored_shape(path: Path) -> ModelShape | None:
    """Return the counts of a user's network that a run folder's plan has; None for other networks and older plans."""
    table = read_plan(path).get("shape")
    try:
        return None if table is None else shape_of_table(table)
    except (KeyError, TypeError):
        raise InputError(f"{path / PLAN_FILE}: its shape is no network's; the file was damaged, restore it") from None


def read_plan(path: Path) -> dict[str, Any]:
    """Return a run folder's plan; raises InputError where its file is damaged."""
    try:
        plan = json.loads(toml_io.read(path / PLAN_FILE))
        memory = plan["chosen"]["memory_bytes"]["total"]
    except (json.JSONDecodeError, KeyError, TypeError):
        memory = None
    if not isinstance(memory, int):
        raise InputError(f"{path / PLAN_FILE}: not a plan; the file was damaged, restore it")
    return dict(plan)


def _difference(given: Run, saved: Run) -> str:
    """Return the first key that differs, with both values."""
    saved_tables = saved.model_dump()
    for table, keys in given.model_dump().items():
        for key, value in keys.items():
            if value != saved_tables[table].get(key):
                return f"{table}.{key} ({value!r}, there {saved_tables[table].get(key)!r})"
    return "method.name"  # the given method's keys are equal, the saved one has more


def plan_of(run: Run, profile: Profile) -> dict[str, Any]:
    """Return the plan of this very run, and of dense training with the same batch, as plan.json has it."""
    tokens = run.train.steps * run.tokens_per_step
    # Dense training stands beside the run in reports. It gets recovery points of its own, as it saves more bytes.
    dense = evaluate(
        run.model_copy(update={"method": default_options(BASELINE)}), profile, tokens, spaces_recovery=True
    )
    result = evaluate(run, profile, tokens)
    chosen = result.candidate if isinstance(result, Rejected) else result
    notes = [f"does not fit profile {profile.name}: {result.reason}"] if isinstance(result, Rejected) else []
    rejected = (result,) if isinstance(result, Rejected) else ()
    candidates = () if isinstance(result, Rejected) else (chosen,)
    return Plan(profile, run, tokens, candidates, rejected, chosen, dense, tuple(notes)).to_dict()


def _check_disk(path: Path, run: Run) -> None:
    """Raise InputError where a run folder's disk is not writable or too small for its checkpoints, or TMPDIR's is."""
    # The folder itself does not exist yet; its nearest existing parent names the disk.
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out {path}: {parent} is not a writable folder; choose another")
    needed = CHECKPOINTS_AT_ONCE * checkpoint_bytes(run, run.shape(), run.cluster.devices, in_a_round=True)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"--out {path}: checkpoints need about {bytes_text(needed)} and {parent} has {bytes_text(free)} free; "
            "make room, or choose another folder"
        )
    # A launch has more processes on this machine; each asks for its own room when it starts.
    needed, folder = mapped_file_bytes(run, run.shape()), temporary_folder()
    if needed and folder.is_dir() and needed > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"{TEMPORARY_VARIABLE}: temporary files need {bytes_text(needed)} and {folder} has {bytes_text(free)} "
            f"free; make room, or export {TEMPORARY_VARIABLE}=FOLDER"
        )


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does, so that a run which is told to end cleans up; in the main thread alone."""
    if not _handles_signals():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_on_signal(answer: Callable[[], None], leave: Callable[[], None], stops: list[bool]) -> Iterator[list[bool]]:
    """Turn the first Ctrl-C or SIGTERM into an entry of `stops`, which is yielded; the second one interrupts at once.

    `answer` is called at the first signal, in another thread: Python runs handlers between its own instructions, and a
    large step is minutes in one of them. `leave` is called there at the second one where such a step goes on, and is
    to end the process. Outside the main thread nothing is handled: Python passes signals to that thread alone.
    """
    if not _handles_signals():
        yield stops
        return
    signals = 0
    interrupted = threading.Event()

    def handle(signum: int, frame: object) -> None:
        nonlocal signals
        signals += 1
        stops.append(True)
        if signals == 2:  # a third one must not interrupt the clean-up
            interrupted.set()
            raise KeyboardInterrupt

    # Handlers are put back, so that a plan or report in the same process is interrupted at once again.
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    # The system's own handler writes each signal's number here at once (docs.python.org, signal.set_wakeup_fd).
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(
        target=_answer_signals, args=(heard, answer, leave, interrupted), name="signals", daemon=True
    )
    listener.start()
    try:
        yield stops
    finally:
        signal.set_wakeup_fd(before)
        told.close()
        listener.join()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _handles_signals() -> bool:
    return threading.current_thread() is threading.main_thread()


def _answer_signals(
    heard: socket.socket, answer: Callable[[], None], leave: Callable[[], None], interrupted: threading.Event
) -> None:
    """Answer the first signal, and leave at the second where it interrupts nothing, until the other end is closed."""
    signals = 0
    with heard:
        while number := heard.recv(1):
            signals += number[0] in (signal.SIGINT, signal.SIGTERM)
            if signals == 1:
                answer()
            elif signals == 2 and not interrupted.wait(STUCK_S):
                leave()


def prepare_events(folder: RunFolder, step: int) -> None:
    """Cut the event file back to `step`: later events are of a session whose steps are done again."""
    if folder.events.exists():
        truncate_events(folder.events, step)
