"""Simulate a run event by event: every device has a clock of its own, and exchanges synchronise the clocks.

A closed form knows the mean round only; with jitter, unequal devices and devices that leave, waiting times follow from
who is late when. `lte plan --timeline` calls `simulate` and prints or draws the result.

The exchanges come from simulate.costs.message_schedule, and their seconds when all devices start at once from
simulate.costs.message_time. Devices that do not start at once wait for each other as the collective demands. In a ring
of N − 1 hops or more, data of every device reaches every other, so none is done before the last one's start plus all
hops (tests/reference/hops.py follows each hop); lines that differ pace it by its slowest edge. Devices that push at the
same time share the server's link, and those of one place its line. A pull waits for all pushes.

One exchange travels at a time. A merge in the background occupies the link from the time when the last device has
started it, and devices wait for it where the method applies it. In-node messages of DASO have links of their own if the
profile has such.

A device that leaves loses its current round: the others merge without it (simulate/rules/churn.py). With a quorum
simulate.rules.attendance says who takes part in each merge, as it does in a simulation that trains: late devices
compute on while others merge, and get the newer weights before they bring their change; those that are back get them
while the others train.

Legend: N devices, M those present in the current round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from simulate.comm.transfers import Exchange, Transfer
from simulate.config.hardware import Device, Link
from simulate.config.run import Run
from simulate.costs.line_paths import ServerPath, server_paths
from simulate.costs.message_schedule import PeriodicExchange, base_exchange, schedule
from simulate.costs.message_time import link_of, server_delays, server_latency_s, server_rates, transfer_s
from simulate.costs.step_time import device_merge_s, device_step_s, exchange_s, round_time
from simulate.rules.attendance import Attendance, GivenAttendance, SimulatedAttendance, attendance_of
from simulate.rules.churn import leave_probability
from simulate.rules.jitter import Floats, slowness, uniform
from simulate.rules.pace import round_counts
from simulate.timeline.shared_link import UnequalLinks, shared_ends, unequal_ends

KINDS = ("compute", "exchange", "wait", "away")
Times = Floats | float
"""Seconds since the run's start: one for each of M devices, or one for all."""


@dataclass(frozen=True)
class Span:
    """One activity of one device."""

    device: int
    kind: str
    """One of KINDS."""
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The result of a simulation."""

    devices: int
    rounds: int
    steps: int
    wall_s: float
    """Seconds until the last device is done."""
    seconds: dict[str, float]
    """Mean seconds of a device by KINDS; they add up to wall_s."""
    device_steps: float
    """Steps of all devices that became part of the model."""
    leaves: int
    """Number of times that a device left."""
    round_ends_s: tuple[float, ...]
    late: int = 0
    """Number of changes that came to a later merge; only with a quorum."""
    joins: int = 0
    """Number of times that a device came back and got the merged weights; only with a quorum."""
    spans: tuple[Span, ...] = ()
    """Activities of the drawn devices in the first rounds."""

    @property
    def round_s(self) -> float:
        """Mean seconds of a round."""
        return self.wall_s / self.rounds


def simulate(
    run: Run,
    devices: Sequence[Device],
    link: Link,
    rounds: int | None = None,
    drawn: Sequence[int] = (),
    drawn_rounds: int = 3,
) -> Timeline:
    """Simulate a run, or its first `rounds`; keep the spans of the `drawn` devices in `drawn_rounds` rounds.

    Random draws are addressed by (train.seed, purpose, device, step), so equal arguments give equal timelines.
    """
    if rounds is not None:
        steps = min(run.train.steps, rounds * run.method.round_steps)
        run = run.model_copy(update={"train": run.train.model_copy(update={"steps": steps})})
    return _Simulation(run, devices, link, drawn, drawn_rounds).go()


@dataclass
class _PendingExchange:
    """An exchange in the background."""

    part: PeriodicExchange
    due: int
    """The step after whose compute devices apply it."""
    ends_M: Times


@dataclass
class _Simulation:
    run: Run
    devices: Sequence[Device]
    link: Link
    drawn: Sequence[int]
    drawn_rounds: int
    now_N: Floats = field(init=False)
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    spans: list[Span] = field(default_factory=list)
    pending: list[_PendingExchange] = field(default_factory=list)
    channel_free_s: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    """Seconds when the link is free again, and under True when the links within nodes are."""

    def __post_init__(self) -> None:
        run, shape, count = self.run, self.run.shape(), len(self.devices)
        self.link = link_of(self.link, run.cluster.backend)
        self.parts = schedule(run, shape)
        self.step_s = device_step_s(run, shape, self.devices)
        self.step_s_N = np.array(self.step_s)
        self.merge_s_N = np.array(device_merge_s(run, shape, self.devices)) / run.method.merges_per_round
        self.jitter_N = np.array([device.step_jitter for device in self.devices])
        self.join_s_N = np.array([device.join_s for device in self.devices])
        round_s = round_time(run, shape, self.devices, self.link).round_s
        self.expected_round_s = round_s
        chances = {rate: leave_probability(rate, round_s) for rate in {d.leave_per_hour for d in self.devices}}
        self.leave_N = np.array([chances[device.leave_per_hour] for device in self.devices])
        self.now_N = np.zeros(count)
        self.back_N = np.zeros(count)
        self.ids_N = np.arange(count)
        self.here: NDArray[np.int64] = self.ids_N
        self.leaves, self.device_steps, self.late, self.joins = 0, 0.0, 0, 0
        self.attendance: SimulatedAttendance | GivenAttendance | None = None
        if run.cluster.has_quorum:
            self.base_s = exchange_s(base_exchange(run, shape), self.link)
            self.attendance = attendance_of(run, self.devices, self.step_s, round_s, self.base_s)
        self.round: Attendance | None = None
        """Devices that take part in the current round; None without a quorum."""
        self.round_ends_s: list[float] = []

    def go(self) -> Timeline:
        last, every = self.run.train.steps, self.run.method.round_steps
        self._begin_round(0)
        done = 0
        for step in self._stops():
            self._compute(done, step)
            # A step needs its own exchanges before it ends; merges follow, after older results were applied.
            self._exchange(step, last, within_steps=True)
            self._apply_pending(step, last)
            self._exchange(step, last, within_steps=False)
            self._merge(step, last)
            done = step
            if step % every == 0 or step == last:
                self._end_round(step)
                if step != last:
                    self._begin_round(step)
        count = len(self.devices)
        return Timeline(
            devices=count, rounds=len(self.round_ends_s), steps=last, wall_s=float(self.now_N[self.here].max()),
            seconds={kind: total / count for kind, total in self.totals.items()}, device_steps=self.device_steps,
            leaves=self.leaves, round_ends_s=tuple(self.round_ends_s), spans=tuple(self.spans), late=self.late,
            joins=self.joins,
        )  # fmt: skip

    def _stops(self) -> Iterator[int]:
        """Yield the steps after which devices do anything but go on; those between are computed at once."""
        last, method = self.run.train.steps, self.run.method
        late = [part.hidden_steps for part in self.parts if part.hidden_steps]
        for step in range(1, last + 1):
            due = any(
                part.happens(step, last) or (part.hidden_steps and part.happens(step - part.hidden_steps, last))
                for part in self.parts
            )
            if due or step == last or step % method.steps_apart == 0 or (late and step <= max(late)):
                yield step

    # Devices that leave and return

    def _begin_round(self, step: int) -> None:
        """Let devices return, and draw those that leave during this round, which take no part in it."""
        if self.attendance is not None:
            self._attend(self.attendance, step)
            return
        if not self.leave_N.any():
            return
        start_s = float(self.now_N[self.here].max()) if step else 0.0
        back = self.back_N <= start_s
        if not back.any():  # all are away: nothing happens until one returns
            start_s = float(self.back_N.min())
            back = self.back_N <= start_s
        present = self.ids_N[back]
        absent = np.setdiff1d(present, self.here)
        self._spend("away", absent, self.now_N[absent], start_s)
        seed = self.run.train.seed
        leaving = uniform(seed, "leave", present, step) < self.leave_N[present]
        if leaving.all():
            leaving[0] = False  # one device has to keep the model
        gone = present[leaving]
        leave_times = start_s + self.expected_round_s * uniform(seed, "leave, moment", gone, step)
        self.back_N[gone] = leave_times + self.join_s_N[gone]
        self.leaves += len(gone)
        self.here = present[~leaving]
        for item in self.pending:  # times of single devices no longer match those present: the latest holds for all
            item.ends_M = float(np.max(item.ends_M))

    def _attend(self, attendance: SimulatedAttendance | GivenAttendance, step: int) -> None:
        """Take the attendance of a round of a run with a quorum."""
        now_s = float(self.now_N[self.here].max()) if step else 0.0
        self.round = round_ = attendance.begin(step, now_s)
        self.leaves += round_.leaves
        back = self.ids_N[round_.joined_N]
        self._spend("away", back, self.now_N[back], round_.starts_s)
        begins_N = (round_.takes_N > 0) & ~round_.joined_N
        begin = self.ids_N[begins_N]
        self._spend("wait", begin, self.now_N[begin], np.maximum(self.now_N[begin], round_.starts_s))
        self.here = self.ids_N[round_.present_N]
        self.joins += len(back)
        late = int(((round_.takes_N == 0) & round_.present_N).sum())
        self.late += late
        # Those that are back hear from one of the others while these train; late ones must before they merge.
        free_s = max(self.channel_free_s[False], round_.starts_s) + len(back) * self.base_s
        if late:
            free_s = max(free_s, float(round_.ends_s_N.max())) + late * self.base_s
        self.channel_free_s[False] = free_s if late or len(back) else self.channel_free_s[False]

    def _end_late(self, end_s: float) -> None:
        """Spend what late devices do until the run ends, which takes no change of theirs."""
        if self.round is None:
            return
        late = self.ids_N[self.round.brought_N == 0]
        done_s = self.now_N[late] + self.step_s_N[late]
        self._spend("compute", late, self.now_N[late], np.minimum(done_s, end_s))
        self._spend("wait", late, self.now_N[late], np.full(len(late), end_s))

    def _end_round(self, step: int) -> None:
        every, last = self.run.method.round_steps, self.run.train.steps
        # What a device that left had done is lost, so that only those present count.
        if self.round is not None:
            self.device_steps += float(self.round.brought_N[self.here].sum())
        else:
            steps_N = self._steps_of_round(step - 1)
            self.device_steps += float(np.minimum(steps_N[self.here], step - (step - 1) // every * every).sum())
        self.round_ends_s.append(float(self.now_N[self.here].max()))
        if step == last:
            end_s = self.round_ends_s[-1]
            self._spend("wait", self.here, self.now_N[self.here], end_s)
            self._end_late(end_s)
            absent = np.setdiff1d(self.ids_N, self.here)
            self._spend("away", absent, self.now_N[absent], end_s)

    def _steps_of_round(self, step: int) -> Floats:
        """Return the steps that each device takes in the round of `step`, which counts from 0."""
        method = self.run.method
        if not method.is_paced:
            return np.full(len(self.devices), float(method.round_steps))
        return np.array(round_counts(method, self.step_s, step // method.round_steps), dtype=float)

    # Phases of a stop

    def _compute(self, done: int, step: int) -> None:
        """Compute the steps since the last stop; with a deadline, each device no more than it takes in the round."""
        here = self.here
        if self.round is not None:
            now_M = self.now_N[here]
            self._spend("compute", here, now_M, np.maximum(now_M, self.round.ends_s_N[here]))
            return
        steps_M = np.full(len(here), float(step - done))
        if self.run.method.is_paced:
            steps_M = np.minimum(steps_M, self._steps_of_round(step - 1)[here])
        # One draw for all steps since the last stop: their sum has the distribution of single draws.
        factor_M = slowness(self.run.train.seed, here, step, steps_M, self.jitter_N[here])
        self._spend("compute", here, self.now_N[here], self.now_N[here] + steps_M * self.step_s_N[here] * factor_M)

    def _apply_pending(self, step: int, last: int) -> None:
        """Wait for exchanges that are due; at the run's end for all that become part of the model."""
        for item in list(self.pending):
            if item.due <= step or (step == last and item.part.at_end):
                starts_M = self.now_N[self.here]
                self._spend("exchange", self.here, starts_M, np.maximum(starts_M, item.ends_M))
                self.pending.remove(item)

    def _exchange(self, step: int, last: int, within_steps: bool) -> None:
        """Start the exchanges of a step: those that it needs itself (`within_steps`), or the merges'."""
        for part in self.parts:
            if within_steps != (not part.at_end and part.hidden_steps == 0) or not part.happens(step, last):
                continue
            in_nodes = self.link.node_bytes_per_s is not None and all(t.teams > 1 for t in part.exchange.transfers)
            background = part.hidden_steps > 0 and not (part.at_end and step == last)
            now_M = self.now_N[self.here]
            starts_M = np.maximum(now_M, self.channel_free_s[in_nodes])
            if not background:
                self._spend("wait", self.here, now_M, starts_M)
            ends_M: Times = starts_M
            for kind, pieces_start, pieces_end in self._travel(part.exchange, starts_M):
                ends_M = pieces_end
                if not background:
                    self._spend(kind, self.here, pieces_start, pieces_end)
            self.channel_free_s[in_nodes] = max(self.channel_free_s[in_nodes], float(np.max(ends_M)))
            if background:
                self.pending.append(_PendingExchange(part, step + part.hidden_steps, ends_M))

    def _merge(self, step: int, last: int) -> None:
        """Spend the arithmetic of one fragment's merge; the simulated clock, too, charges no more at the run's end."""
        if step == last or step % self.run.method.steps_apart == 0:
            starts_M = self.now_N[self.here]
            self._spend("compute", self.here, starts_M, starts_M + self.merge_s_N[self.here])

    # Messages

    def _travel(self, exchange: Exchange, starts_M: Floats) -> Iterator[tuple[str, Times, Times]]:
        """Yield kind, start and end of the devices' activities while the exchange's messages follow each other."""
        now: Times = starts_M
        for transfer in exchange.transfers:
            transfer = self._among_present(transfer)
            if transfer.devices == 1:
                continue
            if transfer.operation == "push" and not isinstance(now, float):
                ends_M = self._push_ends(transfer, now)
                yield "exchange", now, ends_M
                now = ends_M
                continue
            if not isinstance(now, float):  # any other message needs all devices
                yield "wait", now, float(now.max())
                now = float(now.max())
            end_s = now + transfer_s(transfer, self.link)
            yield "exchange", now, end_s
            now = end_s

    def _push_ends(self, transfer: Transfer, starts_M: Floats) -> Floats:
        """Return the end of each device's push to the server, whose link those that push at the same time share."""
        count = min(transfer.devices, len(starts_M))
        ends_M = starts_M.copy()
        if self.link.lines:
            paths, whole = server_paths(True, len(self.devices), self.link)
            ends_M[:count] = self._unequal_push_ends(transfer, starts_M[:count], paths, whole)
            return ends_M
        own, whole = server_rates(True, transfer.devices, self.link)
        ends_M[:count] = shared_ends(starts_M[:count], transfer.payload_bytes, own, whole)
        ends_M[:count] += server_latency_s(transfer.devices, self.link)
        return ends_M

    def _unequal_push_ends(
        self, transfer: Transfer, starts_M: Floats, paths: Sequence[ServerPath], whole: float
    ) -> Floats:
        """Return the ends of pushes over lines that differ; `whole` is the server's bytes/s."""
        mine = [paths[device] for device in self.here[: len(starts_M)]]
        own_M = np.array([path.own_bytes_per_s for path in mine])
        place_M = np.array([-1 if path.place is None else path.place for path in mine])
        rates = {path.place: path.place_bytes_per_s for path in mine if path.place is not None}
        ends_M = unequal_ends(starts_M, transfer.payload_bytes, UnequalLinks(own_M, place_M, rates, whole))
        return ends_M + server_delays(self.link) * np.array([path.delay_s for path in mine])

    def _among_present(self, transfer: Transfer) -> Transfer:
        """Return the message with the devices that are present; teams are assumed to stay complete."""
        if self.round is not None and transfer.devices == len(self.devices):
            return transfer.among(self.round.present_N.tolist())
        present = len(self.here)
        return transfer if transfer.devices <= present or transfer.teams > 1 else replace(transfer, devices=present)

    def _spend(self, kind: str, devices: NDArray[np.int64], starts: Times, ends: Times) -> None:
        """Move the clocks of some devices to `ends`; add the seconds to the totals and the spans."""
        if not len(devices):
            return
        self.totals[kind] += float(np.sum(np.broadcast_to(np.asarray(ends) - starts, len(devices))))
        self.now_N[devices] = ends
        if len(self.round_ends_s) >= self.drawn_rounds:
            return
        for device in self.drawn:
            index = int(np.searchsorted(devices, device))
            if index < len(devices) and devices[index] == device:
                start_s, end_s = (float(np.broadcast_to(x, len(devices))[index]) for x in (starts, ends))
                self._draw(Span(device, kind, start_s, end_s))

    def _draw(self, span: Span) -> None:
        """Keep a span; one that continues the device's last one extends it."""
        if span.end_s <= span.start_s:
            return
        before = next((i for i in range(len(self.spans) - 1, -1, -1) if self.spans[i].device == span.device), None)
        if before is not None and self.spans[before].kind == span.kind and self.spans[before].end_s == span.start_s:
            self.spans[before] = replace(self.spans[before], end_s=span.end_s)
        else:
            self.spans.append(span)
