"""The [data], [train] and [cluster] tables of run.toml, typed and frozen; torch-free.

These are the keys that mean the same for every model and method. simulate.config.run joins them with [model] and
[method] to one run; docs/run.md explains each key to users.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from simulate.common import toml_io
from simulate.common.errors import near_match
from simulate.common.live_objects import is_live
from simulate.common.quantities import read_link
from simulate.layers.formats import Quantize

DATA_NAMES = ("stdlib", "digits")
HUB = "hf:"
DEFAULT_AGE_EXPONENT = 0.5
"""p of the discount (1 + age)^-p, as in FedAsync's polynomial staleness (arXiv 1903.03934, section 5.2)."""
BYTES, BPE = "bytes", "bpe:"
BYTE_VALUES = 256
KEYS_OF_NAME = ("subset", "column", "rows")
"""Keys of [data] that go with a name only, one that starts with HUB."""
DataFormat = Literal["text", "images", "cifar", "stl10"]
Share = Annotated[float, Field(gt=0)]
Autocast = Literal["none", "bf16", "fp16"]


def _as_names(value: Any) -> Any:
    """Turn a list, or names with commas between them, as --set has them, into a tuple."""
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else _as_tuple(value)


def _as_tuple(value: Any) -> Any:
    """Turn TOML's list into a tuple: a frozen run is hashed as the key of cached results."""
    return tuple(value) if isinstance(value, list) else value


class Data(toml_io.Schema):
    """Where samples come from (an embedded set by name, or a path), how they are read, and whose they are."""

    name: str | None = None
    """stdlib: the source text of the Python standard library; digits: scikit-learn's images; hf:NAME: a data set of the
    Hugging Face hub, or a folder that its library can load."""
    path: str | None = Field(default=None, min_length=1)
    format: DataFormat | None = None
    """Format of the files at the path; not set: recognised from the files."""
    field: str | None = Field(default=None, min_length=1)
    """Field of records (.jsonl, Parquet) at the path that holds the text; not set: the only field of text."""
    subset: str | None = None
    """Configuration of a data set from hf: that has several."""
    column: str | None = None
    """Column of texts or images of a data set from hf:; not set: the only such column."""
    rows: int | None = Field(default=None, gt=0)
    """Most rows to read of a data set from hf:, from the first on; not set: all."""
    tokenizer: str = Field(default=BYTES, min_length=1)
    """Tokenizer of text: bytes, bpe:VOCAB (trained on the training split), or the path to a tokenizer.json."""
    skip_corrupt: bool = False
    """Leave images out that cannot be decoded, and count them, instead of refusing the data set."""
    upscale: bool = False
    """Enlarge images that have fewer pixels than the model reads, instead of refusing them."""
    augment: Annotated[tuple[Literal["crop", "flip"], ...], BeforeValidator(_as_tuple)] = ()
    """Changes to training images: crop after padding by an eighth of the side; flip left and right half of the time."""
    mixup: float = Field(default=0.0, ge=0)
    """Mix images of a batch, and their classes, in shares drawn from Beta(mixup, mixup); 0 mixes nothing."""
    shards: Annotated[tuple[Share, ...] | None, BeforeValidator(_as_tuple)] = None
    """Relative sizes of the devices' shards, one a device; not set: equal."""
    skew: float | None = Field(default=None, gt=0)
    """Alpha of the Dirichlet distribution that deals classes of images to devices; not set: all get equal shares."""

    @model_validator(mode="after")
    def _one_of(self) -> Data:
        if (self.name is None) == (self.path is None):
            raise ValueError("needs exactly one of name (name = 'stdlib') and path; remove one or add one")
        if is_live(self.name):
            self._refuse_keys_of_files()
        elif self.name is not None and self.name not in DATA_NAMES and not self.from_hub:
            raise ValueError(f"name = {self.name!r} is not known; {near_match(self.name, (*DATA_NAMES, HUB + 'NAME'))}")
        if self.format is not None and self.path is None:
            raise ValueError(f"format = {self.format!r} says what lies at a path, and there is none; remove it")
        if self.field is not None and self.path is None:
            raise ValueError(f"field = {self.field!r} is of records at a path, and there is none; remove it")
        # Refused, since a key that has no effect hides a mistake.
        for key in KEYS_OF_NAME:
            if getattr(self, key) is not None and not self.from_hub:
                raise ValueError(f"{key} = {getattr(self, key)!r} belongs to a name that starts with {HUB}; remove it")
        return self

    def _refuse_keys_of_files(self) -> None:
        """Raise ValueError for keys that change what is read from files: a data set in Python is as it is."""
        for key in ("tokenizer", "skip_corrupt", "upscale", "augment", "mixup", "skew"):
            value = getattr(self, key)
            if value != Data.model_fields[key].default:
                raise ValueError(f"{key} = {value!r} has no effect on a data set that is an object; remove it")

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_known(cls, given: str) -> str:
        size = given.removeprefix(BPE)  # BPE starts from the 256 bytes and adds tokens to them
        if given.startswith(BPE) and (not size.isdecimal() or int(size) < BYTE_VALUES):
            raise ValueError(
                f"tokenizer = {given!r}: after {BPE} comes a number of tokens, at least the {BYTE_VALUES} bytes; "
                f"try --set data.tokenizer={BPE}4096"
            )
        return given

    @property
    def from_hub(self) -> bool:
        """Whether the datasets library loads it."""
        return self.name is not None and self.name.startswith(HUB) and self.name != HUB


def data_key(given: str) -> Literal["name", "path"]:
    """Return the key of [data] that --data gives: the name of an embedded, hub or live data set, else a path."""
    is_name = given in DATA_NAMES or given.startswith(HUB) or is_live(given)
    return "name" if is_name and not Path(given).exists() else "path"


class Train(toml_io.Schema):
    """The optimisation, in optimizer steps."""

    steps: int = Field(default=1000, gt=0)
    micro_batch: int = Field(default=8, gt=0)
    """Samples of one device in one forward and backward pass."""
    accumulate: int = Field(default=1, gt=0)
    """Passes whose gradients add up to one optimizer step: a device's step has micro_batch x accumulate samples."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Course of the rate after the warm-up; wsd: constant, then linearly down over the last decay_share of steps."""
    final_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak rate at the end of a run; a constant rate stays at its peak."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps over which wsd's rate decays."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up; not set: warmup_share says it, or there is none."""
    warmup_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps that are warm-up, rounded down to whole steps, so that it fits any number of steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay, on matrices only."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    optimizer: Literal["adamw", "muon", "apollo"] = "adamw"
    """muon: orthogonalised momentum for the matrices of linear layers and for adapters' factors, AdamW for the rest;
    apollo: for the matrices of dense training, moments of a random projection of the gradient (arXiv 2412.05270)."""
    optimizer_state: Literal["fp32", "8bit"] = "fp32"
    """Format of AdamW's moments: as the weights, or 8 bits an element and a scale for 256; Muon's is as the weights."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    apollo_rank: int | None = Field(default=None, gt=0)
    """Rows that APOLLO projects a gradient to; not set: a quarter of each matrix's shorter side."""
    apollo_scale: float = Field(default=1.0, gt=0)
    """Size of APOLLO's steps; 1: as large as AdamW's."""
    apollo_refresh_every: int = Field(default=200, gt=0)
    """Steps after which APOLLO draws another projection."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm of one device (ddp: of the averaged gradient)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: Literal["fp32", "fp64"] = "fp32"
    autocast: Autocast = "none"
    """Format of matrix products and of the inputs kept for their backward passes; all else stays in dtype."""
    evaluate_every: int = Field(default=100, gt=0)
    """Steps between evaluations; each waits for the next merge, since only merged weights are one model."""
    diagnostics_every: int | None = Field(default=None, gt=0)
    """Steps between diagnostics; each waits for the next merge. Not set: never."""
    evaluate_samples: int = Field(default=64, gt=0)
    log_every: int = Field(default=1, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    activation_checkpointing: bool = False
    loggers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], BeforeValidator(_as_names)] = (
        "tensorboard",
    )
    """Programs that get the run's curves, beside its events."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Train:
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} and warmup_share = {self.warmup_share:g} both say how long the "
                "warm-up is; keep one, or change the one that is written: --set train.warmup_share=0.05"
            )
        return self

    @property
    def device_batch(self) -> int:
        """Samples of one device in one optimizer step, over all its passes."""
        return self.micro_batch * self.accumulate

    @property
    def num_warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        if self.warmup_share is None:
            return self.warmup_steps or 0
        return whole_steps(self.warmup_share * self.steps)

    @property
    def num_decay_steps(self) -> int:
        """Steps at the run's end over which wsd's rate decays: one at least, and none of the warm-up's."""
        return max(1, min(whole_steps(self.decay_share * self.steps), self.steps - self.num_warmup_steps))


def whole_steps(steps: float) -> int:
    """Return the steps of a share of a run, rounded down; a product just below a whole number counts as it."""
    return int(steps + 1e-6)


def as_tuples(value: Any) -> Any:
    """Turn TOML's nested lists into tuples, since a frozen run is hashed as the key of cached results."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


MergesGiven = Annotated[tuple[tuple[int, ...], ...], BeforeValidator(as_tuples), Field(min_length=1)]
"""Merge by merge, the steps that each device brings; 0: it is late; LOST: it is gone, and brings nothing."""
LOST = -1
"""In `merges_given`: a device that was lost; it takes the merged weights once it is back."""
DEFAULT_REJOIN_S = 10.0


CLASS_KEYS = {
    "micro_batch": "train",
    "accumulate": "train",
    "autocast": "train",
    "rank": "method",
    "heads_per_device": "method",
    "quantize": "method",
}
"""Keys of [[cluster.class]] that stand in place of the run's own, and the tables of those."""


class DeviceClass(toml_io.Schema):
    """Consecutive devices, in global order, that train alike; a key that is not set is the run's own."""

    devices: int = Field(gt=0)
    micro_batch: int | None = Field(default=None, gt=0)
    accumulate: int | None = Field(default=None, gt=0)
    autocast: Autocast | None = None
    rank: int | None = Field(default=None, gt=0)
    heads_per_device: int | None = Field(default=None, gt=0)
    quantize: Quantize | None = None

    def changes(self, table: str) -> dict[str, Any]:
        """Return the keys of one of the run's tables that this class sets, with its values."""
        keys = (key for key, owner in CLASS_KEYS.items() if owner == table)
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


class Cluster(toml_io.Schema):
    """The hardware that is planned for, and simulated or launched on; the waits of launched runs."""

    profile: str = Field(default="local", min_length=1)
    devices: int = Field(default=4, gt=0)
    classes: Annotated[tuple[DeviceClass, ...], BeforeValidator(_as_tuple)] = Field(default=(), alias="class")
    """Classes of unequal devices, one after the other in global order; none: all devices train alike."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Library that moves tensors of a launched run; auto: nccl between CUDA GPUs, gloo else."""
    min_devices: int | None = Field(default=None, gt=0)
    """Devices that a launched run needs to continue without lost nodes, whose data moves to the others. Not set: all,
    so the run waits for lost nodes to return."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for one exchange; must exceed the lag of the slowest device at a merge."""
    join_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for nodes to join, or to return."""
    rejoin_s: float = Field(default=DEFAULT_REJOIN_S, gt=0)
    """Time that lost nodes have to return before the run continues without them, where min_devices allows it."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts without a checkpoint between them before a launched run gives up."""
    recover_every: int = Field(default=1, gt=0)
    """Merges between recovery points of a launched run; where devices exchange at every step, 10 steps count as one."""
    throttle: str | None = None
    """Rate and one-way delay of links ("20 Mbit/s, 20 ms") that the exchanges of a launched run are slowed to; not set:
    they take what they take."""

    @field_validator("throttle")
    @classmethod
    def _is_a_link(cls, throttle: str | None) -> str | None:
        if throttle is not None:
            read_link(throttle)
        return throttle

    quorum: int | None = Field(default=None, gt=0)
    """Devices that a merge needs; who is late brings its change to a later one. Not set: all."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds of a round, after which devices stop and merge. Not set with a quorum: what the quorum-th fastest device
    needs for all steps of a round."""
    age_exponent: float | None = Field(default=None, ge=0)
    """p in the discount (1 + age)^-p of a change that comes `age` merges late. Not set: DEFAULT_AGE_EXPONENT."""
    merges_given: MergesGiven | None = None
    """Steps that each device brings to each merge, in place of quorum and deadline, repeated from the start:
    [[10, 10, 3], [10, 10, 0]]; 0: it is late, -1: it is lost. A run's merge events have them."""

    @cached_property
    def has_quorum(self) -> bool:
        """Whether merges go on without devices that are late or lost."""
        below_all = self.quorum is not None and self.quorum < self.devices
        return below_all or self.deadline_s is not None or self.merges_given is not None

    @property
    def drops_lost(self) -> bool:
        """Whether a launched run drops lost processes and goes on, instead of restarting all."""
        return self.has_quorum and self.merges_given is None

    @property
    def needed(self) -> int:
        """Devices that a merge needs."""
        return self.devices if self.quorum is None else self.quorum

    @property
    def fewest(self) -> int | None:
        """Fewest devices that take part in a merge, where merges may lack some; None where all do."""
        if not self.has_quorum:
            return None
        if self.merges_given is None:
            return self.needed
        return min(sum(steps > 0 for steps in row) for row in self.merges_given)

    @model_validator(mode="after")
    def _quorum_fits(self) -> Cluster:
        if self.quorum is not None and self.quorum > self.devices:
            raise ValueError(f"quorum = {self.quorum} exceeds devices = {self.devices}; lower it, or leave it away")
        if self.age_exponent is not None and not self.has_quorum:
            raise ValueError(
                f"age_exponent = {self.age_exponent:g} discounts late changes, and without a quorum nobody is late; "
                "leave it away, or set cluster.quorum"
            )
        self._check_given_merges()
        if not self.has_quorum:
            return self
        # The keys that the quorum stands for: two rules of who may be missing would contradict each other.
        if self.min_devices is not None:
            raise ValueError(
                f"min_devices = {self.min_devices} and quorum, deadline_s or merges_given both say whom a run can do "
                "without; keep one: with a quorum lost devices are dropped, and nobody takes their data over"
            )
        if self.rejoin_s != DEFAULT_REJOIN_S:
            raise ValueError(
                f"rejoin_s = {self.rejoin_s:g} is a wait for lost nodes, and with quorum, deadline_s or merges_given "
                "nobody waits for them; leave it away"
            )
        return self

    def _check_given_merges(self) -> None:
        if self.merges_given is None:
            return
        for key in ("quorum", "deadline_s"):
            if getattr(self, key) is not None:
                raise ValueError(f"merges_given replays who was there, so {key} says nothing; leave one of them away")
        for number, row in enumerate(self.merges_given):
            if len(row) != self.devices:
                raise ValueError(
                    f"merges_given has a merge of {len(row)} devices for devices = {self.devices}; give one number a "
                    "device"
                )
            if min(row) < LOST or max(row) <= 0:
                raise ValueError(
                    f"merges_given[{number}] = {list(row)}: give the steps that each device brings, 0 for late and -1 "
                    "for lost, and one device at least that brings some"
                )

    @model_validator(mode="after")
    def _min_devices_fit(self) -> Cluster:
        if self.min_devices is not None and self.min_devices > self.devices:
            raise ValueError(f"min_devices = {self.min_devices} exceeds devices = {self.devices}; lower it")
        return self

    @model_validator(mode="after")
    def _classes_have_all_devices(self) -> Cluster:
        counts = [one.devices for one in self.classes]
        if counts and sum(counts) != self.devices:
            terms = " + ".join(map(str, counts))
            raise ValueError(
                f"class has {terms} = {sum(counts)} devices, and devices = {self.devices}; try --set "
                f"cluster.devices={sum(counts)}, or change those of a class"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_table(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write classes under their key, without keys that are not set; a run without classes has no such key."""
        table: dict[str, Any] = serialize(self)
        table.pop("classes", None)
        table.pop("class", None)
        if self.classes:
            table["class"] = [one.model_dump(exclude_none=True) for one in self.classes]
        return table

    def class_of(self, device: int) -> int:
        """Return the index of the class that a device belongs to."""
        return next(index for index, devices in enumerate(self.class_devices) if device in devices)

    @property
    def class_devices(self) -> list[range]:
        """Devices of each class, in global order; all in one where there are no classes."""
        ends = list(accumulate([one.devices for one in self.classes] or [self.devices]))
        return [range(first, end) for first, end in pairwise([0, *ends])]
