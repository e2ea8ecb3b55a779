"""LTE on unequal devices, one device after another: each with its own batch, heads and rank; dense A, plain loops.

w_n = samples_n / Σ_m samples_m,   W ← W + Σ_n w_n·(1/K_n)·Σ_{h of n} (alpha/r_n)·(B_h·A_h − B0_h·A0_h)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simulate.common.seeding import address, generator
from simulate.config.run import Run
from simulate.data.batches import TextBatches
from simulate.data.text import Text
from simulate.methods.build_network import build_model
from simulate.methods.lte.options import LteOptions
from tests.reference.common import adapted_names
from tests.reference.joint_draw import random_orthogonal
from tests.reference.lte import Device, Head


class UnequalTwin:
    """N devices of several classes, each with its own plain model."""

    def __init__(self, run: Run, text: Text) -> None:
        self.run = run
        self.start = start = build_model(run)
        self.ranks = [one.method.rank for one in self.of_devices() for _ in range(one.method.heads_per_device)]  # type: ignore[attr-defined]
        self.devices: list[Device] = []
        self.data: list[TextBatches] = []
        head = 0
        for one in self.of_devices():
            options = one.method
            assert isinstance(options, LteOptions)
            indices = range(head, head + options.heads_per_device)
            heads = [Head(i, start, options.rank, self.draw) for i in indices]
            if options.frozen_a:
                freeze(heads)
            head = indices.stop
            self.devices.append(Device(one, start, heads))
            self.data.append(TextBatches.of(one, text))
        samples = [one.train.micro_batch * one.train.accumulate for one in self.of_devices()]
        self.weights = [count / sum(samples) for count in samples]

    def of_devices(self) -> list[Run]:
        """Return the run as each device has it."""
        return [self.run.of_class(self.run.class_of(device)) for device in range(self.run.cluster.devices)]

    def draw(self, name: str, head: int, steps_done: int) -> Tensor:
        """Return the A of a head: rows of a matrix that heads share, from where the head before it ends."""
        inputs, rank, options = self.start.get_parameter(name).shape[1], self.ranks[head], self.run.method
        assert isinstance(options, LteOptions)
        where = (self.run.train.seed, name.removesuffix(".weight"), *self.place(head, inputs))
        if options.draws == "joint" or (options.draws == "columns" and sum(self.ranks) < inputs):
            matrix_II = random_orthogonal(inputs, (where[0], where[1], where[2], steps_done))
        elif options.draws == "columns":
            order = generator(where[0], "columns", where[1], where[2], steps_done).permutation(inputs)
            matrix_II = torch.eye(inputs, dtype=torch.float64)[torch.from_numpy(order)]
        else:
            return own_draw(self.run.train.seed, where[1], head, steps_done, inputs, rank)
        return math.sqrt(inputs / rank) * matrix_II[where[3] : where[3] + rank]

    def place(self, head: int, inputs: int) -> tuple[int, int]:
        """Return the matrix that a head takes its rows of, and the first of them."""
        matrix, row = 0, 0
        for rank in self.ranks[:head]:
            matrix, row = (matrix, row + rank) if row + rank <= inputs else (matrix + 1, rank)
        return (matrix, row) if row + self.ranks[head] <= inputs else (matrix + 1, 0)

    def step(self, step: int) -> Tensor:
        """Take a step on every device; returns their mean losses, (N,)."""
        losses = []
        for index, (device, data) in enumerate(zip(self.devices, self.data, strict=True)):
            losses.append(device.step(*data.batch(step, range(index, index + 1)), step))
        options = self.run.method
        if (step + 1) % options.round_steps == 0 or step + 1 == self.run.train.steps:
            self.merge(step + 1)
        return torch.stack(losses)

    @torch.no_grad()
    def merge(self, steps_done: int) -> None:
        """Merge all heads by their devices' samples, and start the next round."""
        options = self.run.method
        assert isinstance(options, LteOptions)
        for name in adapted_names(self.start):
            delta = torch.zeros_like(self.start.get_parameter(name))
            for weight, device in zip(self.weights, self.devices, strict=True):
                for head in device.heads:
                    delta += weight / len(device.heads) * device.scale * head.change(name)
            for device in self.devices:
                device.model.get_parameter(name).add_(delta)
                for head in device.heads:
                    if options.reset != "none":
                        head.b[name].zero_()
                    if options.reset == "ab":
                        head.a[name].copy_(self.draw(name, head.index, steps_done))
                    head.remember(name, head.a[name], head.b[name])
        for copies in zip(*(device.replicated for device in self.devices), strict=True):
            mean = torch.zeros_like(copies[0])
            for weight, copy in zip(self.weights, copies, strict=True):
                mean += weight * copy
            for copy in copies:
                copy.copy_(mean)

    def merged_state(self) -> dict[str, Tensor]:
        """Return the first device's weights: right after a merge all are equal."""
        return {name: tensor.detach().clone() for name, tensor in self.devices[0].model.state_dict().items()}


def own_draw(seed: int, name: str, head: int, steps_done: int, inputs: int, rank: int) -> Tensor:
    """Return orthogonal rows times sqrt(I/r), drawn by the head itself."""
    normal = torch.empty(inputs, rank, dtype=torch.float64)
    normal.normal_(generator=torch.Generator().manual_seed(address(seed, "adapter", name, head, steps_done)))
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal().sign()).T * math.sqrt(inputs / rank)


def freeze(heads: list[Head]) -> None:
    """Let only B be trained."""
    for head in heads:
        head.parameters = list(head.b.values())
        for a in head.a.values():
            a.requires_grad_(False)
