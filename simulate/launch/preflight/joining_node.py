"""The part of every node but 0 in a preflight: find node 0, send it the facts, measure links, receive the result.

Node 0 decides; this node answers its messages one by one, and raises what node 0 sends as an error. `open_preflight`
makes a JoiningNode on these nodes. A node that comes back into a running run gets its result at once.
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from typing import Any

from simulate.common.errors import InputError, RunFailedError
from simulate.launch.preflight.channel import (
    Channel,
    Message,
    PeerError,
    PeerGoneError,
    PeerSilentError,
    WrongSecretError,
    naming,
    parse,
    reason,
)
from simulate.launch.preflight.clock_offset import answer_clock
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, VersionError, call, dial
from simulate.launch.preflight.link_figures import link_failed, parse_link
from simulate.launch.preflight.link_tests import LinkPlan, LinkTester
from simulate.launch.preflight.node_info import NodeFacts, parse_facts
from simulate.launch.preflight.secret import VARIABLE
from simulate.launch.preflight.settings import Preflight, Result, failure

_RETRY_S = 0.5
"""Seconds between two calls to a node 0 that does not answer yet."""
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EADDRNOTAVAIL)


@dataclass(eq=False)
class JoiningNode(Preflight):
    """A node other than node 0 in a preflight of several nodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._node_0: Channel | None = None
        self._link_tester: LinkTester | None = None
        self._late: Message | None = None
        """Node 0's answer where the run has already begun; it replaces the broadcast."""

    def run(self) -> Result:
        try:
            return self._run()
        except BaseException:
            self.close()
            raise

    def broadcast(self, payload: Any, timeout_s: float) -> Any:
        message = self._late or self._expect("payload", timeout_s)
        return message.get("payload")

    def barrier(self, name: str, timeout_s: float) -> None:
        if self._late is not None:
            return  # the others passed it long ago
        self._send({"kind": "barrier", "name": name}, timeout_s)
        released = self._expect("released", timeout_s, f"release from {name!r}")
        if released.get("name") != name:
            raise RunFailedError(f"node 0 released {released.get('name')!r}, this node waits at {name!r}")

    def close(self) -> None:
        if self._link_tester is not None:
            self._link_tester.close()
        if self._node_0 is not None:
            self._node_0.close()

    def _run(self) -> Result:
        settings = self.settings
        self._link_tester = LinkTester(settings.node, self.bind.address)
        own = self.own_facts(self._link_tester.port)
        self._node_0 = self._find_node_0()
        self._send({"kind": "facts", "facts": own.model_dump()})
        self._expect("welcome", settings.answer_timeout_s)
        self.log(f"joined node 0 at {self.endpoint} from {own.address} ({own.interface}); waiting for its verdict")
        command = self._expect("connect", settings.join_timeout_s + settings.answer_timeout_s, "verdict", "late")
        if command["kind"] == "late":
            return self._come_late(command)
        nodes, plan = self._connect(command)
        if plan.measure:
            self._measure(plan)
        result = self._expect("result", plan.timeout_s + 2 * plan.reach_s + 2 * settings.answer_timeout_s)
        with naming("node 0"):
            links = [parse_link(link) for link in result.get("links", [])]
        warnings = [str(warning) for warning in result.get("warnings", [])]
        for line in (*links, *(f"warning: {warning}" for warning in warnings)):
            self.log(str(line))
        return Result(nodes, links, warnings)

    def _come_late(self, message: Message) -> Result:
        """Rejoin a running run: node 0 has compared this node already, and links are not measured again."""
        # The run goes on already, so there will be no broadcast and no barrier.
        self._late = message
        self.log("the run has already begun; this node rejoins it")
        with naming("node 0"):
            return Result([parse_facts(node) for node in message.get("nodes", [])], [], [])

    def _find_node_0(self) -> Channel:
        """Call node 0 until it answers; raises RunFailedError once the time to join is over."""
        deadline, logged = Deadline(self.settings.join_timeout_s), ""
        while True:
            why, hint = self._call_node_0(deadline)
            if isinstance(why, Channel):
                return why
            # No time is left for another call.
            if deadline.left_s <= _RETRY_S:
                raise RunFailedError(
                    f"cannot reach {self.endpoint} within {deadline.seconds:.3g} s: {why}; {hint} "
                    f"(this node calls from {self.bind.address}, {self.bind.interface})"
                )
            if why != logged:  # the same reason every half second is logged once
                logged = why
                self.log(f"waiting for node 0: {self.endpoint}: {why}")
            time.sleep(_RETRY_S)

    def _call_node_0(self, deadline: Deadline) -> tuple[Channel | str, str]:
        """Return the channel, or why there is none yet and a hint; raises InputError where calling again is useless."""
        # One silent attempt must not use up the whole time to join.
        attempt = deadline.within(self.settings.handshake_timeout_s)
        try:
            sock = dial(self.bind.address, self.bind.coordinator_address, self.endpoint.port, attempt)
            return call(sock, Identity(self.settings.node, Purpose.CONTROL, self.secret), 0, attempt), ""
        except OSError as error:
            return reason(error), _hint(error)
        except (PeerGoneError, PeerSilentError) as error:
            # This may pass, unlike what follows: node 0 may only be starting, or busy.
            return f"it {error}", "is that node 0 of this run, or another program?"
        except WrongSecretError as error:
            refusal, fix = str(error), f"give all nodes the same --secret-file or {VARIABLE}"
        except VersionError as error:
            refusal, fix = str(error), "install the same version of lte on all nodes"
        except PeerError as error:
            refusal, fix = str(error), "is that node 0's address and port?"
        raise InputError(f"{self.endpoint} {refusal}; {fix}")

    def _connect(self, command: Message) -> tuple[list[NodeFacts], LinkPlan]:
        """Call every other node, and report to node 0 which ones did not answer."""
        assert self._link_tester is not None
        with naming("node 0"):
            nodes = [parse_facts(node) for node in command.get("nodes", [])]
            plan = parse(LinkPlan, command.get("plan"), "a plan for links")
        reach = self._link_tester.connect(nodes, self.secret, str(command.get("meeting")), plan)
        # Sent also where calls failed: node 0 must hear of all failures to name the cause.
        self._send({"kind": "connected", "unreached": reach.unreached, "uncalled": reach.uncalled})
        return nodes, plan

    def _measure(self, plan: LinkPlan) -> None:
        """Measure the link to the next node, alone when node 0 says so, then together with all nodes."""
        assert self._link_tester is not None
        # Node 0 lets the nodes measure one after the other.
        turns_s = 2 * plan.reach_s + (self.settings.nodes + 2) * (plan.timeout_s + self.settings.answer_timeout_s)
        me = f"node {self.settings.node} ({self.bind.address})"
        try:
            self._expect("alone", turns_s, "turn to measure")
            self._link_tester.measure_alone()
            self._send({"kind": "measured"})
            self._expect("loaded", turns_s, "turn to measure")
            self._send({"kind": "figures", "link": self._link_tester.measure_loaded().model_dump()})
        except PeerError as error:
            self._send({"kind": "failed", "why": f"{link_failed(me)} {error}"})

    def _expect(self, kind: str, seconds: float, what: str = "", other: str = "") -> Message:
        """Return node 0's next message of these kinds, answering clock messages before it; raises for others."""
        assert self._node_0 is not None
        deadline = Deadline(seconds)
        while True:
            with naming(f"node 0 ({self.endpoint})", f" before this node had its {what or kind}; see its output"):
                message = self._node_0.receive(deadline)
                if message["kind"] == "clock":
                    answer_clock(self._node_0, self.now, deadline)
                    continue
            if message["kind"] in (kind, other):
                return message
            raise self._ended(message, kind)

    def _ended(self, message: Message, awaited: str) -> InputError | RunFailedError:
        """Return the error for a message that ends the preflight."""
        if message["kind"] == "refused":
            return InputError(f"node 0 ({self.endpoint}) refused this node: {message.get('why')}")
        if message["kind"] == "abort":
            lines = [str(line) for line in message.get("lines", [])] or ["node 0 stopped"]
            return failure(lines, is_input=bool(message.get("mendable")), log=self.log)
        return RunFailedError(f"node 0 ({self.endpoint}) sent {message['kind']!r} where {awaited!r} was due")

    def _send(self, message: Message, timeout_s: float | None = None) -> None:
        assert self._node_0 is not None
        with naming(f"node 0 ({self.endpoint})", "; see its output"):
            self._node_0.send(message, Deadline(self.settings.answer_timeout_s if timeout_s is None else timeout_s))


def _hint(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "is node 0 started, is the port open?"
    if error.errno in _UNREACHABLE:
        return "are both on one network, is that node 0's address?"
    return "is that node 0's address, and does a firewall let it through?"
