"""The network laboratory itself: rates, delays, counters, cables, and that nothing of it stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import ROOT, Child, run
from tests.network import namespaces
from tests.network.lab import Lab, Process, why_not
from tests.network.probes import PORT, round_trips_s, start, transfer

TRIES = 10
"""A busy machine may keep a transfer from its link's rate; no machine lets it exceed that."""
HEADER_SHARE = 66 / 1448
"""Ethernet, IPv4 and TCP with time stamps, in front of a full segment."""

OpenLab = Callable[..., Lab]


@pytest.mark.parametrize(("bytes_per_s", "num_bytes", "least"), [(1.25e6, 1_000_000, 0.94), (12.5e6, 8_000_000, 0.7)])
def test_a_link_carries_its_rate(open_lab: OpenLab, bytes_per_s: float, num_bytes: int, least: float) -> None:
    lab = open_lab(2, bytes_per_s=bytes_per_s)
    payload_bytes_per_s = bytes_per_s / (1 + HEADER_SHARE)
    for _ in range(TRIES):
        arrived = transfer(lab[0], lab[1], num_bytes)
        assert arrived < 1.04 * payload_bytes_per_s
        if arrived > least * payload_bytes_per_s:
            return
    pytest.fail(f"{arrived:.3g} bytes/s for {payload_bytes_per_s:.3g}")


def test_a_link_is_shaped_anew_while_it_is_used(open_lab: OpenLab) -> None:
    lab = open_lab(2, bytes_per_s=12.5e6)
    lab[1].shape(12.5e6, down_bytes_per_s=1.25e6)
    assert transfer(lab[0], lab[1], 500_000) < 1.3e6
    assert transfer(lab[1], lab[0], 2_000_000) > 3e6  # the other way is as fast as before
    lab[0].shape(1.25e6)
    assert transfer(lab[1], lab[0], 500_000) < 1.3e6
    for node in lab:
        node.shape(None)
    assert transfer(lab[0], lab[1], 2_000_000) > 3e6


def test_counters_say_what_crossed_the_wire(open_lab: OpenLab) -> None:
    lab = open_lab(3, bytes_per_s=12.5e6)
    before = [node.counters() for node in lab]
    transfer(lab[0], lab[1], 2_000_000)
    sent, received, idle = (node.counters() - earlier for node, earlier in zip(lab, before, strict=True))
    expected = pytest.approx(2_000_000 * (1 + HEADER_SHARE), rel=0.01)
    assert sent.sent_bytes == expected
    assert received.received_bytes == expected
    assert sent.sent_packets == pytest.approx(2_000_000 / 1448, rel=0.02)
    assert idle.sent_bytes == 0
    assert idle.received_bytes < 1000  # others ask who has which address


def test_a_pulled_cable_stops_traffic_until_it_is_back(open_lab: OpenLab) -> None:
    lab = open_lab(2, bytes_per_s=1.25e6)
    receiver = start(lab[1], "receive", PORT)
    sender = start(lab[0], "send", lab[1].address, PORT, 1_000_000)
    with sender, receiver:
        while lab[1].counters().received_bytes < 200_000:
            time.sleep(0.02)
        lab[1].link_down()
        stopped = lab[1].counters().received_bytes
        time.sleep(0.5)
        assert lab[1].counters().received_bytes == stopped
        assert sender.poll() is None
        lab[1].link_up()
        assert receiver.communicate(timeout=20)[0].split()[0] == "1000000"
        assert sender.wait(5) == 0


def test_nodes_are_near_unless_a_delay_is_set(open_lab: OpenLab) -> None:
    assert min(round_trips_s(*open_lab(2))) < 0.005
    delayed = open_lab(3, delay_s=0.02, bytes_per_s=12.5e6)
    assert 0.04 <= min(round_trips_s(delayed[0], delayed[2])) < 0.05
    assert transfer(delayed[0], delayed[1], 1_000_000) < 12.5e6 / 1.5  # TCP starts slowly over a long way


def test_loss_drops_its_share(open_lab: OpenLab) -> None:
    lab = open_lab(2, loss=0.2)
    send = "import socket; s = socket.socket(2, 2)\nfor _ in range(1000): s.sendto(bytes(99), ('10.77.0.2', 9))"
    lab[0].run([sys.executable, "-c", send])
    while lab[1].counters().received_packets < 700:
        time.sleep(0.1)
    time.sleep(0.3)
    # About 200 are lost; five standard deviations are 63. The answers, "nobody listens", go the other way.
    assert 730 < lab[1].counters().received_packets < 870


def test_two_labs_do_not_see_each_other(open_lab: OpenLab) -> None:
    one, two = open_lab(2, bytes_per_s=1.25e6), open_lab(2, bytes_per_s=1.25e6)
    assert one[0].address == two[0].address
    before = two[0].counters()
    transfer(one[1], one[0], 100_000)
    assert two[0].counters() == before
    transfer(two[1], two[0], 100_000)


def interfaces() -> str:
    return re.sub(r"@\w+", "", namespaces.run_tool("ip", "-br", "link"))


def test_leaving_reports_and_kills_what_is_left_and_leaves_nothing(open_lab: OpenLab) -> None:
    del open_lab  # only for its skip: this lab leaves processes on purpose
    before = interfaces()
    with Lab(2, delay_s=0.001) as lab:
        assert lab.processes() == []
        shell = lab[1].popen(["sh", "-c", "sleep 1234 & exec sleep 5678"])
        # A process that is just becoming another one has no command line for a moment.
        while {process.command for process in lab.processes()} != {"sleep 1234", "sleep 5678"}:
            time.sleep(0.01)
        relay = lab.relay.process if lab.relay else None
        inside = lab.processes()
    assert lab.left_behind == inside
    assert len(inside) == 2
    assert {process.node for process in inside} == {1}
    assert not any("sleep" in namespaces.command_line(process.pid) for process in inside)
    assert shell.returncode == -signal.SIGKILL
    assert relay is not None
    assert relay.returncode is not None
    assert not {lab.switch, *(node.namespace for node in lab)} & set(namespaces.names())
    assert interfaces() == before


LEAVES_A_PROCESS = """
from tests.network.fixtures import open_lab

def test_it(open_lab):
    lab = open_lab(1)
    lab[0].popen(["sleep", "1234"])
    while [process.command for process in lab.processes()] != ["sleep 1234"]:
        pass
"""


def test_the_fixture_fails_a_test_that_leaves_a_process(open_lab: OpenLab, tmp_path: Path) -> None:
    del open_lab
    (tmp_path / "test_it.py").write_text(LEAVES_A_PROCESS)
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", f"{tmp_path}/test_it.py"]
    done = run(argv, cwd=ROOT)
    assert "1 passed, 1 error" in done.stdout
    assert re.search("left running in the lab.*sleep 1234", done.stdout)


OWNER = """
import sys, time
from tests.network.lab import Lab
with Lab(2, delay_s=0.001) as lab:
    lab[0].popen(["sleep", "1234"])
    while not lab[0].processes():
        time.sleep(0.01)
    print(lab[0].namespace, lab[1].namespace, lab.switch, flush=True)
    time.sleep(60)
"""


def test_labs_of_killed_owners_are_swept(open_lab: OpenLab) -> None:
    mine = open_lab(1)
    with Child([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        stale = owner.stdout.readline().split()
        assert not set(namespaces.sweep()) & set(stale)  # its owner lives
        owner.kill()
        owner.wait()
    assert set(stale) <= set(namespaces.names())
    pids = [pid for name in stale for pid in namespaces.pids_in(name)]
    assert len(pids) == 2  # the sleeper and the relay
    assert set(stale) <= set(namespaces.sweep())
    assert not set(stale) & set(namespaces.names())
    assert not any(namespaces.command_line(pid).startswith("sleep") for pid in pids)
    assert mine[0].namespace in namespaces.names()


def test_a_process_that_was_only_just_started_is_reported(open_lab: OpenLab) -> None:
    del open_lab
    with Lab(1) as lab:
        process = lab[0].popen(["sleep", "1234"])
    assert [left.pid for left in lab.left_behind] == [process.pid]
    assert process.returncode == -signal.SIGKILL


def test_a_lab_that_cannot_be_made_says_why_and_leaves_nothing(open_lab: OpenLab) -> None:
    del open_lab
    before = {name for name in namespaces.names() if f"-{os.getpid()}-" in name}
    with pytest.raises(ValueError, match="a rate is above 0, not -1"), Lab(2, bytes_per_s=-1.0):
        pass
    assert {name for name in namespaces.names() if f"-{os.getpid()}-" in name} == before
    with pytest.raises(ValueError, match="1 to 250 nodes, not 0"):
        Lab(0)


def test_processes_are_told_by_node(open_lab: OpenLab) -> None:
    lab = open_lab(2)
    sleeper = lab[1].popen(["sleep", "1234"])
    while not lab[1].processes() or lab[1].processes()[0].command != "sleep 1234":
        time.sleep(0.01)
    assert lab.processes() == [Process(1, sleeper.pid, "sleep 1234")]
    assert lab[1].kill() == [Process(1, sleeper.pid, "sleep 1234")]
    assert lab.processes() == []


def test_machines_without_what_it_takes_say_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not.__wrapped__() == "no ip and no tc (Debian package iproute2)"
    for name in ("ip", "tc"):
        (tmp_path / name).write_text("#!/bin/sh\necho not permitted >&2; exit 1")
        (tmp_path / name).chmod(0o755)
    refused = why_not.__wrapped__()
    assert refused is not None
    assert "do not work here: ip netns list: not permitted" in refused
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not.__wrapped__() == "network namespaces need root"
