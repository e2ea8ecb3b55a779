"""The simulated clock: what the profile's hardware would have taken, charged as the run goes."""

from __future__ import annotations

from collections.abc import Sequence

from simulate.config import Run
from simulate.costs.time import round_time, transfer_s
from simulate.costs.traffic import Operation, Transfer
from simulate.hardware import Device, Link


class SimulatedClock:
    """Seconds of compute and of exchange so far; exchanges are charged from the messages really made."""

    def __init__(self, run: Run, devices: Sequence[Device], link: Link) -> None:
        self._time = round_time(run, run.model.shape(), devices, link)
        self._link, self._num_devices = link, run.cluster.devices
        self.compute_s = 0.0
        self.exchange_s = 0.0

    @property
    def now_s(self) -> float:
        """Seconds since the run began."""
        return self.compute_s + self.exchange_s

    def charge_step(self) -> None:
        """Charge one optimizer step on the slowest device."""
        self.compute_s += self._time.compute_s

    def charge_merge(self) -> None:
        """Charge a merge's arithmetic."""
        self.compute_s += self._time.merge_s

    def charge_transfer(self, operation: Operation, payload_bytes: int) -> None:
        """Charge one message; made to be a communicator's listener."""
        self.exchange_s += transfer_s(Transfer(operation, payload_bytes), self._num_devices, self._link)
