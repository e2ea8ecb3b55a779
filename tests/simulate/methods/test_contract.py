"""The contract of every method, ours and from outside: planned = counted, measured; resumed, launched, twin = the same.

The grid of all variants of all methods is in the tests of each property; here is each method once. `make test` leaves
out here what it tests there for every method: bytes, memory, resumed and launched runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simulate.config.method_table import METHOD_NAMES
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.costs.memory import peak_memory
from simulate.costs.message_schedule import received_bytes, sent_bytes
from simulate.measure.one_device import measure_memory_bytes
from tests import tiny
from tests.processes import DEVICES, train_in_processes, variant_table
from tests.selection import others_slow
from tests.simulate.methods.twins import COMBINED, TWINS, fast_history, slow_history, twin_run

OUTSIDE = "from outside"
CONTRACT = [*METHOD_NAMES, OUTSIDE]
EACH_METHOD = pytest.mark.parametrize("name", CONTRACT)
STEPS = 14
SIZES = {"layers": 3, "width": 48, "attention_heads": 3, "context": 40, "vocab": 256}
ONE_MEMORY = load_profile("raspberry_x8").device[0]


def trained(run: Run) -> tuple[tiny.History, dict[str, int]]:
    method = tiny.build(run)
    history, counter = tiny.train(method), method.communicator.counter
    return history, {"sent": counter.sent_bytes, "received": counter.received_bytes, "messages": counter.messages}


@pytest.mark.slow  # comm/test_transfers.py
@EACH_METHOD
def test_planned_bytes_are_counted(name: str) -> None:
    run = tiny.variant_run(name, train={"steps": STEPS})
    _, counted = trained(run)
    shape = run.model.shape()
    assert counted["sent"] == sent_bytes(run, shape, STEPS) > 0
    assert counted["received"] == received_bytes(run, shape, STEPS)


@pytest.mark.slow  # costs/test_memory.py
@EACH_METHOD
def test_planned_memory_is_measured(name: str) -> None:
    run = tiny.variant_run(name, 3 if name != "daso" else 4, SIZES, {"micro_batch": 4, "dtype": "fp32"})
    memory = peak_memory(run, run.model.shape(), ONE_MEMORY)
    measured = measure_memory_bytes(run, torch.device("cpu"))
    assert 0.99 * measured <= memory.tensors <= 1.03 * measured


@pytest.mark.slow  # test_adapter_resume.py and test_dense_resume.py
@EACH_METHOD
def test_a_resumed_run_is_the_same_to_the_bit(name: str) -> None:
    tiny.assert_resumes(name, 6)


@pytest.mark.slow  # comm/test_process_group.py
def test_launched_runs_are_the_simulated_ones(tmp_path: Path) -> None:
    for name, (history, counted) in train_in_processes(tmp_path, CONTRACT, 2, STEPS).items():
        expected, expected_bytes = trained(tiny.variant_run(name, DEVICES, train=variant_table(STEPS, "fp64")))
        tiny.assert_parity(history, expected)
        assert counted == expected_bytes, name


@pytest.mark.parametrize("name", others_slow(TWINS, CONTRACT))
def test_it_trains_like_its_slow_twin(name: str) -> None:
    run = twin_run(name)
    tiny.assert_parity(fast_history(name, run), slow_history(name, run))


@pytest.mark.parametrize("name", ["ddp", "lte", OUTSIDE])
def test_parity_detects_another_rate(name: str) -> None:
    other = twin_run(name, learning_rate=1.001e-2)
    with pytest.raises(AssertionError):
        tiny.assert_parity(fast_history(name, twin_run(name)), slow_history(name, other))


def test_every_variant_has_its_twin_or_combines_what_has_one() -> None:
    assert sorted([*TWINS, *COMBINED]) == sorted(tiny.VARIANTS)
    assert set(CONTRACT) <= TWINS.keys()


def test_a_method_from_outside_learns() -> None:
    losses = tiny.train(tiny.build(tiny.variant_run(OUTSIDE, train={"steps": 40, "learning_rate": 0.01}))).losses
    assert losses[-5:].mean() < losses[:5].mean() - 0.5
