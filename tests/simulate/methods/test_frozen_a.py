"""LTE with a frozen A: what stays, who can draw it, what travels, and that B trains as if A had no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simulate.common.errors import InputError
from simulate.config.run import Run
from simulate.costs.flops import pass_flops
from simulate.costs.message_schedule import sent_bytes
from simulate.layers.lora import LoraLinear, lora_layers
from simulate.methods.lte.train import Lte
from tests import tiny
from tests.reference.lte_frozen_a import LteFrozenATwin
from tests.simulate.methods.adapter_parity import TRAIN, assert_trains_like, twin_of


def frozen_run(devices: int = 2, train: tiny.Table | None = None, **method: Any) -> Run:
    """Return a tiny run of one block that trains B alone."""
    options = {"frozen_a": True, "reset": "b", "merge_every": 4, **method}
    return tiny.lte_run(devices, {"layers": 1}, train, **options)


def parity_run(**method: Any) -> Run:
    return frozen_run(train=TRAIN, **method)


def engine_of(run: Run, local_devices: range | None = None) -> Lte:
    engine = tiny.build(run, local_devices)
    assert isinstance(engine, Lte)
    return engine


PARITY: dict[str, dict[str, Any]] = {
    "b": {"reset": "b"},
    "ab, reduced": {"reset": "ab", "merge_transport": "reduce"},
    "two heads, served": {"reset": "ab", "heads_per_device": 2, "merge_transport": "server"},
}


@pytest.mark.parametrize("name", list(PARITY))
def test_every_way_to_merge_trains_like_the_twin(name: str) -> None:
    assert_trains_like(LteFrozenATwin, parity_run(**PARITY[name]))


def one_draw_for_ever(layer: LoraLinear, steps_done: int) -> None:
    """Keep A where a merge should draw it anew."""
    if not hasattr(layer, "a0"):
        ORIGINAL_REDRAW(layer, steps_done)


ORIGINAL_REDRAW = LoraLinear.redraw_a


def test_parity_detects_an_a_that_is_not_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraLinear, "redraw_a", one_draw_for_ever)
    with pytest.raises(AssertionError):
        assert_trains_like(LteFrozenATwin, parity_run(**PARITY["ab, reduced"]))


def test_parity_detects_an_a_that_is_trained() -> None:
    fast = tiny.train(tiny.build(parity_run(frozen_a=False)))
    with pytest.raises(AssertionError):
        tiny.assert_parity(fast, twin_of(LteFrozenATwin, parity_run(**PARITY["b"]))[1])


@pytest.mark.parametrize("reset", ["b", "ab"])
def test_a_is_a_buffer_that_changes_at_redraws_alone(reset: str) -> None:
    engine = engine_of(frozen_run(merge_every=4, reset=reset, train={"weight_decay": 0.5}))
    layers = lora_layers(engine.model)
    assert not any(name.endswith(".a") for name in engine.parameters)
    assert all(list(layer.factors()) == [layer.b] for layer in layers)
    draws = [layer.a.clone() for layer in layers]
    for first in (0, 4):
        for step in range(first, first + 4):
            assert all(torch.equal(layer.a, draw) for layer, draw in zip(layers, draws, strict=True))
            assert all(layer.a.grad is None for layer in layers)
            tiny.train(engine, step, 1)
        changed = [not torch.equal(layer.a, draw) for layer, draw in zip(layers, draws, strict=True)]
        assert set(changed) == {reset == "ab"}
        assert {int(layer.drawn_after) for layer in layers} == {first + 4 if reset == "ab" else 0}
        draws = [layer.a.clone() for layer in layers]


@pytest.mark.parametrize("heads_per_device", [1, 2])
@pytest.mark.parametrize("steps_done", [0, 7])
def test_one_device_can_draw_what_all_have(steps_done: int, heads_per_device: int) -> None:
    run = frozen_run(devices=3, heads_per_device=heads_per_device, reset="ab")
    together, alone = engine_of(run), engine_of(run, range(1, 2))
    heads = 3 * heads_per_device
    own = slice(heads_per_device, 2 * heads_per_device)
    for of_all, of_one in zip(lora_layers(together.model), lora_layers(alone.model), strict=True):
        assert torch.equal(of_one.draw_a(steps_done, heads), of_all.draw_a(steps_done))
        assert torch.equal(of_one.draw_a(steps_done, heads)[own], of_one.draw_a(steps_done))
        assert len(of_one.a) == heads_per_device
        of_one.redraw_a(steps_done)
        of_all.redraw_a(steps_done)
        assert torch.equal(of_one.frozen_a(heads), of_all.a)


def others_b(engine: Lte, everyones: dict[str, Tensor]) -> None:
    """Let a lone process receive everyone's B in place of its own."""
    engine.communicator.all_gather = lambda tensors: list(everyones.values())  # type: ignore[method-assign]


def test_a_process_with_one_device_merges_what_all_together_do() -> None:
    run = frozen_run(devices=3)
    together, alone = engine_of(run), engine_of(run, range(1, 2))
    everyones = {layer.name: torch.randn_like(layer.b) for layer in lora_layers(together.model)}
    with torch.no_grad():
        for layer in lora_layers(together.model):
            layer.b.copy_(everyones[layer.name])
    others_b(alone, everyones)
    together.merge(0)
    alone.merge(0)
    for of_all, of_one in zip(lora_layers(together.model), lora_layers(alone.model), strict=True):
        torch.testing.assert_close(of_one.weight, of_all.weight, rtol=1e-13, atol=1e-13)


# One block of width 16 at rank 2: outputs 48 + 16 + 64 + 16, inputs 16 + 16 + 16 + 64; 4 bytes each.
B_BYTES, A_BYTES = 2 * 144 * 4, 2 * 112 * 4


@pytest.mark.parametrize(("frozen_a", "factor_bytes"), [(True, B_BYTES), (False, A_BYTES + B_BYTES)])
def test_only_b_travels(frozen_a: bool, factor_bytes: int) -> None:
    run = frozen_run(devices=3, frozen_a=frozen_a, train={"dtype": "fp32"})
    engine = engine_of(run)
    with torch.no_grad():
        engine.mergers[0].merge()
    assert engine.communicator.counter.sent_bytes == 3 * 2 * factor_bytes  # everyone passes on two others' factors
    # 256·16 tokens, 8·16 positions, 144 biases, three norms of 2·16; all-reduced: each link of the ring twice.
    replicated_bytes = (4096 + 128 + 144 + 96) * 4
    assert sent_bytes(run, run.model.shape(), 4) == 6 * factor_bytes + 4 * replicated_bytes


def test_through_a_server_only_b_is_pushed_and_w_is_pulled() -> None:
    engine = engine_of(frozen_run(devices=3, merge_transport="server", train={"dtype": "fp32"}))
    with torch.no_grad():
        engine.mergers[0].merge()
    counter = engine.communicator.counter
    weights_bytes = (48 * 16 + 16 * 16 + 2 * 64 * 16) * 4
    assert (counter.sent_bytes, counter.received_bytes) == (3 * B_BYTES, 3 * weights_bytes)


def test_the_optimizer_keeps_moments_of_b_alone() -> None:
    engine = engine_of(frozen_run(train={"steps": 1}))
    tiny.train(engine)
    states = [engine.stepper.state[layer.b] for layer in lora_layers(engine.model)]
    assert sum(state["exp_avg"].numel() for state in states) == 2 * 2 * 144  # two devices
    assert all(layer.a not in engine.stepper.state for layer in lora_layers(engine.model))


@pytest.mark.parametrize("frozen_a", [True, False])
def test_a_layer_keeps_its_inputs_for_the_gradient_of_a_alone(frozen_a: bool) -> None:
    engine = engine_of(frozen_run(frozen_a=frozen_a))  # two devices, rank 2
    layer = lora_layers(engine.model)[0]
    inputs = torch.zeros(2 * 3, layer.size[1], requires_grad=True)
    held = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.extend([tensor] if id(tensor) not in held else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(inputs)
    rows = [tensor.shape[-1] for tensor in kept if tensor.shape[:2] == (2, 3)]
    assert sorted(rows) == ([2] if frozen_a else [2, layer.size[1]])


def test_a_frozen_a_without_reset_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        frozen_run(reset="none")
    rule = "frozen_a = true trains alike with reset = 'none' and reset = 'b', which needs less memory"
    assert f"{rule}; try --set method.reset=b" in str(caught.value)


def no_gradient(gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient)


def test_b_trains_as_if_a_had_no_gradient() -> None:
    train = {"steps": 25, "learning_rate": 1e-2, "clip_norm": 1.1}  # A would decay: a gradient of zero is none to Adam
    frozen, plain = engine_of(frozen_run(train=train)), engine_of(frozen_run(train=train, frozen_a=False))
    for layer in lora_layers(plain.model):
        layer.a.register_hook(no_gradient)
    tiny.assert_parity(tiny.train(frozen), tiny.train(plain), 1e-12)


# One layer of O outputs and I inputs at rank 2, a token: W and B·A forward, and to the input, and B's gradient.
def layer_flops(outputs: int, inputs: int) -> int:
    return 2 * (2 * outputs * inputs + 2 * 2 * (outputs + inputs)) + 2 * 2 * outputs


def test_planned_operations_by_hand() -> None:
    sizes = {"layers": 1, "width": 4, "attention_heads": 2, "context": 3, "vocab": 5}
    layers = [(12, 4), (4, 4), (16, 4), (4, 16)]
    assert layer_flops(4, 4) == 2 * (32 + 32) + 16
    attention, head = 2 * 3 * 4, 2 * 5 * 4
    a_token = sum(layer_flops(*sides) for sides in layers) + 3 * (attention + head)
    run = tiny.lte_run(model=sizes, train={"micro_batch": 2}, frozen_a=True, reset="b")
    assert pass_flops(run, run.model.shape()) == 2 * 3 * a_token
    # Training A as well costs its gradient more: 2·2·I a layer and token.
    both = tiny.lte_run(model=sizes, train={"micro_batch": 2}, reset="b")
    extra = 2 * 3 * sum(4 * inputs for _, inputs in layers)
    assert pass_flops(both, both.model.shape()) - pass_flops(run, run.model.shape()) == extra
