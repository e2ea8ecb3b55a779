"""Simulations in several processes of this machine: the numbers of one process, stopped, resumed and damaged alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ltecli.app import main
from simulate.common.events import Event, read_events
from simulate.launch import simulated
from tests.harness import Child
from tests.launch.forked import ForkedCompanion
from tests.launch.runs import Launched, interrupt
from tests.ltecli.command import PROFILE, events_of, write_run
from tests.selection import others_slow

SAME = 1e-12
MIXED = "mixed_gtx1080ti_rtx2060_rtx3090"
SHORT: dict[str, Any] = {
    "steps": 24,
    "evaluate_every": 7,
    "checkpoint_every": 9,
    "diagnostics_every": 6,
    "dtype": "fp64",
}
METHODS: dict[str, dict[str, Any]] = {
    "lte": {"name": "lte", "rank": 2, "merge_every": 5},
    "ddp": {"name": "ddp"},
    "diloco, delayed": {"name": "diloco", "merge_every": 5, "merge_delay": 2},
    "paced": {"name": "local-sgd", "merge_every": 8, "pace": "deadline"},
    "topk": {"name": "topk"},
    "lte, served": {"name": "lte", "rank": 2, "merge_every": 5, "merge_transport": "server"},
}
CLASSES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "lte": (
        {"name": "lte", "rank": 2, "merge_every": 5, "draws": "joint"},
        [{"devices": 2, "micro_batch": 4, "heads_per_device": 2}, {"devices": 1, "rank": 5, "accumulate": 2}],
    ),
    "lte, served int8": (
        {"name": "lte", "rank": 2, "merge_every": 5, "merge_transport": "server", "wire": "int8"},
        [{"devices": 2, "micro_batch": 4, "heads_per_device": 2}, {"devices": 1, "rank": 5, "accumulate": 2}],
    ),
    "ddp": ({"name": "ddp"}, [{"devices": 1, "micro_batch": 4}, {"devices": 2}]),
    "diloco, int8": (
        {"name": "diloco", "merge_every": 5, "wire": "int8"},
        [{"devices": 1, "micro_batch": 4}, {"devices": 2}],
    ),
}
MEASURED = {"paused_s", "wall_s", "path", "machines", "measured_bytes", "simulated_processes"}
"""Keys of events in which two equal runs differ."""


@pytest.fixture(autouse=True)
def forked_companions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork what this process starts from one that has imported torch; commands start theirs as users' commands do."""
    monkeypatch.setattr(simulated, "subprocess", SimpleNamespace(Popen=ForkedCompanion, DEVNULL=subprocess.DEVNULL))


def simulate(run: Path, folder: Path, processes: int, *more: str) -> list[Event]:
    """Train a run in so many processes, this one among them; returns its events."""
    words = ["train", str(run), "--out", str(folder), "--device", "cpu", "--quiet", "--processes", str(processes)]
    assert main([*words, *more]) == 0
    return list(read_events(folder / "events.jsonl"))


@contextmanager
def started(folder: Path, *words: str) -> Iterator[Launched]:
    """Start `lte train` in a process of its own; whatever is left of it is killed at the end."""
    command = [sys.executable, "-m", "ltecli", "train", *words, "--device", "cpu"]
    with (folder.parent / "said0.txt").open("a") as said:
        process = Child(command, stdout=said, stderr=subprocess.STDOUT)
    launched = Launched(folder.parent, [process], folders={0: folder}, marks={0: {process.mark}})
    try:
        yield launched
    finally:
        launched.kill()


def companions(launched: Launched) -> list[psutil.Process]:
    """Return the live processes that the command has started to simulate along."""
    return [p for p in launched.processes() if "simulate.launch.simulated" in p.cmdline()]


def assert_same(events: Sequence[Event], expected: Sequence[Event], tolerance: float) -> None:
    """Compare what events say of the run, in order; one process emits a checkpoint's event once it is on the disk."""
    events, expected = (
        sorted(given, key=lambda e: (e["step"], e["kind"] == "checkpoint")) for given in (events, expected)
    )
    assert [(e["kind"], e["step"]) for e in events] == [(e["kind"], e["step"]) for e in expected]
    for event, other in zip(events, expected, strict=True):
        assert event.keys() == other.keys()
        for key in event.keys() - MEASURED:
            values, others = ([e[key]] if not isinstance(e[key], list) else e[key] for e in (event, other))
            assert len(values) == len(others)
            for value, right in zip(values, others, strict=True):
                same = pytest.approx(right, rel=tolerance, abs=tolerance) if isinstance(right, float) else right
                assert value == same, (event["kind"], event["step"], key)


@pytest.mark.parametrize(
    ("name", "processes"), others_slow([*((name, 2) for name in METHODS), ("lte", 3)], [("lte", 2)])
)
def test_several_processes_give_the_numbers_of_one(tmp_path: Path, name: str, processes: int) -> None:
    # Devices of several kinds: their steps of a round are counted by the profile's seconds, not by the clock.
    cluster = {"devices": 3 if name == "paced" else 4, "profile": MIXED if name == "paced" else PROFILE}
    run = write_run(tmp_path / "run.toml", method=METHODS[name], train=SHORT, cluster=cluster)
    one = simulate(run, tmp_path / "one", 1)
    several = simulate(run, tmp_path / "several", processes)
    assert_same(several, one, SAME)
    assert several[0]["simulated_processes"] == processes
    assert not torch.distributed.is_initialized()
    saved = sorted(path.name for path in (tmp_path / "several" / "checkpoints").iterdir())
    assert saved == sorted(path.name for path in (tmp_path / "one" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["lte", *(pytest.param(n, marks=pytest.mark.slow) for n in CLASSES if n != "lte")])
def test_unequal_devices_in_a_process_each_give_the_numbers_of_one_process(tmp_path: Path, name: str) -> None:
    method, classes = CLASSES[name]
    cluster = {"devices": 3, "profile": MIXED, "class": classes}
    train = {key: value for key, value in SHORT.items() if key != "diagnostics_every"}
    run = write_run(tmp_path / "run.toml", method=method, train=train, cluster=cluster)
    alone, apart = (simulate(run, tmp_path / str(number), number) for number in (1, 3))
    assert_same(apart, alone, SAME)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_as_many_processes_to_the_bit(tmp_path: Path) -> None:
    train = {"steps": 120, "evaluate_every": 120, "checkpoint_every": 120}
    run = write_run(tmp_path / "run.toml", train=train, cluster={"devices": 4})
    folder = tmp_path / "first"
    with started(folder, str(run), "--out", str(folder), "--processes", "2") as launched:
        launched.wait_for_step(5)
        assert len(companions(launched)) == 1
        interrupt(launched.agents[0])
        assert launched.end() == [130], launched.all_said()
    assert "saved; continue with lte train" in launched.said()
    (stopped,) = events_of(folder, "interrupt")
    assert stopped["step"] < 120
    assert main(["train", str(folder), "--resume", "--device", "cpu"]) == 0
    assert events_of(folder, "resume")[0]["simulated_processes"] == 2
    simulate(run, tmp_path / "whole", 2)
    for name in ("state", "devices-0-2", "devices-2-4"):
        parts = [
            load_file(path / f"checkpoints/step-00000120/{name}.safetensors") for path in (folder, tmp_path / "whole")
        ]
        assert parts[0].keys() == parts[1].keys()
        for key, tensor in parts[0].items():
            assert torch.equal(tensor, parts[1][key]), key


def test_other_processes_go_on_to_rounding_and_the_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run.toml", train={**SHORT, "schedule": "constant"}, cluster={"devices": 4})
    one = simulate(run, tmp_path / "one", 1)
    simulate(run, tmp_path / "two", 2, "--set", "train.steps=18")
    capsys.readouterr()
    words = ["train", str(tmp_path / "two"), "--resume", "--set", "train.steps=24", "--processes", "1"]
    assert main([*words, "--device", "cpu"]) == 0
    assert "simulated in 1 process of 1 thread, and in 2 processes of 1 thread before" in capsys.readouterr().err
    steps = [event["train_loss"] for event in events_of(tmp_path / "two", "step")]
    assert steps == pytest.approx([event["train_loss"] for event in one if event["kind"] == "step"], rel=SAME)


def test_a_lost_process_ends_the_run_with_its_reason_and_the_next_move(tmp_path: Path) -> None:
    train = {"steps": 5000, "evaluate_every": 5000, "checkpoint_every": 5}
    run = write_run(tmp_path / "run.toml", train=train, cluster={"devices": 4})
    folder = tmp_path / "run"
    with started(folder, str(run), "--out", str(folder), "--processes", "2") as launched:
        launched.wait_for_step(6)
        companions(launched)[0].kill()
        assert launched.end() == [1], launched.all_said()
    last = launched.said().splitlines()[-1]
    assert last.startswith("lte: simulating process 1 of 2 was killed by SIGKILL")
    assert f"continue with lte train {folder} --resume" in last


@pytest.mark.slow
def test_a_process_does_not_outlive_the_command(tmp_path: Path) -> None:
    train = {"steps": 5000, "evaluate_every": 5000, "checkpoint_every": 5000}
    run = write_run(tmp_path / "run.toml", train=train, cluster={"devices": 4})
    folder = tmp_path / "run"
    with started(folder, str(run), "--out", str(folder), "--processes", "2") as launched:
        launched.wait_for_step(1)
        launched.agents[0].kill()
        assert launched.end() == [-9]


@pytest.mark.parametrize(
    ("processes", "method", "reason"),
    [
        ("5", METHODS["lte"], "--processes 5 are more than cluster.devices = 4"),
        ("3", {"name": "daso", "merge_every": 4, "devices_per_node": 2}, "--processes 3"),
    ],
)
def test_processes_that_cannot_share_the_devices_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: str, method: dict[str, Any], reason: str
) -> None:
    run = write_run(tmp_path / "run.toml", method=method, cluster={"devices": 4})
    assert main(["train", str(run), "--out", str(tmp_path / "a"), "--device", "cpu", "--processes", processes]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
