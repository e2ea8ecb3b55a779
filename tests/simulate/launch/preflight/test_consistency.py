"""Nodes' facts beside node 0's, and the clocks behind one of them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from simulate.config.run import build_run
from simulate.launch.preflight.channel import BadFrameError
from simulate.launch.preflight.clock_offset import sample
from simulate.launch.preflight.consistency import Verdict, compare
from simulate.launch.preflight.node_info import NodeFacts, flat_table, parse_facts
from tests.simulate.launch.preflight.nodes import facts


def node(number: int = 1, run: dict[str, Any] | None = None, offset_s: float = 0.0, **changes: Any) -> NodeFacts:
    place = {"nodes": 2, "interface": "eth0", "address": f"192.168.1.{5 + number}", "link_port": 4000}
    made = facts(build_run(run or {}), **changes)
    return NodeFacts(**made.model_dump(), node=number, clock_offset_s=offset_s, **place)


def verdict(hub: NodeFacts | None = None, **changes: Any) -> Verdict:
    return compare([hub or node(0), node(1, **changes)])


def test_equal_nodes_agree() -> None:
    assert verdict() == Verdict([], [])


def test_a_differing_run_names_key_and_values() -> None:
    hub = node(0, {"method": {"name": "lte", "rank": 32, "alpha": 64.0}})
    assert verdict(hub, run={"method": {"name": "lte", "rank": 16, "alpha": 64.0}}).errors == [
        "node 1 (192.168.1.6): its run.toml differs from node 0's (method.rank = 32 on node 0, 16 on node 1); "
        "copy node 0's run.toml to it"
    ]


def test_many_differing_keys_are_counted() -> None:
    other = {"train": {"steps": 7, "seed": 3, "micro_batch": 2, "learning_rate": 0.1, "weight_decay": 0.1}}
    (line,) = verdict(run=other).errors
    assert line.count("on node 0") == 3
    assert "; 2 more)" in line


def test_a_key_that_one_side_lacks_is_not_set() -> None:
    (line,) = verdict(run={"data": {"name": "stdlib", "shards": [1.0, 2.0, 1.0, 1.0]}}).errors
    assert "data.shards = not set on node 0, [1.0, 2.0, 1.0, 1.0] on node 1" in line


def test_equal_tables_of_another_digest_differ_too() -> None:
    hub = node(0).model_copy(update={"run_fingerprint": "f" * 64})
    assert "digest ffffffff on node 0" in verdict(hub).errors[0]


def test_differing_data_tells_size_and_digest() -> None:
    run = {"data": {"path": "texts"}}
    (line,) = verdict(node(0, run), run=run, data_bytes=1_999_000, data_fingerprint="99ff" * 16).errors
    assert line == (
        "node 1 (192.168.1.6): its data has other content (2,000,000 bytes with digest ab12ab12 on node 0, "
        "1,999,000 bytes with digest 99ff99ff on node 1); copy node 0's data to it"
    )


def test_the_standard_library_cannot_be_copied() -> None:
    assert "give all nodes one text (--data PATH)" in verdict(data_fingerprint="99ff" * 16).errors[0]


def test_another_lte_is_the_reason_and_not_its_run_table() -> None:
    assert verdict(lte="0.2.0", run={"train": {"seed": 3}}).errors == [
        "node 1 (192.168.1.6): its lte is 0.2.0, node 0's is 0.1.0; install the same version on both"
    ]


def test_another_torch_is_an_error_and_another_build_a_warning() -> None:
    assert "its torch is 2.12.0+cpu, node 0's is 2.13.0+cpu" in verdict(torch="2.12.0+cpu").errors[0]
    other_build = verdict(torch="2.13.0+cu126")
    assert not other_build.errors
    assert "another build (2.13.0+cu126)" in other_build.warnings[0]


@pytest.mark.parametrize(
    ("offset_s", "errors", "warnings"), [(0.9, 0, 0), (-1.5, 0, 1), (59.0, 0, 1), (61.0, 1, 0), (-7200.0, 1, 0)]
)
def test_clocks(offset_s: float, errors: int, warnings: int) -> None:
    found = verdict(offset_s=offset_s)
    assert (len(found.errors), len(found.warnings)) == (errors, warnings)
    for line in (*found.errors, *found.warnings):
        assert f"{abs(offset_s):,.1f} s {'ahead of' if offset_s > 0 else 'behind'} node 0's" in line


def test_each_difference_of_each_node_is_a_line() -> None:
    found = compare([node(0), node(1, torch="2.6.0", offset_s=100.0), node(2, data_bytes=1)])
    assert [line.partition(" (")[0] for line in found.errors] == ["node 1", "node 1", "node 2"]


def test_what_a_terminal_would_obey_is_not_shown() -> None:
    found = verdict(lte="0.1\x1b[2J\n", data_fingerprint="\x1b]0;x")
    assert "\x1b" not in str(found.errors) + found.errors[0] + found.errors[1]
    assert "\n" not in found.errors[0]
    other = node(1).model_copy(update={"run": {"data.path": "\x1b[2J\n" * 100}, "run_fingerprint": "x"})
    (line,) = compare([node(0).model_copy(update={"run": {}}), other]).errors
    assert line.isprintable()
    assert len(line) < 300


def test_an_exchange_of_four_times() -> None:
    # Sent at 10, received at 112.5 by a clock that is 100 ahead, returned at 113, back at 14: 2.5 s there, 1 s back.
    taken = sample(10.0, 112.5, 113.0, 14.0)
    assert taken.delay_s == 3.5
    assert taken.offset_s == 100.75  # wrong by half of what the two ways differ


def test_a_flat_table_is_what_json_keeps() -> None:
    assert flat_table({"a": {"b": 1, "c": {"d": (1, 2)}}, "e": None}) == {"a.b": 1, "a.c.d": [1, 2]}
    run = build_run({"data": {"name": "stdlib", "shards": [1.0, 1.0, 1.0, 2.0]}})
    assert flat_table(run.model_dump())["data.shards"] == [1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node", -1),
        ("node", "1"),
        ("nodes", 0),
        ("address", "somewhere"),
        ("link_port", 70000),
        ("lte", "x" * 1000),
        ("clock_offset_s", "now"),
        ("processes", 0),
        ("run", [1]),
        ("surprise", 1),
    ],
)
def test_facts_are_checked_as_they_arrive(field: str, value: object) -> None:
    given = {**node().model_dump(), field: value}
    with pytest.raises(BadFrameError, match=f"facts that cannot be read .{field}"):
        parse_facts(given)


def test_facts_survive_the_way() -> None:
    import json

    begin = time.perf_counter()
    assert parse_facts(json.loads(json.dumps(node().model_dump()))) == node()
    assert time.perf_counter() - begin < 1
    for nothing in (None, [], "x", 3):
        with pytest.raises(BadFrameError):
            parse_facts(nothing)
