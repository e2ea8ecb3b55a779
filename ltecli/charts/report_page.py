"""The page of `lte report --html`: curves over every axis, memory, time, settings and diagnostics of one or more runs.

A terminal shows the end of a run, a page its whole course beside others', and it can be sent to somebody. `lte report`
writes it with `report_page`, and so may every command that has made several run folders.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ltecli.charts.diagnostics import LABELS
from ltecli.charts.page import HTML_OPTION, Figure, Page, Section, Trace, View, check_html, folded, listing, table
from ltecli.charts.scales import byte_scale, log_ticks, second_scale
from ltecli.charts.thinning import thinned
from ltecli.output_paths import write_file
from ltecli.runs.comparison import (
    common_loss,
    explanations,
    incomparable,
    overview,
    planned_and_measured,
    run_labels,
    verdict,
)
from ltecli.runs.evaluations import finite_evaluations
from ltecli.runs.figures import RunRecord, figures, read_run
from simulate.common.units import bytes_text, seconds_text
from simulate.common.version import version
from simulate.costs.message_schedule import num_rounds
from simulate.planning.candidate import describe

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "temporary")
"""Parts of planned memory that are the program's own tensors, which is what is measured."""
COLOURS = 8
"""Colours of runs in page.css; more runs share them."""
CONSTANT = ("grassmann_limit_rad", "own_sent_bytes")
"""Diagnostics that hardly change over a run, so that a curve shows nothing."""
DRAWN, DRAWN_OF_ALL, LEAST_DRAWN = 400, 12_000, 20
"""Most points of a curve, of all runs' curves in a figure together, and of a curve among very many."""
WIDE_RANGE = 10.0
"""Ratio of the runs' largest values from which an axis is logarithmic: the shortest curve would be a speck."""
BAR, HEAD = 30, 90
"""Pixels of a bar with its gap, and of what stands above and below all bars."""


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it."""

    label: str
    colour: str
    record: RunRecord
    figure: dict[str, Any]


def report_page(
    folders: Sequence[Path], out: Path, *, title: str | None = None, command: str | None = None, force: bool = False,
    on_skip: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Write the page that compares run folders, in the order given, or shows one, to the file `out`.

    Runs may be finished, stopped or still in progress. `title` is the page's heading (default: the runs' names), and
    `command` the line that made it (default: the `lte report` that does). `on_skip` gets a line where a run's last
    event is broken off. Raises InputError, and writes nothing, where a folder is no run or the file may not be written.
    """
    check_html(out, force)
    records = [read_run(folder, on_skip) for folder in folders]
    command = command or shlex.join(["lte", "report", *map(str, folders), HTML_OPTION, str(out)])
    write_file(out, report_html(records, [figures(record) for record in records], command, title), HTML_OPTION)


def report_html(
    records: Sequence[RunRecord], documents: Sequence[dict[str, Any]], command: str, title: str | None = None
) -> str:
    """Return the page of runs that were read, with their figures, as an HTML document."""
    labels = run_labels([record.path for record in records])
    runs = [
        Shown(label, f"run{number % COLOURS}", record, figure)
        for number, (label, record, figure) in enumerate(zip(labels, records, documents, strict=True))
    ]
    reason = incomparable(records) if len(records) > 1 else None
    said = verdict(records, documents)
    page = Page(
        title=title or _title(runs),
        verdict=said,
        alarm="" if reason is None or reason in said else reason,
        sections=[section for section in _sections(runs, reason is None) if section is not None],
        command=command,
        kind="Report of a run" if len(runs) == 1 else f"Report of {len(runs)} runs",
        runs=[(run.colour, run.label) for run in runs],
        made=f"lte {version()}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}; drawn by plotly.js (MIT licence)",
    )
    return page.html()


def _title(runs: Sequence[Shown]) -> str:
    if len(runs) == 1:
        return f"{runs[0].label}: {describe(runs[0].record.run)}"
    names = {run.record.run.model.name for run in runs}
    labels = [run.label for run in runs]
    listed = f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) <= COLOURS // 2 else f"{len(labels)} runs"
    return f"{listed}: {names.pop()}" if len(names) == 1 else listed


def _sections(runs: Sequence[Shown], comparable: bool) -> Iterable[Section | None]:
    own = ["lte", "report", *(str(run.record.path) for run in runs)]
    as_csv, as_json = shlex.join([*own, "--csv", "-"]), shlex.join([*own, "--json"])
    yield _curves(runs, "val_loss", "Validation loss", "validation loss", as_csv)
    yield _curves(runs, "val_accuracy", "Validation accuracy", "top-1 accuracy (%)", as_csv)
    yield _figures_table(runs, comparable, as_json)
    yield _memory(runs, as_json)
    yield _time(runs, as_json)
    yield _training_loss(runs, as_json)
    yield _diagnostics(runs, as_json)
    yield _differences(runs)
    yield _origins(runs)


def _most_points(runs: Sequence[Shown]) -> int:
    return max(LEAST_DRAWN, min(DRAWN, DRAWN_OF_ALL // len(runs)))


def _curves(runs: Sequence[Shown], key: str, title: str, y_title: str, command: str) -> Section | None:
    """Return the section with a curve of evaluations for each run; None where no run has the score."""
    percent = 100.0 if key == "val_accuracy" else 1.0
    columns: list[dict[str, list[Any]]] = []
    for run in runs:
        rows = [row for row in finite_evaluations(run.record) if getattr(row, key) is not None]
        values = [percent * getattr(row, key) for row in rows]
        kept = thinned(values, _most_points(runs))
        columns.append(
            {
                "step": [rows[i].step for i in kept],
                "samples": [rows[i].samples for i in kept],
                "sent": [rows[i].sent_bytes for i in kept],
                "simulated": [rows[i].simulated_s for i in kept],
                "measured": [rows[i].measured_s for i in kept],
                key: [values[i] for i in kept],
            }
        )
    if not any(column[key] for column in columns):
        return None if key == "val_accuracy" else Section(title, "No run has been evaluated yet.")
    figure = _course(runs, columns, key, y_title, key.replace("_", "-"), "line")
    lead = "Scores of the merged weights on held-out data. Drag to zoom, double-click to return."
    return Section(title, lead, figure, command=command)


def _training_loss(runs: Sequence[Shown], command: str) -> Section | None:
    """Return the section with the training loss of every logged step, thinned; None before the first step."""
    columns: list[dict[str, list[Any]]] = []
    for run in runs:
        steps = [e for e in run.record.events if e["kind"] == "step" and e["train_loss"] is not None]
        steps = [steps[i] for i in thinned([step["train_loss"] for step in steps], _most_points(runs))]
        devices = run.record.run.cluster.devices
        columns.append(
            {
                "step": [e["step"] for e in steps],
                "samples": [e["samples"] for e in steps],
                "sent": [e["sent_bytes"] / devices for e in steps],
                "simulated": [e["simulated_s"] for e in steps],
                "measured": [e["wall_s"] for e in steps],
                "train_loss": [e["train_loss"] for e in steps],
            }
        )
    if not any(column["train_loss"] for column in columns):
        return None
    figure = _course(runs, columns, "train_loss", "training loss", "train-loss", "course")
    lead = "Mean over the devices of each step's own batch; of long runs the lowest and highest points are drawn."
    return Section("Training loss", lead, figure, command=command)


def _course(
    runs: Sequence[Shown], columns: list[dict[str, list[Any]]], key: str, y_title: str, name: str, kind: str
) -> Figure:
    """Return the figure of curves with a switch between samples, bytes, simulated and measured time."""
    sent, sent_unit = byte_scale(v for column in columns for v in column["sent"])
    simulated, simulated_unit = second_scale(v for column in columns for v in column["simulated"])
    measured, measured_unit = second_scale(v for column in columns for v in column["measured"])
    for column in columns:
        for axis, scale in (("sent", sent), ("simulated", simulated), ("measured", measured)):
            column[axis] = [None if value is None else value / scale for value in column[axis]]
    launched = {run.record.is_launched for run in runs}
    # The same clock means two things, so the axis says which.
    by = (
        " of the launched processes"
        if launched == {True}
        else ", simulated on one machine"
        if not any(launched)
        else ""
    )

    def view(label: str, x: str, x_title: str, kind: str = "", scale: float = 1.0, unit: str = "") -> View:
        ends = [column[x][-1] for column in columns if column[x] and column[x][-1]]
        points = [value for column in columns for value in column[x] if value is not None]
        if kind and ends and min(points) > 0 and max(ends) > WIDE_RANGE * min(ends):
            ticks = log_ticks(kind, scale * min(points), scale * max(points))
            return View(
                label, x, key, f"{x_title}, logarithmic", y_title, True, x_kind=kind, x_scale=scale,
                x_ticks=[(value / scale, text) for value, text in ticks],
            )  # fmt: skip
        return View(label, x, key, f"{x_title} ({unit})" if unit else x_title, y_title, x_kind=kind, x_scale=scale)

    views = [
        view("samples", "samples", "samples trained on"),
        view("bytes sent", "sent", "sent by a device", "bytes", sent, sent_unit),
        view(
            "simulated time",
            "simulated",
            "simulated time, on the profile's hardware",
            "seconds",
            simulated,
            simulated_unit,
        ),
        view("measured time", "measured", f"measured time{by}", "seconds", measured, measured_unit),
    ]
    traces = [
        Trace(run.label, run.colour, column, kind, run=number, label=run.label if len(runs) > 1 else "")
        for number, (run, column) in enumerate(zip(runs, columns, strict=True))
        if column[key]
    ]
    ends = ", ".join(f"{trace.name} ends at {trace.columns[key][-1]:.4g}" for trace in traces)
    return Figure(name, views, traces, f"Curves of {y_title}: {ends}.", switch="over")


def _figures_table(runs: Sequence[Shown], comparable: bool, command: str) -> Section:
    if len(runs) == 1:
        header, rows = planned_and_measured(runs[0].figure)
        notes = explanations(runs[0].record, runs[0].figure)
        return Section("Planned and measured", html=table(header, rows) + listing(notes), command=command)
    loss = common_loss([finite_evaluations(run.record) for run in runs]) if comparable else None
    cells = overview([run.record for run in runs], [run.figure for run in runs], loss)
    # Words are in the section of the runs; a row a run, since a phone has no room for a column a run.
    cells = [cell for cell in cells if cell[0] not in ("method", "profile", "trained on")]
    rows = [[run.label, *(values[number] for _, values in cells)] for number, run in enumerate(runs)]
    return Section("Figures", html=table(["run", *(label for label, _ in cells)], rows), command=command)


def _memory(runs: Sequence[Shown], command: str) -> Section:
    """Return the section with planned memory by part, and the measured peak below it."""
    planned = [run.record.plan["chosen"]["memory_bytes"] for run in runs]
    measured = [run.figure["memory_bytes"]["measured"] for run in runs]
    totals = [run.figure["memory_bytes"]["planned"] for run in runs]
    scale, unit = byte_scale([*totals, *measured])
    traces = [
        Trace(
            part, f"part{number}",
            {"bytes": [parts[part] / scale for parts in planned], "row": [3.0 * i for i in range(len(runs))]},
            "bar",
            [f"{run.label}, planned: {part} {bytes_text(p[part])}" for run, p in zip(runs, planned, strict=True)],
        )
        for number, part in enumerate(PARTS)
        if any(parts[part] for parts in planned)
    ]  # fmt: skip
    found = [(i, size) for i, size in enumerate(measured) if size is not None]
    if found:
        columns = {"bytes": [size / scale for _, size in found], "row": [3.0 * i + 1 for i, _ in found]}
        words = [f"{runs[i].label}, measured: {bytes_text(size)}" for i, size in found]
        traces.append(Trace("measured", "measured", columns, "bar", words))
    notes: list[tuple[float, float, str]] = []
    rows: list[str] = []
    for i, (total, size) in enumerate(zip(totals, measured, strict=True)):
        notes.append((total / scale, 3.0 * i, bytes_text(total)))
        more = "not measured yet" if size is None else f"{bytes_text(size)}, {_beside_plan(size / total - 1)}"
        notes.append(((size or 0) / scale, 3.0 * i + 1, more))
        rows += ["planned", "measured", ""]
    figure = Figure(
        "memory",
        [View("", "bytes", "row", f"memory of a device's tensors ({unit})", "")],
        traces,
        "Bars of memory: "
        + "; ".join(
            f"{r.label} planned {bytes_text(t)}, measured {bytes_text(m)}"
            for r, t, m in zip(runs, totals, measured, strict=True)
        ),
        rows[:-1],
        [(3.0 * i - 0.8, run.label) for i, run in enumerate(runs)] if len(runs) > 1 else [],
        [({"bytes": x}, y, text) for x, y, text in notes],
        [(trace.colour, trace.name) for trace in traces],
        HEAD + BAR * len(rows),
    )
    lead = (
        "Planned memory by part, and the allocator's peak of one device's program, run alone, which has no parts. What "
        "the allocator and the device's system hold beside tensors is not drawn."
    )
    return Section("Memory, planned against measured", lead, figure, command=command)


def _beside_plan(more: float) -> str:
    return "as planned" if abs(more) < 5e-4 else f"{more:+.1%}"


def _time(runs: Sequence[Shown], command: str) -> Section | None:
    """Return the section with time by compute, exchange and pauses; None before the first step."""
    bars: list[tuple[int, str, dict[str, float]]] = []
    for number, run in enumerate(runs):
        for name, parts in (("planned", _planned_time(run)), ("simulated", _simulated_time(run))):
            if parts and sum(parts.values()) > 0:
                bars.append((number, name, parts))
        measured = run.figure["wall_s"]["measured"]
        if run.record.is_launched and measured:
            bars.append((number, "measured", {"measured, undivided": measured}))
    if not bars:
        return None
    totals = [sum(parts.values()) for _, _, parts in bars]
    scale, unit = second_scale(totals)
    places: list[float] = []
    rows: list[str] = []
    groups: list[tuple[float, str]] = []
    place = -1.0
    for at, (number, name, _) in enumerate(bars):
        is_new = at == 0 or bars[at - 1][0] != number
        place += (2.0 if at else 1.0) if is_new else 1.0
        if is_new and len(runs) > 1:
            groups.append((place - 0.8, runs[number].label))
        rows += [""] * (int(place) - len(rows)) + [name]
        places.append(place)
    colours = {
        "compute": "compute", "exchange": "exchange", "pauses": "pause", "compute and pauses": "compute",
        "measured, undivided": "measured",
    }  # fmt: skip
    traces = []
    for part, colour in colours.items():
        drawn = [i for i, (_, _, parts) in enumerate(bars) if parts.get(part)]
        if drawn:
            values = [bars[i][2][part] for i in drawn]
            columns: dict[str, list[float | None]] = {
                "seconds": [value / scale for value in values],
                "share": [100 * value / totals[i] for value, i in zip(values, drawn, strict=True)],
                "row": [places[i] for i in drawn],
            }
            words = [
                f"{runs[bars[i][0]].label}, {bars[i][1]}: {part} {seconds_text(value)}, {value / totals[i]:.1%}"
                for value, i in zip(values, drawn, strict=True)
            ]
            traces.append(Trace(part, colour, columns, "bar", words))
    views = [
        View("time", "seconds", "row", f"time of the steps done ({unit})", ""),
        View("shares", "share", "row", "share of the time (%)", ""),
    ]
    if max(totals) > WIDE_RANGE * min(totals):
        views.reverse()
    about = [f"{runs[n].label} {name} {seconds_text(t)}" for (n, name, _), t in zip(bars, totals, strict=True)]
    figure = Figure(
        "time", views, traces,
        f"Bars of time: {'; '.join(about)}",
        rows, groups,
        [({"seconds": t / scale, "share": 100.0}, y, seconds_text(t)) for t, y in zip(totals, places, strict=True)],
        [(trace.colour, trace.name) for trace in traces],
        HEAD + BAR * (len(rows) + 1), "as",
    )  # fmt: skip
    lead = "Planned and simulated seconds are those of the profile's hardware; pauses are evaluations and checkpoints."
    return Section("Time by compute, exchange and pauses", lead, figure, command=command)


def _planned_time(run: Shown) -> dict[str, float]:
    """Return the planned seconds of the steps done, by part; nothing where the plan's version has no parts."""
    chosen = run.record.plan["chosen"]
    if not {"training_s", "exchange_s", "wall_s"} <= chosen.keys():
        return {}
    share = run.figure["steps"] / run.figure["planned_steps"]
    exchange_s = chosen["exchange_s"] * num_rounds(run.record.run)
    seconds = {
        "compute": chosen["training_s"] - exchange_s,
        "exchange": exchange_s,
        "pauses": chosen["wall_s"] - chosen["training_s"],
    }
    return {part: share * value for part, value in seconds.items()}


def _simulated_time(run: Shown) -> dict[str, float]:
    """Return the simulated seconds so far, by part."""
    step = run.record.last("step")
    if step is None:
        return {}
    total_s, exchange_s = run.figure["wall_s"]["simulated"], step["simulated_exchange_s"]
    if "simulated_pause_s" not in step:  # recorded by an earlier version
        return {"compute and pauses": total_s - exchange_s, "exchange": exchange_s}
    compute_s = step["simulated_s"] - exchange_s - step["simulated_pause_s"]
    # A pause after the last step is in the newer clocks alone.
    return {"compute": compute_s, "exchange": exchange_s, "pauses": max(0.0, total_s - exchange_s - compute_s)}


def _diagnostics(runs: Sequence[Shown], command: str) -> Section | None:
    """Return the section with one diagnostic figure at a time over the steps; None where no run has any."""
    found = {key for run in runs for point in run.figure["diagnostics"] for key in point if key in LABELS}
    if not found:
        return None
    keys = [key for key in LABELS if key in found and key not in CONSTANT]
    most = max(LEAST_DRAWN, _most_points(runs) // len(keys))
    traces = []
    for number, run in enumerate(runs):
        points = run.figure["diagnostics"]
        if points:
            # Evenly, since one thinning cannot keep the extremes of every figure.
            every = -(-len(points) // most)
            points = [*points[:-1:every], points[-1]]
            columns = {key: [point.get(key) for point in points] for key in ("step", *keys)}
            label = run.label if len(runs) > 1 else ""
            traces.append(Trace(run.label, run.colour, columns, "line", run=number, label=label))
    views = [View(LABELS[key].strip(), "step", key, "steps", LABELS[key].strip()) for key in keys]
    figure = Figure("diagnostics", views, traces, "Curves of the runs' diagnostics over their steps.", switch="show")
    lead = "Figures of the heads' changes before a merge, and of gradients after it (docs/methods.md)."
    return Section("Diagnostics", lead, figure, command=command)


def _differences(runs: Sequence[Shown]) -> Section | None:
    """Return the section with the keys of run.toml in which the runs differ; None for one run."""
    if len(runs) == 1:
        return None
    settings = [
        {f"{name}.{key}": value for name, keys in run.record.run.model_dump().items() for key, value in keys.items()}
        for run in runs
    ]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    shared: list[list[str]] = []
    own: list[list[str]] = []
    for key in keys:
        values = [_value_text(setting[key]) if key in setting else "-" for setting in settings]
        if len(set(values)) > 1:
            (shared if all(key in setting for setting in settings) else own).append([key, *values])
    header = ["key", *(run.label for run in runs)]
    if not shared:
        return Section("Settings", "The runs have equal run.tomls.")
    more = f"Keys that only some of the methods have ({len(own)})"
    return Section(
        "Settings that differ",
        f"Keys of run.toml with different values; {len(keys) - len(shared) - len(own)} others are equal.",
        html=table(header, shared, words=True) + (folded(more, table(header, own, words=True)) if own else ""),
    )


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "not set" if value is None else str(value)


def _origins(runs: Sequence[Shown]) -> Section:
    """Return the section with the folder of each run, where it was trained, and the command that repeats it."""
    rows = [
        [
            run.label,
            str(run.record.path),
            describe(run.record.run),
            f"{run.figure['devices']} x {run.record.plan['profile']}",
            ", ".join(machine["processor"] for machine in run.figure["machines"]) or "-",
            shlex.join(["lte", "train", str(run.record.path / "run.toml"), "--out", f"{run.record.path}-again"]),
        ]
        for run in runs
    ]
    return Section(
        "The run" if len(runs) == 1 else "The runs",
        html=table(["run", "folder", "method", "planned for", "trained on", "to repeat it"], rows, words=True),
    )
