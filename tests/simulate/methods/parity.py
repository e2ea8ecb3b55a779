"""Dense methods against their twins: runs with several merges at awkward steps, and who the twin of a run is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run, build_run
from simulate.methods.base import Method
from simulate.methods.build_network import build_model
from simulate.methods.registry import build_method
from tests import tiny
from tests.reference.dense import DenseTwin

# With T = 5 there are five merges, the last one early: its round is of one step.
TRAIN = {"steps": 21, "warmup_steps": 3, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": 1.4}

TwinClass = Callable[[Run, nn.Module], DenseTwin]


def parity_run(name: str, devices: int = 3, shards: tuple[float, ...] | None = None, **method: Any) -> Run:
    """Return a run of one of tiny.VARIANTS for comparison; keywords override the method's keys."""
    table = tiny.variant_run(name, train=TRAIN).model_dump()
    table["method"].update(method)
    table["model"]["layers"] = table["method"].get("fragments", 1)
    table["data"]["shards"], table["cluster"]["devices"] = shards, devices
    return build_run(table)


@cache
def twin_of(twin_class: TwinClass, run: Run) -> tuple[DenseTwin, tiny.History]:
    """Return a twin that has trained on the whole run, and what it left behind."""
    return train_twin(twin_class, run, build_model(run))


def train_twin(twin_class: TwinClass, run: Run, start: nn.Module) -> tuple[DenseTwin, tiny.History]:
    """Train a twin from a plain network's weights."""
    twin, data = twin_class(run, start), tiny.batches(run)
    losses = [twin.step(*data.batch(step, range(run.cluster.devices)), step) for step in range(run.train.steps)]
    return twin, tiny.History(torch.stack(losses), twin.merged_state())


def assert_trains_like(twin_class: TwinClass, run: Run) -> None:
    """Hold the engine against the twin."""
    tiny.assert_parity(tiny.train(tiny.build(run)), twin_of(twin_class, run)[1])


def on_network(run: Run, network: nn.Module) -> Method:
    """Return the engine's method over another network than the run's."""
    return build_method(run, VirtualCommunicator(run.cluster.devices), tiny.CPU, network)


class Bigram(nn.Sequential):
    """The next token from the last one, without attention: the gradient of a bias of keys is zero but for rounding,
    as softmax does not see it, and signs of rounding are nobody's."""

    def __init__(self) -> None:
        super().__init__(
            nn.Embedding(256, 16), nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(16, 256)
        )


def bigram() -> nn.Module:
    """Return one, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Bigram().double()


def hand_run(name: str, devices: int = 2, **method: Any) -> Run:
    """Return a run whose numbers a person follows: the rate stays at 0.5, nothing decays, nothing is clipped."""
    run = parity_run(name, devices, **method)
    train = {"learning_rate": 0.5, "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 1e9, "steps": 10**9}
    return run.model_copy(update={"train": run.train.model_copy(update=train)})


def linear(inputs: int = 1, outputs: int = 1, value: float = 0.0) -> nn.Linear:
    """Return a network of one matrix, all entries equal; with one output its loss, and so its gradient, is zero."""
    layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    nn.init.constant_(layer.weight, value)
    return layer


class Alone(nn.Sequential):
    """One layer, since only modules inside a network are converted."""


def of_linear(run: Run, inputs: int = 1, outputs: int = 1, value: float = 0.0) -> tuple[Method, nn.Parameter]:
    """Return the engine's method over a single matrix, and the parameter that it steps, (C, outputs, inputs)."""
    method = on_network(run, Alone(linear(inputs, outputs, value)))
    (parameter,) = method.parameters.values()
    return method, parameter


@torch.no_grad()
def set_copies(parameter: Tensor, *values: float) -> None:
    """Give each copy of a parameter a value of its own."""
    for copy_X, value in zip(parameter, values, strict=True):
        copy_X.fill_(value)
