"""Which slow twin of tests/reference/ trains as each of tiny.VARIANTS does, and runs of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from simulate.config.run import Run
from simulate.methods.build_network import build_model
from tests import tiny
from tests.reference.adamix import AdamixTwin
from tests.reference.apollo import DdpApolloTwin, LocalSgdApolloTwin
from tests.reference.column_draw import column_draw
from tests.reference.compressed import PowerSgdTwin, RoundedDdpTwin, SignsgdTwin, TopkTwin
from tests.reference.daso import DasoTwin
from tests.reference.ddp import DdpTwin
from tests.reference.dense import DenseTwin
from tests.reference.diloco import DilocoTwin
from tests.reference.joint_draw import joint_draw
from tests.reference.late import LateDilocoTwin, LateLocalSgdTwin, LateLteFrozenATwin, LateLteTwin, LateSparselocoTwin
from tests.reference.local_sgd import LocalSgdTwin
from tests.reference.lora import LoraTwin
from tests.reference.lte import LteTwin
from tests.reference.lte_frozen_a import LteFrozenATwin
from tests.reference.lte_layers import LteLayerTwin
from tests.reference.lte_nodes import (
    LteNodesFrozenATwin,
    LteNodesLateTwin,
    LteNodesLayerTwin,
    LteNodesQuantisedTwin,
    LteNodesTwin,
    LteNodesWireTwin,
)
from tests.reference.lte_wire import LteWireTwin
from tests.reference.mhlora import MhloraTwin
from tests.reference.muon import DdpMuonTwin, LteMuonTwin
from tests.reference.paced import PacedDilocoTwin, PacedLocalSgdTwin, PacedLteTwin, PacedSparselocoTwin
from tests.reference.quantised import QuantisedReloraTwin, QuantisedTwin, rounded_start
from tests.reference.relora import ReloraTwin
from tests.reference.sapipe import SapipeTwin
from tests.reference.sign_momentum import SignMomentumTwin
from tests.reference.sparseloco import SparselocoTwin
from tests.simulate.methods.adapter_parity import engine_draw
from tests.simulate.methods.parity import bigram, on_network

FAMILIES: dict[type, tuple[str, ...]] = {
    DdpTwin: ("ddp",),
    RoundedDdpTwin: ("ddp, int8", "ddp, fp16", "ddp, int2"),
    DdpMuonTwin: ("ddp, muon",),
    DdpApolloTwin: ("ddp, apollo",),
    LocalSgdApolloTwin: ("local-sgd, apollo",),
    LoraTwin: ("lora", "lora, nf4"),
    ReloraTwin: ("relora", "relora, warm start"),
    QuantisedReloraTwin: ("relora, int8",),
    MhloraTwin: ("mhlora", "mhlora, nf4-double"),
    AdamixTwin: ("adamix",),
    LocalSgdTwin: (
        "local-sgd",
        "local-sgd, moments",
        "local-sgd, reset",
        "local-sgd, int4",
        "local-sgd, int2",
        "fedavg",
    ),
    LateLocalSgdTwin: ("local-sgd, late", "local-sgd, late, served"),
    PacedLocalSgdTwin: ("local-sgd, paced", "local-sgd, paced, served", "local-sgd, paced int8"),
    DilocoTwin: ("diloco", "diloco, int8", "diloco, streaming"),
    LateDilocoTwin: ("diloco, late", "diloco, late, streaming int8"),
    PacedDilocoTwin: ("diloco, paced",),
    LateSparselocoTwin: ("sparseloco, late",),
    PacedSparselocoTwin: ("sparseloco, paced",),
    SparselocoTwin: ("sparseloco", "sparseloco, streaming int8"),
    DasoTwin: ("daso", "daso, waiting"),
    SapipeTwin: ("sapipe", "sapipe, delay", "sapipe, none"),
    PowerSgdTwin: ("powersgd",),
    TopkTwin: ("topk",),
    SignsgdTwin: ("signsgd",),
    SignMomentumTwin: ("from outside",),
    LteTwin: ("lte", "lte, auto", "lte, streaming", "lte, pruned", "lte, forgetful"),
    LteLayerTwin: ("lte, norms of one", "lte, norms of one, served", "lte, vector norms", "lte, frozen"),
    LteWireTwin: (
        "lte, int8",
        "lte, int2",
        "lte, reduced int4",
        "lte, reduced int2",
        "lte, served bf16",
        "lte, served int2",
        "lte, streaming int8",
    ),
    QuantisedTwin: ("lte, nf4", "lte, int8, served", "lte, nf4-double, reduced"),
    LateLteTwin: ("lte, late", "lte, late, reduced"),
    LateLteFrozenATwin: ("lte, late, frozen a", "lte, columns, late"),
    PacedLteTwin: ("lte, paced", "lte, paced, reduced"),
    LteFrozenATwin: ("lte, frozen a", "lte, joint", "lte, columns"),
    LteMuonTwin: ("lte, muon",),
    LteNodesTwin: ("lte, nodes",),
    LteNodesFrozenATwin: ("lte, nodes, frozen a", "lte, nodes, columns"),
    LteNodesWireTwin: ("lte, nodes, int8",),
    LteNodesLateTwin: ("lte, nodes, late",),
    LteNodesQuantisedTwin: ("lte, nodes, served nf4",),
    LteNodesLayerTwin: ("lte, nodes, vector norms", "lte, nodes, norms of one"),
}
TWINS: dict[str, type] = {name: twin_class for twin_class, names in FAMILIES.items() for name in names}
COMBINED = {
    "lte, late, streaming int8", "lte, late, reduced int8", "lte, late, served", "lte, late, frozen a, int8",
    "lte, paced, redrawn", "lte, paced, reduced int4", "lte, paced, served, muon",
    "lte, vector norms, reset", "lte, frozen a, redrawn", "lte, frozen a, muon", "diloco, muon",
    "lte, nodes, in parts", "lte, nodes, late, reduced int8",
    "lte, in parts", "lte, columns, served nf4", "lte, columns, reduced int4", "lte, columns, paced, muon",
}  # fmt: skip
"""Variants of options that have a twin each, but none together."""
ON_BIGRAMS = (SignsgdTwin, SignMomentumTwin)
"""Signs of a gradient that is zero but for rounding are nobody's."""
TRAIN = {"steps": 14, "warmup_steps": 3, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": 1.4}
"""Three rounds of four steps, and a shorter last one."""


def twin_run(name: str, **train: Any) -> Run:
    """Return the run of a variant that its twin trains, too."""
    heads = tiny.VARIANTS[name].get("heads_per_device", 1) if name.startswith("lte") else 1
    devices = 4 if name.startswith(("daso", "lte, nodes")) else 3
    return tiny.variant_run(name, devices, train={**TRAIN, "micro_batch": 2 * heads, **train})


def fast_history(name: str, run: Run) -> tiny.History:
    """Return what the engine leaves behind."""
    return tiny.train(on_network(run, bigram()) if TWINS[name] in ON_BIGRAMS else tiny.build(run))


def slow_history(name: str, run: Run) -> tiny.History:
    """Return what the twin leaves behind."""
    twin_class, options, start = TWINS[name], tiny.VARIANTS[name], _start(name, run)
    if issubclass(twin_class, DdpTwin | DenseTwin):
        twin = twin_class(run, start)
    else:
        draw = {"joint": joint_draw, "columns": column_draw}.get(options.get("draws", "own"), engine_draw)
        twin = twin_class(run, start, draw(run))
    data, devices = tiny.batches(run), range(run.cluster.devices)
    losses = [twin.step(*data.batch(step, devices), step) for step in range(run.train.steps)]
    return tiny.History(torch.stack(losses), twin.merged_state())


def _start(name: str, run: Run) -> nn.Module:
    if TWINS[name] in ON_BIGRAMS:
        return bigram()
    quantize = tiny.VARIANTS[name].get("quantize")
    # These two never touch the rounded weights again; other twins round by themselves.
    rounded = quantize and TWINS[name] in (LoraTwin, MhloraTwin)
    return rounded_start(build_model(run), quantize) if rounded else build_model(run)
