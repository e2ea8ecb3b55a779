"""Loggers of a run's events beside events.jsonl: those of `train.loggers`, a progress bar, and a user's function.

`lte train` opens them with event_loggers, for simulated runs and on node 0 of launched ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ltecli.console import Output
from ltecli.runs.external_loggers import EXTERNAL, scalars
from simulate.common.events import PROGRESS, Emit, Event
from simulate.common.run_files import TENSORBOARD
from simulate.common.units import bytes_text, seconds_text
from simulate.config.run import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Callback:
    """A function of the user's that gets each event; one that raises ends the run with a checkpoint."""

    def __init__(self, function: Emit | None = None) -> None:
        self._function = function
        self.failure: Exception | None = None
        self.stops: list[bool] = []
        """Has an entry once the run was asked to stop, by a signal or by a failure of the function."""

    def __call__(self, event: Event) -> None:
        # Progress between steps is for people, and stands in no file.
        if self._function is None or self.failure is not None or event["kind"] == PROGRESS:
            return
        try:
            self._function(dict(event))  # a copy: what it does to the event must not reach other loggers
        except Exception as error:
            self.failure = error
            self.stops.append(True)


@contextmanager
def event_loggers(path: Path, run: Run, output: Output, step: int, callback: Callback) -> Iterator[Emit]:
    """Open the loggers for a run folder at `step`; yields a function that passes them an event. Raises InputError."""
    with ExitStack() as stack:
        loggers: list[Emit] = []
        for name in dict.fromkeys(run.train.loggers):
            if name == "tensorboard":
                loggers.append(stack.enter_context(TensorBoard(path / TENSORBOARD, step, output.warning)))
            else:
                loggers.append(stack.enter_context(EXTERNAL[name](path, run, output.warning)))
        loggers.append(stack.enter_context(ProgressBar(run, output, step)))
        loggers.append(callback)  # last: what it does must not keep the others from the event

        def emit(event: Event) -> None:
            for logger in loggers:
                logger(event)

        yield emit


class TensorBoard:
    """Writer of scalars for TensorBoard; a resumed run hides what came after its checkpoint.

    The events have the same figures. So a disk that refuses these files ends no run: it is reported once, and no more
    scalars are written.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path, self._warn, self._failed = path, warn, False
        # TensorBoard writes in a thread of its own, whose errors reach nobody but this hook.
        self._before, threading.excepthook = threading.excepthook, self._on_thread_error
        self._writer: SummaryWriter | None = None
        with self._stopping_on_disk_errors():
            # Steps after the checkpoint are trained and written again: TensorBoard is to hide their first points.
            self._writer = SummaryWriter(str(path), purge_step=step + 1 if step else None)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            with self._stopping_on_disk_errors():
                if self._writer is not None:
                    self._writer.close()
        finally:
            threading.excepthook = self._before

    def __call__(self, event: Event) -> None:
        if self._writer is not None and not self._failed:
            with self._stopping_on_disk_errors():
                self._add(event, self._writer)

    @contextmanager
    def _stopping_on_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._failed:
                return
            self._failed = True
            self._warn(f"{self._path} cannot be written ({error.strerror}); its curves end here, the events go on")

    def _on_thread_error(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback for a disk error in TensorBoard's own thread: the next call to the writer raises it."""
        if not isinstance(failure.exc_value, OSError) or not type(failure.thread).__module__.startswith("tensorboard"):
            self._before(failure)

    def _add(self, event: Event, writer: SummaryWriter) -> None:
        for name, value in scalars(event).items():
            writer.add_scalar(name, value, event["step"])


class ProgressBar:
    """Progress bar on stderr; outside a terminal, a line at each evaluation."""

    def __init__(self, run: Run, output: Output, step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._run, self._output = run, output
        self._live = output.hints.is_terminal and not output.quiet
        self._bar = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=output.hints, disable=not self._live,
        )  # fmt: skip
        self._step = step
        self._task = self._bar.add_task("steps", total=run.train.steps, completed=step, figures="")
        self._validation = ""
        self._last: tuple[float, int] | None = None
        self._figures, self._loss = "", "-"

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        if event["kind"] in ("start", "resume", "restart"):
            self._step = event["step"]
        elif event["kind"] in ("step", PROGRESS):
            # Progress comes from heartbeats, which may be ahead of the events, or behind.
            self._step = max(self._step, event["step"])
        if event["kind"] == PROGRESS:
            self._bar.update(self._task, completed=self._step)
        elif event["kind"] == "step":
            sent = event["sent_bytes"] / self._run.cluster.devices
            if event["train_loss"] is not None:
                self._loss = f"{event['train_loss']:.3f}"
            self._figures = (
                f"loss {self._loss}  {self._tokens_per_s(event):,.0f} {self._run.model.unit}/s  "
                f"simulated {seconds_text(event['simulated_s'])}  sent/device {bytes_text(sent)}"
            )
            self._bar.update(self._task, completed=self._step, figures=self._figures + self._validation)
        elif event["kind"] == "evaluate":
            accuracy = f", {event['val_accuracy']:.2%} right" if "val_accuracy" in event else ""
            self._validation = f"  val {event['val_loss']:.3f}{accuracy}"
            if not self._live:
                self._output.hint(f"  step {event['step']}: val {event['val_loss']:.4f}{accuracy}  {self._figures}")

    def _tokens_per_s(self, event: Event) -> float:
        """Return the rate since the last event; since the start for the first one."""
        before, self._last = self._last, (event["wall_s"], event["tokens"])
        # A restart sets the clock back.
        if before is None or event["wall_s"] <= before[0]:
            return event["tokens"] / max(event["wall_s"], 1e-9)
        return (event["tokens"] - before[1]) / (event["wall_s"] - before[0])
