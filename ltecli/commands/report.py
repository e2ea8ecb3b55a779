"""lte report: show one run in full, or compare several side by side.

runs/figures.py reads the figures; this module prints planned, simulated, counted and measured ones beside each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ltecli.charts.curve import draw_curve
from ltecli.charts.diagnostics import diagnostics_table, last_rows
from ltecli.console import Output, memory_text, plain_table, scores_text
from ltecli.runs.figures import RunRecord, figures, read_run
from simulate.common.processor import machine_text
from simulate.common.units import bytes_text, seconds_text
from simulate.config.method_table import BASELINE
from simulate.planning.candidate import describe
from simulate.planning.notes import draws_notes

TIMES = 2.0
"""Ratio from which a change is told as a multiple, not in per cent."""


def report_command(paths: list[Path], as_json: bool) -> None:
    """Print the figures of run folders; --json gives an object for one run and {runs: [...]} for several."""
    output = Output(as_json)
    records = [read_run(path, output.warning) for path in paths]
    # People and scripts get the same figures: what is printed is read from what --json gives.
    documents = [figures(record) for record in records]
    if len(records) == 1:
        output.json(documents[0])
        _show_one(records[0], documents[0], output)
    else:
        output.json({"version": documents[0]["version"], "runs": documents})
        _show_several(records, documents, output)


def _show_one(record: RunRecord, figure: dict[str, Any], output: Output) -> None:
    run = record.run
    output.heading(
        f"{record.path}: {describe(run)} on {run.cluster.devices} x {record.plan['profile']}, "
        f"{run.model.name} with {run.model.shape().all_parameters:,} parameters"
    )
    done, planned = figure["steps"], figure["planned_steps"]
    # A run folder does not show whether its process still runs.
    state = "finished" if done == planned else f"stopped or running, of {planned:,}"
    tokens = "" if figure["unit"] == "samples" else f", {figure['tokens']:,} tokens"
    output.text(f"{done:,} steps ({state}), {figure['samples']:,} samples{tokens}")
    if restarts := figure["restarts"]["count"]:
        output.text(_restarts_text(restarts, figure["restarts"]))
    output.text(
        f"train loss {_number(figure['train_loss'])}, {scores_text(figure['val_loss'], figure['val_accuracy'])}"
    )
    if figure["worse_than_guessing"]:
        output.text(figure["worse_than_guessing"])
    table = plain_table("", "planned", "simulated", "counted", "measured", "dense, planned")
    rows = [
        ("memory per device", "memory_bytes", bytes_text),
        ("sent per device", "sent_bytes_per_device", bytes_text),
        ("wall-clock", "wall_s", seconds_text),
        ("per step", "step_s", seconds_text),
    ]
    for label, key, text in rows:
        values = figure[key]
        dense = figure["dense"] and figure["dense"][key]
        cells = (values.get(k) for k in ("planned", "simulated", "counted", "measured"))
        table.add_row(label, *(text(v) for v in cells), text(dense))
    output.table(table)
    notes = draws_notes(run, run.model.shape())
    for line in (*_savings(figure), *notes, *_explanations(figure, record.is_launched)):
        output.text(line)
    if figure["diagnostics"]:
        output.text("")
        output.table(diagnostics_table(figure["diagnostics"]))
    curve = draw_curve(record.curve("train_loss"))
    if curve:
        output.text("\ntraining loss")
        for line in curve:
            output.text(line)


def _restarts_text(count: int, restarts: dict[str, Any]) -> str:
    times = "once" if count == 1 else f"{count} times"
    return (
        f"restarted {times}: {restarts['repeated_steps']:,} steps done again, {seconds_text(restarts['silent_s'])} "
        f"without a step; last reason: {'; '.join(restarts['last_reasons'])}"
    )


def _savings(figure: dict[str, Any]) -> list[str]:
    """Return a line that compares planned figures with those of dense training; none for dense training itself."""
    dense = figure["dense"]
    if dense is None or figure["method"] == BASELINE or not figure["steps"]:
        return []
    parts = []
    for key, less, what in (
        ("memory_bytes", "less", "memory"),
        ("sent_bytes_per_device", "fewer", "bytes sent"),
        ("wall_s", "less", f"time for the same {figure['unit']}"),
    ):
        ours = figure[key]["planned"]
        # A run on one device sends nothing, and has no ratio.
        if ours and dense[key]:
            parts.append(f"{change_text(ours / dense[key], less)} {what}")
    unfit = "" if dense["fits"] else " (dense does not fit this hardware)"
    return [f"beside dense, planned: {', '.join(parts)}{unfit}"]


def change_text(ratio: float, less: str) -> str:
    """Return a ratio to dense in words: 12 % more, 4.2 times fewer."""
    if not 1 / TIMES < ratio < TIMES:
        return f"{max(ratio, 1 / ratio):.3g} times {'more' if ratio > 1 else less}"
    return "the same" if round(ratio, 2) == 1 else f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else less}"


def _explanations(figure: dict[str, Any], is_launched: bool) -> list[str]:
    """Return lines on what the table's memory and time include, and on the machines that trained."""
    memory = figure["memory_bytes"]
    # The same column means two things, so the line under the table says which.
    here = "the launched processes' time" if is_launched else "this machine's time for simulating all devices"
    return [
        f"memory: planned {memory_text(memory['planned'], memory['allocator'], memory['reserved'])}; the table has the "
        "tensors, measured as the allocator's peak of one device's program, run alone",
        "time: with evaluations and a launched run's checkpoints; simulated is the time of the profile's hardware; "
        f"measured is {here}",
        *(f"trained on: {machine_text(machine)}" for machine in figure["machines"]),
    ]


def _show_several(records: list[RunRecord], documents: list[dict[str, Any]], output: Output) -> None:
    table = plain_table("", *(str(record.path) for record in records))
    rows: list[tuple[str, Any]] = [
        ("method", lambda r, f: describe(r.run)),
        ("profile", lambda r, f: f"{f['devices']} x {r.plan['profile']}"),
        ("trained on", lambda r, f: ", ".join(m["processor"] for m in f["machines"]) or "-"),
        ("steps", lambda r, f: f"{f['steps']:,} of {f['planned_steps']:,}"),
        ("tokens", lambda r, f: f"{f['tokens']:,}" if f["unit"] == "tokens" else "-"),
        ("samples", lambda r, f: f"{f['samples']:,}"),
        ("train loss", lambda r, f: _number(f["train_loss"])),
        ("validation loss", lambda r, f: _number(f["val_loss"])),
        ("top-1 accuracy", lambda r, f: "-" if f["val_accuracy"] is None else f"{f['val_accuracy']:.2%}"),
        ("memory per device, planned", lambda r, f: bytes_text(f["memory_bytes"]["planned"])),
        ("memory per device, measured", lambda r, f: bytes_text(f["memory_bytes"]["measured"])),
        ("sent per device, planned", lambda r, f: bytes_text(f["sent_bytes_per_device"]["planned"])),
        ("sent per device, counted", lambda r, f: bytes_text(f["sent_bytes_per_device"]["counted"])),
        ("wall-clock, planned", lambda r, f: seconds_text(f["wall_s"]["planned"])),
        ("wall-clock, simulated", lambda r, f: seconds_text(f["wall_s"]["simulated"])),
        ("wall-clock, measured", lambda r, f: seconds_text(f["wall_s"]["measured"])),
        ("step, simulated", lambda r, f: seconds_text(f["step_s"]["simulated"])),
        ("step, measured", lambda r, f: seconds_text(f["step_s"]["measured"])),
    ]
    # One row a figure and one column a run, since people compare along rows.
    for label, cell in rows:
        table.add_row(label, *(cell(r, f) for r, f in zip(records, documents, strict=True)))
    for label, cells in last_rows([figure["diagnostics"] for figure in documents]):
        table.add_row(label, *cells)
    output.table(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
