"""A launched run goes on without lost processes: its group is formed anew, and who comes back is given what it missed.

SurvivingGroup is the training loop's Group (simulate.training.together). It lets simulate.launch.membership agree on
the members, makes a process group of them, and brings all of them to the same state: a process that was started again
takes the merged weights, and adapters and moments from its own checkpoint; one that was late keeps its change, and
brings it to the merge that the others are at. The worker makes it where the run has a quorum.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from simulate.comm.process_group import TorchCommunicator
from simulate.common.errors import LostPeerError
from simulate.common.events import Event
from simulate.launch.membership import Epoch, Membership
from simulate.launch.recovery import of_own_class, own_part, recover
from simulate.methods.quorum import Quorum
from simulate.methods.state import State
from simulate.training.checkpoints import Progress, newest_with
from simulate.training.loop import Session, progress_of, set_progress
from simulate.training.together import StateReplacedError


class StartAgainError(Exception):
    """This process has trained on weights that no checkpoint has, so it can only begin from the start."""


class SurvivingGroup:
    """The processes that are there; `connect` makes the default process group of an epoch."""

    def __init__(
        self, membership: Membership, communicator: TorchCommunicator, connect: Callable[[Epoch], None],
        on_change: Callable[[Session, Epoch], None],
    ) -> None:  # fmt: skip
        self.membership, self.communicator = membership, communicator
        self._connect, self._on_change = connect, on_change
        self._confirmed = 0
        """Exchanges that all have confirmed."""
        self._waiting: dict[int, bool] = {}
        """Members that wait to join, and whether each is late."""
        self._has_begun = False
        """Whether this process has trained."""

    # The loop's Group.

    def arrive(self, session: Session) -> None:
        """Wait for all others before a merge, and take in who is late: its change belongs to this merge."""
        while late := [member for member, is_late in self.membership.ballot().items() if is_late]:
            self._form(session, late)

    def confirm(self) -> None:
        """Return once all others have everything that was exchanged."""
        if self.communicator.exchanges != self._confirmed:
            self._waiting = self.membership.ballot()
            self._confirmed = self.communicator.exchanges

    def form_anew(self, session: Session, error: LostPeerError) -> None:
        """Go on with those who are left, where an exchange or a ballot has failed."""
        _let_go(error)
        self.membership.veto(str(error))
        self._form(session, why=str(error))

    def admit(self, session: Session) -> None:
        """Take in who was started again, after a merge."""
        back = [member for member, is_late in self._waiting.items() if not is_late]
        if back:
            self._waiting = {}
            self._form(session, back)

    # Epochs.

    def start(self, session: Session) -> None:
        """Take part for the first time, at the start of the run or later."""
        with suppress(StateReplacedError):  # the loop has not begun yet
            self._form(session)

    def _form(self, session: Session, joiners: Collection[int] = (), why: str = "") -> None:
        """Form the group anew, until all members have the run's state. Raises StateReplacedError if this had not."""
        membership = self.membership
        # Whoever is left behind now brings what it has learned to the next merge.
        membership.is_late = membership.is_ready and session.is_merging
        while True:
            self.communicator.disconnect()
            try:
                epoch = membership.enter() if membership.epoch is None else membership.advance(joiners)
                membership.ballot()  # all have read who is in it
                self._connect(epoch)
                notes = self._share_state(session, epoch)
                membership.ballot()
                break
            except LostPeerError as error:
                if membership.epoch is not None:
                    membership.veto(str(error))
        self._confirmed = self.communicator.exchanges
        had_state, membership.is_ready, membership.is_late = membership.is_ready, True, False
        self._on_change(session, epoch)
        if not epoch.is_fresh:
            self._report(session, epoch, notes, why)
        if not had_state:
            raise StateReplacedError(session.is_merging)

    def _share_state(self, session: Session, epoch: Epoch) -> dict[int, dict[str, Any]]:
        """Bring all members to one state; returns what each has said of itself."""
        notes: dict[int, dict[str, Any]] = {}
        if epoch.is_fresh:
            session.pending_steps.clear()
            session.pending_diagnostics.clear()
            session.is_merging = False
            if recover(session) is None and self._has_begun:
                raise StartAgainError
        elif epoch.joined:
            notes = self._notes(session, epoch)
            self._hand_over(session, epoch, notes)
        self._has_begun = True
        self._tell_method(session, epoch, notes)
        return notes

    def _notes(self, session: Session, epoch: Epoch) -> dict[int, dict[str, Any]]:
        """Return what each member says of itself."""
        membership, step = self.membership, self._own_step(session)
        note = {
            "step": session.step if membership.is_ready or membership.is_late else step,
            "is_late": membership.is_late,
            "is_merging": session.is_merging,
            "progress": asdict(progress_of(session)),
            "pending": [figures for _, figures in session.pending_steps],
            "exchanges": self.communicator.exchanges,
        }
        texts = self.communicator.share_texts(json.dumps(note))
        return {member: json.loads(text) for member, text in zip(epoch.members, texts, strict=True)}

    def _own_step(self, session: Session) -> int | None:
        """Return the step of the newest checkpoint that has this process's devices, None without any."""
        path = newest_with(session.checkpoints, session.communicator.local_devices)
        return None if path is None else int(path.name.removeprefix("step-"))

    def _hand_over(self, session: Session, epoch: Epoch, notes: dict[int, dict[str, Any]]) -> None:
        """Give those who joined the run's state, from the first member that has it."""
        members = list(epoch.members)
        source = next(rank for rank, member in enumerate(members) if member not in epoch.joined)
        late = [rank for rank, member in enumerate(members) if member in epoch.joined and notes[member]["is_late"]]
        back = [rank for rank, member in enumerate(members) if member in epoch.joined and not notes[member]["is_late"]]
        if late:
            self._hand_base(session, source, late)
        if back:
            self._hand_all(session, source, back)
        if self.communicator.process in (*late, *back):
            self._go_to(session, notes[members[source]])

    def _hand_base(self, session: Session, source: int, late: list[int]) -> None:
        """Move late devices to the merged weights, with what they have learned on older ones."""
        method = session.method
        assert isinstance(method, Quorum)
        base = self.communicator.hand_state(source, late, method.base_state())
        trained = self.communicator.hand_state(source, late, {"trained": method.trained})
        steps = self.communicator.share_texts(str(session.step))
        if self.communicator.process in late:
            method.catch_up(base, int(steps[source]) - session.step)
            method.trained.copy_(trained["trained"])

    def _hand_all(self, session: Session, source: int, back: list[int]) -> None:
        """Give devices that were away the merged weights, and what is their own from their last state."""
        method, mine = session.method, session.communicator.local_devices
        state = method.state.sharded() if self.communicator.process == source else State()
        shared = self.communicator.hand_state(source, back, state.shared)
        donor = self.communicator.hand_state(source, back, state.of_devices.get(mine[0], {}))
        given = int(self.communicator.share_texts(str(session.run.class_of(mine[0])))[source])
        if self.communicator.process in back:
            own = {device: own_part(session, device) for device in mine}
            if given != session.run.class_of(mine[0]):
                pattern = of_own_class(session, donor)
                start = {d: method.init_returning_device(shared, {**own[d], **pattern}, own[d], d) for d in mine}
            else:
                start = {d: method.init_returning_device(shared, donor, own[d], d) for d in mine}
            method.state.load_sharded(State(shared, start))

    def _go_to(self, session: Session, note: dict[str, Any]) -> None:
        """Continue where the others are."""
        set_progress(session, Progress(**note["progress"]))
        session.is_merging, self.communicator.exchanges = note["is_merging"], note["exchanges"]
        # Steps that this process did not take have no loss of its.
        nothing_L = torch.full((session.method.local_devices,), math.nan)
        session.pending_steps[:] = [(nothing_L, figures) for figures in note["pending"]]
        session.pending_diagnostics.clear()

    def _tell_method(self, session: Session, epoch: Epoch, notes: dict[int, dict[str, Any]]) -> None:
        """Tell the method who takes part in the coming merges, and how many each late one has missed."""
        method, devices = session.method, session.run.cluster.devices
        assert isinstance(method, Quorum)
        present_N, ages_N = torch.zeros(devices, dtype=torch.bool), method.ages_N.clone()
        present_N[self.membership.devices_of(epoch.members)] = True
        for member in (member for member in epoch.joined if member in notes):
            missed = self._missed_merges(session, notes[member]) if notes[member]["is_late"] else 0
            ages_N[self.membership.devices_of([member])] = missed
        method.set_participants(present_N, torch.where(present_N, ages_N, 0), ~present_N)

    def _missed_merges(self, session: Session, note: dict[str, Any]) -> int:
        return int((session.step - note["step"]) // session.run.method.steps_apart)

    # What is told.

    def _report(self, session: Session, epoch: Epoch, notes: dict[int, dict[str, Any]], why: str) -> None:
        """Emit who left and who joined, behind the steps before it, and log it once."""
        leads, before = self.communicator.process == 0, self.membership.before(epoch)
        members = {} if before is None else before.members
        if gone := {m: incarnation for m, incarnation in members.items() if m not in epoch.members}:
            left, here = self.membership.devices_of(gone), len(self.communicator.present)
            why = why or self.membership.absence(gone)
            self._emit(session, {"kind": "left", "devices": left, "why": why})
            if leads:
                self.membership.log(f"{_devices_text(left)} left: {why}; {here} devices go on from step {session.step}")
        for member in epoch.joined:
            note, devices = notes[member], self.membership.devices_of([member])
            missed = self._missed_merges(session, note) if note["is_late"] else None
            self._emit(
                session, {"kind": "joined", "devices": devices, "own_step": note["step"], "missed_merges": missed}
            )
            if leads:
                what = "what it learned meanwhile" if note["is_late"] else "the merged weights"
                if not note["is_late"] and note["step"] is not None:
                    what += f", and its own state of step {note['step']}"
                self.membership.log(f"{_devices_text(devices)} joined at step {session.step}, with {what}")

    def _emit(self, session: Session, event: Event) -> None:
        if session.is_merging or session.pending_steps:
            session.pending_diagnostics.append({**event, "step": session.step + session.is_merging})
        else:
            session.emit({**event, "step": session.step})


def _let_go(error: BaseException | None) -> None:
    """Drop what an error's frames hold: torch's hold the group, whose connections close with its last reference.

    While they were open, others of the same exchange would wait for this process.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _devices_text(devices: Sequence[int]) -> str:
    return f"device{'s' if len(devices) > 1 else ''} {', '.join(map(str, devices))}"
