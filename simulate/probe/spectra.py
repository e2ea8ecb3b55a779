"""Probe a run: gradients at the start weights and after a short dense warm-up, and the warm-up's updates.

Their spectra show the rank that LTE needs, before a run is paid for; `lte probe` calls `probe_run`. The warm-up is
the run's own training with dense data parallelism in the place of its method: the same weights, batches, optimizer and
rates. Spectra are taken of the layers that LTE would adapt; the noise scale is over all parameters, as in
simulate.training.diagnostics.

With n gradients g_i of b samples each and S = Σ g_i, a first pass over the batches takes |g_i|² and S, a second one
S·g_i. Leaving gradient i out changes |S|² to |S|² − 2·S·g_i + |g_i|², so that the jackknife (Tukey 1958; Efron and
Stein 1981) needs no gradient to be kept. It is taken of the scale's logarithm, which keeps the range above zero:

    se² = (n − 1)/n · Σ_i (ln B_i − mean ln B)²,    range B·exp(∓2·se)

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError, RunFailedError
from simulate.config.method_table import BASELINE, DEFAULT_METHOD, default_options
from simulate.config.run import Run
from simulate.data.batches import Batches
from simulate.layers.attention import PerDeviceAttention
from simulate.layers.convert import ConversionSpec, convert
from simulate.layers.formats import Convolutions
from simulate.methods.build_network import build_model
from simulate.methods.registry import build_method
from simulate.methods.round_updates import decompose
from simulate.probe.recommend import recommend
from simulate.probe.schema import (
    Layer,
    LayerGradient,
    Noise,
    Probe,
    ProbedData,
    ProbedModel,
    Settings,
    Spectrum,
    State,
    shapes_fingerprint,
)
from simulate.rules.method_plan import plan_of
from simulate.training.diagnostics import LossGradient, effective_rank, noise_figures, stable_rank

FEWEST_GRADIENTS = 3
"""Gradients of single devices' batches at least: the jackknife leaves one out, and a variance needs two."""
STANDARD_ERRORS = 2.0
"""Width of the noise scale's range on either side."""
Log = Callable[[str], None]


@dataclass(frozen=True)
class AdaptedWeight:
    """The weight of one layer that LTE would adapt, in the plain network."""

    layer: str
    """Name of the layer."""
    weight: str
    """Name of its parameter."""
    transposed: bool
    """Whether the parameter is stored as (I, O)."""

    def matrix(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return this layer's tensor of `weights` (weights, gradients or changes) as (O, I) in double precision."""
        weight = weights[self.weight].detach().flatten(1).double()
        return weight.T if self.transposed else weight


class _Mark(nn.Module):
    """Stands in for an adapter."""

    transposed = False


def adapted_weights(network: nn.Module, run: Run) -> list[AdaptedWeight]:
    """Return the weights that LTE would adapt, in the network's order; the network is not changed."""
    marks: dict[str, _Mark] = {}

    def mark(layer: nn.Module, name: str, bias: Tensor | None) -> nn.Module:
        return marks.setdefault(name, _Mark())

    empty = {id(p): nn.Parameter(p.detach().to("meta")) for p in network.parameters()}
    convolutions: Convolutions = getattr(run.method, "convolutions", "lora")
    # Converting a copy without storage finds exactly the layers that training would adapt; the memo of deepcopy keeps
    # shared parameters shared.
    converted = convert(copy.deepcopy(network, empty), 1, ConversionSpec(mark, convolutions=convolutions))
    renamed: dict[str, str] = {}  # fused projections of attention have names of their own once converted
    for name, module in converted.named_modules():
        if isinstance(module, PerDeviceAttention):
            renamed.update(module.plain_names(name))
    names = {name: f"{name}.weight" for name in marks}
    return [AdaptedWeight(name, renamed.get(key, key), marks[name].transposed) for name, key in names.items()]


def probe_run(run: Run, batches: Batches, device: torch.device, source: str, num_batches: int, warmup_steps: int,
              log: Log) -> Probe:  # fmt: skip
    """Measure the gradients and the warm-up of a run; returns all figures, with a recommendation for the run's heads.

    `source` names the data in messages. Raises InputError for too few batches, RunFailedError for a loss that is not
    finite.
    """
    check_batches(run, num_batches)
    network = build_model(run)
    adapted = adapted_weights(network, run)
    trained = _Trained(run, batches, device, network, adapted)
    steps = min(round_steps(run), warmup_steps)
    # The warm-up ends with a round, whose update is measured apart from the whole warm-up's.
    log(f"gradients of {num_batches} batches at the start")
    start = trained.snapshot()
    initial = _gradients(run, trained.weights(), adapted, _parts(run, batches, device, 0, num_batches), 0)
    log(f"{warmup_steps} dense steps")
    trained.take(range(warmup_steps - steps))  # up to the last round
    round_start = trained.snapshot() if steps < warmup_steps else start
    trained.take(range(warmup_steps - steps, warmup_steps))
    log(f"gradients of {num_batches} batches after them")
    parts = _parts(run, batches, device, warmup_steps, num_batches)
    warmed = _gradients(run, trained.weights(), adapted, parts, warmup_steps)
    weights = trained.weights()
    layers = [
        Layer(
            name=layer.layer,
            outputs=layer.matrix(weights).shape[0],
            inputs=layer.matrix(weights).shape[1],
            initial=initial.layers[layer.layer],
            warmed=warmed.layers[layer.layer],
            round_update=spectrum_of(layer.matrix(weights) - layer.matrix(round_start)),
            update=spectrum_of(layer.matrix(weights) - layer.matrix(start)),
        )
        for layer in adapted
    ]
    probe = Probe(
        network=_model(run),
        data=ProbedData(source=source, fingerprint=batches.fingerprint),
        settings=_settings(run, num_batches, warmup_steps, steps),
        initial=initial.state,
        warmed=warmed.state,
        layers=layers,
    )
    advice = recommend(probe, probe.settings.heads, run.cluster.devices)
    return probe.model_copy(update={"recommendation": advice})


def check_batches(run: Run, num_batches: int) -> None:
    """Raise InputError where there are too few gradients to estimate their noise."""
    if num_batches * run.cluster.devices < FEWEST_GRADIENTS:
        raise InputError(
            f"--batches {num_batches} on cluster.devices = {run.cluster.devices} gives too few gradients to estimate "
            f"their noise; at least {FEWEST_GRADIENTS} are needed, try --batches 8"
        )


def round_steps(run: Run) -> int:
    """Return the steps of the method's round, or of LTE's default for a method that exchanges at every step."""
    steps = run.method.round_steps
    return steps if steps > 1 else default_options(DEFAULT_METHOD).round_steps


def _model(run: Run) -> ProbedModel:
    shape = run.shape()
    return ProbedModel(
        name=shape.name,
        parameters=shape.parameters,
        adapted_parameters=shape.adapted_parameters,
        largest_dimension=shape.largest_dimension,
        smallest_dimension=min(min(linear.out_features, linear.in_features) for linear in shape.adapted),
        sizes=run.model.model_dump(),
        fingerprint=shapes_fingerprint(shape),
    )


def _settings(run: Run, num_batches: int, warmup_steps: int, steps: int) -> Settings:
    train = run.train
    return Settings(
        seed=train.seed,
        dtype=train.dtype,
        optimizer=train.optimizer,
        learning_rate=train.learning_rate,
        devices=run.cluster.devices,
        heads=run.heads if plan_of(run.method).has_separate_heads else run.cluster.devices,
        micro_batch=train.device_batch,
        tokens_per_sample=run.model.units_per_sample,
        batches=num_batches,
        warmup_steps=warmup_steps,
        round_steps=steps,
    )


class _Trained:
    """The run's network in dense data-parallel training."""

    def __init__(
        self, run: Run, batches: Batches, device: torch.device, network: nn.Module, adapted: Sequence[AdaptedWeight]
    ) -> None:
        # The method's own options do not matter: gradients and updates of full weights are measured.
        dense = run.model_copy(update={"method": default_options(BASELINE)})
        self.batches, self.device, self.adapted = batches, device, adapted
        self.devices = range(run.cluster.devices)
        self.method = build_method(dense, VirtualCommunicator(run.cluster.devices), device, network)

    def weights(self) -> dict[str, Tensor]:
        """Return the current weights by the plain network's names, not copied."""
        return self.method.merged_state()

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the adapted weights."""
        weights = self.weights()
        return {layer.weight: weights[layer.weight].clone() for layer in self.adapted}

    def take(self, steps: range) -> None:
        """Take these optimizer steps."""
        for step in steps:
            inputs, targets = self.batches.batch(step, self.devices)
            losses_L = self.method.step(inputs.to(self.device), targets.to(self.device), step)
            if not losses_L.isfinite().all():
                raise RunFailedError(
                    f"the loss is not finite at step {step + 1} of the warm-up; try a lower --set train.learning_rate"
                )


Part = tuple[Tensor, Tensor]


def _parts(
    run: Run, batches: Batches, device: torch.device, first_step: int, num_batches: int
) -> Callable[[], Iterator[Part]]:
    """Return a function that yields each device's batch of some steps, the same at each call."""

    def parts() -> Iterator[Part]:
        for step in range(first_step, first_step + num_batches):
            inputs, targets = batches.batch(step, range(run.cluster.devices))
            size = run.train.micro_batch
            for own_inputs, own_targets in zip(inputs.split(size), targets.split(size), strict=True):
                yield own_inputs.to(device), own_targets.to(device)

    return parts


@dataclass(frozen=True)
class _Gradients:
    """Figures of the gradients at one state, over all parameters and layer by layer."""

    state: State
    layers: dict[str, LayerGradient]


@dataclass
class Spread:
    """Squared norm of each gradient, and its product with the sum of all gradients."""

    squares: list[float] = field(default_factory=list)
    """|g_i|²."""
    products: list[float] = field(default_factory=list)
    """S·g_i."""

    def noise(self, samples: int) -> Noise:
        """Return the noise of these gradients of `samples` samples each."""
        count, squares, total = len(self.squares), math.fsum(self.squares), math.fsum(self.products)
        figures = noise_figures(squares / count, total / count**2, samples, samples * count, 1)
        if not figures:
            raise RunFailedError("gradients are not finite; try a lower --set train.learning_rate")
        # |S|²/n²: the squared norm of the mean gradient, of which |G|² is the signal.
        measured_square, scale = total / count**2, figures.get("noise_scale_samples")
        low, high = (None, None) if scale is None else self._range(scale, samples)
        share = figures["gradient_square"] / measured_square if measured_square > 0 else 0.0
        return Noise(
            gradient_square=figures["gradient_square"],
            gradient_variance=figures["gradient_variance"],
            signal_share=min(1.0, max(0.0, share)),
            scale_samples=scale,
            scale_low_samples=low,
            scale_high_samples=high,
        )

    def _range(self, scale: float, samples: int) -> tuple[float, float] | tuple[None, None]:
        """Return the scale less and plus two standard errors, taken of its logarithm by the jackknife."""
        count, squares, total = len(self.squares), math.fsum(self.squares), math.fsum(self.products)
        logarithms, left = [], count - 1
        for square, product in zip(self.squares, self.products, strict=True):
            # Without gradient i: Σ|g|² − |g_i|², and |S − g_i|² = |S|² − 2·S·g_i + |g_i|².
            small, big = (squares - square) / left, (total - 2 * product + square) / left**2
            other = noise_figures(small, big, samples, samples * left, 1).get("noise_scale_samples")
            if not other:
                return None, None
            logarithms.append(math.log(other))
        mean = math.fsum(logarithms) / count
        # se² = (n − 1)/n·Σ_i (ln B_i − mean)² (Tukey 1958)
        error = math.sqrt(left / count * math.fsum((x - mean) ** 2 for x in logarithms))
        factor = math.exp(min(700.0, STANDARD_ERRORS * error))  # exp overflows from 710 on
        return scale / factor, scale * factor


def _gradients(
    run: Run,
    weights: Mapping[str, Tensor],
    adapted: Sequence[AdaptedWeight],
    parts: Callable[[], Iterator[Part]],
    steps: int,
) -> _Gradients:
    """Measure the gradients of single devices' batches at given weights: their mean, and their noise."""
    gradient = LossGradient(run, weights)
    sums = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in gradient.leaves.items()}
    spreads = {name: Spread() for name in gradient.leaves}

    def add(name: str, own: Tensor) -> None:
        sums[name].add_(own)
        spreads[name].squares.append(_dot(own, own))

    def multiply(name: str, own: Tensor) -> None:
        spreads[name].products.append(_dot(sums[name], own))

    # Products with the sum need the whole sum, hence a second pass in the place of storing all gradients.
    losses = [float(gradient.of(*part, add)) for part in parts()]
    for part in parts():
        gradient.of(*part, multiply)
    means = {name: total / len(losses) for name, total in sums.items()}
    size = run.train.micro_batch
    if not math.isfinite(loss_mean := math.fsum(losses) / len(losses)):
        raise RunFailedError("the loss is not finite; try a lower --set train.learning_rate")
    layers = {
        layer.layer: LayerGradient(spectrum=spectrum_of(layer.matrix(means)), noise=spreads[layer.weight].noise(size))
        for layer in adapted
    }
    return _Gradients(State(steps=steps, loss=loss_mean, noise=_joined(list(spreads.values())).noise(size)), layers)


def _joined(spreads: Sequence[Spread]) -> Spread:
    """Return the spread of whole gradients, out of those of their parts."""
    return Spread(
        squares=[math.fsum(values) for values in zip(*(spread.squares for spread in spreads), strict=True)],
        products=[math.fsum(values) for values in zip(*(spread.products for spread in spreads), strict=True)],
    )


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten().double(), other.flatten().double()))


def spectrum_of(x_OI: Tensor) -> Spectrum | None:
    """Return the spectrum of a matrix; None for zeros."""
    values, _, _ = decompose(x_OI.double(), 0)
    if not len(values):
        return None
    return Spectrum(
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        rank_50=rank_holding(values, 0.5),
        rank_90=rank_holding(values, 0.9),
        rank_99=rank_holding(values, 0.99),
    )


def rank_holding(values: Tensor, share: float) -> int:
    """Return the number of largest singular values whose squares add up to a share of all squares."""
    squares = values.double() ** 2
    held = squares.cumsum(0) / squares.sum()
    # Rounding must not ask for one more direction than holds the share exactly.
    return min(len(values), int((held < share - 1e-12).sum()) + 1)
