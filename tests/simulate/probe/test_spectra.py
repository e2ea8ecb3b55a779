"""The measurements of a probe: known ranks, a noise scale by arithmetic, and a slow twin of the whole."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from simulate.common.errors import InputError
from simulate.config.run import Run, build_run
from simulate.layers.cross_entropy import token_losses
from simulate.methods.build_network import build_model
from simulate.models.fake_batch import example_batch
from simulate.probe.schema import Probe
from simulate.probe.spectra import Spread, adapted_weights, probe_run, rank_holding, round_steps, spectrum_of
from simulate.training.diagnostics import LossGradient, noise_figures
from tests import tiny

SMALL_IMAGES = {"layers": 1, "image": 8, "patch": 4, "classes": 5}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": tiny.SIZES,
    "llama": {**tiny.SIZES, **tiny.LLAMA},
    "vit": {"name": "vit", "width": 12, "attention_heads": 3, **SMALL_IMAGES},
    "mixer": {"name": "mixer_t16", "width": 12, "tokens_width": 6, "channels_width": 20, **SMALL_IMAGES},
    "encoder": {"name": "tests.networks:Encoder", "context": 8},
    "convolutional": {"name": "tests.networks:Convolutional", "image": 8, "classes": 10},
}


class MadeUp:
    """Batches of any network: made-up samples, others in every step."""

    fingerprint = "made up"

    def __init__(self, run: Run) -> None:
        self.run = run

    def batch(self, step: int, devices: range) -> tuple[Tensor, Tensor]:
        size = len(devices) * self.run.train.micro_batch
        inputs, targets = (x[step * size : (step + 1) * size] for x in example_batch(self.run.model, 10 * size))
        return (inputs.double() if inputs.is_floating_point() else inputs), targets


def run_of(model: dict[str, Any]) -> Run:
    train = {"steps": 8, "micro_batch": 2, "dtype": "fp64"}
    return build_run({"model": model, "method": {"name": "ddp"}, "train": train, "cluster": {"devices": 2}})


def of_rank(values: list[float], outputs: int = 9, inputs: int = 7) -> Tensor:
    """Return a matrix with these singular values."""
    random = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=random).double())[0] for side in (outputs, inputs)
    )
    return left @ torch.diag(torch.tensor(values).double()) @ right.T


def test_a_gradient_of_rank_three_has_rank_three() -> None:
    spectrum = spectrum_of(of_rank([2.0, 2.0, 2.0]))
    assert spectrum is not None
    assert (spectrum.effective_rank, spectrum.stable_rank) == pytest.approx((3, 3))
    assert (spectrum.rank_50, spectrum.rank_90, spectrum.rank_99) == (2, 3, 3)
    assert spectrum_of(torch.zeros(4, 5)) is None


def test_the_rank_that_holds_a_share() -> None:
    values = torch.tensor([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1 of 25
    assert [rank_holding(values, share) for share in (0.5, 0.64, 0.65, 0.8, 0.96, 0.97, 1.0)] == [1, 1, 2, 2, 3, 4, 4]


def spread_of(gradients_NP: Tensor) -> Spread:
    total = gradients_NP.sum(0)
    return Spread([float(g @ g) for g in gradients_NP], [float(total @ g) for g in gradients_NP])


def linear_gradients(count: int, samples: int, side: int) -> Tensor:
    """Return gradients of ½(x·(w − w*))², x standard normal: G = w − w* and tr Σ = (side + 1)·|G|² for one sample."""
    random = torch.Generator().manual_seed(1)
    x_NBP = torch.randn(count, samples, side, generator=random).double()
    error = torch.linspace(1, 2, side).double()
    return (x_NBP * (x_NBP @ error).unsqueeze(2)).mean(1)


def test_a_linear_problem_has_the_noise_scale_that_arithmetic_gives() -> None:
    noise = spread_of(linear_gradients(3000, 4, 5)).noise(4)
    square = float(torch.linspace(1, 2, 5).double().square().sum())
    assert noise.gradient_square == pytest.approx(square, rel=0.05)
    assert noise.gradient_variance == pytest.approx(6 * square, rel=0.05)
    assert noise.scale_samples == pytest.approx(6, rel=0.05)
    assert noise.scale_low_samples is not None and noise.scale_high_samples is not None
    assert noise.scale_low_samples < 6 < noise.scale_high_samples < 1.2 * noise.scale_low_samples
    assert noise.signal_share == pytest.approx(1 / (1 + 6 / 12000), rel=1e-3)


def test_the_range_holds_the_truth_as_often_as_it_says() -> None:
    gradients = linear_gradients(200 * 16, 4, 5).view(200, 16, 5)
    ranges = [spread_of(group).noise(4) for group in gradients]
    told = [n for n in ranges if n.scale_low_samples is not None and n.scale_high_samples is not None]
    held = sum(n.scale_low_samples <= 6 <= n.scale_high_samples for n in told)  # type: ignore[operator]
    assert len(told) > 190
    assert 0.8 < held / len(told) <= 1.0


def test_the_range_is_the_jackknife_over_gradients_left_out() -> None:
    gradients = linear_gradients(12, 4, 5)
    scales = []
    for left_out in range(12):
        kept = torch.cat([gradients[:left_out], gradients[left_out + 1 :]])
        small, big = float(kept.square().sum(1).mean()), float(kept.mean(0).square().sum())
        scales.append(math.log(noise_figures(small, big, 4, 44, 1)["noise_scale_samples"]))
    mean = sum(scales) / 12
    error = math.sqrt(11 / 12 * sum((scale - mean) ** 2 for scale in scales))
    noise = spread_of(gradients).noise(4)
    assert noise.scale_samples is not None
    assert noise.scale_low_samples == pytest.approx(noise.scale_samples * math.exp(-2 * error), rel=1e-9)
    assert noise.scale_high_samples == pytest.approx(noise.scale_samples * math.exp(2 * error), rel=1e-9)


def test_pure_noise_has_no_scale() -> None:
    noise = spread_of(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()).noise(2)
    assert noise.gradient_square < 0
    assert (noise.scale_samples, noise.scale_low_samples, noise.signal_share) == (None, None, 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_are_those_that_adapters_serve(name: str) -> None:
    run = run_of(MODELS[name])
    network = build_model(run)
    before = copy.deepcopy(network.state_dict())
    weights = dict(network.named_parameters())
    sides = [tuple(layer.matrix(weights).shape) for layer in adapted_weights(network, run)]
    assert sides == [(linear.out_features, linear.in_features) for linear in run.model.shape().in_order()]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_network_can_be_probed(name: str) -> None:
    run = run_of(MODELS[name])
    probe = probe_run(run, MadeUp(run), tiny.CPU, "made up", 2, 2, lambda text: None)  # type: ignore[arg-type]
    assert len(probe.layers) == len(run.model.shape().in_order())
    assert probe.network.parameters == run.model.shape().parameters
    assert any(layer.round_update is not None for layer in probe.layers)
    assert probe.recommendation is not None


def test_weights_that_layers_share_have_one_gradient() -> None:
    run = run_of(MODELS["encoder"])
    network = build_model(run)
    gradient = LossGradient(run, dict(network.named_parameters(remove_duplicate=False)))
    assert list(gradient.leaves) == [name for name, _ in network.named_parameters()]


def probed(run: Run, batches: int, warmup: int) -> Probe:
    return probe_run(run, tiny.batches(run), tiny.CPU, "prose", batches, warmup, lambda text: None)


def twin_gradients(
    run: Run, weights: dict[str, Tensor], first_step: int, steps: int
) -> tuple[Tensor, Any, list[float]]:
    """Return every device's gradient as a row, the mean one by layer, and the losses."""
    model, rows, losses = build_model(run), [], []
    model.load_state_dict(weights)
    for step in range(first_step, first_step + steps):
        inputs, targets = tiny.batches(run).batch(step, range(run.cluster.devices))
        for own_inputs, own_targets in zip(inputs.chunk(2), targets.chunk(2), strict=True):
            model.zero_grad()
            loss = token_losses(model(own_inputs).flatten(0, 1), own_targets.reshape(-1)).mean()
            loss.backward()
            losses.append(float(loss.detach()))
            rows.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    means = {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}
    return torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows]), means, losses


def test_a_probe_measures_what_loops_measure() -> None:
    run = tiny.lte_run(devices=2, merge_every=3)
    probe = probed(run, batches=3, warmup=5)
    dense = tiny.ddp_run(devices=2)
    start = {name: w.clone() for name, w in build_model(run).state_dict().items()}
    before_round = tiny.train(tiny.build(dense), num_steps=2).weights
    end = tiny.train(tiny.build(dense), num_steps=5).weights
    for state, steps, weights in ((probe.initial, 0, start), (probe.warmed, 5, end)):
        rows, means, losses = twin_gradients(run, weights, steps, 3)
        assert (state.steps, state.loss) == (steps, pytest.approx(sum(losses) / 6))
        expected = noise_figures(float(rows.square().sum(1).mean()), float(rows.mean(0).square().sum()), 2, 12, 1)
        assert state.noise.gradient_square == pytest.approx(expected["gradient_square"], rel=1e-9)
        assert state.noise.gradient_variance == pytest.approx(expected["gradient_variance"], rel=1e-9)
        for layer in probe.layers:
            gradient = layer.initial if steps == 0 else layer.warmed
            values = torch.linalg.svdvals(means[f"{layer.name}.weight"])
            assert gradient.spectrum is not None
            assert gradient.spectrum.stable_rank == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-9)
            assert gradient.spectrum.rank_90 == rank_holding(values, 0.9)
    for layer in probe.layers:
        for found, since in ((layer.update, start), (layer.round_update, before_round)):
            values = torch.linalg.svdvals(end[f"{layer.name}.weight"] - since[f"{layer.name}.weight"])
            assert found is not None
            assert found.stable_rank == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-9)
            assert found.rank_50 == rank_holding(values, 0.5)


def test_a_round_is_the_methods_own_or_ltes_default_and_never_longer_than_the_warm_up() -> None:
    assert round_steps(tiny.lte_run(merge_every=7)) == 7
    assert round_steps(tiny.ddp_run()) == 10
    assert probed(tiny.ddp_run(), 2, 2).settings.round_steps == 2


def test_too_few_gradients_are_refused() -> None:
    with pytest.raises(InputError, match=r"--batches 2 on cluster\.devices = 1"):
        probed(tiny.ddp_run(devices=1), 2, 2)
