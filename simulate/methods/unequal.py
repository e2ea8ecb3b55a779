"""Unequal devices in one process: a method for each class of devices, which act as processes of a launched run do.

Each class's devices are one tensor program with its own batch, rank, heads and formats. Steps go class after class;
where devices exchange, the programs meet (simulate.comm.programs), and what they exchange is weighed by the samples
that devices trained on. simulate.methods.registry builds this class where a process holds devices of several classes; a
launched process holds those of one, and has that class's method alone.

Legend: L devices of one class, N devices of all, B samples of a device's step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from simulate.comm.base import Communicator
from simulate.comm.programs import Meeting, ProgramCommunicator
from simulate.config.run import Run
from simulate.methods.base import Method
from simulate.methods.method_state import OWN, MethodState
from simulate.methods.state import State

Build = Callable[[Run, Communicator, torch.device, "nn.Module | None"], Method]


class Unequal(Method):
    """The methods of all classes behind the interface of one."""

    def __init__(
        self, build: Build, run: Run, communicator: Communicator, device: torch.device, network: nn.Module | None = None
    ) -> None:
        # Not Method's own: there is no network but those of the classes.
        self.run, self.communicator = run, communicator
        self.local_devices = len(communicator.local_devices)
        self.healthy_N = None
        self.meeting, devices = Meeting(len(run.cluster.classes)), run.cluster.class_devices
        views = [ProgramCommunicator(self.meeting, index, own, communicator) for index, own in enumerate(devices)]
        # Made in threads, too, for methods that exchange when they begin.
        self.methods = self.meeting.run([partial(build, run, view, device, network) for view in views])
        first = self.methods[0]
        self.model, self.loss_scale = first.model, first.loss_scale
        self.is_trained_per_device = first.is_trained_per_device
        self.can_exclude_devices = first.can_exclude_devices
        self._samples = [len(one.devices) * one.samples for one in first.run.method.fleet]

    @property
    def step_s(self) -> Sequence[float] | None:
        """Seconds of a step of each device, which paced methods count steps by."""
        return getattr(self.methods[0], "step_s", None)

    @step_s.setter
    def step_s(self, seconds: Sequence[float] | None) -> None:
        for method in self.methods:
            if hasattr(method, "step_s"):
                method.step_s = seconds

    @property
    def attendance(self) -> Any:
        """Rule of who is there in a simulation's rounds, with a quorum; the first class's method keeps it."""
        return getattr(self.methods[0], "attendance", None)

    @attendance.setter
    def attendance(self, attendance: Any) -> None:
        self.methods[0].attendance = attendance  # type: ignore[attr-defined]

    def begin_step(self, step: int, now_s: float) -> float | None:
        if self.attendance is not None and step % self.run.method.round_steps == 0:
            # Asked once: a simulation's attendance goes on with every question.
            round_ = self.attendance.begin(step, now_s)
            for method in self.methods:
                method.attend(round_, step, now_s)  # type: ignore[attr-defined]
        return self.methods[0].begin_step(step, now_s)

    def prepare(self, model: nn.Module) -> nn.Module:
        return self.methods[0].prepare(model)

    def _each(self, call: Callable[[Method], None]) -> None:
        """Call something of every class's method, which may meet with the others in it."""
        self.meeting.run([partial(call, method) for method in self.methods])

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        parts = zip(self.methods, inputs.split(self._samples), targets.split(self._samples), strict=True)
        # Programs of methods that exchange in each step meet in it; the others pass each other by.
        return torch.cat(self.meeting.run([partial(method.step, x, y, step) for method, x, y in parts]))

    def rate_factor(self, step: int) -> float:
        return self.methods[0].rate_factor(step)

    def merge_due(self, step: int) -> bool:
        return self.methods[0].merge_due(step)

    def merged_weights_ready(self, step: int) -> bool:
        return self.methods[0].merged_weights_ready(step)

    def merge(self, step: int) -> None:
        self._each(lambda method: method.merge(step))

    def merged_state(self) -> dict[str, Tensor]:
        return self.methods[0].merged_state()

    def weights_in_use(self) -> dict[str, Tensor]:
        return self.methods[0].weights_in_use()

    def healthy(self) -> Tensor:
        return torch.cat([method.healthy() for method in self.methods])

    def exclude_devices(self, healthy_N: Tensor) -> None:
        self._each(lambda method: method.exclude_devices(healthy_N))

    def active(self, step: int) -> list[int]:
        return self.methods[0].active(step)

    def close_round(self, step: int) -> None:
        self._each(lambda method: method.close_round(step))

    def merge_record(self, step: int) -> dict[str, Any] | None:
        return self.methods[0].merge_record(step)

    def steps_done(self) -> list[int] | None:
        return self.methods[0].steps_done()

    def samples_done(self, step: int) -> int:
        return self.methods[0].samples_done(step)

    @property
    def state(self) -> MethodState:
        return UnequalState(self)


class UnequalState(MethodState):
    """The states of all classes' methods as one; what all devices share is there once where classes agree on it."""

    method: Unequal

    def sharded(self) -> State:
        states = [method.state.sharded() for method in self.method.methods]
        joined = State(dict(states[0].shared), {})
        for index, state in enumerate(states):
            joined.of_devices.update(state.of_devices)
            for name, tensor in state.shared.items():
                if index and not _is_same(joined.shared.get(name), tensor):
                    joined.shared[f"{OWN}{index}.{name}"] = tensor
        return joined

    def load_sharded(self, divided: State) -> None:
        for method in self.method.methods:
            method.state.load_sharded(divided)


def _is_same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
