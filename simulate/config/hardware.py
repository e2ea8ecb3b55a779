"""The schema of profile.toml: which devices there are, what they can hold and do, and the links between them.

Plans, simulations and launched runs all read rates, sizes and prices from one Profile, so each figure is checked here
and nowhere else. simulate.config.profiles builds profiles, costs and the timeline read them, simulate.measure.machine
writes measured ones. Every field is in SI units and says in its docstring what holds when it is not set.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.common.quantities import Bytes, BytesPerSecond, FlopRate, Seconds
from simulate.common.units import bytes_text
from simulate.config.lines import DeviceLine, LineFigures, NamedLine, Place, Source

Dtype = Literal["fp64", "fp32", "fp16", "bf16"]
Collectives = Literal["gloo", "nccl"]
DELAYS_OF_A_HOP: dict[Collectives, float] = {"gloo": 2.0, "nccl": 1.0}
"""One-way delays in one hop. Gloo sends a buffer only on request; 2.0 to 2.9 were measured (bench/README.md)."""
BETWEEN_CPUS = "what launched runs use between CPUs"
LOCAL = "local"
CUDA_HEADROOM_SHARE = 0.05
"""Most by which the closed form of what CUDA's allocator holds was below its replay (simulate/costs/allocator.py)."""
LEAST_BYTES = 10**6
"""Smallest memory of a device: 12 is a unit that was left out."""
MOST_BYTES = 10**15
"""Largest memory of a device, in bytes, and rate of a link, in bytes/s: more than a petabyte is a typing error."""


class FlopPerSecond(toml_io.Schema):
    """Peak rate of dense matrix products by number format, in FLOP/s.

    Plans avoid fp16 and bf16 where they are not set. A run that uses an unset format is timed at the fp32 rate.
    """

    fp32: FlopRate = Field(gt=0)
    fp64: FlopRate | None = Field(default=None, gt=0)
    fp16: FlopRate | None = Field(default=None, gt=0)
    bf16: FlopRate | None = Field(default=None, gt=0)

    def of(self, dtype: Dtype) -> float:
        """Return the rate for `dtype` in FLOP/s."""
        return getattr(self, dtype) or self.fp32


PackedFormat = Literal["bf16", "int8", "nf4", "nf4-double"]
"""Formats of frozen weights that unpacking and packing are measured for."""
OtherFamily = Literal["llama", "vit", "mixer"]
"""Families of networks that have elementwise rates of their own; all others use GPT's."""
Points = list[list[float]]
"""[[size, rate], ...] by growing size; rates between two points are interpolated, beyond the ends constant."""


class Kernels(toml_io.Schema):
    """Measured rates of training's kernels in fp32, by size; they replace `efficiency`."""

    products: Points
    """[FLOP per element of a matrix product's three matrices, FLOP/s]: thin products and small ones have few."""
    attention: Points
    """[FLOP per element, FLOP/s] of causal attention, sized as the product of one head's queries and keys."""
    full_attention: Points | None = None
    """The same where every token sees all others, as in ViT; not set: as causal."""
    elementwise: Points
    """[bytes of one activation tensor between blocks, bytes/s] of all elementwise kernels in GPT's blocks."""
    elementwise_of: dict[OtherFamily, Points] = Field(default_factory=dict)
    """Elementwise rates of other families, which have other activations and norms; not set: as GPT's."""
    optimizer: Points
    """[bytes moved, bytes/s] of an AdamW step."""
    step_s: float = Field(ge=0)
    """Fixed seconds of a step, without the seconds of its layers: kernel launches, measured on a tiny network."""
    layer_s: float = Field(ge=0)
    """Fixed seconds that each linear layer in a block adds to a step, with the norms and activations around it."""
    adapter_s: float = Field(ge=0)
    """Fixed seconds that an adapter adds to its layer."""
    unpack: dict[PackedFormat, Points] = Field(default_factory=dict)
    """[weights of a layer, weights/s] of unpacking a frozen layer, by format; not set: timed by memory traffic."""
    pack: dict[PackedFormat, Points] = Field(default_factory=dict)
    """[weights of a layer, weights/s] of packing a merged layer, by format; not set: not counted."""

    @field_validator("products", "attention", "full_attention", "elementwise", "optimizer")
    @classmethod
    def _points(cls, points: Points | None) -> Points | None:
        return None if points is None else _checked(points)

    @field_validator("elementwise_of", "unpack", "pack")
    @classmethod
    def _points_by_name(cls, points: dict[str, Points]) -> dict[str, Points]:
        return {name: _checked(of_name, f" of {name}") for name, of_name in points.items()}


def _checked(points: Points, owner: str = "") -> Points:
    if not points or any(len(point) != 2 or min(point) <= 0 for point in points):
        raise ValueError(f"points{owner} are [size, rate] pairs of positive numbers, at least one; correct them")
    # Interpolation searches the sizes by bisection.
    sizes = [size for size, _ in points]
    if any(after <= before for before, after in pairwise(sizes)):
        raise ValueError(f"sizes of points{owner} must grow, and are {sizes}; sort them and drop repetitions")
    return points


class Measurement(toml_io.Schema):
    """How and when a measured profile was measured."""

    date: str
    """UTC, ISO 8601."""
    host: str
    torch: str
    """Version of torch."""
    device: str = Field(min_length=1)
    """Type of its torch.device."""
    threads: int = Field(ge=1)
    quick: bool
    clock: str
    """Clock that seconds were read from."""
    seconds: float = Field(ge=0)
    """Seconds that the whole measurement took."""
    disk_write_bytes_per_s: BytesPerSecond = Field(gt=0)
    """Write rate of one part of a checkpoint, in the folder where this was measured."""
    median_s: dict[str, float]
    """Seconds of one repetition, by the name of the measurement."""
    p90_s: dict[str, float]


class Device(toml_io.Schema):
    """One kind of device in a profile, `count` of them."""

    count: int = Field(default=1, ge=1)
    kind: str
    name: str | None = None
    """Its owners' name for it, for plans that say which node it is; not set: its place or its kind."""
    link: NamedLine | None = None
    """Its own line, like "50/10 DSL" or in figures; not set: [link]'s figures."""
    place: str | None = None
    """Name of the [[place]] whose line all its devices share; not set: its own line leads to all others."""
    memory_bytes: Bytes = Field(gt=0, le=MOST_BYTES)
    reserved_bytes: Bytes = Field(ge=0)
    """Bytes that the system, the driver's context and the display keep for themselves."""
    host_memory_bytes: Bytes = Field(ge=0, le=MOST_BYTES)
    """Memory of the host beside the device, per device; 0 where device and host share one memory."""
    device_type: Literal["cpu", "cuda"] | None = None
    """torch's name for it, which decides whose allocator holds its memory; not set: cuda with a memory of its own, cpu
    without."""
    headroom_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of memory_bytes that a plan leaves free; not set: CUDA_HEADROOM_SHARE on CUDA, else 0."""
    memory_bytes_per_s: BytesPerSecond = Field(gt=0, le=MOST_BYTES)
    flop_per_s: FlopPerSecond
    efficiency: float = Field(gt=0, le=1)
    """Share of the peak rate that training reaches."""
    kernels: Kernels | None = None
    """Measured rates by size; not set: every product reaches `efficiency` of the peak."""
    disk_write_bytes_per_s: BytesPerSecond | None = Field(default=None, ge=1, le=MOST_BYTES)
    """Rate at which a checkpoint is digested and written; not set: checkpoints' time is not planned."""
    disk_flush_s: Seconds = Field(default=0.0, ge=0, le=3600)
    """Fixed seconds until a part of a checkpoint is safely on disk, added to the seconds of its bytes."""
    step_jitter: float = Field(default=0.0, ge=0, le=1)
    """Standard deviation of a step's seconds over their mean, of a gamma distribution (simulate/rules/jitter.py)."""
    leave_per_hour: float = Field(default=0.0, ge=0, le=1)
    """Chance that the device leaves within an hour."""
    join_s: Seconds = Field(default=0.0, ge=0)
    """Seconds until a lost device, or its replacement, is back; it joins at the next round."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Price of an hour of the device, in any currency; not set: not known."""
    source: Source
    sources: dict[str, str] = Field(default_factory=dict)
    """Origin of each figure, by its key."""

    @cached_property
    def is_cuda(self) -> bool:
        """Whether CUDA's caching allocator holds its memory."""
        return self.device_type == "cuda" or (self.device_type is None and self.host_memory_bytes > 0)

    @cached_property
    def usable_bytes(self) -> int:
        """Memory that a plan may fill, reserved_bytes included: all but the headroom."""
        headroom = self.headroom_share
        if headroom is None:
            headroom = CUDA_HEADROOM_SHARE if self.is_cuda else 0.0
        return int(self.memory_bytes * (1 - headroom))

    def is_like(self, other: Device) -> bool:
        """Whether two devices compute and hold the same; they may be elsewhere."""
        elsewhere = {"count": other.count, "name": other.name, "link": other.link, "place": other.place}
        return self.model_copy(update=elsewhere) == other

    def __hash__(self) -> int:
        # Written out because `sources` is a dict, which has no hash; costs cache rates by device.
        return hash((self.kind, self.memory_bytes, self.memory_bytes_per_s, self.efficiency))

    @model_validator(mode="after")
    def _reserved_fits(self) -> Device:
        if self.reserved_bytes >= self.memory_bytes:  # a plan would only reject every candidate
            if self.memory_bytes < LEAST_BYTES:  # the other figure is not the mistake
                raise ValueError(
                    f"memory_bytes = {self.memory_bytes} is {bytes_text(self.memory_bytes)}, less than any device has; "
                    'write it with its unit, like memory_bytes = "11 GB"'
                )
            raise ValueError(
                f"reserved_bytes = {self.reserved_bytes} leaves nothing of memory_bytes = {self.memory_bytes}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _below_the_peak(self) -> Device:
        # A rate above the peak is a wrong unit or a wrong peak; either would make every plan too fast.
        for name in ("products", "attention", "full_attention") if self.kernels else ():
            fastest = max((rate for _, rate in getattr(self.kernels, name) or ()), default=0.0)
            if fastest > self.flop_per_s.fp32:
                raise ValueError(
                    f"kernels.{name} reaches {fastest:g} FLOP/s, above the peak flop_per_s.fp32 = "
                    f"{self.flop_per_s.fp32:g}; lower the rate or raise the peak"
                )
        return self


class Link(toml_io.Schema):
    """The links between devices; every figure is for one device's own link, payload rates after protocol overhead."""

    topology: Literal["star", "ring", "mesh"]
    """star: each device on its own up/down link to a hub; ring: to two neighbours; mesh: one link for each pair."""
    up_bytes_per_s: BytesPerSecond = Field(gt=0, le=MOST_BYTES)
    down_bytes_per_s: BytesPerSecond = Field(gt=0, le=MOST_BYTES)
    latency_s: Seconds = Field(ge=0)
    """One-way delay of a message from device to device."""
    collectives: Collectives = "nccl"
    """Library that moves messages: nccl between CUDA GPUs, gloo between CPUs; a run's cluster.backend overrides it."""
    hop_delays: float | None = Field(default=None, ge=1, le=100)
    """One-way delays in a hop of a ring, and with gloo in every message between two devices; not set: 2 with gloo, 1
    with nccl."""
    shared_bytes_per_s: BytesPerSecond | None = Field(default=None, gt=0, le=MOST_BYTES)
    """Bytes/s that all devices together can send, where they share one uplink; not set: each has its own."""
    server_up_bytes_per_s: BytesPerSecond | None = Field(default=None, gt=0, le=MOST_BYTES)
    """Rate of the parameter server's own link; not set: a device's rate. Better set in [server]."""
    server_down_bytes_per_s: BytesPerSecond | None = Field(default=None, gt=0, le=MOST_BYTES)
    node_bytes_per_s: BytesPerSecond | None = Field(default=None, gt=0)
    """Rate between devices of one node, for methods that know nodes; not set: they use the link like all others."""
    node_latency_s: Seconds | None = Field(default=None, ge=0)
    devices_per_node: int | None = Field(default=None, gt=1)
    """Devices of one node, which node_bytes_per_s joins: plans try them as one; not set: the profile does not say."""
    source: Source
    sources: dict[str, str] = Field(default_factory=dict)
    _lines: tuple[DeviceLine, ...] = PrivateAttr(default=())

    @property
    def lines(self) -> tuple[DeviceLine, ...]:
        """The line of each of the profile's devices, in their order; empty where all have this link's figures."""
        private = self.__pydantic_private__  # plans ask often, and self._lines would take three calls more
        return private["_lines"] if private else ()

    def with_lines(self, lines: tuple[DeviceLine, ...]) -> Link:
        """Return the link with a line for each device."""
        link = self.model_copy()
        link._lines = lines
        return link

    def faster(self, factor: float) -> Link:
        """Return the link, and all lines, with each rate multiplied."""
        rates = {key: factor * rate for key, rate in self if key.endswith("bytes_per_s") and rate is not None}
        return self.model_copy(update=rates).with_lines(tuple(line.times(factor, factor) for line in self.lines))

    @model_validator(mode="after")
    def _nodes_have_a_rate(self) -> Link:
        if self.devices_per_node is not None and self.node_bytes_per_s is None:
            raise ValueError(
                f"devices_per_node = {self.devices_per_node} without node_bytes_per_s, the rate inside of a node; give "
                "both, or neither"
            )
        return self

    @property
    def delays_of_a_hop(self) -> float:
        """One-way delays of a hop of a ring."""
        return self.hop_delays or DELAYS_OF_A_HOP[self.collectives]

    def __hash__(self) -> int:
        # Written out because `sources` is a dict, which has no hash; costs cache message times by link.
        return hash(
            (self.topology, self.up_bytes_per_s, self.down_bytes_per_s, self.latency_s, self.shared_bytes_per_s)
        )


class Server(toml_io.Schema):
    """The parameter server that devices push to and pull from."""

    up_bytes_per_s: BytesPerSecond | None = Field(default=None, gt=0, le=MOST_BYTES)
    """Rate at which it sends to all devices together; not set: link.server_up_bytes_per_s, or a device's rate."""
    down_bytes_per_s: BytesPerSecond | None = Field(default=None, gt=0, le=MOST_BYTES)
    price_per_hour: float | None = Field(default=None, ge=0)
    """Price of an hour of it, in the devices' currency; not set: 0."""
    sources: dict[str, str] = Field(default_factory=dict)


class Profile(toml_io.Schema):
    """A hardware profile: devices (they may differ), the link between them, and maybe a server."""

    name: str = ""
    description: str = ""
    device: list[Device] = Field(min_length=1)
    link: Link
    measurement: Measurement | None = None
    place: list[Place] = Field(default_factory=list)
    """Places whose devices share a line."""
    server: Server | None = None
    """Its rates are copied to the link's server_up_bytes_per_s and server_down_bytes_per_s."""

    @model_validator(mode="after")
    def _server_joins_link(self) -> Profile:
        """Give the link the server's rates, which all costs read there."""
        update = {}
        for direction in ("up", "down"):
            given = self.server and getattr(self.server, f"{direction}_bytes_per_s")
            key = f"server_{direction}_bytes_per_s"
            in_link = getattr(self.link, key)
            if given and in_link is not None and in_link != given:
                raise ValueError(
                    f"server.{direction}_bytes_per_s = {given:g} and link.{key} = {in_link:g} say two things of one "
                    "rate; keep one"
                )
            if given:
                update[key] = given
        if update:  # the schema is frozen; a validator still has to set what the rest of the program reads
            object.__setattr__(self, "link", self.link.model_copy(update=update))
        return self

    @model_validator(mode="after")
    def _lines_join_link(self) -> Profile:
        """Give the link each device's line, which all costs read there."""
        numbers = self._place_numbers()
        if not any(device.link or device.place for device in self.device):
            return self
        if self.link.topology != "star":
            raise ValueError(
                f"link.topology = {self.link.topology} has one kind of link for all devices, and lines of their own "
                'lead to a hub; set link.topology = "star", or leave device.link and device.place away'
            )
        link, lines = self.link, list[DeviceLine]()
        defaults = LineFigures(link.down_bytes_per_s, link.up_bytes_per_s, link.latency_s)
        for device in self.device:
            number = numbers[device.place] if device.place else None
            place = None if number is None else self.place[number]
            lines += [DeviceLine.of(device.link, defaults, place, number)] * device.count
        object.__setattr__(self, "link", link.with_lines(tuple(lines)))
        return self

    def _place_numbers(self) -> dict[str, int]:
        """Return the number of each place by its name; raises ValueError for one that is missing or superfluous."""
        numbers = {place.name: number for number, place in enumerate(self.place)}
        if len(numbers) < len(self.place):
            raise ValueError("two places have one name; give each its own, since devices call them by it")
        for index, device in enumerate(self.device):
            if device.place is not None and device.place not in numbers:
                known = ", ".join(numbers) or "there is none"
                raise ValueError(
                    f"device[{index}].place = {device.place!r} is no [[place]] ({known}); add it with its name and link"
                )
        if unused := sorted(set(numbers) - {device.place for device in self.device}):
            raise ValueError(f"no device is at place {unused[0]!r}; set device.place to it, or remove it")
        return numbers

    def with_devices(self, devices: Sequence[Device]) -> Profile:
        """Return the profile with other devices, whose lines its link then has."""
        return Profile(**{**dict(self), "device": list(devices)})

    @property
    def count(self) -> int:
        """Number of devices that the profile lists."""
        return sum(device.count for device in self.device)

    def label(self, index: int) -> str:
        """Return what a device is called in words: its name or its place, and its number where others share that."""
        names = [device.name or device.place for device in self.device for _ in range(device.count)]
        kinds = [device.kind for device in self.device for _ in range(device.count)]
        name = names[index]
        if name is None:
            return f"device {index} ({kinds[index]})"
        return name if names.count(name) == 1 else f"{name} (device {index})"

    def devices(self, num_devices: int) -> tuple[Device, ...]:
        """Return one entry per device; a profile of one kind stretches to any number, a mixed one does not.

        Devices that differ in their lines alone are one object, since costs compute each object once.
        """
        if len(self.device) == 1:
            return (self.device[0],) * num_devices
        if num_devices > self.count:
            raise InputError(
                f"cluster.devices = {num_devices} exceeds the {self.count} devices of the mixed profile {self.name!r}; "
                f"use at most {self.count}, or add a [[device]] to a copy of it (lte profile show {self.name})"
            )
        kinds = list(self.device)
        for index, device in enumerate(kinds) if self.link.lines else ():
            kinds[index] = next(kind for kind in kinds if kind.is_like(device))
        listed = zip(kinds, self.device, strict=True)
        return tuple(kind for kind, device in listed for _ in range(device.count))[:num_devices]
