"""The simulated clock: the seconds that the profile's hardware would have taken, charged as the run goes.

It charges evaluations and checkpoints when a launched run makes them, also where all devices are simulated in one
process, so that a simulated and a launched run report equal times. The training loop charges steps, merges and pauses;
the communicator charges messages.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulate.comm.transfers import Transfer
from simulate.config.hardware import Device, Link
from simulate.config.run import Run
from simulate.costs.eval_and_save_time import eval_and_save_time
from simulate.costs.message_schedule import base_exchange
from simulate.costs.message_time import link_of, transfer_s
from simulate.costs.step_time import device_step_s, distinct, exchange_s, round_time
from simulate.rules.attendance import GivenAttendance, SimulatedAttendance, attendance_of
from simulate.rules.cadence import Cadence


class SimulatedClock:
    """Seconds of compute, pauses and waiting for exchanges so far; exchanges are charged from the messages really made.

    One exchange travels at a time. A method waits for it, unless it started it in the background: then the exchange
    occupies the link from that time on, and the method waits only for the rest of it when it needs the result.
    """

    def __init__(self, run: Run, devices: Sequence[Device], link: Link) -> None:
        self._time = round_time(run, run.shape(), devices, link)
        self.device_step_s = device_step_s(run, run.shape(), devices)
        """Seconds of one step of each device."""
        self.attendance: GivenAttendance | SimulatedAttendance | None = None
        """Rule of who is there in each round of a simulation; None where all are."""
        if run.cluster.has_quorum:
            base_s = exchange_s(base_exchange(run, run.shape()), link_of(link, run.cluster.backend))
            self.attendance = attendance_of(run, devices, self.device_step_s, self._time.round_s, base_s)
        # A round with fragments merges several times, each a part of the layers.
        self._merge_s = self._time.merge_s / run.method.merges_per_round
        self._link = link_of(link, run.cluster.backend)
        self._cadence, self._eval_and_save = (
            Cadence.of(run),
            eval_and_save_time(run, run.shape(), distinct(devices), self._time.compute_s),
        )
        self.compute_s = 0.0
        self.exchange_s = 0.0
        self.pause_s = 0.0
        self.link_free_s = 0.0
        """Time from which the link is free again."""

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return self.compute_s + self.exchange_s + self.pause_s

    def charge_step(self, step_s: float | None = None) -> None:
        """Charge the compute of one step: the slowest device's, or its part of a round with a deadline.

        Call it before the step, whose exchanges begin when its compute is done. `step_s` takes the planned time's
        place, where rounds differ.
        """
        self.compute_s += self._time.compute_s if step_s is None else step_s

    def charge_merge(self) -> None:
        """Charge the arithmetic of one merge."""
        self.compute_s += self._merge_s

    def charge_evaluation(self, step: int) -> None:
        """Charge the evaluation after a step, if a launched run makes one there."""
        if self._cadence.evaluates(step):
            self.pause_s += self._eval_and_save.evaluation_s

    def charge_checkpoint(self, step: int) -> None:
        """Charge what training waits for the checkpoint after a step, if a launched run saves one there."""
        if self._cadence.saves(step):
            self.pause_s += self._eval_and_save.save_pause_s(step)

    def charge_transfer(self, transfer: Transfer, background: bool) -> None:
        """Charge one message; a communicator calls it for each, as its listener."""
        # One exchange at a time: it begins when the link is free, and not before the program has got here.
        self.link_free_s = max(self.link_free_s, self.now_s) + transfer_s(transfer, self._link)
        if not background:
            self.wait()

    def wait(self) -> None:
        """Charge the time until the last exchange has arrived."""
        self.exchange_s += max(0.0, self.link_free_s - self.now_s)
