"""Compare runs in words: may their losses be compared, which reached the same loss first, and how each one ended.

Curves of several runs invite a comparison that is wrong where the runs read other data or other tokens. `lte report`
prints these sentences, and its page opens with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ltecli.console import memory_text
from ltecli.runs.evaluations import Evaluation, finite_evaluations
from ltecli.runs.figures import RunRecord
from simulate.common.processor import machine_text
from simulate.common.units import bytes_text, change_text, seconds_text
from simulate.config.method_table import BASELINE
from simulate.models.schema import text_sizes
from simulate.planning.candidate import describe
from simulate.planning.notes import draws_notes

NAMED = 4
"""Most runs that a sentence names one by one."""
DIGEST = 12
"""Characters of a digest that tell data apart."""


def run_labels(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each run folder: its last parts, as many as tell it from the others."""
    parts = [path.parts or (str(path),) for path in paths]
    labels = []
    for index, own in enumerate(parts):
        others = [other for at, other in enumerate(parts) if at != index and other != own]
        count = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        labels.append(str(Path(*own[-count:])))
    repeated, seen = Counter(labels), Counter[str]()
    for index, label in enumerate(labels):  # the same folder given twice
        seen[label] += 1
        labels[index] = label if repeated[label] == 1 else f"{label} ({seen[label]})"
    return labels


def incomparable(records: Sequence[RunRecord]) -> str | None:
    """Return a sentence on why the runs' losses cannot be compared; None where they can."""
    runs = [record.run for record in records]
    starts = [record.first("start") or {} for record in records]
    sources: list[str] = [
        start.get("data") or run.data.path or run.data.name or "-" for run, start in zip(runs, starts, strict=True)
    ]
    facts: dict[str, list[str]] = {"kind of data": ["text" if r.model.unit == "tokens" else "images" for r in runs]}
    if set(facts["kind of data"]) == {"text"}:
        facts["tokenizer"] = [run.data.tokenizer for run in runs]
        facts["vocabulary"] = [f"{text_sizes(run.model).vocab:,} tokens" for run in runs]
    digests = [str(start.get("data_sha256") or "")[:DIGEST] for start in starts]
    # A digest is of tokens: one text has two under two tokenizers. Runs of old versions have none.
    if all(digests) and len(set(facts.get("tokenizer", ()))) <= 1:
        # The same data may lie at two paths, and other data at the same path.
        if len(set(digests)) > 1:
            facts["data"] = [f"{source}, {digest}" for source, digest in zip(sources, digests, strict=True)]
    else:
        facts["data"] = sources
    labels = run_labels([record.path for record in records])
    different = [
        f"{key} ({'; '.join(f'{label}: {value}' for label, value in zip(labels, values, strict=True))})"
        if len(records) <= NAMED
        else f"{key} ({'; '.join(dict.fromkeys(values))})"
        for key, values in facts.items()
        if len(set(values)) > 1
    ]
    if not different:
        return None
    return f"Losses of these runs cannot be compared: they differ in {', and in '.join(different)}."


def reached_at(rows: Sequence[Evaluation], loss: float, figure: Callable[[Evaluation], float | None]) -> float | None:
    """Return a figure at the time when a run first had a validation loss, between two evaluations in proportion.

    None where it never had it, or did not record the figure.
    """
    if rows and rows[0].val_loss <= loss:
        return figure(rows[0])
    for before, after in pairwise(rows):
        if after.val_loss <= loss:
            share = (before.val_loss - loss) / (before.val_loss - after.val_loss)
            low, high = figure(before), figure(after)
            return None if low is None or high is None else low + share * (high - low)
    return None


def common_loss(runs: Sequence[Sequence[Evaluation]]) -> float | None:
    """Return the lowest validation loss that all runs have reached; None where one was not evaluated."""
    return max(min(row.val_loss for row in rows) for rows in runs) if runs and all(runs) else None


def verdict(records: Sequence[RunRecord], documents: Sequence[dict[str, Any]]) -> str:
    """Return in a sentence or two how a run stands, or which of several is first to the same loss."""
    if len(records) == 1:
        return _verdict_of_one(records[0], documents[0])
    labels = run_labels([record.path for record in records])
    if (reason := incomparable(records)) is not None:
        return reason
    evaluated = {
        label: rows for label, record in zip(labels, records, strict=True) if (rows := finite_evaluations(record))
    }
    missing = [label for label in labels if label not in evaluated]
    unseen = f" Not evaluated yet: {', '.join(missing)}." if missing else ""
    all_done = all(figure["steps"] == figure["planned_steps"] for figure in documents)
    if len(evaluated) < 2:
        return f"There is nothing to compare yet: evaluations of two runs are needed.{unseen}"
    return f"{_first_to_loss(evaluated)}{_lowest(evaluated, all_done)}{unseen}"


def _first_to_loss(runs: dict[str, list[Evaluation]]) -> str:
    loss = common_loss(list(runs.values()))
    assert loss is not None, "runs without evaluations are left out before"
    seconds = {label: reached_at(rows, loss, lambda row: row.simulated_s) or 0.0 for label, rows in runs.items()}
    sent = {label: reached_at(rows, loss, lambda row: row.sent_bytes) or 0.0 for label, rows in runs.items()}
    first, *others = sorted(runs, key=lambda label: seconds[label])
    named = others if len(others) < NAMED else [*others[: NAMED - 2], others[-1]]
    left_out = f" ({len(others) - len(named)} runs between them are in the table)" if len(named) < len(others) else ""
    rest = ", ".join(
        f"{label} takes {_ratio_text(seconds[label], seconds[first])} ({seconds_text(seconds[label])}, "
        f"{bytes_text(sent[label])})"
        for label in named
    )
    both = "both runs" if len(runs) == 2 else f"all {len(runs)} runs"
    return (
        f"{first} is first to a validation loss of {loss:.3f}, which {both} reached: {seconds_text(seconds[first])} "
        f"simulated, {bytes_text(sent[first])} sent a device; {rest}{left_out}."
    )


def _ratio_text(ours: float, first: float) -> str:
    return "as long" if not first or ours / first < 1.005 else f"{ours / first:,.3g} times as long"


def _lowest(runs: dict[str, list[Evaluation]], all_done: bool) -> str:
    ends = {label: rows[-1].val_loss for label, rows in runs.items()}
    best, *others = sorted(ends, key=lambda label: ends[label])
    rest = f" ({', '.join(f'{label} {ends[label]:.3f}' for label in others)})" if len(ends) <= NAMED else ""
    when = "at the end" if all_done else "so far"
    return f" Lowest {when}: {best}, {ends[best]:.3f}{rest}."


def _verdict_of_one(record: RunRecord, figure: dict[str, Any]) -> str:
    (label,) = run_labels([record.path])
    steps, planned = figure["steps"], figure["planned_steps"]
    if not steps:
        return f"{label} has not taken a step yet."
    is_done = steps == planned
    state = f"has finished its {steps:,} steps" if is_done else f"is at step {steps:,} of {planned:,}"
    if not is_done and (record.last("interrupt") or {}).get("step") == steps:
        state = f"was interrupted at step {steps:,} of {planned:,}"
    rows = finite_evaluations(record)
    if not rows:
        scores = f"it has not been evaluated yet, its training loss is {loss_text(figure['train_loss'])}"
    else:
        accuracy = "" if rows[-1].val_accuracy is None else f" and top-1 accuracy {rows[-1].val_accuracy:.1%}"
        scores = f"its validation loss is {rows[-1].val_loss:.3f}{accuracy}"
    wall = seconds_text(figure["wall_s"]["simulated"])
    hardware = f"{figure['devices']} x {record.plan['profile']}"
    sentences = [f"{label} {state}: {scores}, after {wall} on {hardware} (simulated)."]
    sentences += [f"B{line[1:]}." for line in savings(figure)]
    if figure["worse_than_guessing"]:
        sentences.append(f"{figure['worse_than_guessing'][0].upper()}{figure['worse_than_guessing'][1:]}.")
    return " ".join(sentences)


def savings(figure: dict[str, Any]) -> list[str]:
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


def planned_and_measured(figure: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of one run: each figure as planned, simulated, counted and measured."""
    rows = []
    for label, key, text in (
        ("memory per device", "memory_bytes", bytes_text),
        ("sent per device", "sent_bytes_per_device", bytes_text),
        ("wall-clock", "wall_s", seconds_text),
        ("per step", "step_s", seconds_text),
    ):
        values = figure[key]
        cells = (values.get(source) for source in ("planned", "simulated", "counted", "measured"))
        rows.append([label, *(text(value) for value in cells), text(figure["dense"] and figure["dense"][key])])
    return ["", "planned", "simulated", "counted", "measured", "dense, planned"], rows


def explanations(record: RunRecord, figure: dict[str, Any]) -> list[str]:
    """Return lines on what the table's memory and time include, which layers pick columns, and who trained."""
    memory = figure["memory_bytes"]
    # The same column means two things, so the line under the table says which.
    by = "the launched processes' time" if record.is_launched else "this machine's time for simulating all devices"
    return [
        *draws_notes(record.run, record.run.model.shape()),
        f"memory: planned {memory_text(memory['planned'], memory['allocator'], memory['reserved'])}; the table has the "
        "tensors, measured as the allocator's peak of one device's program, run alone",
        "time: with evaluations and a launched run's checkpoints; simulated is the time of the profile's hardware; "
        f"measured is {by}",
        *(f"trained on: {machine_text(machine)}" for machine in figure["machines"]),
    ]


def overview(
    records: Sequence[RunRecord], documents: Sequence[dict[str, Any]], loss: float | None
) -> list[tuple[str, list[str]]]:
    """Return the figures that compare runs: a label, and a cell for each run; `loss` is one that all have reached.

    Figures that no run has are left out.
    """
    rows: list[tuple[str, Callable[[RunRecord, dict[str, Any]], str]]] = [
        ("method", lambda r, f: describe(r.run)),
        ("profile", lambda r, f: f"{f['devices']} x {r.plan['profile']}"),
        ("trained on", lambda r, f: ", ".join(m["processor"] for m in f["machines"]) or "-"),
        ("steps", lambda r, f: f"{f['steps']:,} of {f['planned_steps']:,}"),
        ("tokens", lambda r, f: f"{f['tokens']:,}" if f["unit"] == "tokens" else "-"),
        ("samples", lambda r, f: f"{f['samples']:,}"),
        ("train loss", lambda r, f: loss_text(f["train_loss"])),
        ("validation loss", lambda r, f: loss_text(f["val_loss"])),
        ("top-1 accuracy", lambda r, f: "-" if f["val_accuracy"] is None else f"{f['val_accuracy']:.2%}"),
    ]
    if loss is not None:
        rows += [
            (
                f"to loss {loss:.3f}, simulated",
                lambda r, f: seconds_text(reached_at(finite_evaluations(r), loss, lambda row: row.simulated_s)),
            ),
            (
                f"to loss {loss:.3f}, sent per device",
                lambda r, f: bytes_text(reached_at(finite_evaluations(r), loss, lambda row: row.sent_bytes)),
            ),
        ]
    rows += [
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
    cells = [(label, [cell(r, f) for r, f in zip(records, documents, strict=True)]) for label, cell in rows]
    return [(label, values) for label, values in cells if set(values) != {"-"}]


def loss_text(value: float | None) -> str:
    """Return a loss with four digits, "-" for None."""
    return "-" if value is None else f"{value:.4f}"
