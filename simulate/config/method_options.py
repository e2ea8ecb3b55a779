"""The keys of [method] that several methods share, and the questions that a run asks every method's options.

Each method subclasses one of these in simulate/methods/NAME/options.py. simulate.config.run checks a whole run by
`check`; costs and planning ask the method's plan (simulate.rules.method_plan) for everything else. Torch-free.

Letters: N devices, T steps of a round, r rank, s = alpha / r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from simulate.common import toml_io
from simulate.config.tables import Cluster, Train, as_tuples
from simulate.layers.formats import Quantize
from simulate.models.schema import FactoryModel, ModelOptions
from simulate.models.shapes import ModelShape

Pace = Literal["lockstep", "deadline"]
"""lockstep: every device takes all steps of a round; deadline: each takes as many as fit into the round's time."""
DEFAULT_SCALE = 64.0
"""alpha / rank of the LTE paper's best run (arXiv 2402.16828): alpha = 4096 at rank 64."""


Steps = Annotated[tuple[tuple[int, ...], ...], BeforeValidator(as_tuples), Field(min_length=1)]
"""Steps of each device, round by round; after the last entry the first one follows."""


@dataclass(frozen=True)
class FleetClass:
    """The figures of one class of devices that other classes' merges with it depend on."""

    devices: range
    """Its devices, in global order."""
    samples: int
    """Samples of one device in an optimizer step."""
    heads_per_device: int = 0
    """Low-rank pairs of one device; 0 for dense methods."""
    rank: int = 0
    """Rank of each of them."""

    @property
    def held_rank(self) -> int:
        """Sum of the ranks of one device's pairs."""
        return self.heads_per_device * self.rank


class MethodOptions(toml_io.Schema):
    """The keys and questions of every method."""

    heads_split_batch: ClassVar[bool] = False
    """Whether each head of a device trains on its own part of the batch, so that `heads_per_device` divides it."""
    takes_classes: ClassVar[bool] = False
    """Whether devices may be of unequal classes ([[cluster.class]])."""
    name: str
    _fleet: tuple[FleetClass, ...] = PrivateAttr(default=())
    _class_index: int = PrivateAttr(default=0)

    @property
    def fleet(self) -> tuple[FleetClass, ...]:
        """All classes of devices, in global order, where these options are of one; none where devices are equal."""
        private = self.__pydantic_private__  # plans ask often, and self._fleet would take three calls more
        return private["_fleet"] if private else ()

    @property
    def class_index(self) -> int:
        """The class of devices that these options are of."""
        private = self.__pydantic_private__
        return private["_class_index"] if private else 0

    @property
    def first_device(self) -> int:
        """First of the devices that these options are of, in global order."""
        return self.fleet[self.class_index].devices.start if self.fleet else 0

    def in_fleet(self, fleet: tuple[FleetClass, ...], index: int) -> MethodOptions:
        """Return a copy that knows the classes of devices that it merges with, and which of them it is of."""
        copy = self.model_copy()
        copy._fleet, copy._class_index = fleet, index
        return copy

    @property
    def device_samples(self) -> tuple[int, ...]:
        """Samples of each device in a step, in global order, where these differ; else none."""
        if len({one.samples for one in self.fleet}) < 2:
            return ()
        return tuple(one.samples for one in self.fleet for _ in one.devices)

    @property
    def round_steps(self) -> int:
        """Optimizer steps T between two points at which all devices hold one model."""
        return 1

    @property
    def merges_per_round(self) -> int:
        """Staggered merges in one round, each of another group of layers."""
        return 1

    @property
    def steps_apart(self) -> int:
        """Steps from one merge to the next, over all groups of layers."""
        return self.round_steps // self.merges_per_round

    @property
    def late_steps(self) -> int:
        """Steps from a merge until its result has arrived."""
        return 0

    @property
    def reads_adam_moments(self) -> bool:
        """Whether the method works with Adam's moments, so that no other optimizer can stand in."""
        return False

    @property
    def compresses(self) -> bool:
        """Whether messages say less than what is exchanged, so that each device keeps what its own ones left out."""
        return getattr(self, "wire", "full") != "full"

    @property
    def frozen_format(self) -> Quantize:
        """Format of the frozen weights; "none" where all weights are trained or kept in full."""
        return "none"

    @property
    def is_paced(self) -> bool:
        """Whether a slow device takes fewer steps of a round, so that no other device waits."""
        return False

    @property
    def deadline_s(self) -> float | None:
        """Seconds of a paced round; None where the run does not set them."""
        return None

    @property
    def given_steps(self) -> Steps | None:
        """Steps of each device in each paced round; None where the run does not set them."""
        return None

    def ends_plainly(self, steps: int) -> bool:
        """Whether the last of so many steps does what it would do in a longer run, so that more steps can follow."""
        return steps % self.round_steps == 0 and self.merges_per_round == 1 and self.late_steps == 0

    def num_heads(self, devices: int) -> int:
        """Return the low-rank pairs of one layer over all N devices; 0 where there are none."""
        return 0

    def participants(self, devices: int) -> int:
        """Return how many devices train in a step."""
        return devices

    def shape_of(self, model: ModelOptions) -> ModelShape:
        """Return a network's counts, with the layers that get pairs where the method has some."""
        return model.shape()

    def check(self, model: ModelOptions, train: Train, cluster: Cluster) -> None:
        """Raise ValueError where the keys contradict a run's other tables."""
        if cluster.has_quorum:
            self.check_quorum(cluster)
        wrong = next((len(counts) for counts in self.given_steps or () if len(counts) != cluster.devices), None)
        if wrong is not None:
            raise ValueError(
                f"method.steps_taken has a round of {wrong} devices for cluster.devices = {cluster.devices}; give one "
                "number a device"
            )

    def classes_rule(self, of_classes: Sequence[MethodOptions]) -> str | None:
        """Return the rule that the options of unequal classes break together, with a way out; or None."""
        return None

    def check_quorum(self, cluster: Cluster) -> None:
        """Raise ValueError where merges cannot go on without devices that are late or lost."""
        raise ValueError(
            f"cluster.{quorum_key(cluster)} is for devices that train alone for a round, and method.name = "
            f"{self.name!r} needs all at every step; leave it away, or try --set method.name=lte"
        )

    def processes_rule(self, devices: int, processes: int) -> str | None:
        """Return the rule that splitting the devices over so many processes breaks, or None."""
        return None


def quorum_key(cluster: Cluster) -> str:
    """Return the key of [cluster] that lets merges go on without some devices."""
    return next(key for key in ("merges_given", "deadline_s", "quorum") if getattr(cluster, key) is not None)


class RoundOptions(MethodOptions):
    """The keys of methods whose devices train alone for a round, then merge."""

    merge_every: int = Field(default=10, gt=0)
    """Optimizer steps T of one round."""
    merge_delay: int = Field(default=0, ge=0)
    """Steps that go on while a merge travels; 0 waits for it."""
    pace: Pace = "lockstep"
    """deadline: a slow device takes fewer steps of a round, at least one, and has less weight in its merge."""
    round_deadline_s: float | None = Field(default=None, gt=0)
    """Seconds of a round with pace = "deadline"; not set: the time that the fastest device needs for T steps."""
    steps_taken: Steps | None = None
    """Steps of each device, round by round, instead of a deadline, repeated from the start: [[10, 3], [10, 4]]."""

    @property
    def round_steps(self) -> int:
        return self.merge_every

    @property
    def late_steps(self) -> int:
        return self.merge_delay

    @property
    def is_paced(self) -> bool:
        return self.pace == "deadline"

    @property
    def deadline_s(self) -> float | None:
        return self.round_deadline_s

    @property
    def given_steps(self) -> Steps | None:
        return self.steps_taken

    def check_quorum(self, cluster: Cluster) -> None:
        key = quorum_key(cluster)
        if self.is_paced:
            stands = "deadline_s" if self.given_steps is None else "merges_given"
            raise ValueError(
                f"method.pace = 'deadline' and cluster.{key} both say when a round ends; leave method.pace, "
                f"round_deadline_s and steps_taken away, for which cluster.{stands} stands"
            )
        # A device that is late brings the whole change since its last merge, at one merge.
        for name, value in (("merge_delay", self.late_steps), ("fragments", self.merges_per_round - 1)):
            if value:
                raise ValueError(
                    f"method.{name} = {getattr(self, name)} cuts a round's merge apart, and cluster.{key} lets late "
                    f"devices bring theirs whole; leave one of them away"
                )
        bad = next((c for row in cluster.merges_given or () for c in row if c > self.round_steps), None)
        if bad is not None:
            raise ValueError(
                f"cluster.merges_given has {bad} steps, more than method.merge_every = {self.round_steps}, the most "
                "that a device takes between its merges; correct it"
            )

    @model_validator(mode="after")
    def _delay_and_pace_fit(self) -> RoundOptions:
        self._check_delay()
        self._check_pace()
        return self

    def _check_delay(self) -> None:
        if self.late_steps >= self.steps_apart and self.late_steps:
            groups = f" / fragments = {self.steps_apart}" if self.merges_per_round > 1 else f" = {self.steps_apart}"
            raise ValueError(
                f"merge_delay = {self.late_steps} is not below merge_every{groups}; lower it, since one merge travels "
                "at a time"
            )

    def _check_pace(self) -> None:
        if not self.is_paced:
            for key in ("round_deadline_s", "steps_taken"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} is for pace = 'deadline'; try --set method.pace=deadline, or leave it away"
                    )
            return
        # Merge weights count the steps of one whole round, which delayed or staggered merges cut apart.
        for key, value in (("merge_delay", self.late_steps), ("fragments", self.merges_per_round - 1)):
            if value:
                raise ValueError(
                    f"pace = 'deadline' does not go with {key} = {getattr(self, key)}: what is merged has its weight "
                    f"from the steps of one round; leave {key} away"
                )
        every = self.round_steps
        bad = next((c for counts in self.given_steps or () for c in counts if not 1 <= c <= every), None)
        if bad is not None:
            raise ValueError(f"steps_taken has {bad}, which is not from 1 to merge_every = {every}; correct it")


class FragmentOptions(RoundOptions):
    """The keys of methods that can merge one group of layers after the other."""

    fragments: int = Field(default=1, gt=0)
    """Groups of layers that merge at staggered steps, each every T steps: divides the peak traffic."""

    @property
    def merges_per_round(self) -> int:
        return self.fragments

    def check(self, model: ModelOptions, train: Train, cluster: Cluster) -> None:
        super().check(model, train, cluster)
        # Groups are made of whole blocks; a user network has layers only.
        shape = self.shape_of(model)
        layers = len(shape.in_order()) if isinstance(model, FactoryModel) else shape.layers
        if self.fragments > layers or self.merge_every % self.fragments:
            raise ValueError(
                f"method.fragments = {self.fragments} must divide method.merge_every = {self.merge_every} and be "
                f"at most model.layers = {layers}; try --set method.fragments={math.gcd(self.merge_every, layers)}"
            )


class NodeOptions(MethodOptions):
    """The keys of methods in which the devices of a node average their gradients at every step."""

    devices_per_node: int = Field(default=1, gt=0)
    """Devices of one node, in global order, which train as one; 1: every device by itself."""

    def num_nodes(self, devices: int) -> int:
        """Return into how many nodes the devices are divided."""
        return max(1, devices // self.devices_per_node)

    def check(self, model: ModelOptions, train: Train, cluster: Cluster) -> None:
        super().check(model, train, cluster)
        if cluster.devices % self.devices_per_node:
            raise ValueError(
                f"cluster.devices = {cluster.devices} is not divisible by method.devices_per_node = "
                f"{self.devices_per_node}; change one of them"
            )

    def processes_rule(self, devices: int, processes: int) -> str | None:
        # A node's devices share one copy of what they train: a process holds whole nodes, or an equal part of one.
        size = self.devices_per_node
        if devices % processes or ((devices // processes) % size and size % (devices // processes)):
            return (
                f"do not go with method.devices_per_node = {size} of {devices} devices: each must hold whole nodes, "
                "or an equal part of one; change --processes"
            )
        return None


class AdapterOptions(MethodOptions):
    """The keys of methods that train low-rank pairs on frozen weights."""

    rank: int = Field(default=32, gt=0)
    """Rank r of one head."""
    alpha: float = Field(default=0.0, gt=0)
    """The adapter's product is scaled by alpha / rank; not set: 64 x rank."""
    adapter_learning_rate: float | None = Field(default=None, gt=0)
    """Not set: train.learning_rate x rank / alpha, so that an Adam step moves W as much as a dense step would."""

    @model_validator(mode="before")
    @classmethod
    def _fill_alpha(cls, given: Any) -> Any:
        # Before validation, since no constant can be the default: it grows with the rank.
        if isinstance(given, dict) and "alpha" not in given and isinstance(rank := given.get("rank", 32), int):
            return {**given, "alpha": DEFAULT_SCALE * max(rank, 1)}
        return given

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank

    def num_heads(self, devices: int) -> int:
        return 1

    def held_rank(self, devices: int) -> int:
        """Return the rank of all the pairs that one device holds and trains for a layer."""
        return self.rank

    @property
    def uneven_heads(self) -> bool:
        """Whether devices hold unequal numbers of pairs, or pairs of unequal rank."""
        fleet = self.fleet
        return len(fleet) > 1 and len({(one.heads_per_device, one.rank) for one in fleet}) > 1

    def teams(self, parties: int) -> tuple[FleetClass, ...]:
        """Return the teams of consecutive parties (devices, or nodes that train as one) that hold equal pairs."""
        if self.uneven_heads:
            return self.fleet
        return (FleetClass(range(parties), 0, self.held_rank(parties) // self.rank, self.rank),)

    def total_rank(self, parties: int) -> int:
        """Return the sum of the ranks of all parties' pairs of a layer."""
        if not self.uneven_heads:
            return parties * self.held_rank(parties)
        return sum(len(one.devices) * one.held_rank for one in self.teams(parties))

    def most_held_rank(self, parties: int) -> int:
        """Return the sum of the ranks of a layer's pairs on the party that holds most."""
        return max(one.held_rank for one in self.teams(parties))

    @property
    def head_ranks(self) -> tuple[int, ...]:
        """Rank of each pair of a layer over all devices, in global order, where devices' pairs differ; else none."""
        if not self.uneven_heads:
            return ()
        return tuple(one.rank for one in self.fleet for _ in range(len(one.devices) * one.heads_per_device))

    def heads_of(self, parties: range) -> range:
        """Return the global indices of the pairs of consecutive parties."""
        return range(self._heads_before(parties.start), self._heads_before(parties.stop))

    def _heads_before(self, party: int) -> int:
        if not self.uneven_heads:
            return party * (self.held_rank(1) // self.rank)
        within = ((one.heads_per_device, range(one.devices.start, min(one.devices.stop, party))) for one in self.fleet)
        return sum(heads * len(devices) for heads, devices in within)

    def row_rank(self, devices: int) -> int:
        """Return the rank that one row of activations passes through."""
        return self.rank

    @property
    def remembers_product(self) -> bool:
        """Whether the product at the last merge is kept and subtracted in every pass."""
        return False

    @property
    def keeps_master(self) -> bool:
        """Whether merged weights are kept in full precision beside quantised ones."""
        return False

    def check(self, model: ModelOptions, train: Train, cluster: Cluster) -> None:
        for linear in self.shape_of(model).adapted:
            # B·A has no more than min(I, O) directions, so that a higher rank would only cost memory.
            side, limit = min((linear.in_features, "inputs"), (linear.out_features, "outputs"))[::-1]
            if self.rank > limit:
                raise ValueError(
                    f"method.rank = {self.rank} exceeds the {limit} {side} of {linear.name}; "
                    f"try --set method.rank={limit}"
                )
        super().check(model, train, cluster)


class SharedAdapterOptions(AdapterOptions):
    """The keys of methods whose adapters all devices share."""

    quantize: Quantize = "none"
    """Format of the frozen weights; products unpack a layer at a time."""

    @property
    def frozen_format(self) -> Quantize:
        return self.quantize
