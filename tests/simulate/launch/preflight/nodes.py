"""Several nodes in threads of one process, and callers that do not play by the rules."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from simulate.config.hardware import Link
from simulate.config.run import Run, build_run
from simulate.launch.preflight.channel import Channel
from simulate.launch.preflight.clock_offset import answer_clock
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, answer, call
from simulate.launch.preflight.link_probe import Limits
from simulate.launch.preflight.link_tests import LinkPlan
from simulate.launch.preflight.node_info import Facts, NodeFacts
from simulate.launch.preflight.preflight import open_preflight
from simulate.launch.preflight.secret import Secret, make_secret
from simulate.launch.preflight.settings import Preflight, Result, Settings

SECRET_TEXT, OTHER_TEXT = make_secret(), make_secret()
SECRET, OTHER = Secret(SECRET_TEXT.encode()), Secret(OTHER_TEXT.encode())
QUICK = LinkPlan(limits=Limits(aim_s=0.02, budget_bytes=1 << 20), reach_s=5, timeout_s=5)
PAIR_S = 5.0


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def facts(run: Run | None = None, **changes: Any) -> Facts:
    """Return a node's facts, some of them changed."""
    same = {"lte": "0.1.0", "torch": "2.13.0+cpu", "data_fingerprint": "ab12" * 16, "data_bytes": 2_000_000}
    return Facts.of(run or build_run({}), **{**same, "processes": 1, **changes})


@dataclass
class Node:
    """One node's part and what came of it."""

    settings: Settings
    facts: Facts
    now: Callable[[], float] = time.time
    check: Callable[[Sequence[NodeFacts]], Sequence[str]] = lambda nodes: ()
    planned: Link | None = None
    after: Callable[[Preflight], Any] = lambda preflight: None
    """Call that the node makes once it has its result."""
    lines: list[str] = field(default_factory=list)
    result: Result | None = None
    returned: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            with open_preflight(
                self.settings, self.facts, log=self.lines.append, check=self.check, planned=self.planned, now=self.now
            ) as preflight:
                self.result = preflight.run()
                self.returned = self.after(preflight)
        except Exception as error:
            self.error = error

    @property
    def output(self) -> str:
        """Everything that it said, tracebacks with their local variables too."""
        told = [*self.lines, str(self.result), repr(self.settings)]
        if self.result is not None:
            told.append(str(self.result.to_json()))
        if self.error is not None:
            told += traceback.TracebackException.from_exception(self.error, capture_locals=True).format()
        return "\n".join(told)


def crew(count: int = 3, **settings: Any) -> list[Node]:
    """Return `count` nodes of one run, ready to run."""
    common = {"join": f"127.0.0.1:{free_port()}", "secret": SECRET, "join_timeout_s": 10.0, "links": QUICK}
    return [Node(Settings(node=node, nodes=count, **{**common, **settings}), facts()) for node in range(count)]


@contextmanager
def started(*nodes: Node) -> Iterator[None]:
    """Run nodes in threads, the first one a moment earlier, and wait for all at the end."""
    threads = [threading.Thread(target=node.run, name=f"node-{node.settings.node}") for node in nodes]
    threads[0].start()
    wait_until(lambda: bool(nodes[0].lines) or not threads[0].is_alive())
    for thread in threads[1:]:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), f"{thread.name} hangs"


def run_all(nodes: Sequence[Node]) -> None:
    """Run nodes to their end; no thread of a preflight survives them."""
    with started(*nodes):
        pass
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("preflight")]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Return when the condition holds; fails after `seconds`."""
    deadline = Deadline(seconds)
    while not condition():
        assert not deadline.over, "it did not come about"
        time.sleep(0.01)


def connect(node: Node) -> socket.socket:
    """Return a bare connection to node 0."""
    assert node.settings.join is not None
    return socket.create_connection(("127.0.0.1", int(node.settings.join.rpartition(":")[2])), timeout=PAIR_S)


def join_by_hand(hub: Node, number: int, **changes: Any) -> Channel:
    """Do what a joining node does up to its facts and its clock, and nothing more."""
    deadline = Deadline(PAIR_S)
    channel = call(connect(hub), Identity(number, Purpose.CONTROL, SECRET), 0, deadline)
    place = {"node": number, "nodes": hub.settings.nodes, "interface": "lo", "address": "127.0.0.1", "link_port": 1}
    channel.send({"kind": "facts", "facts": {**facts().model_dump(), **place, **changes}}, deadline)
    for _ in range(5):
        assert channel.receive(deadline)["kind"] == "clock"
        answer_clock(channel, time.time, deadline)
    return channel


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=PAIR_S)
        other, _ = listener.accept()
    other.settimeout(PAIR_S)
    return one, other


@contextmanager
def channel_pair() -> Iterator[list[Channel]]:
    """Give both ends of an encrypted connection: node 1, the caller, and node 0."""
    pair = shake_hands(*tcp_pair())
    try:
        yield pair
    finally:
        for channel in pair:
            channel.close()


def shake_hands(one: socket.socket, other: socket.socket) -> list[Channel]:
    """Return the channels of a connection, or of two that somebody joins."""
    deadline = Deadline(PAIR_S)
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer, answerer_end(other), Identity(0, Purpose.CONTROL, SECRET), deadline)
        return [call(one, Identity(1, Purpose.CONTROL, SECRET), 0, deadline), answering.result()]


def answerer_end(sock: socket.socket, secret: Secret = SECRET) -> ssl.SSLSocket:
    """Return the answerer's end of a connection, as a listener accepts it."""
    return secret.server.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
