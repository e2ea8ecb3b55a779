"""The status file of a run folder: what the run does now, for people who watch it from another terminal.

The process that holds the folder's lock writes it, about once a second and each time as a whole: `lte train` makes a
StatusFile, which takes the run's events, and between events the phase of the training loop or the heartbeats of a
launched run. `lte watch` (commands/watch.py) reads it, and needs nothing else of the folder but its lock.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ltecli.errors import INTERRUPTED
from ltecli.runs.attendance import change_text
from simulate.common.errors import InputError, first_line
from simulate.common.events import Event
from simulate.common.run_files import STATUS_FILE
from simulate.config.run import Run

if TYPE_CHECKING:
    from simulate.launch.heartbeat import LaunchProgress
    from simulate.training.activity import Activity

STATUS_VERSION = 1
WRITE_S = 1.0
"""Seconds from one write to the next."""
BEFORE_TRAINING = "stopping before the first step"
FAILURES = 3
"""Failed writes in a row after which the user is told: on Windows a single one fails while somebody reads."""
KEPT = ("step", "train_loss", "val_loss", "val_accuracy", "val_step", "sent_bytes_per_device", "links")
"""Figures that a resumed run shows until it has newer ones."""


class StatusFile:
    """Writer of a folder's status file, with a thread of its own; the run goes on where the file cannot be written.

    `resume_words` are the options that `lte train RUN --resume` needs to continue the run, `next_move` says what was
    saved and what continues it.
    """

    def __init__(
        self,
        folder: Path,
        run: Run,
        step: int,
        warn: Callable[[str], None],
        resume_words: str,
        next_move: Callable[[], str],
    ) -> None:
        self._path, self._warn, self._failures = folder / STATUS_FILE, warn, 0
        self._next_move = next_move
        self._before = self._path.read_bytes() if self._path.is_file() else None
        self._has_begun = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._write_often, name="status", daemon=True)
        self._activity: Activity | None = None
        self._stopping: Callable[[], str] = lambda: ""
        self._paced: tuple[float, int] | None = None
        """Time and step from which this session's pace is measured."""
        before = read_status(folder) or {}
        self._was_finished = before.get("state") == "finished"
        kept = {key: before.get(key) for key in KEPT} if step else dict.fromkeys(KEPT)
        self.document: dict[str, Any] = {
            "version": STATUS_VERSION,
            "state": "running",
            "method": run.method.name,
            "devices": run.cluster.devices,
            "device": None,
            "processes": None,
            "phase": "starting",
            "phase_since_unix_s": time.time(),
            "stopping": None,
            "steps": run.train.steps,
            "steps_per_round": run.method.steps_apart if run.method.steps_apart > 1 else None,
            **kept,
            "step": step,
            "sent_bytes_per_s_per_device": None,
            "step_s": None,
            "remaining_s": None,
            "restarts": 0,
            "restart_reasons": [],
            "away": [],
            "newest_change": None,
            "workers": [],
            "error": None,
            "resume_words": resume_words,
            "started_unix_s": time.time(),
            "updated_unix_s": time.time(),
        }
        self._drop_later_scores(step)

    def __enter__(self) -> StatusFile:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A run that was finished before is left as it is, and so is one that is refused.
        stays = error is None and self._was_finished
        if not self._has_begun and (stays or isinstance(error, InputError)):
            self._restore()
        elif isinstance(error, KeyboardInterrupt):
            self._end("interrupted")
        elif error is not None:
            self._end("failed", first_line(error))
        else:  # without an event there was nothing left to do
            self._end("finished" if self.document["state"] == "running" else self.document["state"])

    def _end(self, state: str, error: str | None = None) -> None:
        self._done.set()
        self._thread.join()
        self.document |= {"state": state, "error": error}
        self._write()

    def _restore(self) -> None:
        """Leave the folder as it was."""
        self._done.set()
        self._thread.join()
        if self._before is None:
            self._path.unlink(missing_ok=True)
        else:
            self._path.write_bytes(self._before)

    def begin(self, phase: str) -> None:
        """Note the phase, until a training loop or heartbeats tell it."""
        if self.document["phase"] != phase:
            self.document |= {"phase": phase, "phase_since_unix_s": time.time()}

    def follow(self, activity: Activity, stopping: Callable[[], str]) -> None:
        """Read the phase from the training loop of this process from now on, and the answer to a wish to stop."""
        self._activity, self._stopping = activity, stopping

    def progress(self, progress: LaunchProgress) -> None:
        """Note what the heartbeats of a launched run tell."""
        self.begin(progress.activity)
        self._stopping = lambda: progress.stopping
        self.document["workers"] = [asdict(process) for process in progress.processes]
        if progress.processes:
            self._at_step(progress.step)
        if progress.is_stopping:
            self._note_stop()

    def answer_stop(self, hint: Callable[[str], None]) -> None:
        """Say what is done before the run stops, and how long it takes."""
        self._note_stop()
        hint(f"{self._stopping() or BEFORE_TRAINING}; Ctrl-C again: stop now")

    def leave(self) -> None:
        """End the process at once: its main thread is inside a long operation. What was saved is whole."""
        self._end("interrupted")
        self._warn(f"interrupted; {self._next_move()}")
        os._exit(INTERRUPTED)

    def _note_stop(self) -> None:
        if self.document["stopping"] is None:
            self.document["stopping"] = f"told to stop at {time.strftime('%X')}: {self._stopping() or BEFORE_TRAINING}"

    def __call__(self, event: Event) -> None:
        """Note an event of the run."""
        document, kind, self._has_begun = self.document, event["kind"], True
        if kind in ("start", "resume", "restart"):
            document["processes"] = event.get("processes")
            document["device"] = event.get("device", event.get("simulated_on"))
            document["step"], self._paced, document["away"] = event["step"], None, []
            self._drop_later_scores(event["step"])
        if kind == "restart":
            document["restarts"] += 1
            document["restart_reasons"] = event["reasons"]
        elif kind in ("left", "joined"):
            away, changed = set(document["away"]), set(event["devices"])
            document["away"] = sorted(away | changed if kind == "left" else away - changed)
            document["newest_change"] = change_text(event)
        elif kind == "links":
            document["links"] = event["links"]
        elif kind == "step":
            self._at_step(event["step"])
            document["sent_bytes_per_device"] = event["sent_bytes"] / document["devices"]
            # Simulated devices send nothing: their rate is that of the profile's hardware.
            seconds = event["wall_s"] if document["processes"] else event["simulated_s"]
            rate = document["sent_bytes_per_device"] / seconds if seconds else None
            document["sent_bytes_per_s_per_device"] = rate
            if event["train_loss"] is not None:
                document["train_loss"] = event["train_loss"]
        elif kind == "evaluate":
            accuracy = event.get("val_accuracy")
            document |= {"val_loss": event["val_loss"], "val_accuracy": accuracy, "val_step": event["step"]}
        elif kind in ("end", "interrupt"):
            document |= {"state": "finished" if kind == "end" else "interrupted", "step": event["step"]}

    def _drop_later_scores(self, step: int) -> None:
        if (self.document["val_step"] or 0) > step:
            self.document |= {"val_loss": None, "val_accuracy": None, "val_step": None}

    def _at_step(self, step: int) -> None:
        """Note a step; heartbeats and events may overtake each other."""
        if self._paced is None:
            self._paced = time.monotonic(), step
        self.document["step"] = max(step, self.document["step"])

    def _write_often(self) -> None:
        while not self._done.wait(WRITE_S):
            if self._activity is not None:
                self.begin(self._activity.phase)
                if self._activity.phase == "training":
                    self._at_step(self._activity.step)
            self._write()

    def _write(self) -> None:
        document, now_s = self.document, time.time()
        if self._paced is not None and document["step"] > self._paced[1]:
            document["step_s"] = (time.monotonic() - self._paced[0]) / (document["step"] - self._paced[1])
            document["remaining_s"] = document["step_s"] * (document["steps"] - document["step"])
        document["updated_unix_s"] = now_s
        # The folder's lock leaves one writer, so that one name beside the file is enough. No fsync: a status that a
        # power cut takes is worth nothing.
        written = self._path.with_name(f".{STATUS_FILE}")
        try:
            written.write_text(json.dumps(document), encoding="utf-8")
            Path(written).replace(self._path)
        except OSError as error:
            self._failures += 1
            if self._failures == FAILURES:
                self._warn(f"{self._path} cannot be written ({error.strerror}); lte watch will not see this run")
        else:
            self._failures = 0


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return a run folder's status; None where there is none, or none that can be read."""
    try:
        document = json.loads((folder / STATUS_FILE).read_bytes())
    except (OSError, ValueError):  # not there yet, being replaced on Windows, or cut by a crash of the system
        return None
    return document if isinstance(document, dict) and document.get("version") == STATUS_VERSION else None
