"""The simulated clock: what the profile's hardware would have taken, charged as the run goes.

It is a launched run's clock in both worlds: evaluations and checkpoints are charged when a launched run makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulate.comm.transfers import Transfer
from simulate.config.hardware import Device, Link
from simulate.config.run import Run
from simulate.costs.eval_and_save_time import pauses
from simulate.costs.message_time import link_of, transfer_s
from simulate.costs.step_time import device_step_s, distinct, round_time
from simulate.rules.cadence import Cadence


class SimulatedClock:
    """Seconds of compute, pauses and waiting for exchanges so far; exchanges are charged from the messages really made.

    One exchange travels at a time. A method waits for it, unless it started it in the background: then the exchange
    takes the link from that moment on, and only what is left of it when the method needs the result is waited for.
    """

    def __init__(self, run: Run, devices: Sequence[Device], link: Link) -> None:
        self._time = round_time(run, run.model.shape(), devices, link)
        self.device_step_s = device_step_s(run, run.model.shape(), devices)
        """Seconds of one step of each device."""
        self._merge_s = self._time.merge_s / run.method.merges_per_round
        self._link = link_of(link, run.cluster.backend)
        self._calendar, self._pauses = Cadence.of(run), pauses(run, run.model.shape(), distinct(devices))
        self.compute_s = 0.0
        self.exchange_s = 0.0
        self.pause_s = 0.0
        self.link_free_s = 0.0
        """Moment from which the link is free again."""

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return self.compute_s + self.exchange_s + self.pause_s

    def charge_step(self) -> None:
        """Charge the compute of one step: the slowest device's, or its part of a round with a deadline.

        Before what the step exchanges or waits for.
        """
        self.compute_s += self._time.compute_s

    def charge_merge(self) -> None:
        """Charge the arithmetic of one merge."""
        self.compute_s += self._merge_s

    def charge_evaluation(self, step: int) -> None:
        """Charge the evaluation after a step, if a launched run makes one there."""
        if self._calendar.evaluates(step):
            self.pause_s += self._pauses.evaluation_s

    def charge_checkpoint(self, step: int) -> None:
        """Charge the checkpoint after a step, if a launched run saves one there."""
        if self._calendar.saves(step):
            self.pause_s += self._pauses.save_s or 0.0

    def charge_transfer(self, transfer: Transfer, background: bool) -> None:
        """Charge one message; made to be a communicator's listener."""
        self.link_free_s = max(self.link_free_s, self.now_s) + transfer_s(transfer, self._link)
        if not background:
            self.wait()

    def wait(self) -> None:
        """Let time pass until what travels has arrived."""
        self.exchange_s += max(0.0, self.link_free_s - self.now_s)
