"""Make a plan: evaluate every candidate of the search space on a profile, reject those that do not fit, choose one.

Users want to know before a run what fits and how long it takes, so this is arithmetic alone: no torch, nothing
written, thousands of candidates in seconds. `lte plan` calls make_plan, explain calls it again for other hardware;
`lte train` calls evaluate for the run that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from simulate.common.errors import InputError
from simulate.common.gc_paused import collector_paused
from simulate.config.hardware import Device, Profile
from simulate.config.method_table import BASELINE, METHOD_NAMES
from simulate.config.run import Run
from simulate.costs.eval_and_save_time import eval_and_save_time
from simulate.costs.memory import Memory, host_memory_by_part, peak_memory, peak_profile
from simulate.costs.message_schedule import num_rounds, sent_bytes
from simulate.costs.samples import samples_factor
from simulate.costs.step_time import device_kinds, device_step_s, distinct, round_time
from simulate.planning.batch_classes import unequal_runs
from simulate.planning.best_known import WIRE
from simulate.planning.candidate import Candidate, PlanContext, Rejected, candidate_of, needs_library
from simulate.planning.far_apart import (
    QuorumRule,
    can_have_quorum,
    latency_s,
    leave_per_hour,
    majority,
    place_reasons,
    reasons,
    speed_reasons,
)
from simulate.planning.node_order import NodeOrder, better_order, likely_order
from simulate.planning.notes import plan_notes
from simulate.planning.number_formats import check_formats, faster_format
from simulate.planning.objective import SelectionCriteria
from simulate.planning.plan_json import candidate_json
from simulate.planning.ranking import best, hourly_price, rank_by, value_of
from simulate.planning.search_space import Pins, grid
from simulate.rules.cadence import Cadence

PLAN_VERSION = 1
FREE, BY_TIME = Pins(), SelectionCriteria()
CHOSEN_FROM = ("lte", "ddp")
"""Methods to choose from unless the user names one; the best of each other method is shown for comparison."""


@dataclass(frozen=True)
class Plan:
    """Ranked candidates, the choice, and dense training on the same hardware."""

    profile: Profile
    base: Run
    tokens: int
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    chosen: Candidate | None
    dense: Candidate | Rejected | None
    notes: tuple[str, ...]
    rivals: tuple[Candidate | Rejected, ...] = ()
    """The best candidate, or nearest miss, of each method that is not in CHOSEN_FROM."""
    equal: Candidate | None = None
    """The best candidate with one batch for all devices: the choice, where that has no classes of devices."""
    pins: Pins = FREE
    choice: SelectionCriteria = BY_TIME
    node_order: NodeOrder | None = None
    """The order of devices that `profile` has in the place of the given profile's; None: it is as given."""
    quorum_rule: QuorumRule | None = None
    """The quorum that the plan chose by itself, and why; None: merges are as asked for."""

    def to_dict(self, top: int | None = None) -> dict[str, Any]:
        """Return the plan as `lte plan --json` prints it and runs keep it in plan.json; with `top`, the best ones."""
        shape = self.base.shape()
        dense = self.dense and candidate_of(self.dense)
        return {
            "version": PLAN_VERSION,
            "profile": self.profile.name,
            "devices": self.base.cluster.devices,
            "tokens": self.tokens,
            "model": {
                "name": shape.name,
                "parameters": shape.all_parameters,
                "adapted_parameters": shape.adapted_parameters,
            },
            "chosen": self.chosen and candidate_json(self.chosen),
            "equal": self.equal and candidate_json(self.equal),
            "dense": dense and {**candidate_json(dense), "fits": not isinstance(self.dense, Rejected)},
            "candidates": [candidate_json(candidate) for candidate in self.candidates[:top]],
            "rejected": [{"candidate": candidate_json(r.candidate), "reason": r.reason} for r in self.rejected[:top]],
            "rivals": [
                {**candidate_json(candidate_of(rival)), "fits": not isinstance(rival, Rejected)}
                for rival in self.rivals
            ],
            "notes": list(self.notes),
            "objective": self.choice.objective,
            "price_per_hour": hourly_price(self.profile, self.base.cluster.devices),
            "node_order": self.node_order and self.node_order.to_dict(),
            "quorum_rule": self.quorum_rule and self.quorum_rule.to_dict(),
        }

    def tightest_device(self) -> Device:
        """Return the device on which the choice leaves the least memory free."""
        return self._tightest()[1]

    def tightest_run(self) -> Run:
        """Return the choice as that device's class has it."""
        return self._tightest()[0]

    def _tightest(self) -> tuple[Run, Device]:
        assert self.chosen is not None
        run, shape = self.chosen.run, self.base.shape()
        return min(
            device_kinds(run, self.profile.devices(run.cluster.devices)),
            key=lambda kind: kind[1].usable_bytes - peak_memory(kind[0], shape, kind[1]).total,
        )

    def nearest_miss(self) -> Rejected | None:
        """Return the rejected candidate that lacks the least memory; among those that fit, the least late one."""
        return min(self.rejected, key=lambda rejected: rejected.missing, default=None)


def evaluate(run: Run, profile: Profile, tokens: int, spaces_recovery: bool = False) -> Candidate | Rejected:
    """Compute the costs of one run on a profile, and whether it fits every device.

    With `spaces_recovery` its recovery points are spaced so that they stay affordable; else the run is not changed.
    """
    return _evaluate(run, PlanContext.of(run, profile, tokens, SelectionCriteria(), spaces_recovery))


def _evaluate(run: Run, context: PlanContext) -> Candidate | Rejected:
    shape, devices, choice = context.shape, context.devices, context.choice
    kinds = distinct(devices)
    peaks = [
        (device, one, (profile := peak_profile(one, shape, device)), (memory := profile.peak()), memory.total)
        for one, device in device_kinds(run, devices)
    ]
    # All devices must fit, so the fullest one decides.
    device, fullest, profile, memory, memory_bytes = min(peaks, key=lambda peak: peak[0].usable_bytes - peak[4])
    host_parts = host_memory_by_part(fullest, shape, device)
    time, rounds = round_time(run, shape, devices, context.profile.link), num_rounds(run)
    eval_and_save = eval_and_save_time(run, shape, kinds, time.compute_s)
    if context.spaces_recovery and (
        (every := eval_and_save.affordable_recovery(time.round_s / time.steps)) != run.cluster.recover_every
    ):
        run = _with_recovery(run, context, every, eval_and_save.cadence.apart)
        eval_and_save = replace(eval_and_save, cadence=Cadence.of(run))
    candidate = Candidate(
        run=run,
        context=context,
        memory=memory,
        peak_profile=profile,
        host_memory_by_part=host_parts,
        sent_bytes_per_round=sent_bytes(run, shape, run.train.steps) / rounds / run.cluster.devices,
        time=time,
        eval_and_save=eval_and_save,
        fullest_class=fullest.method.class_index,
        wall_s=run.train.steps * time.compute_s + rounds * (time.merge_s + time.exchange_s) + eval_and_save.total_s,
        samples_factor=samples_factor(run, shape, context.tokens, choice.efficiency),
    )
    # Memory first: time does not matter for a run that cannot start.
    short_bytes = max(0, memory_bytes - device.usable_bytes)
    # On one shared memory the host gets the bytes that the device leaves.
    host_room_bytes = device.host_memory_bytes or max(0, device.usable_bytes - memory_bytes)
    host_short_bytes = max(0, sum(host_parts.values()) - host_room_bytes)
    if short_bytes or host_short_bytes:
        reasons = [_memory_reason(memory, device)] if short_bytes else []
        reasons += [_host_reason(host_parts, host_room_bytes, device)] if host_short_bytes else []
        return Rejected(candidate, ", and ".join(reasons), short_bytes, host_short_bytes)
    late_s = candidate.equivalent_wall_s - choice.within_s if choice.within_s is not None else 0.0
    if late_s > 0:
        needed_h = candidate.equivalent_wall_s / 3600
        reason = f"needs {needed_h:.4g} h to equal loss, {late_s / 3600:.3g} h more than --within allows"
        return Rejected(candidate, reason, late_s=late_s)
    return candidate


def _with_recovery(run: Run, context: PlanContext, every: int, apart: int) -> Run:
    """Return the run with recovery points after so many meetings, and its own checkpoints moved onto such points."""
    update: dict[str, Any] = {"cluster": context.recovering(run.cluster, every)}
    if not context.keeps_checkpoints:
        # Rounded up to a whole number of recovery points, so that no checkpoint is written beside them.
        points = -(-run.train.checkpoint_every // (every * apart))
        saves_every = min(points * every * apart, run.train.steps)
        update["train"] = context.saving(run.train, saves_every)
    return run.model_copy(update=update)


def _host_reason(parts: dict[str, int], room_bytes: int, device: Device) -> str:
    meanings = {
        "start_weights": "the weights that merges start from",
        "diagnostics": "sums of gradients, for train.diagnostics_every",
        "checkpoint_save": "the tensor that a checkpoint is writing",
        "data": "the data",
    }
    largest = meanings[max(parts, key=lambda name: parts[name])]
    return (
        f"needs {sum(parts.values()) / 1e9:.2f} GB of host memory, most of it for {largest}, and beside {device.kind} "
        f"are {room_bytes / 1e9:.2f} GB"
    )


def _memory_reason(memory: Memory, device: Device) -> str:
    # Name the largest part that a key can change; nothing in a run changes what the system reserves.
    parts = {name: size for name, size in memory.parts().items() if name != "reserved"}
    largest = max(parts, key=lambda name: parts[name])
    headroom = device.memory_bytes - device.usable_bytes
    kept_free = f" less {headroom / 1e9:.2f} GB of headroom" if headroom else ""
    return (
        f"needs {memory.total / 1e9:.2f} GB, {device.kind} has {device.memory_bytes / 1e9:.2f} GB{kept_free}; "
        f"most goes to {largest} ({parts[largest] / 1e9:.2f} GB)"
    )


@collector_paused()
def make_plan(
    base: Run,
    profile: Profile,
    tokens: int,
    pins: Pins,
    notes: Sequence[str] = (),
    choice: SelectionCriteria | None = None,
) -> Plan:
    """Evaluate the grid around `base` and choose; keys that neither pins nor the grid vary are those of `base`.

    Where devices have lines that differ, the plan is for the best order of them that was found.
    """
    if base.cluster.classes:
        raise InputError(
            "cluster.class: a plan chooses the classes itself; leave them away, and change them in the run.toml that "
            "the plan wrote"
        )
    choice = choice or SelectionCriteria()
    if choice.objective == "memory":  # a quorum keeps the last merge
        pins = replace(without_wire(pins), is_quorum_open=False)
    if not pins.is_quorum_open or not can_have_quorum(base):
        return _fitting_plan(base, profile, tokens, pins, notes, choice)
    return _far_apart_plan(base, profile, tokens, pins, notes, choice)


def _far_apart_plan(
    base: Run, profile: Profile, tokens: int, pins: Pins, notes: Sequence[str], choice: SelectionCriteria
) -> Plan:
    """Return the plan whose merges go on with a majority, where links or devices are far apart; else in lockstep."""
    devices = profile.devices(base.cluster.devices)
    lockstep = None
    if not list(place_reasons(profile, devices)):
        lockstep = _fitting_plan(base, profile, tokens, pins, notes, choice)
        if lockstep.chosen is None or not list(speed_reasons(_device_step_s(lockstep.chosen))):
            return lockstep
    cluster = base.cluster.model_copy(update={"quorum": majority(base.cluster.devices)})
    plan = _fitting_plan(base.model_copy(update={"cluster": cluster}), profile, tokens, pins, notes, choice)
    chosen = plan.chosen
    if chosen is None:  # it keeps the last merge, which may be what does not fit
        return lockstep or _fitting_plan(base, profile, tokens, pins, notes, choice)
    plan = replace(plan, base=base)  # plans of other hardware start from the user's keys again
    if not chosen.run.cluster.has_quorum:
        return plan
    # Batches of their own may have made steps alike: the reason is what they were.
    step_s = _device_step_s(lockstep.chosen if lockstep and lockstep.chosen else chosen)
    rule = QuorumRule(
        quorum=chosen.run.cluster.needed,
        devices=base.cluster.devices,
        reasons=tuple(reasons(profile, devices, step_s)),
        latency_s=latency_s(profile),
        leave_per_hour=leave_per_hour(devices),
        step_ratio=max(step_s) / min(step_s),
        round_s=chosen.time.round_s,
    )
    return replace(plan, quorum_rule=rule, notes=(*plan.notes, f"cluster.quorum = {rule.quorum}: {rule}"))


def _device_step_s(chosen: Candidate) -> Sequence[float]:
    return device_step_s(chosen.run, chosen.context.shape, chosen.context.devices)


def _fitting_plan(
    base: Run, profile: Profile, tokens: int, pins: Pins, notes: Sequence[str], choice: SelectionCriteria
) -> Plan:
    """Return the plan, with full messages where nothing fits with compressed ones."""
    plan = _ordered_plan(base, profile, tokens, pins, notes, choice)
    miss = plan.nearest_miss()
    if plan.chosen is None and miss is not None and miss.missing[0] and WIRE.key in pins.open_keys:
        # Compressed messages keep what rounding lost, which may be what does not fit.
        full = _ordered_plan(base, profile, tokens, without_wire(pins), notes, choice)
        return full if full.chosen else plan
    return plan


def without_wire(pins: Pins) -> Pins:
    """Return the pins of a plan whose messages stay as they are."""
    return replace(pins, open_keys=pins.open_keys - {WIRE.key})


def _ordered_plan(
    base: Run, profile: Profile, tokens: int, pins: Pins, notes: Sequence[str], choice: SelectionCriteria
) -> Plan:
    """Return the plan for the best order of devices that was found."""
    # Which method pays depends on who serves, so that candidates are compared with the fastest line first.
    start = likely_order(base, profile)
    plan = _plan(base, start, tokens, pins, notes, choice)
    order = better_order(plan.chosen.run, profile) if plan.chosen else None
    if order is None:
        return plan if start is profile else _plan(base, profile, tokens, pins, notes, choice)
    again = plan if order.profile == start else _plan(base, order.profile, tokens, pins, notes, choice)
    assert again.chosen is not None  # memory and formats do not depend on the order
    # Another candidate may be chosen now, for which the order must be better, too.
    order = order.of_run(again.chosen.run, profile)
    if order.exchange_s >= order.listed_s:
        return _plan(base, profile, tokens, pins, notes, choice)
    return replace(again, node_order=order, notes=(*again.notes, str(order)))


def _plan(
    base: Run, profile: Profile, tokens: int, pins: Pins, notes: Sequence[str], choice: SelectionCriteria
) -> Plan:
    """Return the plan for the devices in the profile's order."""
    pins = replace(pins, ranks=choice.probe.ranks(base)) if choice.probe else pins
    picked = faster_format(base, profile)
    if picked is not None:
        base = base.model_copy(update={"train": base.train.model_copy(update={"autocast": picked})})
    check_formats(base, profile)  # before thousands of candidates are planned at a rate that is not known
    context = PlanContext.of(base, profile, tokens, choice, "recover_every" not in base.cluster.model_fields_set)
    shape, devices = context.shape, context.devices
    rank = rank_by(value_of(choice.objective, profile, len(devices)))
    methods = (pins.method,) if pins.method else CHOSEN_FROM

    def results_of(names: Sequence[str]) -> list[Candidate | Rejected]:
        runs = grid(base, shape, names, pins, tokens, profile.link.devices_per_node)
        return [_evaluate(run, context) for run in runs]

    results = results_of(methods)
    if not results:
        raise InputError(
            f"train.warmup_steps = {base.train.warmup_steps} is not below the steps that {tokens:,} "
            f"{base.model.unit} take, whatever the batch; lower it, or train on more --{base.model.unit}"
        )
    fitting = sorted((r for r in results if isinstance(r, Candidate)), key=rank)
    rejected = tuple(r for r in results if isinstance(r, Rejected))
    # Prefer what runs as installed: nf4 needs the extra lte[quantize].
    plain = (candidate for candidate in fitting if not needs_library(candidate.run))
    equal = next(plain, None) or next(iter(fitting), None)
    # Batches for each kind of device stand beside the choice: the grid of equal ones is large enough.
    unequal = unequal_runs(fitting, equal, pins, base)
    found = [result for run in unequal if isinstance(result := _evaluate(run, context), Candidate)]
    chosen = min(found, key=rank, default=None)
    if chosen is None or equal is None or rank(chosen) >= rank(equal):
        chosen = equal
    others = METHOD_NAMES if choice.with_rivals and not pins.method else ()
    rivals = [best(results_of((name,)), rank) for name in others if name not in methods]
    rival = min((rival for rival in rivals if isinstance(rival, Candidate)), key=rank, default=None)
    first = next(iter(fitting), None)
    return Plan(
        profile=profile,
        base=base,
        tokens=tokens,
        candidates=tuple(fitting),
        rejected=rejected,
        chosen=chosen,
        dense=best([r for r in results if candidate_of(r).run.method.name == BASELINE], rank)
        or best(results_of(("ddp",)), rank),
        notes=(
            *notes,
            *plan_notes(context, base, chosen, first, equal, rival, picked, lambda run: _evaluate(run, context), pins),
        ),
        rivals=tuple(rival for rival in rivals if rival is not None),
        equal=equal,
        pins=pins,
        choice=choice,
    )
