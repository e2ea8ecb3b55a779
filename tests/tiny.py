"""Runs small enough to be checked step by step: two layers of width 16, made-up text, double precision."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run, build_run
from simulate.data.batches import Batches, build_batches
from simulate.data.text import Text
from simulate.methods.base import Method
from simulate.methods.registry import build_method

Table = dict[str, Any]
CPU = torch.device("cpu")
SIZES = {"name": "gpt", "layers": 2, "width": 16, "attention_heads": 2, "context": 8, "vocab": 256}
LLAMA = {"name": "llama", "mlp_width": 24}
"""Over SIZES."""
PAPER = {"reset": "none", "frozen_a": False}
"""LTE as the paper has it, which uses more of the code than our defaults; a run's own keys come before it."""
PROSE = "a low rank wave of small gains over the frozen hills where every head learns its own way home"


@cache
def text() -> Text:
    """Return a few thousand bytes of made-up prose, the same on every machine."""
    chosen = random.Random(0).choices(PROSE.split(), k=800)
    return Text(np.frombuffer(" ".join(chosen).encode(), dtype=np.uint8), "made-up prose")


def lte_run(devices: int = 2, model: Table | None = None, train: Table | None = None, **method: Any) -> Run:
    """Return a tiny lte run in fp64 at rank 2 and scale 2; keywords override the method's keys."""
    return _run(devices, model, train, {"name": "lte", "rank": 2, "alpha": 4.0, **method})


def ddp_run(devices: int = 2, model: Table | None = None, train: Table | None = None) -> Run:
    """Return a tiny ddp run in fp64."""
    return _run(devices, model, train, {"name": "ddp"})


UNEQUAL = [[4, 2, 1, 3], [2, 1, 3, 1]]
"""Steps of four devices in rounds of four: some stop early, and in every second round all of them do."""
COVERING = {"rank": 12, "heads_per_device": 2}
"""Heads that cover 16 inputs of ours, and with four devices 96 of the larger networks that tests of memory take."""
VARIANTS: dict[str, Table] = {
    "ddp": {"name": "ddp"},
    "ddp, int8": {"name": "ddp", "wire": "int8"},
    "ddp, fp16": {"name": "ddp", "wire": "fp16"},
    "ddp, int2": {"name": "ddp", "wire": "int2"},
    "lora": {"name": "lora"},
    "relora": {"name": "relora", "merge_every": 7, "rewarm_steps": 3, "prune_share": 0.5},
    "relora, warm start": {"name": "relora", "merge_every": 6, "warm_start_steps": 5, "rewarm_steps": 2},
    "mhlora": {"name": "mhlora", "heads_per_device": 2},
    "lora, nf4": {"name": "lora", "quantize": "nf4"},
    "relora, int8": {"name": "relora", "merge_every": 7, "rewarm_steps": 3, "quantize": "int8"},
    "mhlora, nf4-double": {"name": "mhlora", "heads_per_device": 2, "quantize": "nf4-double"},
    "adamix": {"name": "adamix", "experts": 3},
    "local-sgd": {"name": "local-sgd", "merge_every": 4},
    "local-sgd, moments": {"name": "local-sgd", "merge_every": 4, "merge_optimizer": "average"},
    "local-sgd, reset": {"name": "local-sgd", "merge_every": 4, "merge_optimizer": "reset"},
    "local-sgd, int4": {"name": "local-sgd", "merge_every": 4, "wire": "int4"},
    "local-sgd, int2": {"name": "local-sgd", "merge_every": 4, "wire": "int2"},
    "fedavg": {
        "name": "local-sgd", "merge_every": 4, "merge_transport": "server", "merge_optimizer": "reset",
        "participation": 0.5,
    },
    "diloco": {"name": "diloco", "merge_every": 4},
    "diloco, int8": {"name": "diloco", "merge_every": 4, "wire": "int8"},
    "diloco, streaming": {"name": "diloco", "merge_every": 4, "fragments": 2},
    "sparseloco": {"name": "sparseloco", "merge_every": 4, "density": 0.1},
    "sparseloco, streaming int8": {
        "name": "sparseloco", "merge_every": 4, "density": 0.05, "fragments": 2, "wire": "int8",
        "outer_learning_rate": 0.7, "error_decay": 0.5,
    },
    "local-sgd, late": {"name": "local-sgd", "merge_every": 4, "merge_delay": 2},
    "local-sgd, late, served": {
        "name": "local-sgd", "merge_every": 4, "merge_delay": 1, "merge_transport": "server",
    },
    "diloco, late": {"name": "diloco", "merge_every": 4, "merge_delay": 3},
    "diloco, late, streaming int8": {
        "name": "diloco", "merge_every": 4, "merge_delay": 1, "fragments": 2, "wire": "int8",
    },
    "sparseloco, late": {"name": "sparseloco", "merge_every": 4, "merge_delay": 1, "density": 0.1},
    "lte, late": {"name": "lte", "merge_every": 4, "merge_delay": 2},
    "lte, late, streaming int8": {
        "name": "lte", "merge_every": 4, "merge_delay": 1, "fragments": 2, "wire": "int8", "heads_per_device": 2,
    },
    "lte, late, reduced": {"name": "lte", "merge_every": 4, "merge_delay": 3, "merge_transport": "reduce"},
    "lte, late, reduced int8": {
        "name": "lte", "merge_every": 4, "merge_delay": 2, "merge_transport": "reduce", "wire": "int8",
    },
    "lte, late, served": {
        "name": "lte", "merge_every": 4, "merge_delay": 2, "merge_transport": "server", "norms": "one",
    },
    "lte, late, frozen a": {
        "name": "lte", "merge_every": 4, "merge_delay": 2, "frozen_a": True, "reset": "b",
        "merge_optimizer": "prune",
    },
    "lte, late, frozen a, int8": {
        "name": "lte", "merge_every": 4, "merge_delay": 2, "frozen_a": True, "reset": "b", "wire": "int8",
    },
    "local-sgd, paced": {"name": "local-sgd", "merge_every": 4, "pace": "deadline", "steps_taken": UNEQUAL},
    "local-sgd, paced, served": {
        "name": "local-sgd", "merge_every": 4, "merge_transport": "server", "pace": "deadline", "steps_taken": UNEQUAL,
    },
    "local-sgd, paced int8": {
        "name": "local-sgd", "merge_every": 4, "wire": "int8", "pace": "deadline", "steps_taken": UNEQUAL,
    },
    "diloco, paced": {"name": "diloco", "merge_every": 4, "pace": "deadline", "steps_taken": UNEQUAL},
    "sparseloco, paced": {
        "name": "sparseloco", "merge_every": 4, "density": 0.1, "pace": "deadline", "steps_taken": UNEQUAL,
    },
    "lte, paced": {"name": "lte", "merge_every": 4, "reset": "b", "pace": "deadline", "steps_taken": UNEQUAL},
    "lte, paced, redrawn": {
        "name": "lte", "merge_every": 4, "reset": "ab", "heads_per_device": 2, "norms": "vector-lora",
        "pace": "deadline", "steps_taken": UNEQUAL,
    },
    "lte, paced, reduced": {
        "name": "lte", "merge_every": 4, "reset": "b", "merge_transport": "reduce", "pace": "deadline",
        "steps_taken": UNEQUAL,
    },
    "lte, paced, reduced int4": {
        "name": "lte", "merge_every": 4, "reset": "b", "merge_transport": "reduce", "wire": "int4", "pace": "deadline",
        "steps_taken": UNEQUAL,
    },
    "lte, paced, served, muon": {
        "name": "lte", "merge_every": 4, "reset": "b", "frozen_a": True, "merge_transport": "server",
        "pace": "deadline", "steps_taken": UNEQUAL,
    },
    "daso": {"name": "daso", "merge_every": 4, "delay_steps": 2},
    "daso, waiting": {"name": "daso", "merge_every": 4, "delay_steps": 0},
    "sapipe": {"name": "sapipe"},
    "sapipe, delay": {"name": "sapipe", "compensation": "delay"},
    "sapipe, none": {"name": "sapipe", "compensation": "none"},
    "powersgd": {"name": "powersgd", "rank": 2},
    "topk": {"name": "topk", "density": 0.1},
    "signsgd": {"name": "signsgd"},
    "from outside": {"name": "examples.sign_momentum:SignMomentum"},
    "lte": {"name": "lte", "merge_every": 4},
    "lte, nf4": {"name": "lte", "merge_every": 4, "quantize": "nf4", "reset": "ab"},
    "lte, int8, served": {
        "name": "lte", "merge_every": 4, "quantize": "int8", "merge_transport": "server", "master": "server",
    },
    "lte, nf4-double, reduced": {
        "name": "lte", "merge_every": 4, "quantize": "nf4-double", "merge_transport": "reduce", "reset": "b",
    },
    "lte, auto": {"name": "lte", "merge_every": 4, "merge_transport": "auto"},
    "lte, int8": {"name": "lte", "merge_every": 4, "wire": "int8"},
    "lte, int2": {"name": "lte", "merge_every": 4, "wire": "int2"},
    "lte, reduced int4": {"name": "lte", "merge_every": 4, "merge_transport": "reduce", "wire": "int4"},
    "lte, reduced int2": {"name": "lte", "merge_every": 4, "merge_transport": "reduce", "wire": "int2"},
    "lte, served int2": {"name": "lte", "merge_every": 4, "merge_transport": "server", "wire": "int2", "reset": "b"},
    "lte, served bf16": {"name": "lte", "merge_every": 4, "merge_transport": "server", "wire": "bf16", "reset": "b"},
    "lte, streaming": {"name": "lte", "merge_every": 4, "fragments": 2, "heads_per_device": 2},
    "lte, streaming int8": {"name": "lte", "merge_every": 4, "fragments": 2, "wire": "int8", "reset": "ab"},
    "lte, pruned": {"name": "lte", "merge_every": 4, "merge_optimizer": "prune"},
    "lte, norms of one": {"name": "lte", "merge_every": 4, "norms": "one"},
    "lte, norms of one, served": {"name": "lte", "merge_every": 4, "norms": "one", "merge_transport": "server"},
    "lte, vector norms": {"name": "lte", "merge_every": 4, "norms": "vector-lora"},
    "lte, vector norms, reset": {"name": "lte", "merge_every": 4, "norms": "vector-lora", "reset": "b", "fragments": 2},
    "lte, frozen": {"name": "lte", "merge_every": 4, "norms": "none", "biases": "frozen"},
    "ddp, muon": {"name": "ddp"},
    "diloco, muon": {"name": "diloco", "merge_every": 4},
    "ddp, apollo": {"name": "ddp"},
    "local-sgd, apollo": {"name": "local-sgd", "merge_every": 4},
    "lte, muon": {"name": "lte", "merge_every": 4, "heads_per_device": 2},
    "lte, frozen a": {"name": "lte", "merge_every": 4, "frozen_a": True, "reset": "b"},
    "lte, frozen a, redrawn": {"name": "lte", "merge_every": 4, "frozen_a": True, "reset": "ab", "wire": "int8"},
    "lte, frozen a, muon": {
        "name": "lte", "merge_every": 4, "frozen_a": True, "reset": "ab", "heads_per_device": 2,
        "merge_transport": "auto",
    },
    "lte, joint": {
        "name": "lte", "merge_every": 4, "frozen_a": True, "reset": "ab", "draws": "joint", "rank": 6,
    },
    "lte, columns": {
        "name": "lte", "merge_every": 4, "frozen_a": True, "reset": "ab", "draws": "columns", **COVERING,
    },
    "lte, columns, late": {
        "name": "lte", "merge_every": 4, "frozen_a": True, "reset": "b", "draws": "columns", "merge_delay": 2,
        **COVERING,
    },
    "lte, columns, served nf4": {
        "name": "lte", "merge_every": 4, "frozen_a": True, "reset": "b", "draws": "columns", "quantize": "nf4",
        "merge_transport": "server", **COVERING,
    },
    "lte, columns, reduced int4": {
        "name": "lte", "merge_every": 4, "frozen_a": True, "reset": "b", "draws": "columns", "wire": "int4",
        "merge_transport": "reduce", **COVERING,
    },
    "lte, columns, paced, muon": {
        "name": "lte", "merge_every": 4, "frozen_a": True, "reset": "b", "draws": "columns", "pace": "deadline",
        "steps_taken": UNEQUAL, **COVERING,
    },
    "lte, forgetful": {"name": "lte", "merge_every": 4, "merge_optimizer": "reset", "reset": "ab"},
    "lte, in parts": {"name": "lte", "merge_every": 4, "heads_per_device": 2},
    "lte, nodes": {"name": "lte", "merge_every": 4, "devices_per_node": 2, "heads_per_device": 2},
    "lte, nodes, frozen a": {
        "name": "lte", "merge_every": 4, "devices_per_node": 2, "frozen_a": True, "reset": "ab",
        "merge_transport": "auto",
    },
    "lte, nodes, int8": {"name": "lte", "merge_every": 4, "devices_per_node": 2, "wire": "int8", "fragments": 2},
    "lte, nodes, late": {
        "name": "lte", "merge_every": 4, "devices_per_node": 2, "merge_delay": 2, "heads_per_device": 2,
    },
    "lte, nodes, late, reduced int8": {
        "name": "lte", "merge_every": 4, "devices_per_node": 2, "merge_delay": 1, "merge_transport": "reduce",
        "wire": "int8",
    },
    "lte, nodes, served nf4": {
        "name": "lte", "merge_every": 4, "devices_per_node": 2, "quantize": "nf4", "merge_transport": "server",
        "master": "server", "reset": "b",
    },
    "lte, nodes, vector norms": {"name": "lte", "merge_every": 4, "devices_per_node": 2, "norms": "vector-lora"},
    "lte, nodes, norms of one": {
        "name": "lte", "merge_every": 4, "devices_per_node": 2, "norms": "one", "merge_transport": "reduce",
    },
    "lte, nodes, columns": {
        "name": "lte", "merge_every": 4, "devices_per_node": 2, "frozen_a": True, "reset": "b", "draws": "columns",
        **COVERING,
    },
    "lte, nodes, in parts": {"name": "lte", "merge_every": 4, "devices_per_node": 2, "heads_per_device": 2},
}  # fmt: skip
"""Every method, and every option that changes what is computed or sent; rank 2 and scale 2 where there are adapters."""
TRAIN_KEYS: dict[str, Table] = {
    "muon": {"optimizer": "muon"},
    "apollo": {"optimizer": "apollo", "apollo_refresh_every": 3},
    "in parts": {"accumulate": 2},
}
"""Keys of [train] of the variants whose names end so."""


def train_keys(name: str) -> Table:
    """Return the keys of [train] that a variant sets."""
    return next((keys for end, keys in TRAIN_KEYS.items() if name.endswith(end)), {})


def variant_run(name: str, devices: int = 4, model: Table | None = None, train: Table | None = None) -> Run:
    """Return a tiny fp64 run of one of VARIANTS."""
    method = dict(VARIANTS[name])
    if "steps_taken" in method:
        method["steps_taken"] = [[row[i % len(row)] for i in range(devices)] for row in method["steps_taken"]]
    adapters = {"rank": 2, "alpha": 4.0} if method["name"] in ("lte", "lora", "relora", "mhlora", "adamix") else {}
    return _run(devices, model, {**train_keys(name), **(train or {})}, {**adapters, **method})


def _run(devices: int, model: Table | None, train: Table | None, method: Table) -> Run:
    if method["name"] == "lte":
        method = {**PAPER, **method}
    table = {
        "model": {**SIZES, **(model or {})},
        "data": {"path": "made-up"},
        "method": method,
        "train": {"steps": 20, "micro_batch": 2, "dtype": "fp64", **(train or {})},
        "cluster": {"devices": devices},
    }
    return build_run(table)


def build(run: Run, local_devices: range | None = None) -> Method:
    """Return the engine's method for a run, for all devices or for those that one process would hold."""
    communicator = VirtualCommunicator(run.cluster.devices)
    communicator.local_devices = local_devices or communicator.local_devices
    return build_method(run, communicator, CPU)


def batches(run: Run) -> Batches:
    """Return the batches that the run trains on."""
    return build_batches(run, text())


@dataclass(frozen=True)
class History:
    """What a training run leaves behind."""

    losses: Tensor
    """(steps, N), each device's mean loss before each step."""
    weights: dict[str, Tensor]
    """The merged weights after the last step, by the plain network's names."""


def train(method: Method, first_step: int = 0, num_steps: int | None = None) -> History:
    """Train on all devices, merging when due; from `first_step` on, to the end if `num_steps` is not given."""
    run, data = method.run, batches(method.run)
    last = run.train.steps if num_steps is None else first_step + num_steps
    losses = []
    for step in range(first_step, last):
        losses.append(method.step(*data.batch(step, range(run.cluster.devices)), step))
        if method.merge_due(step):
            method.merge(step)
    return History(torch.stack(losses), {name: w.clone() for name, w in method.merged_state().items()})


def assert_parity(fast: History, slow: History, tolerance: float = 1e-9) -> None:
    """Hold all losses and merged weights against the twin's, relative to each loss and to each tensor's norm."""
    assert fast.losses.shape == slow.losses.shape
    assert ((fast.losses - slow.losses).abs() / slow.losses).max() <= tolerance
    assert fast.weights.keys() == slow.weights.keys()
    for name, expected in slow.weights.items():
        assert (fast.weights[name] - expected).norm() <= tolerance * expected.norm(), name


@torch.no_grad()
def spoil(method: Method) -> None:
    """Leave nothing of the start that a restored method could lean on."""
    for tensor in (*method.model.parameters(), *method.model.buffers(), *method.state.state_dict().values()):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 99)


def assert_resumes(
    name: str, steps_before: int, devices: int = 4, train_keys: Table | None = None, model: Table | None = None
) -> None:
    """Save, load into a spoilt method, and hold the rest of the run against that of the one that went on."""
    model = model or {"layers": VARIANTS[name].get("fragments", 1)}
    run = variant_run(name, devices, model, train={"steps": 14, **(train_keys or {})})
    method, restored = build(run), build(run)
    train(method, 0, steps_before)
    saved = copy.deepcopy(method.state.sharded())
    spoil(restored)
    restored.state.load_sharded(saved)
    unbroken, continued = train(method, steps_before), train(restored, steps_before)
    assert torch.equal(unbroken.losses, continued.losses)
    assert method.state.state_dict().keys() == restored.state.state_dict().keys()
    assert all(
        torch.equal(tensor, restored.state.state_dict()[key]) for key, tensor in method.state.state_dict().items()
    )
    assert all(torch.equal(weight, continued.weights[key]) for key, weight in unbroken.weights.items())
