"""Figures of a run folder by name: planned, simulated, counted and measured, as `lte report --json` prints them.

`lte report` shows them, `lte train` repeats those of a run that had finished, and --link-from reads its links here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltecli.runs.attendance import attendance_of
from ltecli.runs.lock import is_locked
from ltecli.runs.run_folder import check_run_folder, read_plan, stored_shape
from simulate.common.errors import InputError
from simulate.common.events import Event, read_events
from simulate.common.processor import distinct
from simulate.common.run_files import EVENTS_FILE, RUN_FILE
from simulate.config.run import Run, load_run
from simulate.costs.message_schedule import sent_bytes
from simulate.planning.notes import draws_by_layer

REPORT_VERSION = 1
METRICS = ("step", "train_loss", "learning_rate", "samples", "tokens", "sent_bytes", "simulated_s", "wall_s")
"""Figures of a step event that are a row of a run's metrics."""


@dataclass(frozen=True)
class RunRecord:
    """A run folder's run, plan and events."""

    path: Path
    run: Run
    plan: dict[str, Any]
    events: tuple[Event, ...]

    def last(self, kind: str) -> Event | None:
        """Return the newest event of a kind."""
        return next((event for event in reversed(self.events) if event["kind"] == kind), None)

    def first(self, kind: str) -> Event | None:
        """Return the oldest event of a kind."""
        return next((event for event in self.events if event["kind"] == kind), None)

    @property
    def is_launched(self) -> bool:
        """Whether the run was trained by launched processes, at least in part."""
        return any("processes" in event for event in self.events)

    def clocks(self, step: Event | None) -> Event | None:
        """Return the newest event with both clocks: the checkpoint right after a step, else the step."""
        # A checkpoint's event is written after its save, so its clocks include it.
        saved = self.last("checkpoint")
        after = step and saved and saved["step"] == step["step"] and "wall_s" in saved
        return saved if after else step

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of every event that has `key`."""
        return [(event["step"], event[key]) for event in self.events if event.get(key) is not None]


def read_run(path: Path, on_skip: Callable[[str], None] | None = None) -> RunRecord:
    """Read a run folder; raises InputError for a path that is none, or a run without a step."""
    check_run_folder(path)
    if not (path / EVENTS_FILE).is_file():
        if is_locked(path):
            raise InputError(f"{path} has no {EVENTS_FILE} yet: its training starts; ask again in a moment")
        raise InputError(f"{path} has no {EVENTS_FILE}: it never took a step; start it with lte train {path} --resume")
    events = tuple(read_events(path / EVENTS_FILE, on_skip))
    return RunRecord(path, load_run(path / RUN_FILE, stored_shape(path)), read_plan(path), events)


def metrics(record: RunRecord) -> list[dict[str, Any]]:
    """Return a row for each logged step: its figures, and those of an evaluation after it, else None."""
    evaluations = {event["step"]: event for event in record.events if event["kind"] == "evaluate"}
    scores = sorted({key for event in evaluations.values() for key in event if key.startswith("val_")})
    return [
        {
            **{key: event[key] for key in METRICS},
            **{score: evaluations.get(event["step"], {}).get(score) for score in scores},
        }
        for event in record.events
        if event["kind"] == "step"
    ]


def figures(record: RunRecord) -> dict[str, Any]:
    """Return the report's figures; those "per device" are of one device, null where there is none."""
    run, chosen = record.run, record.plan["chosen"]
    step, evaluation, memory = record.last("step"), record.last("evaluate"), record.last("memory")
    steps, clocks = step["step"] if step else 0, record.clocks(step)
    share = steps / run.train.steps
    return {
        "version": REPORT_VERSION,
        "run": str(record.path),
        "method": run.method.name,
        "devices": run.cluster.devices,
        "steps": steps,
        "planned_steps": run.train.steps,
        "samples": step["samples"] if step else 0,
        "tokens": step["tokens"] if step else 0,
        "unit": run.model.unit,
        "memory_bytes": {
            # Measured are the program's tensors, without what the allocator and the system hold beside them.
            "planned": tensor_bytes(chosen),
            "measured": memory and memory["measured_bytes"],
            "reserved": chosen["memory_bytes"]["reserved"],
            "allocator": chosen["memory_bytes"].get("allocator", 0),
        },
        "sent_bytes_per_device": {
            # Asked for the steps done, not as a share of the whole: merges do not fall evenly.
            "planned": sent_bytes(run, run.shape(), steps) / run.cluster.devices,
            "counted": step["sent_bytes"] / run.cluster.devices if step else None,
            "wire": _wire_bytes(record),
        },
        "wall_s": {
            # Of an unfinished run, the same share of the whole run's seconds.
            "planned": chosen["wall_s"] * share,
            "simulated": clocks and clocks["simulated_s"],
            "measured": clocks and clocks["wall_s"],
        },
        "step_s": {
            "planned": chosen["wall_s"] / run.train.steps,
            "simulated": clocks and clocks["simulated_s"] / steps,
            "measured": clocks and clocks["wall_s"] / steps,
        },
        "classes": chosen.get("classes"),
        "draws_by_layer": draws_by_layer(run, run.model.shape()),
        "restarts": _restarts(record),
        "attendance": attendance_of(record.events),
        # A resumed run may have moved to another machine.
        "machines": distinct(machine for event in record.events for machine in event.get("machines", ())),
        "train_loss": step and step["train_loss"],
        "val_loss": evaluation and evaluation["val_loss"],
        "val_accuracy": evaluation and evaluation.get("val_accuracy"),
        "worse_than_guessing": _worse_than_guessing(record, step, evaluation),
        "dense": _dense(record, share),
        "diagnostics": [
            {key: value for key, value in event.items() if key not in ("version", "kind")}
            for event in record.events
            if event["kind"] == "diagnostics"
        ],
    }


def _worse_than_guessing(record: RunRecord, step: Event | None, evaluation: Event | None) -> str | None:
    """Return a sentence where a finished run ended with a loss above that of equal chances for all outputs."""
    run = record.run
    if step is None or step["step"] < run.train.steps:  # a network starts above it
        return None
    if getattr(run.model, "loss", None) is not None:  # guessing has no known value of a user's loss
        return None
    outputs = run.shape().outputs
    guessing = math.log(outputs)
    losses = {"validation": evaluation and evaluation["val_loss"], "training": step["train_loss"]}
    worse = [f"{name} loss {loss:.4f}" for name, loss in losses.items() if loss is not None and loss > guessing]
    if not worse:
        return None
    return (
        f"worse than guessing: {' and '.join(worse)} above {guessing:.4f}, which equal chances for all {outputs:,} "
        f"{'tokens' if run.model.unit == 'tokens' else 'classes'} have; try a lower train.learning_rate (here "
        f"{run.train.learning_rate:g}), or more train.steps"
    )


def tensor_bytes(candidate: dict[str, Any]) -> int:
    """Return the bytes of a planned candidate's tensors; plans of older versions knew no allocator."""
    memory = candidate["memory_bytes"]
    return memory["total"] - memory["reserved"] - memory.get("allocator", 0)


def _restarts(record: RunRecord) -> dict[str, Any]:
    """Return the number of restarts, the steps and seconds that they cost, and the newest reasons."""
    events = [event for event in record.events if event["kind"] == "restart"]
    return {
        "count": len(events),
        "repeated_steps": sum(event["repeated_steps"] for event in events),
        "silent_s": sum(event["silent_s"] or 0.0 for event in events),
        "last_reasons": events[-1]["reasons"] if events else [],
    }


def _wire_bytes(record: RunRecord) -> float | None:
    """Return the bytes that nodes' interfaces sent, per device; None for a run that several nodes did not launch."""
    sessions = [event["sent_bytes_by_node"] for event in record.events if event["kind"] == "wire"]
    if not sessions:
        return None
    return sum(sum(sent) for sent in sessions) / record.run.cluster.devices


def _dense(record: RunRecord, share: float) -> dict[str, Any] | None:
    """Return the planned figures of dense training over the same share of the run, None where it has no plan."""
    dense = record.plan.get("dense")
    if dense is None:
        return None
    return {
        "memory_bytes": tensor_bytes(dense),
        "sent_bytes_per_device": dense["sent_bytes"] * share,
        "wall_s": dense["wall_s"] * share,
        "step_s": dense["wall_s"] / record.run.train.steps,
        "fits": dense["fits"],
    }
