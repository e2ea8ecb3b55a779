"""Decide who takes part in each merge of a simulated run, where merges go on without devices that are late or lost.

    t_n = step_s_n · slowness_n                 seconds of a step of device n in this round
    cutoff = start + D, or when the quorum-th device can bring something, whichever is later
    c_n = min(T, ⌊(cutoff − start_n) / t_n⌋)    steps of a device that began this round; with 0 it is late

D is `cluster.deadline_s`, or what the quorum-th fastest device needs for T steps by its mean step. A device that is
late brings its first step to the first merge whose cutoff is not before that step's end. One that is lost leaves within
the round (a draw against the profile's `leave_per_hour`), brings nothing, and takes part in the rounds that begin from
`join_s` after that on, once it has got the merged weights. Where fewer than the quorum are left, the round waits until
enough are back.

Every draw has an address, so that the simulation and the timeline, which both ask here, see the same devices at the
same times, and a rerun sees them again. Torch-free.

Letters: N devices, T steps of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulate.config.hardware import Device
from simulate.config.run import Run
from simulate.config.tables import LOST
from simulate.rules.churn import leave_probability
from simulate.rules.jitter import Floats, Integers, slowness, uniform
from simulate.rules.pace import ROUNDING, quorum_deadline_s

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Attendance:
    """The devices of one round."""

    brought_N: Integers
    """Steps that each device brings to the round's merge, as `cluster.merges_given` has them."""
    takes_N: Integers
    """Steps that each device takes on the weights that this round starts from, also those that it brings later."""
    joined_N: Flags
    """Devices that were lost and are back: they get the merged weights first."""
    starts_s: float
    """When the round begins, which may have waited for devices to come back."""
    ends_s_N: Floats
    """When each device that takes part is done with its steps; 0 for others."""
    leaves: int
    """Number of devices that were lost in this round, also of those for which it waited."""

    @property
    def present_N(self) -> Flags:
        """Devices that take part in the merge."""
        return self.brought_N > 0


class GivenAttendance:
    """Rule of who takes part in each merge of a run that `cluster.merges_given` tells."""

    def __init__(self, run: Run, step_s: Sequence[float] | None = None, base_s: float = 0.0) -> None:
        assert run.cluster.merges_given is not None
        self.rows = np.array(run.cluster.merges_given)
        self.every, self.last = run.method.round_steps, run.train.steps
        self.step_s_N = np.ones(self.rows.shape[1]) if step_s is None else np.array(step_s)
        self.base_s = base_s

    def row(self, index: int) -> Integers:
        """Return the numbers given for the index-th merge, counted from 0."""
        row: Integers = self.rows[index % len(self.rows)]
        return row

    def begin(self, step: int, now_s: float) -> Attendance:
        """Return who is there in the round that begins with `step` at `now_s`."""
        index, count = step // self.every, self.rows.shape[1]
        row_N, before_N = self.row(index), self.row(index - 1) if index else np.ones(count, dtype=np.int64)
        takes_N = np.array([self._takes(index, n) if before_N[n] else 0 for n in range(count)])
        own_N = np.array([self._takes(self._base(index, n), n) if row_N[n] > 0 else 0 for n in range(count)])
        joined_N, leaves = (before_N == LOST) & (row_N != LOST), int(((row_N == LOST) & (before_N != LOST)).sum())
        # What late devices bring was computed while others went on.
        ends_s_N = np.where(row_N > 0, now_s + joined_N * self.base_s + takes_N * self.step_s_N, 0.0)
        return Attendance(np.where(row_N > 0, own_N, row_N), takes_N, joined_N, now_s, ends_s_N, leaves)

    def _base(self, index: int, device: int) -> int:
        """Return the round from whose weights the device trains that takes part in this merge."""
        while index and self.row(index - 1)[device] == 0:
            index -= 1
        return index

    def _takes(self, index: int, device: int) -> int:
        """Return the steps of a device that starts from this round's weights, to bring them now or later."""
        rounds = range(index, -(-self.last // self.every))
        given = next((steps for later in rounds if (steps := int(self.row(later)[device]))), 0)
        return max(0, min(given, self.last - index * self.every))  # the run's last round may be short

    def state_dict(self) -> dict[str, Floats]:
        """Return nothing: the rows know everything."""
        return {}


class SimulatedAttendance:
    """Rule of who takes part in each merge, by the profile's step times, jitter and churn."""

    def __init__(
        self, run: Run, devices: Sequence[Device], step_s: Sequence[float], expected_round_s: float, base_s: float = 0.0
    ) -> None:
        """Begin before the first round; `base_s` are the seconds in which a device gets the merged weights."""
        self.base_s, self.run, self.every = base_s, run, run.method.round_steps
        self.step_s_N = np.array(step_s)
        self.jitter_N = np.array([device.step_jitter for device in devices])
        self.join_s_N = np.array([device.join_s for device in devices])
        rates = {device.leave_per_hour for device in devices}
        chances = {rate: leave_probability(rate, expected_round_s) for rate in rates}
        self.leave_N = np.array([chances[device.leave_per_hour] for device in devices])
        self.expected_round_s, self.ids_N = expected_round_s, np.arange(len(devices))
        self.deadline_s = quorum_deadline_s(run.cluster, self.every, step_s)
        self.back_s_N = np.full(len(devices), -np.inf)
        """When devices that were lost are back; −inf for others."""
        self.ready_s_N = np.full(len(devices), -np.inf)
        """When late devices are done with their first step; −inf for others."""

    def begin(self, step: int, now_s: float) -> Attendance:
        """Return who is there in the round that begins with `step` at `now_s`."""
        lost_N = self.back_s_N > -np.inf
        self.back_s_N[self.back_s_N <= now_s] = -np.inf
        leaves = self._lose(step, now_s)
        # Where too few are left, those that are back first make up the quorum: nobody is lost while all wait.
        starts_s = max(now_s, _smallest(self.back_s_N, self.run.cluster.needed))
        self.back_s_N[self.back_s_N <= starts_s] = -np.inf
        # Who was lost and is back within the same round's wait has missed no merge.
        return self._round(step, starts_s, lost_N & (self.back_s_N == -np.inf), leaves)

    def _lose(self, step: int, now_s: float) -> int:
        """Draw how many are lost in this round, which, and when they are back; nobody is who is late already."""
        here_N = self.ids_N[(self.back_s_N == -np.inf) & (self.ready_s_N == -np.inf)]
        seed = self.run.train.seed
        gone = here_N[uniform(seed, "leave", here_N, step) < self.leave_N[here_N]] if self.leave_N.any() else here_N[:0]
        leave_s = now_s + self.expected_round_s * uniform(seed, "leave, moment", gone, step)
        self.back_s_N[gone] = leave_s + self.join_s_N[gone]
        return len(gone)

    def _round(self, step: int, starts_s: float, joined_N: Flags, leaves: int) -> Attendance:
        here_N, late_N = self.back_s_N == -np.inf, self.ready_s_N > -np.inf
        fresh_N = here_N & ~late_N
        most = min(self.every, self.run.train.steps - step)
        factor_N = slowness(
            self.run.train.seed, self.ids_N, step + most, np.full(len(self.ids_N), float(most)), self.jitter_N
        )
        own_s_N = self.step_s_N * factor_N
        own_start_s_N = starts_s + joined_N * self.base_s
        first_s_N = np.where(here_N, np.where(late_N, self.ready_s_N, own_start_s_N + own_s_N), np.inf)
        cutoff_s = max(starts_s + self.deadline_s, _smallest(first_s_N, self.run.cluster.needed))
        present_N = first_s_N <= cutoff_s + ROUNDING * own_s_N
        fit_N = np.floor((cutoff_s - own_start_s_N) / own_s_N + ROUNDING).astype(np.int64).clip(1, most)
        takes_N = np.where(fresh_N, np.where(present_N, fit_N, 1), 0)
        brought_N = np.where(present_N, np.where(late_N, 1, takes_N), np.where(here_N, 0, LOST))
        ends_s_N = np.where(present_N, np.where(late_N, self.ready_s_N, own_start_s_N + takes_N * own_s_N), 0.0)
        self.ready_s_N[:] = np.where(here_N & ~present_N, first_s_N, -np.inf)
        return Attendance(brought_N, takes_N, joined_N, starts_s, ends_s_N, leaves)

    def state_dict(self) -> dict[str, Floats]:
        """Return what the next rounds depend on, in arrays to be read and written."""
        return {"back_s": self.back_s_N, "ready_s": self.ready_s_N}


def _smallest(values_N: Floats, count: int) -> float:
    """Return the count-th smallest value."""
    return float(np.partition(values_N, count - 1)[count - 1])


def attendance_of(
    run: Run, devices: Sequence[Device], step_s: Sequence[float], expected_round_s: float, base_s: float
) -> GivenAttendance | SimulatedAttendance:
    """Return the rule by which a simulated run with a quorum knows who takes part."""
    if run.cluster.merges_given is not None:
        return GivenAttendance(run, step_s, base_s)
    return SimulatedAttendance(run, devices, step_s, expected_round_s, base_s)
