"""Generate the runs that a plan compares: every method with the values of its keys that are worth trying.

Methods list these values themselves (`axes` of their plans), so a new method needs no change here. The planner calls
grid; what_if calls train_for to give other numbers of devices the same tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from simulate.config.method_options import DEFAULT_SCALE, MethodOptions
from simulate.config.method_table import default_options
from simulate.config.run import Run
from simulate.config.tables import Cluster, Train
from simulate.models.schema import FactoryModel
from simulate.models.shapes import ModelShape
from simulate.planning.best_known import proposed, with_known_wire
from simulate.rules.method_plan import plan_of

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Samples of a device's pass that are tried. Their steps are small beside the batches that power laws of training find
best (docs/planning.md), so what ranks them is the time of a step and the samples model's critical batch."""
LEAST_TOKENS = 512
"""Tokens of a step, over all devices, below which passes are accumulated. It is far below the critical batch even of
the first step, below which no batch costs samples: B = 2e8 / loss^(1/0.21) tokens is 2,400 at the loss of guessing one
of 50,257 tokens, and grows as the loss falls (Kaplan et al. 2020, arXiv 2001.08361, equation 1.4)."""
LEAST_IMAGES = 32
"""The same for images: "a good default" (Bengio 2012, arXiv 1206.5533, section 3.1.1), and the largest batch of those
that trained best (Masters and Luschi 2018, arXiv 1804.07612)."""
NEAR = 0.02
"""Largest distance from --batch-tokens or --batch-samples, as a share, that is as good as the nearest one: odd batches
have few divisors, and small passes are slow."""
FEWER_EXCHANGES = (2, 4, 8)
"""Times the passes of a step that methods which exchange at every step are tried with, beside once."""
WARMUP_SHARE, MOST_WARMUP_STEPS = 0.05, 2000


@dataclass(frozen=True)
class Pins:
    """Settings that the user fixed; the planner varies those that are None."""

    method: str | None = None
    keys: frozenset[str] = frozenset()
    """Keys of [method] that the user set; their values are in the base run."""
    micro_batch: int | None = None
    accumulate: int | None = None
    batch: int | None = None
    """Tokens, of images samples, of a step over all devices, to come near to."""
    activation_checkpointing: bool | None = None
    ranks: tuple[int, ...] = ()
    """Ranks that a probe recommends, tried with those of the method's axes."""
    open_keys: frozenset[str] = frozenset()
    """Keys of simulate.planning.best_known that the plan proposes; none: all are those of the base run."""
    is_quorum_open: bool = False
    """Whether the plan may choose a quorum, as the user has said nothing of who may be missing."""


def grid(
    base: Run, shape: ModelShape, methods: Sequence[str], pins: Pins, tokens: int, node_size: int | None = None
) -> Iterator[Run]:
    """Yield the runs of `methods` to compare; keys that neither pins nor axes vary are those of `base`.

    `node_size` are the devices of one of the profile's nodes, where it has some.
    """
    checkpointing = (False, True) if pins.activation_checkpointing is None else (pins.activation_checkpointing,)
    if isinstance(base.model, FactoryModel):  # recomputation needs blocks that we know
        checkpointing = (False,)
    proposals: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    options: list[tuple[MethodOptions, tuple[tuple[str, Any], ...]]] = []
    for name in methods:
        start = _start(base, name, pins)
        keys = proposed(base, start, shape.width, pins.open_keys)
        recipe = tuple(keys.items())
        proposals[recipe] = keys
        options += [(option, recipe) for option in _options(base, shape, start, pins, node_size)]
    # Methods that exchange at every step would else be judged at the batch that fits, and pay the link for it.
    at_every_step = [pair for pair in options if pair[0].round_steps == 1 and base.cluster.devices > 1]
    is_open = pins.micro_batch is None and pins.accumulate is None and pins.batch is None
    times = (1, *FEWER_EXCHANGES) if is_open else (1,)
    for (micro_batch, accumulate), recompute, more in itertools.product(_batches(base, pins), checkpointing, times):
        train = train_for(base, micro_batch, accumulate * more, recompute, tokens)
        if train.num_warmup_steps >= train.steps:  # as Run refuses it; copies skip its validation
            continue
        # One object for all candidates with the same keys: a plan has thousands of them.
        trains = {recipe: train.model_copy(update=keys) if keys else train for recipe, keys in proposals.items()}
        for method, recipe in options if more == 1 else at_every_step:
            if micro_batch % getattr(method, "heads_per_device", 1):
                continue
            yield base.model_copy(update={"method": method, "train": trains[recipe], "cluster": _cluster(base, method)})


def _cluster(base: Run, method: MethodOptions) -> Cluster:
    """Return the base run's cluster, in lockstep for methods whose merges need all devices."""
    if not base.cluster.has_quorum:
        return base.cluster
    try:
        method.check_quorum(base.cluster)
    except ValueError:
        keys = ("quorum", "deadline_s", "merges_given", "age_exponent")
        return base.cluster.model_copy(update=dict.fromkeys(keys))
    return base.cluster


def _batches(base: Run, pins: Pins) -> list[tuple[int, int]]:
    """Return the pairs of micro_batch and accumulate to try: one for each micro_batch, so that the grid stays small."""
    # Heads share a batch equally, so a pinned number of heads must divide every batch.
    unit = getattr(base.method, "heads_per_device", 1) if "heads_per_device" in pins.keys else 1
    sizes = [pins.micro_batch] if pins.micro_batch else [unit * size for size in MICRO_BATCHES]
    one = base.tokens_per_step // base.train.device_batch  # of a sample on every device
    least = LEAST_TOKENS if base.model.unit == "tokens" else LEAST_IMAGES
    if pins.accumulate:
        pairs = [(size, pins.accumulate) for size in sizes]
    elif pins.batch:
        pairs = [(size, max(1, round(pins.batch / (one * size)))) for size in sizes]
    else:  # a batch that the user gives stays as it is
        pairs = [(size, 1 if pins.micro_batch else max(1, math.ceil(least / (one * size)))) for size in sizes]
    if pins.batch is None:
        return pairs
    distances = [abs(size * accumulate * one - pins.batch) for size, accumulate in pairs]
    most = max(min(distances), NEAR * pins.batch)
    return [pair for pair, distance in zip(pairs, distances, strict=True) if distance <= most]


def _start(base: Run, name: str, pins: Pins) -> MethodOptions:
    """Return a method's options before their axes are varied."""
    # The base run's method keeps the user's keys; every other one starts from its defaults.
    ours = base.method.name == name
    start = plan_of(base.method if ours else default_options(name)).fitted(base.cluster.devices)
    return with_known_wire(base, start, pins.open_keys)


def _options(
    base: Run, shape: ModelShape, start: MethodOptions, pins: Pins, node_size: int | None
) -> Iterator[MethodOptions]:
    """Yield a method's options with every combination of values that the user left open."""
    ours, plan = base.method.name == start.name, plan_of(start)
    axes = {**plan.axes, **_node_axis(base, start, node_size)}
    axes = {key: values for key, values in axes.items() if not (ours and key in pins.keys)}
    if "rank" in axes and plan.adapters(base.cluster.devices) is not None:
        # A pair has no more directions than its layer's smaller side; try that side where all ranks exceed it.
        limit = min(min(linear.in_features, linear.out_features) for linear in shape.adapted)
        tried = sorted({*axes["rank"], *pins.ranks}) if plan.has_separate_heads else axes["rank"]
        axes["rank"] = [rank for rank in tried if rank <= limit] or [limit]
    if base.cluster.devices == 1 and "merge_transport" in axes:  # nothing travels, so all transports cost the same
        axes["merge_transport"] = axes["merge_transport"][:1]
    scales_alpha = "alpha" in type(start).model_fields and not (ours and "alpha" in pins.keys)
    for values in itertools.product(*axes.values()):
        update = dict(zip(axes, values, strict=True))
        if "rank" in update and scales_alpha:  # the same scale alpha / rank at every rank
            update["alpha"] = DEFAULT_SCALE * update["rank"]
        method = start.model_copy(update=update)
        # Copies skip validation, so combinations that a run would refuse are dropped here.
        if method.round_steps % method.merges_per_round == 0 and plan_of(method).is_valid():
            yield method


def _node_axis(base: Run, start: MethodOptions, node_size: int | None) -> dict[str, Sequence[int]]:
    """Return the numbers of devices that train as one: as they are, and those of a node, where there are several."""
    devices, key = base.cluster.devices, "devices_per_node"
    if node_size is None or devices <= node_size or devices % node_size or key not in type(start).model_fields:
        return {}
    if base.train.diagnostics_every is not None:  # which compare lone devices
        return {}
    return {key: sorted({getattr(start, key), node_size})}


def train_for(base: Run, micro_batch: int, accumulate: int, recompute: bool, tokens: int) -> Train:
    """Return base.train with another batch, the steps that train on `tokens`, and the keys that depend on the steps."""
    tokens_per_step = base.tokens_per_step * micro_batch * accumulate // base.train.device_batch
    steps = max(1, math.ceil(tokens / tokens_per_step))
    every = max(1, steps // 10)
    given = base.train.model_fields_set
    # A warm-up of 5 %, ten evaluations and five checkpoints, unless the user set these keys.
    derived: dict[str, float] = {"steps": steps, "evaluate_every": every, "checkpoint_every": min(every * 2, 1000)}
    if "warmup_steps" not in given:  # a share, so that the run still loads with other steps
        derived["warmup_share"] = min(WARMUP_SHARE, MOST_WARMUP_STEPS / steps)
    update = {key: value for key, value in derived.items() if key not in given}
    update |= {"micro_batch": micro_batch, "accumulate": accumulate, "activation_checkpointing": recompute}
    return base.train.model_copy(update=update)
