"""Methods whose merges arrive d steps after they were sent: letters that are on their way, and then opened."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulate.config.run import Run
from tests.reference.common import adapted_names
from tests.reference.diloco import DilocoTwin, OuterTwin
from tests.reference.local_sgd import LocalSgdTwin
from tests.reference.lora import Draw
from tests.reference.lte import LteTwin
from tests.reference.lte_frozen_a import LteFrozenATwin
from tests.reference.relora import prune_smallest
from tests.reference.sparseloco import SparselocoTwin


class LateLocalSgdTwin(LocalSgdTwin):
    """What was sent is replaced by its mean when that arrives; what was learned since is added on top."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        self.mail: list[tuple[int, list[list[Tensor]], list[Tensor]]] = []
        """(the step after which it arrives, what each device had, the mean of that)."""

    def merge_if_due(self, step: int) -> None:
        if self.mail and (self.mail[0][0] == step or self.is_last(step)):
            self._open(*self.mail.pop()[1:])
        if self.is_last(step):
            super().merge_if_due(step)
        elif (step + 1) % self.options.merge_every == 0:
            sent = [[p.detach().clone() for p in device.parameters] for device in self.devices]
            means = self._means(sent, self._shares(step // self.options.merge_every))
            self.mail.append((step + self.options.merge_delay, sent, means))

    def _open(self, sent: list[list[Tensor]], means: list[Tensor]) -> None:
        for device, had in zip(self.devices, sent, strict=True):
            since = [now - then for now, then in zip(device.parameters, had, strict=True)]
            device.set_weights([mean + own for mean, own in zip(means, since, strict=True)])
            if self.options.merge_optimizer == "reset":
                device.forget_moments()
        self.last = [mean.clone() for mean in means]

    def merged_state(self) -> dict[str, Tensor]:
        assert not self.mail
        return super().merged_state()


class LateOuterTwin(OuterTwin):
    """The outer step is taken with deltas of d steps ago."""

    def __init__(self, run: Run, start: nn.Module) -> None:
        super().__init__(run, start)
        self.mail: list[tuple[int, int, list[Tensor], list[list[Tensor]]]] = []
        """(the step after which it arrives, the fragment, its deltas, what each device had of it)."""

    def merge_if_due(self, step: int) -> None:
        if self.mail and (self.mail[0][0] == step or self.is_last(step)):
            self._open(*self.mail.pop()[1:])
        super().merge_if_due(step)

    def _merge(self, part: int) -> None:
        steps_done = int(self.devices[0].optimizer.state[self.devices[0].parameters[0]]["step"])
        if self.is_last(steps_done - 1):
            super()._merge(part)
            return
        sent = [[device.parameters[i].detach().clone() for i in self.fragments[part]] for device in self.devices]
        self.mail.append((steps_done - 1 + self.rounds.merge_delay, part, self.deltas(part), sent))

    def _open(self, part: int, deltas: list[Tensor], sent: list[list[Tensor]]) -> None:
        for position, (i, delta) in enumerate(zip(self.fragments[part], deltas, strict=True)):
            self.outer_step(i, delta)
            for device, had in zip(self.devices, sent, strict=True):
                device.parameters[i].copy_(self.outer[i] + (device.parameters[i] - had[position]))


class LateDilocoTwin(LateOuterTwin, DilocoTwin):
    """DiLoCo whose merges arrive late."""


class LateSparselocoTwin(LateOuterTwin, SparselocoTwin):
    """SparseLoCo whose merges arrive late."""


class LateLteTwin(LteTwin):
    """W takes up the products of d steps ago; these are then what heads remember, or what their B loses."""

    def __init__(self, run: Run, start: nn.Module, draw: Draw) -> None:
        super().__init__(run, start, draw)
        self.mail: list[tuple[int, int, list[dict[str, tuple[Tensor, Tensor]]], list[list[Tensor]]]] = []
        """(the steps done when it arrives, the fragment, every head's factors, every device's other parameters)."""

    def step(self, inputs: Tensor, targets: Tensor, step: int) -> Tensor:
        parts = zip(self.devices, inputs.chunk(len(self.devices)), targets.chunk(len(self.devices)), strict=True)
        losses = [device.step(x, y, step) for device, x, y in parts]
        last = step + 1 == self.run.train.steps
        if self.mail and (self.mail[0][0] == step + 1 or last):
            self._open(*self.mail.pop()[1:])
        for fragment in self.fragments_due(step + 1):
            if last:
                self.merge(fragment, step + 1)
            else:
                self._send(fragment, step + 1)
        return torch.stack(losses)

    def _send(self, fragment: int, steps_done: int) -> None:
        names = self.part_of(adapted_names(self.devices[0].model), fragment)
        factors = [{n: (h.a[n].detach().clone(), h.b[n].detach().clone()) for n in names} for h in self.heads]
        others = [[p.detach().clone() for p in self.part_of(device.replicated, fragment)] for device in self.devices]
        self.mail.append((steps_done + self.options.merge_delay, fragment, factors, others))

    @torch.no_grad()
    def _open(self, fragment: int, factors: list[dict[str, tuple[Tensor, Tensor]]], others: list[list[Tensor]]) -> None:
        for name in factors[0]:
            changes = [
                of_head[name][1] @ of_head[name][0] - head.b0[name] @ head.a0[name]
                for head, of_head in zip(self.heads, factors, strict=True)
            ]
            self.add_to_all(name, self.options.scale * torch.stack(changes).mean(0))
            for head, of_head in zip(self.heads, factors, strict=True):
                if self.options.reset == "none":
                    head.remember(name, *of_head[name])
                else:
                    head.b[name].sub_(of_head[name][1])
        means = [sum(copies[1:], copies[0]) / len(copies) for copies in zip(*others, strict=True)]
        for device, had in zip(self.devices, others, strict=True):
            for parameter, then, mean in zip(self.part_of(device.replicated, fragment), had, means, strict=True):
                parameter.copy_(mean + (parameter - then))
        if self.options.merge_optimizer == "prune":
            for device in self.devices:
                for head in device.heads:
                    for name in factors[0]:
                        self._prune(device.optimizer, head.a[name], head.b[name])

    def _prune(self, optimizer: torch.optim.AdamW, a: Tensor, b: Tensor) -> None:
        prune_smallest(optimizer, a, 0.9)
        prune_smallest(optimizer, b, 0.9)


class LateLteFrozenATwin(LateLteTwin, LteFrozenATwin):
    """The same with heads that train B alone."""

    def _prune(self, optimizer: torch.optim.AdamW, a: Tensor, b: Tensor) -> None:
        prune_smallest(optimizer, b, 0.9)
