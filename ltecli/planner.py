"""From (run, profile, pins) to candidates, verdicts and a choice; pure arithmetic, no torch, nothing written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from simulate.config import DEFAULT_SCALE, DdpOptions, LteOptions, Run
from simulate.costs.memory import Memory, host_memory_bytes, peak_memory
from simulate.costs.samples import samples_factor
from simulate.costs.time import RoundTime, exchange_s, round_time
from simulate.costs.traffic import ELEMENT_BYTES, dense_reduction, num_rounds, round_exchange
from simulate.errors import InputError
from simulate.hardware import Device, Profile
from simulate.models.shapes import ModelShape

PLAN_VERSION = 1
RANKS = (8, 16, 32, 64, 128, 256)
HEADS_PER_DEVICE = (1, 4)
QUANTIZE = ("none", "int8", "nf4")
MERGE_EVERY = (10, 30, 100)
TRANSPORTS = ("gather", "reduce", "server")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LINK_DOMINATES = 0.5
"""Share of a round spent on the link from which the plan warns."""


@dataclass(frozen=True)
class Candidate:
    """One way to train, with what it costs on the profile; figures are for one device unless they say otherwise."""

    run: Run
    tokens: int
    """Asked for; steps round it up."""
    memory: Memory
    host_memory_bytes: int
    sent_bytes_per_round: float
    received_bytes_per_round: float
    time: RoundTime
    wall_s: float
    samples_factor: float
    warnings: tuple[str, ...]

    @property
    def equivalent_wall_s(self) -> float:
        """Seconds to the loss that dense small-batch training has after the asked tokens; what candidates rank by."""
        trained = self.run.train.steps * self.run.tokens_per_step
        return self.wall_s * self.samples_factor * self.tokens / trained

    @property
    def step_s(self) -> float:
        """Seconds of one step with its share of the exchange."""
        return self.time.round_s / self.time.steps

    @property
    def samples_per_s(self) -> float:
        """Samples a second over all devices."""
        return self.run.cluster.devices * self.run.train.micro_batch / self.step_s

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as the plan's JSON has it."""
        lte = self.run.method if isinstance(self.run.method, LteOptions) else None
        return {
            "method": self.run.method.name,
            "rank": lte and lte.rank,
            "heads": lte and self.run.heads,
            "heads_per_device": lte and lte.heads_per_device,
            "quantize": lte.quantize if lte else "none",
            "merge_every": lte and lte.merge_every,
            "merge_transport": lte and lte.merge_transport,
            "reset": lte and lte.reset,
            "micro_batch": self.run.train.micro_batch,
            "activation_checkpointing": self.run.train.activation_checkpointing,
            "steps": self.run.train.steps,
            "memory_bytes": {"total": self.memory.total, **self.memory.parts()},
            "host_memory_bytes": self.host_memory_bytes,
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
            "assumed_samples_factor": self.samples_factor,
            "equivalent_wall_s": self.equivalent_wall_s,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Rejected:
    """A candidate that does not fit, and why; `short_bytes` is what it lacks."""

    candidate: Candidate
    reason: str
    short_bytes: int


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

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as `lte plan --json` prints it and as runs keep it in plan.json."""
        shape = self.base.model.shape()
        dense = self.dense.candidate if isinstance(self.dense, Rejected) else self.dense
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
            "notes": list(self.notes),
        }

    def nearest_miss(self) -> Rejected | None:
        """Return the rejected candidate that lacks the least memory."""
        return min(self.rejected, key=lambda rejected: rejected.short_bytes, default=None)


def evaluate(run: Run, profile: Profile, tokens: int) -> Candidate | Rejected:
    """Work out one run on a profile: its costs, and whether every device can hold it."""
    shape = run.model.shape()
    return _evaluate(run, shape, profile, profile.devices(run.cluster.devices), tokens)


def _evaluate(
    run: Run, shape: ModelShape, profile: Profile, devices: Sequence[Device], tokens: int
) -> Candidate | Rejected:
    kinds = {id(device): device for device in devices}.values()
    memories = [(device, peak_memory(run, shape, device)) for device in kinds]
    device, memory = min(memories, key=lambda pair: pair[0].memory_bytes - pair[1].total)
    host_bytes = host_memory_bytes(run, shape, device)
    time = round_time(run, shape, devices, profile.link)
    exchange = round_exchange(run, shape)
    num_devices = run.cluster.devices
    rounds = num_rounds(run)
    candidate = Candidate(
        run=run,
        tokens=tokens,
        memory=memory,
        host_memory_bytes=host_bytes,
        sent_bytes_per_round=exchange.sent_bytes / num_devices,
        received_bytes_per_round=exchange.received_bytes / num_devices,
        time=time,
        wall_s=run.train.steps * time.compute_s + rounds * (time.merge_s + time.exchange_s),
        samples_factor=samples_factor(run, shape, tokens),
        warnings=tuple(_warnings(run, shape, profile, time)),
    )
    short_bytes = memory.total - device.memory_bytes
    if short_bytes > 0:
        return Rejected(candidate, f"{_memory_reason(memory, device)}", short_bytes)
    if host_bytes > device.host_memory_bytes:
        short_bytes = host_bytes - device.host_memory_bytes
        reason = (
            f"needs {host_bytes / 1e9:.2f} GB of host memory for the weights that merges start from, {device.kind} has "
        )
        return Rejected(candidate, f"{reason}{device.host_memory_bytes / 1e9:.2f} GB", short_bytes)
    return candidate


def _memory_reason(memory: Memory, device: Device) -> str:
    parts = {name: size for name, size in memory.parts().items() if name != "reserved"}
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"needs {memory.total / 1e9:.2f} GB, {device.kind} has {device.memory_bytes / 1e9:.2f} GB; "
        f"most goes to {largest} ({parts[largest] / 1e9:.2f} GB)"
    )


def _warnings(run: Run, shape: ModelShape, profile: Profile, time: RoundTime) -> Iterator[str]:
    share = time.exchange_s / time.round_s
    if share > LINK_DOMINATES:
        yield f"the link dominates: {share:.0%} of the time"
    if run.train.dtype == "fp64" and any(d.flop_per_s.fp64 is None for d in profile.device):
        yield "the profile has no fp64 rate; planned at the fp32 rate"
    method = run.method
    if not isinstance(method, LteOptions):
        return
    if method.rank * run.heads < shape.largest_dimension:
        yield f"rank x heads = {method.rank * run.heads} is below the largest layer dimension {shape.largest_dimension}"
    if run.cluster.devices > 1 and method.merge_transport != "reduce":
        dense = dense_reduction(shape, run.cluster.devices, ELEMENT_BYTES[run.train.dtype])
        if time.exchange_s > exchange_s(dense, profile.link):
            yield f"{method.merge_transport} takes longer than reducing the dense delta"


@dataclass(frozen=True)
class Pins:
    """What the user fixed; None leaves the planner free."""

    method: str | None = None
    rank: int | None = None
    heads_per_device: int | None = None
    alpha: float | None = None
    quantize: str | None = None
    merge_every: int | None = None
    merge_transport: str | None = None
    micro_batch: int | None = None
    activation_checkpointing: bool | None = None


def make_plan(base: Run, profile: Profile, tokens: int, pins: Pins, notes: Sequence[str] = ()) -> Plan:
    """Lay out the grid around `base`, evaluate it, and choose; `base` carries every key that no pin or grid varies."""
    shape, devices = base.model.shape(), profile.devices(base.cluster.devices)
    results = [_evaluate(run, shape, profile, devices, tokens) for run in _grid(base, shape, pins, tokens)]
    if not results:
        raise InputError(
            f"train.warmup_steps = {base.train.warmup_steps} is not below the steps that {tokens:,} tokens take, "
            "whatever the batch; lower it, or train on more --tokens"
        )
    fitting = sorted((r for r in results if isinstance(r, Candidate)), key=_rank)
    rejected = tuple(r for r in results if isinstance(r, Rejected))
    trainable = [candidate for candidate in fitting if is_trainable(candidate.run)]
    chosen = next(iter(trainable or fitting), None)
    notes = [*notes, *_choice_notes(chosen, fitting, profile)]
    return Plan(
        profile=profile,
        base=base,
        tokens=tokens,
        candidates=tuple(fitting),
        rejected=rejected,
        chosen=chosen,
        dense=_dense(fitting, rejected) or _dense_beside(base, profile, tokens, shape, devices),
        notes=tuple(notes),
    )


def is_trainable(run: Run) -> bool:
    """Whether `lte train` can run this today: quantised weights can be planned only."""
    return not isinstance(run.method, LteOptions) or run.method.quantize == "none"


def _rank(candidate: Candidate) -> tuple[float, ...]:
    # At equal time the smaller footprint wins, so that a tie is never settled by the grid's order.
    return (candidate.equivalent_wall_s, candidate.memory.total, candidate.sent_bytes_per_round)


def _dense(fitting: Sequence[Candidate], rejected: Sequence[Rejected]) -> Candidate | Rejected | None:
    best = next((c for c in fitting if isinstance(c.run.method, DdpOptions)), None)
    misses = [r for r in rejected if isinstance(r.candidate.run.method, DdpOptions)]
    return best or min(misses, key=lambda r: r.short_bytes, default=None)


def _dense_beside(
    base: Run, profile: Profile, tokens: int, shape: ModelShape, devices: Sequence[Device]
) -> Candidate | Rejected | None:
    results = [
        _evaluate(run, shape, profile, devices, tokens) for run in _grid(base, shape, Pins(method="ddp"), tokens)
    ]
    fitting = sorted((r for r in results if isinstance(r, Candidate)), key=_rank)
    return _dense(fitting, [r for r in results if isinstance(r, Rejected)])


def _choice_notes(chosen: Candidate | None, fitting: Sequence[Candidate], profile: Profile) -> Iterator[str]:
    sources = {device.source for device in profile.device} | {profile.link.source}
    yield f"figures of profile {profile.name} are {' and '.join(sorted(sources))}: times are estimates, bytes are exact"
    yield (
        "candidates rank by time to equal loss, with assumed samples over dense: 1.4x for lte at rank x heads >= width "
        "and T = 10 (arXiv 2402.16828), more at lower rank, rarer merges or larger batches (guesses)"
    )
    if chosen and fitting and fitting[0] is not chosen:
        yield f"{describe(fitting[0].run)} would rank first, but quantised weights can only be planned so far"
    elif chosen and not is_trainable(chosen.run):
        yield "only quantised candidates fit; they can be planned, not yet trained"


def describe(run: Run) -> str:
    """Return a run's method in a few words."""
    method = run.method
    text: str = method.name
    if isinstance(method, LteOptions):
        quantized = "" if method.quantize == "none" else f" {method.quantize}"
        text = (
            f"{text}{quantized} rank {method.rank} x {run.heads} heads, T {method.merge_every}, "
            f"{method.merge_transport}"
        )
    return f"{text}, batch {run.train.micro_batch}" + (", checkpointing" if run.train.activation_checkpointing else "")


def _grid(base: Run, shape: ModelShape, pins: Pins, tokens: int) -> Iterator[Run]:
    methods = (pins.method,) if pins.method else ("lte", "ddp")
    checkpointing = (False, True) if pins.activation_checkpointing is None else (pins.activation_checkpointing,)
    unit = pins.heads_per_device or 1
    micro_batches = (pins.micro_batch,) if pins.micro_batch else [unit * size for size in MICRO_BATCHES]
    lte = list(_lte_options(base, shape, pins)) if "lte" in methods else []
    options = (*lte, *([DdpOptions()] if "ddp" in methods else []))
    for micro_batch, recompute in itertools.product(micro_batches, checkpointing):
        train = train_for(base, micro_batch, recompute, tokens)
        if train.warmup_steps >= train.steps:
            continue
        for method in options:
            if isinstance(method, LteOptions) and micro_batch % method.heads_per_device:
                continue
            yield base.model_copy(update={"method": method, "train": train})


def train_for(base: Run, micro_batch: int, recompute: bool, tokens: int) -> Any:
    """Return base.train with a batch, the steps that train on `tokens` with it, and what follows from the steps."""
    steps = max(1, math.ceil(tokens / (base.cluster.devices * micro_batch * base.model.context)))
    every = max(1, steps // 10)
    given = base.train.model_fields_set
    derived = {
        "steps": steps,
        "warmup_steps": min(steps // 20, 2000),
        "evaluate_every": every,
        "checkpoint_every": min(every * 2, 1000),
    }
    update = {key: value for key, value in derived.items() if key not in given}
    return base.train.model_copy(update={**update, "micro_batch": micro_batch, "activation_checkpointing": recompute})


def _lte_options(base: Run, shape: ModelShape, pins: Pins) -> Iterator[LteOptions]:
    """Vary what is not pinned; ranks reach up to the smallest layer dimension."""
    limit = min(min(linear.in_features, linear.out_features) for linear in shape.adapted)
    ranks = (pins.rank,) if pins.rank else [rank for rank in RANKS if rank <= limit] or [limit]
    heads = (pins.heads_per_device,) if pins.heads_per_device else HEADS_PER_DEVICE
    rounds = (pins.merge_every,) if pins.merge_every else MERGE_EVERY
    kinds = (pins.quantize,) if pins.quantize else QUANTIZE
    transports = (pins.merge_transport,) if pins.merge_transport else TRANSPORTS
    if base.cluster.devices == 1:
        transports = transports[:1]
    start = base.method if isinstance(base.method, LteOptions) else LteOptions()
    for rank, per_device, merge_every, quantize, transport in itertools.product(
        ranks, heads, rounds, kinds, transports
    ):
        alpha = DEFAULT_SCALE * rank if pins.alpha is None else start.alpha
        yield start.model_copy(
            update={
                "rank": rank,
                "heads_per_device": per_device,
                "alpha": alpha,
                "merge_every": merge_every,
                "quantize": quantize,
                "merge_transport": transport,
            }
        )
