"""The processes and threads that `lte train` picks for a simulation: by what pays, by memory, and as the run began."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ltecli.commands import simulation_fits
from ltecli.commands.simulation_fits import processes_bytes
from ltecli.console import Output
from ltecli.runs import simulation_split
from ltecli.runs.run_folder import RunFolder
from ltecli.runs.simulation_split import pick_split
from simulate.config.run import Run, build_run
from simulate.planning.simulation_split import Split

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"model": {"width": 64, "layers": 4, "attention_heads": 2, "context": 64}}
LONG = 10**6


def run_of(devices: int = 4, steps: int = LONG, **tables: Any) -> Run:
    method = {"name": "local-sgd", "merge_every": 10}
    return build_run({**SMALL, "method": method, "train": {"steps": steps}, "cluster": {"devices": devices}, **tables})


@pytest.fixture
def pick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that picks for a run on a machine of so many cores and bytes, and returns split and line."""

    def picked(run: Run, cores: int = 4, room: int = 10**12, device: torch.device = CPU, given: int | None = None,
               resumes: bool = False, data_bytes: int = 0) -> tuple[Split, str]:  # fmt: skip
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        monkeypatch.setattr(simulation_fits, "_rooms", lambda device: {"host": room})
        data, newest = SimpleNamespace(num_bytes=data_bytes), tmp_path / "step-00000010" if resumes else None
        folder = SimpleNamespace(run=run, data=data, resume_from=newest, events=tmp_path / "events.jsonl")
        split = pick_split(cast(RunFolder, folder), device, given, Output())
        return split, capsys.readouterr().err

    return picked


def test_a_long_run_of_a_small_network_takes_a_process_a_core(pick: Any) -> None:
    assert pick(run_of()) == (Split(4, 1), "  simulated in 4 processes of 1 thread\n")
    assert pick(run_of(), cores=2)[0] == Split(2, 1)
    assert pick(run_of(devices=2))[0] == Split(2, 2)


def test_one_process_stays_where_others_do_not_pay(pick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick(run_of(steps=20)) == (Split(1, 4), "  simulated in 1 process of 4 threads\n")
    assert pick(run_of(devices=1)) == (Split(1, 4), "")
    assert pick(run_of(), cores=1) == (Split(1, 1), "")
    assert pick(run_of(), device=GPU)[0] == Split(1, 4)
    assert pick(run_of(model={"name": "gpt2"}))[0] == Split(1, 4)
    monkeypatch.setattr(simulation_split, "_lack", lambda: "no gloo")
    assert pick(run_of())[0] == Split(1, 4)


def test_the_choice_follows_what_was_measured_on_one_processor(pick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # 78 GFLOP/s of two threads: 300 steps took 79.9 s in one process and 71.4 s in two (docs/performance.md).
    machine = SimpleNamespace(devices=lambda n: (SimpleNamespace(flop_per_s=SimpleNamespace(of=lambda dtype: 7.8e10)),))
    monkeypatch.setattr(simulation_split, "load_profile", lambda name: machine)
    gpt = {"model": {"layers": 4, "width": 128, "attention_heads": 4, "context": 64}}
    runs = {steps: run_of(steps=steps, **gpt) for steps in (150, 300)}
    assert pick(runs[300], cores=2)[0] == Split(2, 1)
    assert pick(runs[150], cores=2)[0] == Split(1, 2)


def test_short_memory_leaves_fewer_processes(pick: Any) -> None:
    run = run_of()
    two, three, four = (processes_bytes(run, processes) for processes in (2, 3, 4))
    assert two < three < four
    assert pick(run, room=four)[0] == Split(4, 1)
    assert pick(run, room=four - 1)[0] == Split(2, 2)  # three would hold two devices at most, as two do
    assert pick(run, room=two - 1)[0] == Split(1, 4)
    assert pick(run, room=four, data_bytes=10**6)[0] == Split(2, 2)  # which each process holds


def test_a_method_that_cannot_be_divided_so_takes_what_it_can(pick: Any) -> None:
    nodes = {"name": "daso", "merge_every": 4, "devices_per_node": 2}
    assert pick(run_of(devices=6, method=nodes), cores=4)[0].processes in (1, 3)


def test_processes_that_are_named_are_taken(pick: Any) -> None:
    assert pick(run_of(steps=20), given=2) == (Split(2, 2), "  simulated in 2 processes of 2 threads\n")


def test_a_resumed_run_keeps_its_split_or_says_that_it_rounds_otherwise(pick: Any, tmp_path: Path) -> None:
    start = {"version": 1, "kind": "start", "step": 0, "threads": 2, "simulated_processes": 2}
    (tmp_path / "events.jsonl").write_text(json.dumps(start) + "\n")
    assert pick(run_of(), resumes=True) == (Split(2, 2), "  simulated in 2 processes of 2 threads\n")
    split, line = pick(run_of(), cores=2, resumes=True)
    assert split == Split(2, 1)
    assert line == (
        "  simulated in 2 processes of 1 thread, and in 2 processes of 2 threads before: "
        "the same run to rounding, not to the bit\n"
    )
    # A launched session in between has no split to keep.
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"version": 1, "kind": "resume", "step": 10, "processes": 3}) + "\n")
    assert pick(run_of(), resumes=True)[0] == Split(4, 1)
