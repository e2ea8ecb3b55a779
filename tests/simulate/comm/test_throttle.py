"""Tests of the throttle: seconds by a clock that the test turns, then processes that exchange, counted call by call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ltecli.app import main
from simulate.comm.process_group import TorchCommunicator
from simulate.comm.throttle import Throttle
from simulate.comm.transfers import Transfer
from simulate.common.quantities import read_link
from simulate.config.run import build_run
from simulate.launch.worker import throttle_of
from tests import tiny
from tests.ltecli.command import write_run


class Clock:
    """A clock that only sleeping, or the test, moves."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


def throttle(clock: Clock) -> Throttle:
    return Throttle(lambda transfer: transfer.payload_bytes / 1000, clock.now, clock.sleep)


def test_an_exchange_lasts_as_long_as_its_messages_would() -> None:
    clock = Clock()
    slow = throttle(clock)
    slow.count(Transfer("all_reduce", 2000, 4))
    slow.count(Transfer("broadcast", 500, 4))
    assert slow.take_s() == 2.5
    assert slow.take_s() == 0.0  # the next exchange owes nothing of it
    assert slow.slowed(lambda: clock.pass_s(0.5), 2.5, lambda: None) is None
    assert clock.slept == [2.0]


def test_an_exchange_that_takes_longer_is_not_slowed() -> None:
    clock = Clock()
    throttle(clock).slowed(lambda: clock.pass_s(3.0), 2.5, lambda: None)
    assert clock.slept == []


def test_the_wait_for_late_processes_is_no_part_of_an_exchange() -> None:
    clock = Clock()
    throttle(clock).slowed(lambda: clock.pass_s(0.5), 2.5, lambda: clock.pass_s(60.0))
    assert clock.slept == [2.0]
    assert clock.now_s == 100.0 + 60.0 + 2.5


@pytest.mark.parametrize("background", [False, True])
def test_a_communicator_slows_every_exchange_by_its_own_messages(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, counted = Clock(), []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        slow = Throttle(lambda t: counted.append(t) or t.payload_bytes / 1000, clock.now, clock.sleep)  # type: ignore[func-returns-value]
        communicator = TorchCommunicator(4, tiny.CPU, 60.0, throttle=slow)
        if background:
            with communicator.background():
                communicator.all_reduce([torch.ones(500)])
                communicator.all_gather([torch.ones(4, 250)])
        else:
            communicator.all_reduce([torch.ones(500)])
            communicator.all_gather([torch.ones(4, 250)])
        communicator.finish()
        assert [round(seconds, 9) for seconds in clock.slept] == [2.0, 1.0]
        assert counted == [Transfer("all_reduce", 2000, 4), Transfer("all_gather", 1000, 4)]
        communicator.all_gather_scalars(torch.zeros(4, 3))
        assert counted[-1] == Transfer("all_gather", 24, 4)
        assert clock.slept[-1] == pytest.approx(0.024)
        communicator.close()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("20 Mbit/s, 20 ms", (2.5e6, 0.02)),
        ("1 MB/s", (1e6, 0.0)),
        ("2500000, 0.02", (2.5e6, 0.02)),
    ],
)
def test_a_link_is_read_with_its_units(text: str, link: tuple[float, float]) -> None:
    assert read_link(text) == link


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("20 Mb/s, 20 ms", "unknown unit 'Mb/s'"),
        ("20 Mbit/s, soon", "'soon'"),
        ("0 Mbit/s", "above 0"),
        ("20 Mbit/s, -1 ms", "not below"),
        ("", "not a number"),
    ],
)
def test_what_is_no_link_is_refused_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run.toml")
    assert main(["train", str(run), "--launch", "--set", f"cluster.throttle={text!r}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "throttle" in line
    assert said in line


def test_a_simulation_with_a_throttle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run.toml", cluster={"throttle": "20 Mbit/s, 20 ms"})
    assert main(["train", str(run), "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cluster.throttle = '20 Mbit/s, 20 ms'" in line
    assert "--launch" in line
    assert not (tmp_path / "out").exists()


def test_two_devices_swap_halves_in_two_hops_each() -> None:
    """Two devices sum 2 MB by a ring of two hops: each takes two delays, and a half's 0.4 s at 2.5 MB/s."""
    run = build_run({"cluster": {"throttle": "20 Mbit/s, 20 ms", "devices": 2}})
    slow = throttle_of(run)
    assert slow is not None
    slow.count(Transfer("all_reduce", 2_000_000, 2))
    assert slow.take_s() == pytest.approx(2 * (2 * 0.02 + 0.4))
    assert throttle_of(build_run({})) is None
