"""Processes of a run with a quorum are lost: the others go on in their processes, and who comes back joins them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ltecli.runs.status import read_status
from tests.harness import Child, environment
from tests.launch.runs import (
    LOSS_TOLERANCE,
    SECRET,
    Launched,
    interrupt,
    launched_run,
    simulated_loss,
    start_node,
    tiny_run,
)

FORKED = "tests.launch.forked"
START_S = 400.0
"""Seconds for a start on busy cores."""


def quorum_run(folder: Path, steps: int = 400, merge_every: int = 5, **cluster: Any) -> Path:
    """Write a tiny run of four devices that goes on with two."""
    method = {"name": "lte", "rank": 2, "reset": "b", "merge_every": merge_every}
    return tiny_run(folder, steps=steps, method=method, **{"quorum": 2, "deadline_s": 5.0, **cluster})


def last_step(launched: Launched) -> int:
    """Return the newest logged step."""
    return max((int(event["step"]) for event in launched.events("step")), default=0)


def wait_for_start(launched: Launched) -> None:
    """Wait until the run is under way."""
    launched.wait_for(lambda: last_step(launched) >= 10, START_S)


def kill(launched: Launched, *ranks: int, wait: bool = True) -> float:
    """Kill workers at once; returns the seconds until the others have logged a step after the next merge."""
    workers = launched.workers()
    for rank in ranks:
        workers[rank].kill()
    killed_s, step = time.monotonic(), last_step(launched)
    if wait:
        launched.wait_for(lambda: last_step(launched) > step + 5)
    return time.monotonic() - killed_s


def devices_of(launched: Launched, kind: str) -> list[int]:
    """Return the devices of all events of a kind, in order."""
    return [device for event in launched.events(kind) for device in event["devices"]]


def steps_of(launched: Launched) -> list[int]:
    return [event["step"] for event in launched.events("step")]


def test_the_others_go_on_without_a_killed_process_and_take_it_back(tmp_path: Path) -> None:
    # Stopped once it has seen enough: how many steps a process misses depends on the machine; nobody is late.
    train = {"evaluate_every": 50, "schedule": "constant"}
    run = quorum_run(tmp_path, 100_000, deadline_s=20.0, train=train)
    with launched_run(tmp_path / "run", run, processes=4, module=FORKED) as launched:
        wait_for_start(launched)
        others = {worker.pid for rank, worker in enumerate(launched.workers()) if rank != 1}
        print(f"next steps after {kill(launched, 1):.1f} s")
        assert others <= {worker.pid for worker in launched.workers()}
        launched.wait_for(lambda: launched.events("joined"), START_S)
        (left,), (joined,) = launched.events("left"), launched.events("joined")
        seen = joined["step"] + 5
        launched.wait_for(lambda: any(event["step"] > seen for event in launched.events("evaluate")), START_S)
        interrupt(launched.agents[0])
        assert launched.end(START_S) == [130], launched.all_said()
    assert (devices_of(launched, "left"), devices_of(launched, "joined")) == ([1], [1])
    assert "device 1 left: process 1 on node 0 (device 1) ended; 3 devices go on from step" in launched.said()
    assert "device 1 joined at step" in launched.said()
    assert launched.events("restart") == []
    assert steps_of(launched) == list(range(1, last_step(launched) + 1))  # nothing is repeated
    merges = launched.events("merge")
    assert any(merge["participants"] == [0, 2, 3] and merge["brought"][1] == -1 for merge in merges)
    assert merges[-1]["participants"] == [0, 1, 2, 3]
    assert left["step"] < joined["step"]
    assert joined["own_step"] is not None
    status = read_status(launched.node_folder())
    assert status is not None
    assert (status["away"], status["restarts"]) == ([], 0)
    assert status["newest_change"].startswith("device 1 joined at step")
    whole = simulated_loss(run, tmp_path / "alone", "--set", f"train.steps={launched.events('evaluate')[-1]['step']}")
    assert launched.val_loss() == pytest.approx(whole, rel=LOSS_TOLERANCE)


@pytest.mark.slow
def test_the_first_process_and_two_at_once(tmp_path: Path) -> None:
    run = quorum_run(tmp_path, 3000, max_restarts=9)
    with launched_run(tmp_path / "run", run, processes=4, module=FORKED) as launched:
        wait_for_start(launched)
        print(f"without the first: next steps after {kill(launched, 0):.1f} s")
        launched.wait_for(lambda: len(devices_of(launched, "joined")) == 1, START_S)
        print(f"without two: next steps after {kill(launched, 1, 3):.1f} s")
        launched.wait_for(lambda: len(devices_of(launched, "joined")) == 3, START_S)
        assert launched.end(START_S) == [0], launched.all_said()
    assert sorted(devices_of(launched, "left")) == [0, 1, 3]
    assert launched.events("restart") == []
    assert steps_of(launched) == list(range(1, 3001))


@pytest.mark.slow
def test_kills_in_merges_leave_all_others_with_the_same_weights(tmp_path: Path) -> None:
    # With a merge at every step most of the time is a merge's; all evaluate the same weights, or they would not agree.
    run = quorum_run(tmp_path, 400, merge_every=1, max_restarts=9)
    with launched_run(tmp_path / "run", run, processes=4, module=FORKED) as launched:
        wait_for_start(launched)
        for count, rank in enumerate((1, 2, 3, 1), 1):
            print(f"in a merge: next steps after {kill(launched, rank):.1f} s")
            launched.wait_for(lambda count=count: len(devices_of(launched, "joined")) == count, START_S)
        assert launched.end(START_S) == [0], launched.all_said()
    assert launched.events("restart") == []
    assert steps_of(launched) == list(range(1, 401))
    assert all(event["why"] for event in launched.events("left"))
    assert launched.val_loss() < launched.events("step")[0]["train_loss"]


@pytest.mark.slow
def test_a_process_killed_while_all_evaluate_is_not_waited_for(tmp_path: Path) -> None:
    # Evaluations take most of the time, and the deadline is longer than the wait below.
    train = {"evaluate_every": 5, "evaluate_samples": 4000, "schedule": "constant"}
    run = quorum_run(tmp_path, 100_000, deadline_s=2 * START_S, max_restarts=9, train=train)
    with launched_run(tmp_path / "run", run, processes=4, module=FORKED) as launched:
        launched.wait_for(lambda: launched.events("evaluate"), START_S)
        for count, rank in enumerate((1, 3, 0), 1):
            step, evaluations = last_step(launched), len(launched.events("evaluate"))
            launched.wait_for(lambda step=step: last_step(launched) >= step + 5, START_S)
            launched.workers()[rank].kill()
            launched.wait_for(lambda n=evaluations: len(launched.events("evaluate")) > n + 1, START_S)
            launched.wait_for(lambda count=count: len(devices_of(launched, "joined")) == count, START_S)
        interrupt(launched.agents[0])
        assert launched.end(START_S) == [130], launched.all_said()
    assert all("ended" in event["why"] or "failed" in event["why"] for event in launched.events("left"))


@pytest.mark.slow
def test_a_process_that_sleeps_is_left_out_and_brings_what_it_has(tmp_path: Path) -> None:
    run = quorum_run(tmp_path, 1500, deadline_s=2.0)
    with launched_run(tmp_path / "run", run, processes=4, module=FORKED) as launched:
        wait_for_start(launched)
        sleeper, step = launched.workers()[2], last_step(launched)
        sleeper.suspend()
        launched.wait_for(lambda: last_step(launched) > step + 20)
        sleeper.resume()
        launched.wait_for(lambda: launched.events("joined"), START_S)
        assert launched.end(START_S) == [0], launched.all_said()
    (left,), (joined,) = launched.events("left"), launched.events("joined")
    assert "not there 2." in left["why"]
    assert joined["missed_merges"] is None or joined["missed_merges"] >= 1
    ages = [merge["ages"][2] for merge in launched.events("merge") if merge["step"] >= joined["step"]]
    assert ages[0] == (joined["missed_merges"] or 0)
    assert launched.said().count("was killed") == 0


@pytest.mark.slow
def test_without_a_quorum_all_wait_and_go_on_from_the_last_merge(tmp_path: Path) -> None:
    run = quorum_run(tmp_path, 1500, quorum=3, join_timeout_s=300)
    with launched_run(tmp_path / "run", run, processes=4, module=FORKED) as launched:
        wait_for_start(launched)
        kill(launched, 1, 3, wait=False)
        launched.wait_for(lambda: launched.events("restart"), START_S)
        assert launched.end(START_S) == [0], launched.all_said()
    (restart,) = launched.events("restart")
    assert restart["reasons"] == ["fewer devices than cluster.quorum were left"]
    assert restart["repeated_steps"] <= 5
    # Whether the wait is told depends on who is back first: tests/simulate/launch/test_membership.py.
    assert steps_of(launched) == list(range(1, 1501))


@pytest.mark.slow
def test_a_quorum_that_does_not_come_back_ends_the_run(tmp_path: Path) -> None:
    run = quorum_run(tmp_path, 100_000, quorum=3, join_timeout_s=20, max_restarts=0)
    with launched_run(tmp_path / "run", run, processes=4, module=FORKED) as launched:
        wait_for_start(launched)
        kill(launched, 1, 3, wait=False)
        assert launched.end(START_S) == [1], launched.all_said()
    assert "cluster.quorum = 3 devices, and 2 are here after 20 s (cluster.join_timeout_s)" in launched.said()


@pytest.mark.slow
def test_node_0_is_lost_with_the_store_apart_and_the_store_restarts(tmp_path: Path) -> None:
    run, ports = quorum_run(tmp_path, 3000, max_restarts=9, join_timeout_s=300), free_ports(2)
    store = f"127.0.0.1:{ports[0]}"
    launched = Launched(tmp_path, nodes=1)
    served = serve(store, tmp_path)
    try:
        join = f"127.0.0.1:{ports[1]}"
        lines = [["--nodes", "2", "--node", str(n), "--join", join, "--store", store] for n in (0, 1)]
        for node, line in enumerate(lines):
            start_node(launched, run, node, processes=2, module=FORKED, more=line)
        events = lambda kind: events_of_node_1(launched, kind)  # noqa: E731
        launched.wait_for(lambda: events("step"), START_S)
        launched.agents[0].kill()  # its workers end with it
        launched.wait_for(lambda: events("left"), START_S)
        step = events("step")[-1]["step"]
        launched.wait_for(lambda: events("step")[-1]["step"] > step + 10)
        served.kill()
        served.wait()
        served = serve(store, tmp_path)
        launched.wait_for(lambda: "restarted" in str(events("left")) or events("step")[-1]["step"] > step + 50, START_S)
        start_node(launched, run, 0, processes=2, resume=True, module=FORKED, more=lines[0])
        launched.wait_for(lambda: events("joined"), START_S)
        assert launched.end(START_S) == [0, 0], launched.all_said()
    finally:
        launched.kill()
        served.kill()
    assert [event["devices"] for event in events("left")] == [[0, 1]]
    assert [event["step"] for event in events("step")] == list(range(1, 3001))


def events_of_node_1(launched: Launched, kind: str) -> list[dict[str, Any]]:
    """Return the events that node 1 has written: all nodes' processes know all figures."""
    other = Launched(launched.folder, folders={0: launched.node_folder(1)})
    return other.events(kind)


def serve(where: str, folder: Path) -> Child:
    """Start a store."""
    with (folder / "store.txt").open("a") as said:
        command = [sys.executable, "-m", "ltecli", "store", "--listen", where]
        return Child(command, stdout=said, stderr=subprocess.STDOUT, env=environment(LTE_SECRET=SECRET))


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody uses."""
    found = []
    for _ in range(count):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            found.append(free.getsockname()[1])
    return found
