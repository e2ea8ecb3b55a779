"""Who takes part: epochs and ballots, with one thread a process and a store of torch's on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from simulate.common.errors import LostPeerError, RunFailedError
from simulate.launch.keys import OUTCOME
from simulate.launch.membership import Epoch, Membership, RunEndedError, Waits, mark_dead

WAITS = Waits(quorum=2, deadline_s=0.5, timeout_s=5.0, join_timeout_s=5.0)
SHARES = [range(0, 1), range(1, 2), range(2, 4)]
"""Process 2 holds two of four devices."""


class House:
    """Processes in threads, each with its own connection to one store."""

    def __init__(self) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.pool = ThreadPoolExecutor(16)
        self.said: list[str] = []

    def process(self, member: int, incarnation: int = 1, waits: Waits = WAITS) -> Membership:
        store = dist.TCPStore("127.0.0.1", self.server.port, is_master=False, timeout=timedelta(seconds=10))
        store.set(f"group/incarnation/{member}", str(incarnation))  # its agent does
        titles = [f"process {number}" for number in range(len(SHARES))]
        return Membership(store, member, incarnation, SHARES, titles, waits, self.said.append)

    def all(self, *calls: Callable[[], Any]) -> list[Any]:
        """Return what calls that wait for each other return, or raise."""
        futures: list[Future[Any]] = [self.pool.submit(call) for call in calls]
        return [future.exception(15) or future.result() for future in futures]

    def started(self, waits: Waits = WAITS) -> list[Membership]:
        """Return the processes of a run that has begun."""
        everyone = [self.process(member, waits=waits) for member in range(3)]
        self.all(*(one.enter for one in everyone))
        for one in everyone:
            one.is_ready = True
        return everyone


@pytest.fixture()
def house() -> Iterator[House]:
    made = House()
    yield made
    made.pool.shutdown(wait=False, cancel_futures=True)


def test_all_begin_together_and_none_has_a_state(house: House) -> None:
    everyone = [house.process(member) for member in range(3)]
    assert house.all(*(one.enter for one in everyone)) == [Epoch(0, {0: 1, 1: 1, 2: 1}, (0, 1, 2), is_fresh=True)] * 3
    assert house.all(*(one.ballot for one in everyone)) == [{}, {}, {}]


def test_a_dead_process_fails_the_ballot_at_once_and_the_others_form_an_epoch(house: House) -> None:
    first, second, third = house.started()
    begun_s = time.monotonic()
    waiting = [house.pool.submit(one.ballot) for one in (first, third)]
    mark_dead(house.server, 1, 1)
    errors = [future.exception(5) for future in waiting]
    assert [str(error) for error in errors] == ["process 1 ended"] * 2
    assert all(isinstance(error, LostPeerError) for error in errors)
    assert house.all(first.advance, third.advance) == [Epoch(1, {0: 1, 2: 1})] * 2
    assert time.monotonic() - begun_s < 0.5  # sooner than the deadline: it is known to be dead
    assert first.devices_of(first.epoch.members if first.epoch else ()) == [0, 2, 3]
    assert second.epoch is not None and second.epoch.number == 0


def test_it_says_why_members_are_missing(house: House) -> None:
    first, _, _ = house.started()
    mark_dead(house.server, 1, 1)
    assert first.absence({1: 1}) == "process 1 ended"
    assert first.absence({1: 1, 2: 1}) == "process 1 ended, and process 2 did not answer"
    assert first.absence({1: 2}) == "process 1 did not answer"  # it was started again, and only its first start ended


def test_who_is_late_is_left_out_and_says_so_when_it_comes(house: House) -> None:
    first, late, third = house.started()
    begun_s = time.monotonic()
    errors = house.all(first.ballot, third.ballot)
    assert 0.4 < time.monotonic() - begun_s < 2.0
    assert str(errors[0]).startswith("process 1 not there 0.")
    assert house.all(first.advance, third.advance) == [Epoch(1, {0: 1, 2: 1})] * 2
    with pytest.raises(LostPeerError, match=r"process 1 not there|gone on without"):
        late.ballot()
    late.is_late = True
    waiting = house.pool.submit(late.advance)
    while not house.server.check(["group/join/1"]):
        time.sleep(0.01)
    assert house.all(first.ballot, third.ballot) == [{1: True}] * 2
    expected = Epoch(2, {0: 1, 1: 1, 2: 1}, (1,))
    assert house.all(lambda: first.advance([1]), lambda: third.advance([1])) == [expected] * 2
    assert waiting.result(5) == expected
    assert not late.is_ready


def test_a_restarted_process_is_admitted_with_its_new_incarnation(house: House) -> None:
    first, _, third = house.started()
    mark_dead(house.server, 1, 1)
    house.all(first.ballot, third.ballot)
    house.all(first.advance, third.advance)
    again = house.process(1, incarnation=2)
    waiting = house.pool.submit(again.enter)
    while not house.server.check(["group/join/1"]):
        time.sleep(0.01)
    house.all(first.ballot, third.ballot)
    expected = Epoch(2, {0: 1, 1: 2, 2: 1}, (1,))
    assert house.all(lambda: first.advance([1]), lambda: third.advance([1])) == [expected] * 2
    assert waiting.result(5) == expected
    assert house.all(first.ballot, again.ballot, third.ballot) == [{}] * 3


def test_a_joiner_that_dies_while_joining_is_left_out_again(house: House) -> None:
    first, _, third = house.started()
    mark_dead(house.server, 1, 1)
    house.all(first.ballot, third.ballot)
    house.all(first.advance, third.advance)
    waiting = house.pool.submit(house.process(1, incarnation=2).enter)
    while not house.server.check(["group/join/1"]):
        time.sleep(0.01)
    house.all(lambda: first.advance([1]), lambda: third.advance([1]))
    assert 1 in waiting.result(5).members
    mark_dead(house.server, 1, 2)
    assert [str(error) for error in house.all(first.ballot, third.ballot)] == ["process 1 ended"] * 2
    assert house.all(first.advance, third.advance) == [Epoch(3, {0: 1, 2: 1})] * 2


def test_without_a_quorum_all_wait_and_begin_anew_with_who_comes(house: House) -> None:
    first, _, _ = house.started()
    mark_dead(house.server, 1, 1)
    mark_dead(house.server, 2, 1)
    assert "process 1, process 2 ended" in str(house.all(first.ballot)[0])
    waiting = house.pool.submit(first.advance)
    time.sleep(1.2)
    assert not waiting.done()
    assert house.said == [
        "cluster.quorum = 2 devices, and 1 is here; waiting for more, at most 5 s (cluster.join_timeout_s)"
    ]
    again = house.pool.submit(house.process(2, incarnation=2).enter)
    expected = Epoch(1, {0: 1, 2: 2}, (0, 2), is_fresh=True)
    assert (waiting.result(5), again.result(5)) == (expected, expected)
    assert not first.is_ready


def test_a_quorum_that_does_not_come_ends_the_run(house: House) -> None:
    first, _, _ = house.started(replace(WAITS, join_timeout_s=0.5))
    mark_dead(house.server, 1, 1)
    mark_dead(house.server, 2, 1)
    house.all(first.ballot)
    with pytest.raises(RunFailedError, match=r"quorum = 2 devices, and 1 is here after 0\.5 s"):
        first.advance()


def test_processes_that_were_all_lost_begin_anew_together(house: House) -> None:
    house.started()
    for member in range(3):
        mark_dead(house.server, member, 1)
    again = [house.process(member, incarnation=2) for member in range(3)]
    assert house.all(*(one.enter for one in again)) == [Epoch(1, {0: 2, 1: 2, 2: 2}, (0, 1, 2), is_fresh=True)] * 3


class StoreWhereOneIsAdmitted:
    """A store in which a process is taken in between another's look for it and that one's reading of it."""

    def __init__(self, store: dist.Store, admitted: Membership) -> None:
        self.store, self.admitted = store, admitted

    def check(self, keys: list[str]) -> bool:
        found = self.store.check(keys)
        if found and keys == ["group/join/1"]:
            self.admitted._adopt(Epoch(1, {0: 1, 1: 2, 2: 1}))
        return bool(found)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_who_is_taken_in_meanwhile_is_not_waited_for(house: House) -> None:
    first, _, _ = house.started()
    back = house.process(1, incarnation=2)
    back.store.set("group/join/1", "[2, false]")
    assert first._waiting() == {1: (2, False)}
    first.store = StoreWhereOneIsAdmitted(first.store, back)  # type: ignore[assignment,arg-type]
    assert first._waiting() == {}


def test_a_process_outside_learns_that_the_run_has_ended(house: House) -> None:
    house.started()
    again = house.pool.submit(house.process(1, incarnation=2).enter)
    house.server.set(OUTCOME, "{}")
    assert isinstance(again.exception(5), RunEndedError)


def test_a_veto_fails_the_ballot_of_all(house: House) -> None:
    first, second, third = house.started()
    waiting = [house.pool.submit(one.ballot) for one in (first, second)]
    third.veto("its exchange failed")
    assert [str(future.exception(5)) for future in waiting] == ["its exchange failed"] * 2


def test_ballots_leave_no_keys_behind(house: House) -> None:
    everyone = house.started()
    house.all(*(one.ballot for one in everyone))
    keys = house.server.num_keys()
    for _ in range(20):
        house.all(*(one.ballot for one in everyone))
    assert house.server.num_keys() <= keys + 5
