"""Nodes, links and disks that fail under a launched run, in a network laboratory of three nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch.runs import (
    LOSS_TOLERANCE,
    Launched,
    figures_of,
    interrupt,
    launched_run,
    simulated_loss,
    start_node,
    tiny_run,
)
from tests.network.lab import Lab

pytestmark = pytest.mark.slow
SAME = 1e-9
BYTES_PER_S = 12.5e6
OpenLab = Callable[..., Lab]


def kill_node(launched: Launched, node: int) -> None:
    """Kill a node's agent and all its workers at once, as a power cut does."""
    for process in launched.processes(node):
        process.kill()
    launched.agents[node].wait()


def gone_on_after(launched: Launched, restarts: int) -> Callable[[], bool]:
    """Whether steps were done after that many restarts."""

    def condition() -> bool:
        events = launched.events()
        places = [index for index, event in enumerate(events) if event["kind"] == "restart"]
        return len(places) >= restarts and any(e["kind"] == "step" for e in events[places[restarts - 1] :])

    return condition


def test_a_lost_node_is_done_without_and_taken_in_again(tmp_path: Path, open_lab: OpenLab) -> None:
    run = tiny_run(tmp_path, steps=1500, min_devices=2, rejoin_s=3)
    lab = open_lab(3, bytes_per_s=BYTES_PER_S)
    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(20)
        (measured,) = launched.events("links")
        assert [(edge["sender"], edge["receiver"]) for edge in measured["links"]] == [(0, 1), (1, 2), (2, 0)]
        kill_node(launched, 2)
        launched.wait_for(gone_on_after(launched, 1))
        assert launched.events("restart")[0]["processes"] == 2
        start_node(launched, run, 2, processes=1, lab=lab, resume=True)
        launched.wait_for(lambda: any(event["processes"] == 3 for event in launched.events("restart")))
        assert launched.end(300) == [0, 0, 0], launched.all_said()
        assert all(event["repeated_steps"] <= 5 for event in launched.events("restart"))
        assert "comes back" in launched.said(0)
    alone = simulated_loss(run, tmp_path / "alone")
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(alone, rel=LOSS_TOLERANCE)


def test_without_a_minimum_the_run_waits_for_the_lost_node(tmp_path: Path, open_lab: OpenLab) -> None:
    run, lab = tiny_run(tmp_path, steps=600), open_lab(3, bytes_per_s=BYTES_PER_S)
    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(20)
        kill_node(launched, 1)
        time.sleep(8)
        assert not launched.events("restart")
        start_node(launched, run, 1, processes=1, lab=lab, resume=True)
        assert launched.end() == [0, 0, 0], launched.all_said()
        assert len(launched.events("restart")) >= 1
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


def test_a_node_that_does_not_return_ends_the_run(tmp_path: Path, open_lab: OpenLab) -> None:
    run, lab = tiny_run(tmp_path, steps=100_000, join_timeout_s=15), open_lab(3, bytes_per_s=BYTES_PER_S)
    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(20)
        kill_node(launched, 2)
        codes = launched.end(90)
        assert codes[:2] == [1, 1], launched.all_said()
        assert "saved: " in launched.said(0) and "saved: " in launched.said(1)


def test_without_node_0_the_others_end_and_all_can_go_on(tmp_path: Path, open_lab: OpenLab) -> None:
    run, lab = tiny_run(tmp_path, steps=1500), open_lab(3, bytes_per_s=BYTES_PER_S)
    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(20)
        launched.agents[0].kill()
        codes = launched.end(60)
        assert codes[1:] == [1, 1], launched.all_said()
        for node in (1, 2):
            assert (
                f"lte: node {node}: node 0 is gone, and the run with it; saved: "
                in launched.said(node).splitlines()[-1]
            )
        for node in range(3):
            start_node(launched, run, node, 1, lab, resume=True)
        assert launched.end() == [0, 0, 0], launched.all_said()
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


@pytest.mark.parametrize("timeout_s", [60, 6])
def test_a_link_that_is_down_for_20_s(tmp_path: Path, open_lab: OpenLab, timeout_s: int) -> None:
    run, lab = tiny_run(tmp_path, steps=600, timeout_s=timeout_s), open_lab(3, bytes_per_s=BYTES_PER_S)
    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(20)
        lab[2].link_down()
        time.sleep(20)
        lab[2].link_up()
        assert launched.end() == [0, 0, 0], launched.all_said()
        assert bool(launched.events("restart")) == (timeout_s < 20), launched.all_said()
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


def test_a_link_that_never_comes_back(tmp_path: Path, open_lab: OpenLab) -> None:
    run, lab = tiny_run(tmp_path, 100_000, timeout_s=6, join_timeout_s=15), open_lab(3, bytes_per_s=BYTES_PER_S)
    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(20)
        lab[2].link_down()
        assert launched.end(120) == [1, 1, 1], launched.all_said()
        assert "silent: process 2 on node 2" in launched.said(0)
        assert "node 2: node 0 has not answered for" in launched.said(2)
        assert all("saved: " in launched.said(node) for node in range(3))


def test_a_node_that_is_five_times_slower_fails_nothing(tmp_path: Path, open_lab: OpenLab) -> None:
    run, lab = tiny_run(tmp_path, steps=600), open_lab(3, bytes_per_s=BYTES_PER_S)
    done = threading.Event()

    def slow_down(worker: psutil.Process) -> None:
        while not done.wait(0.02):  # runs for a fifth of the time
            try:
                worker.suspend()
                time.sleep(0.08)
                worker.resume()
            except psutil.NoSuchProcess:
                return

    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(5)
        thread = threading.Thread(target=slow_down, args=(launched.workers(1)[0],))
        thread.start()
        try:
            assert launched.end() == [0, 0, 0], launched.all_said()
        finally:
            done.set()
            thread.join()
        assert not launched.events("restart")
    print(figures_of(launched))
    assert launched.val_loss() == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


@pytest.mark.parametrize("node", [0, 1])
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(
    tmp_path: Path, open_lab: OpenLab, node: int
) -> None:
    run, lab = tiny_run(tmp_path, steps=1500), open_lab(3, bytes_per_s=BYTES_PER_S)
    disk = tmp_path / "run" / f"disk{node}"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    try:
        with launched_run(tmp_path / "run", run, processes=1, lab=lab, folders={node: disk / "run"}) as launched:
            launched.wait_for_step(20)
            fill(disk / "filler")
            assert launched.end(90) == [1, 1, 1], launched.all_said()
            for k in range(3):
                assert f"on node {node}: No space left on device on the file system {disk}" in launched.said(k)
            (disk / "filler").unlink()
            for k in range(3):
                start_node(launched, run, k, 1, lab, resume=True)
            assert launched.end() == [0, 0, 0], launched.all_said()
            loss, figures = launched.val_loss(), figures_of(launched)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    print(figures)
    assert loss == pytest.approx(simulated_loss(run, tmp_path / "alone"), rel=SAME)


def fill(path: Path) -> None:
    """Write a file until there is no room."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))


def test_ctrl_c_on_any_node_stops_all(tmp_path: Path, open_lab: OpenLab) -> None:
    run, lab = tiny_run(tmp_path, steps=100_000), open_lab(3, bytes_per_s=BYTES_PER_S)
    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(20)
        os.kill(launched.agents[2].pid, signal.SIGINT)
        assert launched.end(60) == [130, 130, 130], launched.all_said()
        assert all("saved; continue with lte train" in launched.said(node) for node in range(3))


def test_ctrl_c_ends_the_wait_for_a_lost_node(tmp_path: Path, open_lab: OpenLab) -> None:
    run, lab = tiny_run(tmp_path, steps=100_000, join_timeout_s=300), open_lab(3, bytes_per_s=BYTES_PER_S)
    with launched_run(tmp_path / "run", run, processes=1, lab=lab) as launched:
        launched.wait_for_step(20)
        kill_node(launched, 2)
        time.sleep(5)
        interrupt(launched.agents[1])
        assert launched.end(60)[:2] == [130, 130], launched.all_said()
        assert "saved: " in launched.said(0)
