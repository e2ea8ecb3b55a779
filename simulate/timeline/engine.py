"""Rounds of a run, event by event: every device has a clock of its own, and messages make clocks meet.

What is sent, and when, is `costs.schedule`'s; what it takes when all are ready at once is `costs.time`'s. Devices that
are not ready at once wait for each other as the collective makes them: a ring of N − 1 hops or more passes something of
everybody to everybody, so nobody is through before the last to start plus all hops (tests/reference/hops.py goes hop by
hop); whoever pushes shares the server's link with those that push just then; a pull waits for all pushes.

One exchange travels at a time. A merge in the background takes the link from the moment when the last device has
started it, and devices meet it where the method takes it over. In-node messages of DASO have links of their own if the
profile says so.

A device that leaves loses the round that it is in: the others merge without it (simulate/timeline/churn.py). Letters: N
devices, M those that are there in this round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from simulate.comm.transfers import Exchange, Transfer
from simulate.config.hardware import Device, Link
from simulate.config.run import Run
from simulate.costs.message_schedule import PeriodicExchange, schedule
from simulate.costs.message_time import link_of, server_latency_s, server_rates, transfer_s
from simulate.costs.step_time import device_merge_s, device_step_s, round_time
from simulate.rules.pace import round_counts
from simulate.timeline.churn import leave_probability
from simulate.timeline.jitter import Floats, slowness, uniform
from simulate.timeline.shared_link import shared_ends

KINDS = ("compute", "exchange", "wait", "away")
Moments = Floats | float
"""One moment for each of M devices, or one for all."""


@dataclass(frozen=True)
class Span:
    """What one device did from one moment to another."""

    device: int
    kind: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """What became of a run's rounds; seconds of a kind are means over all N devices."""

    devices: int
    rounds: int
    steps: int
    wall_s: float
    """Until the last device is through."""
    seconds: dict[str, float]
    """By KINDS; they add up to wall_s, but for what devices still wait at the end."""
    device_steps: float
    """Steps of all devices that became part of the model."""
    leaves: int
    """How often a device left."""
    round_ends_s: tuple[float, ...]
    spans: tuple[Span, ...] = ()
    """Of the devices and rounds that were asked for."""

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
    """Simulate a run, or one that ends after so many of its rounds; keep spans of the `drawn` devices.

    Draws are addressed by (train.seed, purpose, device, step), so equal requests give equal timelines.
    """
    if rounds is not None:
        steps = min(run.train.steps, rounds * run.method.round_steps)
        run = run.model_copy(update={"train": run.train.model_copy(update={"steps": steps})})
    return _Simulation(run, devices, link, drawn, drawn_rounds).go()


@dataclass
class _Travelling:
    part: PeriodicExchange
    due: int
    """The step after whose compute devices take it over."""
    ends_M: Moments


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
    travelling: list[_Travelling] = field(default_factory=list)
    channel_free_s: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    """When the link is free again, and (True) the links within nodes, where the profile has such."""

    def __post_init__(self) -> None:
        run, shape, count = self.run, self.run.model.shape(), len(self.devices)
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
        self.leaves, self.device_steps = 0, 0.0
        self.round_ends_s: list[float] = []

    def go(self) -> Timeline:
        last, every = self.run.train.steps, self.run.method.round_steps
        self._begin_round(0)
        done = 0
        for step in self._stops():
            self._compute(done, step)
            self._exchange(step, last, within_steps=True)
            self._take_over(step, last)
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
            leaves=self.leaves, round_ends_s=tuple(self.round_ends_s), spans=tuple(self.spans),
        )  # fmt: skip

    def _stops(self) -> Iterator[int]:
        """Yield the steps after which anything but the next step happens."""
        last, method = self.run.train.steps, self.run.method
        late = [part.hidden_steps for part in self.parts if part.hidden_steps]
        for step in range(1, last + 1):
            due = any(
                part.happens(step, last) or (part.hidden_steps and part.happens(step - part.hidden_steps, last))
                for part in self.parts
            )
            if due or step == last or step % method.steps_apart == 0 or (late and step <= max(late)):
                yield step

    # Who is there

    def _begin_round(self, step: int) -> None:
        """Let devices come back and leave; who leaves in this round has no part in it."""
        if not self.leave_N.any():
            return
        start_s = float(self.now_N[self.here].max()) if step else 0.0
        back = self.back_N <= start_s
        if not back.any():  # all are away: nothing happens until one is back
            start_s = float(self.back_N.min())
            back = self.back_N <= start_s
        there = self.ids_N[back]
        absent = np.setdiff1d(there, self.here)
        self._spend("away", absent, self.now_N[absent], start_s)
        seed = self.run.train.seed
        leaving = uniform(seed, "leave", there, step) < self.leave_N[there]
        if leaving.all():
            leaving[0] = False  # somebody has to hold the model
        gone = there[leaving]
        moments = start_s + self.expected_round_s * uniform(seed, "leave, moment", gone, step)
        self.back_N[gone] = moments + self.join_s_N[gone]
        self.leaves += len(gone)
        self.here = there[~leaving]
        for item in self.travelling:  # as late for those that are new
            item.ends_M = float(np.max(item.ends_M))

    def _end_round(self, step: int) -> None:
        every, last = self.run.method.round_steps, self.run.train.steps
        steps_N = self._steps_of_round(step - 1)
        self.device_steps += float(np.minimum(steps_N[self.here], step - (step - 1) // every * every).sum())
        self.round_ends_s.append(float(self.now_N[self.here].max()))
        if step == last:
            end_s = self.round_ends_s[-1]
            self._spend("wait", self.here, self.now_N[self.here], end_s)
            absent = np.setdiff1d(self.ids_N, self.here)
            self._spend("away", absent, self.now_N[absent], end_s)

    def _steps_of_round(self, step: int) -> Floats:
        """Return how many steps each device takes of the round that `step`, from 0, is in."""
        method = self.run.method
        if not method.is_paced:
            return np.full(len(self.devices), float(method.round_steps))
        return np.array(round_counts(method, self.step_s, step // method.round_steps), dtype=float)

    # What happens after a step

    def _compute(self, done: int, step: int) -> None:
        """Take the steps since the last stop; with a deadline, each device those of the round that it takes."""
        here = self.here
        steps_M = np.full(len(here), float(step - done))
        if self.run.method.is_paced:
            steps_M = np.minimum(steps_M, self._steps_of_round(step - 1)[here])
        factor_M = slowness(self.run.train.seed, here, step, steps_M, self.jitter_N[here])
        self._spend("compute", here, self.now_N[here], self.now_N[here] + steps_M * self.step_s_N[here] * factor_M)

    def _take_over(self, step: int, last: int) -> None:
        """Wait for what is due; at the run's end for all that becomes part of the model."""
        for item in list(self.travelling):
            if item.due <= step or (step == last and item.part.at_end):
                starts_M = self.now_N[self.here]
                self._spend("exchange", self.here, starts_M, np.maximum(starts_M, item.ends_M))
                self.travelling.remove(item)

    def _exchange(self, step: int, last: int, within_steps: bool) -> None:
        """Make what is sent: what a step needs to be complete before, and merges after what is due was taken over."""
        for part in self.parts:
            if within_steps != (not part.at_end and part.hidden_steps == 0) or not part.happens(step, last):
                continue
            in_nodes = self.link.node_bytes_per_s is not None and all(t.teams > 1 for t in part.exchange.transfers)
            background = part.hidden_steps > 0 and not (part.at_end and step == last)
            now_M = self.now_N[self.here]
            starts_M = np.maximum(now_M, self.channel_free_s[in_nodes])
            if not background:
                self._spend("wait", self.here, now_M, starts_M)
            ends_M: Moments = starts_M
            for kind, pieces_start, pieces_end in self._travel(part.exchange, starts_M):
                ends_M = pieces_end
                if not background:
                    self._spend(kind, self.here, pieces_start, pieces_end)
            self.channel_free_s[in_nodes] = max(self.channel_free_s[in_nodes], float(np.max(ends_M)))
            if background:
                self.travelling.append(_Travelling(part, step + part.hidden_steps, ends_M))

    def _merge(self, step: int, last: int) -> None:
        """Spend the arithmetic of a merge: of one fragment, as the simulated clock charges it also at the run's end."""
        if step == last or step % self.run.method.steps_apart == 0:
            starts_M = self.now_N[self.here]
            self._spend("compute", self.here, starts_M, starts_M + self.merge_s_N[self.here])

    # Messages

    def _travel(self, exchange: Exchange, starts_M: Floats) -> Iterator[tuple[str, Moments, Moments]]:
        """Yield what devices do from when to when while messages are made one after the other."""
        moment: Moments = starts_M
        for transfer in exchange.transfers:
            transfer = self._among_present(transfer)
            if transfer.devices == 1:
                continue
            if transfer.operation == "push" and not isinstance(moment, float):
                own, whole = server_rates(True, transfer.devices, self.link)
                count = min(transfer.devices, len(moment))
                ends_M = moment.copy()
                ends_M[:count] = shared_ends(moment[:count], transfer.payload_bytes, own, whole)
                ends_M[:count] += server_latency_s(transfer.devices, self.link)
                yield "exchange", moment, ends_M
                moment = ends_M
                continue
            if not isinstance(moment, float):
                yield "wait", moment, float(moment.max())
                moment = float(moment.max())
            end_s = moment + transfer_s(transfer, self.link)
            yield "exchange", moment, end_s
            moment = end_s

    def _among_present(self, transfer: Transfer) -> Transfer:
        """Return the message among those that are there; teams are taken to stay whole."""
        present = len(self.here)
        return transfer if transfer.devices <= present or transfer.teams > 1 else replace(transfer, devices=present)

    def _spend(self, kind: str, devices: NDArray[np.int64], starts: Moments, ends: Moments) -> None:
        """Move the clocks of some devices on, and account for it."""
        if not len(devices):
            return
        self.totals[kind] += float(np.sum(np.broadcast_to(np.asarray(ends) - starts, len(devices))))
        self.now_N[devices] = ends
        if len(self.round_ends_s) >= self.drawn_rounds:
            return
        for device in self.drawn:
            place = int(np.searchsorted(devices, device))
            if place < len(devices) and devices[place] == device:
                start_s, end_s = (float(np.broadcast_to(x, len(devices))[place]) for x in (starts, ends))
                self._draw(Span(device, kind, start_s, end_s))

    def _draw(self, span: Span) -> None:
        """Keep a span; one that goes on makes the last one longer."""
        if span.end_s <= span.start_s:
            return
        before = next((i for i in range(len(self.spans) - 1, -1, -1) if self.spans[i].device == span.device), None)
        if before is not None and self.spans[before].kind == span.kind and self.spans[before].end_s == span.start_s:
            self.spans[before] = replace(self.spans[before], end_s=span.end_s)
        else:
            self.spans.append(span)
