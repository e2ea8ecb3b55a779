"""Rounds of devices of unequal speed: each takes as many of the T steps as fit, and its merge weight follows from them.

    c_n = steps of device n in the round, 1 ≤ c_n ≤ T;    the merge weighs with w_n = c_n / Σ_m c_m

in place of 1/N; a device without finite weights has w_n = 0, and the others' shares add up to 1 again. Shares of
unequal shards, where a method has them, multiply c_n. A device takes the first c_n steps of the round and skips the
others, so batches stay addressed by (device, step) and the learning rate goes by the run's step. So does Adam's step
counter: when a round begins it is the run's step on every device, skipped steps counted (or the steps since the
optimizer was reset). Moments stay as they were when the device stopped.

In a simulation c_n follows from the profile's step times (simulate.rules.pace); a launched process goes by its clock
and stops when the deadline has passed; the first round of a launch has none unless one is given, and later ones take
what the fastest device needs for T steps by the last round's measure. Steps that are given, round by round, make both
worlds take the same.

All local devices share one tensor program, so a device that has stopped is computed along with the others. Its rows of
parameters and moments are set aside when it stops and put back before the merge, which undoes these steps and costs the
others nothing. Once all local devices have stopped, nothing is computed. simulate.methods.registry puts this class in
front of a method with `pace = "deadline"`; the training loop gives it the devices' seconds or makes it go by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from simulate.layers.accelerator import synchronize
from simulate.methods.base import Method
from simulate.rules.pace import round_counts


class Paced(Method):
    """A method in which devices may take fewer steps than a round has; the method behind it trains and merges."""

    weighs_devices = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        devices, local = self.run.cluster.devices, self.local_devices
        self.step_s: Sequence[float] | None = None
        """Seconds of a step of each device, from which a simulation gets its counts; None: all are equally fast."""
        self.goes_by_clock = False
        """Whether this process stops its devices when the round's deadline has passed."""
        self.now_s: Callable[[], float] = time.monotonic
        self.counts_N = torch.tensor([self.run.method.round_steps] * devices)
        """Steps c_n of each device in the current or last round; by the clock, others' are known after the merge."""
        self.trained = torch.tensor(0)
        """Steps of all devices together in earlier rounds, or samples where devices have unequal batches."""
        self.skipped = torch.tensor(0)
        """Steps of the current round that no local device took."""
        self._samples_N = torch.tensor(self.run.method.device_samples or 1)
        self.last_losses_L = torch.zeros(local, dtype=torch.float64)
        self._aside: dict[int, dict[str, Tensor]] = {}
        """Rows of local devices that have stopped, as they were when they stopped."""
        self._started_s = self._stopped_s = 0.0
        self._measured_s: float | None = None
        """Seconds that the fastest device (with a quorum, the quorum-th) needs for a round, as measured in the last."""

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        """Step the local devices that are not done with the round; for the others return their last losses."""
        done = step % self.run.method.round_steps  # steps of the round before this one
        if done == 0:
            self._begin_round(step)
        self._stop_by_clock(done)
        counts_L = self.counts_N[self._local].tolist()
        if all(count <= done for count in counts_L):
            self.skipped += 1  # Adam's counters catch up when the round ends
            return self.last_losses_L.clone()
        for device, count in enumerate(counts_L):
            if count <= done and device not in self._aside:
                self._set_aside(device)
        # All local devices step, the stopped ones in vain: leaving rows out of the tensor program would cost more.
        losses_L = super().step(inputs, targets, step)  # type: ignore[safe-super]
        for device, count in enumerate(counts_L):
            if count > done:
                self.last_losses_L[device] = losses_L[device]
        return self.last_losses_L.clone()

    def _begin_round(self, step: int) -> None:
        method, every = self.run.method, self.run.method.round_steps
        if step:
            self.trained += (self.counts_N * self._samples_N).sum()
        step_s = self.step_s or (1.0,) * len(self.counts_N)
        counts = (every,) * len(step_s) if self.goes_by_clock else round_counts(method, step_s, step // every)
        steps_left = self.run.train.steps - step  # the run's last round may be short
        self.counts_N.copy_(torch.tensor(counts).clamp(max=steps_left))
        self._started_s = self._stopped_s = self._time()

    def _stop_by_clock(self, done: int) -> None:
        """End the local devices' round if the deadline has passed; the first step of a round is always taken."""
        if not self.goes_by_clock or int(self.counts_N[self._local].min()) <= done:
            return
        self._stopped_s = self._time()
        deadline_s = self._deadline_s or self._measured_s
        if done and deadline_s is not None and self._stopped_s - self._started_s >= deadline_s:
            self.counts_N[self._local] = done

    @property
    def _deadline_s(self) -> float | None:
        """Seconds of a round; None where they are measured."""
        return self.run.method.deadline_s

    def _pace(self, seconds_N: Tensor) -> float:
        """Return the seconds of a step, out of all devices', that measured rounds are paced by."""
        return float(seconds_N.min())

    def _time(self) -> float:
        if self.goes_by_clock:
            synchronize(next(iter(self.parameters.values())).device)  # the work of the last step counts
        return self.now_s()

    @property
    def _local(self) -> slice:
        local = self.communicator.local_devices
        return slice(local.start, local.stop)

    def _set_aside(self, device: int) -> None:
        """Keep a local device's rows as they are now."""
        parts = ((name, tensor, len(tensor) // self.local_devices) for name, tensor in self.stepper.tensors().items())
        self._aside[device] = {name: t[device * rows : (device + 1) * rows].clone() for name, t, rows in parts}

    def _put_back(self, tensors: Mapping[str, Tensor]) -> None:
        for device, kept in self._aside.items():
            for name, rows in kept.items():
                tensors[name][device * len(rows) : (device + 1) * len(rows)] = rows

    @torch.no_grad()
    def close_round(self, step: int) -> None:
        """Put back the rows of stopped devices, and exchange how many steps each took; needed before a merge."""
        self._put_back(self.stepper.tensors())
        self._aside.clear()
        # Bias correction goes by the run's step on every device, or equal gradients would step differently.
        for state in self.stepper.state.values():
            if "step" in state:
                state["step"] += int(self.skipped)
        self.skipped.zero_()
        if self.goes_by_clock:
            self._share_counts(step)

    def _share_counts(self, step: int) -> None:
        """Exchange how many steps each device took in this round, and the seconds of one."""
        steps = step % self.run.method.round_steps + 1
        self.counts_N.clamp_(max=steps)  # a round that the run's end cuts short
        own_L = self.counts_N[self._local].double()
        if int(own_L.min()) == steps:  # the deadline has not stopped the round
            self._stopped_s = self._time()
        seconds_L = (self._stopped_s - self._started_s) / own_L
        counts_N, seconds_N = self.communicator.all_gather_scalars(torch.stack([own_L, seconds_L], 1)).unbind(1)
        self.counts_N.copy_(counts_N.round())  # they travelled as floats
        self._measured_s = self._pace(seconds_N) * self.run.method.round_steps

    def merge(self, step: int) -> None:
        self.close_round(step)
        super().merge(step)  # type: ignore[safe-super]

    def shares(self, sizes: Sequence[float] | None = None) -> Tensor | None:
        # w_n = c_n / Σ_m c_m, times the shards' sizes and the samples of a step where these differ.
        sizes_N = self.times_samples(sizes)
        weights = self.counts_N.double() * (1.0 if sizes_N is None else sizes_N)
        if bool((weights == weights[0]).all()):
            return self.counted(None)
        return self.counted((weights / weights.sum()).to(next(iter(self.parameters.values()))))

    def active(self, step: int) -> list[int]:
        """Return the devices that train in a step of the current or last round, in global order."""
        done = step % self.run.method.round_steps
        return [device for device, count in enumerate(self.counts_N.tolist()) if count > done]

    def samples_done(self, step: int) -> int:
        done = step % self.run.method.round_steps + 1
        trained = int(self.trained + (self.counts_N.clamp(max=done) * self._samples_N).sum())
        return trained if self.run.method.device_samples else trained * self.run.train.device_batch

    def steps_done(self) -> list[int] | None:
        counts: list[int] = self.counts_N.tolist()
        return counts

    def before_saving(self, state: dict[str, Tensor]) -> None:
        """Save devices that have stopped as they were then; those in use go on with steps that count for nothing."""
        # Clones, since the tensors in use must not get the rows put back.
        for name in next(iter(self._aside.values()), {}):
            state[name] = state[name].clone()
        self._put_back(state)

    def before_loading(self, state: dict[str, Tensor]) -> None:
        super().before_loading(state)
        self._aside.clear()  # the next step sets aside what was loaded

    def extra_state(self) -> dict[str, Tensor]:
        pace = {"counts": self.counts_N, "trained": self.trained, "skipped": self.skipped}
        paced = {f"pace.{name}": tensor for name, tensor in pace.items()}
        return {**super().extra_state(), **paced, "pace.losses": self.last_losses_L}

    def is_kept_per_device(self, name: str) -> bool:
        return name == "pace.losses" or super().is_kept_per_device(name)
