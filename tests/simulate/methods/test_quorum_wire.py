"""Rounded merges without some devices: against slow twins, and nothing that was learned is lost or counts twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simulate.comm.mean_of_some import MeanOfSome
from simulate.comm.virtual import VirtualCommunicator
from simulate.config.run import Run
from simulate.layers.lora import lora_layers
from simulate.methods.lte.merge import LayerMerger
from simulate.methods.quorum import Quorum
from tests import tiny
from tests.reference.quorum_wire import RoundedDilocoTwin, RoundedLocalSgdTwin, RoundedLteTwin, RoundedMeanOfSome
from tests.selection import others_slow
from tests.simulate.methods import adapter_parity, parity
from tests.simulate.methods.test_quorum import plain, with_merges

# Late by one merge and by two, lost and back, alone; the last merge has all.
ROWS = ((5, 5, 2), (5, 0, 1), (0, 4, 0), (5, 5, 0), (5, -1, 3), (4, -1, 5), (5, 5, 4))


def dense(name: str, **method: Any) -> Run:
    run = parity.parity_run(name, merge_every=5, **method)
    train = run.train.model_copy(update={"steps": 34})
    return with_merges(run.model_copy(update={"train": train}), ROWS)


def lte(**method: Any) -> Run:
    method = {"merge_every": 5, "reset": "b", "frozen_a": True, "norms": "average", "heads_per_device": 2, **method}
    run = adapter_parity.parity_run("lte, paced", devices=3, train={"steps": 34}, **plain(method))
    return with_merges(run, ROWS)


DENSE: dict[str, tuple[Any, Run]] = {
    "local-sgd int8": (RoundedLocalSgdTwin, dense("local-sgd", wire="int8")),
    "local-sgd int4": (RoundedLocalSgdTwin, dense("local-sgd", wire="int4")),
    "diloco int8": (RoundedDilocoTwin, dense("diloco", wire="int8", fragments=1)),
    "local-sgd int2": (RoundedLocalSgdTwin, dense("local-sgd", wire="int2")),
}
LTE: dict[str, tuple[Any, Run]] = {
    "gathered int8": (RoundedLteTwin, lte(wire="int8")),
    "gathered int4": (RoundedLteTwin, lte(wire="int4")),
    "served int2": (RoundedLteTwin, lte(wire="int2", merge_transport="server")),
}


@pytest.mark.parametrize("name", others_slow(DENSE, ["local-sgd int4"]))
def test_rounded_weights_train_like_the_twin(name: str) -> None:
    parity.assert_trains_like(*DENSE[name])


@pytest.mark.parametrize("name", others_slow(LTE, ["gathered int8"]))
def test_rounded_factors_train_like_the_twin(name: str) -> None:
    adapter_parity.assert_trains_like(*LTE[name])


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_what_was_merged_and_the_errors_are_what_was_learned(data: st.DataObject) -> None:
    devices, elements = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 700))
    wire, merges = data.draw(st.sampled_from(["int8", "int4", "int2"])), data.draw(st.integers(1, 5))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    communicator = VirtualCommunicator(devices)
    engine = MeanOfSome(elements, wire, communicator, torch.zeros(0, dtype=torch.float64), fewest=1)
    twin = RoundedMeanOfSome(devices, elements, wire)
    learned = merged = torch.zeros(elements, dtype=torch.float64)
    for _ in range(merges):
        present = sorted(data.draw(st.sets(st.integers(0, devices - 1), min_size=1)))
        changes = torch.randn(devices, elements, generator=draw, dtype=torch.float64)
        away = engine.error_LX.clone()
        with communicator.among(present):
            (mean,) = engine.mean([changes[:, : elements // 2], changes[:, elements // 2 :]])
        learned, merged = learned + changes[present].sum(0) / devices, merged + mean
        torch.testing.assert_close(mean, twin.of({n: changes[n] for n in present}), rtol=1e-9, atol=1e-12)
        absent = [n for n in range(devices) if n not in present]
        assert torch.equal(engine.error_LX[absent], away[absent])  # who sends nothing keeps its error
        total = merged + engine.error_LX[:, :elements].sum(0) / devices
        torch.testing.assert_close(total, learned, rtol=1e-9, atol=1e-9)
    assert not engine.error_LX[:, elements:].any()


def sums_of_lte(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Return of one layer what all merges added to W, what all devices learned by their shares, and what is owed."""
    method, batches = tiny.build(run), tiny.batches(run)
    assert isinstance(method, Quorum)
    merger, options = method.mergers[0], method.options  # type: ignore[attr-defined]
    layer, count = lora_layers(method.model)[0], run.cluster.devices
    start, learned = layer.weight.clone(), torch.zeros_like(layer.weight)
    for step in range(run.train.steps):
        method.step(*batches.batch(step, range(count)), step)
        if method.merge_due(step):
            method.close_round(step)
            shares = method.shares()
            of_devices = [1 / count] * count if shares is None else shares.tolist()
            for n, b_HOR in enumerate(layer.b.detach().unflatten(0, (count, -1))):
                products = b_HOR @ layer.a.detach().unflatten(0, (count, -1))[n]
                learned += of_devices[n] * options.scale * products.mean(0) if n in method.participants else 0.0
            method.merge(step)
    owed_HOR = merger.errors[f"{layer.name}.b"].view_as(layer.b) / count
    owed = options.scale * (owed_HOR @ layer.a.detach()).unflatten(0, (count, -1)).mean(1).sum(0)
    return layer.weight - start, learned, owed


def test_merged_products_and_errors_are_what_heads_learned() -> None:
    merged, learned, owed = sums_of_lte(lte(wire="int4"))
    assert owed.norm() > 1e-3 * learned.norm()
    torch.testing.assert_close(merged + owed, learned, rtol=1e-9, atol=1e-12)


def test_sums_detect_errors_that_take_the_next_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unweighed:
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(LayerMerger, "_errors_of_some", lambda self, error_LX, key: Unweighed())
    merged, learned, owed = sums_of_lte(lte(wire="int4"))
    assert (merged + owed - learned).norm() > 1e-3 * learned.norm()


def test_a_device_that_comes_late_sends_what_it_owed_by_hand() -> None:
    # Of 1 and 100 in one block int8 keeps multiples of 100 / 127: 1 arrives as 100 / 127, and 27 / 127 are owed.
    communicator = VirtualCommunicator(2)
    engine = MeanOfSome(2, "int8", communicator, torch.zeros(0, dtype=torch.float64), fewest=1)
    step = float(torch.tensor(100 / 127).float())
    (first,) = engine.mean([torch.tensor([[1.0, 100.0], [0.0, 0.0]], dtype=torch.float64)])
    assert first.tolist() == pytest.approx([step / 2, 50.0], rel=1e-6)
    assert engine.error_LX[0, :2].tolist() == pytest.approx([1 - step, 0.0], abs=1e-5)
    with communicator.among([1]):
        (second,) = engine.mean([torch.tensor([[9.0, 9.0], [4.0, 4.0]], dtype=torch.float64)])
    assert second.tolist() == pytest.approx([2.0, 2.0], rel=1e-6)
    assert engine.error_LX[0, :2].tolist() == pytest.approx([1 - step, 0.0], abs=1e-5)
    (third,) = engine.mean([torch.zeros(2, 2, dtype=torch.float64)])
    assert third.tolist() == pytest.approx([(1 - step) / 2, 0.0], abs=1e-5)
