"""Operations of a network with 1 block, width 4, 2 heads, context 3 and vocabulary 5, worked out by hand."""

from __future__ import annotations

import pytest

from simulate.config.run import Run, build_run
from simulate.costs.flops import merge_flops, pass_flops, update_flops
from tests import tiny

SIZES = {"layers": 1, "width": 4, "attention_heads": 2, "context": 3, "vocab": 5}
WEIGHTS = 12 * 4 * 4
"""P: qkv 12 x 4, projection 4 x 4, up 16 x 4, down 4 x 16."""
FACTORS = 2 * (16 + 8 + 20 + 20)
"""F of one head at rank 2: each layer's outputs plus inputs, twice."""
ATTENTION, HEAD = 2 * 3 * 4, 2 * 5 * 4
"""Forward, a token: causal attention, and the output layer."""


def flops(run: Run) -> float:
    return pass_flops(run, run.model.shape()) + update_flops(run, run.model.shape())


def train(checkpointing: bool) -> dict[str, object]:
    return {"micro_batch": 2, "activation_checkpointing": checkpointing}


@pytest.mark.parametrize(
    ("checkpointing", "a_token"),
    [(False, 3 * (2 * WEIGHTS + ATTENTION + HEAD)), (True, 3 * HEAD + 4 * (2 * WEIGHTS + ATTENTION))],
)
def test_dense_training_costs_three_forwards(checkpointing: bool, a_token: int) -> None:
    assert flops(tiny.ddp_run(model=SIZES, train=train(checkpointing))) == 2 * 3 * a_token


@pytest.mark.parametrize(
    ("reset", "checkpointing", "a_token"),
    [
        ("b", False, 4 * WEIGHTS + 6 * FACTORS + 3 * (ATTENTION + HEAD)),
        ("none", False, 4 * WEIGHTS + 10 * FACTORS + 3 * (ATTENTION + HEAD)),
        ("b", True, 6 * WEIGHTS + 8 * FACTORS + 4 * ATTENTION + 3 * HEAD),
        ("none", True, 6 * WEIGHTS + 14 * FACTORS + 4 * ATTENTION + 3 * HEAD),
    ],
)
def test_frozen_weights_save_a_third_and_factors_cost_extra(reset: str, checkpointing: bool, a_token: int) -> None:
    assert flops(tiny.lte_run(model=SIZES, train=train(checkpointing), reset=reset)) == 2 * 3 * a_token


def test_a_token_passes_through_one_head() -> None:
    one, two = (tiny.lte_run(model=SIZES, heads_per_device=heads) for heads in (1, 2))
    assert flops(one) == flops(two)


@pytest.mark.parametrize(("transport", "heads"), [("gather", 6), ("reduce", 2), ("server", 0)])
def test_a_merge_multiplies_the_heads_it_has(transport: str, heads: int) -> None:
    run = tiny.lte_run(devices=3, model=SIZES, heads_per_device=2, merge_transport=transport)
    assert merge_flops(run, run.model.shape()) == 2 * WEIGHTS * heads * 2


def test_dense_training_never_merges() -> None:
    run = tiny.ddp_run(model=SIZES)
    assert merge_flops(run, run.model.shape()) == 0


def image_flops(model: dict[str, object], method: dict[str, object]) -> float:
    table = {"model": model, "method": method, "train": {"micro_batch": 2}, "cluster": {"devices": 2}}
    return flops(build_run(table))


def test_a_vits_ends_are_dense_and_its_attention_sees_everything() -> None:
    """4 patches of 3 x 2 x 2 numbers and a class token at width 4: 5 tokens through 12 x 4 x 4 weights."""
    model: dict[str, object] = {
        "name": "vit", "layers": 1, "width": 4, "attention_heads": 2, "image": 4, "patch": 2, "classes": 7,
    }  # fmt: skip
    attention = 2 * 2 * 5 * 5 * 4
    ends = 2 * 2 * 4 * 12 * 4 + 3 * 2 * 7 * 4  # patches need no gradient of their inputs
    assert image_flops(model, {"name": "ddp"}) == 2 * (3 * (2 * 5 * WEIGHTS + attention) + ends)
    factors = 5 * FACTORS
    expected = 2 * (4 * 5 * WEIGHTS + 6 * factors + 3 * attention + ends)
    assert image_flops(model, {"name": "lte", "rank": 2, "reset": "b", "frozen_a": False}) == expected


def test_a_mixers_layers_over_tokens_work_on_channels() -> None:
    """4 patches, width 6: 6 rows through 2 x 4 x 5 weights, 4 rows through 2 x 6 x 8."""
    model: dict[str, object] = {
        "name": "mixer_s16", "layers": 1, "width": 6, "tokens_width": 5, "channels_width": 8, "image": 4, "patch": 2,
        "classes": 7,
    }  # fmt: skip
    blocks = 2 * (6 * 2 * 4 * 5 + 4 * 2 * 6 * 8)
    ends = 2 * 2 * 4 * 12 * 6 + 3 * 2 * 7 * 6
    assert image_flops(model, {"name": "ddp"}) == 2 * (3 * blocks + ends)
    factors = 2 * 2 * (6 * 2 * (4 + 5) + 4 * 2 * (6 + 8))
    assert image_flops(model, {"name": "lte", "rank": 2, "reset": "b", "frozen_a": False}) == 2 * (
        2 * blocks + 3 * factors + ends
    )


def test_a_llamas_head_is_dense() -> None:
    """4 x 4 x 4 weights of attention and 3 x 4 x 6 of the gated network, 3 tokens."""
    run = tiny.ddp_run(model={**SIZES, **tiny.LLAMA, "mlp_width": 6}, train=train(False))
    weights = 4 * 4 * 4 + 3 * 4 * 6
    assert flops(run) == 2 * 3 * 3 * (2 * weights + ATTENTION + HEAD)
