"""Several nodes over loopback: that they agree, what each refusal says, and that everything ends in time."""

from __future__ import annotations

import dataclasses
import gc
import json
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil
import pytest

from simulate.common.errors import InputError, RunFailedError
from simulate.config.hardware import Link
from simulate.config.run import build_run
from simulate.launch import heartbeat
from simulate.launch.preflight import joining_node as joiner_module
from simulate.launch.preflight import link_tests as link_tests_module
from simulate.launch.preflight.channel import PeerGoneError
from simulate.launch.preflight.link_tests import LinkPlan
from simulate.launch.preflight.node_info import NodeFacts
from simulate.launch.preflight.preflight import open_preflight
from simulate.launch.preflight.settings import Preflight, Settings
from tests.harness import environment, run
from tests.simulate.launch.preflight.nodes import (
    QUICK,
    SECRET,
    SECRET_TEXT,
    Node,
    crew,
    facts,
    free_port,
    join_by_hand,
    run_all,
    started,
    wait_until,
)


def failing(nodes: Sequence[Node], kind: type[Exception]) -> str:
    """Run nodes that must all fail alike; returns the one line."""
    run_all(nodes)
    assert [type(node.error) for node in nodes] == [kind] * len(nodes), [node.error for node in nodes]
    (line,) = {str(node.error) for node in nodes}
    assert "\n" not in line
    return line


def test_three_nodes_agree_and_measure_the_ring() -> None:
    nodes = crew(3)
    run_all(nodes)
    assert [node.error for node in nodes] == [None] * 3
    hub, *others = (node.result for node in nodes)
    assert hub is not None
    assert all(other == dataclasses.replace(hub, nodes=other.nodes) for other in others if other)
    assert [node.node for node in hub.nodes] == [0, 1, 2]
    assert {(node.interface, node.address) for node in hub.nodes} == {("lo", "127.0.0.1")}
    assert [(link.sender, link.receiver) for link in hub.links] == [(0, 1), (1, 2), (2, 0)]
    for link in hub.links:
        assert 0 < link.latency_s < 0.05
        assert link.bytes_per_s > 1e6 and link.loaded_bytes_per_s > 1e6
        assert 0 < link.sent_bytes <= 2 * QUICK.limits.budget_bytes
    assert hub.warnings == []
    assert all(abs(node.clock_offset_s) < 0.1 for node in hub.nodes)


def test_all_nodes_get_the_same_result() -> None:
    nodes = crew(2)
    nodes[1].now = lambda: time.time() + 5
    run_all(nodes)
    assert nodes[0].result == nodes[1].result
    assert json.loads(json.dumps(nodes[0].result.to_json())) == nodes[0].result.to_json()  # type: ignore[union-attr]
    assert nodes[0].result.nodes[1].clock_offset_s == pytest.approx(5, abs=0.1)  # type: ignore[union-attr]
    assert any("its clock is 5.0 s ahead of" in line for line in nodes[0].lines)
    assert any("its clock is 5.0 s ahead of" in line for line in nodes[1].lines)


def test_progress_is_told() -> None:
    nodes = crew(2)
    run_all(nodes)
    told = "\n".join(nodes[0].lines)
    for part in ("listening on 127.0.0.1:", "(lo); waiting for node 1", "node 1 (127.0.0.1) joined", "all 2 nodes"):
        assert part in told
    assert "node 1 to node 0:" in told
    assert "joined node 0 at" in nodes[1].lines[0]


@pytest.mark.parametrize("what", ["all well", "another run", "nobody comes", "nobody there"])
def test_nothing_stays_open(what: str) -> None:
    nodes = crew(3, join_timeout_s=0.3 if "nobody" in what else 10)
    if what == "another run":
        nodes[2].facts = facts(build_run({"train": {"seed": 9}}))
    first, last = {"nobody comes": (0, 1), "nobody there": (1, 3)}.get(what, (0, 3))
    gc.collect()
    before = psutil.Process().num_fds()
    run_all(nodes[first:last])
    assert psutil.Process().num_fds() <= before  # what other tests left behind may have been closed meanwhile
    assert [node.error is None for node in nodes[first:last]] == [what == "all well"] * (last - first)


def test_one_node_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    with open_preflight(Settings(node=0, nodes=1), facts()) as preflight:
        result = preflight.run()
        assert preflight.broadcast({"port": 1}, 1) == {"port": 1}
        preflight.barrier("start", 1)
    assert [node.title for node in result.nodes] == ["node 0"]
    assert result.links == []


def test_loopback_needs_no_secret() -> None:
    nodes = crew(2, secret=None)
    run_all(nodes)
    assert nodes[0].result and nodes[0].result == nodes[1].result


def test_over_ipv6() -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    nodes = crew(2, join=f"[::1]:{free_port()}")
    run_all(nodes)
    assert nodes[0].result and nodes[0].result == nodes[1].result
    assert nodes[1].result.nodes[1].address == "::1"  # type: ignore[union-attr]


def test_only_the_given_address_is_listened_on() -> None:
    port = free_port()
    nodes = crew(2, join=f"127.0.0.2:{port}")
    with started(*nodes[:1]):
        wait_until(lambda: bool(nodes[0].lines))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
        nodes[1].run()
    assert nodes[1].result is not None


def test_a_payload_and_a_barrier_reach_everybody() -> None:
    nodes = crew(3)
    passed: list[float] = []

    def after(preflight: Preflight) -> Any:
        if preflight.settings.node == 2:
            time.sleep(0.1)
        payload = preflight.broadcast({"ports": [1, 2]} if preflight.settings.node == 0 else None, 5)
        if preflight.settings.node == 1:
            time.sleep(0.1)
        preflight.barrier("start", 5)
        passed.append(time.monotonic())
        return payload

    for node in nodes:
        node.after = after
    run_all(nodes)
    assert [node.error for node in nodes] == [None] * 3
    assert [node.returned for node in nodes] == [{"ports": [1, 2]}] * 3
    assert max(passed) - min(passed) < 0.2


def test_the_port_is_free_once_all_are_there() -> None:
    nodes = crew(2)

    def after(preflight: Preflight) -> None:
        if preflight.settings.node == 0:
            with socket.create_server(("127.0.0.1", int(str(preflight.settings.join).rpartition(":")[2]))):
                pass
        preflight.barrier("start", 5)

    for node in nodes:
        node.after = after
    run_all(nodes)
    assert [node.error for node in nodes] == [None] * 2


def test_a_node_that_does_not_reach_the_barrier_is_named_to_all() -> None:
    nodes = crew(3)
    nodes[0].after = nodes[2].after = lambda preflight: preflight.barrier("start", 0.3)
    nodes[2].after = lambda preflight: preflight.barrier("start", 5)
    nodes[1].after = lambda preflight: time.sleep(0.5)
    run_all(nodes)
    line = "node 1 (127.0.0.1) did not answer within 0.3 s while node 0 waited for it at 'start'; see its output"
    assert (str(nodes[0].error), str(nodes[2].error)) == (line, line)
    assert isinstance(nodes[0].error, RunFailedError)


def test_another_barrier_is_no_barrier() -> None:
    nodes = crew(2)
    nodes[0].after = lambda preflight: preflight.barrier("start", 2)
    nodes[1].after = lambda preflight: preflight.barrier("stop", 2)
    assert "node 1 (127.0.0.1) is not at 'start' but at 'stop'" in failing(nodes, RunFailedError)


def test_a_payload_that_never_comes_is_given_up() -> None:
    nodes = crew(2)
    nodes[0].after = lambda preflight: time.sleep(0.4)
    nodes[1].after = lambda preflight: preflight.broadcast(None, 0.2)
    run_all(nodes)
    assert "did not answer within 0.2 s before this node had its payload" in str(nodes[1].error)
    assert isinstance(nodes[1].error, RunFailedError)


def test_node_0_going_away_is_named() -> None:
    nodes = crew(2)
    nodes[1].after = lambda preflight: preflight.broadcast(None, 5)
    run_all(nodes)
    assert "before this node had its payload; see its output" in str(nodes[1].error)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"run": build_run({"method": {"name": "lte", "rank": 16, "alpha": 64.0}})},
            "node 2 (127.0.0.1): its run.toml differs from node 0's (method.rank = 32 on node 0, 16 on node 2); "
            "copy node 0's run.toml to it",
        ),
        ({"data_bytes": 1}, "its data has other content (2,000,000 bytes with digest ab12ab12 on node 0, 1 bytes"),
        ({"lte": "9.0"}, "node 2 (127.0.0.1): its lte is 9.0, node 0's is 0.1.0"),
        ({"torch": "2.6.0"}, "node 2 (127.0.0.1): its torch is 2.6.0"),
    ],
)
def test_what_differs_is_named_to_all(changes: dict[str, Any], line: str) -> None:
    nodes = crew(3)
    run = build_run({"method": {"name": "lte", "rank": 32, "alpha": 64.0}})
    for node in nodes:
        node.facts = facts(run)
    nodes[2].facts = facts(**{"run": run, **changes})
    assert line in failing(nodes, InputError)


def test_a_clock_far_off_is_an_error() -> None:
    nodes = crew(2)
    nodes[1].now = lambda: time.time() - 3600
    assert "node 1 (127.0.0.1): its clock is 3,600.0 s behind node 0's" in failing(nodes, InputError)


def test_several_findings_are_all_told_to_all() -> None:
    nodes = crew(3)
    nodes[1].facts, nodes[2].facts = facts(lte="9.0"), facts(torch="2.6.0", data_bytes=1)
    assert "(the first of 3 findings, all above)" in failing(nodes, InputError)
    for node in nodes:
        assert sum("install the same" in line or "other content" in line for line in node.lines) == 3


def test_the_launcher_adds_rules() -> None:
    nodes = crew(2)

    def check(nodes: Sequence[NodeFacts]) -> list[str]:
        total = sum(node.processes for node in nodes)
        return [f"the nodes start {total} processes for 3 devices"]

    nodes[0].check = check
    assert failing(nodes, InputError) == "the nodes start 2 processes for 3 devices"


def test_a_slow_link_is_warned_about_on_all_nodes() -> None:
    nodes = crew(2)
    nodes[0].planned = Link(topology="star", up_bytes_per_s=1e15, down_bytes_per_s=1e15, latency_s=0, source="guess")
    run_all(nodes)
    for node in nodes:
        assert node.result is not None
        assert len([line for line in node.result.warnings if "times less than" in line]) == 2
        assert sum(line.startswith("warning: node 0 to node 1 carries") for line in node.lines) == 1


def test_links_need_not_be_measured() -> None:
    nodes = crew(2, links=QUICK.model_copy(update={"measure": False}))
    run_all(nodes)
    assert nodes[0].result and nodes[0].result == nodes[1].result
    assert nodes[0].result.links == []


def test_a_node_that_others_cannot_reach_is_named_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    real = link_tests_module.dial

    def firewalled(own: str, address: str, port: int, deadline: Any) -> socket.socket:
        if port == blocked[0] and own != "":
            raise TimeoutError
        return real(own, address, port, deadline)

    nodes = crew(3, links=QUICK.model_copy(update={"reach_s": 0.5}))
    blocked = [0]
    nodes[0].check = lambda nodes: blocked.__setitem__(0, nodes[2].link_port) or ()  # type: ignore[func-returns-value]
    monkeypatch.setattr(link_tests_module, "dial", firewalled)
    line = failing(nodes, InputError)
    assert "node 0 (127.0.0.1) cannot reach node 2 at 127.0.0.1:" in line
    assert "no answer; workers need free ports between all nodes" in line
    assert any("node 1 (127.0.0.1) cannot reach node 2" in told for told in nodes[1].lines)


@pytest.mark.parametrize("where", [0, 1])
def test_a_link_that_breaks_while_it_is_measured_is_named(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = link_tests_module.LinkTester.measure_loaded

    def breaking(tester: Any) -> Any:
        if tester._node == where:
            raise PeerGoneError("broke the connection (connection reset by peer)")
        return real(tester)

    monkeypatch.setattr(link_tests_module.LinkTester, "measure_loaded", breaking)
    line = failing(crew(3), RunFailedError)
    assert f"the link from node {where} (127.0.0.1) to the next node failed while it was measured" in line


def test_a_missing_node_is_named_after_the_time_to_join() -> None:
    nodes = crew(3, join_timeout_s=0.5)
    begin = time.monotonic()
    line = failing(nodes[:2], RunFailedError)
    assert line == (
        f"node 2 did not join within 0.5 s; is its line started, and can it reach {nodes[0].settings.join}?"
    )
    assert time.monotonic() - begin < 3


def test_several_missing_nodes_are_named() -> None:
    nodes = crew(3, join_timeout_s=0.3)
    assert failing(nodes[:1], RunFailedError).startswith("nodes 1, 2 did not join within 0.3 s; are their lines")


def test_node_0_that_is_not_there_is_named() -> None:
    nodes = crew(2, join_timeout_s=0.3)
    begin = time.monotonic()
    line = failing(nodes[1:], RunFailedError)
    assert time.monotonic() - begin < 2
    assert line == (
        f"cannot reach {nodes[1].settings.join} within 0.3 s: connection refused; is node 0 started, is the port open? "
        "(this node calls from 127.0.0.1, lo)"
    )


def test_node_0_may_start_last() -> None:
    nodes = crew(2)
    with started(nodes[1]):
        wait_until(lambda: any("connection refused" in line for line in nodes[1].lines))
        nodes[0].run()
    assert nodes[0].result and nodes[0].result == nodes[1].result


def test_two_nodes_of_one_number_are_told_apart() -> None:
    nodes = crew(3, join_timeout_s=5)
    twin = Node(nodes[1].settings, nodes[1].facts)
    with started(nodes[0], nodes[1]):
        wait_until(lambda: any("node 1 (127.0.0.1) joined" in line for line in nodes[0].lines))
        twin.run()
        nodes[2].run()
    assert "two nodes claim number 1, 127.0.0.1 and 127.0.0.1; give each machine its own --node" in str(twin.error)
    assert isinstance(twin.error, InputError)
    assert any("refused 127.0.0.1: two nodes claim number 1" in line for line in nodes[0].lines)
    assert [node.error for node in nodes] == [None] * 3  # the others did not have to start again


def test_a_node_that_was_restarted_takes_its_place_again() -> None:
    nodes = crew(3)
    with started(nodes[0]):
        join_by_hand(nodes[0], 1).close()
        wait_until(lambda: any("node 1 (127.0.0.1) has left; waiting for nodes 1, 2" in x for x in nodes[0].lines))
        threads = [threading.Thread(target=node.run) for node in nodes[1:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert [node.error for node in nodes] == [None] * 3


def test_a_node_that_answers_no_more_gives_up_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "ANSWER_S", 0.2)
    nodes = crew(2)
    nodes = [*nodes[:1], Node(dataclasses.replace(nodes[1].settings), nodes[1].facts)]
    hub = nodes[0]
    hub.settings = dataclasses.replace(hub.settings, nodes=3)
    nodes[1].settings = dataclasses.replace(nodes[1].settings, nodes=3)
    last = Node(dataclasses.replace(nodes[1].settings, node=2), facts())
    with started(hub):
        frozen = join_by_hand(hub, 1)  # its machine lost power: no close, and no answer any more
        wait_until(lambda: any("node 1 (127.0.0.1) joined" in line for line in hub.lines))
        with started(nodes[1], last):
            pass
        frozen.close()
    assert [node.error for node in (*nodes, last)] == [None] * 3


@pytest.mark.parametrize(
    ("number", "nodes", "why"),
    [
        (3, 5, "node 3 expects 5 nodes, node 0 expects 2; give all the same --nodes"),
        (1, 3, "node 1 expects 3 nodes, node 0 expects 2"),
    ],
)
def test_a_node_that_counts_otherwise_is_refused(number: int, nodes: int, why: str) -> None:
    pair = crew(2)
    stranger = Node(dataclasses.replace(pair[1].settings, node=number, nodes=nodes), facts())
    with started(pair[0]):
        stranger.run()
        pair[1].run()
    assert isinstance(stranger.error, InputError)
    assert f"node 0 ({pair[0].settings.join}) refused this node: {why}" in str(stranger.error)
    assert [node.error for node in pair] == [None] * 2


@pytest.mark.parametrize(
    ("number", "changes", "why"),
    [
        (7, {}, "node number 7 is out of range: --nodes is 2, so numbers go from 0 to 1"),
        (0, {}, "two nodes claim number 0, it and this one"),
        (1, {"node": 0}, "it proved to be node 1 and claims to be node 0"),
        (1, {"address": "8.8.8.8"}, "uses the public address 8.8.8.8; add --trust-network on node 0"),
    ],
)
def test_a_claim_that_cannot_be_is_refused(number: int, changes: dict[str, Any], why: str) -> None:
    pair = crew(2)
    with started(pair[0]):
        channel = join_by_hand(pair[0], number, **changes)
        wait_until(lambda: any(why in line for line in pair[0].lines))
        channel.close()
        pair[1].run()
    assert [node.error for node in pair] == [None] * 2


def test_an_address_behind_nat_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    real = joiner_module.dial
    monkeypatch.setattr(joiner_module, "dial", lambda own, *rest: real("127.0.0.2", *rest))
    nodes = crew(2)
    run_all(nodes)
    assert nodes[1].result is not None
    assert nodes[1].result.warnings == [
        "node 1 (127.0.0.1) calls from 127.0.0.2, through a NAT; workers need direct connections"
    ]


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nodes = crew(2, join=f"127.0.0.1:{taken.getsockname()[1]}")
        line = failing(nodes[:1], InputError)
    assert "cannot listen on 127.0.0.1:" in line
    assert "address already in use" in line and "choose another port for all nodes" in line


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"node": 3, "nodes": 3}, "--node 3 is out of range: --nodes is 3, so numbers go from 0 to 2"),
        ({"node": -1, "nodes": 3}, "--node -1 is out of range"),
        ({"node": 0, "nodes": 0}, "--nodes 0 is not from 1 to 1024"),
        ({"node": 0, "nodes": 2000}, "--nodes 2000 is not from 1 to 1024"),
        ({"node": 0, "nodes": 2}, "--nodes 2 needs --join HOST:PORT"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        Settings(**settings)


def test_a_network_needs_a_secret() -> None:
    settings = Settings(node=1, nodes=2, join="10.0.0.1:29400")
    with pytest.raises(InputError, match=r"need a shared secret.*--secret-file PATH or LTE_SECRET"):
        settings.key(loopback=False)
    assert dataclasses.replace(settings, secret=SECRET).key(loopback=False) is SECRET


JOIN_SCRIPT = """
import json, sys
from pathlib import Path
from simulate.config.run import build_run
from simulate.launch.preflight.node_info import Facts
from simulate.launch.preflight.preflight import open_preflight
from simulate.launch.preflight.secret import read_secret
from simulate.launch.preflight.settings import Settings
facts = Facts.of(build_run({}), lte="0.1.0", torch="2.13.0+cpu", data_fingerprint="ab12" * 16, data_bytes=2_000_000,
                 processes=1)
settings = Settings(node=1, nodes=2, join=sys.argv[1], secret=read_secret(None), join_timeout_s=20)
with open_preflight(settings, facts, log=lambda line: print(line, file=sys.stderr)) as preflight:
    result = preflight.run()
    print(json.dumps([result.to_json(), preflight.broadcast(None, 10)]))
"""


def test_two_processes() -> None:
    hub = crew(2, join_timeout_s=20)[0]
    hub.after = lambda preflight: preflight.broadcast({"port": 5}, 10)
    with started(hub):
        done = run([sys.executable, "-c", JOIN_SCRIPT, hub.settings.join], 30, env=environment(LTE_SECRET=SECRET_TEXT))
    assert done.code == 0, done.stderr
    assert hub.result is not None
    assert json.loads(done.stdout) == [hub.result.to_json(), {"port": 5}]
    assert SECRET_TEXT.splitlines()[1] not in done.stdout + done.stderr + hub.output


def test_the_default_plan_is_the_one_described() -> None:
    plan = LinkPlan()
    assert LinkPlan.model_validate(json.loads(json.dumps(plan.model_dump()))) == plan
    assert (plan.limits.aim_s, plan.limits.budget_bytes) == (1.0, 256 << 20)
