"""Node 0: wait for the others, compare, have the links measured, tell everyone the same."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from simulate.common.errors import InputError, RunFailedError
from simulate.config.hardware import Link
from simulate.launch.preflight.address import BindAddress, Endpoint
from simulate.launch.preflight.channel import BadFrameError, Message, PeerError
from simulate.launch.preflight.clock_offset import Now
from simulate.launch.preflight.consistency import compare
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose
from simulate.launch.preflight.link_figures import LinkFigures, link_failed, parse_link, slow_links
from simulate.launch.preflight.link_tests import LinkTester
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, Refusal, listen
from simulate.launch.preflight.membership import ALIVE_S, Membership, nodes_text
from simulate.launch.preflight.node_info import NodeFacts
from simulate.launch.preflight.rejoin import RejoinServer
from simulate.launch.preflight.secret import Secret
from simulate.launch.preflight.settings import Check, Log, Result, Settings, failure

_LOOK_EVERY_S = 0.5
"""How often a waiting hub looks whether somebody has left again."""


class Coordinator:
    """Node 0 of a preflight of several nodes."""

    def __init__(
        self,
        settings: Settings,
        own: Callable[[int], NodeFacts],
        endpoint: Endpoint,
        place: BindAddress,
        secret: Secret,
        log: Log,
        check: Check,
        planned: Link | None,
        now: Now,
    ) -> None:
        self._settings, self._endpoint, self._place, self._secret = settings, endpoint, place, secret
        self._own, self._tell, self._check, self._planned = own, log, check, planned
        self._roster = Membership(settings, endpoint, log, now)
        self._lines: Sequence[str] = ()
        self._door: HandshakeListener | None = None
        self._station: LinkTester | None = None

    def run(self) -> Result:
        """Return the result; raises InputError and RunFailedError, having told every node."""
        with self._telling_all():
            self._open()
            self._gather()
            self._compare()
            links = self._links()
            if self._planned is not None:
                self._roster.warnings += slow_links(links, self._planned)
            result = Result(self._roster.nodes, links, self._roster.warnings)
            self._send_all({"kind": "result", "links": [x.to_json() for x in links], "warnings": self._roster.warnings})
            for warning in self._roster.warnings:
                self._tell(f"warning: {warning}")
            return result

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        """Send all nodes a JSON value; returns it."""
        with self._telling_all():
            self._send_all({"kind": "payload", "payload": payload}, timeout_s)
        return payload

    def barrier(self, name: str, timeout_s: float) -> None:
        """Wait until all nodes are there."""
        with self._telling_all():
            deadline = Deadline(timeout_s)
            for node in sorted(self._roster.channels):
                message = self._receive(node, deadline, f"node 0 waited for it at {name!r}")
                if (message["kind"], message.get("name")) != ("barrier", name):
                    title = self._roster.facts[node].title
                    raise RunFailedError(f"{title} is not at {name!r} but at {message.get('name')!r}")
            self._send_all({"kind": "released", "name": name})

    def latecomers(self, payload: Callable[[], Any], is_alive: Callable[[int], bool]) -> RejoinServer:
        """Let nodes back in, at the same place, that were lost while the run goes on; a context manager."""
        return RejoinServer(
            self._settings, self._endpoint, self._place.address, self._secret, self._roster.nodes, payload, is_alive,
            self._tell,
        )  # fmt: skip

    def close(self) -> None:
        """Hang up, and end all threads."""
        if self._door is not None:
            self._door.close()
        if self._station is not None:
            self._station.close()
        for channel in self._roster.channels.values():
            channel.close()

    @contextmanager
    def _telling_all(self) -> Iterator[None]:
        """Whatever goes wrong here ends the preflight on all nodes, with the same words."""
        try:
            yield
        except BaseException as error:
            known = isinstance(error, InputError | RunFailedError)
            lines = self._lines or [str(error) if known else f"node 0 stopped ({type(error).__name__})"]
            message = {"kind": "abort", "lines": list(lines), "mendable": isinstance(error, InputError)}
            for channel in self._roster.channels.values():
                with suppress(PeerError):  # it cannot be told
                    channel.send(message, Deadline(ALIVE_S))
            self.close()
            raise

    def _open(self) -> None:
        self._station = LinkTester(0, self._place.address)
        self._roster.facts[0] = self._own(self._station.port)
        listener = listen(self._place.address, self._endpoint.port, f"--join {self._endpoint}")
        me = Identity(0, Purpose.CONTROL, self._secret)
        self._door = HandshakeListener(listener, me, self._settings.handshake_timeout_s, self._roster.greet)
        waiting = f"waiting for {nodes_text(self._roster.missing)}"
        self._tell(f"listening on {self._endpoint} ({self._place.interface}); {waiting}")

    def _gather(self) -> None:
        assert self._door is not None
        deadline = Deadline(self._settings.join_timeout_s)
        while self._roster.missing:
            if deadline.over:
                raise RunFailedError(self._roster.missing_text())
            event = self._door.next(deadline.within(_LOOK_EVERY_S))
            if isinstance(event, Refusal):
                self._roster.note_refusal(event.host, event.why)
            elif isinstance(event, AcceptedPeer):
                self._roster.admit(event.channel, event.greeting)
            self._roster.forget_the_gone()
        self._door.close()  # nobody else is expected
        self._tell(f"all {self._settings.nodes} nodes are there")

    def _compare(self) -> None:
        verdict = compare(self._roster.nodes)
        self._roster.warnings += verdict.warnings
        self._fail_on([*verdict.errors, *self._check(self._roster.nodes)])

    def _fail_on(self, lines: Sequence[str]) -> None:
        if lines:
            self._lines = lines
            raise failure(lines, mendable=True, log=self._tell)

    def _links(self) -> list[LinkFigures]:
        """Have every node reach every other, then measure the ring's edges one by one, then all at once."""
        assert self._station is not None
        plan, nonce = self._settings.links, secrets.token_hex(32)
        nodes = [node.model_dump() for node in self._roster.nodes]
        self._send_all({"kind": "connect", "nodes": nodes, "meeting": nonce, "plan": plan.to_json()})
        meeting = self._secret.derived("meeting", nonce.encode())
        reach = self._station.connect(self._roster.nodes, meeting, plan)
        answers = self._answers("connected", 2 * plan.reach_s + self._settings.answer_timeout_s)
        for answer in answers.values():
            reach.unreached.extend(str(line) for line in answer.get("unreached", []))
            reach.uncalled.extend(str(line) for line in answer.get("uncalled", []))
        self._fail_on(reach.unreached or reach.uncalled)
        return self._measure() if plan.measure else []

    def _measure(self) -> list[LinkFigures]:
        assert self._station is not None
        patience_s = self._settings.links.timeout_s + self._settings.answer_timeout_s
        self._tell(f"measuring {self._settings.nodes} links, one by one and all at once")
        with _naming_link(self._roster.facts[0].title):
            self._station.measure_alone()
        for node in sorted(self._roster.channels):
            self._send(node, {"kind": "alone"})
            self._answer(node, "measured", Deadline(patience_s))
        self._send_all({"kind": "loaded"})
        with _naming_link(self._roster.facts[0].title):
            links = [self._station.measure_loaded()]
        for node, answer in self._answers("figures", patience_s).items():
            try:
                links.append(parse_link(answer.get("link")))
            except BadFrameError as error:
                raise RunFailedError(f"{self._roster.facts[node].title} {error}") from None
        for link in links:
            self._tell(str(link))
        return links

    def _answers(self, kind: str, seconds: float) -> dict[int, Message]:
        deadline = Deadline(seconds)
        return {node: self._answer(node, kind, deadline) for node in sorted(self._roster.channels)}

    def _answer(self, node: int, kind: str, deadline: Deadline) -> Message:
        message = self._receive(node, deadline, "links were measured")
        if message["kind"] == "failed":
            raise RunFailedError(str(message.get("why")))
        if message["kind"] != kind:
            raise RunFailedError(f"{self._roster.facts[node].title} sent {message['kind']!r} where {kind!r} was due")
        return message

    def _receive(self, node: int, deadline: Deadline, meanwhile: str) -> Message:
        try:
            return self._roster.channels[node].receive(deadline)
        except PeerError as error:
            raise RunFailedError(
                f"{self._roster.facts[node].title} {error} while {meanwhile}; see its output"
            ) from None

    def _send_all(self, message: Message, timeout_s: float | None = None) -> None:
        for node in sorted(self._roster.channels):
            self._send(node, message, timeout_s)

    def _send(self, node: int, message: Message, timeout_s: float | None = None) -> None:
        deadline = Deadline(self._settings.answer_timeout_s if timeout_s is None else timeout_s)
        try:
            self._roster.channels[node].send(message, deadline)
        except PeerError as error:
            raise RunFailedError(f"{self._roster.facts[node].title} {error}; see its output") from None


@contextmanager
def _naming_link(title: str) -> Iterator[None]:
    try:
        yield
    except PeerError as error:
        raise RunFailedError(link_failed(title, error)) from None
