"""Merges that arrive late, so that training need not wait: sent after step kT, applied after kT + d.

A merge sends a snapshot of each device's weights, which travels behind the next d steps. The merged weights then
replace the snapshot, and a device keeps what it learned meanwhile, so that nothing is lost and nothing counts twice:

    averaged parameters:  θ_n ← merge(σ) + (θ_n − σ_n)      with the snapshots σ

LTE treats its products likewise (simulate.methods.lte.train). After the run's last step a merge in flight is applied,
and then everything is merged at once, so that the run ends with one model. Between merges no device trains with the
merged weights, so they are kept apart. Streaming DiLoCo (arXiv 2501.18512) overlaps likewise, but mixes the merged
weights with all of a device's own.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from simulate.methods.base import Method

NOTHING = -1


class Delayed(Method):
    """A method whose merges may arrive late; subclasses merge a fragment at once, or send it and apply it later."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.sent_after = torch.tensor(NOTHING)
        """Step, from 0, after which the merge in flight was sent; NOTHING: none is in flight. A tensor, to be saved."""

    @property
    def delay(self) -> int:
        """Steps d that go on while a merge travels."""
        return self.run.method.late_steps

    @torch.no_grad()
    def merge(self, step: int) -> None:
        self.arrive()
        if self.delay and not self.is_last(step):
            with self.communicator.background():
                for index in self.fragments_due(step):
                    self.send_fragment(index, step)
            self.sent_after.fill_(step)
        else:
            for index in self.fragments_due(step):
                self.merge_fragment(index, step)
        self.healthy_N = None

    def arrive_if_due(self, step: int) -> None:
        """Apply the merge that was sent d steps ago; called after a step has changed the weights."""
        if self.delay and int(self.sent_after) != NOTHING and step >= int(self.sent_after) + self.delay:
            self.arrive()

    @torch.no_grad()
    def arrive(self) -> None:
        """Wait for the merge in flight, if there is one, and apply it."""
        sent_after = int(self.sent_after)
        if sent_after == NOTHING:
            return
        self.communicator.wait()
        for index in self.fragments_due(sent_after):
            self.apply_merged_fragment(index, sent_after)
        self.sent_after.fill_(NOTHING)

    def merged_weights_ready(self, step: int) -> bool:
        if not self.delay:
            return self.merge_due(step)
        sent_after = step - self.delay
        return self.is_last(step) or (sent_after >= 0 and self.merge_due(sent_after))

    def exclude_devices(self, healthy_N: Tensor) -> None:
        self.arrive()  # with what all devices sent when they were healthy
        super().exclude_devices(healthy_N)

    def extra_state(self) -> dict[str, Tensor]:
        return {"sent_after": self.sent_after} if self.delay else {}

    @abstractmethod
    def merge_fragment(self, index: int, step: int) -> None:
        """Make a group of layers equal on all devices, at once."""

    @abstractmethod
    def send_fragment(self, index: int, step: int) -> None:
        """Start the merge of a group of layers, with their current weights; called inside `background`."""

    @abstractmethod
    def apply_merged_fragment(self, index: int, step: int) -> None:
        """Put the merge that was sent after `step` into every device's weights."""
