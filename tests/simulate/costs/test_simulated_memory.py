"""A simulation's memory in closed form, beside the program that trains all devices, followed with fake tensors."""

from __future__ import annotations

import itertools

import pytest

from simulate.config.run import Run
from simulate.costs.simulated_memory import MAPPED_BYTES, PROCESS_BYTES, SimulatedMemory, simulated_memory
from simulate.measure.accuracy import ROOMY, describe
from simulate.measure.fake_tensors import BUILD, track
from simulate.measure.one_device import train_together
from simulate.measure.random_runs import METHODS, Sample
from tests import tiny
from tests.selection import others_slow

FURTHEST_UNDER, FURTHEST_OVER = 0.05, 0.25
RUNS = {
    f"{index}: {describe(run)[:60]}": run for index, run in enumerate(Sample(2 * len(METHODS), 0, small=True).runs())
}
"""Every method, in turns with every family; others are below."""
WIDE = {"layers": 2, "width": 64, "attention_heads": 4, "context": 24, "vocab": 300}
RUNS["lte on 32"] = tiny.lte_run(32, WIDE, {"micro_batch": 2, "dtype": "fp32"}, rank=4)
RUNS["diloco on 24"] = tiny.variant_run("diloco", 24, WIDE, {"micro_batch": 2, "dtype": "fp32"})
RUNS["apollo on 8"] = tiny.variant_run("local-sgd, apollo", 8, WIDE, {"micro_batch": 1, "apollo_rank": 64})
QUICK = [*list(RUNS)[:4], list(RUNS)[5], list(RUNS)[27], "lte on 32", "apollo on 8"]


def followed_bytes(run: Run) -> int:
    """Return the peak of the program that trains all devices in one process."""
    peaks = track(run, train_together).peaks(with_host=True)
    peaks.pop(BUILD)
    return max(peak.total for peak in peaks.values())


def planned_bytes(run: Run) -> int:
    return simulated_memory(run, run.model.shape(), ROOMY).tensors


@pytest.mark.parametrize("name", others_slow(RUNS, QUICK))
def test_the_form_is_near_what_a_simulation_holds(name: str) -> None:
    share = planned_bytes(RUNS[name]) / followed_bytes(RUNS[name])
    assert 1 - FURTHEST_UNDER <= share <= 1 + FURTHEST_OVER


def test_a_form_for_fewer_devices_is_noticed() -> None:
    fewer = tiny.lte_run(28, WIDE, {"micro_batch": 2, "dtype": "fp32"}, rank=4)
    assert planned_bytes(fewer) < (1 - FURTHEST_UNDER) * followed_bytes(RUNS["lte on 32"])


def test_projections_count_once() -> None:
    """Devices of a simulation hold moments each, and one projection together."""
    sizes = {}
    for devices in (2, 8):
        run = tiny.variant_run("local-sgd, apollo", devices, WIDE, {"micro_batch": 1, "apollo_rank": 64})
        sizes[devices] = planned_bytes(run) / followed_bytes(run)
    assert sizes[8] == pytest.approx(sizes[2], rel=0.01)


def test_what_devices_share_counts_once() -> None:
    """A device more adds the same each time, and far less than a run of one device holds."""
    sizes = [planned_bytes(tiny.lte_run(n, WIDE, {"micro_batch": 1, "dtype": "fp32"}, rank=2)) for n in (6, 7, 8)]
    first, second = (after - before for before, after in itertools.pairwise(sizes))
    assert first == pytest.approx(second, rel=0.01)
    dense = [planned_bytes(tiny.ddp_run(n, WIDE, {"micro_batch": 1, "dtype": "fp32"})) for n in (6, 7)]
    shape = RUNS["lte on 32"].model.shape()
    assert dense[1] - dense[0] < shape.parameters * 4  # ddp's weights are everybody's


def test_a_process_holds_more_than_its_tensors() -> None:
    memory = SimulatedMemory(state=5, passing=20, holes=2)
    assert (memory.tensors, memory.process) == (25, PROCESS_BYTES + 27)
    run = tiny.lte_run(2, WIDE, {"micro_batch": 2, "dtype": "fp32"})
    small = simulated_memory(run, run.model.shape(), ROOMY)
    assert small.holes == small.passing
    tokens = 24 * 64 * 4
    large = tiny.lte_run(2, WIDE, {"micro_batch": MAPPED_BYTES // tokens, "dtype": "fp32"})
    memory = simulated_memory(large, large.model.shape(), ROOMY)
    assert memory.holes == int(0.12 * memory.passing)  # the system takes large tensors back at once
