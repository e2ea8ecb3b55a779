"""Merges that arrive late: against slow twins, by hand, and really behind the training where devices are processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from simulate.comm.channel import Channel
from simulate.comm.process_group import TorchCommunicator
from simulate.comm.transfers import Exchange
from simulate.comm.virtual import VirtualCommunicator
from simulate.common.errors import InputError
from simulate.config.hardware import Link
from simulate.config.profiles import load_profile
from simulate.config.run import Run
from simulate.costs.message_schedule import PeriodicExchange
from simulate.costs.step_time import round_time
from simulate.methods.averaging import Averaging
from simulate.methods.base import Method
from simulate.methods.lte.merge import LayerMerger
from simulate.methods.lte.train import Lte
from simulate.methods.overlapped import NOTHING, Delayed
from simulate.methods.registry import build_method
from simulate.training.simulated_clock import SimulatedClock
from tests import tiny
from tests.reference.late import LateDilocoTwin, LateLocalSgdTwin, LateLteFrozenATwin, LateLteTwin
from tests.selection import others_slow
from tests.simulate.methods import adapter_parity, parity
from tests.simulate.methods.parity import hand_run, of_linear, set_copies

SHARDS = (1.0, 2.0, 3.0)
# 21 steps = 4·5 + 1 and 19 = 3·6 + 1: the last merge but one is still on its way when the run ends.
DENSE: dict[str, tuple[Any, Run]] = {
    "local sgd": (LateLocalSgdTwin, parity.parity_run("local-sgd, late", merge_every=5, merge_delay=2)),
    "shards": (LateLocalSgdTwin, parity.parity_run("local-sgd, late", shards=SHARDS, merge_every=5, merge_delay=4)),
    "int8": (LateLocalSgdTwin, parity.parity_run("local-sgd, late", merge_every=5, merge_delay=2, wire="int8")),
    "served, reset": (
        LateLocalSgdTwin,
        parity.parity_run("local-sgd, late, served", merge_every=5, merge_optimizer="reset"),
    ),
    "diloco": (LateDilocoTwin, parity.parity_run("diloco, late", merge_every=5)),
    "diloco, streaming int8": (LateDilocoTwin, parity.parity_run("diloco, late, streaming int8", merge_every=4)),
}
SIX: dict[str, Any] = {"merge_every": 6, "merge_delay": 4}
LTE: dict[str, tuple[Any, Run]] = {
    "gathered": (LateLteTwin, adapter_parity.parity_run("lte, late", **SIX)),
    "reduced": (LateLteTwin, adapter_parity.parity_run("lte, late, reduced", **SIX)),
    "served": (LateLteTwin, adapter_parity.parity_run("lte, late, served", norms="average", **SIX)),
    "streaming, two heads": (
        LateLteTwin,
        adapter_parity.parity_run("lte, late, streaming int8", wire="full", merge_every=6, merge_delay=2),
    ),
    "pruned": (LateLteTwin, adapter_parity.parity_run("lte, late", merge_optimizer="prune", **SIX)),
    "frozen a": (LateLteFrozenATwin, adapter_parity.parity_run("lte, late, frozen a", merge_optimizer="keep", **SIX)),
}


@pytest.mark.parametrize("name", others_slow(DENSE, ["shards", "served, reset", "diloco, streaming int8"]))
def test_every_dense_method_trains_like_the_twin(name: str) -> None:
    parity.assert_trains_like(*DENSE[name])


@pytest.mark.parametrize("name", others_slow(LTE, ["served", "streaming, two heads", "frozen a"]))
def test_lte_trains_like_the_twin(name: str) -> None:
    adapter_parity.assert_trains_like(*LTE[name])


def take_over_all(averaging: Averaging, index: int) -> None:
    """Overwrite what devices learned since."""
    for name in (name for message in averaging.messages[index] for name in message):
        averaging.parameters[name].copy_(
            averaging._merged(name, averaging.arriving[name]).expand_as(averaging.parameters[name])
        )


def remember_now(merger: LayerMerger) -> None:
    """Take what heads have now, not what they sent, for what is merged."""
    for layer in merger.layers:
        layer.weight.copy_(merger.arriving[layer.name])
        layer.remember_product(layer.a.detach(), layer.b.detach())


@pytest.mark.parametrize(
    ("owner", "attribute", "broken", "case"),
    [
        pytest.param(Averaging, "apply_merged", take_over_all, DENSE["local sgd"], id="progress is lost"),
        pytest.param(LayerMerger, "apply_merged", remember_now, LTE["gathered"], id="what was not sent is remembered"),
        pytest.param(Delayed, "delay", 3, DENSE["local sgd"], id="a step too late"),
    ],
)
def test_parity_detects_a_broken_engine(
    monkeypatch: pytest.MonkeyPatch, owner: type, attribute: str, broken: Any, case: tuple[Any, Run]
) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    module = adapter_parity if case[0] is LateLteTwin else parity
    with pytest.raises(AssertionError):
        module.assert_trains_like(*case)  # type: ignore[attr-defined]


def idle(method: Method, step: int) -> None:
    """Take a step that moves nothing: one class has no loss."""
    devices = method.run.cluster.devices
    method.step(torch.zeros(devices, 1, dtype=torch.float64), torch.zeros(devices, dtype=torch.int64), step)


def test_a_late_mean_by_hand() -> None:
    method, weight = of_linear(hand_run("local-sgd, late"), value=5.0)  # T = 4, d = 2
    set_copies(weight, 1.0, 3.0)
    method.merge(3)
    assert weight.flatten().tolist() == [1.0, 3.0]  # both train on
    set_copies(weight, 1.5, 2.0)
    idle(method, 4)
    assert weight.flatten().tolist() == [1.5, 2.0]  # still on its way
    (merged,) = method.merged_state().values()
    assert merged.item() == 5.0  # the start: nothing has arrived yet
    idle(method, 5)
    # 2 + (1.5 − 1) and 2 + (2 − 3)
    assert weight.flatten().tolist() == [2.5, 1.0]
    (merged,) = method.merged_state().values()
    assert merged.item() == 2.0


def test_a_late_outer_step_by_hand() -> None:
    method, weight = of_linear(hand_run("diloco, late"), value=1.0)  # d = 3
    set_copies(weight, 0.8, 0.6)
    method.merge(3)
    set_copies(weight, 0.7, 0.6)
    for step in (4, 5, 6):
        idle(method, step)
    # As in test_diloco, θ = 0.601; the first device has moved by −0.1 since.
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.501, 0.601], dtype=torch.float64), rtol=1e-12, atol=0)


@torch.no_grad()
def test_a_late_product_by_hand() -> None:
    method = adapter_parity.on_layer(tiny.lte_run(2, {"layers": 1}, {"steps": 99}, merge_every=4, merge_delay=2))
    (layer,) = method.mergers[0].layers  # type: ignore[attr-defined]
    before = layer.a.clone()
    layer.b.copy_(torch.stack([torch.eye(2), 3 * torch.eye(2)]))
    sent = layer.b @ before
    method.merge(3)
    layer.b.add_(1.0)
    effective = layer.weight + 2 * layer.b @ layer.a  # s = 2
    assert torch.equal(layer.weight, torch.eye(2).double())
    method.arrive()  # type: ignore[attr-defined]
    merged = torch.eye(2).double() + 2 * sent.mean(0)
    torch.testing.assert_close(layer.weight, merged, rtol=1e-14, atol=0)
    # A head sees the others' part of the merge beside its own weights, which go on.
    now = layer.weight + 2 * (layer.b @ layer.a - layer.b0 @ layer.a0)
    torch.testing.assert_close(now - effective, 2 * (sent.mean(0) - sent), rtol=1e-12, atol=1e-14)


def test_what_is_on_its_way_at_the_runs_end_is_merged_and_all_is_one_model() -> None:
    for name in ("local-sgd, late", "diloco, late", "lte, late", "lte, late, frozen a"):
        method = tiny.build(tiny.variant_run(name, train={"steps": 9}))
        assert isinstance(method, Delayed)
        tiny.train(method, 0, 8)
        assert int(method.sent_after) == 7
        tiny.train(method, 8, 1)
        assert int(method.sent_after) == NOTHING
        if name.startswith("lte"):
            assert all(torch.equal(p, p[:1].expand_as(p)) for p in method.averaging.parameters.values())  # type: ignore[attr-defined]
        else:
            assert all(torch.equal(p, p[:1].expand_as(p)) for p in method.parameters.values())


def test_a_device_that_is_left_out_goes_on_from_the_last_merge() -> None:
    method, weight = of_linear(hand_run("local-sgd, late", devices=3), value=5.0)
    set_copies(weight, 1.0, 3.0, torch.nan)
    method.exclude_devices(method.healthy())
    method.merge(3)
    assert weight.flatten().tolist() == [1.0, 3.0, 5.0]
    idle(method, 4)
    idle(method, 5)
    assert weight.flatten().tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("lte", {"merge_delay": 10}, "merge_every = 10"),
        ("lte", {"merge_delay": 5, "fragments": 2}, "fragments = 5"),
        ("lte", {"merge_delay": 1, "reset": "ab"}, "reset"),
        ("lte", {"merge_delay": 1, "reset": "b"}, "frozen_a"),
        ("lte", {"merge_delay": 1, "norms": "vector-lora"}, "vector-lora"),
        ("diloco", {"merge_delay": 10}, "one merge travels"),
        ("local-sgd", {"merge_delay": 1, "merge_optimizer": "average"}, "negative"),
        (
            "local-sgd",
            {"merge_delay": 1, "participation": 0.5, "merge_transport": "server", "merge_optimizer": "reset"},
            "participation",
        ),
    ],
)
def test_what_does_not_go_with_a_delay_is_refused(name: str, method: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tiny._run(2, None, None, {"name": name, **method})


def test_only_what_compute_does_not_hide_is_waited_for() -> None:
    # T = 4, d = 2, 10 steps: sent after 4 and 8, both hidden by 2 steps, and waited for after 10.
    part = PeriodicExchange(Exchange(()), first=4, every=4, at_end=True, hidden_steps=2)
    assert list(part.hidden(10)) == [(2, 2), (1, 0)]
    assert list(part.hidden(9)) == [(1, 2), (1, 1), (1, 0)]
    assert list(part.hidden(8)) == [(1, 2), (1, 0)]


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("name", ["diloco, late", "lte, late, streaming int8", "local-sgd, late, served"])
def test_the_clock_charges_what_was_planned(name: str, rate: float) -> None:
    run = tiny.variant_run(name, train={"steps": 11})
    link = Link(topology="star", up_bytes_per_s=rate, down_bytes_per_s=rate, latency_s=1e-6, source="guess")
    devices = load_profile("raspberry_x8").devices(4)
    clock = SimulatedClock(run, devices, link)
    communicator = VirtualCommunicator(4, clock.charge_transfer, clock.wait)
    method, data = build_method(run, communicator, tiny.CPU), tiny.batches(run)
    for step in range(11):
        clock.charge_step()
        method.step(*data.batch(step, range(4)), step)
        if method.merge_due(step):
            method.merge(step)
            clock.charge_merge()
    planned = round_time(run, run.model.shape(), devices, link)
    rounds = -(-11 // run.method.round_steps)
    assert clock.exchange_s == pytest.approx(planned.exchange_s * rounds, rel=1e-9, abs=1e-12)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """Be the only process of a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SlowChannel:
    """A channel whose exchanges do not end before they are let go."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.released, self.entered = channel, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        exchange = getattr(self.channel, name)
        return partial(self._held, exchange) if name in ("all_reduce", "all_gather", "to_server") else exchange

    def _held(self, exchange: Callable[..., Any], *arguments: Any) -> Any:
        self.entered.set()
        assert self.released.wait(60)
        return exchange(*arguments)


@pytest.mark.parametrize(
    "name", [name for name in tiny.VARIANTS if "late" in name and "int8" not in name and "nodes" not in name]
)
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")
def test_steps_go_on_while_a_merge_travels(name: str) -> None:
    run = tiny.variant_run(name, train={"steps": 12})
    communicator = TorchCommunicator(4, tiny.CPU, 60.0)
    slow = communicator._background_channel = SlowChannel(communicator._background_channel)  # type: ignore[assignment]
    method, data = build_method(run, communicator, tiny.CPU), tiny.batches(run)
    assert isinstance(method, Delayed) and isinstance(slow, SlowChannel)

    def step(number: int) -> None:
        method.step(*data.batch(number, range(4)), number)

    for number in range(4):
        step(number)
    method.merge(3)
    assert slow.entered.wait(60)
    for number in range(4, 3 + method.delay):
        step(number)
    travelling = [future.done() for future in communicator._in_flight]
    assert not any(travelling) and travelling
    arrived: list[Sequence[Tensor]] = []
    last = threading.Thread(target=lambda: arrived.append([step(3 + method.delay)]))  # type: ignore[list-item, func-returns-value]
    last.start()
    last.join(0.2)
    assert not arrived  # it waits for what it needs
    slow.released.set()
    last.join(60)
    assert arrived and not communicator._in_flight
    for number in range(4 + method.delay, 12):
        step(number)
        if method.merge_due(number):
            method.merge(number)
    expected = tiny.train(tiny.build(run)).weights
    for key, weight in method.merged_state().items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-9, atol=1e-12)
    communicator.close()


@pytest.mark.parametrize("name", ["lte", "lte, late", "lte, late, reduced"])
@torch.no_grad()
def test_a_device_that_is_replaced_leaves_what_it_had_added(name: str) -> None:
    run = tiny.variant_run(name, train={"steps": 40})
    method, restored = tiny.build(run), tiny.build(run)
    with torch.enable_grad():
        tiny.train(method, 0, 9 if "late" in name else 8)
    state = method.state.sharded()
    state.of_devices[1] = restored.init_lost_device(state.shared, state.of_devices[0], 1)
    restored.state.load_sharded(state)
    restored.after_lost_devices_init()
    assert isinstance(method, Lte) and isinstance(restored, Lte)
    assert bool(restored.fragments_in_flight()) == (name != "lte")
    for either in (method, restored):
        if isinstance(either, Delayed):
            either.arrive()
    for before, merger in zip(method.mergers, restored.mergers, strict=True):
        for layer, same in zip(merger.layers, before.layers, strict=True):
            assert torch.equal(layer.weight, same.weight)
            if layer.a0 is not None and layer.b0 is not None:
                layer.a.copy_(layer.a0)
                layer.b.copy_(layer.b0)
        merger.merge()  # nobody has learned anything: W stays
        for layer, same in zip(merger.layers, before.layers, strict=True):
            torch.testing.assert_close(layer.weight, same.weight, rtol=1e-12, atol=1e-13)
