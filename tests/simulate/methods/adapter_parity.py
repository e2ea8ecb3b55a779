"""Adapter methods against their twins: runs with several merges, some steps clipped and some not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from simulate.comm.virtual import VirtualCommunicator
from simulate.config.method_options import AdapterOptions
from simulate.config.run import Run
from simulate.layers.lora import lora_layers
from simulate.methods.base import Method
from simulate.methods.build_network import build_model
from simulate.methods.loss import Loss
from simulate.methods.registry import build_method
from tests import tiny
from tests.reference.lora import Draw, LoraTwin
from tests.reference.lte import LteTwin

# With T = 4 there are five merges, the last one early.
TRAIN = {"steps": 19, "warmup_steps": 3, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": 1.3}

Twin = LoraTwin | LteTwin
TwinClass = Callable[[Run, nn.Module, Draw], Twin]


def parity_run(name: str, devices: int = 3, train: tiny.Table | None = None, **method: Any) -> Run:
    """Return a run of one of tiny.VARIANTS for comparison; keywords override the method's keys."""
    keys = {**tiny.VARIANTS[name], **method}
    heads = keys.get("heads_per_device", 1) if name.startswith("lte") else 1
    model = {"layers": keys.get("fragments", 1)}
    run = tiny.variant_run(name, devices, model, {**TRAIN, "micro_batch": 2 * heads, **(train or {})})
    options = type(run.method)(**{**run.method.model_dump(), **method})
    return run.model_copy(update={"method": options})


def engine_draw(run: Run) -> Draw:
    """Return the engine's draws of A for the twin, which has none of its own."""
    assert isinstance(run.method, AdapterOptions)
    model, train = run.model.model_dump(), {"seed": run.train.seed, "micro_batch": run.train.micro_batch}
    method = tiny.build(tiny.lte_run(max(1, run.heads), model, train, rank=run.method.rank))
    layers = {f"{layer.name}.weight": layer for layer in lora_layers(method.model)}

    @cache
    def of_all_heads(name: str, steps_done: int) -> Tensor:
        return layers[name].draw_a(steps_done)

    return lambda name, head, steps_done: of_all_heads(name, steps_done)[head]


@cache
def twin_of(twin_class: TwinClass, run: Run) -> tuple[Twin, tiny.History]:
    """Return a twin that has trained on the whole run, and what it left behind."""
    twin, data = twin_class(run, build_model(run), engine_draw(run)), tiny.batches(run)
    losses = [twin.step(*data.batch(step, range(run.cluster.devices)), step) for step in range(run.train.steps)]
    return twin, tiny.History(torch.stack(losses), twin.merged_state())


def assert_trains_like(twin_class: TwinClass, run: Run) -> None:
    """Hold the engine against the twin."""
    tiny.assert_parity(tiny.train(tiny.build(run)), twin_of(twin_class, run)[1])


def on_layer(run: Run) -> Method:
    """Return the engine's method over one 2x2 linear layer whose W is the identity."""
    linear = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    nn.init.eye_(linear.weight)
    return build_method(run, VirtualCommunicator(run.cluster.devices), tiny.CPU, nn.Sequential(linear))


GROUP_LOSSES = Loss.group_losses


def summed_losses(loss: Loss, inputs: Tensor, targets: Tensor, groups: int) -> Tensor:
    """Return losses whose gradients devices sum where they should average."""
    return GROUP_LOSSES(loss, inputs, targets, groups) * groups
