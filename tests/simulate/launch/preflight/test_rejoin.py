"""Nodes that come back while the run goes on: by the same proof and rules, and no second one of a number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from simulate.common.errors import InputError
from simulate.launch.preflight.settings import Preflight
from tests.simulate.launch.preflight.nodes import OTHER, Node, crew, facts, run_all, started

PAYLOAD = 4242


@contextmanager
def going_on(alive: set[int]) -> Iterator[list[Node]]:
    """Run a preflight of three nodes, then let node 0 accept nodes again that are not alive."""
    nodes = crew(3)
    opened = ExitStack()

    def after(preflight: Preflight) -> None:
        preflight.close()
        opened.enter_context(preflight.accept_rejoins(lambda: PAYLOAD, lambda number: number in alive))

    nodes[0].after = after
    with opened:
        with started(*nodes):
            pass
        assert all(node.error is None for node in nodes), [node.error for node in nodes]
        yield nodes


def again(node: Node, **changes: Any) -> Node:
    """Return a node that was lost, started anew; it hears node 0's broadcast."""
    returned = Node(node.settings, facts(**changes))
    returned.after = lambda preflight: (preflight.broadcast(None, 5.0), preflight.barrier("start", 5.0))[0]
    return returned


def test_a_lost_node_comes_back_and_gets_what_the_others_got() -> None:
    with going_on(alive={1}) as nodes:
        back = again(nodes[2])
        back.run()
        assert back.error is None
        assert back.returned == PAYLOAD
        assert back.result is not None and [node.node for node in back.result.nodes] == [0, 1, 2]
        assert any("node 2 (127.0.0.1) comes back" in line for line in nodes[0].lines)


def test_a_number_that_is_still_there_is_not_given_twice() -> None:
    with going_on(alive={1, 2}) as nodes:
        back = again(nodes[2])
        back.run()
        assert isinstance(back.error, InputError) and "node 2 is part of the run" in str(back.error)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_bytes": 7}, "its data has other content"),
        ({"lte": "9.9"}, "its lte is 9.9"),
        ({"processes": 2}, "no more"),
    ],
)
def test_what_has_changed_meanwhile_is_refused(changes: dict[str, Any], words: str) -> None:
    with going_on(alive=set()) as nodes:
        back = again(nodes[1], **changes)
        back.run()
        assert isinstance(back.error, InputError) and words in str(back.error)


def test_without_the_secret_nobody_comes_back() -> None:
    with going_on(alive=set()) as nodes:
        back = again(nodes[1])
        back.settings = crew(3, secret=OTHER, join=nodes[1].settings.join)[1].settings
        back.run()
        assert isinstance(back.error, InputError) and "its secret is another one" in str(back.error)


def test_the_server_is_closed_at_the_end() -> None:
    with going_on(alive=set()):
        pass
    run_all(crew(2))  # which holds that no thread of a preflight is left
