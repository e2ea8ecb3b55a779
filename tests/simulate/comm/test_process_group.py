"""Tests that devices in several processes train exactly as the same devices in one: whole runs in float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from simulate.comm.transfers import devices_of
from tests import tiny
from tests.processes import DEVICES, train_in_processes, variant_table
from tests.selection import selected

STEPS, FEW_STEPS = 40, 9
"""Few are three rounds, the last of them shorter, or a restart, or a warm start and a restart."""
ONE_OF_EACH = [
    "ddp, int8", "relora, warm start", "mhlora", "adamix", "local-sgd, moments", "fedavg", "diloco, streaming", "daso",
    "sapipe", "powersgd", "topk", "signsgd", "lte", "lte, streaming int8", "lte, reduced int4", "lte, served bf16",
    "lte, norms of one, served", "lte, frozen a, muon", "lte, int8, served", "lte, joint",
]  # fmt: skip


QUICK = selected("processes")
BY_FOUR = [name for index, name in enumerate(QUICK) if index % 3 == 0 or name.startswith(("daso", "lte, nodes"))]
"""Nodes of two devices are not of three processes."""


@cache
def simulated(name: str, steps: int) -> tuple[tiny.History, dict[str, int]]:
    """Return what the run leaves behind in one process, and its bytes."""
    method = tiny.build(tiny.variant_run(name, DEVICES, train=variant_table(steps, "fp64")))
    history, counter = tiny.train(method), method.communicator.counter
    return history, {"sent": counter.sent_bytes, "received": counter.received_bytes, "messages": counter.messages}


def assert_same(launched: dict[str, tuple[tiny.History, dict[str, int]]], steps: int = STEPS) -> None:
    """Hold losses, merged weights and counted bytes of every variant against the simulation's."""
    for name, (history, counted) in launched.items():
        expected, expected_bytes = simulated(name, steps)
        tiny.assert_parity(history, expected)
        assert counted == expected_bytes, name


@cache
def of_three() -> dict[str, tuple[tiny.History, dict[str, int]]]:
    """Train few steps of most of the selection and of lte in three processes, of which one has two devices."""
    variants = [name for name in QUICK if name not in BY_FOUR]
    with TemporaryDirectory() as folder:
        return train_in_processes(Path(folder), [*variants, "lte"], 3, FEW_STEPS)


@pytest.mark.parametrize(
    ("variants", "steps"),
    [
        pytest.param(BY_FOUR, FEW_STEPS, id="selected"),
        pytest.param(list(tiny.VARIANTS), STEPS, id="all", marks=pytest.mark.slow),
    ],
)
def test_four_processes_train_as_the_simulation_does(tmp_path: Path, variants: list[str], steps: int) -> None:
    assert_same(train_in_processes(tmp_path, variants, 4, steps), steps)


@pytest.mark.slow
def test_two_processes_of_two_devices_train_as_the_simulation_does(tmp_path: Path) -> None:
    assert_same(train_in_processes(tmp_path, ONE_OF_EACH, 2, STEPS))


def test_few_steps_of_unequal_shares_train_as_the_simulation_does() -> None:
    assert len(of_three()) + len(BY_FOUR) >= len(QUICK) >= 20
    assert_same(of_three(), FEW_STEPS)


@pytest.mark.slow
def test_unequal_shares_train_as_the_simulation_does(tmp_path: Path) -> None:
    variants = [name for name in ONE_OF_EACH if not name.startswith("daso")]
    assert_same(train_in_processes(tmp_path, variants, 3, STEPS))


def test_a_device_that_draws_other_batches_is_noticed() -> None:
    history, counted = of_three()["lte"]
    assert_same({"lte": (history, counted)}, FEW_STEPS)
    worse = tiny.History(history.losses * (1 + 1e-8), history.weights)
    with pytest.raises(AssertionError):
        assert_same({"lte": (worse, counted)}, FEW_STEPS)


@pytest.mark.parametrize(("devices", "processes"), [(4, 4), (4, 3), (7, 2), (32, 4), (3, 1)])
def test_every_device_has_one_process(devices: int, processes: int) -> None:
    shares = [devices_of(process, processes, devices) for process in range(processes)]
    assert [device for share in shares for device in share] == list(range(devices))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert torch.tensor([len(share) for share in shares]).min() >= 1
