"""Tracked memory against the allocator's, plans against both, and the caching allocator by hand."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from simulate.costs.memory import memory_by_phase, peak_memory
from simulate.layers.formats import Quantize
from simulate.layers.quantized import QuantizedWeight, nf4_levels
from simulate.measure.accuracy import ROOMY, errors_of, planned_bytes, tracked_rows
from simulate.measure.caching_allocator import reserved_bytes
from simulate.measure.fake_tensors import PARTS, Log, fake_tensors, tracked_memory
from simulate.measure.one_device import measure_memory_bytes
from simulate.measure.random_runs import METHODS, Sample
from simulate.rules.phases import PHASES
from tests import tiny
from tests.selection import others_slow

CPU = torch.device("cpu")
WIDE = {"layers": 2, "width": 96, "attention_heads": 4, "context": 24, "vocab": 300}
KERNEL_BYTES = 1024
"""Bytes that a kernel may allocate inside, such as for an operand that it converts."""
FOLLOWED = (
    "ddp", "lora", "adamix", "fedavg", "diloco, late, streaming int8", "lte, late", "lte, paced, reduced int4",
    "lte, frozen a, muon", "lte, vector norms", "daso", "sapipe", "signsgd", "local-sgd, paced, served",
)  # fmt: skip
MIB = 2**20


@pytest.mark.parametrize(
    "name", others_slow(FOLLOWED, ["lora", "lte, paced, reduced int4", "local-sgd, paced, served"])
)
def test_what_is_followed_is_what_the_allocator_gives(name: str) -> None:
    run = tiny.variant_run(name, 4, WIDE, {"dtype": "fp32", "steps": 12})
    tracked = tracked_memory(run, with_host=True)
    assert tracked.tracked_bytes == pytest.approx(measure_memory_bytes(run, CPU), abs=KERNEL_BYTES)
    assert set(tracked.by_part) == set(PARTS)
    assert sum(tracked.by_part.values()) == tracked.tracked_bytes == max(tracked.by_phase.values())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("train", [{"optimizer_state": "8bit"}, {"autocast": "fp16"}], ids=["8bit", "fp16"])
def test_small_optimizers_and_loss_scales_are_followed(train: dict[str, Any]) -> None:
    """Where a processor multiplies halves itself, oneDNN copies operands into an order of its own: up to 9 % here."""
    run = tiny.variant_run("lora, nf4", 4, WIDE, {"dtype": "fp32", **train})
    tracked = tracked_memory(run, with_host=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings for other devices, which come along
        with torch.backends.mkldnn.flags(enabled=False):
            measured = measure_memory_bytes(run, CPU)
    assert tracked.tracked_bytes == pytest.approx(measured, abs=KERNEL_BYTES)


def test_following_leaves_out_what_a_host_with_memory_keeps() -> None:
    run = tiny.lte_run(2, WIDE, {"dtype": "fp32"})
    own, shared = (tracked_memory(run, with_host) for with_host in (False, True))
    start_bytes = 4 * run.model.shape().adapted_parameters
    assert (own.host_bytes, shared.host_bytes) == (start_bytes, 0)
    assert shared.tracked_bytes - own.tracked_bytes == start_bytes


@pytest.mark.parametrize("quantize", others_slow(["int8", "nf4", "nf4-double"], ["nf4-double"]))
def test_quantised_weights_are_followed_as_they_are_planned(quantize: str) -> None:
    run = tiny.lte_run(2, WIDE, {"dtype": "fp32", "micro_batch": 4}, quantize=quantize, reset="b")
    tracked = tracked_memory(run, with_host=False)
    planned = memory_by_phase(run, run.model.shape(), ROOMY)
    backward = max(planned[name].total - ROOMY.reserved_bytes for name in planned if name.startswith("backward"))
    assert backward == pytest.approx(max(tracked.by_phase[n] for n in tracked.by_phase if "backward" in n), rel=0.03)
    assert tracked.host_bytes == 4 * run.model.shape().adapted_parameters


@pytest.mark.parametrize("quantize", ["int8", "nf4", "nf4-double"])
def test_packing_without_numbers_makes_the_same_buffers(monkeypatch: pytest.MonkeyPatch, quantize: Quantize) -> None:
    monkeypatch.setattr("simulate.layers.quantized.PACK_CHUNK_ELEMENTS", 1024)  # so that only a part is followed
    nf4_levels()
    real = QuantizedWeight(torch.randn(96, 100), quantize)
    with fake_tensors():
        fake = QuantizedWeight(torch.randn(96, 100), quantize)
    shapes = [[(t.shape, t.dtype) for t in weight.tensors()] for weight in (real, fake)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("count", others_slow([3, 10], [3]))
def test_random_runs_are_planned_within_three_percent_and_hardly_under(count: int) -> None:
    errors = errors_of(list(tracked_rows(Sample(count, seed=7, small=True))))
    assert errors.rows == count
    assert errors.worst <= 0.03
    assert errors.furthest_under >= -0.01


def test_a_mixer_over_few_wide_tokens_peaks_before_its_first_networks_gradients_are_done() -> None:
    run = Sample(12, seed=9, family="mixer", small=True).run(11)
    assert 0.99 <= planned_bytes(run) / tracked_memory(run, with_host=True).tracked_bytes <= 1.03


def test_held_out_runs_do_not_depend_on_how_many_are_asked_for() -> None:
    assert Sample(5, seed=3).runs() == Sample(9, seed=3).runs()[:5]
    assert Sample(5, seed=3).runs() != Sample(5, seed=4).runs()


def test_random_runs_can_be_of_one_family_and_under_autocast() -> None:
    runs = Sample(len(METHODS), family="mixer", autocast="bf16", small=True).runs()
    assert {run.model.shape().family for run in runs} == {"mixer"}
    assert {(run.train.autocast, run.train.dtype) for run in runs} == {("bf16", "fp32")}
    assert len({run.method.name for run in runs}) == len(set(METHODS))


def test_the_peak_is_the_highest_phase() -> None:
    run = tiny.variant_run("diloco", 4, WIDE, {"dtype": "fp32"})
    phases = memory_by_phase(run, run.model.shape(), ROOMY)
    assert list(phases) == [name for name in PHASES if name in phases]
    assert {"forward", "backward_start", "backward_end", "optimizer_step", "merge", "outer_step"} <= set(phases)
    peak = max(height.total for height in phases.values())
    assert peak == peak_memory(run, run.model.shape(), ROOMY).total == planned_bytes(run)


def test_segments_by_hand() -> None:
    assert reserved_bytes([(0, 1)]) == 2 * MIB
    assert reserved_bytes([(0, MIB), (1, MIB)]) == 2 * MIB
    assert reserved_bytes([(0, MIB), (1, MIB), (2, 1)]) == 4 * MIB
    assert reserved_bytes([(0, 3 * MIB), (1, 3 * MIB)]) == 20 * MIB
    assert reserved_bytes([(0, 11 * MIB + 1)]) == 12 * MIB


def test_what_is_given_back_is_taken_again() -> None:
    fits = [(0, 12 * MIB), (0, -12 * MIB), (1, 12 * MIB)]
    assert reserved_bytes(fits) == 12 * MIB
    # Two neighbours become one block: 6 + 6 of a segment of 20 make room for 9, beside the 8 that were left.
    joined = [(0, 6 * MIB), (1, 6 * MIB), (2, 8 * MIB), (0, -6 * MIB), (1, -6 * MIB), (3, 9 * MIB)]
    assert reserved_bytes(joined) == 20 * MIB
    apart = [(0, 6 * MIB), (1, 6 * MIB), (2, 6 * MIB), (0, -6 * MIB), (2, -6 * MIB), (3, 9 * MIB)]
    assert reserved_bytes(apart) == 40 * MIB


def test_a_device_never_sees_what_was_let_go_before_the_network_moved_to_it() -> None:
    entries = [(0, 30, "build"), (1, 12, "build"), (0, -30, "build"), (2, 9, "forward"), (1, -12, "merge")]
    log = Log([(key, num_bytes * MIB, phase) for key, num_bytes, phase in entries])
    assert [(key, size // MIB) for key, size in log.device_requests(False)] == [(1, 12), (2, 9), (1, -12)]
