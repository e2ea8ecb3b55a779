"""lte watch: show what a run does now, from another terminal, from nothing but its folder.

The run writes its status file about once a second (runs/status.py); this command reads it as often. That the writer
lives is seen from the file, which changes; where it does not, the folder's lock tells a run that was killed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.text import Text

from ltecli.console import Output
from ltecli.errors import DONE
from ltecli.runs.attendance import devices_text
from ltecli.runs.lock import is_locked
from ltecli.runs.status import read_status
from simulate.common.errors import InputError
from simulate.common.run_files import PROFILE_FILE, RUN_FILE, STATUS_FILE
from simulate.common.units import bytes_text, seconds_text

LOOK_S = 1.0
QUIET_S = 5.0
"""Seconds without a change of the status file after which the folder's lock is asked whether the run lives."""
WAITING, DIED = "waiting", "died"
"""States beside those of the status file: running, finished, interrupted, failed."""
BETWEEN = ("exchanging", "diagnosing", "evaluating", "saving")
"""Phases that belong to a round."""


def watch_command(path: Path, once: bool, as_json: bool) -> int:
    """Show a run until it has finished, or once; returns the exit code."""
    output, watcher = Output(as_json), Watcher(path)
    if once:
        document = watcher.look()
        if document["state"] == WAITING:
            raise InputError(
                f"{path} has no {STATUS_FILE} yet; leave --once away to wait for it, or see lte report {path}"
            )
        output.json(document)
        for line in lines_of(document):
            output.text(line)
        return DONE
    try:
        if as_json or not output.console.is_terminal:
            _print_changes(watcher, output)
        else:
            _show_live(watcher, output)
    except KeyboardInterrupt:
        output.hint(f"no longer watching; {path} is not touched")
    return DONE


def _show_live(watcher: Watcher, output: Output) -> None:
    # Lines are redrawn in place, so that the last state stays in the terminal.
    with Live(console=output.console, auto_refresh=False) as live:
        while True:
            document = watcher.look()
            live.update(panel_of(document), refresh=True)
            if document["state"] == "finished":
                return
            time.sleep(LOOK_S)


def _print_changes(watcher: Watcher, output: Output) -> None:
    """Print a line, or a JSON document, whenever the state, the phase, the round or the validation changes."""
    printed = None
    while True:
        document = watcher.look()
        steps = document.get("steps")
        # Without rounds every step would be a change: each hundredth of the run is one.
        part = document.get("round") or (steps and document["step"] * 100 // steps)
        phase = document["phase"] if document["state"] == "running" else None
        others = (document.get(key) for key in ("val_step", "restarts", "stopping"))
        change = [document["state"], part, phase, *others]
        if change != printed:
            printed = change
            output.json(document)
            output.text("  ".join(lines_of(document)[:3]))
        if document["state"] == "finished":
            return
        time.sleep(LOOK_S)


@dataclass
class Watcher:
    """Reader of a run folder's state; it outlives restarts and resumed sessions."""

    path: Path
    _updated: float | None = None
    """The newest status file's own time, compared with itself only: clocks of machines differ."""
    _changed_s: float = 0.0
    """When it was new to this process."""
    _is_dead: bool = False

    def look(self) -> dict[str, Any]:
        """Return the run's present state; raises InputError for a path that no run can be at."""
        document = read_status(self.path)
        if document is None:
            self._check_possible()
            return {"run": str(self.path), "state": WAITING}
        now_s, silent_s = time.monotonic(), 0.0
        is_first, is_new = self._updated is None, document["updated_unix_s"] != self._updated
        if is_new:
            self._updated, self._changed_s, self._is_dead = document["updated_unix_s"], now_s, False
        # Who asks for the lock takes it for a moment, and could refuse a run that starts just then. So it is asked
        # rarely: at first, when the file may be an old one, and where the run is quiet; of a dead run, never again.
        if document["state"] == "running" and not self._is_dead:
            is_quiet = now_s - self._changed_s > QUIET_S
            if is_first or is_quiet:
                is_alive = is_locked(self.path)
                # A run that ended in between has written how.
                self._is_dead = not is_alive and read_status(self.path) == document
            if is_quiet and not self._is_dead:
                silent_s = now_s - self._changed_s
        if self._is_dead:
            document["state"] = DIED
        return {"run": str(self.path), **document, **_derived(document), "silent_s": silent_s}

    def _check_possible(self) -> None:
        """Raise InputError for a path without a status at which none will appear."""
        path = self.path
        if not path.exists() or (path / RUN_FILE).is_file():
            return
        # A folder that is being made gets its profile first.
        if not (path.is_dir() and ((path / PROFILE_FILE).exists() or not any(path.iterdir()))):
            raise InputError(f"{path} is no run folder (it has no {RUN_FILE}); name one of lte train, as in runs/demo")


def _derived(document: dict[str, Any]) -> dict[str, Any]:
    """Return what follows from a status: rounds, and the time of the end."""
    step, steps, apart = document["step"], document["steps"], document["steps_per_round"]
    remaining_s = document["remaining_s"] if document["state"] == "running" else None
    finish = None if remaining_s is None else datetime.fromtimestamp(document["updated_unix_s"] + remaining_s)
    return {
        # A round is over when its exchange is, so that the exchange belongs to the round before it.
        "round": apart and min(-(-steps // apart), (step - (document["phase"] in BETWEEN and step > 0)) // apart + 1),
        "rounds": apart and -(-steps // apart),
        "finish_at": finish and finish.astimezone().isoformat(timespec="seconds"),
    }


def lines_of(document: dict[str, Any]) -> list[str]:
    """Return a state for people: what the run does and how far it is, its losses, its end, then bytes and devices."""
    if document["state"] == WAITING:
        return [_waiting(Path(document["run"]))]
    lines = [f"{document['run']}: {_headline(document)}", _losses(document)]
    if document["state"] == "running":
        lines.append(_end(document))
    if document["silent_s"]:
        lines.append(
            f"no news for {seconds_text(document['silent_s'])}, but its process lives: stopped, or a slow disk"
        )
    lines.append(_sent(document))
    if document["restarts"]:
        lines.append(f"restarts {document['restarts']}, the newest: {'; '.join(document['restart_reasons'])}")
    if document.get("newest_change"):
        away = f"{devices_text(document['away'])} away; " if document["away"] else ""
        lines.append(f"{away}{document['newest_change']}")
    lines += [_link(link) for link in document["links"] or ()]
    if document["state"] == "running":
        lines += [_worker(worker) for worker in document["workers"]]
    return lines


def panel_of(document: dict[str, Any]) -> RenderableType:
    """Return a state for a terminal: its lines, the first one bold, with a bar of the steps."""
    first, *others = (Text(line, style="" if index else "bold") for index, line in enumerate(lines_of(document)))
    if document["state"] == WAITING:
        return first
    bar = ProgressBar(total=document["steps"], completed=document["step"], width=40)
    return Group(first, Padding(bar, 0), *others)  # the bar alone would not end its line


def _waiting(path: Path) -> str:
    if not path.exists():
        return f"{path} is not there yet; lte train makes it once its data is loaded; waiting"
    # Also a folder of an earlier version, which had no such file.
    return (
        f"{path} has no {STATUS_FILE} yet; waiting for lte train {path} --resume (what it has done: lte report {path})"
    )


def _headline(document: dict[str, Any]) -> str:
    step = f"step {document['step']:,} of {document['steps']:,}"
    path, state = document["run"], document["state"]
    resume = f"lte train {path} --resume{document['resume_words']}"
    if state == "finished":
        return f"finished, {step}; next: lte report {path}"
    if state == "interrupted":
        return f"interrupted, {step}; {resume} continues it"
    if state == "failed":
        return f"failed, {step}: {document['error']}"
    if state == DIED:
        at = datetime.fromtimestamp(document["updated_unix_s"])
        return f"died without a word, {step}, last seen {at:%Y-%m-%d %H:%M:%S}; {resume} continues it"
    phase = document["phase"]
    if document["rounds"] and (phase == "training" or phase in BETWEEN):
        rounds = f"round {document['round']:,} of {document['rounds']:,}"
        phase = rounds if phase == "training" else f"{rounds}, {phase}"
    stopping = f"; {document['stopping']}" if document["stopping"] else ""
    return f"{phase}, {step}{stopping}"


def _losses(document: dict[str, Any]) -> str:
    if document["train_loss"] is None:
        return "no loss yet"
    text = f"train loss {document['train_loss']:.4f}"
    if document["val_loss"] is not None:
        text += f", validation loss {document['val_loss']:.4f}"
        if document["val_accuracy"] is not None:
            text += f" ({document['val_accuracy']:.2%} right)"
        text += f" at step {document['val_step']:,}"
    return text


def _end(document: dict[str, Any]) -> str:
    if document["finish_at"] is None:
        return "end unknown until two steps are done"
    finish = datetime.fromisoformat(document["finish_at"])
    day = "" if finish.date() == datetime.now().date() else f"{finish:%a %d %b} "
    each = seconds_text(document["step_s"])
    return f"{seconds_text(document['remaining_s'])} to go, done at {day}{finish:%H:%M} ({each} a step)"


def _sent(document: dict[str, Any]) -> str:
    processes, rate = document["processes"], document["sent_bytes_per_s_per_device"]
    if document["device"] is None:  # nothing has begun
        return f"{document['devices']} devices"
    text = f"{document['devices']} devices {f'in {processes} processes' if processes else 'simulated in one process'}"
    if document["sent_bytes_per_device"] is None:
        return text
    text += f"; each sent {bytes_text(document['sent_bytes_per_device'])}"
    return text if rate is None else f"{text}, {bytes_text(rate)}/s{'' if processes else ' on the simulated links'}"


def _link(link: dict[str, Any]) -> str:
    return (
        f"link of node {link['sender']} to node {link['receiver']}: {bytes_text(link['loaded_bytes_per_s'])}/s, "
        f"{seconds_text(link['latency_s'])} (measured before the run)"
    )


def _worker(worker: dict[str, Any]) -> str:
    """Return a line for a process and its devices."""
    what = worker["activity"]
    if worker["silent_s"]:
        what = f"silent for {seconds_text(worker['silent_s'])}, last {what}"
    elif worker["waits_for"]:
        what += f", waits for process {', '.join(map(str, worker['waits_for']))}"
    return f"  {worker['title']}: step {worker['step']:,}, {what}"
