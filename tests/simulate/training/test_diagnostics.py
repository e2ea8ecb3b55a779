"""The figures of rounds and gradients: by hand, by their properties, and without effect on the training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.config.run import build_run
from simulate.layers.cross_entropy import token_losses
from simulate.methods.base import Method
from simulate.methods.build_network import build_model
from simulate.methods.round_updates import DenseUpdates, LayerUpdates, LowRankUpdates, decompose
from simulate.rules.diagnostics import NOISE_BATCHES, SAMPLED_HEADS
from simulate.training.diagnostics import (
    Diagnostics,
    Figures,
    GradientSums,
    effective_rank,
    grassmann_distance,
    noise_figures,
    pair_figures,
    sampled_heads,
    share_within,
    stable_rank,
)
from tests import tiny
from tests.selection import others_slow

PAIRS = {"cosine", "grassmann_rad", "grassmann_limit_rad"}
MERGE = {"effective_rank", "stable_rank", "first_directions_share"}
DRIFT = {"drift_mean", "drift_max"}
GRADIENT = {"gradient_square", "gradient_variance"}
SCALE = {"noise_scale_samples", "noise_scale_tokens"}
ROUNDS = ("lte", "local-sgd", "diloco", "daso")
TRAINED = (
    "ddp", "relora, warm start", "adamix", "sapipe", "local-sgd, moments", "fedavg", "diloco, streaming", "daso", "lte",
    "lte, int8", "lte, streaming int8", "lte, vector norms, reset", "lte, norms of one", "lte, frozen a",
)  # fmt: skip


def updates_of(kind: str, changes: Sequence[Tensor]) -> LayerUpdates:
    """Return heads with these changes, as factors or as dense weights that were zero."""
    stacked = torch.stack(list(changes)).double()
    if kind == "dense":
        return DenseUpdates("w", stacked, torch.zeros_like(stacked[0]))
    identity = torch.eye(stacked.shape[2]).double().expand(len(stacked), -1, -1)
    return LowRankUpdates("w", stacked, identity)


@pytest.mark.parametrize("kind", ["dense", "factors"])
@pytest.mark.parametrize("degrees", [0, 1e-4, 30, 60, 90])
def test_two_heads_of_rank_one_at_an_angle(kind: str, degrees: float) -> None:
    angle = math.radians(degrees)
    right = torch.tensor([[1.0, 2.0]]).double()
    first = torch.tensor([[1.0], [0.0], [0.0]]).double() @ right
    second = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0]], dtype=torch.float64) @ right
    figures = pair_figures(updates_of(kind, [first, 3 * second]), range(2))
    assert figures["cosine"] == pytest.approx(math.cos(angle), abs=1e-12)
    assert figures["grassmann_rad"] == pytest.approx(angle, abs=1e-9)
    assert figures["grassmann_limit_rad"] == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("kind", ["dense", "factors"])
def test_identical_heads_are_at_no_distance_and_opposite_ones_share_a_space(kind: str) -> None:
    change = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, 1.0]])
    same = pair_figures(updates_of(kind, [change, change]), range(2))
    assert (same["cosine"], same["grassmann_rad"]) == pytest.approx((1, 0), abs=1e-9)
    opposite = pair_figures(updates_of(kind, [change, -change]), range(2))
    assert (opposite["cosine"], opposite["grassmann_rad"]) == pytest.approx((-1, 0), abs=1e-9)


@pytest.mark.parametrize("kind", ["dense", "factors"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_orthogonal_heads_are_as_far_apart_as_can_be(kind: str, rank: int) -> None:
    rows = torch.eye(6).double()
    changes = [rows[:, :rank] @ torch.randn(rank, 4).double(), rows[:, rank : 2 * rank] @ torch.randn(rank, 4).double()]
    figures = pair_figures(updates_of(kind, changes), range(2))
    assert figures["cosine"] == pytest.approx(0, abs=1e-12)
    assert figures["grassmann_rad"] == pytest.approx(math.pi / 2 * math.sqrt(rank))
    assert figures["grassmann_limit_rad"] == pytest.approx(figures["grassmann_rad"])


def test_the_smaller_rank_decides_how_many_angles_there_are() -> None:
    line, plane = torch.diag(torch.tensor([1.0, 0.0, 0.0])), torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    figures = pair_figures(updates_of("dense", [line, plane]), range(2))
    assert figures["grassmann_limit_rad"] == pytest.approx(math.pi / 2)
    assert figures["grassmann_rad"] == pytest.approx(0, abs=1e-9)


def test_a_head_alone_or_unchanged_makes_no_pairs() -> None:
    change = torch.ones(2, 2)
    assert pair_figures(updates_of("dense", [change]), range(1)) == {}
    assert pair_figures(updates_of("factors", [change, 0 * change]), range(2)) == {}


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(4, 8))
def test_the_grassmann_distance_is_one_of_subspaces(seed: int, k: int, outputs: int) -> None:
    random = torch.Generator().manual_seed(seed)
    one, other, turn = (
        torch.linalg.qr(torch.randn(rows, k, generator=random).double())[0] for rows in (outputs, outputs, k)
    )
    distance = grassmann_distance(one, other)
    assert 0 <= distance <= math.pi / 2 * math.sqrt(k) + 1e-9
    assert grassmann_distance(other, one) == pytest.approx(distance, abs=1e-9)
    assert grassmann_distance(one @ turn, other) == pytest.approx(distance, abs=1e-9)
    assert grassmann_distance(one, one @ turn) == pytest.approx(0, abs=1e-9)


def test_the_ranks_of_three_and_four() -> None:
    values, _, _ = decompose(torch.diag(torch.tensor([3.0, 4.0])).double(), most=2)
    assert stable_rank(values) == pytest.approx(25 / 16)
    entropy = -(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(4 / 7))
    assert effective_rank(values) == pytest.approx(math.exp(entropy))


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_ranks_lie_between_one_and_the_rank(seed: int, rank: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(8, rank, generator=random).double() @ torch.randn(rank, 6, generator=random).double()
    values, _, _ = decompose(x, most=8)
    assert 1 - 1e-9 <= stable_rank(values) <= effective_rank(values) ** 2
    assert 1 - 1e-9 <= effective_rank(values) <= rank + 1e-9
    equal = torch.full((rank,), 0.3).double()
    assert (stable_rank(equal), effective_rank(equal)) == pytest.approx((rank, rank))


def test_the_share_within_a_direction() -> None:
    x, e = torch.diag(torch.tensor([3.0, 4.0])).double(), torch.eye(2).double()
    assert share_within(x, e[:, 1:], e[:, 1:]) == pytest.approx(16 / 25)
    assert share_within(x, e[:, :1], e[:, 1:]) == 0
    assert share_within(x, e, e) == pytest.approx(1)


class Rounds(Method):
    """A method that only has updates, given one round after the other."""

    def __init__(self, *rounds: Sequence[LayerUpdates]) -> None:
        devices = len(rounds[0][0].devices)
        self.run, self.rounds = tiny.lte_run(devices=devices), rounds
        self.communicator, self.healthy_N = VirtualCommunicator(devices), None

    def updates(self, step: int):  # type: ignore[no-untyped-def]
        return iter(self.rounds[step])

    prepare = parameter_groups = step = merge = merged_state = None  # type: ignore[assignment]


def test_the_drift_is_taken_over_all_layers() -> None:
    # Device 0 changed by (4, 0), (0), device 1 by (2, 0), (6): the mean is (3, 0), (3), and each is (1, 0), (3) off.
    one = DenseUpdates("a", torch.tensor([[[4.0, 0.0]], [[2.0, 0.0]]]), torch.zeros(1, 2))
    two = DenseUpdates("b", torch.tensor([[0.0], [6.0]]), torch.zeros(1), is_matrix=False)
    figures = Diagnostics(Rounds([one, two])).of_round(0)
    assert figures["drift_mean"] == figures["drift_max"] == pytest.approx(math.sqrt(10 / 18))


def test_the_largest_drift_is_one_devices() -> None:
    changes = torch.tensor([[3.0], [0.0], [0.0]])  # mean 1: off by 2, 1, 1
    figures = Diagnostics(Rounds([DenseUpdates("a", changes, torch.zeros(1), is_matrix=False)])).of_round(0)
    assert (figures["drift_mean"], figures["drift_max"]) == pytest.approx((4 / 3, 2))


def test_later_merges_are_held_against_the_first_directions() -> None:
    wide = torch.zeros(2, 10, 12)
    first, second = wide.clone(), wide.clone()
    first[:, range(10), range(10)] = torch.arange(10.0, 0, -1)  # the leading 8 are the first 8 axes
    second[:, 0, 0], second[:, 9, 9] = 3.0, 4.0
    rounds = ([DenseUpdates("w", x, wide[0])] for x in (first, second))
    diagnostics = Diagnostics(Rounds(*rounds))
    shares = [diagnostics.of_round(step)["first_directions_share"] for step in range(2)]
    squares = [float(n**2) for n in range(10, 0, -1)]
    assert shares == pytest.approx([sum(squares[:8]) / sum(squares), 9 / 25])


def test_a_run_that_diverged_has_no_figures() -> None:
    assert (
        Diagnostics(Rounds([DenseUpdates("w", torch.full((2, 3, 3), math.nan), torch.zeros(3, 3))])).of_round(0) == {}
    )
    assert noise_figures(math.inf, 1.0, 1, 4, 8) == {}


def test_a_layer_without_change_is_left_out_of_the_means() -> None:
    still = DenseUpdates("still", torch.zeros(2, 2, 2), torch.zeros(2, 2))
    moved = DenseUpdates("moved", torch.diag(torch.tensor([3.0, 4.0])).expand(2, 2, 2), torch.zeros(2, 2))
    assert Diagnostics(Rounds([still, moved])).of_round(0)["stable_rank"] == pytest.approx(25 / 16)
    assert Diagnostics(Rounds([still])).of_round(0) == {}


def test_expected_norms_give_the_noise_scale_exactly() -> None:
    # |G|² = 2 and tr Σ = 12: a gradient of B samples has an expected squared norm of 2 + 12/B.
    figures = noise_figures(2 + 12 / 4, 2 + 12 / 64, 4, 64, sample_tokens=8)
    assert figures["gradient_square"] == pytest.approx(2)
    assert figures["gradient_variance"] == pytest.approx(12)
    assert (figures["noise_scale_samples"], figures["noise_scale_tokens"]) == pytest.approx((6, 48))


def test_estimates_from_gradients_of_known_covariance_are_unbiased() -> None:
    random = torch.Generator().manual_seed(0)
    mean, deviations = torch.tensor([1.0, -1.0]).double(), torch.tensor([1.0, 3.0]).double()  # |G|² = 2, tr Σ = 10
    samples = mean + deviations * torch.randn(4000, 4, 2, 2, generator=random).double()  # tries, devices, samples
    parts = samples.mean(2)
    small, big = parts.square().sum(2).mean(1), parts.mean(1).square().sum(1)
    figures = [noise_figures(float(s), float(b), 2, 8, 1) for s, b in zip(small, big, strict=True)]
    for key, expected in (("gradient_square", 2), ("gradient_variance", 10)):
        assert sum(f[key] for f in figures) / len(figures) == pytest.approx(expected, rel=0.03)
    assert any("noise_scale_samples" not in f for f in figures)


@pytest.mark.parametrize(("devices", "passes"), [(1, 1), (3, 1), (2, 3)])
def test_the_noise_scale_is_that_of_the_merged_weights_on_the_coming_batches(devices: int, passes: int) -> None:
    """The small batch is that of a pass, so that it fits the memory."""
    run = tiny.lte_run(devices=devices, merge_every=4, train={"accumulate": passes})
    method, data = tiny.build(run), tiny.batches(run)
    diagnostics = Diagnostics(method)
    tiny.train(method, num_steps=4)
    figures = diagnostics.of_gradients(data, 4, tiny.CPU)
    model = build_model(run)
    model.load_state_dict(method.merged_state())
    gradients = []
    for step in range(4, 4 + NOISE_BATCHES):
        inputs, targets = data.batch(step, range(devices))
        chunks = devices * passes
        for own_inputs, own_targets in zip(inputs.chunk(chunks), targets.chunk(chunks), strict=True):
            model.zero_grad()
            token_losses(model(own_inputs).flatten(0, 1), own_targets.reshape(-1)).mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    small = sum(float(g.square().sum()) for g in gradients) / len(gradients)
    big = float(torch.stack(gradients).mean(0).square().sum())
    expected = noise_figures(small, big, 2, 2 * passes * devices * NOISE_BATCHES, run.model.context)
    assert figures == pytest.approx(expected, rel=1e-9)


def test_few_heads_are_all_compared_and_many_are_drawn() -> None:
    assert sampled_heads(0, 5, SAMPLED_HEADS) == list(range(SAMPLED_HEADS))
    drawn = sampled_heads(0, 5, 100)
    assert len(set(drawn)) == SAMPLED_HEADS and drawn == sorted(drawn) and drawn[-1] < 100
    assert drawn == sampled_heads(0, 5, 100) != sampled_heads(0, 6, 100)


def train_with_diagnostics(method: Method) -> tuple[tiny.History, list[Figures]]:
    """Train to the end, with all figures at every merge."""
    diagnostics, data, events, losses = Diagnostics(method), tiny.batches(method.run), [], []
    for step in range(method.run.train.steps):
        losses.append(method.step(*data.batch(step, range(method.run.cluster.devices)), step))
        if method.merge_due(step):
            figures = diagnostics.of_round(step)
            method.merge(step)
            events.append({**figures, **diagnostics.of_gradients(data, step + 1, tiny.CPU)})
    return tiny.History(torch.stack(losses), method.merged_state()), events


@pytest.mark.parametrize(
    "variant",
    others_slow(
        TRAINED, ["ddp", "relora, warm start", "fedavg", "daso", "lte, streaming int8", "lte, vector norms, reset"]
    ),
)
def test_diagnostics_leave_no_trace_in_training(variant: str) -> None:
    run = tiny.variant_run(variant, train={"steps": 10})
    plain = tiny.train(tiny.build(run))
    history, events = train_with_diagnostics(tiny.build(run))
    assert torch.equal(history.losses, plain.losses)
    assert all(torch.equal(history.weights[name], weight) for name, weight in plain.weights.items())
    expected = PAIRS | MERGE | DRIFT if run.method.name in ROUNDS else set()
    assert all(event.keys() - SCALE == expected | GRADIENT for event in events)
    assert all(math.isfinite(value) for event in events for value in event.values())


def test_a_single_device_has_a_merge_but_neither_pairs_nor_drift() -> None:
    _, events = train_with_diagnostics(tiny.build(tiny.lte_run(devices=1, train={"steps": 10})))
    assert all(event.keys() - SCALE == MERGE | GRADIENT for event in events)
    assert events[0]["effective_rank"] <= 2


@pytest.mark.parametrize("variant", ["lte", "lte, vector norms", "local-sgd, moments", "diloco, streaming", "daso"])
def test_a_restored_run_has_the_same_figures(variant: str) -> None:
    run = tiny.variant_run(variant, train={"steps": 12})
    _, whole = train_with_diagnostics(tiny.build(run))
    method, data = tiny.build(run), tiny.batches(run)
    diagnostics = Diagnostics(method)
    for step in range(6):
        method.step(*data.batch(step, range(4)), step)
        if method.merge_due(step):
            diagnostics.of_round(step)
            method.merge(step)
    state = {name: tensor.clone() for name, tensor in {**method.state.state_dict(), **diagnostics.state_dict()}.items()}
    method = tiny.build(run)
    diagnostics = Diagnostics(method)
    method.state.load_state_dict(state)
    diagnostics.load_state_dict(state)
    events = []
    for step in range(6, 12):
        method.step(*data.batch(step, range(4)), step)
        if method.merge_due(step):
            events.append(diagnostics.of_round(step))
            method.merge(step)
    assert events
    for event, expected in zip(events, whole[-len(events) :], strict=True):
        assert event == {name: value for name, value in expected.items() if name not in GRADIENT | SCALE}


@pytest.mark.parametrize("variant", ["lte", "local-sgd", "daso"])
def test_nothing_is_kept_where_nobody_asked(variant: str) -> None:
    method = tiny.build(tiny.variant_run(variant))
    assert not any("last." in name for name in method.state.state_dict())
    Diagnostics(method)
    assert any("last." in name for name in method.state.state_dict())


class _Recomputed(nn.Module):
    """A block that is used twice, and recomputed."""

    def __init__(self, context: int, reentrant: bool) -> None:
        super().__init__()
        self.token, self.block, self.head = nn.Embedding(256, 8), nn.Linear(8, 8), nn.Linear(8, 256)
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_that_come_in_parts_are_refused() -> None:
    def sums(reentrant: bool) -> GradientSums:
        model = {"name": f"{__name__}:_Recomputed", "context": 6, "reentrant": reentrant}
        run = build_run({"model": model, "method": {"name": "ddp"}, "cluster": {"devices": 2}})
        weights = dict(build_model(run).named_parameters())
        return GradientSums(run, weights)

    tokens = torch.arange(12).view(2, 6)
    sums(False).add(tokens, tokens)
    with pytest.raises(InputError, match=r"block.* come in parts.*use_reentrant=False"):
        sums(True).add(tokens, tokens)
