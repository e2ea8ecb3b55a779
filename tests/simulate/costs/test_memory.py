"""Planned memory against the allocator's peak of one device's program, on shapes that no constant was fitted to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from simulate.config.hardware import Device
from simulate.config.profiles import load_profile
from simulate.config.run import Run, build_run
from simulate.costs.memory import host_memory_by_part, memory_by_phase, peak_memory
from simulate.measure.fake_tensors import tracked_memory
from simulate.measure.one_device import measure_memory_bytes
from tests import tiny
from tests.selection import others_slow, selected

TOLERANCE = 0.03
ONE_MEMORY = load_profile("raspberry_x8").device[0]
TWO_MEMORIES = load_profile("gtx1080ti_x8").device[0]
SMALL = {"layers": 3, "width": 48, "attention_heads": 3, "context": 40, "vocab": 256}
WIDE = {"layers": 2, "width": 96, "attention_heads": 4, "context": 24, "vocab": 300}
DEEP = {"layers": 6, "width": 32, "attention_heads": 2, "context": 64, "vocab": 257}
WORDY = {"layers": 1, "width": 64, "attention_heads": 4, "context": 32, "vocab": 3000}


def train(micro_batch: int, checkpointing: bool = False) -> dict[str, Any]:
    return {"micro_batch": micro_batch, "activation_checkpointing": checkpointing, "dtype": "fp32"}


HELD_OUT: dict[str, Run] = {
    "lte gather": tiny.lte_run(3, SMALL, train(4), rank=6),
    "lte gather, eight devices": tiny.lte_run(8, WIDE, train(1), rank=48),
    "lte reduce, reset b": tiny.lte_run(2, WIDE, train(3), rank=10, merge_transport="reduce", reset="b"),
    "lte server, two heads": tiny.lte_run(2, DEEP, train(4), rank=4, merge_transport="server", heads_per_device=2),
    "lte checkpointing, reset ab": tiny.lte_run(2, DEEP, train(5, True), rank=8, reset="ab"),
    "lte checkpointing, two heads": tiny.lte_run(4, SMALL, train(6, True), rank=12, heads_per_device=2),
    "lte large vocabulary": tiny.lte_run(2, WORDY, train(2), rank=16),
    "ddp": tiny.ddp_run(3, SMALL, train(5)),
    "ddp checkpointing": tiny.ddp_run(2, DEEP, train(6, True)),
    "ddp large vocabulary": tiny.ddp_run(2, WORDY, train(1)),
}


def planned_bytes(run: Run, device: Device = ONE_MEMORY) -> int:
    memory = peak_memory(run, run.model.shape(), device)
    return memory.tensors


@pytest.mark.parametrize(
    "name", others_slow(HELD_OUT, ["lte server, two heads", "lte checkpointing, reset ab", "ddp large vocabulary"])
)
def test_planned_memory_is_what_the_allocator_gives(name: str) -> None:
    run = HELD_OUT[name]
    assert planned_bytes(run) == pytest.approx(measure_memory_bytes(run, torch.device("cpu")), rel=TOLERANCE)


SIZES = ("long samples", "short samples")
ONE_SIZE_EACH = [(SIZES[index % 2], name) for index, name in enumerate(selected("memory"))]


@pytest.mark.parametrize(("size", "name"), others_slow(itertools.product(SIZES, tiny.VARIANTS), ONE_SIZE_EACH))
def test_every_methods_memory_is_planned(name: str, size: str) -> None:
    """With long samples activations peak, with short ones what travels."""
    context, micro_batch = (64, 4) if size == "long samples" else (8, 2)
    run = tiny.variant_run(name, 4, {**WIDE, "context": context}, {**train(micro_batch), "steps": 12})
    assert planned_bytes(run) == pytest.approx(measure_memory_bytes(run, torch.device("cpu")), rel=TOLERANCE)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(tiny.ddp_run(1, WIDE, train(2)), id="ddp", marks=pytest.mark.slow),
        pytest.param(tiny.lte_run(1, WIDE, train(1), merge_transport="reduce"), id="lte"),
    ],
)
def test_a_device_alone_needs_no_room_for_messages(run: Run) -> None:
    assert planned_bytes(run) == pytest.approx(measure_memory_bytes(run, torch.device("cpu")), rel=TOLERANCE)


def test_a_plan_that_is_wrong_by_a_tenth_is_noticed() -> None:
    run = HELD_OUT["ddp"]
    measured = measure_memory_bytes(run, torch.device("cpu"))
    assert 1.1 * planned_bytes(run) != pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("name", HELD_OUT)
def test_parts_sum_to_the_total(name: str) -> None:
    memory = peak_memory(HELD_OUT[name], HELD_OUT[name].model.shape(), ONE_MEMORY)
    assert memory.total == sum(memory.parts().values())
    assert all(size >= 0 for size in memory.parts().values())
    assert memory.reserved == ONE_MEMORY.reserved_bytes


def test_start_weights_are_kept_by_the_host_where_it_has_memory() -> None:
    run = HELD_OUT["lte gather"]
    shape = run.model.shape()
    start = shape.adapted_parameters * 4
    assert host_memory_by_part(run, shape, TWO_MEMORIES)["start_weights"] == start
    assert host_memory_by_part(run, shape, ONE_MEMORY)["start_weights"] == 0
    assert planned_bytes(run, ONE_MEMORY) - planned_bytes(run, TWO_MEMORIES) == start
    for name in ("lte reduce, reset b", "ddp"):
        assert host_memory_by_part(HELD_OUT[name], HELD_OUT[name].model.shape(), TWO_MEMORIES)["start_weights"] == 0


def test_memory_grows_with_batch_and_context_and_shrinks_with_checkpointing() -> None:
    sizes = [planned_bytes(tiny.lte_run(2, DEEP, train(batch), rank=4)) for batch in (1, 2, 4, 8)]
    assert all(small < large for small, large in itertools.pairwise(sizes))
    assert planned_bytes(tiny.lte_run(2, DEEP, train(8, True), rank=4)) < sizes[-1]
    assert planned_bytes(tiny.lte_run(2, {**DEEP, "context": 128}, train(1), rank=4)) > sizes[0]


MADE = ("lora", "relora", "mhlora", "adamix", "lte", "lte, nf4", "lte, int8, served", "lte, nf4-double, reduced")
"""Every way in which an evaluation comes to weights."""


def check_evaluation(run: Run) -> None:
    """Hold the planned height of an evaluation against the one that is followed, whether or not it is the peak."""
    planned = memory_by_phase(run, run.model.shape(), ONE_MEMORY)["evaluation"]
    tracked = tracked_memory(run, with_host=True).by_phase["evaluation"]
    assert -0.01 <= planned.tensors / tracked - 1 <= TOLERANCE


@pytest.mark.parametrize(
    ("samples", "name"),
    others_slow(itertools.product([1, 8], MADE), [(8, "mhlora"), (1, "lte, nf4-double, reduced")]),
)
def test_evaluations_are_planned(name: str, samples: int) -> None:
    """With one sample a layer's weight counts, with eight the activations."""
    check_evaluation(tiny.variant_run(name, 2, WIDE, train(samples)))


@pytest.mark.parametrize(
    ("family", "name"),
    others_slow(
        itertools.product(["llama", "vit", "mixer"], ["lora", "lte, int8, served"]),
        [("llama", "lte, int8, served"), ("mixer", "lora")],
    ),
)
def test_evaluations_of_every_family_are_planned(name: str, family: str) -> None:
    model = {"llama": SMALL_LLAMA, "vit": SMALL_VIT, "mixer": SMALL_MIXER}[family]
    check_evaluation(family_run(model, train(2), **{"rank": 6, **tiny.VARIANTS[name]}))


def test_an_evaluation_is_not_in_a_lower_format() -> None:
    check_evaluation(cast(tiny.variant_run("lte, nf4", 2, WIDE, train(8))))


SMALL_LLAMA = {**SMALL, **tiny.LLAMA, "mlp_width": 100}
DEEP_LLAMA = {**DEEP, **tiny.LLAMA, "mlp_width": 72}
WORDY_LLAMA = {**WORDY, **tiny.LLAMA, "mlp_width": 160}
SMALL_VIT = {"name": "vit", "layers": 3, "width": 48, "attention_heads": 3, "image": 24, "classes": 20}
DEEP_VIT = {"name": "vit", "layers": 6, "width": 32, "attention_heads": 2, "image": 32, "classes": 300}
SMALL_MIXER = {
    "name": "mixer_s16", "layers": 3, "width": 48, "tokens_width": 20, "channels_width": 100, "image": 24, "patch": 4,
}  # fmt: skip
DEEP_MIXER = {**SMALL_MIXER, "layers": 6, "tokens_width": 60, "channels_width": 70, "classes": 10}


def family_run(model: dict[str, Any], train: dict[str, Any], devices: int = 3, **method: Any) -> Run:
    table = {
        "model": model,
        "method": method,
        "train": {"steps": 20, **train},
        "cluster": {"devices": devices},
    }
    return build_run(table)


LTE = {"name": "lte", "rank": 6}
OTHER_FAMILIES: dict[str, Run] = {
    "llama, lte": family_run(SMALL_LLAMA, train(4), **LTE),
    "llama, lte checkpointing": family_run(DEEP_LLAMA, train(5, True), **LTE, reset="b"),
    "llama, lte server": family_run(WORDY_LLAMA, train(1), **LTE, merge_transport="server", reset="b"),
    "llama, ddp": family_run(SMALL_LLAMA, train(5), name="ddp"),
    "llama, ddp large vocabulary": family_run(WORDY_LLAMA, train(2), name="ddp"),
    "llama, diloco checkpointing": family_run(DEEP_LLAMA, train(6, True), name="diloco"),
    "vit, lte": family_run(SMALL_VIT, train(4), **LTE),
    "vit, lte checkpointing": family_run(DEEP_VIT, train(6, True), **LTE, heads_per_device=2),
    "vit, ddp": family_run(SMALL_VIT, train(5), name="ddp"),
    "vit, ddp checkpointing": family_run(DEEP_VIT, train(8, True), name="ddp"),
    "mixer, lte": family_run(SMALL_MIXER, train(8), **LTE),
    "mixer, lte checkpointing": family_run(DEEP_MIXER, train(6, True), **LTE, reset="ab"),
    "mixer, ddp": family_run(SMALL_MIXER, train(4), name="ddp"),
    "mixer, ddp deep": family_run(DEEP_MIXER, train(8), name="ddp"),
}


@pytest.mark.parametrize(
    "name", others_slow(OTHER_FAMILIES, ["llama, lte server", "vit, ddp checkpointing", "mixer, lte checkpointing"])
)
def test_memory_of_every_family_is_what_the_allocator_gives(name: str) -> None:
    run = OTHER_FAMILIES[name]
    assert planned_bytes(run) == pytest.approx(measure_memory_bytes(run, torch.device("cpu")), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("quantize", "family"),
    others_slow(
        itertools.product(["none", "nf4"], ["gpt", "llama", "vit", "mixer"]), [("nf4", "gpt"), ("none", "vit")]
    ),
)
def test_forward_passes_that_keep_little_are_planned(family: str, quantize: str) -> None:
    """Though the recomputing backward pass is the peak."""
    model = {"gpt": {"name": "gpt", **SMALL}, "llama": SMALL_LLAMA, "vit": SMALL_VIT, "mixer": SMALL_MIXER}[family]
    run = family_run(model, train(6, True), **LTE, quantize=quantize)
    planned = memory_by_phase(run, run.model.shape(), ONE_MEMORY)["forward"]
    tracked = tracked_memory(run, with_host=True).by_phase["forward"]
    assert planned.tensors / tracked - 1 == pytest.approx(0, abs=TOLERANCE)


AUTOCAST = {**HELD_OUT, **OTHER_FAMILIES}
QUICK = ("ddp large vocabulary", "llama, lte")
"""The others are slow where a CPU emulates bf16."""


def cast(run: Run) -> Run:
    return run.model_copy(update={"train": run.train.model_copy(update={"autocast": "bf16"})})


@pytest.mark.parametrize("name", others_slow(AUTOCAST, QUICK))
def test_memory_under_autocast_is_what_the_allocator_gives(name: str) -> None:
    run = cast(AUTOCAST[name])
    assert planned_bytes(run) == pytest.approx(measure_memory_bytes(run, torch.device("cpu")), rel=TOLERANCE)


def test_autocast_halves_what_products_keep() -> None:
    """Of 16 tensors a block keeps 14 in half; sums that norms read stay whole."""
    run = tiny.lte_run(2, {**SMALL, "layers": 8}, train(16), rank=6)
    full, half = (peak_memory(r, r.model.shape(), ONE_MEMORY).activations for r in (run, cast(run)))
    assert half / full == pytest.approx((2 + 14 / 2) / 16, rel=0.02)


FEW_TOKENS: dict[str, dict[str, Any]] = {
    "gpt": {"layers": 2, "attention_heads": 2, "context": 64, "vocab": 16},
    "llama": {"layers": 3, "attention_heads": 4, "mlp_width": 192, "context": 64, "vocab": 64},
    "vit": {"layers": 2, "attention_heads": 4, "image": 32, "patch": 4},
    "mixer_s16": {
        "layers": 3, "tokens_width": 64, "channels_width": 512, "image": 32, "patch": 4, "classes": 10,
    },
}  # fmt: skip
"""Few enough for an unpacked layer to count beside activations."""


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    others_slow(itertools.product(FEW_TOKENS, [False, True]), [("gpt", True), ("vit", False)]),
)
def test_the_last_layers_pass_can_be_the_peak_where_no_inputs_are_kept(family: str, checkpointing: bool) -> None:
    model = {"name": family, "width": 128, **FEW_TOKENS[family]}
    run = family_run(model, train(2, checkpointing), name="lte", rank=8, quantize="nf4")
    tracked = tracked_memory(run, with_host=False).tracked_bytes
    assert -0.005 <= planned_bytes(run, TWO_MEMORIES) / tracked - 1 <= TOLERANCE


IN_PARTS: dict[str, Run] = {**HELD_OUT, **OTHER_FAMILIES}


def in_parts(run: Run, parts: int = 3) -> Run:
    return run.model_copy(update={"train": run.train.model_copy(update={"accumulate": parts})})


@pytest.mark.parametrize("name", others_slow(IN_PARTS, ["ddp large vocabulary", "mixer, lte checkpointing"]))
def test_memory_of_accumulated_steps_is_what_the_allocator_gives(name: str) -> None:
    run = in_parts(IN_PARTS[name])
    assert planned_bytes(run) == pytest.approx(measure_memory_bytes(run, torch.device("cpu")), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_every_methods_memory_is_planned_in_parts(name: str) -> None:
    run = in_parts(tiny.variant_run(name, 4, {**WIDE, "context": 24}, {**train(2), "steps": 12}), 2)
    assert planned_bytes(run) == pytest.approx(measure_memory_bytes(run, torch.device("cpu")), rel=TOLERANCE)


def test_a_plan_without_the_gradients_of_earlier_passes_would_be_noticed() -> None:
    """They are a tenth of the peak, and the plan has them."""
    run = HELD_OUT["ddp"]
    assert planned_bytes(in_parts(run)) > 1.05 * planned_bytes(run)
    assert planned_bytes(in_parts(run)) == planned_bytes(in_parts(run, 7))
