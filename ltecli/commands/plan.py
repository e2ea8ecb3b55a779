"""lte plan: make the plan of a request, show it, and write the choice as run.toml.

plan_request.py turns options into a plan; this module prints it: the ranked candidates, the choice beside dense
training, the other methods' best, and notes. `lte train` takes nearest_miss_text from here.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltecli.commands.verify import Verified, too_large_text, verify_choice
from ltecli.console import Output, memory_text, plain_table
from ltecli.output_paths import CsvTarget, check_distinct, check_file, write_file
from ltecli.plan_request import PlanArgs, plan_request
from simulate.common.errors import NothingFeasibleError
from simulate.common.run_files import RUN_FILE
from simulate.common.units import bytes_text, bytes_unit, seconds_text, seconds_unit
from simulate.config.hardware import Device
from simulate.config.profile_slips import link_text
from simulate.config.run import dump_run, with_absolute_paths
from simulate.costs.memory import Memory
from simulate.planning.candidate import Candidate, Rejected, candidate_of, describe
from simulate.planning.plan_csv import candidates_csv
from simulate.planning.planner import Plan
from simulate.planning.time_ranges import equivalent_range, time_range, time_text, wall_range
from simulate.planning.verdict import Verdict, verdict_of

if TYPE_CHECKING:
    from ltecli.commands.explain import ExplainArgs

SHOWN_CANDIDATES = 8
LINE, SHOWN_WARNINGS = 80, 3
"""Characters of a line of the verdict, and its most warnings: what one looks at in one glance."""
COLUMNS = ("memory/device", "sent/round", "sent/step", "step", "round", "wall", "x samples", "to equal loss")
SECONDARY = ("alike", "sent/round", "step", "round", "x samples")
"""Columns that a narrow terminal leaves out."""


def plan_command(
    request: PlanArgs, out: Path | None, force: bool, top: int | None, as_json: bool,
    to_explain: ExplainArgs | None = None, verify: bool = False, show_all: bool = False, csv: Path | None = None,
    command: str = "",
) -> int:  # fmt: skip
    """Plan, show, and write the choice where `out` asks for it; raises NothingFeasibleError where nothing fits.

    The verdict is shown, or with `show_all` every figure and note. With `verify`, trace the choice's training on fake
    tensors, and compare its memory with the plan; raises NothingFeasibleError, and writes nothing, where the device
    cannot hold what was traced. `csv` is a file for all candidates, "-" for stdout in the place of what is printed, and
    `command` the command line for a page's foot.
    """
    table = CsvTarget.of(csv, force, as_json)
    check_distinct({"-o": out, "--csv": table.path, **(to_explain.files if to_explain else {})})
    if out is not None:
        check_file(out, force, RUN_FILE)
    if to_explain is not None:
        # Refuse wrong options before seconds are spent on the plan.
        to_explain.check()
    plan = plan_request(request, to_train=out is not None)
    output = Output(as_json, is_mute=table.is_stdout)
    explained = None
    if to_explain is not None:
        from ltecli.commands.explain import explain_plan, show_explained, write_page, write_picture

        explained = explain_plan(plan, to_explain)
    verified = verify_choice(plan) if verify and plan.chosen is not None else None
    verdict = verdict_of(plan)
    # Files come before what is printed: whoever reads that may leave early, as head does.
    if out is not None and plan.chosen is not None and not (verified and not verified.fits):
        write_run(out, plan)
    if explained is not None and to_explain is not None:
        write_picture(plan, explained, to_explain)
        write_page(plan, explained, to_explain, command)
    if table.is_wanted:
        table.write(candidates_csv(plan, top))
    if as_json:  # building the JSON of thousands of candidates takes time
        added = explained.to_dict() if explained else {"why": None, "timeline": None}
        output.json(
            {
                **plan.to_dict(top),
                "verdict": verdict.to_dict(),
                **added,
                **({"verify": verified.to_dict()} if verified else {}),
            }
        )
    if show_all or top is not None:
        show_details(plan, output, top or SHOWN_CANDIDATES)
    else:
        show_verdict(verdict, output)
    if explained is not None and to_explain is not None:
        show_explained(plan, explained, to_explain, output)
    if verified and plan.chosen:
        _show_verified(plan.chosen, verified, output)
    if plan.chosen is None:
        raise NothingFeasibleError(nearest_miss_text(plan))
    if verified and not verified.fits:
        raise NothingFeasibleError(too_large_text(plan, verified))
    if table.path is not None:
        output.hint(f"wrote {table.path}")
    if out is not None:
        output.hint(f"wrote {out}; next: lte train {out}")
    else:
        asked = {"--all": show_all or top is not None, "--verify": verify}
        if to_explain is not None:
            asked |= {"--why": to_explain.why, "--timeline": to_explain.wants_timeline}
        more = "  ".join(flag for flag in ("--all", "--why", "--timeline", "--verify") if not asked.get(flag))
        output.hint(f"next  lte plan ... -o run.toml        more  {more}" if more else "next  lte plan ... -o run.toml")
    return 0


def write_run(path: Path, plan: Plan) -> None:
    """Write a plan's choice as run.toml."""
    assert plan.chosen is not None, "a plan without a choice has no run"
    # Paths in a run.toml are relative to it, those of the command line to the current folder.
    is_here = path.parent.resolve() == Path.cwd().resolve()
    run = plan.chosen.run if is_here else with_absolute_paths(plan.chosen.run)
    write_file(path, dump_run(run, plan.profile))


def show_verdict(verdict: Verdict, output: Output) -> None:
    """Print the answers, and the caveats that matter most, in lines of at most 80 characters."""
    for line in textwrap.wrap(verdict.title, LINE):
        output.heading(line)
    output.text("")
    answers = max(len(answer.answer) for answer in verdict.answers if answer.because)
    for answer in verdict.answers:
        start = f"  {answer.question:<11}"
        text = f"{answer.answer:<{answers}}  {answer.because}" if answer.because else answer.answer
        indent = " " * (len(start) + (answers + 2 if answer.because else 0))
        # Two blanks between an answer and its reason stay, so only the reason is wrapped.
        for line in textwrap.wrap(start + text, LINE, subsequent_indent=indent, replace_whitespace=False):
            output.text(line)
    if verdict.warnings:
        output.text("")
    for warning in verdict.warnings[:SHOWN_WARNINGS]:
        for line in textwrap.wrap(f"! {warning}", LINE, subsequent_indent="  "):
            output.text(line)


def nearest_miss_text(plan: Plan) -> str:
    """Return a line about the candidate that comes closest to fitting, and what would make it fit."""
    miss = plan.nearest_miss()
    assert miss is not None, "a plan without candidates has rejected at least one"
    if miss.late_s > 0:
        return (
            f"nothing reaches equal loss within {seconds_text(plan.choice.within_s)}: the nearest miss is "
            f"{describe(miss.candidate.run)}, which needs {seconds_text(miss.candidate.equivalent_wall_s)}; allow more "
            "--within, train on fewer tokens, or add devices"
        )
    model, short_bytes = plan.base.model, {"device": miss.short_bytes, "host": miss.host_short_bytes}
    more = " and ".join(f"{bytes_text(size)} more on each {memory}" for memory, size in short_bytes.items() if size)
    keys = [model.larger_with] if miss.short_bytes else []  # a smaller value shrinks activations, not host memory
    layers = getattr(model, "layers", None)
    keys += [] if layers is None else [f"model.layers (now {layers})"]
    return (
        f"nothing fits profile {plan.profile.name}: the nearest miss is {describe(miss.candidate.run)}, which "
        f"{miss.reason}; {more} would do" + (f", or a smaller --set {' or '.join(keys)}" if keys else "")
    )


def show_details(plan: Plan, output: Output, top: int = SHOWN_CANDIDATES) -> None:
    """Print all figures and notes, and the `top` best candidates."""
    shape, base = plan.base.shape(), plan.base
    output.heading(
        f"{shape.name}: {shape.all_parameters:,} parameters ({shape.adapted_parameters:,} adapted), "
        f"{plan.tokens:,} {base.model.unit} on {base.cluster.devices} x {plan.profile.name}"
    )
    link = plan.profile.link
    output.text(
        f"planned: {len(plan.candidates):,} candidates fit, {len(plan.rejected):,} do not; link {link.topology}, "
        f"{link_text(plan.profile, base.cluster.devices)}, {seconds_text(link.latency_s)} latency"
    )
    if plan.candidates:
        output.table(_candidate_table(plan, top), secondary=SECONDARY)
    if plan.rejected:
        # One example shows what is short; thousands are rejected for the same reason.
        nearest = min(plan.rejected, key=lambda rejected: rejected.missing)
        output.text(f"rejected, for example: {describe(nearest.candidate.run)} {nearest.reason}")
    if plan.chosen is not None:
        _show_choice(plan, plan.chosen, output)
    # Methods that the planner does not choose by itself stand apart, each with its best candidate.
    if plan.rivals:
        output.text("")
        output.heading(
            "other methods, each at its best here; plan one with --method NAME; AdamW and full messages where no "
            "others are named"
        )
        output.table(_rival_table(plan), secondary=SECONDARY)
    for note in plan.notes:
        output.text(f"note: {note}")


def _choices_table(*first: str) -> Any:
    """Return an empty table of candidates; on a narrow terminal the method wraps, and no figure does."""
    table = plain_table(*first, *COLUMNS)
    for column in table.columns:
        column.no_wrap = column.header != "method"
    table.columns[first.index("method")].justify = "left"
    return table


def _candidate_table(plan: Plan, top: int) -> Any:
    """Return the table of the best candidates of the `top` best ideas, and of the choice at any rank.

    Candidates of one idea differ in heads, format and transport alone, and often by less than estimates are good for.
    """
    by_idea: dict[tuple[Any, ...], list[tuple[int, Candidate]]] = {}
    for rank, candidate in enumerate(plan.candidates, 1):
        by_idea.setdefault(_idea(candidate), []).append((rank, candidate))
    table = _choices_table("#", "method", "alike")
    first = plan.candidates[0]
    for index, alike in enumerate(by_idea.values()):
        for rank, candidate in alike:
            is_chosen, is_best = candidate is plan.chosen, (rank, candidate) == alike[0]
            if is_chosen or (is_best and index < top):
                table.add_row(
                    f"{rank}{'*' if is_chosen else ''}",
                    describe(candidate.run) + (" (!)" if candidate.warnings else ""),
                    f"{len(alike) - 1:,} more" if is_best and len(alike) > 1 else "",
                    *_cells(candidate, first),
                )
    return table


def _idea(candidate: Candidate) -> tuple[Any, ...]:
    """Return the keys that make a candidate another way to train, not another spelling of one."""
    method, train = candidate.run.method, candidate.run.train
    keys = (getattr(method, key, None) for key in ("rank", "merge_every"))
    return method.name, *keys, train.micro_batch, train.accumulate, train.activation_checkpointing


def _cells(candidate: Candidate, first: Candidate) -> list[str]:
    """Return a candidate's cells under COLUMNS, in the units of the table's first row: a column has one unit."""
    (bytes_of, times_of), (sizes, times) = _values(first), _values(candidate)
    cells = [
        *(bytes_text(x, bytes_unit(unit) if unit else None) for x, unit in zip(sizes, bytes_of, strict=True)),
        *(time_text(candidate, x, seconds_unit(unit[1])) for x, unit in zip(times, times_of, strict=True)),
    ]
    return [*cells[:-1], f"{candidate.samples_factor:.2f}", cells[-1]]


def _values(candidate: Candidate) -> tuple[list[float], list[tuple[float, float]]]:
    """Return a candidate's bytes and ranges of seconds, as COLUMNS have them."""
    sent, step_s, round_s = candidate.sent_bytes_per_round, candidate.step_s, candidate.time.round_s
    sizes = [candidate.memory.total, sent, sent / candidate.time.steps]
    return sizes, [(step_s, step_s), (round_s, round_s), wall_range(candidate), equivalent_range(candidate)]


def _rival_table(plan: Plan) -> Any:
    """Return the table of the other methods' best candidates: those that fit first, then by time to equal loss."""
    table = _choices_table("method")
    # Two stable sorts: by time, then those that fit before those that do not.
    ranked = sorted(plan.rivals, key=lambda rival: candidate_of(rival).equivalent_wall_s)
    for rival in sorted(ranked, key=lambda rival: isinstance(rival, Rejected)):
        # Of what is rejected, some would fit and is slower than --within allows.
        unfit = "" if not isinstance(rival, Rejected) else " (too slow)" if rival.late_s else " (does not fit)"
        table.add_row(describe(candidate_of(rival).run) + unfit, *_cells(candidate_of(rival), candidate_of(ranked[0])))
    return table


def _show_choice(plan: Plan, chosen: Candidate, output: Output) -> None:
    dense = plan.dense.candidate if isinstance(plan.dense, Rejected) else plan.dense
    output.text("")
    output.heading(f"chosen: {describe(chosen.run)}")
    table = plain_table(
        "per device, planned", describe(chosen.run), f"dense: {describe(dense.run)}" if dense else "dense"
    )
    ours, theirs = _figures(chosen), _figures(dense) if dense else {}
    for name, value in ours.items():
        table.add_row(name, value, theirs.get(name, "-"))
    output.table(table)
    _show_classes(chosen, output)
    if isinstance(plan.dense, Rejected):
        output.text(f"dense does not fit: {plan.dense.reason}")
    elif dense and chosen is not dense:
        output.text(_comparison(chosen, dense))
    output.text(_memory_line(plan.tightest_device(), chosen.memory))
    phases = (f"{_phase(name)} {bytes_text(size)}" for name, size in chosen.memory_by_phase.items())
    output.text(f"memory by phase: {', '.join(phases)}")
    if chosen.host_memory_bytes:
        parts = (f"{_phase(name)} {bytes_text(size)}" for name, size in chosen.host_memory_by_part.items() if size)
        output.text(f"host memory: {bytes_text(chosen.host_memory_bytes)} ({', '.join(parts)})")
    for warning in chosen.warnings:
        output.text(f"warning: {warning}")


def _show_classes(chosen: Candidate, output: Output) -> None:
    """Print what each class of devices trains with, holds and takes."""
    if not chosen.run.cluster.classes:
        return
    table = plain_table("class", "devices", "batch", "format", "memory", "of", "a step", "idle", "sent/round")
    for one in chosen.classes:
        passes = f" x {one.accumulate}" if one.accumulate > 1 else ""
        table.add_row(
            one.kind,
            str(one.devices),
            f"{one.micro_batch}{passes}",
            "as the weights" if one.autocast == "none" else one.autocast,
            bytes_text(one.memory_bytes),
            bytes_text(one.usable_bytes),
            seconds_text(one.step_s),
            f"{one.idle_share:.1%}",
            bytes_text(chosen.sent_bytes_per_round),
        )
    output.table(table)


def _memory_line(device: Device, memory: Memory) -> str:
    """Return a line that says what of the device's memory is taken by whom, and how tight it is."""
    headroom = device.memory_bytes - device.usable_bytes
    kept_free = f", {bytes_text(headroom)} of it are kept free" if headroom else ""
    return (
        f"memory: {memory_text(memory.tensors, memory.allocator, memory.reserved)}, "
        f"{memory.total / device.memory_bytes:.0%} of {bytes_text(device.memory_bytes)}"
        f"{kept_free}"
    )


def _phase(name: str) -> str:
    return name.replace("_", " ")


def _show_verified(chosen: Candidate, verified: Verified, output: Output) -> None:
    """Compare planned with traced bytes, part by part; then print what else the device holds, and whether it fits.

    A round's diagnostics (phase round_figures) depend on values, which fake tensors lack: they are planned only.
    """
    followed = replace(
        chosen.peak_profile, phases=tuple(x for x in chosen.peak_profile.phases if x.name != "round_figures")
    )
    memory = followed.peak()
    output.text("")
    table = plain_table("memory of the choice, per device", "planned", "tracked", "difference")
    planned = memory.parts()
    # The tracer follows the program alone, not what the allocator and the system hold.
    reserved = planned.pop("reserved") + planned.pop("allocator")
    tracked = verified.tracked
    for part, size in planned.items():
        table.add_row(part, bytes_text(size), bytes_text(tracked.by_part[part]), "")
    share = f"{memory.tensors / tracked.tracked_bytes - 1:+.2%}"
    table.add_row("peak", bytes_text(memory.tensors), bytes_text(tracked.tracked_bytes), share)
    output.table(table)
    if len(followed.phases) < len(chosen.peak_profile.phases):
        height = chosen.memory_by_phase["round_figures"] - reserved
        output.text(
            f"not traced, since they depend on values: figures of a round, {bytes_text(height)} as planned, and the "
            "directions that they keep, which the planned optimizer state includes"
        )
    output.text(verified.text())


def _checkpoints(candidate: Candidate) -> str:
    """Return the number of checkpoints, the seconds of each, and what training waits for all of them."""
    planned = candidate.eval_and_save
    text = f"{planned.saves:,} x {_seconds(candidate, planned.save_s)}"
    if planned.save_s is None:
        return text
    return f"{text}; training waits {_seconds(candidate, planned.saving_s)} for all of them"


def _figures(candidate: Candidate) -> dict[str, str]:
    """Return the planned figures of one device, by label."""
    steps, eval_and_save = candidate.time.steps, candidate.eval_and_save
    return {
        "memory at peak": bytes_text(candidate.memory.total),
        **{f"  {part}": bytes_text(size) for part, size in candidate.memory.parts().items()},
        "sent per round": f"{bytes_text(candidate.sent_bytes_per_round)} / {steps} step{'s' if steps > 1 else ''}",
        "sent per step": bytes_text(candidate.sent_bytes_per_round / steps),
        "compute per step": time_text(candidate, time_range(candidate, candidate.time.compute_s, 0.0)),
        "exchange per round": time_text(candidate, time_range(candidate, 0.0, candidate.time.exchange_s)),
        "evaluations": f"{eval_and_save.evaluations:,} x {_seconds(candidate, eval_and_save.evaluation_s)}",
        "checkpoints": _checkpoints(candidate),
        f"wall-clock for the {candidate.run.model.unit}": time_text(candidate, wall_range(candidate)),
        "assumed to equal loss": time_text(candidate, equivalent_range(candidate)),
    }


def _seconds(candidate: Candidate, seconds: float | None) -> str:
    return seconds_text(None) if seconds is None else time_text(candidate, (seconds, seconds))


def _comparison(chosen: Candidate, dense: Candidate) -> str:
    """Return a line that compares the choice with dense training."""
    ratio = dense.equivalent_wall_s / chosen.equivalent_wall_s
    sent = dense.sent_bytes_per_round / dense.time.steps, chosen.sent_bytes_per_round / chosen.time.steps
    wires = f"{sent[0] / sent[1]:.1f}x fewer bytes a step" if sent[1] else "no bytes either way"
    memory = chosen.memory.total / dense.memory.total - 1
    saved = f"{abs(memory):.0%} {'more' if memory > 0 else 'less'} memory"
    return f"beside dense: {ratio:.2f}x as fast to equal loss (assumed samples), {wires}, {saved}"
