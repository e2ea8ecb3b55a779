"""The schema of run.toml: one run, complete, typed and frozen, validated once where it is built."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from simulate.common import toml_io
from simulate.common.errors import InputError, near_match
from simulate.config.method_options import AdapterOptions
from simulate.config.method_table import METHOD_NAMES, Method
from simulate.methods.adamix.options import AdamixOptions
from simulate.methods.daso.options import DasoOptions
from simulate.methods.diloco.options import DilocoOptions
from simulate.methods.local_sgd.options import LocalSgdOptions
from simulate.methods.lte.options import LteOptions
from simulate.methods.mhlora.options import MhloraOptions
from simulate.methods.sapipe.options import SapipeOptions
from simulate.models.schema import FactoryModel, GptModel, Model, check_name, sees_images

DATA_NAMES = ("stdlib", "digits")
HUB = "hf:"
BYTES, BPE = "bytes", "bpe:"
BYTE_VALUES = 256
DataFormat = Literal["text", "images", "cifar", "stl10"]
Share = Annotated[float, Field(gt=0)]


def _as_tuple(value: Any) -> Any:
    """TOML has lists; a frozen run, which others remember results by, needs a tuple."""
    return tuple(value) if isinstance(value, list) else value


class Data(toml_io.Schema):
    """Where samples come from (an embedded set by name, or a path), how they are read, and whose they are."""

    name: str | None = None
    """stdlib: the source text of the Python standard library; digits: scikit-learn's images; hf:NAME: a data set of the
    Hugging Face hub, or a folder that its library can load."""
    path: str | None = Field(default=None, min_length=1)
    format: DataFormat | None = None
    """What lies at the path; not set: recognised."""
    subset: str | None = None
    """Of hf: the configuration of a data set that has several."""
    column: str | None = None
    """Of hf: the column of texts or images; not set: the only one."""
    rows: int | None = Field(default=None, gt=0)
    """Of hf: at most so many rows, from the first on; not set: all."""
    tokenizer: str = Field(default=BYTES, min_length=1)
    """Of text: bytes, bpe:VOCAB (trained on the training split), or the path to a tokenizer.json."""
    skip_corrupt: bool = False
    """Leave images out that cannot be decoded, and count them, instead of refusing the data set."""
    upscale: bool = False
    """Enlarge images that have fewer pixels than the model reads, instead of refusing them."""
    augment: Annotated[tuple[Literal["crop", "flip"], ...], BeforeValidator(_as_tuple)] = ()
    """Of training images: crop after padding by an eighth of the side; flip left and right half of the time."""
    mixup: float = Field(default=0.0, ge=0)
    """Mix images of a batch, and their classes, in shares drawn from Beta(mixup, mixup); 0: not."""
    shards: Annotated[tuple[Share, ...] | None, BeforeValidator(_as_tuple)] = None
    """Relative sizes of the devices' shards, one a device; not set: equal."""
    skew: float | None = Field(default=None, gt=0)
    """Of images: alpha of the Dirichlet distribution that deals classes to devices; not set: dealt alike."""

    @model_validator(mode="after")
    def _one_of(self) -> Data:
        if (self.name is None) == (self.path is None):
            raise ValueError("needs exactly one of name (name = 'stdlib') and path; remove one or add one")
        if self.name is not None and self.name not in DATA_NAMES and not self.from_hub:
            raise ValueError(f"name = {self.name!r} is not known; {near_match(self.name, (*DATA_NAMES, HUB + 'NAME'))}")
        if self.format is not None and self.path is None:
            raise ValueError(f"format = {self.format!r} says what lies at a path, and there is none; remove it")
        for key in ("subset", "column", "rows"):
            if getattr(self, key) is not None and not self.from_hub:
                raise ValueError(f"{key} = {getattr(self, key)!r} belongs to a name that starts with {HUB}; remove it")
        return self

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_known(cls, given: str) -> str:
        size = given.removeprefix(BPE)
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


class Train(toml_io.Schema):
    """The optimisation, in optimizer steps."""

    steps: int = Field(default=1000, gt=0)
    micro_batch: int = Field(default=8, gt=0)
    """Samples of one device in one step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak rate, reached after the warm-up; decays on a cosine to a tenth."""
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay, on matrices only."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the matrices of linear layers and for adapters' factors, AdamW for the rest."""
    optimizer_state: Literal["fp32", "8bit"] = "fp32"
    """Of AdamW's moments: as the weights, or 8 bits an element and a scale for 256; Muon's stays as the weights."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm of one device (ddp: of the averaged gradient)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: Literal["fp32", "fp64"] = "fp32"
    autocast: Literal["none", "bf16", "fp16"] = "none"
    """Format of matrix products and of what is kept for their backward passes; all else stays in dtype."""
    evaluate_every: int = Field(default=100, gt=0)
    """Steps; takes place at the first merge from there on, since only merged weights are one model."""
    diagnostics_every: int | None = Field(default=None, gt=0)
    """Steps; takes place at the first merge from there on. Not set: never."""
    evaluate_samples: int = Field(default=64, gt=0)
    log_every: int = Field(default=1, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    activation_checkpointing: bool = False


class Cluster(toml_io.Schema):
    """The hardware that is planned for, and simulated or launched on; the waits of launched runs."""

    profile: str = Field(default="local", min_length=1)
    devices: int = Field(default=4, gt=0)
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """What moves tensors of a launched run; auto: nccl between CUDA GPUs, gloo else."""
    min_devices: int | None = Field(default=None, gt=0)
    """Devices that a launched run needs to go on when nodes are lost: their share moves to those that are left. Not
    set: all, so it waits for lost nodes to return."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for one exchange; longer than the slowest device is behind at a merge."""
    join_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for nodes to join, or to return."""
    rejoin_s: float = Field(default=10.0, gt=0)
    """After a loss: how long lost nodes may take to return before the run goes on without them, if it may."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts without a checkpoint between them before a launched run gives up."""
    recover_every: int = Field(default=1, gt=0)
    """Merges (of methods that exchange at every step: 10 steps) between the recovery points of a launched run."""

    @model_validator(mode="after")
    def _min_devices_fit(self) -> Cluster:
        if self.min_devices is not None and self.min_devices > self.devices:
            raise ValueError(f"min_devices = {self.min_devices} exceeds devices = {self.devices}; lower it")
        return self


def _with_default_data(given: Any) -> Any:
    """Give a model of images the embedded digits where no data is named: the default of text is no use to it."""
    if not isinstance(given, dict) or not isinstance(model := given.get("model"), dict):
        return given
    data = given.get("data") or {}
    if not isinstance(data, dict) or data.keys() & {"name", "path"} or not sees_images(model):
        return given
    return {**given, "data": {"name": "digits", "upscale": True, **data}}


class Run(toml_io.Schema):
    """One run, complete."""

    model: Model = GptModel()
    data: Data = Data(name="stdlib")
    method: Method = LteOptions()
    train: Train = Train()
    cluster: Cluster = Cluster()

    @model_validator(mode="before")
    @classmethod
    def _names_known(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(model := given.get("model"), dict):
            check_name(model.get("name", "gpt"))
        if isinstance(given, dict) and isinstance(method := given.get("method"), dict):
            name = method.setdefault("name", "lte")
            if name not in METHOD_NAMES:
                raise ValueError(f"method.name = {name!r} is not a method; {near_match(str(name), METHOD_NAMES)}")
        return _with_default_data(given)

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        method, devices = self.method, self.cluster.devices
        if isinstance(method, AdapterOptions):
            self._check_rank(method)
        if isinstance(method, LteOptions):
            self._check_heads(method)
        if isinstance(method, LteOptions | DilocoOptions):
            self._check_fragments(method)
        if isinstance(method, DasoOptions) and devices % method.devices_per_node:
            raise ValueError(
                f"cluster.devices = {devices} is not divisible by method.devices_per_node = {method.devices_per_node}; "
                "change one of them"
            )
        if self.train.optimizer == "muon":
            self._check_muon()
        if self.train.optimizer_state == "8bit":
            self._check_eight_bit()
        if self.train.autocast != "none" and self.train.dtype == "fp64":
            raise ValueError(
                f"train.autocast = {self.train.autocast!r} lowers the precision of fp32, not of train.dtype = 'fp64'; "
                "try --set train.dtype=fp32 or --set train.autocast=none"
            )
        if self.train.activation_checkpointing and isinstance(self.model, FactoryModel):
            raise ValueError(
                f"train.activation_checkpointing = true is for networks with blocks of ours, not for {self.model.name};"
                " recompute inside of the network, or try --set train.activation_checkpointing=false"
            )
        if self.data.shards is not None and len(self.data.shards) != devices:
            raise ValueError(
                f"data.shards has {len(self.data.shards)} sizes for cluster.devices = {devices}; give one a device"
            )
        wrong = next((len(counts) for counts in method.given_steps or () if len(counts) != devices), None)
        if wrong is not None:
            raise ValueError(
                f"method.steps_taken has a round of {wrong} devices for cluster.devices = {devices}; give one number a "
                "device"
            )
        if self.train.warmup_steps >= self.train.steps:
            raise ValueError(
                f"train.warmup_steps = {self.train.warmup_steps} is not below train.steps = {self.train.steps}; "
                "lower it"
            )
        return self

    def _check_muon(self) -> None:
        method = self.method
        if isinstance(method, SapipeOptions) and method.compensation == "prediction":
            raise ValueError(
                "train.optimizer = 'muon' cannot predict sapipe's weights, which is done with Adam's moments; "
                "try --set train.optimizer=adamw or --set method.compensation=none"
            )
        if isinstance(method, LocalSgdOptions) and method.merge_optimizer == "average":
            raise ValueError(
                "train.optimizer = 'muon' has other moments than method.merge_optimizer = 'average' sends; "
                "try --set train.optimizer=adamw or --set method.merge_optimizer=keep"
            )

    def _check_eight_bit(self) -> None:
        method, instead = self.method, "try --set train.optimizer_state=fp32"
        if self.train.dtype == "fp64":
            raise ValueError(
                f"train.optimizer_state = '8bit' steps weights in fp32, not in train.dtype = 'fp64'; {instead}"
            )
        if isinstance(method, SapipeOptions) and method.compensation == "prediction":
            raise ValueError(
                "train.optimizer_state = '8bit' has no moments that sapipe could predict weights with; "
                f"{instead} or --set method.compensation=none"
            )
        if isinstance(method, LocalSgdOptions) and method.merge_optimizer == "average":
            raise ValueError(
                "train.optimizer_state = '8bit' has no moments that method.merge_optimizer = 'average' could send; "
                f"{instead} or --set method.merge_optimizer=keep"
            )

    def _check_rank(self, method: AdapterOptions) -> None:
        for linear in self.model.shape().adapted:
            side, limit = min((linear.in_features, "inputs"), (linear.out_features, "outputs"))[::-1]
            if method.rank > limit:
                raise ValueError(
                    f"method.rank = {method.rank} exceeds the {limit} {side} of {linear.name}; "
                    f"try --set method.rank={limit}"
                )

    def _check_heads(self, method: LteOptions) -> None:
        heads, micro_batch = method.heads_per_device, self.train.micro_batch
        if micro_batch % heads:
            raise ValueError(
                f"train.micro_batch = {micro_batch} is not divisible by method.heads_per_device = {heads}; "
                f"each head needs an equal part of the batch, "
                f"try --set train.micro_batch={heads * max(1, micro_batch // heads)}"
            )

    def _check_fragments(self, method: LteOptions | DilocoOptions) -> None:
        shape = self.model.shape()
        layers = len(shape.in_order()) if isinstance(self.model, FactoryModel) else shape.layers
        if method.fragments > layers or method.merge_every % method.fragments:
            raise ValueError(
                f"method.fragments = {method.fragments} must divide method.merge_every = {method.merge_every} and be "
                f"at most model.layers = {layers}; try --set method.fragments={math.gcd(method.merge_every, layers)}"
            )

    @property
    def heads(self) -> int:
        """Low-rank pairs of a layer over all devices, each counted once (0 for dense methods)."""
        method = self.method
        if isinstance(method, LteOptions | MhloraOptions):
            return self.cluster.devices * method.heads_per_device
        if isinstance(method, AdamixOptions):
            return method.experts
        return 1 if isinstance(method, AdapterOptions) else 0

    @property
    def samples_per_step(self) -> int:
        """Samples that all devices together train on in one optimizer step."""
        devices, method = self.cluster.devices, self.method
        active = method.participants(devices) if isinstance(method, LocalSgdOptions) else devices
        return active * self.train.micro_batch

    @property
    def tokens_per_step(self) -> int:
        """Tokens (of images: samples) that all devices together train on in one optimizer step."""
        return self.samples_per_step * self.model.units_per_sample


def build_run(table: toml_io.Table, where: str = "run", text: str = "", assigned: Collection[str] = ()) -> Run:
    """Validate a parsed run table, of which keys in `assigned` are the command line's; raises InputError."""
    for name in table:
        if name in Run.model_fields and not isinstance(table[name], dict):
            raise InputError(f"{where}: {name} = {table[name]!r} is not a table; write [{name}] and its keys below it")
    return toml_io.validate(Run, table, where, text, assigned)


def load_run(path: Path, assignments: list[str] | None = None) -> Run:
    """Read run.toml and apply `--set` assignments; raises InputError with file, line and key."""
    text = toml_io.read(path)
    table = toml_io.parse(text, str(path))
    assigned = [toml_io.set_key(table, assignment) for assignment in assignments or []]
    return build_run(table, str(path), text, assigned)


def dump_run(run: Run) -> str:
    """Return the run as TOML text, every key written out."""
    return toml_io.dump(run.model_dump())


def run_fingerprint(run: Run) -> str:
    """Return a digest of everything that run.toml says."""
    return hashlib.sha256(dump_run(run).encode()).hexdigest()
