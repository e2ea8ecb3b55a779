"""The schema of probe.json: what was probed, on what, and what was found; torch-free, so that a plan can read it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.models.shapes import ModelShape

PROBE_VERSION = 1


class Spectrum(toml_io.Schema):
    """How a matrix's squared norm is spread over its singular directions."""

    effective_rank: float = Field(gt=0)
    """exp of the entropy of the singular values as shares of their sum."""
    stable_rank: float = Field(gt=0)
    """Squared Frobenius norm over the squared largest singular value."""
    rank_50: int = Field(gt=0)
    """The fewest directions that hold half of the squared Frobenius norm."""
    rank_90: int = Field(gt=0)
    rank_99: int = Field(gt=0)


class Noise(toml_io.Schema):
    """How far gradients of single batches lie from their mean; samples are those of a batch."""

    gradient_square: float
    """|G|², without bias; below 0 where noise drowns it."""
    gradient_variance: float
    """tr Σ of one sample's gradient, without bias."""
    signal_share: float = Field(ge=0, le=1)
    """|G|² over the squared norm of the mean gradient that was measured: the rest of that is noise."""
    scale_samples: float | None = Field(ge=0)
    """tr Σ / |G|²; null where |G|² is not above 0."""
    scale_low_samples: float | None = Field(ge=0)
    """Two standard errors below, by the jackknife over batches; null where leaving one out leaves no scale."""
    scale_high_samples: float | None = Field(ge=0)


class State(toml_io.Schema):
    """The gradients at one point of the training."""

    steps: int = Field(ge=0)
    """Dense steps taken before."""
    loss: float
    noise: Noise


class LayerGradient(toml_io.Schema):
    """One layer's gradient: the spectrum of its mean over the batches, and its noise."""

    spectrum: Spectrum | None
    """Null for a gradient of zeros."""
    noise: Noise


class Layer(toml_io.Schema):
    """One adapted layer; a convolution counts as the matrix that it applies to patches."""

    name: str
    outputs: int = Field(gt=0)
    inputs: int = Field(gt=0)
    initial: LayerGradient
    warmed: LayerGradient
    round_update: Spectrum | None
    """Of what the last round's steps of the warm-up changed; null where nothing changed."""
    update: Spectrum | None
    """Of what all of the warm-up changed."""


class ProbedModel(toml_io.Schema):
    """Which network it was."""

    name: str
    parameters: int
    adapted_parameters: int
    largest_dimension: int = Field(gt=0)
    """The largest min(outputs, inputs) of an adapted layer."""
    smallest_dimension: int = Field(gt=0)
    """The smallest: what a rank can be at most."""
    sizes: dict[str, Any]
    """The run's [model] table."""
    fingerprint: str
    """Hex digest of all tensors' shapes: what a plan holds against its own."""


class ProbedData(toml_io.Schema):
    """What it was probed on."""

    source: str
    fingerprint: str


class Settings(toml_io.Schema):
    """How it was probed."""

    seed: int
    dtype: str
    optimizer: str
    learning_rate: float
    devices: int = Field(gt=0)
    heads: int = Field(gt=0)
    """Of the run: what `recommendation` is for."""
    micro_batch: int = Field(gt=0)
    """Samples of one device in one step; the smaller of the two batches behind the noise scale."""
    tokens_per_sample: int = Field(gt=0)
    batches: int = Field(gt=0)
    """Steps whose batches of all devices gave gradients."""
    warmup_steps: int = Field(gt=0)
    """Dense steps between the two points."""
    round_steps: int = Field(gt=0)
    """T of the round whose update was looked at."""


class Estimate(toml_io.Schema):
    """A figure with its range."""

    estimate: float
    low: float
    high: float


class Recommendation(toml_io.Schema):
    """What follows for a run with so many heads, and why."""

    rank: Estimate
    heads: Estimate
    batch_samples: Estimate | None
    """Over all devices; null where the noise scale could not be told."""
    upper_rank_times_heads: int
    """The paper's mark: the largest layer dimension."""
    reasoning: list[str]


class Probe(toml_io.Schema):
    """probe.json."""

    version: Literal[1] = 1
    network: ProbedModel
    data: ProbedData
    settings: Settings
    initial: State
    warmed: State
    layers: list[Layer] = Field(min_length=1)
    recommendation: Recommendation | None = None
    """For the run that was probed; a plan works its own out from `layers`."""


def shapes_fingerprint(shape: ModelShape) -> str:
    """Return a hex digest of a network's tensors and adapted layers: equal for equal shapes, whatever the name."""
    tensors = [(tensor.kind, tensor.shape) for tensor in shape.tensors]
    adapted = [(linear.name, linear.out_features, linear.in_features, linear.count) for linear in shape.adapted]
    return hashlib.sha256(repr((tensors, adapted)).encode()).hexdigest()


def load_probe(path: Path) -> Probe:
    """Read probe.json; raises InputError where it is missing, no JSON, or no probe."""
    try:
        table = json.loads(toml_io.read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}; name a file that lte probe -o wrote") from None
    if not isinstance(table, dict):
        raise InputError(f"{path}: is no probe, which is a JSON object; name a file that lte probe -o wrote")
    if table.get("version") != PROBE_VERSION:
        raise InputError(
            f"{path}: version = {table.get('version')!r} where this lte reads version {PROBE_VERSION} of probes; "
            "probe again with lte probe"
        )
    return toml_io.validate(Probe, table, str(path))


def dump_probe(probe: Probe) -> str:
    """Return the text of probe.json."""
    return json.dumps(probe.model_dump(), indent=1, allow_nan=False) + "\n"


def check_model(probe: Probe, shape: ModelShape, path: Path) -> None:
    """Raise InputError where a probe is of other shapes than the network that is planned."""
    if probe.network.fingerprint != shapes_fingerprint(shape):
        raise InputError(
            f"--probe {path} is of {probe.network.name} with {probe.network.parameters:,} parameters, and what is "
            f"planned is {shape.name} with {shape.parameters:,} and layers of other shapes; probe this model with "
            "lte probe, or plan the probe's"
        )
