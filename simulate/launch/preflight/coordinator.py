"""Node 0's part of a preflight: wait for the others, compare them, have links measured, send all the same result.

All nodes must start or fail together. So every error of node 0 is sent to all nodes before it is raised, and they raise
the same. `open_preflight` makes a Coordinator on node 0, and a JoiningNode elsewhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from simulate.common.errors import InputError, RunFailedError
from simulate.launch import heartbeat
from simulate.launch.preflight.channel import Message, PeerError, naming
from simulate.launch.preflight.consistency import compare
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.link_figures import LinkFigures, link_failed, parse_link, slow_links
from simulate.launch.preflight.link_tests import LinkTester
from simulate.launch.preflight.listener import HandshakeListener
from simulate.launch.preflight.membership import Membership, nodes_text
from simulate.launch.preflight.rejoin import accepting_rejoins
from simulate.launch.preflight.settings import Preflight, Result, failure

_LOOK_EVERY_S = 0.5
"""Seconds between two checks for nodes that have left while others are awaited."""


@dataclass(eq=False)
class Coordinator(Preflight):
    """Node 0 of a preflight of several nodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._members = Membership(self, self.own_facts())
        self._lines: Sequence[str] = ()
        """All findings, where there are several; the exception names the first."""
        self._handshakes: HandshakeListener | None = None
        self._link_tester: LinkTester | None = None

    def run(self) -> Result:
        with self._errors_sent_to_all():
            self._open()
            self._gather()
            self._compare()
            links = self._links()
            if self.planned is not None:
                self._members.warnings += slow_links(links, self.planned)
            warnings = self._members.warnings
            self._send_all({"kind": "result", "links": [link.model_dump() for link in links], "warnings": warnings})
            for warning in warnings:
                self.log(f"warning: {warning}")
            return Result(self._members.nodes, links, warnings)

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        with self._errors_sent_to_all():
            self._send_all({"kind": "payload", "payload": payload}, timeout_s)
        return payload

    def barrier(self, name: str, timeout_s: float) -> None:
        with self._errors_sent_to_all():
            deadline = Deadline(timeout_s)
            for node in sorted(self._members.channels):
                message = self._receive(node, deadline, f"node 0 waited for it at {name!r}")
                if (message["kind"], message.get("name")) != ("barrier", name):
                    title = self._members.facts[node].title
                    raise RunFailedError(f"{title} is not at {name!r} but at {message.get('name')!r}")
            # Only once all have arrived: no node may run ahead.
            self._send_all({"kind": "released", "name": name})

    def accept_rejoins(
        self, payload: Callable[[], Any], is_alive: Callable[[int], bool]
    ) -> AbstractContextManager[object]:
        return accepting_rejoins(self, self._members.nodes, payload, is_alive)

    def close(self) -> None:
        if self._handshakes is not None:
            self._handshakes.close()
        if self._link_tester is not None:
            self._link_tester.close()
        for channel in self._members.channels.values():
            channel.close()

    @contextmanager
    def _errors_sent_to_all(self) -> Iterator[None]:
        """Send any error to all nodes, which then end with the same words, and close."""
        try:
            yield
        except BaseException as error:
            # The other nodes get an unknown error's type alone: its text is about this machine.
            known = isinstance(error, InputError | RunFailedError)
            lines = self._lines or [str(error) if known else f"node 0 stopped ({type(error).__name__})"]
            message = {"kind": "abort", "lines": list(lines), "mendable": isinstance(error, InputError)}
            for channel in self._members.channels.values():
                with suppress(PeerError):  # the node is gone
                    channel.send(message, Deadline(heartbeat.ANSWER_S))
            self.close()
            raise

    def _open(self) -> None:
        self._link_tester = LinkTester(0, self.bind.address)
        self._members.facts[0] = self.own_facts(self._link_tester.port)
        self._handshakes = self._members.listen()
        waiting = f"waiting for {nodes_text(self._members.missing)}"
        self.log(f"listening on {self.endpoint} ({self.bind.interface}); {waiting}")

    def _gather(self) -> None:
        assert self._handshakes is not None
        deadline = Deadline(self.settings.join_timeout_s)
        while self._members.missing:
            if deadline.over:
                raise RunFailedError(self._members.missing_text())
            self._members.admit(self._handshakes.next(deadline.within(_LOOK_EVERY_S)))
            self._members.remove_disconnected()
        self._handshakes.close()  # all have joined
        self.log(f"all {self.settings.nodes} nodes have joined")

    def _compare(self) -> None:
        verdict = compare(self._members.nodes)
        self._members.warnings += verdict.warnings
        self._fail_on([*verdict.errors, *self.check(self._members.nodes)])

    def _fail_on(self, lines: Sequence[str]) -> None:
        if lines:
            self._lines = lines
            raise failure(lines, is_input=True, log=self.log)

    def _links(self) -> list[LinkFigures]:
        """Have every node call every other, then measure the ring's edges one by one, then all at once."""
        assert self._link_tester is not None
        # Node 0's plan holds on all nodes, so that their deadlines agree.
        plan, meeting = self.settings.links, secrets.token_hex(32)
        nodes = [node.model_dump() for node in self._members.nodes]
        self._send_all({"kind": "connect", "nodes": nodes, "meeting": meeting, "plan": plan.model_dump()})
        reach = self._link_tester.connect(self._members.nodes, self.secret, meeting, plan)
        answers = self._answers("connected", 2 * plan.reach_s + self.settings.answer_timeout_s)
        for answer in answers.values():
            reach.unreached.extend(str(line) for line in answer.get("unreached", []))
            reach.uncalled.extend(str(line) for line in answer.get("uncalled", []))
        # Each failed call is reported by both of its ends. The caller's line names the cause, so prefer it.
        self._fail_on(reach.unreached or reach.uncalled)
        return self._measure() if plan.measure else []

    def _measure(self) -> list[LinkFigures]:
        assert self._link_tester is not None
        answer_s = self.settings.links.timeout_s + self.settings.answer_timeout_s
        self.log(f"measuring {self.settings.nodes} links, one by one and all at once")
        with naming(link_failed(self._members.facts[0].title)):
            self._link_tester.measure_alone()
        for node in sorted(self._members.channels):
            # One after the other: two measurements at once would share links.
            self._send(node, {"kind": "alone"})
            self._answer(node, "measured", Deadline(answer_s))
        self._send_all({"kind": "loaded"})
        with naming(link_failed(self._members.facts[0].title)):
            links = [self._link_tester.measure_loaded()]
        for node, answer in self._answers("figures", answer_s).items():
            with naming(self._members.facts[node].title):
                links.append(parse_link(answer.get("link")))
        for link in links:
            self.log(str(link))
        return links

    def _answers(self, kind: str, seconds: float) -> dict[int, Message]:
        """Receive one message of a kind from every node; the deadline holds for all together."""
        deadline = Deadline(seconds)
        return {node: self._answer(node, kind, deadline) for node in sorted(self._members.channels)}

    def _answer(self, node: int, kind: str, deadline: Deadline) -> Message:
        message = self._receive(node, deadline, "links were measured")
        if message["kind"] == "failed":
            raise RunFailedError(str(message.get("why")))
        if message["kind"] != kind:
            raise RunFailedError(f"{self._members.facts[node].title} sent {message['kind']!r} where {kind!r} was due")
        return message

    def _receive(self, node: int, deadline: Deadline, meanwhile: str) -> Message:
        with naming(self._members.facts[node].title, f" while {meanwhile}; see its output"):
            return self._members.channels[node].receive(deadline)

    def _send_all(self, message: Message, timeout_s: float | None = None) -> None:
        for node in sorted(self._members.channels):
            self._send(node, message, timeout_s)

    def _send(self, node: int, message: Message, timeout_s: float | None = None) -> None:
        deadline = Deadline(self.settings.answer_timeout_s if timeout_s is None else timeout_s)
        with naming(self._members.facts[node].title, "; see its output"):
            self._members.channels[node].send(message, deadline)
