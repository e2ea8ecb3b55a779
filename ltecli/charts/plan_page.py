"""The page of `lte plan --html`: the answers, all candidates by time, memory and bytes, the choice, a timeline.

A list of the best candidates hides how steep the way to the next best is, and what memory buys. `lte plan` writes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from ltecli.charts.page import Figure, Page, Section, Trace, View, answers, folded, listing, table
from ltecli.charts.scales import byte_scale, log_ticks, second_scale
from ltecli.charts.timeline import devices_text
from simulate.common.units import bytes_text, seconds_text
from simulate.common.version import version
from simulate.planning.candidate import Candidate, Rejected, candidate_of, describe
from simulate.planning.explain import Why
from simulate.planning.planner import Plan
from simulate.planning.time_ranges import equivalent_range, time_text
from simulate.planning.verdict import verdict_of
from simulate.planning.what_if import DRAWN_ROUNDS, Outlook
from simulate.timeline.engine import KINDS

MOST_CANDIDATES = 3000
"""Most candidates that are drawn: the best ones, and all on a frontier."""
WIDE_RANGE = 10.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
FILE_OPTIONS = ("--html", "--csv", "--out", "-o", "--timeline-svg")
OUTPUT_FLAGS = ("--force", "--json", "--why", "--timeline", "--all")
Figures = dict[str, Callable[[Candidate], float]]
FIGURES: Figures = {
    "time": lambda candidate: candidate.equivalent_wall_s,
    "memory": lambda candidate: float(candidate.memory.total),
    "sent": lambda candidate: candidate.equivalent_sent_bytes,
}
"""Coordinates of a candidate: seconds to equal loss, bytes of a device's memory, and bytes that it sends until then."""
TITLES = {
    "time": "time to dense's loss",
    "memory": "memory of a device",
    "sent": "sent by a device to dense's loss",
}
VIEWS = (
    ("time and memory", "memory", "time"),
    ("time and bytes", "sent", "time"),
    ("bytes and memory", "memory", "sent"),
)


def plan_html(plan: Plan, why: Why | None, outlook: Outlook | None, told: Sequence[str], command: str) -> str:
    """Return the page of a plan as an HTML document; `told` are lines on the timeline, `why` and `outlook` its parts.

    A plan in which nothing fits has neither, and says what would.
    """
    verdict = verdict_of(plan)
    shape = plan.base.shape()
    first = verdict.answers[0]
    worth = next((a for a in verdict.answers if a.question.startswith("Worth")), None)
    fits = f"It fits: {first.because}." if plan.chosen else f"It does not fit: {first.because}."
    said = fits
    if plan.chosen is not None and worth is not None:
        time = time_text(plan.chosen, equivalent_range(plan.chosen))
        said += f" {describe(plan.chosen.run)} takes {time} to dense's loss. Worth it: {worth.answer}, {worth.because}."
    shorter = _without_outputs(command)
    sections = [
        Section("In short", html=answers([(a.question, a.answer, a.because) for a in verdict.answers])),
        Section("Caveats", html=listing(verdict.warnings)) if verdict.warnings else None,
        _frontier(plan, why, f"{shorter} --csv -"),
        _explained(plan, why, f"{shorter} --why") if plan.chosen and why else None,
        _rivals(plan, f"{shorter} --all"),
        _timeline(plan, outlook, told, f"{shorter} --timeline") if outlook else None,
        Section("Notes", html=listing(plan.notes)) if plan.notes else None,
    ]
    page = Page(
        title=f"Plan: {shape.name} on {plan.base.cluster.devices} x {plan.profile.name}",
        verdict=said,
        sections=[section for section in sections if section is not None],
        command=command,
        kind=verdict.title,
        made=f"lte {version()}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}; drawn by plotly.js (MIT licence)",
    )
    return page.html()


def _without_outputs(command: str) -> str:
    """Return a command line without the options that say what it writes and shows."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        if word in FILE_OPTIONS:
            next(words, None)  # its file
        elif word not in OUTPUT_FLAGS and not word.startswith(tuple(f"{option}=" for option in FILE_OPTIONS)):
            kept.append(word)
    return shlex.join(kept)


def _frontier(plan: Plan, why: Why | None, command: str) -> Section:
    """Return the section with all candidates that fit, the best of other methods, the choice and its neighbours."""
    rivals = [rival for rival in plan.rivals if isinstance(rival, Candidate)]
    everyone = [*plan.candidates, *rivals]
    if not everyone:
        return Section("Candidates", f"None of {len(plan.rejected):,} candidates fits; there is nothing to draw.")
    fronts = [_front(everyone, x, y) for _, x, y in VIEWS]
    # By identity: candidates have no hash, and equal figures are not the same candidate.
    kept = {id(c): c for c in (*everyone[:MOST_CANDIDATES], *rivals, *(c for front in fronts for c in front))}
    drawn = list(kept.values())
    scales = {
        key: (second_scale if key == "time" else byte_scale)(of(candidate) for candidate in drawn)
        for key, of in FIGURES.items()
    }

    def columns(candidates: Sequence[Candidate]) -> dict[str, list[float | None]]:
        return {key: [of(candidate) / scales[key][0] for candidate in candidates] for key, of in FIGURES.items()}

    traces, key = [], []
    own = [candidate for candidate in drawn if all(candidate is not rival for rival in rivals)]
    for number, method in enumerate(dict.fromkeys(candidate.run.method.name for candidate in own)):
        of_method = [candidate for candidate in own if candidate.run.method.name == method]
        colour = f"run{number}"
        traces.append(Trace(method, colour, columns(of_method), "dots", [_words(candidate) for candidate in of_method]))
        key.append((colour, method))
    if rivals:
        words = [_words(candidate) for candidate in rivals]
        traces.append(Trace("other method", "run2", columns(rivals), "diamonds", words))
        key.append(("run2", "diamonds: other methods, each at its best"))
    for index, front in enumerate(fronts):
        traces.append(Trace("frontier", "front", columns(front), "front", only=index))
    key.append(("front", "dotted: nothing is better in both"))
    neighbours = [n.candidate for n in why.neighbours if id(n.candidate) in kept] if why else []
    if neighbours:
        words = [_words(candidate) for candidate in neighbours]
        traces.append(Trace("neighbour", "soft", columns(neighbours), "ring", words))
        key.append(("soft", "rings: neighbours of the choice"))
    marked = [("chosen", plan.chosen), ("dense", plan.dense if isinstance(plan.dense, Candidate) else None)]
    for label, candidate in marked:
        if candidate is not None and not (label == "dense" and candidate is plan.chosen):
            traces.append(Trace(label, "ink", columns([candidate]), "ring", [_words(candidate)], label=label))
    smallest = min(device.usable_bytes for device in plan.profile.devices(plan.base.cluster.devices))
    views = [_view(label, x, y, drawn, scales, smallest) for label, x, y in VIEWS]
    left_out = len(everyone) - len(drawn)
    lead = (
        f"{len(plan.candidates):,} ways to train that fit, {len(plan.rejected):,} do not. Hover for settings; lower "
        "and further left is better." + (f" The {left_out:,} worst are not drawn." if left_out else "")
    )
    about = f"{len(drawn)} candidates by time, memory and bytes"
    figure = Figure("candidates", views, traces, about, key=key, height=500, switch="show")
    return Section("Candidates", lead, figure, command=command)


def _view(
    label: str, x: str, y: str, drawn: Sequence[Candidate], scales: dict[str, tuple[float, str]], limit_bytes: int
) -> View:  # fmt: skip
    ticks: dict[str, list[tuple[float, str]]] = {}
    is_log, titles = {}, {}
    for axis in (x, y):
        values = [FIGURES[axis](candidate) for candidate in drawn]
        scale, unit = scales[axis]
        # A device that sends nothing has no place on a logarithmic axis.
        is_log[axis] = min(values) > 0 and max(values) > WIDE_RANGE * min(values)
        titles[axis] = f"{TITLES[axis]}, logarithmic" if is_log[axis] else f"{TITLES[axis]} ({unit})"
        kind = "seconds" if axis == "time" else "bytes"
        found = log_ticks(kind, min(values) / 2, 2 * max(values)) if is_log[axis] else []
        ticks[axis] = [(value / scale, text) for value, text in found]
    scale = scales["memory"][0]
    fits = x == "memory" and limit_bytes < 2 * max(candidate.memory.total for candidate in drawn)
    return View(
        label, x, y, titles[x], titles[y], is_log[x], is_log[y],
        x_kind="seconds" if x == "time" else "bytes", x_scale=scales[x][0], x_ticks=ticks[x], y_ticks=ticks[y],
        x_limit=(limit_bytes / scale, f"{bytes_text(limit_bytes)} may be used") if fits else None,
    )  # fmt: skip


def _front(candidates: Sequence[Candidate], x: str, y: str) -> list[Candidate]:
    """Return the candidates of which no other is better in both coordinates, from the left."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (FIGURES[x](c), FIGURES[y](c))):
        if not front or FIGURES[y](candidate) < FIGURES[y](front[-1]):
            front.append(candidate)
    return front


def _words(candidate: Candidate) -> str:
    return (
        f"{describe(candidate.run)}\n{seconds_text(candidate.equivalent_wall_s)} to dense's loss\n"
        f"{bytes_text(candidate.memory.total)} a device\n{bytes_text(candidate.equivalent_sent_bytes)} sent"
    )


def _explained(plan: Plan, why: Why, command: str) -> Section:
    assert plan.chosen is not None
    changes = [
        [
            change.what,
            "-" if change.gain is None else f"{change.gain:.2f}x",
            "cannot be planned"
            if change.chosen is None
            else "the same"
            if change.same
            else describe(change.chosen.run),
        ]
        for change in why.changes
    ]
    neighbours = [[neighbour.key, neighbour.value, neighbour.reason] for neighbour in why.neighbours]
    html = table(["neighbour", "instead", "not chosen because"], neighbours, words=True)
    html += table(["with", "gain", "chosen then"], changes, words=True)
    if why.choices:
        made = [[choice.key, choice.value, choice.worth] for choice in why.choices]
        html += table(["taken as best known", "value", "worth"], made, words=True)
    parts = plan.chosen.memory.parts()
    rows = [[part, bytes_text(size)] for part, size in parts.items()] + [["all", bytes_text(plan.chosen.memory.total)]]
    html += folded("Memory of the choice by part", table(["part", "a device"], rows))
    reason = f"{why.summary.capitalize()}: {why.reason}."
    return Section("Why this choice", reason, html=html, command=command)


def _rivals(plan: Plan, command: str) -> Section | None:
    if not plan.rivals:
        return None
    ranked = sorted(plan.rivals, key=lambda rival: (isinstance(rival, Rejected), candidate_of(rival).equivalent_wall_s))
    rows = []
    for rival in ranked:
        candidate = candidate_of(rival)
        unfit = "" if isinstance(rival, Candidate) else " (too slow)" if rival.late_s else " (does not fit)"
        rows.append(
            [
                describe(candidate.run) + unfit,
                time_text(candidate, equivalent_range(candidate)),
                bytes_text(candidate.memory.total),
                bytes_text(candidate.equivalent_sent_bytes),
            ]
        )
    lead = (
        "The best candidate of each method that the plan does not choose from by itself; plan one with --method NAME."
    )
    shown = table(["method", "to dense's loss", "memory", "sent"], rows)
    return Section("Other methods", lead, html=shown, command=command)


def _timeline(plan: Plan, outlook: Outlook, told: Sequence[str], command: str) -> Section:
    """Return the section with the first rounds of some devices, as --timeline draws them."""
    assert plan.chosen is not None
    timeline = outlook.timeline
    devices = sorted({span.device for span in timeline.spans})
    kinds = [device.kind for device in plan.profile.devices(plan.chosen.run.cluster.devices)]
    scale, unit = second_scale(span.end_s for span in timeline.spans)
    traces = []
    for kind in KINDS:
        spans = [span for span in timeline.spans if span.kind == kind]
        if spans:
            columns: dict[str, list[Any]] = {
                "base": [span.start_s / scale for span in spans],
                "seconds": [(span.end_s - span.start_s) / scale for span in spans],
                "row": [devices.index(span.device) for span in spans],
            }
            words = [
                f"device {span.device}, {kinds[span.device]}: {kind} {seconds_text(span.end_s - span.start_s)}"
                for span in spans
            ]
            traces.append(Trace(kind, kind, columns, "bar", words))
    figure = Figure(
        "timeline",
        [View("", "seconds", "row", f"simulated time ({unit})", "")],
        traces,
        "; ".join(told),
        [f"device {device}" for device in devices],
        key=[(trace.colour, trace.name) for trace in traces],
        height=90 + 34 * len(devices),
    )
    drawn = min(DRAWN_ROUNDS, timeline.rounds)
    lead = f"The first {drawn} of {timeline.rounds} simulated rounds." if drawn > 1 else "The first simulated round."
    left_out = devices_text(timeline)
    return Section("Timeline", lead, figure, command=command, html=listing([*told, *([left_out] if left_out else [])]))
