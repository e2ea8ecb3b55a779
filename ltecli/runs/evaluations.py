"""Evaluations of runs as tidy rows, one an evaluation: curves and the CSV of `lte report` are made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ltecli.runs.figures import RunRecord
from simulate.common.csv_text import csv_text


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run; None where the run did not record a figure."""

    run: str
    step: int
    samples: int
    sent_bytes: float
    """Bytes that a device has sent, the mean over the devices."""
    simulated_s: float
    measured_s: float | None
    train_loss: float | None
    """Mean loss of the devices in that step."""
    val_loss: float
    val_accuracy: float | None


def evaluations(record: RunRecord) -> list[Evaluation]:
    """Return a run's evaluations, oldest first."""
    steps = {event["step"]: event for event in record.events if event["kind"] == "step"}
    rows = []
    for event in record.events:
        if event["kind"] != "evaluate":
            continue
        step = steps.get(event["step"], {})  # none where train.log_every leaves it out
        rows.append(
            Evaluation(
                run=str(record.path),
                step=event["step"],
                samples=event["tokens"] // record.run.model.units_per_sample,
                sent_bytes=event["sent_bytes"] / record.run.cluster.devices,
                simulated_s=event["simulated_s"],
                # Earlier versions recorded the clock at steps only.
                measured_s=event.get("wall_s", step.get("wall_s")),
                train_loss=step.get("train_loss"),
                val_loss=event["val_loss"],
                val_accuracy=event.get("val_accuracy"),
            )
        )
    return rows


def finite_evaluations(record: RunRecord) -> list[Evaluation]:
    """Return the evaluations that a curve can show and a comparison can use: a run that diverges has others."""
    return [row for row in evaluations(record) if math.isfinite(row.val_loss)]


def evaluations_csv(records: Sequence[RunRecord]) -> str:
    """Return all evaluations of runs as CSV, with a line of names first."""
    names = [field.name for field in fields(Evaluation)]
    return csv_text(names, (list(vars(row).values()) for record in records for row in evaluations(record)))
