"""LTE whose nodes train as one: bytes by hand and as planned, launched as simulated, and what broken nodes would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from simulate.comm.nodes import NodeExchanges
from simulate.common.errors import InputError
from simulate.config.run import build_run
from simulate.costs.message_schedule import received_bytes, schedule, sent_bytes
from simulate.layers.lora import lora_layers
from simulate.methods.lte.train import Lte
from tests import tiny
from tests.processes import DEVICES, train_in_processes, variant_table
from tests.simulate.methods.adapter_parity import on_layer
from tests.simulate.methods.twins import fast_history, slow_history, twin_run

NODES = [name for name in tiny.VARIANTS if name.startswith("lte, nodes")]
STEPS = 14


@pytest.mark.parametrize("name", NODES)
def test_planned_bytes_and_messages_are_counted(name: str) -> None:
    run = tiny.variant_run(name, train={"steps": STEPS})
    method, shape = tiny.build(run), run.shape()
    tiny.train(method)
    counter = method.communicator.counter
    assert (counter.sent_bytes, counter.received_bytes) == (
        sent_bytes(run, shape, STEPS), received_bytes(run, shape, STEPS)
    )  # fmt: skip
    planned = sum(len(part.exchange.transfers) * part.times(STEPS, STEPS) for part in schedule(run, shape))
    assert counter.messages == planned


def test_bytes_by_hand() -> None:
    # One 2x2 layer at rank 1, A frozen, fp64: B has 2 numbers, 16 bytes. Three nodes of two devices, T = 2, two steps.
    run = tiny.lte_run(6, train={"steps": 2}, rank=1, alpha=1.0, merge_every=2, devices_per_node=2, reset="b",
                       frozen_a=True)  # fmt: skip
    method = on_layer(run)
    for step in range(2):
        method.step(torch.ones(12, 2, dtype=torch.float64), torch.zeros(12, dtype=torch.int64), step)
    counter = method.communicator.counter
    # Every step, in each of 3 nodes: an all-reduce of 16 bytes between 2 devices, 2·(2−1)·16 sent by both together.
    assert counter.sent_bytes == 2 * 3 * 2 * 16
    method.merge(1)
    # The merge: 3 first devices send 16 bytes to 2 others; then each hands 3·16 bytes to its node's other device.
    assert counter.sent_bytes == 192 + 3 * 2 * 16 + 3 * 1 * 48
    assert counter.messages == 2 + 2


def test_a_step_by_hand() -> None:
    # Devices 0 and 1 are a node: its B moves by Adam's step of the mean of both gradients, the same for both.
    run = tiny.lte_run(2, train={"steps": 10, "clip_norm": 1e9}, rank=1, alpha=1.0, devices_per_node=2, reset="b",
                       frozen_a=True)  # fmt: skip
    method = on_layer(run)
    (layer,) = lora_layers(method.model)
    assert len(layer.b) == 1
    x = torch.tensor([[1.0, 2.0]] * 2 + [[3.0, 5.0]] * 2, dtype=torch.float64)
    seen: list[Tensor] = []
    layer.b.register_hook(seen.append)
    stepped: list[Tensor] = []
    step = method.stepper.step

    def watched(rate: float) -> None:
        assert layer.b.grad is not None
        stepped.append(layer.b.grad.clone())
        step(rate)

    method.stepper.step = watched  # type: ignore[method-assign]
    method.step(x, torch.tensor([0, 0, 1, 1]), 0)
    # With W = 1 and B = 0: gradient of B = s·(softmax(x) − onehot)·(A·x), the mean over samples, then over devices.
    a = layer.a[0, 0]
    of_devices = [
        torch.outer(torch.softmax(v, 0) - torch.eye(2, dtype=torch.float64)[label], (a @ v).view(1))
        for v, label in ((x[0], 0), (x[2], 1))
    ]
    torch.testing.assert_close(stepped[0][0], (of_devices[0] + of_devices[1]) / 2, rtol=1e-12, atol=0)
    assert seen


LAUNCHED_STEPS = 7  # a whole round of four, what arrives late, and a shorter last round


@pytest.mark.parametrize(
    "processes", [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
def test_launched_runs_are_the_simulated_ones(tmp_path: Path, processes: int) -> None:
    """Two nodes of two processes, of one, and both in one."""
    for name, (history, counted) in train_in_processes(tmp_path, NODES, processes, LAUNCHED_STEPS).items():
        method = tiny.build(tiny.variant_run(name, DEVICES, train=variant_table(LAUNCHED_STEPS, "fp64")))
        tiny.assert_parity(history, tiny.train(method))
        counter = method.communicator.counter
        assert counted == {
            "sent": counter.sent_bytes, "received": counter.received_bytes, "messages": counter.messages
        }, name  # fmt: skip


@pytest.mark.parametrize("name", ["lte, nodes", "lte, nodes, frozen a"])
def test_one_node_of_all_devices_merges_with_nobody(name: str) -> None:
    run = twin_run(name)
    run = build_run({**run.model_dump(), "cluster": {"devices": 2}})
    method = tiny.build(run)
    tiny.assert_parity(tiny.train(method), slow_history(name, run))
    shape = run.shape()
    assert method.communicator.counter.sent_bytes == sent_bytes(run, shape, STEPS)
    assert len(schedule(run, shape)) == 1


def not_averaged(method: Lte) -> None:
    """Step with the sum of a node's gradients."""


def unsorted(method: Lte, samples: Tensor) -> Tensor:
    return samples


@pytest.mark.parametrize(("attribute", "broken"), [("_average_in_nodes", not_averaged), ("_by_heads", unsorted)])
def test_parity_detects_a_broken_node(monkeypatch: pytest.MonkeyPatch, attribute: str, broken: object) -> None:
    monkeypatch.setattr(Lte, attribute, broken)
    run = twin_run("lte, nodes")
    with pytest.raises(AssertionError):
        tiny.assert_parity(fast_history("lte, nodes", run), slow_history("lte, nodes", run))


def test_bytes_detect_a_result_that_stays_with_the_first_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NodeExchanges, "_copy_in_nodes", lambda self, tensors, payload_bytes: None)
    run = tiny.variant_run("lte, nodes", train={"steps": STEPS})
    method = tiny.build(run)
    tiny.train(method)
    assert method.communicator.counter.sent_bytes < sent_bytes(run, run.shape(), STEPS)


def test_a_node_that_is_not_finite_is_left_out_of_a_merge_as_a_lone_device_is() -> None:
    run = tiny.variant_run("lte, nodes", devices=6)
    method = tiny.build(run)
    for parameter in method.parameters.values():
        parameter.data[len(parameter) // 3 : 2 * len(parameter) // 3] = torch.nan
    healthy_N = method.healthy()
    assert healthy_N.tolist() == [True, True, False, False, True, True]
    method.exclude_devices(healthy_N)
    method.merge(3)
    assert all(bool(tensor.isfinite().all()) for tensor in method.merged_state().values())


def test_a_node_holds_one_copy_and_its_first_device_saves_it() -> None:
    method = tiny.build(tiny.variant_run("lte, nodes", devices=6))
    assert all(parameter.shape[0] in (3, 6) for parameter in method.parameters.values())  # nodes, or their two heads
    assert method.row_devices() == [0, 2, 4]
    saved = method.state.sharded()
    assert [bool(saved.of_devices[device]) for device in range(6)] == [True, False] * 3


def test_nodes_have_the_draws_of_as_many_lone_devices() -> None:
    run = tiny.variant_run("lte, nodes", devices=6)
    lone = build_run({**run.model_dump(), "cluster": {"devices": 3}, "method": {
        **run.method.model_dump(exclude_none=True), "devices_per_node": 1,
    }})  # fmt: skip
    assert run.heads == lone.heads == 6
    ours, theirs = (lora_layers(tiny.build(r).model) for r in (run, lone))
    assert all(torch.equal(one.a, other.a) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": {"devices_per_node": 3}}, ("cluster.devices = 4", "devices_per_node = 3", "change one")),
        ({"method": {"pace": "deadline"}}, ("pace = 'deadline'", "devices_per_node = 2", "leave one")),
        (
            {"method": {"devices_per_node": 4, "merge_transport": "server"}},
            ("devices_per_node = 4", "one node", "--set method.merge_transport=gather"),
        ),
        ({"train": {"diagnostics_every": 5}}, ("diagnostics_every = 5", "devices_per_node = 2", "leave one")),
    ],
)
def test_what_does_not_go_together_is_refused(keys: tiny.Table, said: tuple[str, ...]) -> None:
    table = tiny.variant_run("lte, nodes, frozen a").model_dump(exclude_none=True)
    for section, update in keys.items():
        table[section] |= update
    with pytest.raises(InputError) as refused:
        build_run(table)
    assert all(part in str(refused.value) for part in said), refused.value
    assert "\n" not in str(refused.value)


def test_processes_hold_whole_nodes_or_equal_parts() -> None:
    method = tiny.variant_run("lte, nodes", devices=8).method
    assert [method.processes_rule(8, processes) is None for processes in (1, 2, 3, 4, 8)] == [
        True, True, False, True, True,
    ]  # fmt: skip
    lone = tiny.variant_run("lte", devices=8).method
    assert lone.processes_rule(8, 3) is None


def test_the_method_can_be_built_for_a_part_of_a_node() -> None:
    run = tiny.variant_run("lte, nodes", devices=4)
    method = tiny.build(run, local_devices=range(3, 4))
    assert method.row_devices() == [2]
    assert len(method.between.local_devices) == 1
