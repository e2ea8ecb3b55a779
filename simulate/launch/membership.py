"""Agree who takes part in a run that goes on without lost processes: epochs and ballots over its key-value store.

A member is a process with a number, which keeps its devices; its agent counts its starts (incarnations). An epoch is a
set of members with one process group. Its members meet in ballots: a ballot is won once all have voted, and lost once
somebody is dead, has failed, or is later than the deadline. Who is left then answers for the next epoch. One
`compare_set` decides a ballot or an epoch, so that all read the same, whoever was first. Processes outside of the epoch
wait to be admitted. Nothing here exchanges tensors: simulate.launch.survivors does, with the group of each epoch.

Keys below group/: epoch/E (JSON), answer/E/MEMBER, ballot/E/K/..., dead/MEMBER and incarnation/MEMBER (numbers),
join/MEMBER.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from simulate.common.errors import LostPeerError, RunFailedError
from simulate.launch.keys import OUTCOME

if TYPE_CHECKING:
    from torch.distributed import Store

    from simulate.launch.lasting_store import LastingStore

POLL_S, LOOK_S = 0.005, 0.05
"""Seconds between two looks for a verdict, and for what may spoil it."""
GRACE_S = 10.0
"""Least seconds that a member may be later than the first, where the run does not say."""
HINT_S = 1.0
"""Seconds after which a wait for the quorum is reported."""


class RunEndedError(Exception):
    """The run has ended while this process was outside of it."""


@dataclass(frozen=True)
class Waits:
    """Rules on who is waited for, and for how long."""

    quorum: int
    """Devices without which nothing is merged."""
    deadline_s: float | None
    """Seconds that a member may be later than the first; None: GRACE_S, or as long as its last round took."""
    timeout_s: float
    """Seconds after which a member is left behind even if the quorum is not met without it."""
    join_timeout_s: float
    """Longest wait for the quorum, and for all members at the start."""


@dataclass(frozen=True)
class Epoch:
    """The members of one process group."""

    number: int
    members: dict[int, int]
    """Members in order, each with its incarnation."""
    joined: tuple[int, ...] = ()
    """Members that lack the run's state."""
    is_fresh: bool = False
    """Whether all go on from a checkpoint: nobody has the state, or not enough have."""

    @classmethod
    def parse(cls, text: str | bytes) -> Epoch:
        """Return the epoch of its JSON."""
        found = json.loads(text)
        members = {int(member): incarnation for member, incarnation in found["members"].items()}
        return cls(found["number"], members, tuple(found["joined"]), found["is_fresh"])


def mark_dead(store: Store | LastingStore, member: int, incarnation: int) -> None:
    """Say that a process has ended; its agent does."""
    store.set(f"group/dead/{member}", str(incarnation))


class Membership:
    """One process's view of the members; `shares` are all members' devices, `titles` their names in messages."""

    def __init__(
        self, store: Store | LastingStore, member: int, incarnation: int, shares: Sequence[range],
        titles: Sequence[str], waits: Waits, log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.store, self.member, self.incarnation = store, member, incarnation
        self.shares, self.titles, self.waits, self.log = shares, titles, waits, log
        self.is_ready = False
        """Whether this process has the run's state."""
        self.is_late = False
        """Whether this process has missed a merge, and has a change to bring to the next."""
        self.epoch: Epoch | None = None
        self.round_s = 0.0
        """Seconds that this process needed for its last round."""
        self._ballots = self._voted_in = 0
        self._away: set[int] = set()
        """Members that were not there when the deadline passed."""

    # Epochs.

    def enter(self) -> Epoch:
        """Wait to be in an epoch, the first or a later one. Raises RunEndedError, RunFailedError."""
        if self._newest() is not None:
            return self._wait_outside()
        return self._decide(0, None, (), self.waits.join_timeout_s)

    def advance(self, joiners: Collection[int] = ()) -> Epoch:
        """Agree on the next epoch with the living members of this one, and `joiners`. Raises as `enter` does."""
        assert self.epoch is not None
        return self._decide(self.epoch.number + 1, self.epoch.members, joiners, self.patience_s)

    @property
    def patience_s(self) -> float:
        """Seconds that a member may be later than the first."""
        return max(GRACE_S, self.round_s) if self.waits.deadline_s is None else self.waits.deadline_s

    def before(self, epoch: Epoch) -> Epoch | None:
        """Return the epoch before one, also where this process was not in it; None for the first, or in a new store."""
        key = f"group/epoch/{epoch.number - 1}"
        return Epoch.parse(self.store.get(key)) if self.store.check([key]) else None

    def devices_of(self, members: Collection[int]) -> list[int]:
        """Return the devices of members, in order."""
        return [device for member in sorted(members) for device in self.shares[member]]

    def _decide(
        self, number: int, members: Mapping[int, int] | None, joiners: Collection[int], patience_s: float
    ) -> Epoch:
        """Answer for an epoch, and return it, or a later one that has this process, once it is decided.

        Waits `patience_s` for living `members`; None: for everybody, as last started.
        """
        begun_s, is_reported, key, generation = time.monotonic(), False, f"group/epoch/{number}", -1
        while not self.store.check([key]):
            self._check_end()
            if generation != self._generation:  # the first time, or in the place of what went with the store
                generation = self._generation
                self._answer(number)
            if (highest := self._highest()) > number:
                # After a restart of the store some may be an epoch behind the others.
                return self._decide(highest, members, joiners, patience_s)
            answers, waited_s = self._answers(number), time.monotonic() - begun_s
            awaited = self._incarnations() if members is None else members
            missing = [m for m in awaited if m not in answers and m not in self._away and not self._is_dead(m, awaited)]
            if not missing or waited_s > patience_s:
                epoch = self._proposal(number, answers, joiners)
                if epoch is not None:
                    self.store.compare_set(key, "", json.dumps(asdict(epoch)))
                    continue
                self._check_patience(waited_s, answers)
                if waited_s > HINT_S and not is_reported:
                    self.log(f"{self._quorum_text(answers)}; waiting for more, at most "
                             f"{self.waits.join_timeout_s:g} s (cluster.join_timeout_s)")  # fmt: skip
                    is_reported = True
            time.sleep(POLL_S)
        self.store.set("group/epoch", str(number))
        epoch = Epoch.parse(self.store.get(key))
        return self._adopt(epoch) if self._is_in(epoch) else self._wait_outside()

    def _answer(self, number: int) -> None:
        answer = json.dumps({"incarnation": self.incarnation, "is_ready": self.is_ready})
        self.store.set(f"group/answer/{number}/{self.member}", answer)
        if number > self._highest():
            self.store.set("group/highest", str(number))

    def _highest(self) -> int:
        """Return the highest epoch that anybody has answered for."""
        return int(self.store.get("group/highest")) if self.store.check(["group/highest"]) else 0

    @property
    def _generation(self) -> int:
        """Counts restarts of the store, where it can restart."""
        return getattr(self.store, "generation", 0)

    def _proposal(self, number: int, answers: Mapping[int, dict[str, Any]], joiners: Collection[int]) -> Epoch | None:
        """Return the epoch that these answers allow, None without a quorum."""
        waiting = {m: incarnation for m, (incarnation, _) in self._waiting().items() if m not in answers}
        members = {m: int(answer["incarnation"]) for m, answer in answers.items()}
        ready = [m for m, answer in answers.items() if answer["is_ready"]]
        members |= {m: i for m, i in waiting.items() if m in joiners}
        is_fresh = not ready
        if not self._is_quorum(members):
            # Those who wait have no part in the round that goes on: with them, all begin it anew.
            members, is_fresh = members | waiting, True
        if not self._is_quorum(members):
            return None
        ordered = dict(sorted(members.items()))
        return Epoch(number, ordered, tuple(ordered if is_fresh else (m for m in ordered if m not in ready)), is_fresh)

    def _wait_outside(self) -> Epoch:
        """Wait until an epoch has this process."""
        self.is_ready, generation = False, -1
        while True:
            self._check_end()
            if generation != self._generation:
                generation = self._generation
                self.store.set(f"group/join/{self.member}", json.dumps([self.incarnation, self.is_late]))
            newest = self._newest()
            if newest is None:  # the store was restarted, and the others have not met since
                time.sleep(LOOK_S)
                continue
            if self._is_in(newest):
                return self._adopt(newest)
            if all(self._is_dead(member, newest.members) for member in newest.members):
                return self._decide(newest.number + 1, None, (), self.patience_s)
            time.sleep(LOOK_S)

    def _adopt(self, epoch: Epoch) -> Epoch:
        self.epoch, self._ballots, self._away = epoch, 0, set()
        self.is_ready = self.is_ready and not epoch.is_fresh
        if self.store.check([f"group/join/{self.member}"]):
            # Not deleted: others may be about to read it, and would wait for a key that never comes back.
            self.store.set(f"group/join/{self.member}", "null")
        return epoch

    def _is_in(self, epoch: Epoch) -> bool:
        return epoch.members.get(self.member) == self.incarnation

    def _newest(self) -> Epoch | None:
        """Return the newest epoch that was decided, None before the first."""
        number = int(self.store.get("group/epoch")) if self.store.check(["group/epoch"]) else 0
        while self.store.check([f"group/epoch/{number + 1}"]):
            number += 1
        key = f"group/epoch/{number}"
        return Epoch.parse(self.store.get(key)) if self.store.check([key]) else None

    def _answers(self, number: int) -> dict[int, dict[str, Any]]:
        """Return the answers of living members for an epoch."""
        found = {}
        for member in range(len(self.shares)):
            key = f"group/answer/{number}/{member}"
            if self.store.check([key]):
                answer = json.loads(self.store.get(key))
                if not self._is_dead(member, {member: answer["incarnation"]}):
                    found[member] = answer
        return found

    def _waiting(self) -> dict[int, tuple[int, bool]]:
        """Return the living processes that wait to be admitted: their incarnations, and whether they are late."""
        found = {}
        for member in range(len(self.shares)):
            key = f"group/join/{member}"
            waiting = json.loads(self.store.get(key)) if self.store.check([key]) else None
            if waiting is not None and not self._is_dead(member, {member: waiting[0]}):
                found[member] = waiting[0], waiting[1]
        return found

    def _incarnations(self) -> dict[int, int]:
        """Return how often each process was started, by its agent's count."""
        keys = {member: f"group/incarnation/{member}" for member in range(len(self.shares))}
        return {m: int(self.store.get(key)) if self.store.check([key]) else 1 for m, key in keys.items()}

    def _is_dead(self, member: int, incarnations: Mapping[int, int]) -> bool:
        """Whether the agent of a member has seen that incarnation end."""
        key = f"group/dead/{member}"
        return self.store.check([key]) and int(self.store.get(key)) >= incarnations[member]

    def _is_quorum(self, members: Collection[int]) -> bool:
        return len(self.devices_of(members)) >= self.waits.quorum

    def _quorum_text(self, members: Collection[int]) -> str:
        here = len(self.devices_of(members))
        return f"cluster.quorum = {self.waits.quorum} devices, and {here} {'is' if here == 1 else 'are'} here"

    def _check_patience(self, waited_s: float, members: Collection[int]) -> None:
        if waited_s > self.waits.join_timeout_s:
            waited = f"{self.waits.join_timeout_s:g} s (cluster.join_timeout_s)"
            raise RunFailedError(f"{self._quorum_text(members)} after {waited}")

    def _check_end(self) -> None:
        if self.store.check([OUTCOME]):
            raise RunEndedError

    # Ballots.

    def ballot(self) -> dict[int, bool]:
        """Wait for all members; returns who waits to join, and whether it is late, the same to all.

        Raises LostPeerError to all, or to none.
        """
        key, epoch, self._voted_in = self._ballot_key(self._ballots), self.epoch, self._generation
        assert epoch is not None
        self.store.set(f"{key}/{self.member}", "1")
        if self.store.add(key, 1) == len(epoch.members):
            waiting = self._waiting() if len(epoch.members) < len(self.shares) else {}
            self._settle(key, {"why": "", "joiners": {member: is_late for member, (_, is_late) in waiting.items()}})
        verdict = self._verdict(key, epoch)
        if verdict["why"]:
            self._away = set(verdict.get("away", ()))
            raise LostPeerError(verdict["why"])
        self._forget(self._ballots - 1)
        self._ballots += 1
        return {int(member): is_late for member, is_late in verdict["joiners"].items()}

    def veto(self, why: str) -> None:
        """Let the next ballot fail: this process will not vote."""
        assert self.epoch is not None
        self._settle(self._ballot_key(self._ballots), {"why": why})

    def _ballot_key(self, number: int) -> str:
        assert self.epoch is not None
        return f"group/ballot/{self.epoch.number}/{number}"

    def _settle(self, key: str, verdict: dict[str, Any]) -> None:
        self.store.compare_set(f"{key}/verdict", "", json.dumps(verdict))  # the first verdict is everybody's

    def _verdict(self, key: str, epoch: Epoch) -> dict[str, Any]:
        """Return how a ballot went, once somebody has settled it."""
        begun_s, looked_s, generation = time.monotonic(), -LOOK_S, self._voted_in
        while not self.store.check([f"{key}/verdict"]):
            if generation != self._generation:
                raise LostPeerError("the store was restarted")
            now_s = time.monotonic()
            if now_s - looked_s > LOOK_S:
                looked_s = now_s
                self._look(key, epoch, now_s - begun_s)
            time.sleep(POLL_S)
        return dict(json.loads(self.store.get(f"{key}/verdict")))

    def _look(self, key: str, epoch: Epoch, waited_s: float) -> None:
        """Settle a ballot that cannot be won."""
        if self.store.check([f"group/epoch/{epoch.number + 1}"]):
            raise LostPeerError("the others have gone on without this process")
        dead = [m for m in epoch.members if m != self.member and self._is_dead(m, epoch.members)]
        if dead:
            self._settle(key, {"why": f"{self._named(dead)} ended"})
        elif waited_s > self.patience_s:
            away = [m for m in epoch.members if not self.store.check([f"{key}/{m}"])]
            if self._is_quorum(set(epoch.members) - set(away)) or waited_s > self.waits.timeout_s:
                late = f"{self._named(away)} not there {waited_s:.1f} s after the first"
                self._settle(key, {"why": late, "away": away})

    def absence(self, members: Mapping[int, int]) -> str:
        """Return why these members of an epoch, each with its incarnation, are not in the next one."""
        ended = [m for m in members if self._is_dead(m, members)]
        reasons = {"ended": ended, "did not answer": [m for m in members if m not in ended]}
        return ", and ".join(f"{self._named(these)} {reason}" for reason, these in reasons.items() if these)

    def _named(self, members: Sequence[int]) -> str:
        return ", ".join(self.titles[member] for member in members)

    def _forget(self, number: int) -> None:
        """Remove the keys of an earlier ballot; all have read its verdict, or they would not be in this one."""
        assert self.epoch is not None
        if number >= 0 and self.member == min(self.epoch.members):
            key = self._ballot_key(number)
            for part in (key, f"{key}/verdict", *(f"{key}/{member}" for member in self.epoch.members)):
                self.store.delete_key(part)
