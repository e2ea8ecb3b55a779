"""Tests of quantized weights: rounding errors, merges into them, and methods on them against slow twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.config.run import Run, build_run
from simulate.layers.formats import PACK_CHUNK_ELEMENTS, Quantize, quantized_bytes, unpacking_bytes
from simulate.layers.lora import AdapterSpec, LoraConv2d, LoraLinear, lora_layers
from simulate.layers.quantized import QuantizedWeight, mapped_copy, nf4_levels, nf4_library
from simulate.methods.base import Method
from simulate.methods.build_network import build_model
from simulate.methods.registry import build_method
from simulate.models.peak_memory import cpu_peak_bytes
from tests import tiny
from tests.reference.lora import LoraTwin
from tests.reference.mhlora import MhloraTwin
from tests.reference.quantised import LEVELS, QuantisedReloraTwin, QuantisedTwin, rounded, rounded_start
from tests.simulate.methods.adapter_parity import engine_draw, parity_run

pytestmark = pytest.mark.numeric

SMALL_BYTES = 1200
"""The whole last group of scales, and what pads the last block."""
FORMATS: tuple[Quantize, ...] = ("bf16", "int8", "nf4", "nf4-double")
SHAPES = [(8, 64), (48, 40), (7, 5), (300, 96), (130, 257)]
EACH_FORMAT = pytest.mark.parametrize("quantize", FORMATS)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@EACH_FORMAT
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_weight_takes_the_planned_bytes(quantize: Quantize, shape: tuple[int, int]) -> None:
    packed = QuantizedWeight(normal(*shape), quantize)
    kept = sum(tensor.nbytes for tensor in packed.tensors())
    assert kept == quantized_bytes(shape[0] * shape[1], shape[1], quantize, element_bytes=4)


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (96, 48), (5, 16), (2, 80), (1, 48), (1, 2), (1, 1)])
def test_unpacked_weights_are_those_rounded_one_by_one(
    quantize: Quantize, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = normal(*shape, dtype=dtype)
    unpacked = QuantizedWeight(weight, quantize).dense()
    assert unpacked.dtype == dtype
    torch.testing.assert_close(unpacked, rounded(weight, quantize), rtol=0, atol=0)


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(512, 512), (300, 97), (301, 80)])
def test_unpacking_takes_the_planned_bytes(quantize: Quantize, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = QuantizedWeight(normal(*shape, dtype=dtype), quantize)
    planned = unpacking_bytes(shape[0] * shape[1], quantize, dtype.itemsize)
    assert cpu_peak_bytes(weight.dense) == pytest.approx(planned, abs=8 * shape[0] + SMALL_BYTES)


def test_nf4_is_packed_as_its_library_packs_it() -> None:
    weight = normal(384, 256)
    assert weight.numel() > PACK_CHUNK_ELEMENTS
    values, state = nf4_library().quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed = QuantizedWeight(weight, "nf4")
    assert torch.equal(packed.values, values.view(-1))
    assert torch.equal(packed.scales, state.absmax)
    torch.testing.assert_close(nf4_levels(), torch.tensor(LEVELS))


@EACH_FORMAT
def test_zeros_stay_zeros_and_the_weight_itself_is_not_touched(quantize: Quantize) -> None:
    assert not QuantizedWeight(torch.zeros(3, 70), quantize).dense().any()
    weight = normal(9, 30)
    before = weight.clone()
    QuantizedWeight(weight, quantize)
    assert torch.equal(weight, before)


def test_a_mapped_copy_is_a_copy() -> None:
    weight = normal(4, 6)
    copy = mapped_copy(weight)
    assert torch.equal(copy, weight)
    copy.add_(1)
    assert torch.equal(copy - 1, weight + 1 - 1)
    assert not torch.equal(copy, weight)


@pytest.mark.parametrize(
    ("quantize", "method"),
    [
        ("int8", {"reset": "b"}),
        ("nf4", {"reset": "ab", "heads_per_device": 2}),
        ("nf4-double", {"reset": "none", "merge_transport": "reduce"}),
        ("nf4", {"reset": "none", "merge_transport": "server", "master": "server"}),
        ("bf16", {"reset": "b", "master": "none"}),
    ],
)
def test_quantised_lte_trains_like_the_twin(quantize: str, method: dict[str, Any]) -> None:
    run = parity_run("lte", 2, {"steps": 10}, quantize=quantize, merge_every=4, **method)
    twin, data = QuantisedTwin(run, build_model(run), engine_draw(run)), tiny.batches(run)
    losses = torch.stack([twin.step(*data.batch(step, range(2)), step) for step in range(run.train.steps)])
    fast = tiny.train(tiny.build(run))
    tiny.assert_parity(fast, tiny.History(losses, twin.merged_state()))


@pytest.mark.parametrize(("name", "quantize"), [("lora", "nf4"), ("lora", "bf16"), ("mhlora", "nf4-double")])
def test_adapters_of_all_on_quantised_weights_train_like_the_twin(name: str, quantize: str) -> None:
    """Nothing is merged, so training keeps the rounded start."""
    run = parity_run(name, 2, {"steps": 8}, quantize=quantize)
    twin_class = MhloraTwin if name == "mhlora" else LoraTwin
    twin = twin_class(run, rounded_start(build_model(run), quantize), engine_draw(run))
    assert_trains_like_twin(twin, run)


def test_relora_on_quantised_weights_restarts_like_the_twin() -> None:
    run = parity_run("relora", 2, {"steps": 16}, quantize="int8")
    assert_trains_like_twin(QuantisedReloraTwin(run, build_model(run), engine_draw(run)), run)


def assert_trains_like_twin(twin: LoraTwin, run: Run) -> None:
    data = tiny.batches(run)
    losses = torch.stack([twin.step(*data.batch(step, range(2)), step) for step in range(run.train.steps)])
    tiny.assert_parity(tiny.train(tiny.build(run)), tiny.History(losses, twin.merged_state()))


def test_dense_steps_before_relora_leave_their_weights_in_the_master() -> None:
    plain, packed = (tiny.build(parity_run("relora, warm start", 2, quantize=q)) for q in ("none", "nf4"))
    for method in (plain, packed):
        assert not lora_layers(method.model)
        tiny.train(method, 0, 5)
    assert lora_layers(plain.model)
    for dense, layer in zip(lora_layers(plain.model), lora_layers(packed.model), strict=True):
        assert layer.frozen is not None and layer.master is not None
        assert torch.equal(layer.master, dense.weight)
        assert torch.equal(layer.frozen.dense(), QuantizedWeight(dense.weight, "nf4").dense())


def on_layer(weight: Tensor, **method: Any) -> tuple[Method, LoraLinear]:
    """Return LTE over one linear layer of given weights, on one device, and that layer."""
    table = {
        "model": tiny.SIZES,
        "method": {"name": "lte", "rank": 1, "alpha": 1.0, "merge_every": 1, **method},
        "train": {"steps": 10_000, "dtype": "fp32"},
        "cluster": {"devices": 1},
    }
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    run = build_run(table)
    built = build_method(run, VirtualCommunicator(1), tiny.CPU, nn.Sequential(linear))
    return built, lora_layers(built.model)[0]


TINY, MERGES = 1e-4, 1000


def after_tiny_merges(**method: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the devices' W, the evaluated W and the exact one, after many tiny changes."""
    start = normal(4, 64) * 0.1
    built, layer = on_layer(start, reset="b", **method)
    with torch.no_grad():
        for step in range(MERGES):
            layer.a.fill_(1.0)
            layer.b.fill_(TINY)
            built.merge(step)
    return layer.merged_weight(), built.merged_state()["0.weight"], start + MERGES * TINY


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("kept", [{"master": "host"}, {"master": "server", "merge_transport": "server"}])
def test_a_thousand_tiny_changes_arrive_with_a_master(quantize: Quantize, kept: dict[str, str]) -> None:
    exact_at_merges, _, exact = after_tiny_merges(quantize=quantize, **kept)
    torch.testing.assert_close(exact_at_merges, exact, rtol=0, atol=5e-5)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_devices_have_the_rounded_master(quantize: Quantize) -> None:
    _, shown, exact = after_tiny_merges(quantize=quantize, master="server", merge_transport="server")
    torch.testing.assert_close(shown, rounded(exact, quantize), rtol=1e-3, atol=1e-4)


def test_a_thousand_tiny_changes_are_lost_in_nf4_without_a_master() -> None:
    without, shown, exact = after_tiny_merges(quantize="nf4", master="none")
    assert torch.equal(without, shown)
    assert (without - exact).abs().mean() > 0.5 * MERGES * TINY


@EACH_FORMAT
def test_a_convolution_computes_with_its_unpacked_weights(quantize: Quantize) -> None:
    conv = nn.Conv2d(3, 5, 2, bias=False, dtype=torch.float64)
    spec = AdapterSpec(2, 1.0, 1, reset_less=False, first_device=0, seed=0, quantize=quantize)
    layer = LoraConv2d(conv, None, "conv", spec, 1)
    x = normal(2, 3, 4, 4, dtype=torch.float64)
    expected = torch.conv2d(x, rounded(conv.weight.detach().flatten(1), quantize).view_as(conv.weight))
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-8)


def test_no_unpacked_weight_outlives_its_product() -> None:
    _, layer = on_layer(normal(4, 64), quantize="nf4")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(normal(1, 64))
    assert layer.size not in [tuple(shape) for shape in saved]
    assert "weight" not in dict(layer.named_buffers())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"master": "server", "quantize": "int8"}, ("master = 'server'", "merge_transport is 'gather'")),
        ({"master": "none"}, ("master = 'none'", "quantize is 'none'")),
        ({"quantize": "nf4", "merge_delay": 2}, ("merge_delay = 2", "quantize = 'nf4'")),
        ({"name": "adamix", "quantize": "nf4"}, ("method.quantize",)),
        ({"name": "relora", "master": "none"}, ("method.master",)),
    ],
)
def test_what_does_not_go_together_is_refused(method: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refused:
        build_run({"model": tiny.SIZES, "method": {"name": "lte", "rank": 2, **method}})
    assert all(word in str(refused.value) for word in words)


def quantised(run: Run) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tiny.build(run).state.state_dict().items() if ".frozen." in name}


def test_the_same_start_packs_to_the_same_bits() -> None:
    run = tiny.variant_run("lte, nf4")
    first, again = quantised(run), quantised(run)
    assert first
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_the_master_packs_to_what_the_checkpoint_has() -> None:
    method = tiny.build(tiny.variant_run("lte, nf4", train={"steps": 8}))
    tiny.train(method)
    for layer in lora_layers(method.model):
        assert layer.frozen is not None
        assert layer.master is not None
        again = QuantizedWeight(layer.master, "nf4")
        assert all(torch.equal(x, y) for x, y in zip(again.tensors(), layer.frozen.tensors(), strict=True))
