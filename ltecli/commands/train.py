"""lte train: say what was derived, simulate, show progress, save."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltecli.commands.launch import LaunchArgs, check_launch, launch_run, print_lines
from ltecli.commands.plan import nearest_miss_text
from ltecli.console import Output
from ltecli.errors import INTERRUPTED
from ltecli.plan_request import PlanArgs, plan_request
from ltecli.runs.event_loggers import ProgressBar, TensorBoard
from ltecli.runs.run_folder import (
    CHECKPOINTS,
    TENSORBOARD,
    RunFolder,
    check_new,
    lock_folder,
    new_folder,
    plain_start_bytes,
    prepare_events,
    resumed_folder,
    stop_on_signal,
)
from ltecli.runs.summary import report_derived, report_finished, report_result, start_facts
from simulate.common.errors import InputError, NothingFeasibleError, RunFailedError
from simulate.config.run import Run, build_run, load_run
from simulate.config.tables import BPE, BYTES, HUB
from simulate.launch.agent import LOGS
from simulate.training.checkpoints import list_checkpoints, saved_devices

if TYPE_CHECKING:
    import torch

    from simulate.common.events import Event

RUNS = Path("runs")
DEMO_NAME = "demo"
WHAT_DATA = ("name", "path", "format", "subset", "column", "rows")
"""The keys of [data] that say which it is; the others say what to do with it."""


@dataclass(frozen=True)
class TrainArgs:
    """What the command line changes in the run that it names."""

    data: str | None = None
    assignments: Sequence[str] = ()
    """table.key=value."""
    diagnostics: bool = False
    """As often as an evaluation, where the run itself has none."""

    def __bool__(self) -> bool:
        return self.data is not None or bool(self.assignments) or self.diagnostics


def train_command(
    given: Path | None,
    out: Path | None,
    resume: bool,
    device_name: str,
    changes: TrainArgs,
    launch: LaunchArgs | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Train a run to its end, in this process or launched; returns the exit code."""
    output = Output(as_json, quiet or as_json)
    _check_device(device_name)
    if launch is not None and launch.nodes > 1 and launch.node is None:
        return print_lines(given, launch, output)
    if given is not None and given.is_dir() and not resume:
        raise InputError(f"{given} is a run folder; add --resume to continue it, or name a run.toml")
    if resume:
        folder = _resumed(given, out, changes)
        device = _device(device_name)
        _check_launch(folder.run, device, launch)
    else:
        path, run = out or RUNS / _name(given), _run(given, changes)
        check_new(path)  # before torch is imported, which takes its time
        device = _device(device_name)
        _check_launch(run, device, launch)
        folder = new_folder(path, run, device_name)
    try:
        with lock_folder(folder.path), _dropped_unless_started(folder, resume):
            if launch is None and not _several_gpus(folder.run, device):
                return _simulate(folder, device, output)
            return launch_run(folder, device, launch or LaunchArgs(), output)
    except OSError as error:
        raise RunFailedError(f"{error.strerror}: {error.filename or folder.path}; {_saved(folder, launch)}") from error
    except RunFailedError as error:
        raise RunFailedError(f"{error}; {_saved(folder, launch)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_saved(folder, launch)}") from None


def _check_launch(run: Run, device: torch.device, options: LaunchArgs | None) -> None:
    if options is not None or _several_gpus(run, device):
        check_launch(run, device, options or LaunchArgs())


@contextmanager
def _dropped_unless_started(folder: RunFolder, resume: bool) -> Iterator[None]:
    """Take a new folder away again where its run was refused before it began, so that the same line can be repeated."""
    try:
        yield
    except (InputError, RunFailedError):
        begun = folder.events.exists() or any((folder.path / CHECKPOINTS).iterdir()) or (folder.path / LOGS).exists()
        if not resume and not begun:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _name(given: Path | None) -> str:
    return DEMO_NAME if given is None else given.parent.resolve().name if given.stem == "run" else given.stem


def _run(given: Path | None, changes: TrainArgs) -> Run:
    run = _run_without_diagnostics(given, changes.data, changes.assignments)
    if not changes.diagnostics or run.train.diagnostics_every is not None:
        return run
    train = {**run.train.model_dump(), "diagnostics_every": run.train.evaluate_every}
    return build_run({**run.model_dump(exclude_none=True), "train": train}, "command line")


def _run_without_diagnostics(given: Path | None, data: str | None, assignments: Sequence[str]) -> Run:
    if given is not None:
        return _with_data(load_run(given, list(assignments)), data)
    data = data and str(Path(data).absolute())
    plan = plan_request(PlanArgs(data=data, assignments=tuple(assignments)))
    if plan.chosen is None:
        raise NothingFeasibleError(nearest_miss_text(plan))
    return plan.chosen.run


def _with_data(run: Run, path: str | None) -> Run:
    """Return the run on the data at another path, if one is given; absolute, so that any folder can resume it."""
    table = run.data.model_dump(exclude_none=True)
    if path is not None:
        table = {key: value for key, value in table.items() if key not in WHAT_DATA} | {"path": path}
    if "path" in table:
        table["path"] = str(Path(table["path"]).absolute())
    if table["tokenizer"] != BYTES and not table["tokenizer"].startswith(BPE):
        table["tokenizer"] = str(Path(table["tokenizer"]).absolute())
    if (folder := Path(table.get("name", "").removeprefix(HUB))) != Path() and folder.is_dir():
        table["name"] = f"{HUB}{folder.absolute()}"
    return build_run({**run.model_dump(exclude_none=True), "data": table}, "command line")


def _resumed(given: Path | None, out: Path | None, changes: TrainArgs) -> RunFolder:
    if given is not None and given.is_dir():
        if out is not None or changes:
            raise InputError(
                f"--resume continues {given} as it is; leave --out, --data and --set away, and --diagnostics"
            )
        return resumed_folder(given, None)
    run = None if given is None else _run(given, changes)
    return resumed_folder(out or RUNS / _name(given), run)


def _saved(folder: RunFolder, launch: LaunchArgs | None) -> str:
    line = f"lte train {folder.path} --resume{launch.words() if launch else ''}"
    if not folder.path.exists():
        return "nothing was started; give the same line again"
    path = folder.path / CHECKPOINTS
    saved = list_checkpoints(path, folder.run.cluster.devices)
    if not saved:  # one node of several has a part
        saved = [step for step in sorted(path.glob("step-*")) if saved_devices(step)]
    if not saved:
        return f"no checkpoint was saved yet; start over with {line}"
    return f"saved: {saved[-1]}; continue with {line}"


def _check_device(name: str) -> None:
    if name != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA GPU; use --device cpu, or install a CUDA build")


def _device(name: str) -> torch.device:
    import torch

    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _several_gpus(run: Run, device: torch.device) -> bool:
    """Whether virtual devices are spread over this machine's GPUs, by launched processes."""
    if device.type != "cuda":
        return False
    import torch

    return torch.cuda.device_count() > 1 and run.cluster.devices > 1


def _simulate(folder: RunFolder, device: torch.device, output: Output) -> int:
    report_derived(folder, output)
    if folder.is_finished:
        report_finished(folder, output)
        return 0
    from simulate.comm.virtual import VirtualCommunicator
    from simulate.common.events import EventFile
    from simulate.data.batches import build_batches
    from simulate.measure.one_device import measure_memory_bytes
    from simulate.methods.registry import build_method
    from simulate.training.loop import Session, restore, train
    from simulate.training.simulated_clock import SimulatedClock

    run = folder.run
    clock = SimulatedClock(run, folder.profile.devices(run.cluster.devices), folder.profile.link)
    communicator = VirtualCommunicator(run.cluster.devices, clock.charge_transfer, clock.wait)
    batches = build_batches(run, folder.data, device)
    measured_bytes = None if folder.resume_from else measure_memory_bytes(run, device)
    if measured_bytes and device.type == "cpu":
        measured_bytes -= plain_start_bytes(folder)
    with ExitStack() as stack, stop_on_signal() as asked:
        sinks: list[Callable[[Event], None]] = []

        def report_all(event: Event) -> None:
            for sink in sinks:
                sink(event)

        session = Session(
            run=run,
            method=build_method(run, communicator, device),
            batches=batches,
            communicator=communicator,
            clock=clock,
            emit=report_all,
            checkpoints=folder.path / CHECKPOINTS,
            device=device,
            stop=lambda: bool(asked),
        )
        if folder.resume_from:
            restore(session, folder.resume_from)
        prepare_events(folder, session.step if folder.resume_from else -1)
        events = EventFile(folder.events)
        stack.callback(events.close)
        sinks += [events, stack.enter_context(TensorBoard(folder.path / TENSORBOARD, session.step, output.warning))]
        sinks.append(stack.enter_context(ProgressBar(run, output, session.step)))
        if folder.resume_from:
            session.emit({"kind": "resume", "step": session.step})
        else:
            session.emit({"kind": "start", "step": 0, **start_facts(folder, device)})
            session.emit({"kind": "memory", "step": 0, "measured_bytes": measured_bytes})
        finished = train(session)
        session.emit({"kind": "end" if finished else "interrupt", "step": session.step, "wall_s": session.elapsed_s()})
    if not finished:
        output.hint(f"interrupted at step {session.step}, saved; continue with lte train {folder.path} --resume")
        return INTERRUPTED
    sent_bytes = session.communicator.counter.sent_bytes
    report_result(
        folder, output, session.step, session.val_loss, sent_bytes, session.clock.now_s, session.elapsed_s(),
        session.scores.get("val_accuracy"),
    )  # fmt: skip
    return 0
