"""Tests of users' networks: traced counts, adapted layers, separate copies, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from simulate.common.errors import InputError
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.costs.memory import peak_memory
from simulate.layers.attention import PerDeviceAttention
from simulate.layers.convert import ConversionSpec, convert, lora, merged_state
from simulate.layers.lora import AdapterSpec, lora_layers
from simulate.layers.per_device import ReplicatedModule
from simulate.measure.one_device import measure_memory_bytes
from simulate.methods.build_network import build_model, empty_model
from simulate.methods.lte.train import Lte
from simulate.models.fake_batch import example_batch
from simulate.models.user_network import call_factory
from tests import tiny

ENCODER: dict[str, Any] = {"name": "tests.networks:Encoder", "context": 16}
CONVOLUTIONAL: dict[str, Any] = {"name": "tests.networks:Convolutional", "image": 8, "classes": 10}
SOME_CONVOLUTIONAL = {"name": "tests.zoo:Net", "context": 6, "parts": "convolution"}
BLOCKS: dict[str, Any] = {"name": "tests.zoo:Net", "context": 6, "parts": "block,convolution,shared by blocks"}
IMAGES = {"image": 8, "classes": 10}
SPEC = AdapterSpec(2, 1.5, heads_per_device=1, reset_less=False, first_device=0, seed=0)


def run_of(model: dict[str, Any], method: dict[str, Any] | None = None, **train: Any) -> Run:
    table = {
        "model": model,
        "method": method or {"name": "lte", "rank": 2},
        "train": {"steps": 8, "micro_batch": 2, **train},
        "cluster": {"devices": 2},
    }
    return build_run(table)


def test_the_shape_is_traced_from_the_network() -> None:
    shape = run_of(ENCODER).model.shape()
    plain = build_model(run_of(ENCODER))
    assert [t.shape for t in shape.tensors] == [tuple(p.shape) for p in plain.parameters()]
    names = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert [(x.name, x.out_features, x.in_features, x.rows) for x in shape.adapted] == [
        (f"encoder.layers.0.{name}", o, i, 16)
        for name, o, i in zip(names, (48, 16, 32, 16), (16, 16, 16, 32), strict=True)
    ]
    kinds = [t.kind for t in shape.tensors]
    assert (kinds.count("embedding"), kinds.count("adapted"), kinds.count("norm"), kinds.count("bias")) == (2, 4, 4, 4)
    # Products of queries and keys, and of shares and values, both taken in full; and the tied head.
    assert shape.mixing_flops == 2 * 2 * 16 * 16 * 16 + 2 * 16 * 256 * 16


def test_a_convolutions_rows_are_its_pixels_and_the_layer_of_outputs_is_trained_whole() -> None:
    shape = run_of(CONVOLUTIONAL).model.shape()
    assert [(x.name, x.out_features, x.in_features, x.rows) for x in shape.adapted] == [
        ("one", 4, 27, 64), ("two", 8, 36, 16),
    ]  # fmt: skip
    notes = " ".join(shape.notes)
    assert "head (Linear)" in notes and "norm (GroupNorm, copy by copy)" in notes and "imported and run" in notes
    assert shape.width == 36 and shape.outputs == 10


def test_keys_of_the_model_go_to_the_factory() -> None:
    wide = run_of({**ENCODER, "width": 32, "depth": 2}).model.shape()
    assert len(wide.adapted) == 8 and wide.adapted[0].in_features == 32


def test_equal_options_share_one_shape() -> None:
    assert run_of(ENCODER).model.shape() is run_of(dict(ENCODER)).model.shape()


@pytest.mark.parametrize("model", [ENCODER, CONVOLUTIONAL, BLOCKS], ids=["encoder", "convolutional", "blocks"])
@pytest.mark.parametrize("convolutions", ["lora", "average"])
@pytest.mark.parametrize("biases", ["frozen", "average"])
def test_the_engine_holds_what_the_shape_says(model: dict[str, Any], biases: str, convolutions: str) -> None:
    if model is CONVOLUTIONAL and convolutions == "average":
        model = SOME_CONVOLUTIONAL
    run = run_of(model, {"name": "lte", "rank": 2, "convolutions": convolutions, "biases": biases})
    shape, engine = run.shape(), tiny.build(run)
    assert isinstance(engine, Lte)
    trained = [t for t in shape.replicated if biases == "average" or t.kind != "bias"]
    assert [t.shape for t in trained] == [tuple(p[0].shape) for p in engine.replicated_parameters]
    assert [x.name for x in shape.in_order()] == [layer.name for layer in lora_layers(engine.model)]


@pytest.mark.parametrize("method", [{"name": "ddp"}, {"name": "lte", "rank": 4}], ids=["ddp", "lte"])
@pytest.mark.parametrize(
    "model", [ENCODER, {**CONVOLUTIONAL, "image": 16}, BLOCKS], ids=["encoder", "convolutional", "blocks"]
)
def test_memory_is_planned_from_what_was_measured(model: dict[str, Any], method: dict[str, Any]) -> None:
    run = run_of(model, method, micro_batch=8)
    memory = peak_memory(run, run.model.shape(), load_profile("raspberry_x8").device[0])
    measured = measure_memory_bytes(run, torch.device("cpu"))
    assert memory.tensors == pytest.approx(measured, rel=0.05)


def test_gradients_of_factors_are_planned_at_their_rank() -> None:
    # Where there are few activations, what a trace at rank 1 lacks weighs more.
    wide = {"name": "tests.networks:Wide", "image": 8, "colours": 1, "classes": 10}
    run = run_of(wide, {"name": "lte", "rank": 8, "reset": "none"}, micro_batch=8)
    memory = peak_memory(run, run.model.shape(), load_profile("raspberry_x8").device[0])
    measured = measure_memory_bytes(run, torch.device("cpu"))
    assert memory.tensors == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("frozen_a", [True, False])
def test_what_a_frozen_a_does_not_keep_is_measured_apart(frozen_a: bool) -> None:
    run = run_of(ENCODER, {"name": "lte", "rank": 4, "frozen_a": frozen_a}, micro_batch=8)
    memory = peak_memory(run, run.model.shape(), load_profile("raspberry_x8").device[0])
    measured = measure_memory_bytes(run, torch.device("cpu"))
    assert memory.tensors == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", ["ddp", "diloco", "lte"])
@pytest.mark.parametrize("model", [ENCODER, CONVOLUTIONAL], ids=["encoder", "convolutional"])
def test_a_users_network_learns_and_merges_back(model: dict[str, Any], name: str) -> None:
    method = {"name": name, **({"rank": 2} if name == "lte" else {}), **({} if name == "ddp" else {"merge_every": 4})}
    run = run_of(model, method, learning_rate=3e-2, steps=12)
    engine, (inputs, targets) = tiny.build(run), example_batch(run.model, 4)
    losses = []
    for step in range(12):
        losses.append(float(engine.step(inputs, targets, step).mean()))
        if engine.merge_due(step):
            engine.merge(step)
    assert losses[-1] < losses[0]
    plain = build_model(run)
    plain.load_state_dict(engine.merged_state(), strict=True)


def test_devices_of_a_network_with_shared_positions_stay_apart() -> None:
    """Each copy's table serves its own samples, as in a plain network with that table."""
    run = run_of({**ENCODER, "context": 4})  # as many samples as positions: sizes alone could not tell them apart
    plain = build_model(run)
    model = convert(copy.deepcopy(plain), 2)
    inputs = torch.arange(16).view(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
        together = model(inputs)
        for index, (part, output) in enumerate(zip(inputs.chunk(2), together.chunk(2), strict=True)):
            plain.load_state_dict(merged_state(model, copy=index))
            torch.testing.assert_close(output, plain(part), rtol=1e-4, atol=1e-4)


def test_an_empty_network_keeps_buffers_and_has_no_weights() -> None:
    run = run_of(ENCODER)
    empty = empty_model(run)
    assert all(parameter.is_meta for parameter in empty.parameters())
    weights = dict(build_model(run).state_dict())
    inputs, _ = example_batch(run.model, 2)
    outputs = torch.func.functional_call(empty, weights, (inputs,), tie_weights=False)
    torch.testing.assert_close(outputs, build_model(run).eval()(inputs))


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "numbers": {"attn_mask": torch.full((5, 5), -torch.inf).triu(1).double()},
    "booleans": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "of each head": {"attn_mask": torch.ones(8, 5, 5, dtype=torch.bool).triu(1)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 4 + [True]] * 2)},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("treatment", [ConversionSpec(), ConversionSpec(lora(SPEC, 2))], ids=["copies", "adapters"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_torchs(mask: str, treatment: ConversionSpec, need_weights: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True).double())
    model = convert(copy.deepcopy(plain), 2, treatment)
    assert isinstance(model[0], PerDeviceAttention)
    x, other = (torch.randn(4, 5, 8, dtype=torch.float64) for _ in range(2))
    for inputs in ((x, x, x), (x, other, other), (x, other, x)):
        expected = plain[0](*inputs, need_weights=need_weights, **MASKS[mask])
        got = model[0](*inputs, need_weights=need_weights, **MASKS[mask])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    state = merged_state(model)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_module_with_several_inputs_runs_copy_by_copy() -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True).double()
    replicated = convert(nn.Sequential(copy.deepcopy(plain)), 2)[0]
    assert isinstance(replicated, ReplicatedModule)
    x, y = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(replicated(x, y, value=y), plain(x, y, y))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "tests.networks:Encode"}, ("has no 'Encode'", "did you mean 'Encoder'?")),
        ({"name": "tests.nowhere:Encoder"}, ("No module named 'tests.nowhere'", "package.module:Name")),
        ({"name": "tests.networks:not_callable"}, ("no function or class",)),
        ({"name": "tests.networks:broken"}, ("the factory raised RuntimeError: no weights today",)),
        ({"name": "tests.networks:no_network"}, ("returned a int", "torch.nn.Module")),
        ({**ENCODER, "dept": 3}, ("model.dept is no parameter", "did you mean 'depth'?")),
        ({**ENCODER, "width": 15}, ("the factory raised", "divisible")),
        ({"name": "tests.networks:Convolutional", "image": 8}, ("model.classes is missing",)),
        ({**CONVOLUTIONAL, "colours": 0}, ("model.colours = 0", "greater than 0")),
        ({"name": "tests.networks:Convolutional", "context": 8}, ("the factory raised TypeError", "classes")),
        ({"name": "tests.networks:normalised_by_batch", **IMAGES}, ("1 is a BatchNorm2d", "use LayerNorm")),
        ({"name": "tests.networks:forgetful", **IMAGES}, ("1 (Dropout) drops activations", "dropout 0")),
        ({"name": "tests.networks:Mixing", **IMAGES}, ("something else than each copy alone", "dimension 0")),
        ({"name": "tests.networks:without_layers", **IMAGES}, ("no linear layer that adapters could serve", "give it")),
        (
            {"name": "tests.networks:with_loss", "vocab": 256, "context": 16},
            ("gave a tuple where logits", "return these"),
        ),
        ({"name": "tests.networks:ends", "vocab": 256, "context": 16}, ("the factory raised SystemExit: no GPU",)),
        ({"name": "tests.networks:Encoder", "vocab": 256, "context": 16, "width": [3]}, ("width = [3]", "numbers")),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused(model: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        run_of(model).model.shape()
    for word in words:
        assert word in str(caught.value)


def test_a_module_that_ends_the_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script_with_arguments.py").write_text("import sys\nsys.exit('needs\\n--lr')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"raised SystemExit: needs --lr; mend it first"):
        run_of({"name": "script_with_arguments:Net"}).model.shape()


def test_tensors_of_a_network_lie_in_memory_of_their_own() -> None:
    options = cast(Any, run_of({"name": "tests.networks:laid_out", "vocab": 256, "context": 16}).model)
    for tensor in call_factory(options).state_dict().values():
        assert tensor.is_contiguous()


def test_wrong_output_sizes_are_named() -> None:
    with pytest.raises(InputError, match=r"gave \(1, 16, 256\) where logits \(1, 16, 100\) are needed"):
        build_run({"model": {"name": "tests.networks:small_talk", "context": 16, "vocab": 100}}).model.shape()


def test_checkpointing_is_for_networks_of_ours() -> None:
    with pytest.raises(InputError, match="activation_checkpointing = true is for networks with blocks of ours"):
        run_of(ENCODER, activation_checkpointing=True)


def test_convolutions_that_are_averaged_leave_a_network_of_them_without_adapters() -> None:
    with pytest.raises(InputError, match=r"convolutions = 'average' leaves tests\.networks:Convolutional without"):
        run_of(CONVOLUTIONAL, {"name": "lte", "rank": 2, "convolutions": "average"})
