"""Damage to a launched run on one machine: what was running goes on, the same run to float rounding."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from ltecli.runs.status import read_status
from simulate.common.processor import machine_facts
from simulate.config.run import load_run
from simulate.launch.preflight.secret import VARIABLE as SECRET_VARIABLE
from simulate.rules.cadence import Cadence
from tests.launch.runs import figures_of, interrupt, launched_run, simulated_loss, start_node, tiny_run
from tests.ltecli.command import events_of

SAME = 1e-9


def test_a_killed_worker_is_started_again_and_the_run_is_the_same(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=100, diagnostics_every=20)
    with launched_run(tmp_path / "run", run) as launched:
        launched.wait_for_step(10)
        # Whoever reads a worker's environment must not find what lets a stranger in.
        assert not any(SECRET_VARIABLE in worker.environ() for worker in launched.workers())
        launched.workers()[1].kill()
        assert launched.end() == [0], launched.all_said()
        (restart,) = launched.events("restart")
        assert any("process 1 on node 0 was killed by SIGKILL" in reason for reason in restart["reasons"])
        assert restart["repeated_steps"] <= 5
        assert "process 1 on node 0 was killed by SIGKILL" in launched.said()
        assert [event["step"] for event in launched.events("step")] == list(range(1, 101))
        status = read_status(launched.node_folder())
        assert status is not None
        assert (status["state"], status["step"], status["restarts"]) == ("finished", 100, 1)
        assert status["restart_reasons"] == restart["reasons"]
        assert [event["step"] for event in launched.events("diagnostics")] == list(range(20, 101, 20))
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


@pytest.mark.slow
def test_an_undisturbed_run_saves_when_its_plan_says_and_its_clock_agrees(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=37, recover_every=2)
    with launched_run(tmp_path / "run", run) as launched:
        assert launched.end() == [0], launched.all_said()
    (start,) = launched.events("start")
    (machine,) = start["machines"]  # of all processes, which share one
    assert (machine["processor"], machine["limits"]["OMP_NUM_THREADS"]) == (machine_facts()["processor"], "1")
    cadence, saved = Cadence.of(load_run(run)), launched.events("checkpoint")
    assert [event["step"] for event in saved] == [step for step in range(1, 38) if cadence.saves(step)]
    assert [event["step"] for event in saved] == [10, 20, 30, 37]
    simulated_loss(run, tmp_path / "alone")
    alone = events_of(tmp_path / "alone", "checkpoint")[-1]
    assert saved[-1]["simulated_s"] == pytest.approx(alone["simulated_s"], rel=1e-9)
    planned = json.loads((tmp_path / "run" / "node0" / "plan.json").read_text())["chosen"]
    assert saved[-1]["simulated_s"] == pytest.approx(planned["wall_s"], rel=1e-9)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_in_other_processes_and_is_the_same(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=400, diagnostics_every=50)
    with launched_run(tmp_path / "run", run, processes=2) as launched:
        launched.wait_for_step(60)
        interrupt(launched.agents[0])
        assert launched.end() == [130], launched.all_said()
        assert "saved; continue with lte train" in launched.said()
        assert launched.events()[-1]["kind"] == "interrupt"
        start_node(launched, run, processes=1, resume=True)
        assert launched.end() == [0], launched.all_said()
        assert launched.events("resume")
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)
    diagnosed = launched.events("diagnostics")
    assert [event["step"] for event in diagnosed] == list(range(50, 401, 50))
    for event, expected in zip(diagnosed, events_of(tmp_path / "alone", "diagnostics"), strict=True):
        assert event.keys() == expected.keys()
        for key in event.keys() - {"kind"}:
            assert event[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-12), key


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(tmp_path: Path, number: signal.Signals) -> None:
    run = tiny_run(tmp_path, steps=100_000, timeout_s=600)
    with launched_run(tmp_path / "run", run) as launched:
        launched.wait_for_step(20)
        launched.workers()[1].suspend()  # nobody gets to a meeting any more
        interrupt(launched.agents[0], number)
        time.sleep(1.0)  # those that come while Python is busy elsewhere are one to it
        interrupt(launched.agents[0], number)
        interrupt(launched.agents[0], number)
        assert launched.end(40) == [130], launched.all_said()
        assert "saved: " in launched.said()


@pytest.mark.slow
def test_the_first_process_killed(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=400)
    with launched_run(tmp_path / "run", run, processes=4) as launched:
        launched.wait_for_step(20)
        launched.workers()[0].kill()
        assert launched.end() == [0], launched.all_said()
        assert len(launched.events("restart")) == 1
        assert [event["step"] for event in launched.events("step")] == list(range(1, 401))
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


@pytest.mark.slow
def test_kills_at_many_moments_end_in_the_same_run(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=2000, max_restarts=10)
    with launched_run(tmp_path / "run", run) as launched:
        for kill in range(6):
            launched.wait_for_step(200 + 250 * kill)
            launched.workers()[kill % 2].kill()
            launched.wait_for(lambda kill=kill: len(launched.events("restart")) > kill)
        assert launched.end() == [0], launched.all_said()
        assert [event["step"] for event in launched.events("step")] == list(range(1, 2001))
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


@pytest.mark.slow
def test_a_hung_worker_is_named_and_replaced(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=400, timeout_s=5)
    with launched_run(tmp_path / "run", run) as launched:
        launched.wait_for_step(20)
        launched.workers()[1].suspend()
        assert launched.end() == [0], launched.all_said()
        (restart,) = launched.events("restart")
        assert any("silent: process 1 on node 0 (devices 2 to 3)" in reason for reason in restart["reasons"])
        assert 5 < restart["silent_s"] < 120
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


@pytest.mark.slow
def test_a_run_whose_workers_always_die_is_given_up(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=100_000, max_restarts=1, recover_every=10_000)
    with launched_run(tmp_path / "run", run) as launched:
        for _ in range(2):
            launched.wait_for(launched.workers)
            launched.wait_for(lambda: launched.events("step"))
            (launched.node_folder() / "events.jsonl").unlink()
            launched.workers()[1].kill()
        assert launched.end(60) == [1], launched.all_said()
        assert "given up after 1 restarts" in launched.said()
        assert "no checkpoint was saved yet" in launched.said()


@pytest.mark.slow
def test_a_worker_without_memory_says_so_and_is_started_again(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, steps=600)
    with launched_run(tmp_path / "run", run) as launched:
        launched.wait_for_step(20)
        worker = launched.workers()[1]
        worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms // 2, worker.memory_info().vms))
        assert launched.end() == [0], launched.all_said()
        assert launched.events("restart"), launched.all_said()
        reasons = " ".join(launched.events("restart")[0]["reasons"])
        assert "process 1 on node 0: ran out of memory" in reasons or (
            "process 1 on node 0 ran out of memory" in reasons
        ), (reasons, launched.worker_logs())
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)
