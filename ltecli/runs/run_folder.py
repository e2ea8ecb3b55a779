"""From run.toml to a run folder and an in-process simulation of its devices."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulate.planning.candidate import Rejected
from simulate.common.units import bytes_text
from simulate.planning.planner import Plan, evaluate
from simulate.common import toml_io
from simulate.training.checkpoints import list_checkpoints
from simulate.config.run import Run, dump_run, load_run
from simulate.costs.memory import checkpoint_bytes
from simulate.data.load import (TOKENIZER_FILE, Dataset, kept_tokenizer, load_data)
from simulate.data.text import Text
from simulate.common.errors import InputError
from simulate.common.events import truncate_events
from simulate.config.hardware import LOCAL, Profile
from simulate.config.profiles import load_profile
from simulate.config.profiles import local_gpu_profile
from simulate.config.method_table import BASELINE, default_options

RUN_FILE, PROFILE_FILE, PLAN_FILE, EVENTS_FILE = "run.toml", "profile.toml", "plan.json", "events.jsonl"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
CHECKPOINTS_AT_ONCE = 3
"""Two are kept while a third is written."""


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME and everything that was decided before its first step."""

    path: Path
    run: Run
    profile: Profile
    data: Dataset
    plan: dict[str, Any]
    resume_from: Path | None
    """Checkpoint to continue from; None for a new run."""

    @property
    def is_finished(self) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        last = f"-{self.run.train.steps:08d}"
        return self.resume_from is not None and self.resume_from.name.endswith(last)

    @property
    def events(self) -> Path:
        """The run's event file."""
        return self.path / EVENTS_FILE


def check_trainable(run: Run) -> None:
    """Raise InputError where something is not installed that the run needs."""
    frozen = run.method.frozen_format
    if frozen.startswith("nf4") and not is_nf4_installed():
        raise InputError(
            f"method.quantize = {frozen!r} needs bitsandbytes: pip install 'lte[quantize]', or try "
            "--set method.quantize=int8"
        )


def is_nf4_installed() -> bool:
    """Whether the library is there that unpacks NF4; without the seconds of its import."""
    return importlib.util.find_spec("bitsandbytes") is not None


def plain_start_bytes(folder: RunFolder) -> int:
    """Return the bytes of start weights that a measurement on a CPU includes, and a device does not hold.

    Those of quantised weights lie in mapped files, which no allocator sees.
    """
    chosen = folder.plan["chosen"]
    return 0 if chosen["quantize"] != "none" else int(chosen["host_memory_by_part"]["start_weights"])


def new_folder(path: Path, run: Run, device_name: str = "cpu") -> RunFolder:
    """Make a run folder; everything is checked before anything is written. Raises InputError."""
    check_trainable(run)
    check_new(path)
    data = load_data(run)
    _check_disk(path, run)
    profile = load_profile(run.cluster.profile)
    if profile.name == LOCAL and device_name != "cpu":
        profile = local_gpu_profile() or profile
    plan = plan_of(run, profile)
    try:
        path.mkdir(parents=True)
    except FileExistsError:  # by another run, since it was checked
        check_new(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        # run.toml comes last: a folder without one is no run.
        (path / PROFILE_FILE).write_text(toml_io.dump(profile.model_dump(exclude_none=True)), encoding="utf-8")
        (path / PLAN_FILE).write_text(json.dumps(plan, indent=1), encoding="utf-8")
        (path / CHECKPOINTS).mkdir()
        if isinstance(data, Text) and data.vocabulary is not None:
            (path / TOKENIZER_FILE).write_text(data.vocabulary.json, encoding="utf-8")
        toml_io.write_atomically(path / RUN_FILE, dump_run(run).encode())
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise _unwritable(path, error) from None
    return RunFolder(path, run, profile, data, plan, None)


def check_new(path: Path) -> None:
    """Raise InputError where a new run folder cannot be made because something is there."""
    if (path / RUN_FILE).is_file():
        raise InputError(f"--out {path} exists; add --resume to continue it, or choose another --out")
    if os.path.lexists(path):
        raise InputError(f"--out {path} exists and is no run folder; choose another --out")


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"--out {path} cannot be written ({error.strerror}); choose another folder")


def resumed_folder(path: Path, given: Run | None) -> RunFolder:
    """Open a run folder to continue it; `given` is the run.toml named beside --resume, if any. Raises InputError."""
    if not (path / RUN_FILE).is_file():
        raise InputError(f"--resume: {path} is no run folder (it has no {RUN_FILE}); start it without --resume")
    run = load_run(path / RUN_FILE)
    if given is not None and given != run:
        raise InputError(
            f"--resume: the run given differs from {path / RUN_FILE} in {_difference(given, run)}; "
            f"resume with lte train {path} --resume, or start anew with another --out"
        )
    if not os.access(path, os.W_OK):
        raise InputError(f"--resume: {path} is read-only; make it writable")
    checkpoints = list_checkpoints(path / CHECKPOINTS, run.cluster.devices)
    data = load_data(run, kept_tokenizer(path))
    profile = load_profile(str(path / PROFILE_FILE))
    return RunFolder(path, run, profile, data, read_plan(path), checkpoints[-1] if checkpoints else None)


def read_plan(path: Path) -> dict[str, Any]:
    """Return the plan that a run folder keeps; raises InputError where it is damaged."""
    try:
        plan = json.loads(toml_io.read(path / PLAN_FILE))
        memory = plan["chosen"]["memory_bytes"]["total"]
    except (json.JSONDecodeError, KeyError, TypeError):
        memory = None
    if not isinstance(memory, int):
        raise InputError(f"{path / PLAN_FILE}: not a plan; the file was damaged, restore it")
    return dict(plan)


def _difference(given: Run, saved: Run) -> str:
    ours, theirs = given.model_dump(), saved.model_dump()
    for table in ours:
        for key in ours[table]:
            if ours[table][key] != theirs[table].get(key):
                return f"{table}.{key} ({ours[table][key]!r}, there {theirs[table].get(key)!r})"
    return "method.name"


def plan_of(run: Run, profile: Profile) -> dict[str, Any]:
    """Return the plan of exactly this run, beside dense training with the same batch, as plan.json."""
    tokens = run.train.steps * run.tokens_per_step
    dense = evaluate(run.model_copy(update={"method": default_options(BASELINE)}), profile, tokens, spaces_recovery=True)
    result = evaluate(run, profile, tokens)
    chosen = result.candidate if isinstance(result, Rejected) else result
    notes = [f"does not fit profile {profile.name}: {result.reason}"] if isinstance(result, Rejected) else []
    rejected = (result,) if isinstance(result, Rejected) else ()
    candidates = () if isinstance(result, Rejected) else (chosen,)
    return Plan(profile, run, tokens, candidates, rejected, chosen, dense, tuple(notes)).to_dict()


def _check_disk(path: Path, run: Run) -> None:
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out {path}: {parent} is not a writable folder; choose another")
    needed = CHECKPOINTS_AT_ONCE * checkpoint_bytes(run, run.model.shape(), run.cluster.devices, in_a_round=True)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"--out {path}: checkpoints need about {bytes_text(needed)} and {parent} has {bytes_text(free)} free; "
            "make room, or choose another folder"
        )


@contextmanager
def stop_on_signal() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop; a second Ctrl-C interrupts at once."""
    asked: list[bool] = []

    def handle(signum: int, frame: object) -> None:
        asked.append(True)
        if len(asked) == 2:  # what cleans up after it is not interrupted again
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Claim a run folder for this process; raises InputError where another has it."""
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{path} is being trained by another process; wait for it, or choose another --out") from None
    finally:
        os.close(handle)


def prepare_events(folder: RunFolder, step: int) -> None:
    """Make the event file fit for appending after `step`: what a later, lost session told is dropped."""
    if folder.events.exists():
        truncate_events(folder.events, step)
