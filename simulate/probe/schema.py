"""The schema of probe.json: network, data, settings and figures of a probe; torch-free, so that a plan can read it.

`lte probe` writes the file (simulate.probe.spectra makes it), and `lte plan --probe` reads it and checks that it is of
the network that is planned.
"""

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
    """The distribution of a matrix's squared norm over its singular directions."""

    effective_rank: float = Field(gt=0)
    """exp of the entropy of the singular values as shares of their sum."""
    stable_rank: float = Field(gt=0)
    """Squared Frobenius norm over the squared largest singular value."""
    rank_50: int = Field(gt=0)
    """The fewest directions that hold half of the squared Frobenius norm."""
    rank_90: int = Field(gt=0)
    """The fewest that hold 90 %."""
    rank_99: int = Field(gt=0)
    """The fewest that hold 99 %."""


class Noise(toml_io.Schema):
    """The noise of gradients of single batches; the noise scale counts samples."""

    gradient_square: float
    """Unbiased estimate of |G|²; below 0 where noise exceeds it."""
    gradient_variance: float
    """Unbiased estimate of tr Σ of one sample's gradient."""
    signal_share: float = Field(ge=0, le=1)
    """|G|² over the measured squared norm of the mean gradient, whose rest is noise."""
    scale_samples: float | None = Field(ge=0)
    """tr Σ / |G|²; null where |G|² is not above 0."""
    scale_low_samples: float | None = Field(ge=0)
    """Two standard errors below, by the jackknife over batches; null where it is undefined without one of them."""
    scale_high_samples: float | None = Field(ge=0)
    """Two standard errors above, likewise."""


class State(toml_io.Schema):
    """The gradients at one point of the training."""

    steps: int = Field(ge=0)
    """Dense steps taken before."""
    loss: float
    noise: Noise


class LayerGradient(toml_io.Schema):
    """The spectrum of one layer's mean gradient over the batches, and the noise of its gradients."""

    spectrum: Spectrum | None
    """Null for a gradient of zeros."""
    noise: Noise


class Layer(toml_io.Schema):
    """One adapted layer; a convolution counts as the matrix that it applies to patches of its input."""

    name: str
    outputs: int = Field(gt=0)
    inputs: int = Field(gt=0)
    initial: LayerGradient
    warmed: LayerGradient
    round_update: Spectrum | None
    """Spectrum of the change in the warm-up's last round; null where nothing changed."""
    update: Spectrum | None
    """Spectrum of the change in the whole warm-up."""


class ProbedModel(toml_io.Schema):
    """The network that was probed."""

    name: str
    parameters: int
    """Number of all parameters."""
    adapted_parameters: int
    """Number of parameters in adapted layers' matrices."""
    largest_dimension: int = Field(gt=0)
    """The largest min(outputs, inputs) of an adapted layer."""
    smallest_dimension: int = Field(gt=0)
    """The smallest, which no rank exceeds."""
    sizes: dict[str, Any]
    """The run's [model] table."""
    fingerprint: str
    """Hex digest of all tensors' shapes; a plan compares it with its own network's."""


class ProbedData(toml_io.Schema):
    """The data on which it was probed."""

    source: str
    fingerprint: str


class Settings(toml_io.Schema):
    """The settings of the probe."""

    seed: int
    dtype: str
    optimizer: str
    learning_rate: float
    devices: int = Field(gt=0)
    heads: int = Field(gt=0)
    """Heads of the run, on all devices, for which `recommendation` holds."""
    micro_batch: int = Field(gt=0)
    """Samples of one device in one step."""
    tokens_per_sample: int = Field(gt=0)
    batches: int = Field(gt=0)
    """Steps whose batches, of all devices, gave gradients."""
    warmup_steps: int = Field(gt=0)
    """Dense steps between the initial and the warmed state."""
    round_steps: int = Field(gt=0)
    """Steps of the round behind `round_update`."""


class Estimate(toml_io.Schema):
    """A figure with its range."""

    estimate: float
    low: float
    high: float


class Recommendation(toml_io.Schema):
    """Rank, heads and batch for the run that was probed, with reasons."""

    rank: Estimate
    heads: Estimate
    batch_samples: Estimate | None
    """Samples of all devices; null where the noise scale is undefined."""
    upper_rank_times_heads: int
    """The paper's mark: the largest layer dimension."""
    reasoning: list[str]
    """One sentence for each figure, with its estimate and source."""


class Probe(toml_io.Schema):
    """The content of probe.json."""

    version: Literal[1] = 1
    network: ProbedModel
    data: ProbedData
    settings: Settings
    initial: State
    warmed: State
    layers: list[Layer] = Field(min_length=1)
    recommendation: Recommendation | None = None
    """Recommendation for the run that was probed; a plan computes its own from `layers`."""


def shapes_fingerprint(shape: ModelShape) -> str:
    """Return a hex digest of a network's tensors and adapted layers: equal for equal shapes under any name."""
    # Without the network's name: a factory may build the shapes of a network of ours.
    tensors = [(tensor.kind, tensor.shape) for tensor in shape.tensors]
    adapted = [(linear.name, linear.out_features, linear.in_features, linear.count) for linear in shape.adapted]
    return hashlib.sha256(repr((tensors, adapted)).encode()).hexdigest()


def load_probe(path: Path) -> Probe:
    """Read probe.json; raises InputError where it is missing, not JSON, or not a probe."""
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
            f"--probe {path} is of {probe.network.name} with {probe.network.parameters:,} parameters, and the "
            f"plan is for {shape.name} with {shape.parameters:,} and layers of other shapes; probe this model with "
            "lte probe, or plan the probe's"
        )
