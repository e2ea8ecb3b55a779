"""CUDA's caching allocator in closed form: by hand, and beside its replay over the followed program."""

from __future__ import annotations

from typing import Any

import pytest

from simulate.config.profiles import load_profile
from simulate.config.run import build_run
from simulate.costs.allocator import WORKSPACE_BYTES, packed_bytes, segment_bytes, unfilled_share
from simulate.costs.memory import peak_memory
from simulate.measure.caching_allocator import reserved_bytes
from simulate.measure.fake_tensors import tracked_memory

MIB = 2**20
NETWORKS: dict[str, dict[str, Any]] = {
    "gpt": {"name": "gpt2", "layers": 4},
    "vit": {"name": "vit_b16", "layers": 4},
    "mixer": {"name": "mixer_b16", "layers": 4},
    "llama": {"name": "llama_1b", "layers": 2},
}
METHODS: dict[str, dict[str, Any]] = {
    "lte": {"name": "lte", "rank": 64},
    "reset-less": {"name": "lte", "rank": 32, "reset": "none"},
    "nf4": {"name": "lte", "rank": 64, "quantize": "nf4"},
    "ddp": {"name": "ddp"},
    "diloco": {"name": "diloco"},
}
FEW = {("gpt", "lte", 4, "none"), ("vit", "ddp", 8, "none"), ("mixer", "lte", 8, "fp16")}


def test_segments_of_tensors_that_stay_by_hand() -> None:
    assert [segment_bytes(size) for size in (1, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 21 * MIB)] == [
        2 * MIB, 2 * MIB, 20 * MIB, 20 * MIB, 10 * MIB, 22 * MIB,
    ]  # fmt: skip
    # Nine MiB go twice into a segment of 20; three of half a MiB share one of 2.
    assert packed_bytes({9 * MIB: 5}) == 60 * MIB
    assert packed_bytes({MIB // 2: 3, 9 * MIB: 1}) == 22 * MIB
    assert unfilled_share({9 * MIB: 2}) == pytest.approx(2 / 18)


@pytest.mark.parametrize("counts", [{9 * MIB: 5}, {MIB // 2: 7}, {MIB + 1: 30}, {33 * MIB: 2, 300: 5000}])
def test_tensors_that_stay_take_what_the_replay_takes(counts: dict[int, int]) -> None:
    sizes = [size for size, count in counts.items() for _ in range(count)]
    assert packed_bytes(counts) == reserved_bytes(enumerate(sizes))


def cases() -> list[Any]:
    every = [
        (network, method, batch, autocast)
        for network in NETWORKS for method in METHODS for batch in (1, 4, 8, 16) for autocast in ("none", "fp16")
    ]  # fmt: skip
    return [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("network", "method", "batch", "autocast"), cases())
def test_the_closed_form_is_near_the_replay(network: str, method: str, batch: int, autocast: str) -> None:
    """The default headroom covers where it is too low; too high, it costs a plan a batch, and no run."""
    run = build_run(
        {
            "model": NETWORKS[network],
            "method": METHODS[method],
            "train": {"steps": 40, "micro_batch": batch, "autocast": autocast},
            "cluster": {"devices": 8},
        }
    )
    device = load_profile("gtx1080ti_x8").device[0]
    memory = peak_memory(run, run.model.shape(), device)
    held = tracked_memory(run, with_host=False).allocator_bytes + WORKSPACE_BYTES
    share = 1 - device.usable_bytes / device.memory_bytes
    most = 1.3 if autocast == "none" else 1.6  # autocast tears between none and all of the logits' room
    assert (1 - share) * held <= memory.tensors + memory.allocator <= most * held
