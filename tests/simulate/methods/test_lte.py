"""LTE against its slow twin, step by step, and what a head may see of the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from simulate.config.run import Run
from simulate.layers.lora import LoraLinear, lora_layers
from simulate.methods.averaging import Averaging
from simulate.methods.base import Method
from simulate.methods.build_network import build_model
from simulate.methods.loss import Loss
from simulate.methods.lte.merge import LayerMerger
from simulate.methods.lte.products import Team
from tests import tiny
from tests.reference.lora import LoraTwin
from tests.reference.lte import LteTwin
from tests.selection import others_slow

pytestmark = pytest.mark.numeric

RESETS = ("none", "b", "ab")
# Five merges, the last one early; some steps are clipped and some are not (checked below).
TRAIN = {"steps": 19, "micro_batch": 2, "warmup_steps": 3, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": 1.4}


def parity_run(reset: str, heads_per_device: int, transport: str = "gather") -> Run:
    method = {"merge_every": 4, "reset": reset, "heads_per_device": heads_per_device, "merge_transport": transport}
    return tiny.lte_run(3, {"layers": 1}, TRAIN, **method)


def engine_draw(run: Run) -> Callable[[str, int, int], Tensor]:
    """Return the engine's draws of A for the twin, which has none of its own."""
    layers = {f"{layer.name}.weight": layer for layer in lora_layers(tiny.build(run).model)}
    return lambda name, head, steps_done: layers[name].draw_a(steps_done)[head]


@cache
def twin_of(run: Run) -> tuple[LteTwin, tiny.History]:
    twin, data = LteTwin(run, build_model(run), engine_draw(run)), tiny.batches(run)
    losses = [twin.step(*data.batch(step, range(run.cluster.devices)), step) for step in range(run.train.steps)]
    return twin, tiny.History(torch.stack(losses), twin.merged_state())


def twin_history(reset: str, heads_per_device: int) -> tiny.History:
    """The twin knows no transports: one of it serves all three."""
    return twin_of(parity_run(reset, heads_per_device))[1]


TRANSPORTS = ["gather", "reduce", "server"]
# All pairs of two settings are among these: of the numbers of heads the one or the other.
PAIRS = [(r, 1 + (i + j) % 2, t) for i, r in enumerate(RESETS) for j, t in enumerate(TRANSPORTS)]


@pytest.mark.parametrize(
    ("reset", "heads_per_device", "transport"), others_slow(itertools.product(RESETS, [1, 2], TRANSPORTS), PAIRS)
)
def test_every_transport_and_reset_trains_like_the_twin(reset: str, heads_per_device: int, transport: str) -> None:
    run = parity_run(reset, heads_per_device, transport)
    tiny.assert_parity(tiny.train(tiny.build(run)), twin_history(reset, heads_per_device))


def test_parity_covers_clipped_and_unclipped_steps() -> None:
    twin, _ = twin_of(parity_run("none", 1))
    clipped = [flag for device in twin.devices for flag in device.clipped]
    assert 0.1 < sum(clipped) / len(clipped) < 0.9


def test_parity_covers_a_model_that_learns() -> None:
    losses = twin_history("none", 1).losses.mean(1)
    assert losses[-5:].mean() < 0.8 * losses[0]


def scaled_by_s(merger: LayerMerger, team: Team) -> float:
    return merger.options.scale


GROUP_LOSSES = Loss.group_losses


def loss_over_all_heads(loss: Loss, inputs: Tensor, targets: Tensor, groups: int) -> Tensor:
    return GROUP_LOSSES(loss, inputs, targets, groups) / groups


def forget(layer: LoraLinear, a_HRI: Tensor, b_HOR: Tensor) -> None:
    """Subtract nothing: the next rounds count the old product twice."""


def same_draw_for_all(layer: LoraLinear, merges: int) -> Tensor:
    return ORIGINAL_DRAW(layer, merges)[:1].expand_as(layer.a)


ORIGINAL_DRAW = LoraLinear.draw_a


def average_nothing(averaging: Averaging, index: int, weights_N: Tensor | None = None) -> None:
    """Leave every device with its own."""


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        pytest.param(LayerMerger, "share_of", scaled_by_s, id="sum of heads in place of their mean"),
        pytest.param(Loss, "group_losses", loss_over_all_heads, id="mean loss over all heads"),
        pytest.param(Averaging, "merge", average_nothing, id="replicated parameters not averaged"),
        pytest.param(LoraLinear, "remember_product", forget, id="old product not subtracted"),
    ],
)
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: object
) -> None:
    slow = twin_history("none", 1)
    monkeypatch.setattr(owner, name, broken)
    fast = tiny.train(tiny.build(parity_run("none", 1)))
    with pytest.raises(AssertionError):
        tiny.assert_parity(fast, slow)


def test_parity_detects_heads_that_share_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = twin_history("ab", 1)
    monkeypatch.setattr(LoraLinear, "draw_a", same_draw_for_all)
    fast = tiny.train(tiny.build(parity_run("ab", 1)))
    with pytest.raises(AssertionError):
        tiny.assert_parity(fast, slow)


def test_one_head_merged_every_step_without_reset_is_plain_lora() -> None:
    run = tiny.lte_run(devices=1, merge_every=1, reset="none", train={**TRAIN, "steps": 12})
    twin, data = LoraTwin(run, build_model(run), engine_draw(run)), tiny.batches(run)
    losses = [twin.step(*data.batch(step, range(1)), step) for step in range(run.train.steps)]
    tiny.assert_parity(tiny.train(tiny.build(run)), tiny.History(torch.stack(losses), twin.merged_state()))


def head_gradients(run: Run, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Return each adapter's gradient, (H, ...), before clipping, with B away from its zero start."""
    method = tiny.build(run)
    for layer in lora_layers(method.model):
        with torch.no_grad():
            layer.b.copy_(torch.arange(layer.b.numel()).view(layer.b.shape).sin() / 10)  # head 0: the same for any H
    kept: list[Tensor] = []

    def keep(rate_factor: float) -> None:
        kept.extend(f.grad for layer in lora_layers(method.model) for f in (layer.a, layer.b) if f.grad is not None)

    method.stepper.step = keep  # type: ignore[method-assign]
    method.step(inputs, targets, 0)
    assert kept
    return kept


UNCLIPPED = {"clip_norm": 1e9}


@pytest.mark.parametrize(("devices", "heads_per_device"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_a_head_never_sees_another_heads_data(devices: int, heads_per_device: int, dtype: str) -> None:
    train = {**UNCLIPPED, "micro_batch": 2 * heads_per_device, "dtype": dtype}
    run = tiny.lte_run(devices=devices, heads_per_device=heads_per_device, train=train)
    inputs, targets = tiny.batches(run).batch(0, range(devices))
    before = head_gradients(run, inputs, targets)
    others_inputs, others_targets = inputs.clone(), targets.clone()
    others_inputs[4:6], others_targets[4:6] = 65, 66  # the two samples of head 2
    after = head_gradients(run, others_inputs, others_targets)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[[0, 1, 3]], new[[0, 1, 3]])
        assert not torch.equal(old[2], new[2])


def test_a_device_never_sees_another_devices_data_between_merges() -> None:
    run = tiny.lte_run(devices=2, merge_every=10, train={"clip_norm": 0.1, "learning_rate": 1e-2})
    first, second = tiny.build(run), tiny.build(run)
    data = tiny.batches(run)
    for step in range(5):
        inputs, targets = data.batch(step, range(2))
        first.step(inputs, targets, step)
        second.step(torch.cat([inputs[:2], inputs[2:] * 0]), targets, step)
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one[0], other[0])


def test_a_heads_gradient_does_not_shrink_with_the_number_of_heads() -> None:
    alone, among_four = tiny.lte_run(devices=1, train=UNCLIPPED), tiny.lte_run(devices=4, train=UNCLIPPED)
    inputs, targets = tiny.batches(among_four).batch(0, range(4))
    expected, kept = head_gradients(alone, inputs[:2], targets[:2]), head_gradients(among_four, inputs, targets)
    for of_alone, of_four in zip(expected, kept, strict=True):
        torch.testing.assert_close(of_four[:1], of_alone, rtol=1e-10, atol=1e-14)


@torch.no_grad()
def spoil(method: Method) -> None:
    """Leave nothing of the start that a restored method could lean on."""
    start_weights = [layer.start_weight for layer in lora_layers(method.model) if layer.start_weight is not None]
    for tensor in (*method.model.parameters(), *method.model.buffers(), *start_weights):
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)


@pytest.mark.parametrize("steps_before", [2, 8], ids=["before the first merge", "inside the third round"])
@pytest.mark.parametrize("reset", RESETS)
def test_a_restored_method_continues_bit_for_bit(reset: str, steps_before: int) -> None:
    run = tiny.lte_run(devices=2, reset=reset, merge_every=3, train={"steps": 20})
    method = tiny.build(run)
    tiny.train(method, 0, steps_before)
    saved = {name: tensor.clone() for name, tensor in method.state.state_dict().items()}
    restored = tiny.build(run)
    spoil(restored)
    restored.state.load_state_dict(saved)
    unbroken, continued = tiny.train(method, steps_before), tiny.train(restored, steps_before)
    assert torch.equal(unbroken.losses, continued.losses)
    assert method.state.state_dict().keys() == restored.state.state_dict().keys()
    assert all(
        torch.equal(tensor, restored.state.state_dict()[name]) for name, tensor in method.state.state_dict().items()
    )


def test_a_state_without_a_tensor_is_refused() -> None:
    method = tiny.build(tiny.lte_run())
    state = method.state.state_dict()
    del state["model.blocks.0.mlp.up.a"]
    with pytest.raises(KeyError, match=r"blocks\.0\.mlp\.up\.a"):
        method.state.load_state_dict(state)


def test_merges_come_after_each_round_and_after_the_last_step() -> None:
    method = tiny.build(tiny.lte_run(merge_every=3, train={"steps": 8}))
    assert [step for step in range(8) if method.merge_due(step)] == [2, 5, 7]
