"""Run the program of one device of a run alone, or of all of them, for a few steps and a merge, and measure its memory.

A simulation holds all devices in one process and shares tensors between them, so its own memory says little about one
device's. Here one device runs by itself: its batch, its adapters, all devices' factors at the merge. `lte train` and
launched runs report the allocator's peak (`measure_memory_bytes`); simulate.measure.fake_tensors tracks the same
program without allocating.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode

from simulate.comm.base import Communicator
from simulate.comm.echo import EchoCommunicator
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run
from simulate.layers.accelerator import peak_bytes
from simulate.layers.convert import call_with_weights
from simulate.layers.dtypes import DTYPES
from simulate.layers.quantized import QuantizedWeight
from simulate.methods.base import Method
from simulate.methods.build_network import empty_model
from simulate.methods.registry import build_method
from simulate.models.fake_batch import example_batch
from simulate.models.losses import row_losses_of
from simulate.models.peak_memory import cpu_peak_bytes
from simulate.optim.adamw8bit import moment_values
from simulate.rules.cadence import evaluation_batch
from simulate.rules.method_plan import plan_of
from simulate.training.diagnostics import Diagnostics, GradientSums

STEPS_OF_ROUNDS = (1, 2)
"""Steps of each of two rounds: the first step allocates optimizer state, the first merge its buffers; later rounds
allocate nothing new."""
DRAWN_STEPS = 60
"""Steps at most until all of AdaMix's experts were drawn."""

Watch = Callable[[str, Method, Sequence[Tensor]], None]
"""Called before each phase with its name, the method, and new tensors that lie in files of the host."""
Program = Callable[[Run, torch.device, Watch], Method]


def made_up_batch(run: Run, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of made-up samples, in the dtype that the run's data would have."""
    batch, dtype = example_batch(run.model, samples), DTYPES[run.train.dtype]
    inputs, targets = (t.to(device, dtype if t.is_floating_point() else None) for t in batch)
    return inputs, targets


def unwatched(phase: str, method: Method, host: Sequence[Tensor]) -> None:
    """Ignore a phase."""


def train_alone(run: Run, device: torch.device, watch: Watch = unwatched) -> Method:
    """Train one device of a run on made-up samples, for some steps, merges and an evaluation; with its diagnostics.

    The figures of a round depend on numbers, so fake tensors skip them and take only those of gradients.
    """
    return _train(run, EchoCommunicator(run.cluster.devices, run.method.first_device), device, watch)


def train_together(run: Run, device: torch.device, watch: Watch = unwatched) -> Method:
    """Train all devices of a run in this process as a simulation does, likewise."""
    return _train(run, VirtualCommunicator(run.cluster.devices), device, watch)


def _train(run: Run, communicator: Communicator, device: torch.device, watch: Watch) -> Method:
    method = build_method(run, communicator, device)
    inputs, targets = made_up_batch(run, run.train.device_batch * len(communicator.local_devices), device)
    samples = evaluation_batch(run.train.micro_batch, run.train.autocast != "none")
    evaluated = inputs[:samples], targets[:samples]
    last = run.train.steps - 1
    plan = plan_of(run.method)
    late = plan.measured_delay_steps
    empty = empty_model(run, device)
    diagnostics = Diagnostics(method) if run.train.diagnostics_every else None

    def steps(count: int, first: int = 0) -> None:
        for step in range(first, first + count):
            watch("forward", method, ())
            method.step(inputs, targets, step)

    if plan.routes_randomly:
        _draw_all_experts(method, steps)
    # A method without rounds repeats steps until one allocates what the last one did.
    for count in STEPS_OF_ROUNDS if run.method.round_steps > 1 else (plan.steps_until_alike,):
        steps(count)
        if late:  # the peak may be while a merge travels, or while an evaluation waits for it
            watch("merge", method, ())
            method.merge(sent := run.method.steps_apart - 1)
            if method.merged_weights_ready(sent):
                watch("evaluation", method, ())
                evaluate_batch(method, empty, *evaluated)
            steps(late + 1, sent + 1)  # one more, since applying the merge may drop optimizer state
        if diagnostics is not None and active_fake_mode() is None:
            watch("round_figures", method, ())
            diagnostics.of_round(last)
        watch("merge", method, ())
        method.merge(last)  # of all groups of layers
    if diagnostics is not None:
        sums = GradientSums(run, method.weights_in_use())
        watch("gradient_figures", method, [sums.flat])
        sums.add(inputs[: run.train.micro_batch], targets[: run.train.micro_batch])
        sums.square_of_sum(method.communicator)
        del sums
    watch("evaluation", method, ())
    evaluate_batch(method, empty, *evaluated)
    return method


def _draw_all_experts(method: Method, steps: Callable[[int, int], None]) -> None:
    """Step until every expert has optimizer state, which it gets with its first gradient."""
    for step in range(DRAWN_STEPS):
        if all(parameter in method.stepper.state for parameter in method.parameters.values()):
            return
        steps(1, step)


def warm_up(run: Run, device: torch.device) -> None:
    """Import and call the libraries that a run uses, so that their first use is no part of what is measured.

    They hold about two kilobytes of tables for good. What the import itself does can hold more: where it logs an error,
    whoever keeps the record keeps the frames of all callers, and the tensors in them.
    """
    frozen = run.method.frozen_format
    if frozen.startswith("nf4"):
        QuantizedWeight(torch.zeros(1, 1, device=device), frozen).dense()
    if run.train.optimizer_state == "8bit":
        moment_values(device)


def measure_memory_bytes(run: Run, device: torch.device) -> int:
    """Return the allocator's peak, in bytes, of one device's program over steps, merges and an evaluation."""
    warm_up(run, device)

    def program() -> None:
        train_alone(run, device)

    return cpu_peak_bytes(program) if device.type == "cpu" else peak_bytes(program, device)


@torch.no_grad()
def evaluate_batch(method: Method, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the losses of a batch, (M,), with the merged weights in a plain network without storage of its own."""
    outputs = call_with_weights(model, method.weights_in_use(), inputs)
    return row_losses_of(method.run.model)(outputs, targets)
