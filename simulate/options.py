"""The methods' own keys, as the [method] table of run.toml has them; torch-free.

Letters: N devices, K heads of a device, T steps of a round, r rank, s = alpha / r.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from simulate import toml
from simulate.costs.traffic import Quantize

Master = Literal["host", "server", "none"]
Transport = Literal["gather", "reduce", "server"]
Wire = Literal["full", "fp16", "bf16", "int8", "int4"]
"""How values travel; full: as they are. All others carry what they lost to the next message (error feedback)."""
Pace = Literal["lockstep", "deadline"]
"""Whether all devices take all steps of a round, or each as many as fit into the round's time."""
Norms = Literal["average", "one", "vector-lora", "none"]
Biases = Literal["average", "frozen"]
Convolutions = Literal["lora", "average"]
Draws = Literal["own", "joint"]
"""How the A of different heads are drawn: independently, or with rows that are orthogonal to one another's."""
DEFAULT_SCALE = 64.0  # alpha / rank of the paper's best run: alpha = 4096 at rank 64


def _as_tuples(value: Any) -> Any:
    """TOML has lists; frozen options, which others remember results by, need tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


Steps = Annotated[tuple[tuple[int, ...], ...], BeforeValidator(_as_tuples), Field(min_length=1)]
"""Steps of each device, round by round; they start again where they end."""


class MethodOptions(toml.Schema):
    """What all methods share."""

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
        """Steps from one merge to the next, of whichever group of layers."""
        return self.round_steps // self.merges_per_round

    @property
    def late_steps(self) -> int:
        """Steps from a merge until its result is there."""
        return getattr(self, "merge_delay", 0)

    @property
    def frozen_format(self) -> Quantize:
        """Format of frozen weights, where there are any."""
        frozen: Quantize = getattr(self, "quantize", "none")
        return frozen

    @property
    def is_paced(self) -> bool:
        """Whether a slow device takes fewer steps of a round, instead of all waiting for it."""
        return getattr(self, "pace", "lockstep") == "deadline"

    @property
    def deadline_s(self) -> float | None:
        """Seconds of a paced round, if they are given."""
        return getattr(self, "round_deadline_s", None)

    @property
    def given_steps(self) -> Steps | None:
        """Steps of each device in each paced round, if they are given."""
        return getattr(self, "steps_taken", None)

    def _check_pace(self) -> None:
        if not self.is_paced:
            for key in ("round_deadline_s", "steps_taken"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} is for pace = 'deadline'; try --set method.pace=deadline, or leave it away"
                    )
            return
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

    def _check_delay(self) -> None:
        if self.late_steps >= self.steps_apart and self.late_steps:
            groups = f" / fragments = {self.steps_apart}" if self.merges_per_round > 1 else f" = {self.steps_apart}"
            raise ValueError(
                f"merge_delay = {self.late_steps} is not below merge_every{groups}; lower it, since one merge travels "
                "at a time"
            )


class DenseOptions(MethodOptions):
    """Methods that train every weight."""


class AdapterOptions(MethodOptions):
    """Methods that train low-rank pairs on frozen weights."""

    rank: int = Field(default=32, gt=0)
    """Rank r of one head."""
    alpha: float = Field(default=0.0, gt=0)
    """The adapter's product is scaled by alpha / rank; not set: 64 x rank."""
    adapter_learning_rate: float | None = Field(default=None, gt=0)
    """Not set: train.learning_rate x rank / alpha, so that an Adam step moves W as much as a dense step would."""

    @model_validator(mode="before")
    @classmethod
    def _fill_alpha(cls, given: Any) -> Any:
        if isinstance(given, dict) and "alpha" not in given and isinstance(rank := given.get("rank", 32), int):
            return {**given, "alpha": DEFAULT_SCALE * max(rank, 1)}
        return given

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank

    def held_rank(self, devices: int) -> int:
        """Rank of all the pairs that one device holds and trains for a layer."""
        return self.rank

    def row_rank(self, devices: int) -> int:
        """Rank that one row of activations passes through."""
        return self.rank

    @property
    def remembers_product(self) -> bool:
        """Whether the product at the last merge is kept and subtracted in every pass."""
        return False

    @property
    def keeps_master(self) -> bool:
        """Whether merged weights are kept in full precision beside quantised ones."""
        return False


class DdpOptions(DenseOptions):
    """Dense data parallelism: gradients of all parameters are averaged at every step."""

    name: Literal["ddp"] = "ddp"
    wire: Wire = "full"
    """Format in which gradients travel."""


class SharedAdapterOptions(AdapterOptions):
    """Methods whose adapters all devices share."""

    quantize: Quantize = "none"
    """Format of the frozen weights; products unpack a layer at a time."""


class LoraOptions(SharedAdapterOptions):
    """LoRA (arXiv 2106.09685) under data parallelism: one adapter, never merged."""

    name: Literal["lora"] = "lora"


class ReloraOptions(SharedAdapterOptions):
    """ReLoRA (arXiv 2307.05695): one adapter under data parallelism, merged and drawn anew every T steps."""

    name: Literal["relora"] = "relora"
    merge_every: int = Field(default=100, gt=0)
    """Optimizer steps T from one restart to the next."""
    prune_share: float = Field(default=0.9, ge=0, le=1)
    """Share of the adapters' optimizer state that a restart zeroes: the entries of the smallest magnitude."""
    rewarm_steps: int = Field(default=10, ge=0)
    """Steps over which the learning rate climbs back after a restart."""
    warm_start_steps: int = Field(default=0, ge=0)
    """Dense steps before the first adapter."""

    @property
    def keeps_master(self) -> bool:
        return self.quantize != "none"


class MhloraOptions(SharedAdapterOptions):
    """Multi-head LoRA (arXiv 2402.16828, section 3): all heads on every device, synchronised at every step."""

    name: Literal["mhlora"] = "mhlora"
    heads_per_device: int = Field(default=1, gt=0)
    """The model has N times this many heads, whose mean product is added to W."""

    def held_rank(self, devices: int) -> int:
        return devices * self.heads_per_device * self.rank

    def row_rank(self, devices: int) -> int:
        return self.held_rank(devices)


class AdamixOptions(AdapterOptions):
    """AdaMix (arXiv 2205.12410): a mixture of adapters with random routing, merged by averaging."""

    name: Literal["adamix"] = "adamix"
    experts: int = Field(default=4, gt=0)
    """Pairs to draw from; every step routes through one A and one B of each layer."""

    def held_rank(self, devices: int) -> int:
        return self.experts * self.rank


class LteOptions(AdapterOptions):
    """LoRA-the-Explorer (arXiv 2402.16828, algorithm 1)."""

    name: Literal["lte"] = "lte"
    heads_per_device: int = Field(default=1, gt=0)
    """Each head of a device trains on its own part of the device's batch."""
    merge_every: int = Field(default=10, gt=0)
    """Optimizer steps T of one round."""
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
    room for in a layer's inputs, so that together heads look in all directions alike."""
    fragments: int = Field(default=1, gt=0)
    """Groups of layers that merge at staggered steps, each every T steps: divides the peak traffic."""
    merge_delay: int = Field(default=0, ge=0)
    """Steps that go on while a merge travels; 0 waits for it."""
    pace: Pace = "lockstep"
    """deadline: a slow device takes fewer steps of a round, at least one, and counts for what it trained on."""
    round_deadline_s: float | None = Field(default=None, gt=0)
    """Seconds of a round with pace = "deadline"; not set: what the fastest device needs for T steps."""
    steps_taken: Steps | None = None
    """Steps of each device, round by round, in place of a deadline, and again from the start: [[10, 3], [10, 4]]."""
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
    """Who keeps merged weights in full precision where frozen ones are quantised: every process in host memory, the
    server alone, or nobody: then merges with a reset lose what rounding swallows."""

    @property
    def round_steps(self) -> int:
        return self.merge_every

    @property
    def merges_per_round(self) -> int:
        return self.fragments

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
        self._check_delay()
        self._check_pace()
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
    def _frozen_a_resets(self) -> LteOptions:
        if self.frozen_a and self.reset == "none":
            raise ValueError(
                "frozen_a = true trains alike with reset = 'none' and reset = 'b', which needs less memory; "
                "try --set method.reset=b, or --set method.frozen_a=false to train A, too"
            )
        return self


class LocalSgdOptions(DenseOptions):
    """Local SGD (arXiv 1805.09767) and FedAvg (arXiv 1602.05629): weights are averaged every T steps."""

    name: Literal["local-sgd"] = "local-sgd"
    merge_every: int = Field(default=10, gt=0)
    """Optimizer steps T of one round."""
    merge_transport: Literal["reduce", "server"] = "reduce"
    """reduce: everyone's weights are summed; server: push weights, pull their mean."""
    merge_optimizer: Literal["keep", "average", "reset"] = "keep"
    """Adam's moments at a merge: each device keeps its own, they are averaged as well (three times the bytes), or start
    anew."""
    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the devices that train in a round, drawn anew for each; below 1 needs the server and reset."""
    wire: Wire = "full"
    """Format in which the round's change of the weights travels."""
    merge_delay: int = Field(default=0, ge=0)
    """Steps that go on while a merge travels; 0 waits for it."""
    pace: Pace = "lockstep"
    """deadline: a slow device takes fewer steps of a round, at least one, and counts for what it trained on."""
    round_deadline_s: float | None = Field(default=None, gt=0)
    """Seconds of a round with pace = "deadline"; not set: what the fastest device needs for T steps."""
    steps_taken: Steps | None = None
    """Steps of each device, round by round, in place of a deadline, and again from the start: [[10, 3], [10, 4]]."""

    @property
    def round_steps(self) -> int:
        return self.merge_every

    def participants(self, devices: int) -> int:
        """Devices that train in a round: max(1, round(share x N))."""
        return max(1, round(self.participation * devices))

    @model_validator(mode="after")
    def _delay_goes_with_the_rest(self) -> LocalSgdOptions:
        self._check_delay()
        self._check_pace()
        if self.is_paced and self.participation < 1:
            raise ValueError(
                f"pace = 'deadline' is for devices that train in every round, not for participation = "
                f"{self.participation}; leave one of them away"
            )
        if self.merge_delay and self.participation < 1:
            raise ValueError(
                f"merge_delay = {self.merge_delay} lets devices go on from weights of their own, which participation = "
                f"{self.participation} takes from them; try --set method.merge_delay=0"
            )
        if self.merge_delay and self.merge_optimizer == "average":
            raise ValueError(
                f"merge_delay = {self.merge_delay} would add to averaged second moments what may make them negative; "
                "try --set method.merge_optimizer=keep"
            )
        return self

    @model_validator(mode="after")
    def _stateless_clients(self) -> LocalSgdOptions:
        if self.participation < 1 and (self.merge_transport != "server" or self.merge_optimizer != "reset"):
            raise ValueError(
                f"participation = {self.participation} leaves devices out, which then have neither weights nor "
                "optimizer state; it needs merge_transport = 'server' and merge_optimizer = 'reset'"
            )
        if self.wire != "full" and (self.merge_transport == "server" or self.merge_optimizer == "average"):
            raise ValueError(
                f"wire = {self.wire!r} carries changes of weights in an all-reduce; it needs "
                "merge_transport = 'reduce' and merge_optimizer other than 'average'"
            )
        return self


class DilocoOptions(DenseOptions):
    """DiLoCo (arXiv 2311.08105): local AdamW, and Nesterov momentum on the averaged change of each round."""

    name: Literal["diloco"] = "diloco"
    merge_every: int = Field(default=10, gt=0)
    """Optimizer steps T of one round (the paper: 500)."""
    outer_learning_rate: float = Field(default=0.7, gt=0)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    wire: Wire = "full"
    """Format in which outer gradients travel."""
    fragments: int = Field(default=1, gt=0)
    """Groups of parameters that merge at staggered steps (Streaming DiLoCo, arXiv 2501.18512)."""
    merge_delay: int = Field(default=0, ge=0)
    """Steps that go on while a merge travels (Streaming DiLoCo's overlap); 0 waits for it."""
    pace: Pace = "lockstep"
    """deadline: a slow device takes fewer steps of a round, at least one, and counts for what it trained on."""
    round_deadline_s: float | None = Field(default=None, gt=0)
    """Seconds of a round with pace = "deadline"; not set: what the fastest device needs for T steps."""
    steps_taken: Steps | None = None
    """Steps of each device, round by round, in place of a deadline, and again from the start: [[10, 3], [10, 4]]."""

    @property
    def round_steps(self) -> int:
        return self.merge_every

    @property
    def merges_per_round(self) -> int:
        return self.fragments

    @model_validator(mode="after")
    def _delay_fits(self) -> DilocoOptions:
        self._check_delay()
        self._check_pace()
        return self


class DasoOptions(DenseOptions):
    """DASO (arXiv 2104.05588): synchronous inside a node, delayed averaging between nodes."""

    name: Literal["daso"] = "daso"
    devices_per_node: int = Field(default=2, gt=0)
    merge_every: int = Field(default=4, gt=0)
    """Steps from one global exchange to the next."""
    delay_steps: int = Field(default=1, ge=0)
    """Steps that go on while a global exchange travels; 0 waits for it."""

    @property
    def round_steps(self) -> int:
        return self.merge_every

    @model_validator(mode="after")
    def _delay_within_round(self) -> DasoOptions:
        if self.delay_steps >= self.merge_every:
            raise ValueError(
                f"delay_steps = {self.delay_steps} is not below merge_every = {self.merge_every}; lower it, since one "
                "exchange travels at a time"
            )
        return self


class SapipeOptions(DenseOptions):
    """SAPipe (NeurIPS 2022): averaged gradients arrive one step late, and devices predict the weights to come."""

    name: Literal["sapipe"] = "sapipe"
    compensation: Literal["none", "prediction", "delay"] = "prediction"
    """none: plain stale gradients; prediction: gradients are taken at weights predicted with the device's own gradient;
    delay: stale gradients are corrected to first order (arXiv 1609.08326)."""
    delay_factor: float = Field(default=0.2, ge=0)
    """Strength of the delay compensation."""


class PowerSgdOptions(DenseOptions):
    """PowerSGD (arXiv 1905.13727): rank-r power iteration on gradients, with error feedback."""

    name: Literal["powersgd"] = "powersgd"
    rank: int = Field(default=4, gt=0)


class TopkOptions(DenseOptions):
    """The largest gradient entries with error feedback (arXiv 1809.07599)."""

    name: Literal["topk"] = "topk"
    density: float = Field(default=0.01, gt=0, le=1)
    """Share of each parameter's entries that travel, with their indices."""


class SignsgdOptions(DenseOptions):
    """Signs of gradients, scaled by their mean magnitude, with error feedback (arXiv 1901.09847)."""

    name: Literal["signsgd"] = "signsgd"


METHODS: dict[str, type[MethodOptions]] = {
    "lte": LteOptions,
    "ddp": DdpOptions,
    "lora": LoraOptions,
    "relora": ReloraOptions,
    "mhlora": MhloraOptions,
    "local-sgd": LocalSgdOptions,
    "diloco": DilocoOptions,
    "daso": DasoOptions,
    "sapipe": SapipeOptions,
    "adamix": AdamixOptions,
    "powersgd": PowerSgdOptions,
    "topk": TopkOptions,
    "signsgd": SignsgdOptions,
}
METHOD_NAMES = tuple(METHODS)
Method = Annotated[
    LteOptions
    | DdpOptions
    | LoraOptions
    | ReloraOptions
    | MhloraOptions
    | LocalSgdOptions
    | DilocoOptions
    | DasoOptions
    | SapipeOptions
    | AdamixOptions
    | PowerSgdOptions
    | TopkOptions
    | SignsgdOptions,
    Field(discriminator="name"),
]
