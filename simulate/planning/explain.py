"""Explain a plan's choice: what limits it, what other hardware would change, why each neighbour was not chosen.

A ranking alone does not show users which purchase or key would help. So this plans the same run again on better
hardware, and compares the choice with the candidates that differ in one key. `lte plan --why` calls explain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from simulate.common.errors import InputError
from simulate.common.units import change_text
from simulate.config.hardware import Profile
from simulate.planning.best_known import ChoiceMade, choices_of
from simulate.planning.candidate import (
    LINK_DOMINATES,
    Candidate,
    Rejected,
    candidate_of,
    describe,
    is_library_installed,
    needs_library,
)
from simulate.planning.planner import Plan, make_plan
from simulate.planning.ranking import value_of

AXES = ("rank", "heads_per_device", "devices_per_node", "merge_every", "merge_transport", "quantize")
"""Keys of [method] that neighbours may differ in, in addition to batch and checkpointing."""
REPORTED = 1.02
"""Smallest ratio of two figures that is reported as a reason."""
COUNTED = ("bytes", "samples")
GIGABYTE = 10**9


@dataclass(frozen=True)
class Change:
    """The plan of the same run on other hardware, compared with the original choice."""

    what: str
    chosen: Candidate | None
    gain: float | None
    """The original objective over the new one; None where the run cannot be planned there."""
    same: bool
    """Whether the new choice has the same keys."""


@dataclass(frozen=True)
class Neighbour:
    """A candidate that differs from the choice in one key, and the reason that it was not chosen."""

    key: str
    value: str
    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Why:
    """The explanation of a choice."""

    limit: str
    """memory, link or compute."""
    reason: str
    changes: tuple[Change, ...]
    neighbours: tuple[Neighbour, ...]
    choices: tuple[ChoiceMade, ...] = ()
    """Keys that the plan took from the best known ones, since the user left them open."""

    @property
    def summary(self) -> str:
        """The limit of the choice, in words."""
        # Memory is named only where compute, not the link, takes most of a round.
        return f"{self.limit} limits the choice" + (", compute its speed" if self.limit == "memory" else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as the plan's JSON has it."""
        return {
            "limit": self.limit,
            "reason": self.reason,
            "changes": [
                {
                    "what": change.what, "gain": change.gain, "same": change.same,
                    "chosen": change.chosen and describe(change.chosen.run),
                    "equivalent_wall_s": change.chosen and change.chosen.equivalent_wall_s,
                }
                for change in self.changes
            ],
            "neighbours": [
                {"key": n.key, "value": n.value, "candidate": describe(n.candidate.run), "reason": n.reason}
                for n in self.neighbours
            ],
            "choices": [asdict(choice) for choice in self.choices],
        }  # fmt: skip


def explain(plan: Plan, chosen: Candidate) -> Why:
    """Explain a plan's choice; plans three more times."""
    value = value_of(plan.choice.objective, plan.profile, plan.base.cluster.devices)
    limit, reason = _limit(plan, chosen, value)
    changes = tuple(_change(plan, chosen, *change) for change in _changed(plan))
    choices = tuple(choices_of(chosen.run, plan.pins.open_keys))
    if (rule := plan.quorum_rule) is not None:
        choices = (*choices, ChoiceMade("cluster.quorum", str(rule.quorum), str(rule)))
    return Why(limit, reason, changes, tuple(_neighbours(plan, plan.equal or chosen, value)), choices)


def _limit(plan: Plan, chosen: Candidate, value: Callable[[Candidate], float]) -> tuple[str, str]:
    """Return whether link, memory or compute keeps the choice from being better, and the reason in words."""
    # Memory is the limit where a run that does not fit would be better than the choice.
    unfit = [r for r in plan.rejected if r.missing[0]]
    better = min(unfit, key=lambda r: value(r.candidate), default=None)
    share = chosen.time.exchange_s / chosen.time.round_s
    reason = f"{share:.0%} of a round is exchange that no compute hides, {1 - share:.0%} compute"
    limit = "link" if share > LINK_DOMINATES else "compute"
    if better is not None and value(better.candidate) < value(chosen):
        # More memory would give a better choice; a dominant link would limit that one as well.
        limit = "memory" if limit == "compute" else limit
        times = value(better.candidate) / value(chosen)
        what = plan.choice.objective
        reason += f"; {describe(better.candidate.run)} would take {change_text(times)} {what}, but {better.reason}"
    return limit, reason


def _changed(plan: Plan) -> Iterator[tuple[str, Profile, int]]:
    """Yield other hardware: its description, the profile, and the number of devices."""
    profile, count = plan.profile, plan.base.cluster.devices
    memory = [d.model_copy(update={"memory_bytes": d.memory_bytes + GIGABYTE}) for d in profile.device]
    yield "1 GB more on each device", profile.model_copy(update={"device": memory}), count
    yield "ten times the bandwidth", profile.model_copy(update={"link": profile.link.faster(10)}), count
    doubled = [d.model_copy(update={"count": 2 * d.count}) for d in profile.device]
    yield "twice the devices", profile.with_devices(doubled), 2 * count


def _change(plan: Plan, chosen: Candidate, what: str, profile: Profile, devices: int) -> Change:
    cluster = plan.base.cluster.model_copy(update={"devices": devices})
    base = plan.base.model_copy(update={"cluster": cluster})
    # Shards and given steps list one number a device, so they fix the number of devices.
    given = base.method.given_steps or base.cluster.merges_given
    fixed = base.data.shards is not None or given is not None
    # Without a time limit and rivals: only the choice is compared.
    choice, new = replace(plan.choice, with_rivals=False, within_s=None), None
    if devices == plan.base.cluster.devices or not fixed:
        with suppress(InputError):  # a run may be invalid on other hardware
            new = make_plan(base, profile, plan.tokens, plan.pins, choice=choice).chosen
    if new is None:
        return Change(what, None, None, False)
    before = value_of(choice.objective, plan.profile, plan.base.cluster.devices)(chosen)
    after = value_of(choice.objective, profile, devices)(new)
    gain = before / after if after else None
    return Change(what, new, gain, _keys(new) == _keys(chosen))


def _keys(candidate: Candidate) -> dict[str, Any]:
    """Return the keys that distinguish candidates."""
    run = candidate.run
    return {
        "method": run.method.name,
        **{key: getattr(run.method, key, None) for key in AXES},
        "micro_batch": run.train.micro_batch,
        "activation_checkpointing": run.train.activation_checkpointing,
    }


def _neighbours(plan: Plan, chosen: Candidate, value: Callable[[Candidate], float]) -> Iterator[Neighbour]:
    """Yield the nearest candidates on either side of each key, and the best dense one.

    A choice with classes of devices is not of the grid: these are the neighbours of the best equal batches.
    """
    ours = _keys(chosen)
    by_key: dict[str, list[Candidate | Rejected]] = {}
    results: list[Candidate | Rejected] = [*plan.candidates, *plan.rejected]
    for result in results:
        keys = _keys(candidate_of(result))
        different = [key for key in keys if keys[key] != ours[key]]
        if len(different) == 1:  # one key apart, so that its cause is clear
            by_key.setdefault(different[0], []).append(result)
    for key in ours:
        for result in _nearest(by_key.get(key, []), key, ours[key]):
            other = _keys(candidate_of(result))[key]
            yield Neighbour(key, str(other), candidate_of(result), _against(result, chosen, value, plan))
    dense = plan.dense
    if dense is not None and candidate_of(dense).run.method.name != chosen.run.method.name:
        yield Neighbour("method", "ddp", candidate_of(dense), _against(dense, chosen, value, plan))


def _nearest(results: list[Candidate | Rejected], key: str, ours: Any) -> list[Candidate | Rejected]:
    """Return the results with the next smaller and next larger number, or one of every value that is no number."""
    # The first of a value stands for it: results come best first, and those of a value differ in accumulated passes.
    by_value: dict[Any, Candidate | Rejected] = {}
    for result in results:
        by_value.setdefault(_keys(candidate_of(result))[key], result)
    if isinstance(ours, bool) or not isinstance(ours, int):
        return list(by_value.values())
    smaller, larger = [v for v in by_value if v < ours], [v for v in by_value if v > ours]
    ends = ([max(smaller)] if smaller else []) + ([min(larger)] if larger else [])
    return [by_value[end] for end in ends]


def _against(result: Candidate | Rejected, chosen: Candidate, value: Callable[[Candidate], float], plan: Plan) -> str:
    """Return in a line why a neighbour was not chosen."""
    if isinstance(result, Rejected):
        return result.reason
    ratio = value(result) / value(chosen) if value(chosen) else 1.0
    parts = ", ".join(_parts(result, chosen))
    said = f"{change_text(ratio)} {plan.choice.objective}" + (f": {parts}" if parts else "")
    if ratio < 1 and needs_library(result.run):
        # Never chosen by itself, so that a choice does not depend on what the planning machine has.
        lacks = "an extra that is installed here" if is_library_installed() else "missing here"
        return f"{said}; needs lte[quantize], {lacks}: plan it with --quantize"
    if ratio < 1:  # no candidate of the grid is better than the choice, so this one is not of the grid
        return f"{said}; plan it with --method {result.run.method.name}"
    return said


def _parts(other: Candidate, chosen: Candidate) -> Iterator[str]:
    """Yield the figures that differ from the choice's, in words; seconds and bytes are per sample."""

    # Candidates differ in batch and round length, so that only figures per sample compare.
    def per_sample(candidate: Candidate, amount: float) -> float:
        return amount / (candidate.samples_per_s * candidate.time.round_s)

    def compute_s(candidate: Candidate) -> float:
        return candidate.time.round_s - candidate.time.exchange_s

    figures = {
        "compute": (per_sample(other, compute_s(other)), per_sample(chosen, compute_s(chosen))),
        "exchange": (per_sample(other, other.time.exchange_s), per_sample(chosen, chosen.time.exchange_s)),
        "bytes": (per_sample(other, other.sent_bytes_per_round), per_sample(chosen, chosen.sent_bytes_per_round)),
        "samples": (other.samples_factor, chosen.samples_factor),
        "memory": (float(other.memory.total), float(chosen.memory.total)),
    }
    for name, (theirs, ours) in figures.items():
        if ours and not 1 / REPORTED < theirs / ours < REPORTED:
            yield f"{change_text(theirs / ours, 'fewer' if name in COUNTED else 'less')} {name}"
