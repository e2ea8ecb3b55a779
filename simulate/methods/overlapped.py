"""Merges that arrive late, so that training need not wait: sent after step kT, applied after kT + d.

A merge sends a snapshot of each device's weights, which travels behind the next d steps. The merged weights then
replace the snapshot, and a device keeps what it learned meanwhile, so that nothing is lost and nothing counts twice:

    averaged parameters:  θ_n ← merge(σ) + (θ_n − σ_n)      with the snapshots σ

LTE treats its products likewise (simulate.methods.lte.train). After the run's last step a merge in flight is applied,
and then everything is merged at once, so that the run ends with one model. Between merges no device trains with the
merged weights, so they are kept apart. Streaming DiLoCo (arXiv 2501.18512) overlaps likewise, but mixes the merged
weights with all of a device's own. simulate.methods.registry puts this class in front of a method with `merge_delay`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simulate.methods.base import Method

NOTHING = -1


class Delayed(Method):
    """A method whose merges arrive late; the method behind it says how a fragment is sent, and applied later."""

    send_fragment: Callable[[int, int], None]
    """(group, step): start the merge of a group of layers, with their current weights; called inside `background`."""
    apply_merged_fragment: Callable[[int], None]
    """(group): put the merge of a group of layers that has arrived into every device's weights."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.sent_after = torch.tensor(NOTHING)
        """Step, from 0, after which the merge in flight was sent; NOTHING: none is in flight. A tensor, to be saved."""

    @property
    def delay(self) -> int:
        """Steps d that go on while a merge travels."""
        return self.run.method.late_steps

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        losses_L = super().step(inputs, targets, step)  # type: ignore[safe-super]
        # After step kT + d has changed the weights, as the formula above has it.
        if int(self.sent_after) != NOTHING and step >= int(self.sent_after) + self.delay:
            self.arrive()
        return losses_L

    @torch.no_grad()
    def merge(self, step: int) -> None:
        self.arrive()  # one merge travels at a time
        if self.is_last(step):
            super().merge(step)  # type: ignore[safe-super]
            return
        with self.communicator.background():
            for index in self.fragments_due(step):
                self.send_fragment(index, step)
        self.sent_after.fill_(step)
        self.healthy_N = None  # the shares of the merge that was sent are settled

    def fragments_in_flight(self) -> list[int]:
        sent_after = int(self.sent_after)
        return [] if sent_after == NOTHING else self.fragments_due(sent_after)

    @torch.no_grad()
    def arrive(self) -> None:
        """Wait for the merge in flight, if there is one, and apply it."""
        if int(self.sent_after) == NOTHING:
            return
        self.communicator.wait()
        for index in self.fragments_in_flight():
            self.apply_merged_fragment(index)
        self.sent_after.fill_(NOTHING)

    def merged_weights_ready(self, step: int) -> bool:
        sent_after = step - self.delay  # from when what arrives now was sent
        return self.is_last(step) or (sent_after >= 0 and self.merge_due(sent_after))

    def exclude_devices(self, healthy_N: Tensor) -> None:
        self.arrive()  # with what all devices sent when they were healthy
        super().exclude_devices(healthy_N)

    def extra_state(self) -> dict[str, Tensor]:
        return {**super().extra_state(), "sent_after": self.sent_after}
