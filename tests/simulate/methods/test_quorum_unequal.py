"""Merges without some of several classes of devices: against slow twins, bytes, resumed runs, and alike classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from simulate.config.run import Run, build_run
from simulate.costs.message_schedule import received_bytes, sent_bytes
from simulate.methods.quorum import Quorum
from simulate.methods.unequal import Unequal
from tests import tiny
from tests.reference.quorum_unequal import QuorumUnequalDenseTwin, QuorumUnequalTwin
from tests.selection import others_slow

# Late by one merge and by two, lost and back; a whole class is late, and once only the last class is there.
ROWS = ((3, 2, 3, 1), (3, 0, 0, 2), (0, 0, 2, 3), (0, 1, 0, -1), (3, 3, 3, 3))
CLASSES: list[tiny.Table] = [
    {"devices": 2, "micro_batch": 4, "heads_per_device": 2},
    {"devices": 1, "rank": 5, "accumulate": 2},
    {"devices": 1, "micro_batch": 1, "rank": 1},
]
DENSE: list[tiny.Table] = [{"devices": 2, "micro_batch": 4}, {"devices": 1, "accumulate": 2}, {"devices": 1}]
TRAIN = {"steps": 14, "micro_batch": 2, "warmup_steps": 2, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": 1.1}


def run_of(classes: list[tiny.Table] | None = None, train: tiny.Table | None = None, **method: Any) -> Run:
    """Return a tiny fp64 run of unequal devices, some of which merges lack."""
    keys: dict[str, Any] = {"name": "lte", "rank": 2, "alpha": 4.0, "merge_every": 3, "reset": "b", **method}
    if keys["name"] != "lte":
        keys = {key: value for key, value in keys.items() if key not in ("rank", "alpha", "reset")}
    chosen = classes or (CLASSES if keys["name"] == "lte" else DENSE)
    return build_run(
        {
            "model": tiny.SIZES,
            "data": {"path": "made-up"},
            "method": keys,
            "train": {**TRAIN, "dtype": "fp64", **(train or {})},
            "cluster": {"devices": 4, "class": chosen, "merges_given": ROWS},
        }
    )


LTE: dict[str, tiny.Table] = {
    "gathered": {},
    "served": {"merge_transport": "server"},
    "reduced": {"merge_transport": "reduce"},
    "redrawn": {"reset": "ab", "frozen_a": False},
    "own draws": {"draws": "own"},
}


@pytest.mark.parametrize("name", others_slow(LTE, ["gathered", "served"]))
def test_lte_trains_like_the_twin(name: str) -> None:
    run = run_of(**LTE[name])
    method = tiny.build(run)
    assert isinstance(method, Unequal)
    assert all(isinstance(part, Quorum) for part in method.methods)
    tiny.assert_parity(tiny.train(method), history(QuorumUnequalTwin(run, tiny.text()), run))


@pytest.mark.parametrize("transport", others_slow({"server": 0, "reduce": 0}, ["server"]))
def test_whole_weights_train_like_the_twin(transport: str) -> None:
    run = run_of(name="local-sgd", merge_transport=transport)
    tiny.assert_parity(tiny.train(tiny.build(run)), history(QuorumUnequalDenseTwin(run, tiny.text()), run))


def history(twin: QuorumUnequalTwin | QuorumUnequalDenseTwin, run: Run) -> tiny.History:
    losses = torch.stack([twin.step(step) for step in range(run.train.steps)])
    return tiny.History(losses, twin.merged_state())


def test_parity_detects_shares_without_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quorum, "times_samples", lambda self, sizes: None)
    run = run_of()
    with pytest.raises(AssertionError):
        tiny.assert_parity(tiny.train(tiny.build(run)), history(QuorumUnequalTwin(run, tiny.text()), run))


BYTES: dict[str, Run] = {
    "gathered": run_of(),
    "gathered int8": run_of(wire="int8"),
    "gathered int4, A too": run_of(wire="int4", reset="ab", frozen_a=False),
    "served int2": run_of(wire="int2", merge_transport="server"),
    "reduced int8": run_of(wire="int8", merge_transport="reduce"),
    "the cheaper": run_of(merge_transport="auto", rank=6),
    "local-sgd": run_of(name="local-sgd"),
    "diloco int4": run_of(name="diloco", wire="int4"),
}


@pytest.mark.parametrize("name", others_slow(BYTES, ["gathered int4, A too", "diloco int4"]))
def test_planned_bytes_are_those_counted(name: str) -> None:
    run = BYTES[name]
    method = tiny.build(run)
    tiny.train(method)
    counter = method.communicator.counter
    assert counter.sent_bytes == sent_bytes(run, run.shape(), run.train.steps)
    assert counter.received_bytes == received_bytes(run, run.shape(), run.train.steps)


def test_samples_are_those_of_the_steps_taken() -> None:
    method, steps = tiny.build(run_of()), 6
    tiny.train(method, 0, steps)
    # Rounds of 3, 2, 3, 1 and of 3, 1, 2, 2 steps: late devices take the steps then that they bring later.
    assert method.samples_done(steps - 1) == 4 * (3 + 2) + 4 * 3 + 1 * 1 + 4 * (3 + 1) + 4 * 2 + 1 * 2


@pytest.mark.parametrize("name", others_slow(["gathered int8", "reduced int8"], ["gathered int8"]))
def test_a_resumed_run_is_the_same_to_the_last_bit(name: str) -> None:
    run = BYTES[name]
    method, restored = tiny.build(run), tiny.build(run)
    assert isinstance(restored, Unequal)
    tiny.train(method, 0, 7)  # a device is late, and its errors and changes wait
    saved = copy.deepcopy(method.state.sharded())
    for part in restored.methods:
        tiny.spoil(part)
    restored.state.load_sharded(saved)
    unbroken, continued = tiny.train(method, 7), tiny.train(restored, 7)
    assert torch.equal(unbroken.losses, continued.losses)
    assert all(torch.equal(weight, continued.weights[key]) for key, weight in unbroken.weights.items())
