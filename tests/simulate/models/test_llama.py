"""Tests of the Llama: published counts, its parts against loops, and training against the slow twins."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from simulate.config.run import Run
from simulate.layers.lora import lora_layers
from simulate.methods.build_network import build_model
from simulate.methods.lte.train import Lte
from simulate.models.families.llama import LlamaModel
from simulate.models.llama import GatedMlp, Llama, RotaryAttention, rotary_angles, rotate_pairs
from tests import tiny
from tests.reference.ddp import DdpTwin
from tests.reference.diloco import DilocoTwin
from tests.reference.lte import LteTwin
from tests.selection import others_slow
from tests.simulate.methods import adapter_parity, parity

TRAIN = {"steps": 11, "micro_batch": 2, "warmup_steps": 3, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": 1.1}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # 7b as counted in the published checkpoint; 60m and 1b: 2·V·d + L·(4·d² + 3·d·m + 2·d) + d.
    [("llama_60m", 58_073_600), ("llama_1b", 1_339_082_752), ("llama_7b", 6_738_415_616)],
)
def test_a_llama_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    options = LlamaModel(name=name)
    with torch.device("meta"):
        model = Llama(options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters == options.shape().parameters


@pytest.mark.parametrize(
    "sizes", [{}, {"layers": 1, "width": 12, "attention_heads": 3, "mlp_width": 7, "context": 5, "vocab": 11}]
)
def test_the_shape_counts_the_tensors_of_the_network(sizes: dict[str, Any]) -> None:
    options = LlamaModel(**sizes)
    shape = options.shape()
    assert [t.shape for t in shape.tensors] == [tuple(p.shape) for p in Llama(options).parameters()]


def test_the_shape_names_what_the_engine_adapts_and_replicates() -> None:
    run = tiny.lte_run(devices=3, model=tiny.LLAMA)
    shape, engine = run.model.shape(), tiny.build(run)
    assert isinstance(engine, Lte)
    assert [t.shape for t in shape.replicated] == [tuple(p[0].shape) for p in engine.replicated_parameters]
    planned = [(linear.name.split("*.")[1], linear.out_features, linear.in_features) for linear in shape.in_order()]
    built = [(layer.name.split(".", 2)[2], *layer.weight.shape) for layer in lora_layers(engine.model)]
    assert planned == built
    assert len(built) == 2 * 7


def test_pairs_turn_like_complex_numbers() -> None:
    """x_p + i·x_{p+P} times e^(i·position/base^(2p/E)) (Su et al. 2021, equation 13)."""
    x_STAE = drawn(2, 5, 3, 8)
    y_STAE = rotate_pairs(x_STAE, *rotary_angles(5, 8, x_STAE))
    for position in range(5):
        for pair in range(4):
            factor = cmath.exp(1j * position / 10_000 ** (2 * pair / 8))
            expected = torch.complex(x_STAE[:, position, :, pair], x_STAE[:, position, :, pair + 4]) * factor
            torch.testing.assert_close(y_STAE[:, position, :, pair], expected.real, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(y_STAE[:, position, :, pair + 4], expected.imag, rtol=1e-12, atol=1e-12)


def test_attention_is_what_the_loops_compute() -> None:
    torch.manual_seed(0)
    attention, x = RotaryAttention(width=8, heads=2).double(), drawn(2, 5, 8)
    angles = rotary_angles(5, 4, x)
    q, k = (rotate_pairs((x @ layer.weight.T).view(2, 5, 2, 4), *angles) for layer in (attention.query, attention.key))
    v = (x @ attention.value.weight.T).view(2, 5, 2, 4)
    mixed = torch.zeros(2, 5, 2, 4, dtype=torch.float64)
    for sample in range(2):
        for head in range(2):
            for now in range(5):
                scores = torch.stack(
                    [q[sample, now, head] @ k[sample, past, head] for past in range(now + 1)]
                ) / math.sqrt(4)
                shares = scores.exp() / scores.exp().sum()
                mixed[sample, now, head] = sum(share * v[sample, past, head] for past, share in enumerate(shares))
    expected = mixed.view(2, 5, 8) @ attention.project.weight.T
    torch.testing.assert_close(attention(x, *angles), expected, rtol=1e-12, atol=1e-12)


def test_scores_depend_on_distance_alone() -> None:
    """Scores depend on the distance of two tokens only: shifting both changes nothing."""
    q_TAE, k_TAE = drawn(1, 1, 1, 8).expand(1, 6, 1, 8), drawn(1, 1, 2, 8)[:, :, :1].expand(1, 6, 1, 8)
    q, k = (rotate_pairs(x, *rotary_angles(6, 8, x))[0, :, 0] for x in (q_TAE, k_TAE))
    torch.testing.assert_close(q[4] @ k[1], q[5] @ k[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(q[4] @ k[1], q[4] @ k[2])


def test_the_gated_network_is_its_formula() -> None:
    torch.manual_seed(0)
    mlp, x = GatedMlp(3, 5).double(), drawn(2, 4, 3)
    gate, up = x @ mlp.gate.weight.T, x @ mlp.up.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down.weight.T, rtol=1e-12, atol=1e-12)


def test_no_token_sees_a_later_one() -> None:
    run = tiny.lte_run(model=tiny.LLAMA)
    model = build_model(run)
    inputs, _ = tiny.batches(run).batch(0, range(1))
    changed = inputs.clone()
    changed[:, 5] = 65
    torch.testing.assert_close(model(inputs)[:, :5], model(changed)[:, :5], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(inputs)[:, 5:], model(changed)[:, 5:])


def test_activation_checkpointing_changes_no_number() -> None:
    run = tiny.lte_run(model=tiny.LLAMA, train={"steps": 6})
    frugal = tiny.lte_run(model=tiny.LLAMA, train={"steps": 6, "activation_checkpointing": True})
    tiny.assert_parity(tiny.train(tiny.build(frugal)), tiny.train(tiny.build(run)), tolerance=0)


def llama_run(name: str, **method: Any) -> Run:
    return tiny.variant_run(name, devices=3, model={**tiny.LLAMA, "layers": 1}, train=TRAIN).model_copy(update=method)


@pytest.mark.parametrize(
    "name", others_slow(["lte", "lte, streaming", "lte, pruned", "lte, forgetful"], ["lte", "lte, streaming"])
)
def test_lte_trains_a_llama_like_the_twin(name: str) -> None:
    layers = 2 if "streaming" in name else 1
    run = tiny.variant_run(name, devices=3, model={**tiny.LLAMA, "layers": layers}, train=TRAIN)
    adapter_parity.assert_trains_like(LteTwin, run)


def test_ddp_trains_a_llama_like_the_twin() -> None:
    parity.assert_trains_like(DdpTwin, llama_run("ddp"))


def test_diloco_trains_a_llama_like_the_twin() -> None:
    parity.assert_trains_like(DilocoTwin, llama_run("diloco"))


def test_parity_notices_pairs_that_turn_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    run = llama_run("ddp")
    _, slow = parity.twin_of(DdpTwin, run)
    monkeypatch.setattr("simulate.models.llama.rotate_pairs", lambda x, cos, sin: rotate_pairs(x, cos, 1.01 * sin))
    with pytest.raises(AssertionError):
        tiny.assert_parity(tiny.train(tiny.build(run)), slow)


def test_muon_leaves_the_head_to_adamw() -> None:
    method = tiny.build(tiny.variant_run("ddp, muon", model=tiny.LLAMA))
    assert method.stepper.muon is not None
    stepped = {id(parameter) for group in method.stepper.muon.param_groups for parameter in group["params"]}
    names = {name for name, parameter in method.parameters.items() if id(parameter) in stepped}
    assert len(names) == 2 * 7 and not {"head.weight", "token.weight"} & names
