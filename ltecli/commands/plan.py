"""lte plan: make the plan of a request, show it, and write the choice as run.toml.

plan_request.py turns options into a plan; this module prints it: the ranked candidates, the choice beside dense
training, the other methods' best, and notes. `lte train` takes nearest_miss_text from here.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltecli.console import Output, plain_table
from ltecli.output_paths import check_file, write_file
from ltecli.plan_request import PlanArgs, plan_request
from simulate.common.errors import NothingFeasibleError
from simulate.common.units import bytes_text, range_text, seconds_text
from simulate.config.run import dump_run
from simulate.planning.candidate import Candidate, Rejected, candidate_of, describe
from simulate.planning.planner import Plan
from simulate.planning.time_ranges import equivalent_range, time_range, wall_range

if TYPE_CHECKING:
    from ltecli.commands.explain import ExplainArgs
    from simulate.measure.fake_tensors import Tracked

COLUMNS = ("memory/device", "sent/round", "sent/step", "step", "round", "wall", "x samples", "to equal loss")
SECONDARY = ("sent/round", "step", "round", "x samples")
"""Columns that a narrow terminal leaves out."""


def plan_command(
    request: PlanArgs, out: Path | None, force: bool, top: int, as_json: bool, extras: ExplainArgs | None = None,
    verify: bool = False,
) -> int:  # fmt: skip
    """Plan, show, and write the choice where `out` asks for it; raises NothingFeasibleError where nothing fits.

    With `verify`, trace the choice's training on fake tensors, and compare its memory with the plan.
    """
    if out is not None:
        check_file(out, force, "run.toml")
    if extras is not None:
        extras.check()
    plan = plan_request(request, to_train=out is not None)
    output = Output(as_json)
    explained = None
    if extras is not None:
        from ltecli.commands.explain import explain_plan, show_explained

        explained = explain_plan(plan, extras)
    verified = _verify_choice(plan) if verify and plan.chosen is not None else None
    if as_json:  # building the JSON of thousands of candidates takes time
        added = explained.to_dict() if explained else {"why": None, "timeline": None}
        output.json({**plan.to_dict(), **added, **({"verify": asdict(verified)} if verified else {})})
    _show(plan, output, top)
    if explained is not None and extras is not None:
        show_explained(plan, explained, extras, output)
    if verified and plan.chosen:
        _show_verified(plan.chosen, verified, output)
    if plan.chosen is None:
        raise NothingFeasibleError(nearest_miss_text(plan))
    if out is not None:
        write_file(out, dump_run(plan.chosen.run))
        output.hint(f"wrote {out}; next: lte train {out}")
    else:
        output.hint("next: lte plan ... -o run.toml, then lte train run.toml")
    return 0


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
    model, places = plan.base.model, {"device": miss.short_bytes, "host": miss.host_short_bytes}
    more = " and ".join(f"{bytes_text(size)} more on each {place}" for place, size in places.items() if size)
    keys = [model.larger_with] if miss.short_bytes else []  # a smaller value shrinks activations, not host memory
    layers = getattr(model, "layers", None)
    keys += [] if layers is None else [f"model.layers (now {layers})"]
    return (
        f"nothing fits profile {plan.profile.name}: the nearest miss is {describe(miss.candidate.run)}, which "
        f"{miss.reason}; {more} would do" + (f", or a smaller --set {' or '.join(keys)}" if keys else "")
    )


def _show(plan: Plan, output: Output, top: int) -> None:
    shape, base = plan.base.model.shape(), plan.base
    output.heading(
        f"{shape.name}: {shape.parameters:,} parameters ({shape.adapted_parameters:,} adapted), "
        f"{plan.tokens:,} {base.model.unit} on {base.cluster.devices} x {plan.profile.name}"
    )
    link = plan.profile.link
    output.text(
        f"planned: {len(plan.candidates):,} candidates fit, {len(plan.rejected):,} do not; link {link.topology}, "
        f"{bytes_text(link.up_bytes_per_s)}/s up, {bytes_text(link.down_bytes_per_s)}/s down, "
        f"{seconds_text(link.latency_s)} latency"
    )
    if plan.candidates:
        output.table(_candidate_table(plan, top), secondary=SECONDARY)
    if plan.rejected:
        nearest = min(plan.rejected, key=lambda rejected: rejected.missing)
        output.text(f"rejected, for example: {describe(nearest.candidate.run)} {nearest.reason}")
    if plan.chosen is not None:
        _show_choice(plan, plan.chosen, output)
    if plan.rivals:
        output.text("")
        output.heading("other methods, each at its best here; plan one with --method NAME")
        output.table(_rival_table(plan), secondary=SECONDARY)
    for note in plan.notes:
        output.text(f"note: {note}")


def _candidate_table(plan: Plan, top: int) -> Any:
    """Return the table of the `top` best candidates, and of the choice at any rank."""
    table = plain_table("#", "method", *COLUMNS)
    table.columns[1].justify = "left"
    for index, candidate in enumerate(plan.candidates, 1):
        if index > top and candidate is not plan.chosen:
            continue
        mark = "*" if candidate is plan.chosen else ""
        table.add_row(
            f"{index}{mark}",
            describe(candidate.run) + (" (!)" if candidate.warnings else ""),
            *_cells(candidate),
        )
    return table


def _cells(candidate: Candidate) -> list[str]:
    """Return a candidate's cells under COLUMNS."""
    return [
        bytes_text(candidate.memory.total),
        bytes_text(candidate.sent_bytes_per_round),
        bytes_text(candidate.sent_bytes_per_round / candidate.time.steps),
        seconds_text(candidate.step_s),
        seconds_text(candidate.time.round_s),
        range_text(*wall_range(candidate)),
        f"{candidate.samples_factor:.2f}",
        range_text(*equivalent_range(candidate)),
    ]


def _rival_table(plan: Plan) -> Any:
    """Return the table of the other methods' best candidates: those that fit first, then by time to equal loss."""
    table = plain_table("method", *COLUMNS)
    table.columns[0].justify = "left"
    ranked = sorted(plan.rivals, key=lambda rival: candidate_of(rival).equivalent_wall_s)
    for rival in sorted(ranked, key=lambda rival: isinstance(rival, Rejected)):
        unfit = " (does not fit)" if isinstance(rival, Rejected) else ""
        table.add_row(describe(candidate_of(rival).run) + unfit, *_cells(candidate_of(rival)))
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
    if isinstance(plan.dense, Rejected):
        output.text(f"dense does not fit: {plan.dense.reason}")
    elif dense and chosen is not dense:
        output.text(_comparison(chosen, dense))
    phases = (f"{_phase(name)} {bytes_text(size)}" for name, size in chosen.memory_by_phase.items())
    output.text(f"memory by phase: {', '.join(phases)}")
    if chosen.host_memory_bytes:
        parts = (f"{_phase(name)} {bytes_text(size)}" for name, size in chosen.host_memory_by_part.items() if size)
        output.text(f"host memory: {bytes_text(chosen.host_memory_bytes)} ({', '.join(parts)})")
    for warning in chosen.warnings:
        output.text(f"warning: {warning}")


def _phase(name: str) -> str:
    return name.replace("_", " ")


def _verify_choice(plan: Plan) -> Tracked:
    """Return the memory of the chosen run, traced on fake tensors; raises InputError where it cannot be traced."""
    assert plan.chosen is not None
    run = plan.chosen.run
    from simulate.measure.fake_tensors import tracked_memory

    return tracked_memory(run, with_host=plan.tightest_device().host_memory_bytes == 0)


def _show_verified(chosen: Candidate, verified: Tracked, output: Output) -> None:
    """Compare planned with traced bytes, part by part; then print what an allocator and the system add.

    A round's diagnostics (phase round_figures) depend on values, which fake tensors lack: they are planned only.
    """
    followed = replace(
        chosen.peak_profile, phases=tuple(x for x in chosen.peak_profile.phases if x.name != "round_figures")
    )
    memory = followed.peak()
    output.text("")
    table = plain_table("memory of the choice, per device", "planned", "tracked", "difference")
    planned = memory.parts()
    reserved = planned.pop("reserved")
    for part, size in planned.items():
        table.add_row(part, bytes_text(size), bytes_text(verified.by_part[part]), "")
    total = memory.total - reserved
    share = f"{total / verified.tracked_bytes - 1:+.2%}"
    table.add_row("peak", bytes_text(total), bytes_text(verified.tracked_bytes), share)
    output.table(table)
    if len(followed.phases) < len(chosen.peak_profile.phases):
        height = chosen.memory_by_phase["round_figures"] - reserved
        output.text(
            f"not traced, since they depend on values: figures of a round, {bytes_text(height)} as planned, and the "
            "directions that they keep, which the planned optimizer state includes"
        )
    output.text(
        f"with the CUDA allocator's rounding and segments {bytes_text(verified.allocator_bytes)}; the system and its "
        f"context reserve {bytes_text(reserved)} more"
    )


def _figures(candidate: Candidate) -> dict[str, str]:
    """Return the planned figures of one device, by label."""
    steps, eval_and_save = candidate.time.steps, candidate.eval_and_save
    return {
        "memory at peak": bytes_text(candidate.memory.total),
        **{f"  {part}": bytes_text(size) for part, size in candidate.memory.parts().items()},
        "sent per round": f"{bytes_text(candidate.sent_bytes_per_round)} / {steps} step{'s' if steps > 1 else ''}",
        "sent per step": bytes_text(candidate.sent_bytes_per_round / steps),
        "compute per step": range_text(*time_range(candidate, candidate.time.compute_s, 0.0)),
        "exchange per round": range_text(*time_range(candidate, 0.0, candidate.time.exchange_s)),
        "evaluations": f"{eval_and_save.evaluations:,} x {seconds_text(eval_and_save.evaluation_s)}",
        "checkpoints": f"{eval_and_save.saves:,} x {seconds_text(eval_and_save.save_s)}",
        f"wall-clock for the {candidate.run.model.unit}": range_text(*wall_range(candidate)),
        "assumed to equal loss": range_text(*equivalent_range(candidate)),
    }


def _comparison(chosen: Candidate, dense: Candidate) -> str:
    """Return a line that compares the choice with dense training."""
    ratio = dense.equivalent_wall_s / chosen.equivalent_wall_s
    sent = dense.sent_bytes_per_round / dense.time.steps, chosen.sent_bytes_per_round / chosen.time.steps
    wires = f"{sent[0] / sent[1]:.1f}x fewer bytes a step" if sent[1] else "no bytes either way"
    memory = dense.memory.total / chosen.memory.total
    return f"beside dense: {ratio:.2f}x as fast to equal loss (assumed samples), {wires}, {memory:.2f}x less memory"
