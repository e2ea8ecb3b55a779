"""Event log of a run: versioned events, one JSON object a line, read by reports, TensorBoard and resumed runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from simulate.common import toml_io
from simulate.common.errors import InputError

EVENTS_VERSION = 1
Event = dict[str, Any]
Emit = Callable[[Event], None]
"""Receiver of events. Every event has a kind and a step. Kinds: start, memory, step, round, merge (with a quorum: who
took part), evaluate, diagnostics, checkpoint, resume, interrupt, end; launched runs add restart (when, why, steps
repeated), left-out (devices), left and joined (devices that went and came), links (each node's measured links) and
wire."""
PROGRESS = "progress"
"""Kind of what loggers of a launched run get between its events: the steps done. No file has it."""


class EventFile:
    """Writer of events.jsonl: it appends, and flushes each line so that a kill loses at most one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        self._file.write(json.dumps({"version": EVENTS_VERSION, **event}) + "\n")
        self._file.flush()  # to the system: a killed process loses nothing, a power cut perhaps the last lines

    def close(self) -> None:
        """Close the file; a later event would raise."""
        self._file.close()


def read_events(path: Path, on_skip: Callable[[str], None] | None = None) -> Iterator[Event]:
    """Yield the events of a file; a broken line before the last one: InputError.

    A last line that is broken is what a crash leaves: it is skipped, and `on_skip` gets a line that says so.
    """
    # A crash of the system may leave bytes that are no text.
    lines = toml_io.read(path, errors="replace").split("\n")
    last = max((number for number, line in enumerate(lines, 1) if line), default=0)
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            if number == last:
                if on_skip is not None:
                    on_skip(f"{path}:{number}: the last line is no whole event, as after a crash; it is left out")
                return
            raise InputError(f"{path}:{number}: not a JSON event; the file was damaged, restore it") from None
        if not isinstance(event, dict) or not {"kind", "step"} <= event.keys():
            raise InputError(f"{path}:{number}: not an event; the file was damaged, restore it")
        if event.get("version") != EVENTS_VERSION:
            raise InputError(f"{path}:{number}: not an event of version {EVENTS_VERSION}; use the lte that wrote it")
        yield event


def truncate_events(path: Path, step: int) -> None:
    """Drop events after the checkpoint of `step`, because the resumed run emits them again; keep restarts.

    So is the memory, which is measured once, unless the run begins anew (`step` below 0). What is kept after the
    checkpoint is moved to its step, so that steps in the file never
    fall, but for a checkpoint's, which is reported when it is on the disk: training is steps ahead then.
    """
    kept: list[str] = []
    for event in read_events(path):
        if event["kind"] == "restart" or (event["kind"] == "memory" and step >= 0):
            event["step"] = max(0, min(event["step"], step))
        # The run goes on, so that it has neither ended nor been interrupted.
        elif event["step"] > step or event["kind"] in ("interrupt", "end"):
            continue
        kept.append(json.dumps(event))
    toml_io.write_atomically(path, "".join(line + "\n" for line in kept).encode())
