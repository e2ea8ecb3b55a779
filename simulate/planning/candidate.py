"""Define the candidates of a plan: one way to train each, with its memory, bytes and seconds on a profile.

A plan compares thousands of them, so what they share (PlanContext) is computed once, and figures that only a printed
candidate needs are properties. The planner builds candidates; ranking, notes, explain, what_if and the commands of
`lte` read them. No torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from simulate.config.hardware import Device, Profile
from simulate.config.method_options import MethodOptions
from simulate.config.run import Run
from simulate.config.tables import Cluster, DeviceClass, Train
from simulate.costs.eval_and_save_time import EvalAndSaveTime
from simulate.costs.memory import Memory, PeakProfile, peak_memory
from simulate.costs.message_schedule import dense_reduction, num_rounds, received_bytes
from simulate.costs.message_time import link_of
from simulate.costs.samples import Efficiency
from simulate.costs.step_time import RoundTime, by_class, device_step_s, distinct, exchange_s, idle_share
from simulate.layers.formats import ELEMENT_BYTES
from simulate.models.shapes import ModelShape
from simulate.planning.margins import Margins
from simulate.planning.objective import SelectionCriteria
from simulate.rules.method_plan import plan_of

LINK_DOMINATES = 0.5
"""Share of a round that exchanges take, above which the plan warns."""
SHOWN_AS_ALL = 0.995
"""Share that rounds to 100 per cent."""


@dataclass(frozen=True, eq=False)
class PlanContext:
    """The facts that all candidates of one plan share."""

    profile: Profile
    shape: ModelShape
    devices: tuple[Device, ...]
    tokens: int
    """Tokens to train on, as asked for; whole steps round them up."""
    choice: SelectionCriteria
    margins: Margins
    """Uncertainty of times."""
    spaces_recovery: bool
    """Whether the planner may space recovery points so that they stay affordable; else it keeps the run's."""
    keeps_checkpoints: bool
    """Whether train.checkpoint_every stays as set; else it becomes a multiple of the steps between recovery points."""
    clusters: dict[tuple[int, tuple[DeviceClass, ...]], Cluster] = field(default_factory=dict)
    """Copies of the run's cluster, by merges between recovery points and classes of devices."""
    trains: dict[tuple[int, int], tuple[Train, Train]] = field(default_factory=dict)
    """A table of keys and its copy with other checkpoints, by the first one's id() and their steps."""

    @classmethod
    def of(
        cls, run: Run, profile: Profile, tokens: int, choice: SelectionCriteria, spaces_recovery: bool
    ) -> PlanContext:
        """Return the context of a run and of all variants with the same model and number of devices."""
        devices, keeps = profile.devices(run.cluster.devices), "checkpoint_every" in run.train.model_fields_set
        return cls(profile, run.shape(), devices, tokens, choice, Margins.of(profile), spaces_recovery, keeps)

    def recovering(self, cluster: Cluster, every: int) -> Cluster:
        """Return the cluster with recovery points so many merges apart, the same object every time."""
        key = every, cluster.classes
        if key not in self.clusters:  # thousands of candidates share a few copies
            self.clusters[key] = cluster.model_copy(update={"recover_every": every})
        return self.clusters[key]

    def saving(self, train: Train, every: int) -> Train:
        """Return the keys with checkpoints so many steps apart, the same object every time."""
        key = id(train), every
        if key not in self.trains:  # the first is held, so that no other can get its id
            self.trains[key] = train, train.model_copy(update={"checkpoint_every": every})
        return self.trains[key][1]


@dataclass(frozen=True)
class ClassFigures:
    """One class of devices of a candidate: its keys, and its figures on the fullest and the slowest of its devices."""

    devices: int
    micro_batch: int
    accumulate: int
    autocast: str
    rank: int | None
    heads_per_device: int | None
    quantize: str
    memory_bytes: int
    step_s: float
    kind: str
    """Kind of the fullest one."""
    usable_bytes: int
    """Memory that a plan may fill on that one."""
    idle_share: float
    """Share of a step's compute for which the slowest one waits for the slowest of all devices."""


@dataclass(frozen=True)
class Candidate:
    """One way to train, with its costs on the profile; figures are for one device unless they say otherwise."""

    run: Run
    context: PlanContext
    memory: Memory
    """Memory in the highest phase."""
    peak_profile: PeakProfile
    """Memory in all phases."""
    host_memory_by_part: dict[str, int]
    sent_bytes_per_round: float
    time: RoundTime
    eval_and_save: EvalAndSaveTime
    fullest_class: int
    """Index of the class of devices whose memory this is."""
    wall_s: float
    """Seconds of the whole run: training, evaluations and checkpoints."""
    samples_factor: float

    @property
    def tokens(self) -> int:
        """Tokens to train on, as asked for; whole steps round them up."""
        return self.context.tokens

    @property
    def margins(self) -> Margins:
        """Uncertainty of times."""
        return self.context.margins

    @property
    def efficiency(self) -> Efficiency | None:
        """The samples model; None: the shipped one."""
        return self.context.choice.efficiency

    @property
    def warnings(self) -> tuple[str, ...]:
        """Drawbacks, one sentence each."""
        probe = self.context.choice.probe
        return (*_warnings(self.run, self.context, self.time), *(probe.marks(self.run) if probe else ()))

    @property
    def received_bytes_per_round(self) -> float:
        """Bytes that a device receives in a round, the mean over the run's."""
        received = received_bytes(self.run, self.context.shape, self.run.train.steps)
        return received / self.rounds / self.run.cluster.devices

    @cached_property
    def equivalent_wall_s(self) -> float:
        """Seconds to the loss that dense small-batch training reaches with `tokens`; candidates rank by it."""
        # Devices that skip steps train on fewer samples than the run's steps suggest.
        trained = self.run.train.steps * self.run.tokens_per_step * self.trained_share
        return self.wall_s * self.samples_factor * self.tokens / trained

    @property
    def memory_by_phase(self) -> dict[str, int]:
        """Sum of all parts in each phase."""
        return self.peak_profile.totals()

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return num_rounds(self.run)

    @property
    def equivalent_sent_bytes(self) -> float:
        """Bytes that a device sends until it reaches that loss."""
        return self.sent_bytes_per_round * self.rounds * self.equivalent_wall_s / self.wall_s

    @property
    def host_memory_bytes(self) -> int:
        """Bytes of the host's own memory that one device needs."""
        return sum(self.host_memory_by_part.values())

    @property
    def training_s(self) -> float:
        """Seconds of the whole run's rounds."""
        return self.wall_s - self.eval_and_save.total_s

    @property
    def step_s(self) -> float:
        """Seconds of one step with its share of merges and exchanges."""
        return self.time.round_s / self.time.steps

    @property
    def samples_per_s(self) -> float:
        """Samples a second over all devices."""
        if self.run.cluster.classes:
            return self.trained_share * self.time.steps * self.run.samples_per_step / self.time.round_s
        return self.time.device_steps * self.run.train.device_batch / self.time.round_s

    @cached_property
    def idle_share(self) -> float:
        """Share of a round's compute for which devices wait for the slowest, their mean."""
        return idle_share(self.run, self.context.shape, self.context.devices)

    @cached_property
    def classes(self) -> list[ClassFigures]:
        """Classes of devices in global order; one where all are equal."""
        return list(_class_figures(self.run, self.context))

    @property
    def trained_share(self) -> float:
        """Steps that devices take, as a share of those in lockstep."""
        return self.time.device_steps / (self.time.steps * self.run.cluster.devices)


@dataclass(frozen=True)
class Rejected:
    """A candidate that does not fit, and why."""

    candidate: Candidate
    reason: str
    short_bytes: int = 0
    """Bytes that a device lacks."""
    host_short_bytes: int = 0
    """Bytes that a device's host lacks; on one shared memory, on top of `short_bytes`."""
    late_s: float = 0.0
    """Seconds above the allowed time."""

    @property
    def missing(self) -> tuple[int, float]:
        """Key to sort by, least first: missing bytes, then seconds above the allowed time."""
        return self.short_bytes + self.host_short_bytes, self.late_s


def candidate_of(result: Candidate | Rejected) -> Candidate:
    """Return the candidate of a result, whether it fits or not."""
    return result.candidate if isinstance(result, Rejected) else result


def _class_figures(run: Run, context: PlanContext) -> Iterator[ClassFigures]:
    steps_s = device_step_s(run, context.shape, context.devices)
    classes = zip(by_class(run, context.devices), run.cluster.class_devices, strict=True)
    for (one, held), members in classes:
        sizes = [
            (device.usable_bytes - (size := peak_memory(one, context.shape, device).total), size, device)
            for device in distinct(held)
        ]
        _, memory_bytes, fullest = min(sizes, key=lambda room: room[0])
        step_s = max(steps_s[members.start : members.stop])
        yield ClassFigures(
            len(members), one.train.micro_batch, one.train.accumulate, one.train.autocast,
            getattr(one.method, "rank", None), getattr(one.method, "heads_per_device", None), one.method.frozen_format,
            memory_bytes, step_s, fullest.kind, fullest.usable_bytes, 1 - step_s / max(steps_s),
        )  # fmt: skip


def _warnings(run: Run, context: PlanContext, time: RoundTime) -> Iterator[str]:
    profile, shape = context.profile, context.shape
    share = time.exchange_s / time.round_s
    if share > LINK_DOMINATES:
        yield f"the link dominates: {share:.0%} of the time"
    if run.method.is_paced or run.cluster.has_quorum:
        share = time.device_steps / (time.steps * run.cluster.devices)
        if share < SHOWN_AS_ALL:
            yield f"devices train on {share:.0%} of the samples that they would in lockstep"
    if run.train.dtype == "fp64" and any(d.flop_per_s.fp64 is None for d in profile.device):
        yield "the profile has no fp64 rate; planned at the fp32 rate"
    lower = run.train.autocast
    if lower != "none" and any(getattr(d.flop_per_s, lower) is None for d in profile.device):
        yield f"the profile has no {lower} rate; planned at the fp32 rate, and a CPU that emulates it is far slower"
    # The rest concerns heads that train apart: their joint rank, and the transport of their merges.
    method = run.of_class(0).method
    plan = plan_of(method)
    layout = plan.adapters(run.cluster.devices)
    if layout is None or not plan.has_separate_heads:
        return
    total_rank = sum(len(one.devices) * one.held_rank for one in method.fleet) or layout.rank * run.heads
    if total_rank < shape.largest_dimension:
        yield f"rank x heads = {total_rank} is below the largest layer dimension {shape.largest_dimension}"
    if run.cluster.devices > 1 and plan.transport != "reduce":
        wire = getattr(method, "wire", "full")
        dense = dense_reduction(shape, run.cluster.devices, ELEMENT_BYTES[run.train.dtype], wire)
        if time.exchange_s > exchange_s(dense, link_of(profile.link, run.cluster.backend)):
            yield f"{plan.transport} takes longer than reducing the dense delta"


def describe(run: Run) -> str:
    """Return a run's method in a few words."""
    method = run.method
    # Classes that differ in more than their batches and formats are told one by one.
    by_class = (
        len({(getattr(x, "rank", 0), x.num_heads(1), x.frozen_format) for x in (r.method for r in run.classes)}) > 1
    )
    details = [*_details(run, method), batch_text(run)]
    if by_class:
        details = [*_details_of_all(method), classes_text(run)]
    if run.train.activation_checkpointing:
        details.append("checkpointing")
    if run.train.autocast != "none" and not by_class:
        details.append(run.train.autocast)
    if run.train.optimizer_state == "8bit":
        details.append("8-bit moments")
    if run.train.optimizer != "adamw":
        details.append(run.train.optimizer)
    quantize, wire = method.frozen_format, getattr(method, "wire", "full")
    is_told = quantize != "none" and not by_class  # classes say their own
    formats = (f" {quantize}" if is_told else "") + ("" if wire == "full" else f" over {wire}")
    return f"{method.name}{formats} {', '.join(details)}"


def classes_text(run: Run) -> str:
    """Return the classes of a run's devices in words: devices: 2 of batch 16, rank 32; 1 of batch 4, rank 8."""
    texts = []
    for one, members in zip(run.classes, run.cluster.class_devices, strict=True):
        rank, heads = getattr(one.method, "rank", None), getattr(one.method, "heads_per_device", 1)
        pairs = "" if rank is None else f", rank {rank}" + (f" x {heads} heads" if heads > 1 else "")
        formats = [name for name in (one.train.autocast, one.method.frozen_format) if name != "none"]
        texts.append(f"{len(members)} of " + ", ".join([batch_text(one) + pairs, *formats]))
    return "devices: " + "; ".join(texts)


def _details_of_all(method: MethodOptions) -> Iterator[str]:
    if (merge_every := getattr(method, "merge_every", None)) is not None:
        yield f"T {merge_every}"
    if transport := plan_of(method).transport:
        yield transport


def batch_text(run: Run) -> str:
    """Return a device's samples of a step in words, with its passes where there are several: batch 8 x 4.

    Of devices of several classes one after the other: batch 8 / 8 x 4.
    """
    if run.cluster.classes:
        return "batch " + " / ".join(_class_text(one, run) for one in run.classes)
    passes = f" x {run.train.accumulate}" if run.train.accumulate > 1 else ""
    return f"batch {run.train.micro_batch}{passes}"


def _class_text(one: Run, run: Run) -> str:
    autocast = one.train.autocast
    return batch_text(one).removeprefix("batch ") + (f" {autocast}" if autocast != run.train.autocast else "")


def joined_devices(method: MethodOptions) -> int:
    """Return how many devices hold the same heads and train as one; 1 where each has its own, or there are none."""
    return int(getattr(method, "devices_per_node", 1)) if plan_of(method).has_separate_heads else 1


def _details(run: Run, method: MethodOptions) -> Iterator[str]:
    if (rank := getattr(method, "rank", None)) is not None:
        yield f"rank {rank} x {run.heads} heads" if run.heads > 1 else f"rank {rank}"
    if (size := joined_devices(method)) > 1:
        yield f"nodes of {size}"
    if (density := getattr(method, "density", None)) is not None:
        yield f"density {density:g}"
    yield from _details_of_all(method)


def needs_library(run: Run) -> bool:
    """Whether a run needs a package that is not installed with the tool."""
    return run.method.frozen_format.startswith("nf4")


def is_library_installed() -> bool:
    """Whether bitsandbytes, which unpacks NF4, is installed; its import would take seconds."""
    return importlib.util.find_spec("bitsandbytes") is not None
