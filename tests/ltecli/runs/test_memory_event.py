"""The measured memory of a run: the same event, whether measured before training or beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ltecli.runs import memory_event
from simulate.common.events import read_events, truncate_events
from simulate.measure import beside
from simulate.measure.beside import MemoryBeside, is_large
from tests.ltecli.command import Lte, events_of
from tests.tiny import lte_run


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run count as one that is worth a process."""
    monkeypatch.setattr(beside, "WORTH_A_PROCESS", 0.0)


@pytest.mark.usefixtures("large")
def test_a_run_measured_beside_training_has_the_event_of_one_measured_before(
    lte: Lte, trained: Path, run_toml: Path
) -> None:
    (before,) = events_of(trained, "memory")
    assert lte("train", run_toml, "--out", "a").code == 0
    events = list(read_events(Path("a/events.jsonl")))
    (event,) = events_of(Path("a"), "memory")
    assert event["measured_bytes"] == before["measured_bytes"] > 0
    assert events[0]["kind"] == "start" and events[-1]["kind"] == "end"
    steps = [event["step"] for event in events if event["kind"] != "checkpoint"]  # those come once they are on the disk
    assert steps == sorted(steps)
    assert lte("report", "a", "--json").json()["memory_bytes"]["measured"] == before["measured_bytes"]


@pytest.mark.usefixtures("large")
def test_without_the_memory_for_both_it_is_measured_before(
    lte: Lte, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_event, "fits_beside", lambda run, processes, num_bytes: False)
    monkeypatch.setattr(memory_event, "MemoryBeside", None)  # would raise
    assert lte("train", run_toml, "--out", "a").code == 0
    assert [event["kind"] for event in read_events(Path("a/events.jsonl"))][:2] == ["start", "memory"]


@pytest.mark.usefixtures("large")
def test_a_measurement_that_fails_is_told_and_the_run_goes_on(
    lte: Lte, run_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_event, "MemoryBeside", lambda folder, number: MemoryBeside(folder / "nowhere", number))
    outcome = lte("train", run_toml, "--out", "a")
    assert outcome.code == 0
    assert "one device's memory could not be measured beside the run: " in outcome.stderr
    assert "nowhere" in outcome.stderr
    assert events_of(Path("a"), "memory")[0]["measured_bytes"] is None


def test_an_interrupted_run_that_has_no_figure_yet_measures_when_it_is_resumed(lte: Lte, trained: Path) -> None:
    (event,) = events_of(trained, "memory")
    file = trained / "events.jsonl"
    lines = [line for line in file.read_text().splitlines() if json.loads(line)["kind"] not in ("memory", "end")]
    file.write_text("\n".join(lines) + "\n")
    for part in (trained / "checkpoints" / "step-00000008").iterdir():
        part.unlink()
    assert lte("train", trained, "--resume").code == 0
    assert [again["measured_bytes"] for again in events_of(trained, "memory")] == [event["measured_bytes"]]
    assert events_of(trained, "memory")[0]["step"] == 6


@pytest.mark.parametrize(("step", "kept"), [(3, [3]), (9, [7]), (-1, [])])
def test_a_resumed_run_keeps_the_figure_and_one_that_begins_anew_does_not(
    tmp_path: Path, step: int, kept: list[int]
) -> None:
    path = tmp_path / "events.jsonl"
    events = [{"version": 1, "kind": "step", "step": step} for step in range(1, 8)]
    events.append({"version": 1, "kind": "memory", "step": 7, "measured_bytes": 5})
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    truncate_events(path, step)
    assert [event["step"] for event in read_events(path) if event["kind"] == "memory"] == kept


def test_only_large_programs_are_worth_a_process() -> None:
    run = lte_run()
    assert not is_large(run)

    many = run.model_copy(update={"train": run.train.model_copy(update={"micro_batch": 10**9})})
    assert is_large(many)


def test_closing_ends_the_process(trained: Path) -> None:
    measurement = MemoryBeside(trained)
    process = psutil.Process(measurement._process.pid)
    measurement.close()
    assert not process.is_running()


def test_the_process_ends_with_the_one_that_started_it(trained: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "from simulate.measure.beside import end_with_the_parent as end\n"
         "end()\nimport time\ntime.sleep(600)"], stdin=subprocess.PIPE
    )  # fmt: skip
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=60) == 1
