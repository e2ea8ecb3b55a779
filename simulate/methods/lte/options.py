"""Keys of [method] for LoRA-the-Explorer, and the combinations of them that are refused; torch-free.

Many keys change what a merge means, so that not every pair of them goes together; each refusal says what would be lost
and which key to change. simulate.config.run validates the table with this class; plan.py and train.py beside it read
its properties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from simulate.comm.transfers import Transport, Wire
from simulate.config.method_options import AdapterOptions, FragmentOptions, MethodOptions, NodeOptions, quorum_key
from simulate.config.tables import Cluster, Train
from simulate.layers.formats import PICKING, Biases, Convolutions, Draws, Norms, Quantize
from simulate.models.schema import FactoryModel, ModelOptions
from simulate.models.shapes import ModelShape

Master = Literal["host", "server", "none"]


class LteOptions(AdapterOptions, FragmentOptions, NodeOptions):
    """LoRA-the-Explorer (arXiv 2402.16828, algorithm 1)."""

    heads_split_batch: ClassVar[bool] = True
    takes_classes: ClassVar[bool] = True
    name: Literal["lte"] = "lte"
    heads_per_device: int = Field(default=1, gt=0)
    """Each head of a device, or of a node of several, trains on its own part of the device's batch."""
    merge_transport: Transport | Literal["auto"] = "gather"
    """gather: everyone sends factors to everyone; reduce: dense deltas are summed; server: push factors, pull W; auto:
    gather or reduce, layer by layer, whichever sends fewer bytes."""
    reset: Literal["none", "b", "ab"] = "b"
    """After a merge: b zeroes B; ab also draws a new A; none keeps A and B and subtracts their old product."""
    merge_optimizer: Literal["keep", "prune", "reset"] = "keep"
    """The adapters' optimizer state after a merge: kept, the smallest nine tenths zeroed, or all zeroed."""
    wire: Wire = "full"
    """Format in which factors, deltas and replicated parameters travel."""
    frozen_a: bool = True
    """Train B alone (LoRA-FA, arXiv 2308.03303): A stays as drawn, which all devices can, so that only B travels. False
    where not given with reset = "none", which trains A as the paper does."""
    draws: Draws = "own"
    """own: every head draws its A by itself; joint: rows of A are orthogonal also between heads, of as many as there is
    room for in a layer's inputs, so that together heads look in all directions alike; columns: rows of A pick one input
    each, no two heads the same, in the layers whose inputs all heads together cover, and joint draws in the others;
    slices: the same with inputs that follow one another, which needs no gather."""
    norms: Norms = "average"
    """Affine parameters of norms: average: each device trains its own, averaged at merges; one: the first device trains
    them for all; vector-lora: a low-rank pair for each; none: they stay as they start."""
    biases: Biases = "average"
    """Biases of linear layers and convolutions: averaged at merges, or frozen."""
    convolutions: Convolutions = "lora"
    """Convolutions: a pair whose B is a 1x1 convolution, or all weights averaged at merges."""
    quantize: Quantize = "none"
    """Format of the frozen weights; products unpack a layer at a time."""
    master: Master = "host"
    """Place of the full-precision merged weights, where frozen ones are quantised: host: each process's memory; server:
    the server alone; none: nowhere, so that merges with a reset lose what rounding swallows."""

    @property
    def frozen_format(self) -> Quantize:
        return self.quantize

    def num_heads(self, devices: int) -> int:
        of_classes = sum(len(one.devices) * one.heads_per_device for one in self.fleet)
        return of_classes or self.num_nodes(devices) * self.heads_per_device

    def held_rank(self, devices: int) -> int:
        return self.heads_per_device * self.rank

    @property
    def remembers_product(self) -> bool:
        return self.reset == "none"

    @property
    def keeps_master(self) -> bool:
        return self.quantize != "none" and self.master != "none"

    @model_validator(mode="before")
    @classmethod
    def _reset_less_trains_a(cls, given: Any) -> Any:
        # The old product A0, B0 is subtracted to train A on; with a frozen A, reset = "b" does the same for less.
        reset_less = isinstance(given, dict) and given.get("reset") == "none" and "frozen_a" not in given
        return {**given, "frozen_a": False} if reset_less else given

    @model_validator(mode="after")
    def _quantized_goes_with_the_rest(self) -> LteOptions:
        if self.master != "host" and self.quantize == "none":
            raise ValueError(
                f"master = {self.master!r} is for quantised weights, and quantize is 'none'; "
                "leave it away, or try --set method.quantize=nf4"
            )
        if self.master == "server" and self.merge_transport != "server":
            raise ValueError(
                f"master = 'server' needs the server to merge, and merge_transport is {self.merge_transport!r}; "
                "try --set method.merge_transport=server"
            )
        if self.merge_delay and self.quantize != "none":
            raise ValueError(
                f"merge_delay = {self.merge_delay} would hold arriving weights unpacked beside quantize = "
                f"{self.quantize!r}; leave one of them away"
            )
        return self

    @model_validator(mode="after")
    def _delay_goes_with_the_rest(self) -> LteOptions:
        if self.is_paced and self.reset == "none":
            raise ValueError(
                "pace = 'deadline' weighs devices anew in every round, so reset-less merges would not take back what "
                "they added; try --set method.reset=b"
            )
        if self.merge_delay and not (self.reset == "none" or (self.reset == "b" and self.frozen_a)):
            move = "reset=b" if self.frozen_a else "reset=none"
            raise ValueError(
                f"merge_delay = {self.merge_delay} with reset = {self.reset!r} and frozen_a = "
                f"{str(self.frozen_a).lower()} would drop what heads learn while a merge travels; try --set "
                f"method.{move}"
            )
        if self.merge_delay and self.norms == "vector-lora":
            raise ValueError(
                f"merge_delay = {self.merge_delay} does not go with norms = 'vector-lora', whose pairs merge at "
                "once; try --set method.norms=average"
            )
        return self

    @model_validator(mode="after")
    def _nodes_step_together(self) -> LteOptions:
        if self.is_paced and self.devices_per_node > 1:
            raise ValueError(
                f"pace = 'deadline' lets devices stop apart, and devices_per_node = {self.devices_per_node} averages "
                "their gradients at every step; leave one of them away"
            )
        return self

    @model_validator(mode="after")
    def _frozen_a_resets(self) -> LteOptions:
        if self.frozen_a and self.reset == "none":
            raise ValueError(
                "frozen_a = true trains alike with reset = 'none' and reset = 'b', which needs less memory; "
                "try --set method.reset=b, or --set method.frozen_a=false to train A, too"
            )
        return self

    @model_validator(mode="after")
    def _columns_are_not_trained(self) -> LteOptions:
        if self.draws in PICKING and not self.frozen_a:
            move = "reset=b --set method.frozen_a=true" if self.reset == "none" else "frozen_a=true"
            raise ValueError(
                f"draws = {self.draws!r} picks columns, and has no A to train, as reset = {self.reset!r} with "
                f"frozen_a = false does; try --set method.{move}, or --set method.draws=joint"
            )
        return self

    def classes_rule(self, of_classes: Sequence[MethodOptions]) -> str | None:
        if self.devices_per_node > 1:
            return (
                f"method.devices_per_node = {self.devices_per_node} joins equal devices, and cluster.class makes them "
                "unequal; leave one of them away"
            )
        ranks = {one.rank for one in of_classes if isinstance(one, LteOptions)}
        if self.draws == "slices" and len(ranks) > 1:
            return (
                f"method.draws = 'slices' divides inputs into slices of one rank, and cluster.class has ranks "
                f"{' and '.join(map(str, sorted(ranks)))}; try --set method.draws=columns"
            )
        formats = {one.frozen_format for one in of_classes}
        if len(formats) == 1:
            return None
        given = f"cluster.class has quantize = {' and '.join(map(repr, sorted(formats)))}"
        if self.merge_transport == "server":
            return f"{given}, and a server sends all devices one format; try --set method.merge_transport=gather"
        if self.master != "host":
            return f"{given}, and only weights in full precision are the same on all; try --set method.master=host"
        return None

    def check_quorum(self, cluster: Cluster) -> None:
        super().check_quorum(cluster)
        key = quorum_key(cluster)
        why = {
            "reset": "a merge whose devices change would not take back what reset-less merges added; try --set "
            "method.reset=b",
            "norms": "merges need one device, or pairs, that all have at once; try --set method.norms=average",
            "master": "the server alone has what a late device needs; try --set method.master=host",
        }
        refused = {
            "reset": self.reset == "none",
            "norms": self.norms in ("one", "vector-lora"),
            "master": self.master == "server",
        }
        for name in (name for name, is_set in refused.items() if is_set):
            raise ValueError(f"method.{name} = {getattr(self, name)!r} does not go with cluster.{key}: {why[name]}")
        if self.devices_per_node > 1:
            raise ValueError(
                f"method.devices_per_node = {self.devices_per_node} averages gradients at every step, and with "
                f"cluster.{key} devices may be late; leave one of them away"
            )
        if self.reset == "ab" and self.frozen_a:
            raise ValueError(
                f"method.reset = 'ab' with frozen_a = true has every device draw the others' A, and with cluster.{key} "
                "late ones have older draws; try --set method.reset=b"
            )

    def shape_of(self, model: ModelOptions) -> ModelShape:
        # Named networks have convolutions at their ends only, which get no pairs.
        return model.shape(self.convolutions) if isinstance(model, FactoryModel) else model.shape()

    def check(self, model: ModelOptions, train: Train, cluster: Cluster) -> None:
        super().check(model, train, cluster)
        self._check_nodes(train, cluster)
        heads, micro_batch = self.heads_per_device, train.micro_batch
        if micro_batch % heads:
            raise ValueError(
                f"train.micro_batch = {micro_batch} is not divisible by method.heads_per_device = {heads}; "
                f"each head needs an equal part of the batch, "
                f"try --set train.micro_batch={heads * max(1, micro_batch // heads)}"
            )

    def processes_rule(self, devices: int, processes: int) -> str | None:
        return super().processes_rule(devices, processes) if self.devices_per_node > 1 else None

    def _check_nodes(self, train: Train, cluster: Cluster) -> None:
        size = self.devices_per_node
        if size == 1:
            return
        if self.num_nodes(cluster.devices) == 1 and self.merge_transport == "server":
            raise ValueError(
                f"method.devices_per_node = {size} makes one node of all devices, which has nothing to push to a "
                "server; try --set method.merge_transport=gather"
            )
        if train.diagnostics_every is not None:
            raise ValueError(
                f"train.diagnostics_every = {train.diagnostics_every} compares heads of lone devices, not of "
                f"method.devices_per_node = {size}; leave one of them away"
            )
