"""From (run, profile, pins) to candidates, verdicts and a choice; pure arithmetic, no torch, nothing written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ltecli.collecting import without_collector
from ltecli.formats import check_formats, format_notes
from ltecli.grid import Pins, grid
from ltecli.objective import MEANINGS, Choice, hourly_price, value_of
from ltecli.output import bytes_text, seconds_text
from ltecli.ranges import RULE, Margins, range_keys
from simulate.config import Cluster, Run
from simulate.costs.calendar import Calendar
from simulate.costs.diagnostics import diagnostics_exchange
from simulate.costs.memory import Heights, Memory, heights, host_memory_by_part, peak_memory
from simulate.costs.messages import link_of
from simulate.costs.pauses import AFFORDABLE_SHARE, Pauses, pauses
from simulate.costs.samples import Efficiency, samples_factor, shipped
from simulate.costs.schedule import dense_reduction, num_rounds, received_bytes, sent_bytes
from simulate.costs.time import RoundTime, device_step_s, distinct, exchange_s, round_time
from simulate.costs.traffic import ELEMENT_BYTES
from simulate.errors import InputError
from simulate.hardware import Device, Profile
from simulate.models.shapes import ModelShape
from simulate.options import METHOD_NAMES, AdapterOptions, DdpOptions, LteOptions, MethodOptions

PLAN_VERSION = 1
FREE, BY_TIME = Pins(), Choice()
CHOSEN_FROM = ("lte", "ddp")
"""The methods to choose from unless one is asked for; the best of each other is shown beside."""
PLURALS = {"norm": "norms", "bias": "biases", "embedding": "embeddings", "other": "other modules"}
LINK_DOMINATES = 0.5
"""Share of a round spent on the link from which the plan warns."""
PACE_MATTERS = 1.1
"""Times that the slowest device needs longer than the fastest from which the plan speaks of deadlines."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What a plan's candidates share."""

    profile: Profile
    shape: ModelShape
    devices: tuple[Device, ...]
    tokens: int
    """Asked for; steps round them up."""
    choice: Choice
    margins: Margins
    """How far times may be off."""
    spaces_recovery: bool
    """Whether recovery points may be as rare as they have to be; else they are where the run has them."""
    clusters: dict[int, Cluster] = field(default_factory=dict)
    """By merges between recovery points."""

    @classmethod
    def of(cls, run: Run, profile: Profile, tokens: int, choice: Choice) -> Setting:
        """Return the setting of a run, and of all others of its model and as many devices."""
        devices = profile.devices(run.cluster.devices)
        spaces_recovery = "recover_every" not in run.cluster.model_fields_set
        return cls(profile, run.model.shape(), devices, tokens, choice, Margins.of(profile), spaces_recovery)

    def recovering(self, cluster: Cluster, every: int) -> Cluster:
        """Return the candidates' cluster with recovery points so many merges apart, the same object every time."""
        if every not in self.clusters:
            self.clusters[every] = cluster.model_copy(update={"recover_every": every})
        return self.clusters[every]


@dataclass(frozen=True)
class Candidate:
    """One way to train, with what it costs on the profile; figures are for one device unless they say otherwise."""

    run: Run
    setting: Setting
    memory: Memory
    """At its peak: the highest phase."""
    heights: Heights
    """Of all phases."""
    host_memory_by_part: dict[str, int]
    sent_bytes_per_round: float
    time: RoundTime
    pauses: Pauses
    wall_s: float
    """Of the whole run: training, evaluations and checkpoints."""
    samples_factor: float

    @property
    def tokens(self) -> int:
        """Asked for; steps round them up."""
        return self.setting.tokens

    @property
    def margins(self) -> Margins:
        """How far times may be off."""
        return self.setting.margins

    @property
    def efficiency(self) -> Efficiency | None:
        """The samples model; None: the shipped one."""
        return self.setting.choice.efficiency

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against it."""
        probe = self.setting.choice.probe
        return (*_warnings(self.run, self.setting, self.time), *(probe.marks(self.run) if probe else ()))

    @property
    def received_bytes_per_round(self) -> float:
        """Bytes that a device receives in a round, the mean over the run's."""
        received = received_bytes(self.run, self.setting.shape, self.run.train.steps)
        return received / self.rounds / self.run.cluster.devices

    @cached_property
    def equivalent_wall_s(self) -> float:
        """Seconds to the loss that dense small-batch training has after the asked tokens; what candidates rank by."""
        trained = self.run.train.steps * self.run.tokens_per_step * self.trained_share
        return self.wall_s * self.samples_factor * self.tokens / trained

    @property
    def memory_by_phase(self) -> dict[str, int]:
        """Bytes of all parts at the height of each phase."""
        return self.heights.totals()

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return num_rounds(self.run)

    @property
    def equivalent_sent_bytes(self) -> float:
        """Bytes that a device sends until that loss is reached."""
        return self.sent_bytes_per_round * self.rounds * self.equivalent_wall_s / self.wall_s

    @property
    def host_memory_bytes(self) -> int:
        """Bytes of the host's own memory that one device needs."""
        return sum(self.host_memory_by_part.values())

    @property
    def training_s(self) -> float:
        """Seconds of the whole run's rounds."""
        return self.wall_s - self.pauses.total_s

    @property
    def step_s(self) -> float:
        """Seconds of one step with its share of the exchange."""
        return self.time.round_s / self.time.steps

    @property
    def samples_per_s(self) -> float:
        """Samples a second over all devices."""
        return self.time.device_steps * self.run.train.micro_batch / self.time.round_s

    @property
    def trained_share(self) -> float:
        """Share of the steps that lockstep would have devices take."""
        return self.time.device_steps / (self.time.steps * self.run.cluster.devices)

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as the plan's JSON has it."""
        method = self.run.method
        return {
            "method": method.name,
            "rank": getattr(method, "rank", None),
            "heads": self.run.heads or None,
            "heads_per_device": getattr(method, "heads_per_device", None),
            "quantize": method.frozen_format,
            "merge_every": getattr(method, "merge_every", None),
            "merge_transport": getattr(method, "merge_transport", None),
            "reset": getattr(method, "reset", None),
            "wire": getattr(method, "wire", "full"),
            "fragments": getattr(method, "fragments", 1),
            "micro_batch": self.run.train.micro_batch,
            "activation_checkpointing": self.run.train.activation_checkpointing,
            "autocast": self.run.train.autocast,
            "optimizer_state": self.run.train.optimizer_state,
            "steps": self.run.train.steps,
            "memory_bytes": {"total": self.memory.total, **self.memory.parts()},
            "memory_by_phase": self.memory_by_phase,
            "host_memory_bytes": self.host_memory_bytes,
            "host_memory_by_part": self.host_memory_by_part,
            "sent_bytes_per_round": self.sent_bytes_per_round,
            "sent_bytes_per_step": self.sent_bytes_per_round / self.time.steps,
            "received_bytes_per_step": self.received_bytes_per_round / self.time.steps,
            "sent_bytes": self.sent_bytes_per_round * num_rounds(self.run),
            "compute_s": self.time.compute_s,
            "exchange_s": self.time.exchange_s,
            "step_s": self.step_s,
            "round_s": self.time.round_s,
            "samples_per_s": self.samples_per_s,
            "wall_s": self.wall_s,
            "training_s": self.training_s,
            "evaluations": self.pauses.evaluations,
            "evaluation_s": self.pauses.evaluation_s,
            "checkpoints": self.pauses.saves,
            "checkpoint_bytes": self.pauses.save_bytes,
            "checkpoint_s": self.pauses.save_s,
            "assumed_samples_factor": self.samples_factor,
            "equivalent_wall_s": self.equivalent_wall_s,
            **range_keys(self),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Rejected:
    """A candidate that does not fit, and why."""

    candidate: Candidate
    reason: str
    short_bytes: int = 0
    """What a device lacks."""
    host_short_bytes: int = 0
    """What a device's host lacks; where both share one memory, what is missing beside the device's own bytes."""
    late_s: float = 0.0
    """How much too long it takes."""

    @property
    def missing(self) -> tuple[int, float]:
        """Bytes of both, then seconds: what the nearest miss has least of."""
        return self.short_bytes + self.host_short_bytes, self.late_s


@dataclass(frozen=True)
class Plan:
    """Candidates ranked by time to equal loss, the choice, and dense training on the same hardware."""

    profile: Profile
    base: Run
    tokens: int
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    chosen: Candidate | None
    dense: Candidate | Rejected | None
    notes: tuple[str, ...]
    rivals: tuple[Candidate | Rejected, ...] = ()
    """The best of each method that was not chosen from, or its nearest miss."""
    pins: Pins = FREE
    choice: Choice = BY_TIME

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as `lte plan --json` prints it and as runs keep it in plan.json."""
        shape = self.base.model.shape()
        dense = self.dense and candidate_of(self.dense)
        return {
            "version": PLAN_VERSION,
            "profile": self.profile.name,
            "devices": self.base.cluster.devices,
            "tokens": self.tokens,
            "model": {
                "name": shape.name,
                "parameters": shape.parameters,
                "adapted_parameters": shape.adapted_parameters,
            },
            "chosen": self.chosen and self.chosen.to_dict(),
            "dense": dense and {**dense.to_dict(), "fits": not isinstance(self.dense, Rejected)},
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "rejected": [{"candidate": r.candidate.to_dict(), "reason": r.reason} for r in self.rejected],
            "rivals": [
                {**candidate_of(rival).to_dict(), "fits": not isinstance(rival, Rejected)} for rival in self.rivals
            ],
            "notes": list(self.notes),
            "objective": self.choice.objective,
            "price_per_hour": hourly_price(self.profile, self.base.cluster.devices),
        }

    def tightest_device(self) -> Device:
        """Return the device that the choice leaves the least room on."""
        assert self.chosen is not None
        run, shape = self.chosen.run, self.base.model.shape()
        return min(
            self.profile.devices(run.cluster.devices),
            key=lambda device: device.memory_bytes - peak_memory(run, shape, device).total,
        )

    def nearest_miss(self) -> Rejected | None:
        """Return the rejected candidate that lacks the least memory, or of those that lack none the least late."""
        return min(self.rejected, key=lambda rejected: rejected.missing, default=None)


def evaluate(run: Run, profile: Profile, tokens: int, choice: Choice | None = None) -> Candidate | Rejected:
    """Work out one run on a profile: its costs, and whether every device can hold it."""
    return _evaluate(run, Setting.of(run, profile, tokens, choice or Choice()))


def _evaluate(run: Run, setting: Setting) -> Candidate | Rejected:
    shape, devices, choice = setting.shape, setting.devices, setting.choice
    kinds = distinct(devices)
    fullest = [(device, heights(run, shape, device)) for device in kinds]
    peaks = [(device, high, high.peak()) for device, high in fullest]
    device, high, memory = min(peaks, key=lambda peak: peak[0].memory_bytes - peak[2].total)
    host_parts = host_memory_by_part(run, shape, device)
    time, rounds = round_time(run, shape, devices, setting.profile.link), num_rounds(run)
    stops = pauses(run, shape, kinds)
    if setting.spaces_recovery and (every := stops.affordable_recovery(time.round_s / time.steps)) > 1:
        run = run.model_copy(update={"cluster": setting.recovering(run.cluster, every)})
        stops = replace(stops, calendar=Calendar.of(run))
    candidate = Candidate(
        run=run,
        setting=setting,
        memory=memory,
        heights=high,
        host_memory_by_part=host_parts,
        sent_bytes_per_round=sent_bytes(run, shape, run.train.steps) / rounds / run.cluster.devices,
        time=time,
        pauses=stops,
        wall_s=run.train.steps * time.compute_s + rounds * (time.merge_s + time.exchange_s) + stops.total_s,
        samples_factor=samples_factor(run, shape, setting.tokens, choice.efficiency),
    )
    short_bytes = max(0, memory.total - device.memory_bytes)
    # Of one memory, what is left.
    host_room_bytes = device.host_memory_bytes or max(0, device.memory_bytes - memory.total)
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


def _host_reason(parts: dict[str, int], room_bytes: int, device: Device) -> str:
    meanings = {
        "start_weights": "the weights that merges start from",
        "checkpoint_save": "the tensor that a checkpoint is writing",
        "data": "the data",
    }
    largest = meanings[max(parts, key=lambda name: parts[name])]
    return (
        f"needs {sum(parts.values()) / 1e9:.2f} GB of host memory, most of it for {largest}, {device.kind} has "
        f"{room_bytes / 1e9:.2f} GB"
    )


def _memory_reason(memory: Memory, device: Device) -> str:
    parts = {name: size for name, size in memory.parts().items() if name != "reserved"}
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"needs {memory.total / 1e9:.2f} GB, {device.kind} has {device.memory_bytes / 1e9:.2f} GB; "
        f"most goes to {largest} ({parts[largest] / 1e9:.2f} GB)"
    )


def _warnings(run: Run, setting: Setting, time: RoundTime) -> Iterator[str]:
    profile, shape = setting.profile, setting.shape
    share = time.exchange_s / time.round_s
    if share > LINK_DOMINATES:
        yield f"the link dominates: {share:.0%} of the time"
    if run.method.is_paced:
        share = time.device_steps / (time.steps * run.cluster.devices)
        yield f"devices train on {share:.0%} of the samples that they would in lockstep"
    if run.train.dtype == "fp64" and any(d.flop_per_s.fp64 is None for d in profile.device):
        yield "the profile has no fp64 rate; planned at the fp32 rate"
    lower = run.train.autocast
    if lower != "none" and any(getattr(d.flop_per_s, lower) is None for d in profile.device):
        yield f"the profile has no {lower} rate; planned at the fp32 rate, and a CPU that emulates it is far slower"
    method = run.method
    if not isinstance(method, LteOptions):
        return
    if method.rank * run.heads < shape.largest_dimension:
        yield f"rank x heads = {method.rank * run.heads} is below the largest layer dimension {shape.largest_dimension}"
    if run.cluster.devices > 1 and method.merge_transport != "reduce":
        dense = dense_reduction(shape, run.cluster.devices, ELEMENT_BYTES[run.train.dtype])
        if time.exchange_s > exchange_s(dense, link_of(profile.link, run.cluster.backend)):
            yield f"{method.merge_transport} takes longer than reducing the dense delta"


@without_collector()
def make_plan(
    base: Run, profile: Profile, tokens: int, pins: Pins, notes: Sequence[str] = (), choice: Choice | None = None
) -> Plan:
    """Lay out the grid around `base`, evaluate it, and choose; `base` carries every key that no pin or grid varies."""
    choice = choice or Choice()
    pins = replace(pins, ranks=choice.probe.ranks(base)) if choice.probe else pins
    check_formats(base, profile)
    setting = Setting.of(base, profile, tokens, choice)
    shape, devices = setting.shape, setting.devices
    rank = _rank_by(value_of(choice.objective, profile, len(devices)))
    methods = (pins.method,) if pins.method else CHOSEN_FROM

    def results_of(names: Sequence[str]) -> list[Candidate | Rejected]:
        runs = grid(base, shape, names, pins, tokens)
        return [_evaluate(run, setting) for run in runs]

    results = results_of(methods)
    if not results:
        raise InputError(
            f"train.warmup_steps = {base.train.warmup_steps} is not below the steps that {tokens:,} "
            f"{base.model.unit} take, whatever the batch; lower it, or train on more --{base.model.unit}"
        )
    fitting = sorted((r for r in results if isinstance(r, Candidate)), key=rank)
    rejected = tuple(r for r in results if isinstance(r, Rejected))
    plain = (candidate for candidate in fitting if not needs_library(candidate.run))
    chosen = next(plain, None) or next(iter(fitting), None)
    others = METHOD_NAMES if choice.with_rivals and not pins.method else ()
    rivals = [_best(results_of((name,)), rank) for name in others if name not in methods]
    notes = [
        *notes,
        *_choice_notes(chosen, fitting, profile, choice),
        *(choice.probe.notes(base, chosen.run if chosen else None) if choice.probe else ()),
        *_treatment_notes(chosen, shape),
        *shape.notes,
        *_optimizer_notes(chosen),
        *_wire_notes(chosen),
        *format_notes(chosen, profile, lambda run: _evaluate(run, setting)),
        *_checkpoint_notes(chosen, profile),
        *_pace_notes(chosen, shape, profile, devices),
        *(diagnostics_notes(chosen.run, shape) if chosen else ()),
        *_rival_notes(chosen, rivals, rank),
    ]
    return Plan(
        profile=profile,
        base=base,
        tokens=tokens,
        candidates=tuple(fitting),
        rejected=rejected,
        chosen=chosen,
        dense=_best([r for r in results if isinstance(candidate_of(r).run.method, DdpOptions)], rank)
        or _best(results_of(("ddp",)), rank),
        notes=tuple(notes),
        rivals=tuple(rival for rival in rivals if rival is not None),
        pins=pins,
        choice=choice,
    )


Rank = Callable[[Candidate], tuple[float, ...]]


def _rank_by(value: Callable[[Candidate], float]) -> Rank:
    """Return the key to sort by; at an equal value less time and the smaller footprint win, never the grid's order."""
    return lambda c: (value(c), c.equivalent_wall_s, c.memory.total, c.sent_bytes_per_round)


def candidate_of(result: Candidate | Rejected) -> Candidate:
    """Return what was evaluated, whether it fits or not."""
    return result.candidate if isinstance(result, Rejected) else result


def _best(results: Sequence[Candidate | Rejected], rank: Rank) -> Candidate | Rejected | None:
    """Return the first of those that fit, or else the nearest miss."""
    fitting = [r for r in results if isinstance(r, Candidate)]
    misses = [r for r in results if isinstance(r, Rejected)]
    nearest = min(misses, key=lambda r: r.missing, default=None)
    return min(fitting, key=rank, default=None) or nearest


def _choice_notes(
    chosen: Candidate | None, fitting: Sequence[Candidate], profile: Profile, choice: Choice
) -> Iterator[str]:
    sources = {device.source for device in profile.device} | {profile.link.source}
    yield f"figures of profile {profile.name} are {' and '.join(sorted(sources))}: times are estimates, bytes are exact"
    if not Margins.of(profile).is_point:
        yield RULE
    model = choice.efficiency or shipped()
    lte = model.methods["lte"]
    yield (
        f"candidates rank by {MEANINGS[choice.objective]}, with assumed samples over dense: {lte.value:.3g}x "
        f"({lte.low:.3g} to {lte.high:.3g}) for lte at rank x heads >= width and T = {model.merge_every}, more at "
        "lower rank, rarer merges or larger batches (docs/planning.md; --efficiency replaces it)"
    )
    if chosen and fitting[0] is not chosen:
        yield f"{describe(fitting[0].run)} would rank first, with lte[quantize] installed: pin it with --quantize"
    if chosen and chosen.run.method.frozen_format != "none":
        yield from _quantize_notes(chosen)


def needs_library(run: Run) -> bool:
    """Whether a run needs a package that is not installed with the tool."""
    return run.method.frozen_format.startswith("nf4")


def _quantize_notes(chosen: Candidate) -> Iterator[str]:
    method = chosen.run.method
    if method.frozen_format.startswith("nf4"):
        yield f"method.quantize = {method.frozen_format} needs bitsandbytes: pip install 'lte[quantize]'"
    if isinstance(method, LteOptions) and not method.keeps_master and method.reset != "none":
        yield (
            "method.master = none with method.reset = "
            f"{method.reset} loses merged updates that are smaller than a rounding step; try --set method.master=host"
        )


def _optimizer_notes(chosen: Candidate | None) -> Iterator[str]:
    """Name the optimizer that trained best where it was measured, as long as it is no default."""
    if chosen is None or not isinstance(chosen.run.method, LteOptions):
        return
    if chosen.run.train.optimizer == "adamw":
        yield (
            "train.optimizer = muon trained better than adamw on a small text model, with LTE as with dense training "
            "(docs/results.md); try it with --set"
        )


def _wire_notes(chosen: Candidate | None) -> Iterator[str]:
    """Name the format of messages that trained as well as the full one where it was measured."""
    if chosen is None or not isinstance(chosen.run.method, LteOptions) or chosen.run.cluster.devices == 1:
        return
    if chosen.run.method.wire == "full":
        yield (
            "method.wire = int8 sends about a quarter of the bytes, and trained as well as full messages on a small "
            "text model (docs/results.md); try it with --set, and a higher rank for a part of what that saves"
        )


def _checkpoint_notes(chosen: Candidate | None, profile: Profile) -> Iterator[str]:
    """Say what checkpoints take where that is much, or not known."""
    if chosen is None:
        return
    stops, run = chosen.pauses, chosen.run
    if stops.save_s is None:
        yield f"profile {profile.name} has no device.disk_write_bytes_per_s: checkpoints are planned to take no time"
        return
    every, affordable = run.cluster.recover_every, stops.affordable_recovery(chosen.step_s)
    steps = stops.calendar.recover_steps
    lost = f"{steps} steps, {seconds_text(steps * chosen.step_s)} of work"
    if chosen.setting.spaces_recovery and every > 1:
        yield (
            f"cluster.recover_every = {every} keeps recovery points of {bytes_text(stops.save_bytes)} a device to "
            f"{AFFORDABLE_SHARE:.0%} of the time; who is lost costs everybody up to {lost}"
        )
    elif every < affordable:
        yield (
            f"a recovery point after every {steps} steps takes {stops.save_s / (steps * chosen.step_s):.0%} of their "
            f"time; --set cluster.recover_every={affordable} makes that {AFFORDABLE_SHARE:.0%}"
        )


def _pace_notes(
    chosen: Candidate | None, shape: ModelShape, profile: Profile, devices: Sequence[Device]
) -> Iterator[str]:
    """Say what a deadline would do where all wait for slow devices, if the method knows deadlines."""
    if chosen is None or "pace" not in type(chosen.run.method).model_fields or chosen.run.method.is_paced:
        return
    method, step_s = chosen.run.method, device_step_s(chosen.run, shape, devices)
    needs: dict[str, Any] = {"pace": "deadline"}
    if getattr(method, "reset", "") == "none":
        needs |= {"reset": "b", "frozen_a": False}
    without = {"merge_delay": 0, "fragments": 1}
    needs |= {key: value for key, value in without.items() if getattr(method, key, value) != value}
    paced = method.model_copy(update=needs)
    time = round_time(chosen.run.model_copy(update={"method": paced}), shape, devices, profile.link)
    gain = time.device_steps / time.round_s / (chosen.time.device_steps / chosen.time.round_s)
    if max(step_s) > PACE_MATTERS * min(step_s) and gain > 1:
        keys = " and ".join(f"method.{key} = {str(value).lower()}" for key, value in needs.items())
        yield (
            f"devices of profile {profile.name} differ: a step takes the slowest {max(step_s) / min(step_s):.1f}x as "
            f"long as the fastest; with {keys} nobody waits, for {gain:.2f}x the samples a second (docs/methods.md)"
        )


def diagnostics_notes(run: Run, shape: ModelShape) -> Iterator[str]:
    """Say what a run's diagnostics send beside its method, if it has any."""
    if run.train.diagnostics_every is not None:
        sent_bytes = diagnostics_exchange(run, shape).sent_bytes / run.cluster.devices
        yield (
            f"diagnostics every {run.train.diagnostics_every:,} steps: devices in processes of their own send another "
            f"{bytes_text(sent_bytes)} each for them, every time, which is in no other figure"
        )


def _treatment_notes(chosen: Candidate | None, shape: ModelShape) -> Iterator[str]:
    """Say what the choice does with parameters that no low-rank pair serves."""
    if chosen is None or not isinstance(chosen.run.method, AdapterOptions):
        return
    method, elements = chosen.run.method, Counter[str]()
    for tensor in shape.replicated:
        elements[tensor.kind] += tensor.elements
    lte = isinstance(method, LteOptions)
    become = {"norm": method.norms, "bias": method.biases} if isinstance(method, LteOptions) else {}
    parts = (f"{PLURALS[kind]} {count:,} ({become.get(kind, 'average')})" for kind, count in elements.items())
    how = "averaged at merges, unless said" if lte else "gradients averaged at every step"
    yield f"not adapted, every device trains its own copy, {how}: {', '.join(parts)}"


def _rival_notes(chosen: Candidate | None, rivals: Sequence[Candidate | Rejected | None], rank: Rank) -> Iterator[str]:
    """Say which method would be faster still, by its assumed samples: a guess that the user should know of."""
    fitting = [rival for rival in rivals if isinstance(rival, Candidate)]
    best = min(fitting, key=rank, default=None)
    if chosen and best and best.equivalent_wall_s < chosen.equivalent_wall_s:
        share = best.equivalent_wall_s / chosen.equivalent_wall_s
        yield (
            f"{describe(best.run)} would take {share:.2f}x the chosen time to equal loss, if "
            f"{best.samples_factor:.2f}x dense's samples do; see --method {best.run.method.name}"
        )


def describe(run: Run) -> str:
    """Return a run's method in a few words."""
    method = run.method
    details = [*_details(run, method), f"batch {run.train.micro_batch}"]
    if run.train.activation_checkpointing:
        details.append("checkpointing")
    if run.train.autocast != "none":
        details.append(run.train.autocast)
    if run.train.optimizer_state == "8bit":
        details.append("8-bit moments")
    return f"{method.name}{_format(method)} {', '.join(details)}"


def _format(method: MethodOptions) -> str:
    quantize, wire = method.frozen_format, getattr(method, "wire", "full")
    return ("" if quantize == "none" else f" {quantize}") + ("" if wire == "full" else f" over {wire}")


def _details(run: Run, method: MethodOptions) -> Iterator[str]:
    if isinstance(method, AdapterOptions):
        heads = f" x {run.heads} heads" if run.heads > 1 else ""
        yield f"rank {method.rank}{heads}"
    elif (rank := getattr(method, "rank", None)) is not None:
        yield f"rank {rank}"
    if (density := getattr(method, "density", None)) is not None:
        yield f"density {density:g}"
    if (merge_every := getattr(method, "merge_every", None)) is not None:
        yield f"T {merge_every}"
    if isinstance(method, LteOptions):
        yield method.merge_transport
