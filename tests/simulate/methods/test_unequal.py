"""Classes of unequal devices against devices that are computed one by one, and against numbers worked out by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from simulate.common.errors import InputError
from simulate.config.run import Run, build_run
from simulate.costs.message_schedule import received_bytes, schedule, sent_bytes
from simulate.layers.formats import head_places
from simulate.layers.lora import AdapterSpec
from simulate.methods.base import Method
from simulate.methods.lte.merge import LayerMerger
from simulate.methods.state import State
from simulate.methods.unequal import Unequal
from tests import tiny
from tests.reference.unequal import UnequalTwin
from tests.reference.unequal_dense import UnequalDenseTwin
from tests.selection import others_slow, variants

CLASSES: list[tiny.Table] = [
    {"devices": 2, "micro_batch": 4, "heads_per_device": 2},
    {"devices": 1, "rank": 5, "accumulate": 2},
    {"devices": 1, "micro_batch": 1, "rank": 1},
]
# Merges after 3, 6 and 8 steps.
TRAIN = {"steps": 8, "micro_batch": 2, "warmup_steps": 2, "weight_decay": 0.1, "learning_rate": 1e-2, "clip_norm": 1.1}


def unequal_run(classes: list[tiny.Table] = CLASSES, train: tiny.Table | None = None, **method: Any) -> Run:
    """Return a tiny fp64 run of unequal devices whose own rank is 2."""
    adapters = {"rank": 2, "alpha": 4.0, "merge_every": 3} if method.get("name", "lte") == "lte" else {}
    return build_run(
        {
            "model": {**tiny.SIZES, "layers": method.get("fragments", 1)},
            "data": {"path": "made-up"},
            "method": {"name": "lte", **adapters, **method},
            "train": {**TRAIN, "dtype": "fp64", **(train or {})},
            "cluster": {"devices": sum(one["devices"] for one in classes), "class": classes},
        }
    )


def dense_twin_history(run: Run) -> tiny.History:
    twin = UnequalDenseTwin(run, tiny.text())
    losses = torch.stack([twin.step(step) for step in range(run.train.steps)])
    return tiny.History(losses, twin.merged_state())


@cache
def twin_history(run: Run) -> tiny.History:
    """Train the twin, which knows no transports: one run of it serves all."""
    twin = UnequalTwin(run, tiny.text())
    losses = torch.stack([twin.step(step) for step in range(run.train.steps)])
    return tiny.History(losses, twin.merged_state())


DRAWS: dict[str, tiny.Table] = {
    "own": {"draws": "own"},
    "joint": {"draws": "joint"},
    # Four heads of rank 6, one of 5 and one of 1 cover 16 inputs, and go beyond the first permutation; not 64.
    "columns": {"draws": "columns", "rank": 6},
}


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("draws", "transport"),
    others_slow(
        itertools.product(DRAWS, ["gather", "reduce", "server", "auto"]),
        [("own", "gather"), ("joint", "reduce"), ("own", "server"), ("columns", "auto")],
    ),
)
def test_heads_of_unequal_devices_train_like_the_twin(draws: str, transport: str) -> None:
    run = unequal_run(**DRAWS[draws], merge_transport=transport)
    tiny.assert_parity(tiny.train(tiny.build(run)), twin_history(unequal_run(**DRAWS[draws])))


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("reset", "transport"),
    others_slow(
        itertools.product(["none", "ab"], ["gather", "reduce", "server"]),
        [("none", "gather"), ("ab", "reduce"), ("none", "server")],
    ),
)
def test_trained_a_and_resets_train_like_the_twin(reset: str, transport: str) -> None:
    run = unequal_run(reset=reset, frozen_a=False, merge_transport=transport)
    tiny.assert_parity(tiny.train(tiny.build(run)), twin_history(unequal_run(reset=reset, frozen_a=False)))


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        pytest.param(Method, "shares_of_samples", lambda self: None, id="devices weigh alike"),
        pytest.param(LayerMerger, "share_of", lambda self, team: self.teams[0].share, id="the first's scale"),
        pytest.param(AdapterSpec, "place", lambda self, head, inputs: (head, 0), id="each head has rows of its own"),
    ],
)
def test_parity_detects_a_broken_merge(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: Callable[..., Any]
) -> None:
    run = unequal_run(**DRAWS["columns"])
    expected = twin_history(run)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        tiny.assert_parity(tiny.train(tiny.build(run)), expected)


ALIKE = [
    name
    for name, keys in tiny.VARIANTS.items()
    if name.startswith(("lte", "ddp", "local-sgd", "diloco")) and "devices_per_node" not in keys
]


@pytest.mark.numeric
@pytest.mark.parametrize("name", variants("alike classes", ALIKE))
def test_classes_that_are_alike_train_as_no_classes_do(name: str) -> None:
    model = {"layers": tiny.VARIANTS[name].get("fragments", 1)}
    run = tiny.variant_run(name, 4, model, {"steps": 6, "micro_batch": 4})
    table = run.model_dump(exclude_none=True)
    table["cluster"]["class"] = [{"devices": 1}, {"devices": 3}]
    apart = build_run(table)
    method = tiny.build(apart)
    assert isinstance(method, Unequal)
    one = tiny.build(run)
    tiny.assert_parity(tiny.train(method), tiny.train(one), 1e-11)
    counted, expected = method.communicator.counter, one.communicator.counter
    assert (counted.sent_bytes, counted.received_bytes) == (expected.sent_bytes, expected.received_bytes)


BYTES: dict[str, tiny.Table] = {
    "gathered": {},
    "gathered int8": {"wire": "int8"},
    "gathered int4, A too": {"wire": "int4", "frozen_a": False, "reset": "ab"},
    "reduced": {"merge_transport": "reduce"},
    "reduced bf16": {"merge_transport": "reduce", "wire": "bf16"},
    "served": {"merge_transport": "server"},
    "served fp16": {"merge_transport": "server", "wire": "fp16"},
    "the cheaper": {"merge_transport": "auto", "rank": 6},
    "in parts": {"merge_every": 4, "fragments": 2},
    "local-sgd": {"name": "local-sgd", "merge_every": 3},
    "diloco int8": {"name": "diloco", "merge_every": 3, "wire": "int8"},
    "ddp": {"name": "ddp"},
}


@pytest.mark.parametrize("name", BYTES)
def test_planned_bytes_are_counted_bytes(name: str) -> None:
    keys = BYTES[name]
    classes = CLASSES if keys.get("name", "lte") == "lte" else DENSE
    run = unequal_run(classes, **keys)
    method = tiny.build(run)
    tiny.train(method)
    counter = method.communicator.counter
    assert counter.sent_bytes == sent_bytes(run, run.shape(), 8)
    assert counter.received_bytes == received_bytes(run, run.shape(), 8)
    assert counter.messages == sum(len(p.exchange.transfers) * p.times(8, 8) for p in schedule(run, run.shape()))


def test_gathered_bytes_by_hand() -> None:
    # One message of B of 2, 1 and 3 columns for one block's outputs of 48 + 16 + 64 + 16, eight bytes each: what one
    # sends crosses two links.
    classes: list[tiny.Table] = [{"devices": 1}, {"devices": 1, "rank": 1}, {"devices": 1, "rank": 3}]
    run = unequal_run(classes)
    (gathered,) = [t for t in schedule(run, run.shape())[0].exchange.transfers if t.operation == "all_gather"]
    assert gathered.sent_bytes == gathered.received_bytes == 2 * (2 + 1 + 3) * 144 * 8


DENSE: list[tiny.Table] = [{"devices": 2, "micro_batch": 4}, {"devices": 1, "accumulate": 2}, {"devices": 1}]


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["local-sgd", "diloco", "ddp"])
def test_dense_methods_weigh_devices_by_their_samples(name: str) -> None:
    keys = {"name": name, **({} if name == "ddp" else {"merge_every": 3})}
    run = unequal_run(DENSE, **keys)
    tiny.assert_parity(tiny.train(tiny.build(run)), dense_twin_history(run))


def test_gradients_of_unequal_batches_are_averaged_over_samples() -> None:
    # Without momentum's history the first step of ddp on batches of 4, 4, 4 and 2 samples is that on all 14 at once.
    run = unequal_run(DENSE, {"steps": 3}, name="ddp")
    inputs, targets = tiny.batches(run).batch(0, range(4))
    method = tiny.build(run)
    assert isinstance(method, Unequal)
    losses = method.step(inputs, targets, 0)
    alone = tiny.build(unequal_run([{"devices": 1, "micro_batch": 14}], {"steps": 3}, name="ddp"))
    (loss,) = alone.step(inputs, targets, 0)
    assert float((losses * torch.tensor([4, 4, 4, 2])).sum() / 14) == pytest.approx(float(loss), rel=1e-12)
    for name, weight in alone.merged_state().items():
        assert (method.merged_state()[name] - weight).norm() <= 1e-9 * weight.norm()


PACED: tiny.Table = {"pace": "deadline", "steps_taken": [[3, 2, 1, 3], [1, 1, 3, 2]]}


def test_paced_devices_weigh_by_samples_times_steps() -> None:
    run = unequal_run(**PACED)
    method = tiny.build(run)
    tiny.train(method, 0, 3)
    assert isinstance(method, Unequal)
    done = torch.tensor([4.0 * 3, 4 * 2, 4 * 1, 1 * 3], dtype=torch.float64)
    for part in method.methods:
        assert torch.allclose(part.shares(), done / done.sum())
    assert method.samples_done(2) == 27 and method.steps_done() == [3, 2, 1, 3]


RESUMED: dict[str, tiny.Table] = {
    "lte": {},
    "lte int8": {"wire": "int8"},
    "lte, reset-less": {"reset": "none"},
    "lte, late": {"merge_delay": 1},
    "lte, paced": PACED,
    "local-sgd": {"name": "local-sgd", "merge_every": 3},
    "diloco": {"name": "diloco", "merge_every": 3, "wire": "int8"},
    "ddp": {"name": "ddp", "wire": "int8"},
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_to_the_last_bit(name: str) -> None:
    keys = RESUMED[name]
    run = unequal_run(CLASSES if keys.get("name", "lte") == "lte" else DENSE, **keys)
    method, restored = tiny.build(run), tiny.build(run)
    assert isinstance(restored, Unequal)
    tiny.train(method, 0, 5)
    saved = copy.deepcopy(method.state.sharded())
    for part in restored.methods:
        tiny.spoil(part)
    restored.state.load_sharded(saved)
    unbroken, continued = tiny.train(method, 5), tiny.train(restored, 5)
    assert torch.equal(unbroken.losses, continued.losses)
    assert all(torch.equal(weight, continued.weights[key]) for key, weight in unbroken.weights.items())


FORMATS: list[tiny.Table] = [{"devices": 1}, {"devices": 1, "quantize": "nf4"}, {"devices": 1, "quantize": "int8"}]


def test_classes_of_unequal_formats_merge_into_one_model() -> None:
    method = tiny.build(unequal_run(FORMATS, {"dtype": "fp32"}))
    assert isinstance(method, Unequal)
    tiny.train(method, 0, 6)
    first, *others = (part.merged_state() for part in method.methods)
    for other in others:
        assert all(torch.equal(weight, other[name]) for name, weight in first.items())


@pytest.mark.parametrize("saved_by", [0, 1, 2])
def test_a_process_takes_weights_that_another_class_saved_in_its_own_format(saved_by: int) -> None:
    run = unequal_run(FORMATS, {"dtype": "fp32"})
    method = tiny.build(run)
    assert isinstance(method, Unequal)
    tiny.train(method, 0, 6)
    parts = [part.state.sharded() for part in method.methods]
    for index, part in enumerate(parts):
        alone = tiny.build(run, range(index, index + 1))
        alone.state.load_sharded(State(dict(parts[saved_by].shared), part.of_devices))
        expected = method.methods[index].state.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in alone.state.state_dict().items())


def test_a_process_holds_devices_of_one_class() -> None:
    run = unequal_run()
    assert not isinstance(tiny.build(run, range(2)), Unequal)
    with pytest.raises(InputError, match="devices 1 to 2 would share a process, and are of class 0 and of class 1"):
        run.of_devices(range(1, 3))


def test_a_failing_program_ends_the_others_wait() -> None:
    method = tiny.build(unequal_run())
    assert isinstance(method, Unequal)

    def fail(step: int) -> None:
        raise ValueError("broken")

    method.methods[1].merge = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="broken"):
        method.merge(2)


def test_a_head_starts_where_the_one_before_it_ends() -> None:
    assert head_places((4, 4, 5, 2, 8), 10) == ((0, 0), (0, 4), (1, 0), (1, 5), (2, 0))
    assert head_places((3,) * 5, 10) == ((0, 0), (0, 3), (0, 6), (1, 0), (1, 3))
