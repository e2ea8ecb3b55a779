"""lte report: show one run in full, or compare several side by side, in the terminal, as a page or as a table of CSV.

runs/figures.py reads the figures, runs/comparison.py compares them in words; this module prints planned, simulated,
counted and measured ones beside each other, and writes what --html and --csv ask for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ltecli.charts.curve import COLOURS, MARKS, draw_curve, draw_overlay
from ltecli.charts.diagnostics import diagnostics_table, last_rows
from ltecli.charts.page import HTML_OPTION, check_html
from ltecli.charts.report_page import report_html
from ltecli.console import Output, plain_table, scores_text
from ltecli.output_paths import CsvTarget, check_distinct, write_file
from ltecli.runs.attendance import attendance_lines
from ltecli.runs.comparison import (
    common_loss,
    explanations,
    incomparable,
    loss_text,
    overview,
    planned_and_measured,
    run_labels,
    savings,
    verdict,
)
from ltecli.runs.evaluations import evaluations_csv, finite_evaluations
from ltecli.runs.figures import RunRecord, figures, read_run
from ltecli.runs.run_table import Group, differences, group_runs, run_table, table_notes
from ltecli.runs.summary import classes_lines
from ltecli.runs.sweep_folder import is_sweep
from ltecli.runs.sweep_report import read_sweep, report_sweep
from simulate.common.errors import InputError
from simulate.common.processor import distinct, machine_text
from simulate.common.units import seconds_text
from simulate.planning.candidate import describe

CURVE_WIDTH = 100
"""Most columns of a curve: a wider one shows no more."""
MOST_COLUMNS = 4
"""Most runs with a column each; of more, each setting has a row with the figures that matter most."""
AXIS_WIDTH = 10
"""Columns left of a curve."""


@dataclass(frozen=True)
class ReportFiles:
    """Files that a report writes beside what it prints, and the command line for the page's foot."""

    html: Path | None = None
    csv: Path | None = None
    force: bool = False
    command: str = ""


def report_command(paths: list[Path], as_json: bool, to_write: ReportFiles = ReportFiles()) -> None:
    """Print the figures of run folders; --json gives an object for one run and {runs: [...]} for several.

    --csv - prints the evaluations in the place of both.
    """
    csv = CsvTarget.of(to_write.csv, to_write.force, as_json)
    if to_write.html is not None:
        check_html(to_write.html, to_write.force)
    check_distinct({"--html": to_write.html, "--csv": csv.path})
    output = Output(as_json, is_mute=csv.is_stdout)
    sweeps = [path for path in paths if is_sweep(path)]
    if sweeps and len(paths) > 1:
        raise InputError(f"{sweeps[0]} is a sweep, which is reported alone; name its run folders to compare runs")
    sweep = read_sweep(sweeps[0], output.warning) if sweeps else None
    if sweep and not sweep.records and (csv.is_wanted or to_write.html):
        raise InputError(f"{sweep.path} has no finished run yet; to go on: {sweep.sweep.command}")
    records = list(sweep.records) if sweep else [read_run(path, output.warning) for path in paths]
    # People and scripts get the same figures: what is printed is read from what --json gives.
    documents = list(sweep.figures) if sweep else [figures(record) for record in records]
    # Files come before what is printed: whoever reads that may leave early, as head does.
    if to_write.html is not None:
        write_file(to_write.html, report_html(records, documents, to_write.command), HTML_OPTION)
    if csv.is_wanted:
        csv.write(evaluations_csv(records))
    if sweep:
        report_sweep(sweep, output)
    elif len(records) == 1:
        output.json(documents[0])
        show_one(records[0], documents[0], output)
    else:
        groups = group_runs(differences([record.run for record in records]), records, documents)
        output.json(
            {
                "version": documents[0]["version"],
                "runs": documents,
                "groups": [group.to_dict() for group in groups],
            }
        )
        _show_several(records, documents, groups, output)
    for path in (to_write.html, csv.path):
        if path is not None:
            output.hint(f"wrote {path}")


def show_one(record: RunRecord, figure: dict[str, Any], output: Output) -> None:
    """Print the figures of one run."""
    run = record.run
    output.heading(
        f"{record.path}: {describe(run)} on {run.cluster.devices} x {record.plan['profile']}, "
        f"{run.model.name} with {run.shape().all_parameters:,} parameters"
    )
    for line in classes_lines(record.plan["chosen"]):
        output.text(line)
    done, planned = figure["steps"], figure["planned_steps"]
    # A run folder does not show whether its process still runs.
    state = "finished" if done == planned else f"stopped or running, of {planned:,}"
    tokens = "" if figure["unit"] == "samples" else f", {figure['tokens']:,} tokens"
    output.text(f"{done:,} steps ({state}), {figure['samples']:,} samples{tokens}")
    if restarts := figure["restarts"]["count"]:
        output.text(_restarts_text(restarts, figure["restarts"]))
    for line in attendance_lines(figure["attendance"]):
        output.text(line)
    output.text(
        f"train loss {loss_text(figure['train_loss'])}, {scores_text(figure['val_loss'], figure['val_accuracy'])}"
    )
    if figure["worse_than_guessing"]:
        output.text(figure["worse_than_guessing"])
    header, rows = planned_and_measured(figure)
    table = plain_table(*header)
    for row in rows:
        table.add_row(*row)
    output.table(table)
    for line in (*savings(figure), *explanations(record, figure)):
        output.text(line)
    if figure["diagnostics"]:
        output.text("")
        output.table(diagnostics_table(figure["diagnostics"]))
    curves = {
        "training loss": "train_loss",
        "validation loss": "val_loss",
        "validation accuracy, top-1": "val_accuracy",
    }
    for title, key in curves.items():
        points = [point for point in record.curve(key) if math.isfinite(point[1])]
        # One point is no curve, but of a run's only loss one wants to see that it is there.
        if len(points) > 1 or (points and key == "train_loss"):
            output.text(f"\n{title}")
            width = _curve_width(output)
            # A few evaluations are as wide as many steps.
            wide = [points[column * len(points) // width] for column in range(width)]
            for line in draw_curve(wide if len(points) < width else points, width):
                output.text(line)


def _curve_width(output: Output) -> int:
    return min(CURVE_WIDTH, output.console.width) - AXIS_WIDTH


def _restarts_text(count: int, restarts: dict[str, Any]) -> str:
    times = "once" if count == 1 else f"{count} times"
    return (
        f"restarted {times}: {restarts['repeated_steps']:,} steps done again, {seconds_text(restarts['silent_s'])} "
        f"without a step; last reason: {'; '.join(restarts['last_reasons'])}"
    )


def _show_several(
    records: list[RunRecord], documents: list[dict[str, Any]], groups: list[Group], output: Output
) -> None:
    output.text(verdict(records, documents))
    rows = [finite_evaluations(record) for record in records]
    is_comparable = incomparable(records) is None
    output.text("")
    diagnoses = last_rows([figure["diagnostics"] for figure in documents])
    if len(records) <= MOST_COLUMNS and len(groups) == len(records):
        cells = overview(records, documents, common_loss(rows) if is_comparable else None)
        _print_columns(records, [*cells, *diagnoses], output)
    else:  # a row for each setting, over its seeds
        facts = {
            "method": {describe(record.run) for record in records},
            "network": {f"{r.run.model.name} with {r.run.model.shape().all_parameters:,} parameters" for r in records},
            "hardware": {f"{record.run.cluster.devices} x {record.plan['profile']}" for record in records},
        }
        if shared := [next(iter(texts)) for texts in facts.values() if len(texts) == 1]:
            output.text(f"all {len(records)} runs: {'; '.join(shared)}")
        output.table(*run_table(groups, named=True))
        for note in table_notes(groups, named=True):
            output.text(note)
        for machine in distinct(machine for figure in documents for machine in figure["machines"]):
            output.text(f"trained on: {machine_text(machine)}")
        if diagnoses:
            _print_columns(records, diagnoses, output)
    curve = draw_overlay(
        [[(row.samples, row.val_loss) for row in rows_of_run] for rows_of_run in rows], "samples", _curve_width(output)
    )
    if curve and is_comparable:
        output.text("\nvalidation loss")
        for line in curve:
            output.text(line)
        for number, label in enumerate(run_labels([record.path for record in records])):
            mark = Text(f"{' ' * AXIS_WIDTH}{MARKS[number % len(MARKS)]} ", style=COLOURS[number % len(COLOURS)])
            output.text(mark.append(label, style="default"))


def _print_columns(records: list[RunRecord], cells: list[tuple[str, list[str]]], output: Output) -> None:
    """Print a row for each figure and a column for each run, since people compare along rows."""
    table = plain_table("", *(str(record.path) for record in records))
    for label, values in cells:
        table.add_row(label, *values)
    output.table(table)
