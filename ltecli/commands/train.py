"""lte train: make or open a run folder, then train in it, simulated on this machine or launched on real devices.

From here to backward(): `_simulate` calls simulate.training.loop.train, which calls the method's step. Processes that
share a simulation (simulate.launch.simulated), and those of a launched run (commands/launch.py), have the same loop.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltecli.commands.doctor import check_machine
from ltecli.commands.launch import LaunchArgs, check_launch, launch_run, print_lines
from ltecli.commands.plan import nearest_miss_text
from ltecli.commands.simulation_fits import check_simulation_fits, tiny_run
from ltecli.console import Output
from ltecli.errors import DONE, INTERRUPTED
from ltecli.plan_request import PlanArgs, plan_request
from ltecli.runs.calibrating import calibrate_here
from ltecli.runs.event_loggers import Callback, event_loggers
from ltecli.runs.external_loggers import check_loggers
from ltecli.runs.lock import lock_folder
from ltecli.runs.memory_event import MemoryEvent, memory_event
from ltecli.runs.run_folder import (
    RUNS,
    RunFolder,
    check_new,
    extended_folder,
    interrupted_by_sigterm,
    keep_extension,
    new_folder,
    prepare_events,
    resumed_folder,
    run_name,
    stop_on_signal,
)
from ltecli.runs.simulation_split import check_processes, pick_split, split_facts, threads_of_torch
from ltecli.runs.status import StatusFile
from ltecli.runs.summary import (
    RunResult,
    report_derived,
    report_finished,
    report_result,
    start_facts,
)
from simulate.common import toml_io
from simulate.common.errors import InputError, NothingFeasibleError, RunFailedError
from simulate.common.processor import machine_facts
from simulate.common.progress import reported_by
from simulate.common.run_files import CHECKPOINTS, LOGS
from simulate.config.run import Run, build_run, load_given_run, with_absolute_paths
from simulate.config.tables import data_key
from simulate.training.checkpoints import list_checkpoints, saved_devices

if TYPE_CHECKING:
    import torch

    from simulate.common.events import Emit, Event
    from simulate.launch.simulated import Companions
    from simulate.planning.simulation_split import Split
    from simulate.training.loop import Session

ENDS = ("end", "interrupt")
"""Kinds of the event after which a session has no other."""
DEMO_NAME = "demo"
DEMO_TOKENS = 400_000
"""Tokens of a run without a run.toml: about a minute of training on two cores."""


@dataclass(frozen=True)
class TrainArgs:
    """Changes of the run that the command line names."""

    data: str | None = None
    assignments: Sequence[str] = ()
    """Keys, as table.key=value."""
    diagnostics: bool = False
    """Whether to diagnose at every evaluation, where the run has no interval of its own."""
    tiny: bool = False
    """Whether to try the run with a small network and few steps."""

    def __bool__(self) -> bool:
        return self.data is not None or bool(self.assignments) or self.diagnostics or self.tiny


def train_command(
    given: Path | None,
    out: Path | None,
    resume: bool,
    device_name: str,
    args: TrainArgs,
    launch: LaunchArgs | None,
    processes: int | None,
    as_json: bool,
    quiet: bool,
    ignores_memory: bool = False,
) -> int:
    """Train a run to its end, simulated or launched; returns the exit code. `processes` are those of a simulation."""
    output = Output(as_json, quiet or as_json)
    if launch is not None and launch.nodes > 1 and launch.node is None:
        return print_lines(given, launch, output)
    return train_run(given, out, resume, device_name, args, launch, output, ignores_memory, processes=processes)[1]


def train_run(
    given: Path | Run | None, out: Path | None, resume: bool, device_name: str, args: TrainArgs,
    launch: LaunchArgs | None, output: Output, ignores_memory: bool = False, on_event: Emit | None = None,
    processes: int | None = None,
) -> tuple[Path, int]:  # fmt: skip
    """Train what is given to its end: a run.toml, a run, a run folder to resume, or without one a plan made now.

    Returns the run folder and the exit code. `on_event` gets each event; what it raises ends the run with a checkpoint,
    and is raised here. `lte train` and ltecli.api call it.
    """
    callback = Callback(on_event)
    # From the first moment: a folder may be made and nothing trained when the signal comes.
    with interrupted_by_sigterm(), reported_by(output.progress):
        result = _train(given, out, resume, device_name, args, launch, output, ignores_memory, callback, processes)
    if callback.failure is not None:
        raise callback.failure
    return result


def _train(
    given: Path | Run | None, out: Path | None, resume: bool, device_name: str, args: TrainArgs,
    launch: LaunchArgs | None, output: Output, ignores_memory: bool, callback: Callback, processes: int | None,
) -> tuple[Path, int]:  # fmt: skip
    if isinstance(given, Path) and given.is_dir() and not resume:
        raise InputError(f"{given} is a run folder; add --resume to continue it, or name a run.toml")
    folder = _resumed(given, out, args) if resume else None
    path, run = (folder.path, folder.run) if folder else (out or RUNS / _name(given, args), _run(given, args))
    replaced: list[str] = []
    if args.tiny:
        run, replaced = tiny_run(run, [assignment.partition("=")[0].strip() for assignment in args.assignments])
    if launch is None or not launch.node:  # node 0 has the events
        check_loggers(run)
    if folder is None:
        check_new(path)  # before torch is imported, which takes seconds
    warnings = check_machine(run, device_name, launch)
    from simulate.layers import accelerator

    device = accelerator.choose(device_name)
    launched = launch or (LaunchArgs(processes) if _has_several_gpus(run, device) else None)
    if launched is not None:
        check_launch(run, device, launched)
    else:
        check_processes(run, device, processes or 1)
        if not ignores_memory:
            check_simulation_fits(run, device, args.tiny, processes or 1)
    if replaced:
        output.hint(f"--tiny: {', '.join(replaced)}; all else is the run's")
    folder = folder or new_folder(path, run, device_name)
    try:
        # The lock is released before the folder is removed: Windows removes no open file.
        status = StatusFile(
            path, folder.run, folder.newest_step, output.warning, launch.words() if launch else "",
            lambda: _next_move(folder, launch),
        )  # fmt: skip
        with _removed_unless_begun(folder, resume), lock_folder(path), status:
            if resume and args.assignments and given == path:
                keep_extension(folder)
            if launch is None or launch.nodes == 1:  # the nodes of a launch tell each other in the preflight
                for warning in warnings:
                    output.warning(warning)
            if launched is not None:
                return path, launch_run(folder, device, launched, output, warnings, status, callback)
            code = _simulate(folder, device, processes, output, status, callback)
        if device.type == "cpu" and code == DONE:
            calibrate_here(output)
        return path, code
    except OSError as error:
        raise RunFailedError(f"{error.strerror}: {error.filename or path}; {_next_move(folder, launch)}") from error
    except RunFailedError as error:
        raise RunFailedError(f"{error}; {_next_move(folder, launch)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_next_move(folder, launch)}") from None


def _simulate(
    folder: RunFolder, device: torch.device, processes: int | None, output: Output, status: StatusFile,
    callback: Callback,
) -> int:  # fmt: skip
    """Train all devices, in this process or with others that it starts; returns the exit code."""
    report_derived(folder, output)
    if folder.is_finished:
        report_finished(folder, output)
        return 0
    from simulate.launch.simulated import Companions, begin, simulation_session

    split = pick_split(folder, device, processes, output)
    companions = Companions(folder.path, folder.run, split.processes, split.threads)
    with threads_of_torch(split.threads), companions.started(folder.resume_from):
        status.begin("measuring")
        # Before the session exists, whose tensors would count as the device's. A resumed run keeps its figure.
        with (
            memory_event(folder, device, split.processes, output.warning) as memory,
            # From here on Ctrl-C saves first; before, there is nothing to save.
            stop_on_signal(lambda: status.answer_stop(output.hint), status.leave, callback.stops) as stops,
        ):
            status.begin("building the network")
            with companions.joined():
                session = simulation_session(
                    folder.run, folder.profile, folder.data, folder.path / CHECKPOINTS, device, split.processes,
                    stop=lambda: bool(stops),
                )  # fmt: skip
                status.follow(session.activity, session.stopping_text)
                begin(session, folder.resume_from)
                kind = _trained(folder, device, session, split, memory, companions, output, status, callback)
    if kind == "interrupt":
        output.hint(f"interrupted at step {session.step}, saved; continue with lte train {folder.path} --resume")
        return INTERRUPTED
    sent_bytes = session.communicator.counter.sent_bytes / folder.run.cluster.devices
    accuracy, now_s = session.scores.get("val_accuracy"), session.clock.now_s
    result = RunResult(session.step, session.val_loss, accuracy, sent_bytes, now_s, session.elapsed_s())
    report_result(folder, output, result)
    return 0


def _trained(
    folder: RunFolder, device: torch.device, session: Session, split: Split, memory: MemoryEvent,
    companions: Companions, output: Output, status: StatusFile, callback: Callback,
) -> str:  # fmt: skip
    """Train a session that has begun, whose events go into the folder and to all loggers; returns how it ended."""
    from simulate.common.events import EventFile
    from simulate.training.loop import train

    # A run that begins anew drops all events, as of an attempt that saved nothing.
    prepare_events(folder, session.step if folder.resume_from else -1)
    with (
        closing(session.communicator),
        # Loggers first: one that cannot be opened refuses a new run, whose folder then goes, as it has no events.
        event_loggers(folder.path, folder.run, output, session.step, callback) as loggers,
        closing(EventFile(folder.events)) as file,
    ):

        def emit(event: Event) -> None:
            file(event)
            status(event)
            loggers(event)
            if event["kind"] not in ENDS and (measured := memory.take(event["step"])) is not None:
                emit(measured)

        session.emit, facts = emit, split_facts(split)
        if folder.resume_from:
            session.emit({"kind": "resume", "step": session.step, "machines": [machine_facts()], **facts})
        else:
            session.emit({"kind": "start", "step": 0, **start_facts(folder, device), **facts})
        kind = "end" if train(session) else "interrupt"
        companions.wait_for_the_end()  # by then all have saved
        ended: Event = {"kind": kind, "step": session.step, "wall_s": session.elapsed_s()}
        session.activity.begin("measuring")
        if kind == "end" and (measured := memory.take(session.step, waits=True)) is not None:
            emit(measured)
        session.emit(ended)
    return kind


def _has_several_gpus(run: Run, device: torch.device) -> bool:
    """Whether this machine has several GPUs for the run's devices: they are then launched, to use all GPUs."""
    from simulate.layers import accelerator

    if run.live_keys:  # other processes do not have them
        return False
    return run.cluster.devices > 1 and device.type != "cpu" and accelerator.count(device.type) > 1


@contextmanager
def _removed_unless_begun(folder: RunFolder, resume: bool) -> Iterator[None]:
    """Remove a new folder whose run is refused or stopped before it begins: the same command can be given again."""
    try:
        yield
    except (InputError, RunFailedError, KeyboardInterrupt) as error:
        begun = folder.events.exists() or any((folder.path / CHECKPOINTS).iterdir())
        if not isinstance(error, KeyboardInterrupt):  # logs show why processes failed, not why somebody stopped them
            begun = begun or (folder.path / LOGS).exists()
        if not resume and not begun:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _name(given: Path | Run | None, args: TrainArgs) -> str:
    """Return the run folder's default name: the run.toml's own name, or its folder's where it is called run.toml."""
    assert not isinstance(given, Run), "who gives a run names its folder"
    name = DEMO_NAME if given is None else run_name(given)
    return f"{name}-tiny" if args.tiny else name


def _run(given: Path | Run | None, args: TrainArgs) -> Run:
    """Return a given run or that of a run.toml, or else of a plan made now, with the command line's args."""
    if isinstance(given, Run):
        table = with_absolute_paths(given).model_dump(exclude_none=True)
        run = build_run(table, assigned=[toml_io.set_key(table, assignment) for assignment in args.assignments])
    elif given is not None:
        run = with_absolute_paths(load_given_run(given, args.assignments, args.data))
    else:
        # The plan's run.toml is resumed from any folder, so its path must not depend on this one.
        data = args.data and (args.data if data_key(args.data) == "name" else str(Path(args.data).absolute()))
        steps = any(assignment.replace(" ", "").startswith("train.steps=") for assignment in args.assignments)
        tokens = None if steps else DEMO_TOKENS
        plan = plan_request(PlanArgs(data=data, tokens=tokens, assignments=tuple(args.assignments)))
        if plan.chosen is None:
            raise NothingFeasibleError(nearest_miss_text(plan))
        run = plan.chosen.run
    if not args.diagnostics or run.train.diagnostics_every is not None:
        return run
    train = {**run.train.model_dump(), "diagnostics_every": run.train.evaluate_every}
    return build_run({**run.model_dump(exclude_none=True), "train": train}, "command line")


def _only_steps(args: TrainArgs) -> bool:
    """Whether train.steps is the one key to set."""
    return [assignment.partition("=")[0].strip() for assignment in args.assignments] == ["train.steps"]


def _resumed(given: Path | Run | None, out: Path | None, args: TrainArgs) -> RunFolder:
    """Open the folder to resume: the one given, or that of the given run.toml, which must be unchanged."""
    if isinstance(given, Path) and given.is_dir():
        if out is None and args == TrainArgs(assignments=args.assignments) and _only_steps(args):
            return extended_folder(given, args.assignments[0])
        if out is not None or args:
            raise InputError(
                f"--resume continues {given} as it is, or with more steps by --set train.steps=N alone; leave --out, "
                "--data and --set away, and --diagnostics and --tiny"
            )
        return resumed_folder(given, None)
    run = None if given is None else _run(given, args)
    return resumed_folder(out or RUNS / _name(given, args), run)


def _next_move(folder: RunFolder, launch: LaunchArgs | None) -> str:
    """Return what a run that ended early has saved, and the command that continues it."""
    line = f"lte train {folder.path} --resume{launch.words() if launch else ''}"
    if not folder.path.exists():
        return "nothing was started; give the same line again"
    path = folder.path / CHECKPOINTS
    saved = list_checkpoints(path, folder.run.cluster.devices)
    if not saved:  # a node of several saves its own devices only
        saved = [step for step in sorted(path.glob("step-*")) if saved_devices(step)]
    if not saved:
        return f"no checkpoint was saved yet; start over with {line}"
    return f"saved: {saved[-1]}; continue with {line}"
